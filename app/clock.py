"""How far this machine's clock is from Postgres's, which is used for all times except the age of a signature."""

import asyncio
import contextlib
import time
from collections.abc import Callable
from typing import Final

import asyncpg
import structlog
from prometheus_client import Gauge

from infra.postgres.errors import AWAY

log = structlog.get_logger(__name__)

WATCH_SECONDS: Final = 60.0
TIMEOUT_SECONDS: Final = 5.0
REPORTED_FROM_SECONDS: Final = 2.0
NOW: Final = "SELECT extract(epoch FROM clock_timestamp())::float8"
OFFSET_SECONDS: Final = Gauge("payments_clock_offset_seconds", "This process's clock minus Postgres's")


async def watch_clock(pool: "asyncpg.Pool[asyncpg.Record]") -> None:
    """Update the metric until cancelled; while Postgres is away it keeps its last value."""
    while True:
        with contextlib.suppress(*AWAY):
            await note_offset(pool)
        await asyncio.sleep(WATCH_SECONDS)


async def note_offset(pool: "asyncpg.Pool[asyncpg.Record]", clock: Callable[[], float] = time.time) -> None:
    """Compare once, assuming that Postgres read its clock halfway between question and answer.

    Raises:
        `infra.postgres.errors.AWAY`: Postgres is away.
    """
    async with pool.acquire(timeout=TIMEOUT_SECONDS) as connection:
        asked_at = clock()
        theirs = await connection.fetchval(NOW, timeout=TIMEOUT_SECONDS)
        answered_at = clock()
        offset = (asked_at + answered_at) / 2 - theirs
        if answered_at - asked_at > REPORTED_FROM_SECONDS:
            return  # The offset may be wrong by half of that.
    OFFSET_SECONDS.set(offset)
    if abs(offset) > REPORTED_FROM_SECONDS:
        log.warning("this machine's clock is off", offset_seconds=round(offset, 1))
