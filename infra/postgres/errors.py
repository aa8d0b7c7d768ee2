"""What the driver's errors mean, and what may be told of them."""

from typing import Final

import asyncpg

AWAY: Final = (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError)
"""To who asks now and then, and has nothing at stake. Also where every host that answers is a standby, in the middle of
a fail-over: that is an InternalClientError."""


def told(error: BaseException) -> str:
    """Its message, for a log: without Postgres' details, which repeat the row, and what in it is a payer's."""
    message = str(error.args[0]) if isinstance(error, asyncpg.PostgresError) and error.args else str(error)
    return message or type(error).__name__
