"""The outbox's partitions, one a UTC day: made ahead of time, filled from the default one, dropped after retention.

On a busy table: making and dropping a partition each lock the outbox for some milliseconds (longer where rows must
move). A lock that waits makes every payment behind it wait as well, so it is given up after `LOCK_TIMEOUT` and asked
for again after a pause.
"""

import asyncio
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from functools import partial
from typing import Any, Final, TypeVar

import asyncpg

LOCK_TIMEOUT: Final = "2s"
ATTEMPTS: Final = 4
MAX_LAG_BYTES: Final = 64 * 1024 * 1024
# Any number that only this uses: processes that maintain at once take turns.
MAINTENANCE_LOCK: Final = 7_205_759_404

PARTITIONS: Final = """
    SELECT c.relname FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid
     WHERE i.inhparent = 'outbox'::regclass ORDER BY c.relname
"""
TODAY: Final = "SELECT (now() AT TIME ZONE 'UTC')::date"
DEFAULT_DAYS: Final = "SELECT DISTINCT (created_at AT TIME ZONE 'UTC')::date FROM outbox_default"
SLOTS: Final = """
    SELECT slot_name, active, pg_wal_lsn_diff(pg_current_wal_lsn(), confirmed_flush_lsn)::bigint AS lag
      FROM pg_replication_slots
     WHERE slot_type = 'logical' AND plugin = 'pgoutput' AND database = current_database() ORDER BY slot_name
"""

_NAME: Final = re.compile(r"outbox_(\d{8})")
_CONTENDED: Final = (asyncpg.LockNotAvailableError, asyncpg.DeadlockDetectedError)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class MaintenanceReport:
    """What one round did. `kept_because` says why partitions past retention were not dropped."""

    made: tuple[date, ...]
    moved_rows: int
    dropped: tuple[date, ...]
    kept_because: tuple[str, ...]


async def maintain(url: str, *, days_ahead: int, retention_days: int) -> MaintenanceReport:
    """Make the partitions of today and the next `days_ahead` days; drop those over `retention_days` old.

    Rows that landed in the default partition move to the partition of their day. Does nothing when all is done;
    several processes may do it at once.

    Raises:
        OSError: Postgres cannot be reached.
        asyncpg.PostgresError: it refused; a LockNotAvailableError when the table stayed too busy.
    """
    connection = await asyncpg.connect(url, timeout=10, command_timeout=300)
    try:
        await connection.execute(f"SELECT pg_advisory_lock({MAINTENANCE_LOCK:d})")  # released as the session ends
        await connection.execute(f"SET lock_timeout = '{LOCK_TIMEOUT}'")
        today = await connection.fetchval(TODAY)
        made, moved = await _make(connection, {today + timedelta(days=ahead) for ahead in range(days_ahead + 1)})
        dropped, kept_because = await _drop(connection, today - timedelta(days=retention_days))
        return MaintenanceReport(made, moved, dropped, kept_because)
    finally:
        await connection.close(timeout=10)


async def _make(connection: "asyncpg.Connection[Any]", wanted: set[date]) -> tuple[tuple[date, ...], int]:
    found = {row[0] for row in await connection.fetch(DEFAULT_DAYS)}
    missing = sorted((wanted | found) - set(await _days(connection)))
    moved = [await _patiently(partial(_attach, connection, day)) for day in missing]
    return tuple(missing), sum(moved)


async def _attach(connection: "asyncpg.Connection[Any]", day: date) -> int:
    """Make the partition of `day` with the rows that the default one has of it; the number of rows.

    The rows go in before it is attached: then it is no part of the publication yet, and none is published again.
    """
    name, (start, end) = _name(day), _bounds(day)
    async with connection.transaction():
        # Inserts must wait at the door: one that had chosen the default partition and waited there would fail, since
        # by then that partition refuses the day. Readers are not locked out until the attachment.
        await connection.execute("LOCK TABLE outbox IN SHARE ROW EXCLUSIVE MODE")
        await connection.execute(
            f"CREATE TABLE {name} (LIKE outbox INCLUDING DEFAULTS INCLUDING CONSTRAINTS INCLUDING INDEXES)"
        )
        moved = await connection.execute(  # the name is made of a date
            "WITH moved AS (DELETE FROM outbox_default WHERE created_at >= $1 AND created_at < $2 RETURNING *)"  # noqa: S608
            f" INSERT INTO {name} SELECT * FROM moved",
            start,
            end,
        )
        await connection.execute(f"ALTER TABLE outbox ATTACH PARTITION {name} FOR VALUES FROM ('{start}') TO ('{end}')")
    return int(moved.split()[-1])


async def _drop(connection: "asyncpg.Connection[Any]", oldest: date) -> tuple[tuple[date, ...], tuple[str, ...]]:
    past = [day for day in await _days(connection) if day < oldest]
    if not past:
        return (), ()
    reasons = await _reasons_to_keep(connection)
    if reasons:
        return (), reasons
    for day in past:
        await _patiently(partial(connection.execute, f"DROP TABLE {_name(day)}"))
    return tuple(past), ()


async def _reasons_to_keep(connection: "asyncpg.Connection[Any]") -> tuple[str, ...]:
    """Why old rows may be unpublished yet; empty when every publisher is at work and close behind."""
    slots = await connection.fetch(SLOTS)
    if not slots:
        return ("there is no replication slot: nobody publishes the outbox",)
    return tuple(reason for slot in slots if (reason := _reason(slot)) is not None)


def _reason(slot: asyncpg.Record) -> str | None:
    if not slot["active"]:
        return f"slot {slot['slot_name']} is inactive"
    if slot["lag"] is None or slot["lag"] > MAX_LAG_BYTES:
        return f"slot {slot['slot_name']} lags {slot['lag']} bytes"
    return None


async def _days(connection: "asyncpg.Connection[Any]") -> list[date]:
    names = [_NAME.fullmatch(row["relname"]) for row in await connection.fetch(PARTITIONS)]
    return [date.fromisoformat(match[1]) for match in names if match]


async def _patiently(step: Callable[[], Awaitable[T]]) -> T:
    """Do `step`, again after a pause while others hold the lock."""
    for attempt in range(1, ATTEMPTS):
        try:
            return await step()
        except _CONTENDED:
            await asyncio.sleep(0.2 * 2**attempt)
    return await step()


def _name(day: date) -> str:
    return f"outbox_{day:%Y%m%d}"


def _bounds(day: date) -> tuple[datetime, datetime]:
    start = datetime.combine(day, time.min, UTC)
    return start, start + timedelta(days=1)
