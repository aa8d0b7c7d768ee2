"""What the commands of the command line share: where the servers are, and errors that say what to do."""

# ruff: noqa: PLC0415 - as in cli.py: `payments --help` answers at once

import errno
import math
import re
import sys
from collections.abc import Iterator
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
"""Postgres' codes for a table, column, type or function that is not there."""

AsJson = Annotated[bool, typer.Option("--json", help="As JSON.")]


def find_settings(data_dir: Path | None, *needs: str, or_defaults: bool = False) -> "Settings":
    """Settings by the environment, completed by a running `payments up` or `payments demo --stay`.

    Where there is neither what it needs nor anything running, the defaults do, or it is a message, and the end.
    """
    import os

    from app.stack_file import adopt_environment

    folder = data_dir or default_data_dir()
    missing = " and ".join(name for name in needs if name not in os.environ)
    if missing and adopt_environment([folder, folder / "demo"]) is None and not or_defaults:
        fail(
            f"nothing is running here: no `payments up` was found; not set: {missing}.\n"
            f"Start everything with `payments up` in another terminal, or set {missing}."
        )
    return read_settings()


def read_settings() -> "Settings":
    """Settings by the environment; what cannot be read or cannot work together is a message, and the end."""
    from pydantic import ValidationError
    from pydantic_settings import SettingsError

    from app.settings import Settings

    try:
        return Settings()
    except SettingsError as error:
        fail(f"the settings in the environment cannot be used\n  {_not_json(str(error))}")
    except ValidationError as error:
        fail("the settings in the environment cannot be used\n" + "\n".join(_complaints(error)))


def read_service_settings(*, for_calls: bool) -> "Settings":
    """Settings of a process that uses the gateways: they are known, and have what their webhooks, or calls, need."""
    from app import wiring

    settings = read_settings()
    with readable_errors():
        wiring.check_gateways(settings, for_calls=for_calls)
    return settings


def _not_json(told: str) -> str:
    """What to write for a list or a map that is no JSON; never what is written there, which may be a secret."""
    from app.settings import Settings

    found = re.search(r'field "(\w+)"', told)
    if found is None:
        return told
    name = found[1]
    default = Settings.model_fields[name].default
    example = '{"a": …, "b": …}' if isinstance(default, dict) else '["a", "b"]'
    if name == "gateways":
        example = '["stripe", "paypal"]'
    return f"PAYMENTS_{name.upper()} is no JSON; write it like PAYMENTS_{name.upper()}='{example}'"


def _complaints(error: "ValidationError") -> Iterator[str]:
    for each in error.errors(include_input=False, include_url=False):
        name = "__".join(str(part).upper() for part in each["loc"])
        told = each["msg"].removeprefix("Value error, ")
        yield f"  PAYMENTS_{name}: {told}" if name else f"  {told}"


def default_data_dir() -> Path:
    return Path(__file__).resolve().parents[1] / ".local"


@contextmanager
def readable_errors() -> Iterator[None]:
    """A server that is away, or an option that cannot be read, is a message and not a stack trace."""
    try:
        yield
    except BrokenPipeError:
        raise  # Nobody reads the output any more: Typer ends in silence, with 1.
    except ValueError as error:
        fail(str(error))
    except Exception as error:  # Whose errors these are is looked up only now: the libraries take a while to load.
        advice = advice_on(error)
        if advice is not None:
            fail(f"{error_text(error)}\n{advice}")
        if not isinstance(error, OSError):
            raise
        fail(error_text(error))


def error_text(error: Exception) -> str:
    """An error in a line: what it is, and what it says."""
    if isinstance(error, OSError) and not _is_of_a_server(error):
        return ": ".join(str(part) for part in (error.filename, error.strerror or error) if part)
    name, told = type(error).__name__, str(error)  # aiokafka's tell their names themselves.
    if not told:
        told = "no answer in time" if isinstance(error, TimeoutError) else "no more is known"
    return told if told.startswith(name) else f"{name}: {told}"


def advice_on(error: Exception) -> str | None:
    """What to do about an error of a server; None for what is none."""
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
    """What to do about an error of Kafka's."""
    from aiokafka.errors import (
        ClusterAuthorizationFailedError,
        GroupAuthorizationFailedError,
        KafkaConnectionError,
        TopicAuthorizationFailedError,
    )

    refusals = (ClusterAuthorizationFailedError, GroupAuthorizationFailedError, TopicAuthorizationFailedError)
    if isinstance(error, refusals):
        return "Kafka knows us, and does not let us: docs/operations/kafka.md has the rights that are needed."
    advice = "Is Kafka running, and PAYMENTS_KAFKA_BOOTSTRAP right?"
    if not isinstance(error, KafkaConnectionError):
        return advice
    # Who comes without TLS, or with the wrong password, is hung up on, and the client tells no more.
    secured = "If it wants TLS or a password, are PAYMENTS_KAFKA_SECURITY_PROTOCOL and the settings beside it right?"
    return f"{advice} {secured}"


def _is_of_a_server(error: Exception) -> bool:
    """Whether it comes of a connection, and not of a file."""
    import socket
    import ssl

    if isinstance(error, (ConnectionError, TimeoutError, socket.gaierror, ssl.SSLError)):
        return True
    if not isinstance(error, OSError) or error.filename is not None:
        return False
    # Asyncio tells of several addresses at once without a number; a Unix socket that is not there has no name here.
    return error.errno in (None, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENOENT, errno.EACCES)


def _lacks_schema(error: BaseException | None) -> bool:
    """Whether Postgres answered that there is no such table, column, type or function."""
    while error is not None:
        code = getattr(error, "sqlstate", None) or getattr(getattr(error, "orig", None), "sqlstate", None)
        if code in UNDEFINED:
            return True
        error = error.__cause__
    return False


def no_nan(number: float) -> float:
    """An option's number; nan, which is less than no bound, is wrong usage."""
    if math.isnan(number):
        raise typer.BadParameter("nan is no number.")
    return number


def read_payment_id(text: str) -> "UUID":
    """A payment's UUID; what is none is a message, and the end."""
    from uuid import UUID

    try:
        return UUID(text)
    except ValueError:
        fail(f"{text!r} is no payment id: a UUID such as 5d2f6a0e-6f0e-4a57-9b1c-1f2d3c4b5a69 is needed")


def confirm(question: str) -> None:
    """Go on only if a person says yes; where nobody answers, it is a message that names --yes, and the end.

    Raises:
        typer.Abort: the answer was no.
    """
    try:
        is_wanted = typer.confirm(question)
    except typer.Abort:
        if sys.stdin.isatty():
            raise
        fail("nobody answers here: give --yes, and nothing is asked")
    if not is_wanted:
        raise typer.Abort


def fail(message: str, *, code: int = 1) -> NoReturn:
    """Say it on standard error, and end."""
    from app.console import safe_lines

    typer.secho(safe_lines(f"payments: {message}"), err=True, fg="red" if sys.stderr.isatty() else None)
    raise typer.Exit(code)
