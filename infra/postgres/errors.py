"""What the driver's errors mean, and what may be told of them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import asyncpg

from domain.errors import ConcurrentUpdate, InputRefusedByStore, StoreUnavailable

LOST_RACE: Final = (asyncpg.DeadlockDetectedError, asyncpg.SerializationError, asyncpg.LockNotAvailableError)
"""Somebody else was first: the same again may succeed."""

REFUSED: Final = (asyncpg.IntegrityConstraintViolationError, asyncpg.DataError)
"""A constraint, or a type, says no to this input, now and later."""

UNAVAILABLE: Final = (
    OSError,
    asyncpg.InterfaceError,
    asyncpg.PostgresConnectionError,
    asyncpg.OperatorInterventionError,
    asyncpg.InsufficientResourcesError,
    asyncpg.PostgresSystemError,
    asyncpg.ReadOnlySQLTransactionError,
    asyncpg.InternalClientError,  # Every host that answers is a standby, in the middle of a fail-over.
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
"""It answers, and cannot be worked with: a password that has changed, a server or database that lets nobody in, a
schema of another release, a missing privilege, a session that was ended. Nothing of these is an input's fault."""

AWAY: Final = (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError)
"""To who asks now and then, and has nothing at stake."""


@contextmanager
def translated() -> Iterator[None]:
    """Vendor errors become ours, most specific first."""
    try:
        yield
    except LOST_RACE as error:
        raise ConcurrentUpdate(safe_message(error)) from error
    except REFUSED as error:
        raise InputRefusedByStore(safe_message(error)) from error
    except (*UNAVAILABLE, *UNUSABLE) as error:
        raise StoreUnavailable(safe_message(error)) from error


def safe_message(error: BaseException) -> str:
    """Its message, for a log: without Postgres' details, which repeat the row, and what in it is a payer's."""
    message = str(error.args[0]) if isinstance(error, asyncpg.PostgresError) and error.args else str(error)
    return message or type(error).__name__
