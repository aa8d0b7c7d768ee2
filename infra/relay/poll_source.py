"""Events from the table itself, for databases without logical replication.

Transaction ids and sequences commit out of order, so `id > last` would lose events. What all transactions below the
oldest running one wrote is final: that is a window. Within a window the order is that of `position`, which is taken
while the payment is locked; a transaction that waited for another ends after it, so that no payment is split the wrong
way round between two windows. NOTIFY wakes the reader; its trigger is on only while a relay polls.
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable
from typing import Any, Final

import psycopg
import structlog

from infra.relay import metrics
from infra.relay.config import RelayConfig
from infra.relay.pgoutput import OutboxEvent
from infra.relay.prefix import Group
from infra.relay.progress import (
    SAVE_WINDOW,
    Mark,
    find_mark,
    forget_gap,
    forget_transactions,
    refuse_gap,
    set_notify,
    start_mark,
)
from infra.relay.scan import COLUMNS, event_of
from infra.relay.source import Desk, Room, Take
from infra.relay.stream import CONNECTION, with_settings

log = structlog.get_logger(__name__)

PORTION: Final = 2000
BLOCKED_SECONDS: Final = (0.001, 0.05)
"""How soon to look again while events are visible behind a transaction that still runs: it may end without a word."""

# The horizon and the rows are of one snapshot. A bound window is finished, whatever has happened since.
READ: Final = f"""
    WITH w AS MATERIALIZED (
        SELECT coalesce(%(end)s, pg_snapshot_xmin(pg_current_snapshot())::text::bigint) AS "end")
    SELECT w."end", r.*
      FROM w LEFT JOIN LATERAL (
        SELECT o.position AS at, (extract(epoch FROM o.created_at) * 1000000)::bigint AS written_us, {COLUMNS}
          FROM outbox AS o
         WHERE o.xact >= %(begin)s AND o.xact < w."end" AND o.position > %(position)s
         ORDER BY o.position LIMIT {PORTION}) AS r ON true
     ORDER BY r.at
"""  # noqa: S608 - names from our own constants
REST: Final = f"""
    SELECT o.position, (extract(epoch FROM o.created_at) * 1000000)::bigint, {COLUMNS} FROM outbox AS o
     WHERE o.xact >= %(begin)s AND o.xact < %(end)s AND o.position > %(position)s
     ORDER BY o.position
"""  # noqa: S608 - names from our own constants
OLD: Final = f"""
    SELECT 0, 0, {COLUMNS} FROM outbox AS o WHERE o.xact IS NULL ORDER BY o.aggregateid, o.payment_seq
"""  # noqa: S608 - names from our own constants
BLOCKED: Final = "SELECT EXISTS (SELECT FROM outbox WHERE xact >= %s)"
SYSTEM: Final = "SELECT system_identifier::text FROM pg_control_system()"
_EPOCH_2000_US: Final = 946_684_800_000_000


class _Step:
    """A portion that was handed over, and the position that it leads to."""

    def __init__(self, begin: int, end: int | None, position: int) -> None:
        self.begin, self.end, self.position = begin, end, position
        self.group = Group()


async def connect_reader(url: str) -> psycopg.AsyncConnection:
    """A connection whose plans walk the index, whatever the statistics say.

    Of a table that has grown since they were made Postgres believes that a third of it is new, and would look through
    all of it for the first such row: 0.7 s at 2 million rows, for every transaction that is published.
    """
    settings = with_settings("-c enable_seqscan=off")
    return await psycopg.AsyncConnection.connect(url, application_name="relay", **settings)


class PollSource:
    """A cursor over the table; fits `infra.relay.source.Source`."""

    def __init__(self, config: RelayConfig, leader: psycopg.AsyncConnection) -> None:
        self._config = config
        self._leader = leader
        self._reader: psycopg.AsyncConnection
        self._listener: psycopg.AsyncConnection
        self._listening: asyncio.Task[None] | None = None
        self._on_ready: Callable[[], None] | None = None
        self._is_woken = True
        self._begin, self._position = 0, 0
        self._end: int | None = None
        self._rest: psycopg.AsyncServerCursor[Any] | None = None
        self._left: deque[tuple[Any, ...]] = deque()
        self._steps: deque[_Step] = deque()
        self._pause, _ = BLOCKED_SECONDS
        self._saved: _Step | None = None
        self._is_rest_used = False

    async def open(self, desk: Desk) -> None:
        url = self._config.postgres_url
        self._reader = await connect_reader(url)
        self._listener = await psycopg.AsyncConnection.connect(url, application_name="relay", **CONNECTION)
        await set_notify(self._leader, is_on=True)
        await self._listener.execute("LISTEN payments_outbox")
        self._listening = asyncio.create_task(self._listen())
        row = await (await self._leader.execute(SYSTEM)).fetchone()
        assert row is not None, "the query always gives a row"
        await self._prepare(desk, row[0], await find_mark(self._leader, self._config.slot))

    async def _prepare(self, desk: Desk, system: str, mark: Mark | None) -> None:
        is_moved = mark is not None and mark.system_identifier != system
        if mark is None or mark.repair == "everything" or (is_moved and mark.repair == "unproven"):
            if is_moved:
                await forget_transactions(self._leader)
            await self._publish_old(desk)
            await self._start(system, 0)
        elif mark.system_identifier != system and mark.repair != "unproven":
            reason = "this is another Postgres server than before"
            await refuse_gap(self._leader, self._config.slot, reason, since=0)
        elif mark.repair is not None or mark.source != "poll":
            await self._start(system, mark.published_below if mark.system_identifier == system else 0)
        else:
            await forget_gap(self._leader, self._config.slot)
            self._begin, self._end, self._position = mark.published_below, mark.window_end, mark.window_position

    async def _start(self, system: str, begin: int) -> None:
        self._begin = begin
        await start_mark(self._leader, self._config.slot, system=system, source="poll", lsn=0, below=begin)

    async def _publish_old(self, desk: Desk) -> None:
        """Rows from before there was an order to poll by."""
        count = 0
        async with self._reader.transaction(), self._reader.cursor("old") as cursor:
            await cursor.execute(OLD.encode())
            async for row in cursor:
                await desk.publish(event_of(row[2:]))
                count += 1
        await desk.drained()
        metrics.RESCANNED.inc(count)

    # --- reading ----------------------------------------------------------------------------------------------------

    async def read(self, take: Take, room: Room) -> bool:
        if not self._left and (self._is_woken or self._rest is not None):
            await self._fetch()
        self._hand_over(take, room)
        return bool(self._left) or self._is_woken or self._rest is not None

    def _hand_over(self, take: Take, room: Room) -> None:
        events: list[OutboxEvent] = []
        size = 0
        while self._left and len(events) < room.events and size < room.size:
            events.append(event := event_of(self._left.popleft()))
            size += len(event.payload)
        if events:
            take(events, self._steps[-1].group)

    async def _fetch(self) -> None:
        self._is_woken = False
        end, rows = await (self._read_window() if self._rest is None else self._read_rest(self._rest))
        if len(rows) == PORTION:
            await self._stay_in_window(end, rows[-1][0])
        else:
            await self._leave_window(end)
        if rows:
            step = _Step(self._begin, self._end, self._position)
            step.group.committed_at_us = rows[0][1] - _EPOCH_2000_US
            self._steps.append(step)
            self._left.extend(row[2:] for row in rows)
            self._is_woken = True
        else:
            await self._look_behind()

    async def _read_window(self) -> tuple[int, list[tuple[Any, ...]]]:
        values = {"begin": self._begin, "end": self._end, "position": self._position}
        found = await (await self._reader.execute(READ.encode(), values)).fetchall()
        return found[0][0], [row[1:] for row in found if row[1] is not None]

    async def _read_rest(self, rest: "psycopg.AsyncServerCursor[Any]") -> tuple[int, list[tuple[Any, ...]]]:
        assert self._end is not None, "a window with a rest has an end"
        self._is_rest_used = True
        return self._end, await rest.fetchmany(PORTION)

    async def _stay_in_window(self, end: int, position: int) -> None:
        """A large window is sorted once, and read on by a cursor."""
        self._end, self._position = end, position
        if self._rest is None:
            await self._reader.execute("BEGIN ISOLATION LEVEL REPEATABLE READ, READ ONLY")
            self._rest = self._reader.cursor("rest")
            await self._rest.execute(REST.encode(), {"begin": self._begin, "end": end, "position": position})

    async def _leave_window(self, end: int) -> None:
        await self._close_rest()
        self._begin, self._end, self._position = end, None, 0

    async def _close_rest(self) -> None:
        """The window may be sorted again: while Kafka takes nothing, an open cursor would keep VACUUM from its work."""
        if self._rest is not None:
            await self._rest.close()
            await self._reader.execute("COMMIT")
        self._rest = None

    async def _look_behind(self) -> None:
        """Nothing is final that was not read: look again soon, if something is there already."""
        row = await (await self._reader.execute(BLOCKED, [self._begin])).fetchone()
        if row is None or not row[0]:
            self._pause = BLOCKED_SECONDS[0]
            return
        asyncio.get_running_loop().call_later(self._pause, self._wake)
        self._pause = min(2 * self._pause, BLOCKED_SECONDS[1])

    def _wake(self) -> None:
        self._is_woken = True
        if self._on_ready is not None:
            self._on_ready()

    async def _listen(self) -> None:
        async for _ in self._listener.notifies():
            self._wake()

    def watch(self, on_ready: Callable[[], None]) -> None:
        self._on_ready = on_ready
        if self._is_woken:
            on_ready()

    def unwatch(self) -> None:
        self._on_ready = None

    # --- how far ----------------------------------------------------------------------------------------------------

    async def save(self) -> None:
        if self._listening is not None and self._listening.done():
            self._listening.result()
        self._is_woken = True  # A notice that got lost is made up for within the second.
        if not self._is_rest_used:
            await self._close_rest()
        self._is_rest_used = False
        last = self._saved
        while self._steps and not self._steps[0].group.missing and (len(self._steps) > 1 or not self._left):
            last = self._steps.popleft()
        if last is None or last is self._saved:
            return
        values = {"slot": self._config.slot, "below": last.begin, "end": last.end, "position": last.position}
        await self._leader.execute(SAVE_WINDOW.encode(), values)
        self._saved = last

    def answer(self) -> None:
        """Nobody asks."""

    @property
    def oldest_commit_us(self) -> int | None:
        return next((step.group.committed_at_us for step in self._steps if step.group.missing), None)

    async def finish(self) -> None:
        """Nothing is open that must be ended in good order."""

    async def close(self) -> None:
        if self._listening is not None:
            self._listening.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await self._listening
        if self._rest is not None:
            with contextlib.suppress(psycopg.Error):
                await self._rest.close()
        for name in ("_reader", "_listener"):
            if hasattr(self, name):
                await getattr(self, name).close()
