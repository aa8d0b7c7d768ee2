"""The write path's connections to Postgres, and what their sessions insist on.

The plans are pinned to the indexes (`PINNED_PLANS`): joined with `unnest`, Postgres guesses row counts, and a plan made
while a table was small would scan all of it for ever (tests/integration/test_query_plans.py reads the plans).
"""

import asyncio
from typing import Any, Final

import asyncpg

from infra.postgres.errors import translated

IDLE_IN_TRANSACTION_MS: Final = 10_000
"""A process that is stopped in the middle of its transaction keeps its payments locked for no longer than this."""

PINNED_PLANS: Final = {"enable_seqscan": "off", "enable_hashjoin": "off", "enable_mergejoin": "off"}

CLOSES_WITHIN: Final = 5.0
"""Seconds that a server may take to let connections go."""

Connection = Any
"""An asyncpg connection or the pool's proxy of one, which share no public type."""


async def create_pool(url: str, *, size: int) -> "asyncpg.Pool[asyncpg.Record]":
    """A pool for the write path, with the plans pinned.

    Raises:
        StoreUnavailable: Postgres cannot be reached.
    """
    with translated():
        return await asyncpg.create_pool(
            url,
            min_size=1,
            max_size=size,
            command_timeout=30,
            timeout=10,
            server_settings=PINNED_PLANS | {"idle_in_transaction_session_timeout": str(IDLE_IN_TRANSACTION_MS)},
            init=_insist_on_the_disk,
            reset=_keep_session,
        )


async def close_pool(pool: "asyncpg.Pool[asyncpg.Record]") -> None:
    """End its connections in good order, or at once where the server does not answer."""
    try:
        async with asyncio.timeout(CLOSES_WITHIN):
            await pool.close()
    except TimeoutError:
        pool.terminate()


async def _insist_on_the_disk(connection: Connection) -> None:
    """A provider is called, and a webhook answered, on the strength of a commit: it must outlive a crash of Postgres,
    whatever the database is set to. Whether standbys are waited for, too, is the database's own affair.
    """
    await connection.execute(
        "SELECT set_config('synchronous_commit', 'on', false) WHERE current_setting('synchronous_commit') = 'off'"
    )


async def _keep_session(_: Connection) -> None:
    """Transactions leave nothing behind in a session, so the pool's default reset would be a round trip for nothing."""
