"""What the driver's errors mean, and which part of their messages may be logged."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import asyncpg

from domain.errors import ConcurrentUpdate, InputRefusedByStore, StoreUnavailable

LOST_RACE: Final = (asyncpg.DeadlockDetectedError, asyncpg.SerializationError, asyncpg.LockNotAvailableError)
"""Another transaction was first: a retry may succeed."""

REFUSED: Final = (asyncpg.IntegrityConstraintViolationError, asyncpg.DataError)
"""A constraint or a type rejects this input, and a retry will not help."""

UNAVAILABLE: Final = (
    OSError,
    asyncpg.InterfaceError,
    asyncpg.PostgresConnectionError,
    asyncpg.OperatorInterventionError,
    asyncpg.InsufficientResourcesError,
    asyncpg.PostgresSystemError,
    asyncpg.ReadOnlySQLTransactionError,
    asyncpg.InternalClientError,  # During a fail-over: every host that answers is a standby.
)
"""The server cannot be reached, or cannot work now."""

UNUSABLE: Final = (
    asyncpg.InvalidAuthorizationSpecificationError,
    asyncpg.InvalidCatalogNameError,
    asyncpg.ObjectNotInPrerequisiteStateError,
    asyncpg.InvalidSQLStatementNameError,
    asyncpg.SyntaxOrAccessError,
    asyncpg.FeatureNotSupportedError,
    asyncpg.InvalidTransactionStateError,
    asyncpg.InternalServerError,
)
"""The server answers but cannot be used: a changed password, a server or database that accepts no connections, a schema
of another release, a missing privilege, a terminated session. An input is never the cause of these."""

AWAY: Final = (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError)
"""Any failure to get an answer, for callers that poll and can simply ask again."""


@contextmanager
def translated() -> Iterator[None]:
    """Translate the driver's errors into ours, most specific first."""
    try:
        yield
    except LOST_RACE as error:
        raise ConcurrentUpdate(safe_message(error)) from error
    except REFUSED as error:
        raise InputRefusedByStore(safe_message(error)) from error
    except (*UNAVAILABLE, *UNUSABLE) as error:
        raise StoreUnavailable(safe_message(error)) from error


def safe_message(error: BaseException) -> str:
    """The error's message for a log, without Postgres's details, which repeat the row and a payer's data in it."""
    message = str(error.args[0]) if isinstance(error, asyncpg.PostgresError) and error.args else str(error)
    return message or type(error).__name__
