"""The outbox's partitions, one per UTC day: created ahead, filled from the default partition, dropped after retention.

On a busy table: attaching a partition for a future day takes no lock that blocks inserts. Attaching one for today or
the past, and dropping one, block inserts for some milliseconds. A lock that waits makes every payment behind it wait
as well, so each attempt gives up after `LOCK_TIMEOUT` and is repeated after a pause, for about 20 seconds: before that
the server ends a transaction that is suspended midway (infra/postgres/pool.py).

Partitions that payments write to come first, and a failed step does not hold up the others: a past day that cannot be
moved prevents neither the future days' partitions nor the retention of the rest.

DETACH CONCURRENTLY cannot be used before dropping: Postgres refuses it on a table that has a default partition.
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
"""8 MB of the default partition: one statement moves as much, however long moving all of a day's rows takes."""
LOCK_TIMEOUT: Final = "200ms"
PAUSES_SECONDS: Final = (0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0, 5.0)
PASS_SECONDS: Final = 10.0
"""How long a publisher may take to pass the last commit of a partition that is about to be dropped."""
# Any number that only this module uses: processes that maintain at the same time take turns.
MAINTENANCE_LOCK: Final = 7_205_759_404

PARTITIONS: Final = """
    SELECT c.relname FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid
     WHERE i.inhparent = 'outbox'::regclass ORDER BY c.relname
"""
TODAY: Final = "SELECT (now() AT TIME ZONE 'UTC')::date"
DEFAULT_PAGES: Final = "SELECT pg_relation_size('outbox_default') / current_setting('block_size')::int"
DEFAULT_DAYS: Final = "SELECT DISTINCT (created_at AT TIME ZONE 'UTC')::date FROM outbox_default"
LAST: Final = "SELECT coalesce(max(xact), 0) FROM outbox WHERE created_at < $1"
# An idle slot does not advance; then its relay's proof of publication counts.
SLOTS: Final = """
    SELECT s.slot_name, s.active,
           coalesce(s.confirmed_flush_lsn >= $1, false)
               OR coalesce(r.published_below > greatest($2, 1), false) AS is_past
      FROM pg_replication_slots AS s
      LEFT JOIN relay_slots AS r ON r.slot_name = s.slot_name::text AND r.gap IS NULL
           AND r.system_identifier = (SELECT system_identifier::text FROM pg_control_system())
     WHERE s.slot_type = 'logical' AND s.plugin = 'pgoutput' AND s.database = current_database() ORDER BY s.slot_name
"""

# A poll has no slot, and a relay that has lost its slot publishes from the table whatever has no proof yet. A
# checkpoint of another server refers to that server's transactions: it proves nothing here, however far it is.
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
    """The result of one round. `kept_because` says why partitions past retention were not dropped, `failed` which other
    steps failed."""

    made: tuple[date, ...]
    moved_rows: int
    dropped: tuple[date, ...]
    kept_because: tuple[str, ...]
    failed: tuple[str, ...] = ()


async def maintain(url: str, *, days_ahead: int, retention_days: int) -> MaintenanceReport:
    """Create the partitions of today and the next `days_ahead` days; drop those over `retention_days` old.

    Rows in the default partition move to the partition of their day. Does nothing when everything is done; several
    processes may run it at once. Steps that Postgres refuses, for example on too busy a table, are in the report.

    Raises:
        `infra.postgres.errors.AWAY`: Postgres cannot be reached, or is gone.
    """
    connection = await asyncpg.connect(url, timeout=10, command_timeout=COMMAND_TIMEOUT_SECONDS)
    try:
        await connection.execute(f"SELECT pg_advisory_lock({MAINTENANCE_LOCK:d})")  # released when the session ends
        await connection.execute(f"SET lock_timeout = '{LOCK_TIMEOUT}'")
        today = await connection.fetchval(TODAY)
        return await _Round(connection).all(
            {today + timedelta(days=ahead) for ahead in range(days_ahead + 1)}, today - timedelta(days=retention_days)
        )
    finally:
        await connection.close(timeout=10)


class _Round:
    """One round's steps and their results."""

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
        """The result of `step`; None if Postgres refuses it, which is noted in the report."""
        try:
            return await step()
        except AWAY as error:
            if self._connection.is_closed():
                raise
            self._failed.append(f"{what}: {safe_message(error)}")
            return None


async def _attach(connection: "asyncpg.Connection[Any]", day: date) -> int:
    """Create the partition of `day` with that day's rows of the default partition; returns their number.

    The rows move before it is attached: it is not part of the publication yet, so none is published again. Most move
    while inserts continue; attaching scans what is left of the default partition.
    """
    name, (start, end) = _name(day), _bounds(day)
    async with connection.transaction():
        await connection.execute(
            f"CREATE TABLE {name} (LIKE outbox INCLUDING DEFAULTS INCLUDING CONSTRAINTS INCLUDING INDEXES)"
        )
        moved = await _move(connection, day)
        if moved or day <= await connection.fetchval(TODAY) + timedelta(days=1):
            # Inserts must wait at the parent table: one that had already chosen the default partition and waited there
            # would fail, as that partition then refuses the day. Readers are not blocked until the attachment.
            await connection.execute("LOCK TABLE ONLY outbox IN SHARE ROW EXCLUSIVE MODE")
            moved += await _move(connection, day)
        if moved:
            # A query planned while the default partition is locked has looked up the partitions already, and reads them
            # with a later snapshot: it would find the moved rows in neither. So it must wait before that.
            await connection.execute("LOCK TABLE ONLY outbox IN ACCESS EXCLUSIVE MODE")
        await connection.execute(f"ALTER TABLE outbox ATTACH PARTITION {name} FOR VALUES FROM ('{start}') TO ('{end}')")
    return moved


async def _move(connection: "asyncpg.Connection[Any]", day: date) -> int:
    """Move the day's rows in portions, each shorter than the client's time-out; all in the attaching transaction."""
    moved = 0
    for first in range(0, await connection.fetchval(DEFAULT_PAGES), PORTION_PAGES):
        done = await connection.execute(  # the name is built from a date
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
    """Drop the partition unless it has a row of a transaction after `last`: a long one may have written meanwhile.

    A transaction up to `last` cannot have: it had ended when the publishers that go by transaction ids passed it.
    """
    async with connection.transaction():
        await connection.execute("LOCK TABLE ONLY outbox IN ACCESS EXCLUSIVE MODE")  # First, as in readers' lock order.
        await connection.execute(f"LOCK TABLE {_name(day)} IN ACCESS EXCLUSIVE MODE")
        newest = await connection.fetchval(f"SELECT coalesce(max(xact), 0) FROM {_name(day)}")  # noqa: S608 - a date
        if newest > last:
            return False
        await connection.execute(f"DROP TABLE {_name(day)}")
    return True


async def _end_of(connection: "asyncpg.Connection[Any]", days: list[date]) -> int:
    """A position of the log after everything committed to the partitions of `days`.

    The lock waits only for their writers (there are none after midnight). Everything committed is flushed; a position
    further on might not be reached by any publisher while nothing happens.
    """
    async with connection.transaction():
        await connection.execute(f"LOCK TABLE {', '.join(map(_name, days))} IN SHARE MODE")
        return int(await connection.fetchval("SELECT pg_current_wal_flush_lsn()"))


async def _reasons_to_keep(connection: "asyncpg.Connection[Any]", end: int, last: int) -> tuple[str, ...]:
    """Why rows before `end`, of transactions up to `last`, may not be published yet; empty when every publisher has
    confirmed them.

    An inactive slot proves nothing: a relay that recreates its slot publishes the table first and streams afterwards.
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
        return f"slot {slot['slot_name']} is inactive (start what reads it, or drop the slot if that is gone for good)"
    return None if slot["is_past"] else f"slot {slot['slot_name']} has not confirmed {end >> 32:X}/{end & 0xFFFFFFFF:X}"


def _behind(relay: str) -> str:
    advice = "if it is gone for good, delete its row of relay_slots"
    return f"relay {relay} has not published all of it ({advice})"


async def _days(connection: "asyncpg.Connection[Any]") -> list[date]:
    names = [_NAME.fullmatch(row["relname"]) for row in await connection.fetch(PARTITIONS)]
    return [date.fromisoformat(match[1]) for match in names if match]


async def _patiently(step: Callable[[], Awaitable[T]]) -> T:
    """Do `step`, and repeat it after a pause while others hold the lock."""
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
