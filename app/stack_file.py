"""The file in which a running `payments up` tells other programs where everything is.

Promises: the note is there only while its writer keeps the lock beside it, so a note left by a crash misleads nobody.
"""

import fcntl
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Final, Self

LOCK_NAME: Final = "up.lock"
FILE_NAME: Final = "stack.json"


class AlreadyRunning(Exception):
    """Somebody else keeps everything running in this data folder; `stack` is what they wrote, None while they start."""

    def __init__(self, data_dir: Path, stack: "RunningStack | None") -> None:
        self.data_dir, self.stack = data_dir, stack
        super().__init__(f"everything is running already in {data_dir}")


@dataclass(frozen=True, slots=True)
class RunningStack:
    """Where the parts of a running installation are. `environment` makes our programs find them."""

    pid: int
    environment: dict[str, str]
    urls: dict[str, str]
    """By name: postgres, kafka, valkey, http, worker, relay, simulator."""
    pids: dict[str, int] = field(default_factory=dict)


class StackFile:
    """The note in one data folder, and the lock of the one process that may write it."""

    def __init__(self, data_dir: Path) -> None:
        self.path = data_dir / FILE_NAME
        self._lock_path = data_dir / LOCK_NAME
        self._lock: IO[str] | None = None

    def write(self, stack: RunningStack) -> None:
        """Replace the note; a reader sees the old or the new one, whole."""
        assert self._lock is not None, "only the owner of the lock writes"
        partial = self.path.with_suffix(".new")
        partial.unlink(missing_ok=True)
        partial.touch(mode=0o600)  # The URLs may contain the servers' passwords.
        partial.write_text(json.dumps(asdict(stack), indent=2) + "\n", encoding="utf-8")
        partial.replace(self.path)

    def read(self) -> RunningStack | None:
        """The running installation; None if there is none, or if it is still starting."""
        if not self.is_locked():
            return None
        try:
            return RunningStack(**json.loads(self.path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None

    def is_locked(self) -> bool:
        """Whether an installation is running, starting or stopping here."""
        try:
            with self._lock_path.open("r") as lock:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except OSError:
            return True
        return False

    def __enter__(self) -> Self:
        """Become the owner.

        Raises:
            AlreadyRunning: another process is.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lock = self._lock_path.open("a")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            lock.close()
            raise AlreadyRunning(self.path.parent, self.read()) from error
        self._lock = lock
        self.path.unlink(missing_ok=True)
        return self

    def __exit__(self, *_: object) -> None:
        assert self._lock is not None, "entered before"
        self.path.unlink(missing_ok=True)
        self._lock.close()
        self._lock = None


def adopt_environment(data_dirs: Iterable[Path]) -> RunningStack | None:
    """Let our settings find a running installation's servers; variables that are already set take precedence."""
    for data_dir in data_dirs:
        stack = StackFile(data_dir).read()
        if stack is not None:
            for name, value in stack.environment.items():
                os.environ.setdefault(name, value)
            return stack
    return None
