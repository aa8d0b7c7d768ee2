"""Output for people. Foreign texts are printed literally: no markup, no emoji codes, no terminal commands."""

import errno
import json
import shlex
from datetime import UTC, datetime
from typing import Any

from rich.console import Console


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Raise an error, so that running work ends in order, instead of exiting in the middle of it."""
        try:
            super().on_broken_pipe()
        except SystemExit:
            raise BrokenPipeError(errno.EPIPE, "nobody reads the output") from None


def new_console(*, to_stderr: bool = False) -> Console:
    """A console that prints strings literally; use `rich.text.Text` for styles."""
    return _Console(stderr=to_stderr, markup=False, emoji=False, highlight=False)


def print_json(value: Any) -> None:
    """Print one document for a program, in ASCII."""
    new_console().print_json(json.dumps(value), ensure_ascii=True)


def tell_of_more(limit: int) -> None:
    """Say on stderr that a list was cut, so that a program reads only the list on stdout."""
    new_console(to_stderr=True).print(f"… and more: --limit shows more than {limit}")


def time_text(moment: datetime) -> str:
    """In UTC, to the second: `2026-01-31 12:00:00Z`."""
    return moment.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%SZ")


def safe_text(text: str) -> str:
    """The text on one line, safe for a terminal: unprintable characters are escaped."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


def safe_lines(text: str) -> str:
    """Like `safe_text`, but keeps line breaks: for texts whose lines are ours."""
    return "\n".join(map(safe_text, text.expandtabs().split("\n")))


def shell_word(text: str) -> str:
    """The text quoted as one word of a shell command that a person can copy."""
    if text.isprintable():
        return shlex.quote(text)
    # Bash, zsh and ksh read these escapes byte by byte, whatever the locale.
    return "$'" + "".join(map(_shell_escape, text)) + "'"


def _shell_escape(character: str) -> str:
    if character in "\\'":
        return f"\\{character}"
    if character.isprintable():
        return character
    return "".join(f"\\x{byte:02x}" for byte in character.encode(errors="surrogateescape"))
