"""One session of a relay: take the lead, catch up, then publish the source's events to Kafka until something breaks."""

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any

import psycopg
import structlog
from aiokafka.errors import KafkaError

from infra.relay import metrics
from infra.relay.config import RelayConfig
from infra.relay.connection import with_settings
from infra.relay.errors import EventsLost, RelayError
from infra.relay.event import US_1970_TO_2000, Group, OutboxEvent
from infra.relay.health import State, Status
from infra.relay.lag import Lag
from infra.relay.leadership import LEADERSHIP, lock_key
from infra.relay.poll.source import PollSource
from infra.relay.progress.checkpoint import find_checkpoint, refuse_gap, save_offsets
from infra.relay.progress.snapshot import NOTHING
from infra.relay.publish.publisher import Publisher
from infra.relay.publish.quarantine import Quarantine
from infra.relay.publish.retries import Retries
from infra.relay.source import CatchUpSink, Source
from infra.relay.wal.source import WalSource

log = structlog.get_logger(__name__)

SOURCES: dict[str, Callable[[RelayConfig, psycopg.AsyncConnection], Source]] = {"wal": WalSource, "poll": PollSource}
FLUSH_EVERY = 1000
FIRST_SAVE_SECONDS = 0.1
"""When progress is first saved: early, so that even relays that never live long make progress."""
LEADER_SETTINGS = (
    "-c idle_session_timeout=10s -c idle_in_transaction_session_timeout=10s -c lock_timeout=5s -c synchronous_commit=on"
)
"""The idle timeouts free the lock of a leader that is frozen, not gone, also in mid-transaction; its stream ends too.
lock_timeout: a lock on the relay's own row cannot make it wait for ever. synchronous_commit: saved progress survives a
crash, whatever the database's own setting."""
WATCH_SECONDS = 1.0


class Session:
    """One set of a relay's connections. Any error ends it; the next session repeats whatever was not confirmed."""

    def __init__(self, config: RelayConfig, status: Status, stop: asyncio.Event) -> None:
        self._config = config
        self._status = status
        self._stop = stop
        self._wake = asyncio.Event()
        self._is_save_due = True
        self._is_retry_due = True
        self._leadership: asyncio.Task[None] | None = None
        self._leader: psycopg.AsyncConnection
        self._saved_offsets: list[int] = []
        self._lag: Lag
        self._source: Source
        self._publisher: Publisher
        self._quarantine: Quarantine
        self._retries: Retries

    async def run(self) -> None:
        """Publish until `stop` is set.

        Raises:
            RelayError, psycopg.Error, KafkaError, OSError: the session is over.
        """
        async with contextlib.AsyncExitStack() as stack:
            stack.callback(metrics.UNACKNOWLEDGED.set, 0)
            try:
                await self._run(stack)
            except EventsLost as error:
                await refuse_gap(self._leader, self._config.slot, str(error), NOTHING)

    async def _run(self, stack: contextlib.AsyncExitStack) -> None:
        preparation = asyncio.timeout(None)
        self._run_beside(stack, self._watch_stop(preparation))
        try:
            async with preparation:
                await self._prepare(stack)
        except TimeoutError:
            if preparation.expired():
                return
            raise
        self._run_beside(stack, self._tick())
        await self._publish()

    def _run_beside(self, stack: contextlib.AsyncExitStack, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        stack.callback(task.cancel)
        return task

    async def _watch_stop(self, preparation: asyncio.Timeout) -> None:
        """Once `stop` is set, cut short a preparation, which may wait long for others; a stream ends in good order."""
        await self._stop.wait()
        self._wake.set()
        with contextlib.suppress(RuntimeError):  # The preparation has ended.
            preparation.reschedule(0)

    # --- before the stream ------------------------------------------------------------------------------------------

    async def _prepare(self, stack: contextlib.AsyncExitStack) -> None:
        self._leader = leader = await self._lead(stack)
        self._lag = Lag(leader, self._config)
        await self._lag.measure_log()  # Also while Kafka is away and every session ends at once.
        try:
            await self._prepare_to_lead(stack, leader)
        except (RelayError, KafkaError):  # Kafka is away, or there is a gap: waiting events keep growing older.
            await self._lag.measure_waiting()
            raise
        self._lag.expect(0)  # Reading begins only now.
        self._status.enter(State.ACTIVE)
        log.info(
            "relay active",
            slot=self._config.slot,
            topic=self._config.topic,
            source=self._config.source,
            compiled=self._config.uses_native,
        )

    async def _prepare_to_lead(self, stack: contextlib.AsyncExitStack, leader: psycopg.AsyncConnection) -> None:
        self._leadership = self._run_beside(stack, self._watch_leadership())
        self._quarantine = Quarantine(leader, self._config.slot)
        metrics.QUARANTINED.set(await self._quarantine.count())
        self._publisher = await Publisher.connect(self._config, self._wake.set)
        stack.push_async_callback(self._publisher.close)
        self._retries = Retries(self._quarantine, self._publisher)
        config = replace(self._config, kafka_cluster=self._publisher.kafka_cluster)
        self._source = SOURCES[config.source](config, leader)
        stack.push_async_callback(self._source.close)
        await self._retries.load()
        self._status.enter(State.CATCHING_UP)
        checkpoint = await find_checkpoint(leader, config.slot)
        if checkpoint is not None:
            self._publisher.exceed(checkpoint.offsets_to_exceed(config))
        await self._source.open(self._catch_up_sink())

    async def _lead(self, stack: contextlib.AsyncExitStack) -> psycopg.AsyncConnection:
        """Wait to become the one relay that may create, scan and stream; its lock is on the returned connection.

        It polls, because a query that waits for the lock would keep VACUUM from removing anything.
        """
        options = with_settings(LEADER_SETTINGS) | {"application_name": f"relay {self._config.slot}"}
        connection = await psycopg.AsyncConnection.connect(self._config.postgres_url, **options)
        await stack.enter_async_context(connection)
        key = lock_key(LEADERSHIP, self._config.slot)
        while True:
            row = await (await connection.execute("SELECT pg_try_advisory_lock(%s, %s)", key)).fetchone()
            self._status.beat()
            if row is not None and row[0]:
                return connection
            if self._status.state is not State.STANDBY:
                self._status.enter(State.STANDBY)
                log.info("relay stands by", slot=self._config.slot)
            await asyncio.sleep(self._config.standby_seconds)

    def _catch_up_sink(self) -> CatchUpSink:
        publisher, group = self._publisher, Group()

        async def publish(event: OutboxEvent) -> None:
            publisher.publish([event], group)
            if publisher.is_full or not group.missing % FLUSH_EVERY:
                await self._flush()
            while publisher.is_full:
                await self._progress()

        async def drained() -> None:
            await self._flush()
            while publisher.unacknowledged:
                await self._progress()

        return CatchUpSink(publish, drained)

    async def _progress(self) -> None:
        """Wait for acknowledgements while nothing is read."""
        self._status.trouble = self._publisher.trouble
        self._wake.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._config.feedback_seconds):
                await self._wake.wait()
        self._check_leadership()
        self._publisher.check_partitions()
        self._status.beat()
        await self._flush()

    async def _flush(self) -> None:
        """Send waiting events to Kafka, and put the diverted ones into quarantine."""
        await self._publisher.flush()
        while diverted := self._publisher.take_diverted():
            await self._quarantine.put(diverted)
            self._retries.note(diverted)
            self._publisher.acknowledge_diverted(diverted)
            await self._publisher.flush()

    # --- the stream -------------------------------------------------------------------------------------------------

    async def _publish(self) -> None:
        publisher = self._publisher
        while not self._stop.is_set():
            self._wake.clear()
            is_more = not publisher.is_full and await self._source.read(publisher)
            await self._flush()
            await self._keep_up()
            if is_more and not publisher.is_full:
                await asyncio.sleep(0)
            else:
                await self._wait_for_work()
        await self._finish()

    async def _wait_for_work(self) -> None:
        """Wait for more events, an acknowledgement, the next tick or the stop, whichever comes first."""
        if self._publisher.is_full:
            self._source.unwatch()
        else:
            self._source.watch(self._wake.set)
        await self._wake.wait()

    async def _tick(self) -> None:
        await asyncio.sleep(FIRST_SAVE_SECONDS)
        while True:
            self._is_save_due = self._is_retry_due = True
            self._wake.set()
            await asyncio.sleep(self._config.feedback_seconds)

    async def _keep_up(self) -> None:
        """Do what is due besides publishing: save progress, answer the server, retry quarantined events."""
        self._status.beat()
        self._check_leadership()
        self._source.answer()
        if self._is_save_due:
            self._is_save_due = False
            self._publisher.check_partitions()
            await self._save()
            self._status.trouble = self._publisher.trouble or self._silence
            metrics.UNACKNOWLEDGED.set(self._publisher.unacknowledged)
            metrics.LAG_SECONDS.set(max(_age(self._source.oldest_commit_us), self._lag.unread_seconds))
        if await self._retries.let_go() or self._is_retry_due:
            self._is_retry_due = False
            await self._retry_quarantined()
            metrics.QUARANTINED.set(await self._quarantine.count())

    async def _save(self) -> None:
        await self._source.save()
        offsets = list(self._publisher.acknowledged_offsets)
        if offsets != self._saved_offsets:
            await save_offsets(self._leader, self._config.slot, offsets)
            self._saved_offsets = offsets

    async def _retry_quarantined(self) -> None:
        """Publish a portion of the events to retry; more may be due when some of them have ended."""
        has_begun = await self._retries.begin()
        await self._flush()
        if not has_begun:
            await self._retries.unblock()

    async def _watch_leadership(self) -> None:
        """Keep the leader's connection alive, notice when it is lost, and measure the lag on it."""
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            await self._lag.measure_log()
            await self._lag.look_for_unread()

    @property
    def _silence(self) -> str | None:
        """A description of the trouble if the source brings nothing although events wait; otherwise None."""
        if min(self._lag.unread_seconds, self._publisher.quiet_seconds) < self._config.stalled_seconds:
            return None
        is_log = self._config.source == "wal"  # A poll waits for no standby.
        advice = ": is each standby that synchronized_standby_slots names running?" if is_log else ""
        return (
            f"Postgres has brought nothing for {self._publisher.quiet_seconds:.0f} s, and events wait in the outbox"
            f"{advice}"
        )

    def _check_leadership(self) -> None:
        if self._leadership is not None and self._leadership.done():
            self._leadership.result()

    async def _finish(self) -> None:
        """Wait for acknowledgements and save: the next relay repeats nothing, or at most part of a poll's portion."""
        self._source.unwatch()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._config.stop_seconds):
                while self._publisher.unacknowledged:
                    self._wake.clear()
                    await self._flush()
                    if self._is_save_due:  # Postgres hangs up on a reader from which it hears nothing.
                        self._is_save_due = False
                        await self._save()
                    if self._publisher.unacknowledged:
                        await self._wake.wait()
        async with asyncio.timeout(2):
            await self._save()
            await self._source.finish()
        async with asyncio.timeout(2):
            await self._retries.let_go()
            metrics.QUARANTINED.set(await self._quarantine.count())
        log.info("relay stopped", unacknowledged=self._publisher.unacknowledged)


def _age(commit_us: int | None) -> float:
    return 0.0 if commit_us is None else max(0.0, time.time() - (commit_us + US_1970_TO_2000) / 1_000_000)
