"""Metric of the log that each replication slot keeps, also one whose reader is gone; run by `payments http`."""

import asyncio
import contextlib
from typing import Final

import asyncpg
from prometheus_client import Gauge

from infra.postgres.errors import AWAY

WATCH_SECONDS: Final = 15.0
RETAINED: Final = """
    SELECT slot_name::text, coalesce(pg_current_wal_lsn() - restart_lsn, 0)::float8 AS bytes
      FROM pg_replication_slots WHERE database = current_database() AND NOT temporary
"""
RETAINED_BYTES: Final = Gauge("payments_slot_retained_bytes", "Log that a replication slot keeps", ["slot"])


async def watch_slots(postgres_url: str) -> None:
    """Keep the metric up to date until cancelled; while Postgres is away it keeps its last values."""
    while True:
        with contextlib.suppress(*AWAY):
            await note_slots(postgres_url)
        await asyncio.sleep(WATCH_SECONDS)


async def note_slots(postgres_url: str) -> None:
    """Query once.

    Raises:
        `infra.postgres.errors.AWAY`: Postgres is away.
    """
    connection = await asyncpg.connect(postgres_url, timeout=5, command_timeout=5)
    try:
        found = await connection.fetch(RETAINED)
    finally:
        await connection.close(timeout=5)
    RETAINED_BYTES.clear()
    for slot, size in found:
        RETAINED_BYTES.labels(slot).set(size)
