"""What the commands of the command line share: where the servers are, and errors that say what to do."""

# ruff: noqa: PLC0415 - as in cli.py: `payments --help` answers at once

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

if TYPE_CHECKING:
    from pydantic import ValidationError

    from app.settings import Settings

DataDir = Annotated[
    Path | None,
    typer.Option(envvar="PAYMENTS_DATA_DIR", help="Where data and logs are kept.", show_default=".local"),
]
AsJson = Annotated[bool, typer.Option("--json", help="The result as JSON, the message as it came.")]


def find_settings(data_dir: Path | None, *, needs: str) -> "Settings":
    """Settings by the environment, completed by a running `payments up` or `payments demo --stay`."""
    import os

    from app.stack_file import adopt_environment

    folder = data_dir or default_data_dir()
    if needs not in os.environ and adopt_environment([folder, folder / "demo"]) is None:
        fail(
            "nothing is running here: no `payments up` was found, and "
            f"{needs} is not set.\nStart everything with `payments up` in another terminal, or set {needs}."
        )
    return read_settings()


def read_settings() -> "Settings":
    """Settings by the environment; what cannot be read or cannot work together is a message, and the end."""
    from pydantic import ValidationError

    from app.settings import Settings

    try:
        return Settings()
    except ValidationError as error:
        fail("the settings in the environment cannot be used\n" + "\n".join(_complaints(error)))


def _complaints(error: "ValidationError") -> Iterator[str]:
    for each in error.errors(include_input=False, include_url=False):
        name = "__".join(str(part).upper() for part in each["loc"])
        yield f"  PAYMENTS_{name}: {each['msg']}" if name else f"  {each['msg']}"


def default_data_dir() -> Path:
    return Path(__file__).resolve().parents[1] / ".local"


@contextmanager
def readable_errors() -> Iterator[None]:
    """A server that is away, or an option that cannot be read, is a message and not a stack trace."""
    try:
        yield
    except ValueError as error:
        fail(str(error))
    except Exception as error:  # Whose errors these are is looked up only now: the libraries take a while to load.
        advice = _advice(error)
        if advice is None:
            raise
        fail(f"{type(error).__name__}: {error}\n{advice}")


def _advice(error: Exception) -> str | None:
    """What to do about an error of a server; None for what is none."""
    import asyncpg
    import psycopg
    from aiokafka.errors import KafkaError
    from sqlalchemy.exc import SQLAlchemyError

    from domain.errors import StoreUnavailable

    if isinstance(error, KafkaError):
        return "Is Kafka running, and PAYMENTS_KAFKA_BOOTSTRAP right?"
    if isinstance(error, (OSError, asyncpg.PostgresError, psycopg.Error, SQLAlchemyError, StoreUnavailable)):
        return "Is Postgres running, and PAYMENTS_POSTGRES_URL right?"
    return None


def fail(message: str, *, code: int = 1) -> NoReturn:
    typer.secho(f"payments: {message}", err=True, fg="red" if sys.stderr.isatty() else None)
    raise typer.Exit(code)
