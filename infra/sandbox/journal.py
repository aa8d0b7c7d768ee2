"""A simulator's memory across restarts: one JSON line per change; the last line of an id counts."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any


def beside(path: Path, name: str) -> Path:
    """The path with `name` inserted before its suffix."""
    return path.with_suffix(f".{name}{path.suffix}")


class Journal:
    """Appends to a file; does nothing if `path` is None. `append` returns once the operating system has the line."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._file: IO[str] | None = None

    def beside(self, name: str) -> "Journal":
        """Another journal, in a file with `name` in its own name, beside this one's."""
        return Journal(self._path and beside(self._path, name))

    def read(self) -> Iterator[dict[str, Any]]:
        """The lines written before, in order; stops at a line that a crash cut short."""
        if self._path is None or not self._path.exists():
            return
        with self._path.open(encoding="utf-8") as lines:
            for line in lines:
                if not line.endswith("\n"):
                    return
                yield json.loads(line)

    def rewrite(self, lines: Iterator[dict[str, Any]]) -> None:
        """Replace the whole journal by `lines`; later lines are appended to them."""
        if self._path is None:
            return
        self.close()
        draft = self._path.with_suffix(self._path.suffix + ".new")
        with draft.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
        draft.replace(self._path)
        self._file = self._path.open("a", encoding="utf-8")

    def append(self, line: dict[str, Any]) -> None:
        if self._file is not None:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
