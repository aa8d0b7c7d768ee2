"""The write path's connections to Postgres, and the session settings that they require.

Plans are pinned to the indexes (`PINNED_PLANS`): for joins with `unnest` Postgres guesses row counts, and a plan made
while a table was small would scan all of it for ever (tests/integration/test_query_plans.py checks the plans).
"""

import asyncio
from typing import Any, Final

import asyncpg

from infra.postgres.errors import translated

IDLE_IN_TRANSACTION_MS: Final = 10_000
"""A process that is suspended within a transaction keeps its payments locked for no longer than this."""

PINNED_PLANS: Final = {"enable_seqscan": "off", "enable_hashjoin": "off", "enable_mergejoin": "off"}

CLOSES_WITHIN: Final = 5.0
"""Seconds that the server may take to close connections."""

Connection = Any
"""An asyncpg connection or the pool's proxy for one; they share no public type."""


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
    """Close its connections in good order, or at once if the server does not answer."""
    try:
        async with asyncio.timeout(CLOSES_WITHIN):
            await pool.close()
    except TimeoutError:
        pool.terminate()


async def _insist_on_the_disk(connection: Connection) -> None:
    """Require that commits survive a crash of Postgres, whatever the database's setting: after a commit a provider is
    called, or a webhook answered. Whether a commit also waits for standbys stays the database's setting.
    """
    await connection.execute(
        "SELECT set_config('synchronous_commit', 'on', false) WHERE current_setting('synchronous_commit') = 'off'"
    )


async def _keep_session(_: Connection) -> None:
    """Do nothing: transactions leave nothing behind in a session, and the pool's default reset costs a round trip."""
