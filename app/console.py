"""What people see. Texts of other people stay what they are: no markup, no emoji codes, no commands to a terminal."""

import errno
import json
import shlex
from datetime import UTC, datetime
from typing import Any

from rich.console import Console


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Nobody reads any more: an error, which ends what runs in good order, and not an exit in the midst of it."""
        try:
            super().on_broken_pipe()
        except SystemExit:
            raise BrokenPipeError(errno.EPIPE, "nobody reads the output") from None


def new_console(*, to_stderr: bool = False) -> Console:
    """A console that prints what it is given; what is to be styled is a `rich.text.Text`."""
    return _Console(stderr=to_stderr, markup=False, emoji=False, highlight=False)


def print_json(value: Any) -> None:
    """Print one document for a program, in ASCII."""
    new_console().print_json(json.dumps(value), ensure_ascii=True)


def tell_of_more(limit: int) -> None:
    """That a list was cut; beside it, so that a program reads the list alone."""
    new_console(to_stderr=True).print(f"… and more: --limit shows more than {limit}")


def time_text(moment: datetime) -> str:
    """In UTC, to the second: `2026-01-31 12:00:00Z`."""
    return moment.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%SZ")


def safe_text(text: str) -> str:
    """The text on one line, as it may reach a terminal: what cannot be printed stands there escaped."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


def safe_lines(text: str) -> str:
    """As `safe_text`, of a text whose lines are ours."""
    return "\n".join(map(safe_text, text.expandtabs().split("\n")))


def shell_word(text: str) -> str:
    """The text as one word of a command to be copied, which a shell reads back as it was."""
    if text.isprintable():
        return shlex.quote(text)
    # Bash, zsh and ksh read these escapes, byte by byte and whatever the locale is.
    return "$'" + "".join(map(_shell_escape, text)) + "'"


def _shell_escape(character: str) -> str:
    if character in "\\'":
        return f"\\{character}"
    if character.isprintable():
        return character
    return "".join(f"\\x{byte:02x}" for byte in character.encode(errors="surrogateescape"))
