"""The outbox's partitions, one a UTC day: made ahead of time, filled from the default one, dropped after retention.

On a busy table: a partition of a coming day is attached without a lock that inserts would notice. One of today or of
the past, and a dropped one, lock inserts out for some milliseconds. A lock that waits makes every payment behind it
wait as well, so it is given up after `LOCK_TIMEOUT` and asked for again after a pause, over some 20 seconds: a
transaction that is stopped in its middle is ended by the server before that (infra/postgres/pool.py).

What payments write to comes first, and what cannot be done holds up nothing else: a day of the past that will not move
keeps neither the coming days from their partitions nor the rest from its retention.

DETACH CONCURRENTLY is no way to drop: Postgres refuses it on a table that has a default partition.
"""

import asyncio
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from functools import partial
from typing import Any, Final, TypeVar

import asyncpg

from infra.postgres.errors import AWAY, safe_message

COMMAND_TIMEOUT_SECONDS: Final = 300.0
PORTION_PAGES: Final = 1_000
"""Of the default partition, 8 MB: as much is moved by one statement, however long all of a day's rows take."""
LOCK_TIMEOUT: Final = "200ms"
PAUSES_SECONDS: Final = (0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0, 5.0)
PASS_SECONDS: Final = 10.0
"""How long a publisher may take to come past what was committed when its partition is about to go."""
# Any number that only this uses: processes that maintain at once take turns.
MAINTENANCE_LOCK: Final = 7_205_759_404

PARTITIONS: Final = """
    SELECT c.relname FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid
     WHERE i.inhparent = 'outbox'::regclass ORDER BY c.relname
"""
TODAY: Final = "SELECT (now() AT TIME ZONE 'UTC')::date"
DEFAULT_PAGES: Final = "SELECT pg_relation_size('outbox_default') / current_setting('block_size')::int"
DEFAULT_DAYS: Final = "SELECT DISTINCT (created_at AT TIME ZONE 'UTC')::date FROM outbox_default"
LAST: Final = "SELECT coalesce(max(xact), 0) FROM outbox WHERE created_at < $1"
# While nothing happens a slot stands still; what its relay has proven counts then.
SLOTS: Final = """
    SELECT s.slot_name, s.active,
           coalesce(s.confirmed_flush_lsn >= $1, false)
               OR coalesce(r.published_below > greatest($2, 1), false) AS is_past
      FROM pg_replication_slots AS s
      LEFT JOIN relay_slots AS r ON r.slot_name = s.slot_name::text AND r.gap IS NULL
           AND r.system_identifier = (SELECT system_identifier::text FROM pg_control_system())
     WHERE s.slot_type = 'logical' AND s.plugin = 'pgoutput' AND s.database = current_database() ORDER BY s.slot_name
"""

# A poll has no slot, and a relay without its slot publishes from the table what has no proof yet. What a checkpoint of
# another server calls published are that server's transactions: here it proves nothing, however far it is.
BEHIND: Final = """
    SELECT r.slot_name,
           r.published_below <= $1
               OR r.system_identifier <> (SELECT system_identifier::text FROM pg_control_system()) AS is_behind
      FROM relay_slots AS r
      LEFT JOIN pg_replication_slots AS s ON s.slot_name::text = r.slot_name AND s.database = current_database()
     WHERE r.source = 'poll' OR r.gap IS NOT NULL OR s.slot_name IS NULL ORDER BY r.slot_name
"""

_NAME: Final = re.compile(r"outbox_(\d{8})")
_CONTENDED: Final = (asyncpg.LockNotAvailableError, asyncpg.DeadlockDetectedError)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class MaintenanceReport:
    """What one round did. `kept_because` says why partitions past retention were not dropped, `failed` what else was to
    be done and could not be."""

    made: tuple[date, ...]
    moved_rows: int
    dropped: tuple[date, ...]
    kept_because: tuple[str, ...]
    failed: tuple[str, ...] = ()


async def maintain(url: str, *, days_ahead: int, retention_days: int) -> MaintenanceReport:
    """Make the partitions of today and the next `days_ahead` days; drop those over `retention_days` old.

    Rows that landed in the default partition move to the partition of their day. Does nothing when all is done;
    several processes may do it at once. What Postgres refuses, since the table stays too busy, say, is in the report.

    Raises:
        `infra.postgres.errors.AWAY`: Postgres cannot be reached, or is gone.
    """
    connection = await asyncpg.connect(url, timeout=10, command_timeout=COMMAND_TIMEOUT_SECONDS)
    try:
        await connection.execute(f"SELECT pg_advisory_lock({MAINTENANCE_LOCK:d})")  # released as the session ends
        await connection.execute(f"SET lock_timeout = '{LOCK_TIMEOUT}'")
        today = await connection.fetchval(TODAY)
        return await _Round(connection).all(
            {today + timedelta(days=ahead) for ahead in range(days_ahead + 1)}, today - timedelta(days=retention_days)
        )
    finally:
        await connection.close(timeout=10)


class _Round:
    """One round's steps, and what became of them."""

    def __init__(self, connection: "asyncpg.Connection[Any]") -> None:
        self._connection = connection
        self._moved: dict[date, int] = {}
        self._failed: list[str] = []

    async def all(self, wanted: set[date], oldest: date) -> MaintenanceReport:
        await self._make(wanted)
        found = await self._attempt("rows without a partition", partial(self._connection.fetch, DEFAULT_DAYS))
        await self._make({row[0] for row in found or ()} - wanted)
        dropped, kept = await self._attempt("old partitions", partial(_drop, self._connection, oldest)) or ((), ())
        return MaintenanceReport(tuple(self._moved), sum(self._moved.values()), dropped, kept, tuple(self._failed))

    async def _make(self, days: set[date]) -> None:
        for day in sorted(days - set(await _days(self._connection))):
            attach = partial(_attach, self._connection, day)
            moved = await self._attempt(f"the partition of {day}", partial(_patiently, attach))
            if moved is not None:
                self._moved[day] = moved

    async def _attempt(self, what: str, step: Callable[[], Awaitable[T]]) -> T | None:
        """What `step` returns, None where Postgres refuses it."""
        try:
            return await step()
        except AWAY as error:
            if self._connection.is_closed():
                raise
            self._failed.append(f"{what}: {safe_message(error)}")
            return None


async def _attach(connection: "asyncpg.Connection[Any]", day: date) -> int:
    """Make the partition of `day` with the rows that the default one has of it; the number of rows.

    The rows go in before it is attached: then it is no part of the publication yet, and none is published again. Most
    of them go while inserts continue; the attachment scans what is left of the default partition.
    """
    name, (start, end) = _name(day), _bounds(day)
    async with connection.transaction():
        await connection.execute(
            f"CREATE TABLE {name} (LIKE outbox INCLUDING DEFAULTS INCLUDING CONSTRAINTS INCLUDING INDEXES)"
        )
        moved = await _move(connection, day)
        if moved or day <= await connection.fetchval(TODAY) + timedelta(days=1):
            # Inserts must wait at the door: one that had chosen the default partition and waited there would fail,
            # since by then that partition refuses the day. Readers are not locked out until the attachment.
            await connection.execute("LOCK TABLE ONLY outbox IN SHARE ROW EXCLUSIVE MODE")
            moved += await _move(connection, day)
        if moved:
            # Who plans a query while the default partition is locked has looked up the partitions already, and looks
            # into them by a snapshot of later: it would find the moved rows in neither. So it waits before that.
            await connection.execute("LOCK TABLE ONLY outbox IN ACCESS EXCLUSIVE MODE")
        await connection.execute(f"ALTER TABLE outbox ATTACH PARTITION {name} FOR VALUES FROM ('{start}') TO ('{end}')")
    return moved


async def _move(connection: "asyncpg.Connection[Any]", day: date) -> int:
    """In portions, so that none takes as long as the client waits; all in the transaction that attaches it."""
    moved = 0
    for first in range(0, await connection.fetchval(DEFAULT_PAGES), PORTION_PAGES):
        done = await connection.execute(  # the name is made of a date
            "WITH moved AS (DELETE FROM outbox_default WHERE ctid >= $1 AND ctid < $2"  # noqa: S608
            " AND created_at >= $3 AND created_at < $4 RETURNING *)"
            f" INSERT INTO {_name(day)} SELECT * FROM moved",
            (first, 0),
            (first + PORTION_PAGES, 0),
            *_bounds(day),
        )
        moved += int(done.split()[-1])
    return moved


async def _drop(connection: "asyncpg.Connection[Any]", oldest: date) -> tuple[tuple[date, ...], tuple[str, ...]]:
    past = [day for day in await _days(connection) if day < oldest]
    if not past:
        return (), ()
    end = await _patiently(partial(_end_of, connection, past))
    last = await connection.fetchval(LAST, _bounds(max(past))[1])
    reasons = await _reasons_to_keep(connection, end, last)
    if reasons:
        return (), reasons
    dropped = tuple([day for day in past if await _patiently(partial(_drop_day, connection, day, last))])
    return dropped, ("somebody has written into them since they were looked at",) if len(dropped) < len(past) else ()


async def _drop_day(connection: "asyncpg.Connection[Any]", day: date, last: int) -> bool:
    """Drop the partition, if it has no row of a transaction after `last`: a long one may have written since the look.

    One up to `last` has not: it had ended when the publishers that go by ids had come past it.
    """
    async with connection.transaction():
        await connection.execute("LOCK TABLE ONLY outbox IN ACCESS EXCLUSIVE MODE")  # As readers do: it comes first.
        await connection.execute(f"LOCK TABLE {_name(day)} IN ACCESS EXCLUSIVE MODE")
        newest = await connection.fetchval(f"SELECT coalesce(max(xact), 0) FROM {_name(day)}")  # noqa: S608 - a date
        if newest > last:
            return False
        await connection.execute(f"DROP TABLE {_name(day)}")
    return True


async def _end_of(connection: "asyncpg.Connection[Any]", days: list[date]) -> int:
    """A position of the log that is behind everything committed to the partitions of `days`.

    The lock waits for those who are writing to them (nobody, after midnight) and for nobody else. What is committed is
    flushed: a position further on might be reached by no publisher while nothing happens.
    """
    async with connection.transaction():
        await connection.execute(f"LOCK TABLE {', '.join(map(_name, days))} IN SHARE MODE")
        return int(await connection.fetchval("SELECT pg_current_wal_flush_lsn()"))


async def _reasons_to_keep(connection: "asyncpg.Connection[Any]", end: int, last: int) -> tuple[str, ...]:
    """Why rows before `end`, of transactions up to `last`, may be unpublished yet; empty when every publisher has
    confirmed them.

    An idle slot says nothing: whoever makes one anew has to publish the table first, and streams only afterwards.
    """
    deadline = asyncio.get_running_loop().time() + PASS_SECONDS
    while True:
        slots = await connection.fetch(SLOTS, end, last)
        relays = await connection.fetch(BEHIND, last)
        if not slots and not relays:
            return ("there is neither a replication slot nor a relay: nobody publishes the outbox",)
        reasons = tuple(reason for slot in slots if (reason := _reason(slot, end)) is not None)
        reasons += tuple(_behind(relay["slot_name"]) for relay in relays if relay["is_behind"])
        is_final = not reasons or not all(slot["active"] for slot in slots)
        if is_final or asyncio.get_running_loop().time() > deadline:
            return reasons
        await asyncio.sleep(0.1)


def _reason(slot: asyncpg.Record, end: int) -> str | None:
    if not slot["active"]:
        return f"slot {slot['slot_name']} is inactive"
    return None if slot["is_past"] else f"slot {slot['slot_name']} has not confirmed {end >> 32:X}/{end & 0xFFFFFFFF:X}"


def _behind(relay: str) -> str:
    advice = "if it is gone for good, delete its row of relay_slots"
    return f"relay {relay} has not published all of it ({advice})"


async def _days(connection: "asyncpg.Connection[Any]") -> list[date]:
    names = [_NAME.fullmatch(row["relname"]) for row in await connection.fetch(PARTITIONS)]
    return [date.fromisoformat(match[1]) for match in names if match]


async def _patiently(step: Callable[[], Awaitable[T]]) -> T:
    """Do `step`, again after a pause while others hold the lock."""
    for pause in PAUSES_SECONDS:
        try:
            return await step()
        except _CONTENDED:
            await asyncio.sleep(pause)
    return await step()


def _name(day: date) -> str:
    return f"outbox_{day:%Y%m%d}"


def _bounds(day: date) -> tuple[datetime, datetime]:
    start = datetime.combine(day, time.min, UTC)
    return start, start + timedelta(days=1)
