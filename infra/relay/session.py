"""One session of a relay: leadership, a slot that has caught up, then the log to Kafka until something breaks."""

import asyncio
import contextlib
import time
import zlib
from collections.abc import Coroutine
from typing import Any

import psycopg
import structlog

from infra.relay import metrics
from infra.relay.catch_up import catch_up, reason_to_scan
from infra.relay.config import RelayConfig
from infra.relay.health import State, Status
from infra.relay.pgoutput import BEGIN, COMMIT, INSERT, RELATION, OutboxEvent, RowReader, read_begin, read_commit
from infra.relay.prefix import Group, Prefix
from infra.relay.publisher import Publisher
from infra.relay.stream import ReplicationStream, with_settings

log = structlog.get_logger(__name__)

PORTION = 1000
"""Messages of the log that are taken in one go, before the loop turns to Kafka."""
LEADERSHIP = 8146
"""First half of the advisory lock's key: any number that only relays use. The second half is the slot's name."""
LEADER_SETTINGS = "-c idle_session_timeout=10s"
"""A leader that is frozen, not gone, loses its lock, as it loses its stream."""
WATCH_SECONDS = 1.0
_US_1970_TO_2000 = 946_684_800_000_000

LAG = "SELECT pg_current_wal_flush_lsn() - confirmed_flush_lsn FROM pg_replication_slots WHERE slot_name = %s"


class Session:
    """One life of a replication connection and its producers. Any error ends it; what was unconfirmed comes again."""

    def __init__(self, config: RelayConfig, status: Status, stop: asyncio.Event) -> None:
        self._config = config
        self._status = status
        self._stop = stop
        self._wake = asyncio.Event()
        self._prefix = Prefix()
        self._rows = RowReader()
        self._group = Group()
        self._confirmed = 0
        self._is_feedback_due = True
        self._leadership: asyncio.Task[None] | None = None

    async def run(self) -> None:
        """Publish until told to stop.

        Raises:
            RelayError, psycopg.Error, KafkaError, OSError: the session is over.
        """
        async with contextlib.AsyncExitStack() as stack:
            stack.callback(_forget_lag)
            preparation = asyncio.timeout(None)
            self._run_beside(stack, self._watch_stop(preparation))
            try:
                async with preparation:
                    leader = await self._lead(stack)
                    self._leadership = self._run_beside(stack, self._watch_leadership(leader))
                    stream = await ReplicationStream.connect(self._config.postgres_url)
                    stack.push_async_callback(stream.close)
                    publisher = await Publisher.connect(self._config, self._wake.set)
                    stack.push_async_callback(publisher.close)
                    await self._prepare(leader, stream, publisher)
            except TimeoutError:
                if preparation.expired():
                    return
                raise
            self._run_beside(stack, self._tick())
            await self._publish(stream, publisher)

    def _run_beside(self, stack: contextlib.AsyncExitStack, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        stack.callback(task.cancel)
        return task

    async def _watch_stop(self, preparation: asyncio.Timeout) -> None:
        """A stream is ended in good order; what comes before it may wait for others for long, and is cut short."""
        await self._stop.wait()
        self._wake.set()
        with contextlib.suppress(RuntimeError):  # The preparation is over.
            preparation.reschedule(0)

    # --- before the stream ------------------------------------------------------------------------------------------

    async def _lead(self, stack: contextlib.AsyncExitStack) -> psycopg.AsyncConnection:
        """Wait to be the one relay that may create, scan and stream: the holder of an advisory lock on this connection.

        It asks again and again, since a query that waits for the lock would keep VACUUM from removing anything.
        """
        options = with_settings(LEADER_SETTINGS)
        connection = await psycopg.AsyncConnection.connect(self._config.postgres_url, **options)
        await stack.enter_async_context(connection)
        key = [LEADERSHIP, zlib.crc32(self._config.slot.encode()) - 2**31]
        while True:
            row = await (await connection.execute("SELECT pg_try_advisory_lock(%s, %s)", key)).fetchone()
            if row is not None and row[0]:
                return connection
            if self._status.state is not State.STANDBY:
                self._status.enter(State.STANDBY)
                log.info("relay stands by", slot=self._config.slot)
            await asyncio.sleep(self._config.standby_seconds)

    async def _prepare(self, leader: psycopg.AsyncConnection, stream: ReplicationStream, publisher: Publisher) -> None:
        system = await stream.system_identifier()
        reason = await reason_to_scan(leader, self._config.slot, system)
        if reason is not None:
            await self._catch_up(leader, stream, publisher, system, reason)
        await stream.start(self._config.slot, self._config.publication)
        self._status.enter(State.ACTIVE)
        log.info("relay active", slot=self._config.slot, topic=self._config.topic)

    async def _catch_up(
        self, leader: psycopg.AsyncConnection, stream: ReplicationStream, publisher: Publisher, system: str, reason: str
    ) -> None:
        self._status.enter(State.CATCHING_UP, reason)
        log.warning("new slot: publishing the whole outbox table", slot=self._config.slot, reason=reason)
        group = Group()

        async def publish(event: OutboxEvent) -> None:
            publisher.publish(event, group)
            if publisher.is_full or not group.missing % PORTION:
                await publisher.flush()
            while publisher.is_full:
                await self._progress(publisher)

        async def drained() -> None:
            await publisher.flush()
            while publisher.unacknowledged:
                await self._progress(publisher)

        await catch_up(leader, stream, self._config, system=system, publish=publish, drained=drained)

    async def _progress(self, publisher: Publisher) -> None:
        """Wait for Kafka while nothing is read."""
        self._status.trouble = publisher.trouble
        self._wake.clear()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._wake.wait(), self._config.feedback_seconds)
        self._check_leadership()
        await publisher.flush()

    # --- the stream -------------------------------------------------------------------------------------------------

    async def _publish(self, stream: ReplicationStream, publisher: Publisher) -> None:
        while not self._stop.is_set():
            self._wake.clear()
            is_more = not publisher.is_full and self._read(stream, publisher)
            await publisher.flush()
            self._confirm(stream, publisher)
            self._check_leadership()
            if is_more:
                await asyncio.sleep(0)
            else:
                await self._rest(stream, publisher)
        await self._finish(stream, publisher)

    async def _rest(self, stream: ReplicationStream, publisher: Publisher) -> None:
        """Wait for more log, an acknowledgement, the next feedback or the end, whichever is first."""
        if publisher.is_full:
            stream.unwatch()
        else:
            stream.watch(self._wake.set)
        await self._wake.wait()

    async def _tick(self) -> None:
        while True:
            self._is_feedback_due = True
            self._wake.set()
            await asyncio.sleep(self._config.feedback_seconds)

    def _read(self, stream: ReplicationStream, publisher: Publisher) -> bool:
        """Take what has arrived, up to a portion; whether there may be more."""
        receive, read, publish = stream.receive, self._rows.read, publisher.publish
        for _ in range(PORTION):
            message = receive()
            if message is None:
                return False
            if message[0] == INSERT:
                publish(read(message), self._group)
                if publisher.is_full:
                    return True
            else:
                self._take(message)
        return True

    def _take(self, message: bytes) -> None:
        match message[0]:
            case kind if kind == BEGIN:
                self._group = self._prefix.begin(read_begin(message))
            case kind if kind == COMMIT:
                self._group.end_lsn = read_commit(message)
            case kind if kind == RELATION:
                self._rows.learn(message)
            case kind:
                log.warning("unexpected message in the log stream", kind=chr(kind))

    def _confirm(self, stream: ReplicationStream, publisher: Publisher) -> None:
        """Tell the server how far everything is acknowledged, when it asks and every `feedback_seconds`."""
        if self._is_feedback_due or stream.is_reply_wanted:
            self._is_feedback_due = False
            self._confirmed = self._prefix.advance(stream.wal_end)
            stream.confirm(self._confirmed)
            self._status.trouble = publisher.trouble
            metrics.UNACKNOWLEDGED.set(publisher.unacknowledged)
            metrics.LAG_SECONDS.set(_age(self._prefix.oldest_commit_us))

    async def _watch_leadership(self, leader: psycopg.AsyncConnection) -> None:
        """Keep the connection that makes us the leader alive, notice when it is gone, and measure the lag by it.

        The stream itself does not say how long the log is: its messages carry only how far the server has read.
        """
        while True:
            row = await (await leader.execute(LAG, [self._config.slot])).fetchone()
            metrics.LAG_BYTES.set(max(0, int(row[0])) if row is not None and row[0] is not None else 0)
            await asyncio.sleep(WATCH_SECONDS)

    def _check_leadership(self) -> None:
        if self._leadership is not None and self._leadership.done():
            self._leadership.result()

    async def _finish(self, stream: ReplicationStream, publisher: Publisher) -> None:
        """Have what was read acknowledged, and say so, that the next relay repeats nothing."""
        stream.unwatch()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._config.stop_seconds):
                while publisher.unacknowledged:
                    self._wake.clear()
                    self._confirm(stream, publisher)
                    await publisher.flush()
                    await self._wake.wait()
        self._is_feedback_due = True
        self._confirm(stream, publisher)
        async with asyncio.timeout(2):
            await stream.finish()
        log.info("relay stopped", confirmed_lsn=self._confirmed, unacknowledged=publisher.unacknowledged)


def _forget_lag() -> None:
    """Who does not stream has no lag; a former leader must not go on showing its last one."""
    for gauge in (metrics.LAG_SECONDS, metrics.LAG_BYTES, metrics.UNACKNOWLEDGED):
        gauge.set(0)


def _age(commit_us: int | None) -> float:
    return 0.0 if commit_us is None else max(0.0, time.time() - (commit_us + _US_1970_TO_2000) / 1_000_000)
