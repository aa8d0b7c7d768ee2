"""The worker process: reads commands, calls gateways, saves outcomes. Any number of workers may run."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Coroutine, Mapping
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any, Final

import asyncpg
import structlog
from faststream.kafka import KafkaBroker

from app import wiring
from app.clock import watch_clock
from app.settings import Settings
from domain.ports import Gateway
from domain.rules import Rules
from handlers import metrics
from handlers.apply_notices import NoticeApplier
from handlers.backlog import Backlog
from handlers.consumer import CommandConsumer
from handlers.leases import Leases
from handlers.pace import Pace
from handlers.reconcile import Asker
from handlers.write_path import WritePath
from infra.gateways.instant import InstantGateway
from infra.kafka.dead_letters import KafkaDeadLetters, dead_letter_producer
from infra.kafka.skipping import SkippingReader
from infra.kafka.topics import has_topic
from infra.postgres.inbox import PostgresInbox, listen
from infra.postgres.schema import schema_trouble
from infra.postgres.store import PostgresStore

if TYPE_CHECKING:
    from app.health import Checks

log = structlog.get_logger(__name__)

STARTING: Final = "starting"
NO_TOPIC: Final = "no topic {} was there when Kafka was asked last; run `payments migrate`"
STARTS_WITHIN: Final = 1.0
"""Seconds that a start may still take once told to stop; a start that waits for its consumer group takes longer."""
LEAVES_WITHIN: Final = 5.0
"""Seconds that leaving Kafka may take; answers are saved either way."""

LOOKS_FOR_TOPIC_EVERY: Final = 2.0
WATCH_READING_SECONDS: Final = 5.0
READING_SECONDS = 30.0
"""A worker that has not asked for commands for this long is stuck; a batch takes a second, a back-off five."""
TOPICS_SECONDS = 30.0
"""How often Kafka is asked for partitions: a topic that was created again is not read for up to this long. The default
is five minutes; the question is one small request per connection."""
DRAIN_SECONDS = 25.0
"""On SIGTERM, how long running gateway calls may take to end, and then saving their answers. Operations that are left
are taken over after their leases."""


class Worker:
    """Everything that one worker process runs, built from the settings."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._tasks: list[asyncio.Task[None]] = []
        self._pool: asyncpg.Pool[asyncpg.Record] | None = None
        self._broker: KafkaBroker | None = None
        self._reader: SkippingReader | None = None
        self._reads_not_yet = STARTING
        """Why no commands are read while there is no reader yet."""

    async def run(self, stop: asyncio.Event) -> None:
        """Work until `stop` is set, then finish what is under way and return.

        Raises:
            StoreUnavailable, KafkaError: a server that the start needs is away.
        """
        async with AsyncExitStack() as stack:
            if not await self._start_unless_stopped(stack, stop):
                return
            log.info("worker ready", group=self._settings.consumer_group, topic=self._settings.commands_topic)
            stopping = asyncio.create_task(stop.wait())
            done, _ = await asyncio.wait([stopping, *self._tasks], return_when=asyncio.FIRST_COMPLETED)
            stopping.cancel()
            log.info("worker stopping", waiting=self._waiting())
            await self._shut_down()
            for task in done - {stopping}:
                task.result()
        log.info("worker stopped")

    def checks(self) -> "Checks":
        """The checks of the worker's own health page."""
        return {
            "worker": self._check_loops,
            "postgres": self._check_postgres,
            "kafka": self._check_kafka,
            "commands": self._check_reading,
        }

    async def _check_loops(self) -> str | None:
        if not self._tasks:
            return STARTING
        return "a loop has ended" if any(task.done() for task in self._tasks) else None

    async def _check_postgres(self) -> str | None:
        return STARTING if self._pool is None else await schema_trouble(self._pool)

    async def _check_reading(self) -> str | None:
        if self._reader is None:
            return self._reads_not_yet
        silence = time.monotonic() - self._reader.read_at
        if silence > READING_SECONDS:
            return f"no command was read or asked for in {silence:.0f} s"
        topic = self._settings.commands_topic
        if not self._reader.knows(topic):
            return NO_TOPIC.format(topic)
        return None

    async def _check_kafka(self) -> str | None:
        if self._broker is None:
            return STARTING
        if self._reader is None:  # It is not started yet; that the topic is missing is the broker's own answer.
            return STARTING if self._reads_not_yet == STARTING else None
        return None if await self._broker.ping(timeout=1.0) else "the broker does not answer"

    async def _start_unless_stopped(self, stack: AsyncExitStack, stop: asyncio.Event) -> bool:
        """Start, and return True; False if told to stop meanwhile, when no silent server is waited for."""
        starting, stopping = asyncio.create_task(self._start(stack)), asyncio.create_task(stop.wait())
        await asyncio.wait([starting, stopping], return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        # An interrupted start leaves connections behind, so a start that is nearly done may finish.
        await asyncio.wait([starting], timeout=STARTS_WITHIN)
        is_done = starting.done()
        if is_done and starting.exception() is None:
            return True
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        if self._tasks:  # It already works, though it reads no commands yet: save what it has begun.
            await self._shut_down()
        if is_done:
            starting.result()
        return False

    async def _start(self, stack: AsyncExitStack) -> None:
        settings = self._settings
        gateways, pool, store = await self._connect(stack)
        rules, paces = wiring.create_rules(settings, gateways), wiring.create_paces(settings, gateways)
        write_path = self._create_write_path(stack, store, rules)
        leases = self._create_calling(store, write_path, rules, gateways, paces)
        self._applier = NoticeApplier(inbox=PostgresInbox(pool), write_path=write_path, submit=self._dispatcher.submit)
        reconciler = wiring.create_reconciler(settings, store, write_path, Asker(gateways, paces))
        self._consumer = await self._create_consumer(stack, write_path)
        self._broker = broker = self._create_broker()
        subscriber = self._consumer.subscribe(broker, topic=settings.commands_topic, group_id=settings.consumer_group)
        self._spawn(
            self._settler.run(),
            leases.run(),
            self._sweep.run(),
            self._backlog.run(),
            self._consumer.offsets.run(),
            self._applier.run(),
            reconciler.run(),
            reconciler.watch(),
            listen(settings.postgres_url, self._applier.arrived.set),
            watch_clock(pool),
        )
        await self._wait_for_topic()
        await self._begin_to_read(broker, subscriber)

    async def _connect(self, stack: AsyncExitStack) -> wiring.Connected:
        settings = self._settings
        if InstantGateway.name in settings.gateways:
            log.warning("a gateway for benchmarks calls every payment paid, and moves no money", gateway="instant")
        metrics.expect(settings.gateways)
        connected = await stack.enter_async_context(wiring.connected(settings, connections=settings.store_connections))
        self._pool = connected.pool
        return connected

    def _create_write_path(self, stack: AsyncExitStack, store: PostgresStore, rules: Rules) -> WritePath:
        redis = wiring.connect_redis(self._settings)
        stack.push_async_callback(redis.aclose)
        return wiring.create_write_path(store, rules, redis)

    def _create_calling(
        self,
        store: PostgresStore,
        write_path: WritePath,
        rules: Rules,
        gateways: Mapping[str, Gateway],
        paces: Mapping[str, Pace],
    ) -> Leases:
        """Create the parts that call gateways, and the sweep that gives them due operations."""
        settings, limits = self._settings, {name: self._settings.concurrency_of(name) for name in gateways}
        calling = wiring.create_calling(store, write_path, rules, gateways, limits, paces=paces)
        self._dispatcher, self._settler, leases = calling
        self._backlog = Backlog(capacity=settings.backlog_capacity, waiting=self._waiting)
        self._sweep = wiring.create_sweep(
            settings, store, self._dispatcher, submit=self._dispatcher.resubmit, room=lambda: self._backlog.room
        )
        return leases

    async def _create_consumer(self, stack: AsyncExitStack, write_path: WritePath) -> CommandConsumer:
        """Create the consumer, and connect the producer that it parks messages with."""
        settings = self._settings
        producer = dead_letter_producer(settings.kafka)
        stack.push_async_callback(producer.stop)  # Also needed for a producer that did not start.
        await producer.start()
        return CommandConsumer(
            write_path=write_path,
            dispatcher=self._dispatcher,
            dead_letters=KafkaDeadLetters(producer, topic=settings.dead_letter_topic),
            backlog=self._backlog,
            retries_before_parking=settings.retries_before_parking,
        )

    def _create_broker(self) -> KafkaBroker:
        kafka = self._settings.kafka
        return KafkaBroker(
            kafka.bootstrap,
            security=kafka.broker_security(),
            metadata_max_age_ms=int(TOPICS_SECONDS * 1000),
            graceful_timeout=LEAVES_WITHIN / 2,  # The caller has already waited for the current batch.
            allow_auto_create_topics=False,  # They would have one partition; `payments migrate` makes more.
            logger=logging.getLogger("faststream"),
        )

    async def _wait_for_topic(self) -> None:
        """Wait until the topic exists: a consumer of a missing topic asks for some 40 s, and gives up."""
        kafka, topic = self._settings.kafka, self._settings.commands_topic
        while not await has_topic(kafka, topic):
            self._reads_not_yet = NO_TOPIC.format(topic)
            log.warning("no commands are read", trouble=self._reads_not_yet)
            await asyncio.sleep(LOOKS_FOR_TOPIC_EVERY)
        self._reads_not_yet = STARTING

    async def _begin_to_read(self, broker: KafkaBroker, subscriber: Any) -> None:
        await broker.start()
        # At once, so that it is installed before the first read.
        self._reader = SkippingReader.install(
            subscriber.consumer, self._consumer.park_undecodable, self._consumer.report_deleted
        )
        self._tasks.append(asyncio.create_task(self._watch_reading(self._reader)))

    async def _watch_reading(self, reader: SkippingReader) -> None:
        """Update the metrics of how far commands are read, until cancelled."""
        while True:
            places = await reader.places()
            metrics.LAG.clear()  # Another worker now reports partitions that were ours.
            metrics.POSITION.clear()
            for partition, place in places.items():
                metrics.LAG.labels(str(partition)).set(place.lag)
                metrics.POSITION.labels(str(partition)).set(place.next_offset)
            await asyncio.sleep(WATCH_READING_SECONDS)

    def _spawn(self, *loops: Coroutine[Any, Any, None]) -> None:
        self._tasks = [asyncio.create_task(loop) for loop in loops]

    def _waiting(self) -> int:
        return self._dispatcher.waiting + self._settler.waiting

    async def _shut_down(self) -> None:
        """Take nothing new, let running calls end, save their outcomes, commit offsets."""
        settler, leases, *others = self._tasks
        # All that they claimed or saved is then with the dispatcher, which sends it or gives it back: no lease is left.
        await _within(LEAVES_WITHIN, asyncio.gather(self._sweep.close(), self._applier.close(), self._consumer.close()))
        for task in others:
            task.cancel()
        await self._leave_kafka()
        await self._dispatcher.drain(DRAIN_SECONDS, may_more_come=lambda: self._settler.waiting > 0)
        settler.cancel()
        leases.cancel()
        # An interrupted save gives its answers back; only then can they be drained.
        await asyncio.gather(settler, leases, return_exceptions=True)
        try:
            await self._settler.drain(DRAIN_SECONDS)
        except TimeoutError:
            # As with a call that has not ended, nothing can be done about it: it is not an error of the shutdown.
            log.warning("answers left unsaved; their leases run out", answers=self._settler.waiting)

    async def _leave_kafka(self) -> None:
        assert self._broker is not None, "what works has its broker"
        await _within(LEAVES_WITHIN, self._broker.stop())


async def _within(seconds: float, work: Awaitable[object]) -> None:
    """Wait for `work` at most this long, and then go on stopping."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await work
