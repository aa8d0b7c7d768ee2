"""Events from the table itself, for databases without logical replication.

Transaction ids and sequence numbers commit out of order, so `id > last` would lose events. A window is what one
snapshot sees and the previous one did not. If a transaction waited for another's lock on a payment, every snapshot that
sees the first also sees the other; within a window the order is that of `position`, which is assigned while the payment
is locked. NOTIFY wakes the reader; its trigger is enabled only while a relay polls.
"""

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import replace
from operator import attrgetter
from typing import Final

import psycopg
import structlog
from psycopg.types.string import ByteaBinaryLoader

from infra.relay import metrics
from infra.relay.config import RelayConfig
from infra.relay.connection import CONNECTION, lift_time_limit, with_settings
from infra.relay.event import OutboxEvent
from infra.relay.outbox_rows import COLUMNS, rows_at_once
from infra.relay.poll.window import Portion, WindowReader, how_many_fill, read_first
from infra.relay.poll.window_progress import Point, WindowProgress
from infra.relay.progress.beginning import GoOn, settle_beginning
from infra.relay.progress.checkpoint import (
    SAVE_WINDOW,
    SYSTEM,
    Checkpoint,
    save_checkpoint,
    start_checkpoint,
)
from infra.relay.progress.snapshot import NOTHING, Snapshot
from infra.relay.source import CatchUpSink, Intake
from infra.relay.wake_trigger import set_notify

log = structlog.get_logger(__name__)

LARGE: Final = 1000
"""A window of more transactions than this is assumed to have several portions; a smaller one is probed first."""
LOOK: Final = "SELECT pg_current_snapshot()::text"
OLD: Final = f"""
    SELECT {COLUMNS} FROM outbox AS o WHERE o.xact IS NULL ORDER BY o.aggregateid, o.payment_seq
"""  # noqa: S608 - names from our own constants
LARGEST_OLD: Final = "SELECT coalesce(max(octet_length(payload)), 0) FROM outbox WHERE xact IS NULL"
_PAYLOAD: Final = attrgetter("payload")


async def connect_reader(url: str) -> psycopg.AsyncConnection:
    """A connection whose plans use the index whatever the statistics say; its binary cursors return text as bytes.

    When a table has grown since its statistics were made, Postgres assumes that a third of it is new, and would scan
    all of it for the first such row: 0.7 s at 2 million rows, for every transaction that is published.
    """
    # Planning each query again with all partitions, starting workers for it or compiling it takes longer than the
    # query itself.
    plans = "-c plan_cache_mode=force_generic_plan -c max_parallel_workers_per_gather=0 -c jit=off"
    settings = with_settings(f"-c enable_seqscan=off {plans}")
    connection = await psycopg.AsyncConnection.connect(url, application_name="relay", **settings)
    try:
        await lift_time_limit(connection)
    except BaseException:  # Also a stop, which interrupts the preparation.
        await connection.close()
        raise
    connection.adapters.register_loader("text", ByteaBinaryLoader)
    return connection


class PollSource:
    """A cursor over the table; fits `infra.relay.source.Source`."""

    def __init__(self, config: RelayConfig, leader: psycopg.AsyncConnection) -> None:
        self._config = config
        self._leader = leader
        self._reader: psycopg.AsyncConnection
        self._listener: psycopg.AsyncConnection
        self._listening: asyncio.Task[None] | None = None
        self._on_ready: Callable[[], None] | None = None
        self._is_woken, self._is_notified = True, False
        self._point = Point(NOTHING)
        """How far is read; what is read and not handed over yet is in `_left`."""
        self._left: list[OutboxEvent] = []
        self._progress = WindowProgress(NOTHING)
        self._rest: WindowReader | None = None
        self._is_rest_used = False

    async def open(self, sink: CatchUpSink) -> None:
        url = self._config.postgres_url
        self._reader = await connect_reader(url)
        self._listener = await psycopg.AsyncConnection.connect(url, application_name="relay", **CONNECTION)
        self._is_notified = await set_notify(self._leader, is_on=True)
        await self._listener.execute("LISTEN payments_outbox")
        self._listening = asyncio.create_task(self._listen())
        row = await (await self._leader.execute(SYSTEM)).fetchone()
        assert row is not None, "the query always gives a row"
        await self._begin_somewhere(sink, system=row[0])

    async def _begin_somewhere(self, sink: CatchUpSink, system: str) -> None:
        beginning = await settle_beginning(self._leader, self._config, system)
        self._point = Point(beginning.published)
        if isinstance(beginning, GoOn):
            self._go_on(beginning.checkpoint)
            return
        if beginning.published == NOTHING:
            await self._publish_old(sink)
        await start_checkpoint(self._leader, self._config, system, beginning.published)

    def _go_on(self, checkpoint: Checkpoint) -> None:
        end = None if checkpoint.window_end is None else Snapshot.read(checkpoint.window_end)
        self._point = replace(self._point, end=end, position=checkpoint.window_position)
        self._progress = WindowProgress(self._point.begin)

    async def _publish_old(self, sink: CatchUpSink) -> None:
        """Publish rows from before rows had an order to poll by."""
        count = 0
        async with self._reader.transaction(), self._reader.cursor("old", binary=True) as cursor:
            cursor.itersize = await rows_at_once(self._reader, LARGEST_OLD)
            await cursor.execute(OLD.encode())
            async for row in cursor:
                await sink.publish(OutboxEvent._make(row))
                count += 1
        await sink.drained()
        metrics.RESCANNED.inc(count)

    # --- reading ----------------------------------------------------------------------------------------------------

    async def read(self, intake: Intake) -> bool:
        if not self._left and (self._is_woken or self._rest is not None):
            await self._fetch()
        self._hand_over(intake)
        return bool(self._left) or self._is_woken or self._rest is not None

    def _hand_over(self, intake: Intake) -> None:
        room = intake.room
        some = self._left[: max(0, room.events)]
        if count := how_many_fill(room.size, map(len, map(_PAYLOAD, some))):
            events, self._left = self._left[:count], self._left[count:]
            intake.publish(events, self._progress.group)

    async def _fetch(self) -> None:
        self._is_woken = False
        is_inside, end = self._point.end is not None, self._point.end or await self._look()
        if self._rest is None and (is_inside or end.end - self._point.begin.end > LARGE):
            await self._open_rest(end)
        portion, is_more = await (self._read_first(end) if self._rest is None else self._read_rest(self._rest))
        if portion is not None and is_more:
            self._point = replace(self._point, end=end, position=portion.position)
        else:
            await self._leave_window(end)
        if portion is not None:
            self._is_woken = True
            self._left += portion.events
        if portion is not None or is_inside or self._progress.is_proof_due(self._point):
            self._progress.note(self._point, portion, end)

    async def _look(self) -> Snapshot:
        row = await (await self._reader.execute(LOOK)).fetchone()
        assert row is not None, "the query always gives a row"
        return Snapshot.read(row[0])

    async def _read_first(self, end: Snapshot) -> tuple[Portion | None, bool]:
        return await read_first(self._reader, self._point.begin.until(end, self._point.position))

    async def _read_rest(self, rest: WindowReader) -> tuple[Portion | None, bool]:
        self._is_rest_used = True
        portion = await rest.read()
        return portion, portion is not None

    async def _open_rest(self, end: Snapshot) -> None:
        self._rest = WindowReader(self._reader)
        await self._rest.open(self._point.begin.until(end, self._point.position))

    async def _leave_window(self, end: Snapshot) -> None:
        # A notice that arrived while the window was read is about a later one.
        self._is_woken = self._is_woken or self._rest is not None
        await self._close_rest()
        self._point = Point(end)

    async def _close_rest(self) -> None:
        """End its transaction, at the cost of sorting again: while Kafka accepts nothing, it would hold up VACUUM."""
        if self._rest is not None:
            await self._rest.close()
            self._rest = None

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
        self._is_woken = True  # Makes up for a lost notice within a second.
        if not self._is_notified:
            self._is_notified = await set_notify(self._leader, is_on=True)
        await self._write_down()
        if not self._is_rest_used:
            await self._close_rest()
        self._is_rest_used = False

    async def _write_down(self) -> None:
        """Save the point up to which everything is acknowledged, if it has moved."""
        point = self._progress.advance(is_portion_left=bool(self._left))
        if point is not None:
            await save_checkpoint(self._leader, SAVE_WINDOW, point.values | {"slot": self._config.slot})

    def answer(self) -> None:
        """Nothing to do: no server waits for an answer."""

    @property
    def oldest_commit_us(self) -> int | None:
        return self._progress.oldest_commit_us

    async def finish(self) -> None:
        """Nothing to do: there is no stream to end."""

    async def close(self) -> None:
        if self._listening is not None:
            self._listening.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await self._listening
        if self._rest is not None:
            await self._rest.abandon()
        for name in ("_reader", "_listener"):
            if hasattr(self, name):
                await getattr(self, name).close()
