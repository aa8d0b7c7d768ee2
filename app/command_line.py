"""Shared by all commands of the command line: finding the servers, and errors that say what to do."""

# ruff: noqa: PLC0415 - as in cli.py: `payments --help` answers at once

import errno
import math
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, NoReturn

import typer

if TYPE_CHECKING:
    from uuid import UUID

    from pydantic import ValidationError

    from app.settings import Settings

DataDir = Annotated[
    Path | None,
    typer.Option(
        envvar="PAYMENTS_DATA_DIR", file_okay=False, help="Where data and logs are kept.", show_default=".local"
    ),
]
UNDEFINED: Final = frozenset(("42P01", "42703", "42704", "42883"))
"""Postgres error codes for a table, column, type or function that does not exist."""

DENIED: Final = "42501"
"""Postgres' code for a missing privilege."""

LOOKS_LIKE: Final = 0.95
"""Similarity of two names: one letter of about twenty differs."""

AsJson = Annotated[bool, typer.Option("--json", help="As JSON.")]


def find_settings(data_dir: Path | None, *needs: str, or_defaults: bool = False) -> "Settings":
    """Settings from the environment, completed by a running `payments up` or `payments demo --stay`.

    If variables of `needs` are missing and nothing is running, the defaults apply with `or_defaults`; without it, this
    prints a message and exits.
    """
    import os

    from app.stack_file import adopt_environment

    folder = data_dir or default_data_dir()
    missing = " and ".join(name for name in needs if name not in os.environ)
    if missing and adopt_environment([folder, folder / "demo"]) is None and not or_defaults:
        fail(
            f"nothing is running here: no `payments up` was found in {folder} (another folder: --data-dir, or"
            f" PAYMENTS_DATA_DIR); not set: {missing}.\n"
            f"Start everything with `payments up` in another terminal, or set {missing}."
        )
    return read_settings()


def read_settings() -> "Settings":
    """Settings from the environment; prints a message and exits if they are invalid or contradict each other."""
    from pydantic import ValidationError
    from pydantic_settings import SettingsError

    from app.settings import Settings

    _warn_of_misspelt(Settings.model_fields)
    try:
        return Settings()
    except SettingsError as error:
        fail(f"the settings in the environment cannot be used\n  {_not_json(str(error))}")
    except ValidationError as error:
        fail("the settings in the environment cannot be used\n" + "\n".join(_complaints(error)))


def _warn_of_misspelt(fields: Iterable[str]) -> None:
    """Name variables that look like a setting and are none. Others may be anybody's: Kubernetes sets PAYMENTS_PORT."""
    import os

    known = {f"PAYMENTS_{name.upper()}" for name in fields}
    for name in sorted(name for name in os.environ if name.startswith("PAYMENTS_") and name not in known):
        import difflib  # mostly there is nothing to compare, and every process starts here

        if meant := difflib.get_close_matches(name, known, n=1, cutoff=LOOKS_LIKE):
            typer.secho(f"payments: {name} is not a setting and is ignored; is {meant[0]} meant?", err=True)


def read_service_settings(*, for_calls: bool) -> "Settings":
    """Settings of a process that uses gateways, checked: each is known, and has what its webhooks, or calls, need."""
    from app import wiring

    settings = read_settings()
    with readable_errors():
        wiring.check_gateways(settings, for_calls=for_calls)
    return settings


def _not_json(message: str) -> str:
    """What to write for a list or map that is not valid JSON; without the value itself, which may be a secret."""
    from app.settings import Settings

    found = re.search(r'field "(\w+)"', message)
    if found is None:
        return message
    name = found[1]
    default = Settings.model_fields[name].default
    example = '{"a": …, "b": …}' if isinstance(default, dict) else '["a", "b"]'
    if name == "gateways":
        example = '["stripe", "paypal"]'
    return f"PAYMENTS_{name.upper()} is not valid JSON; write it like PAYMENTS_{name.upper()}='{example}'"


def _complaints(error: "ValidationError") -> Iterator[str]:
    for each in error.errors(include_input=False, include_url=False):
        name = "__".join(str(part).upper() for part in each["loc"])
        message = each["msg"].removeprefix("Value error, ")
        yield f"  PAYMENTS_{name}: {message}" if name else f"  {message}"


def default_data_dir() -> Path:
    return Path(__file__).resolve().parents[1] / ".local"


def folder_option(data_dir: Path) -> str:
    """The option by which a command in another terminal finds what runs in this data folder; empty for the default."""
    from app.console import shell_word

    if data_dir.resolve() in (default_data_dir(), default_data_dir() / "demo"):
        return ""
    return f" --data-dir {shell_word(str(data_dir.resolve()))}"


@contextmanager
def readable_errors() -> Iterator[None]:
    """Turn an unreachable server, or an unreadable option, into a message instead of a stack trace."""
    try:
        yield
    except BrokenPipeError:
        raise  # Nobody reads the output any more: Typer exits silently with 1.
    except ValueError as error:
        fail(str(error))
    except Exception as error:  # Classified only now: the libraries that define these errors are slow to import.
        advice = advice_on(error)
        if advice is not None:
            fail(f"{error_text(error)}\n{advice}")
        if not isinstance(error, OSError):
            raise
        fail(error_text(error))


def error_text(error: Exception) -> str:
    """An error in one line: its type and its message."""
    if isinstance(error, OSError) and not _is_of_a_server(error):
        return ": ".join(str(part) for part in (error.filename, error.strerror or error) if part)
    error = getattr(error, "orig", None) or error  # SQLAlchemy's own text repeats the statement and its parameters.
    name, message = type(error).__name__, str(error)  # The messages of aiokafka's errors begin with their names.
    if not message:
        message = "no answer in time" if isinstance(error, TimeoutError) else "no more is known"
    return message if message.startswith(name) else f"{name}: {message}"


def advice_on(error: Exception) -> str | None:
    """What to do about a server's error; None for any other error."""
    import asyncpg
    import psycopg
    from aiokafka.errors import KafkaError, MessageSizeTooLargeError, RecordListTooLargeError
    from alembic.util import CommandError
    from sqlalchemy.exc import SQLAlchemyError

    from app.maintenance import LeftUndone
    from domain.errors import StoreUnavailable

    if isinstance(error, LeftUndone):
        return "Schema and topics are there. `payments http` tries again every hour, `payments maintain` at once."
    if _lacks_schema(error):
        return "The database is not at this version's schema: run `payments migrate`."
    if DENIED in _sqlstates(error):
        return "Postgres knows this role, and does not let it: GRANT it what the message names."
    if isinstance(error, (MessageSizeTooLargeError, RecordListTooLargeError)):
        return "The topic takes no message of that size: raise its max.message.bytes."
    if isinstance(error, CommandError):
        return "The revisions are the numbers of the files in migrations/versions; `base` is an empty database."
    if isinstance(error, KafkaError):
        return _advice_on_kafka(error)
    drivers = (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, psycopg.Error)
    if isinstance(error, (*drivers, SQLAlchemyError, StoreUnavailable)) or _is_of_a_server(error):
        return "Is Postgres running, and PAYMENTS_POSTGRES_URL right?"
    return None


def _advice_on_kafka(error: Exception) -> str:
    """What to do about an error from Kafka."""
    from aiokafka.errors import (
        ClusterAuthorizationFailedError,
        GroupAuthorizationFailedError,
        KafkaConnectionError,
        TopicAuthorizationFailedError,
    )

    refusals = (ClusterAuthorizationFailedError, GroupAuthorizationFailedError, TopicAuthorizationFailedError)
    if isinstance(error, refusals):
        return "Kafka knows this user, but denies access: docs/operations/kafka.md lists the rights that are needed."
    advice = "Is Kafka running, and PAYMENTS_KAFKA_BOOTSTRAP right?"
    if not isinstance(error, KafkaConnectionError):
        return advice
    # A broker closes a connection without TLS or with a wrong password, and the client reports no more than that.
    secured = "If it wants TLS or a password, are PAYMENTS_KAFKA_SECURITY_PROTOCOL and the settings beside it right?"
    return f"{advice} {secured}"


def _is_of_a_server(error: Exception) -> bool:
    """Whether the error comes from a connection, not from a file."""
    import socket
    import ssl

    if isinstance(error, (ConnectionError, TimeoutError, socket.gaierror, ssl.SSLError)):
        return True
    if not isinstance(error, OSError) or error.filename is not None:
        return False
    # asyncio reports a failure of several addresses without an errno; a missing Unix socket has no filename here.
    return error.errno in (None, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENOENT, errno.EACCES)


def _lacks_schema(error: BaseException | None) -> bool:
    """Whether Postgres answered that a table, column, type or function does not exist."""
    return not UNDEFINED.isdisjoint(_sqlstates(error))


def _sqlstates(error: BaseException | None) -> set[str]:
    """Postgres's codes of the error and its causes."""
    codes = set()
    while error is not None:
        codes.add(getattr(error, "sqlstate", None) or getattr(getattr(error, "orig", None), "sqlstate", None))
        error = error.__cause__
    return {code for code in codes if code}


def no_nan(number: float) -> float:
    """An option's number. NaN is refused as wrong usage: no bound would catch it."""
    if math.isnan(number):
        raise typer.BadParameter("must be a number, not nan.")
    return number


def read_payment_id(text: str) -> "UUID":
    """A payment's UUID; prints a message and exits if the text is not one."""
    from uuid import UUID

    try:
        return UUID(text)
    except ValueError:
        fail(f"{text!r} is not a payment id: write a UUID like 5d2f6a0e-6f0e-4a57-9b1c-1f2d3c4b5a69")


def confirm(question: str) -> None:
    """Go on only if a person says yes. Where nobody can answer, prints a message that names --yes, and exits.

    Raises:
        typer.Abort: the answer was no.
    """
    try:
        is_wanted = typer.confirm(question)
    except typer.Abort:
        if sys.stdin.isatty():
            raise
        fail("nobody can answer here: use --yes to skip the question")
    if not is_wanted:
        raise typer.Abort


def fail(message: str) -> NoReturn:
    """Print the message on standard error and exit with 1."""
    from app.console import safe_lines

    typer.secho(safe_lines(f"payments: {message}"), err=True, fg="red" if sys.stderr.isatty() else None)
    raise typer.Exit(1)
