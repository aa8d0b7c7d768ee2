"""The worker process: reads commands, calls gateways, saves outcomes. Any number of workers may run."""

import asyncio
import logging
import time
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Final

import asyncpg
import structlog
from faststream.kafka import KafkaBroker

from app import wiring
from app.clock import watch_clock
from app.loops import LEAVES_WITHIN, Loops
from app.settings import Settings
from domain.rules import Rules
from handlers import metrics
from handlers.apply_notices import NoticeApplier
from handlers.backlog import Backlog
from handlers.consumer import CommandConsumer
from handlers.dispatch import Dispatcher
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
NO_TOPIC: Final = "no topic {} was there when Kafka was asked last, or this user may not see it; run `payments migrate`"
STARTS_WITHIN: Final = 1.0
"""Seconds that a start may still take once told to stop; a start that waits for its consumer group takes longer."""

LOOKS_FOR_TOPIC_EVERY: Final = 2.0
WATCH_READING_SECONDS: Final = 5.0
READING_SECONDS = 30.0
"""A worker that has not asked for commands for this long is stuck; a batch takes a second, a back-off five."""
TOPICS_SECONDS = 30.0
"""How often Kafka is asked for partitions: a topic that was created again is not read for up to this long. The default
is five minutes; the question is one small request per connection."""


class Worker:
    """Everything that one worker process runs, built from the settings."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._loops: Loops | None = None
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
            loops = await self._start_unless_stopped(stack, stop)
            if loops is None:
                log.info("worker stopped before it was ready")
                return
            log.info("worker ready", group=self._settings.consumer_group, topic=self._settings.commands_topic)
            stopping = asyncio.create_task(stop.wait())
            done, _ = await asyncio.wait([stopping, *loops.tasks], return_when=asyncio.FIRST_COMPLETED)
            stopping.cancel()
            log.info("worker stopping", waiting=loops.waiting)
            await self._shut_down(loops)
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
        if self._loops is None:
            return STARTING
        return "a loop has ended" if any(task.done() for task in self._loops.tasks) else None

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

    async def _start_unless_stopped(self, stack: AsyncExitStack, stop: asyncio.Event) -> Loops | None:
        """Start, and return what runs; None if told to stop meanwhile, when no silent server is waited for."""
        starting, stopping = asyncio.create_task(self._start(stack)), asyncio.create_task(stop.wait())
        await asyncio.wait([starting, stopping], return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        # An interrupted start leaves connections behind, so a start that is nearly done may finish.
        await asyncio.wait([starting], timeout=STARTS_WITHIN)
        is_done = starting.done()
        if is_done and starting.exception() is None:
            return self._loops
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        if self._loops is not None:  # It already works, though it reads no commands yet: save what it has begun.
            await self._shut_down(self._loops)
        if is_done:
            starting.result()
        return None

    async def _start(self, stack: AsyncExitStack) -> None:
        settings = self._settings
        gateways, pool, store = await self._connect(stack)
        rules, paces = wiring.create_rules(settings, gateways), wiring.create_paces(settings, gateways)
        write_path = self._create_write_path(stack, store, rules)
        limits = {name: settings.concurrency_of(name) for name in gateways}
        calling = wiring.create_calling(store, write_path, rules, gateways, limits, paces=paces)
        dispatcher = calling.dispatcher
        backlog = Backlog(capacity=settings.backlog_capacity, waiting=lambda: calling.waiting)
        sweep = wiring.create_sweep(settings, store, dispatcher, submit=dispatcher.resubmit, room=lambda: backlog.room)
        applier = NoticeApplier(inbox=PostgresInbox(pool), write_path=write_path, submit=dispatcher.submit)
        reconciler = wiring.create_reconciler(settings, store, write_path, Asker(gateways, paces))
        consumer = await self._create_consumer(stack, write_path, dispatcher, backlog)
        self._broker = broker = self._create_broker()
        subscriber = consumer.subscribe(broker, topic=settings.commands_topic, group_id=settings.consumer_group)
        self._loops = Loops(calling, sweep=sweep, applier=applier, consumer=consumer)
        self._loops.begin(
            sweep.run(),
            backlog.run(),
            consumer.offsets.run(),
            applier.run(),
            reconciler.run(),
            reconciler.watch(),
            listen(settings.postgres_url, applier.arrived.set),
            watch_clock(pool),
        )
        await self._wait_for_topic()
        await broker.start()
        # At once, so that it is installed before the first read.
        self._reader = reader = SkippingReader.install(
            subscriber.consumer, consumer.park_undecodable, consumer.report_deleted
        )
        self._loops.add(_watch_reading(reader))

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

    async def _create_consumer(
        self, stack: AsyncExitStack, write_path: WritePath, dispatcher: Dispatcher, backlog: Backlog
    ) -> CommandConsumer:
        """Create the consumer, and connect the producer that it parks messages with."""
        settings = self._settings
        producer = dead_letter_producer(settings.kafka)
        stack.push_async_callback(producer.stop)  # Also needed for a producer that did not start.
        await producer.start()
        return CommandConsumer(
            write_path=write_path,
            dispatcher=dispatcher,
            dead_letters=KafkaDeadLetters(producer, topic=settings.dead_letter_topic),
            backlog=backlog,
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

    async def _shut_down(self, loops: Loops) -> None:
        assert self._broker is not None, "what works has its broker"
        await loops.end(self._broker.stop)


async def _watch_reading(reader: SkippingReader) -> None:
    """Update the metrics of how far commands are read, until cancelled."""
    while True:
        places = await reader.places()
        metrics.LAG.clear()  # Another worker now reports partitions that were ours.
        metrics.POSITION.clear()
        for partition, place in places.items():
            metrics.LAG.labels(str(partition)).set(place.lag)
            metrics.POSITION.labels(str(partition)).set(place.next_offset)
        await asyncio.sleep(WATCH_READING_SECONDS)
