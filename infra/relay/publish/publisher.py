"""Publishes outbox events to Kafka, in order per partition, and counts acknowledgements in the events' groups.

Each partition has a queue with at most one batch in flight. The next events gather meanwhile: batches are small when
there is little to do and large under load, without a timer.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple, Self

import structlog
from aiokafka import AIOKafkaProducer
from aiokafka.errors import (
    InvalidTopicError,
    LeaderNotAvailableError,
    MessageSizeTooLargeError,
    RecordListTooLargeError,
)

from infra.relay import metrics
from infra.relay.compiled import IS_COMPILED
from infra.relay.config import RelayConfig
from infra.relay.errors import EventsLost, KafkaAway
from infra.relay.event import Group, OutboxEvent
from infra.relay.progress.gaps import lost_by_kafka
from infra.relay.publish.partitions import partition_of
from infra.relay.publish.producer import OneCluster, abandon, start_producer
from infra.relay.publish.producers import Producers
from infra.relay.publish.records import RecordBatch, Records, records_class
from infra.relay.source import Room

if IS_COMPILED:
    from infra.relay import native

log = structlog.get_logger(__name__)

BATCH_BYTES_MAX = 262_144
IN_FLIGHT_BYTES_MAX = 8 * 1024 * 1024
"""Payload bytes in flight above which queues wait: one request takes a batch of every partition, and aiokafka copies it
four times while it is sent."""
SEND_SECONDS = 5.0
"""How long handing over a batch may take. It waits only for metadata, and Postgres gets no answers meanwhile."""
TOO_LARGE = (MessageSizeTooLargeError, RecordListTooLargeError)
REFUSALS = (*TOO_LARGE, InvalidTopicError)
"""Errors that prove the batch was not written and that a retry will not help. (A time-out proves neither.)"""


class Diverted(NamedTuple):
    """An event kept from Kafka: refused for `reason`, or without a reason if it waits behind a refused one."""

    event: OutboxEvent
    group: Group
    reason: str | None


class _PartitionQueue:
    """One partition: the batches that wait, the last of them still open, and the batch in flight."""

    __slots__ = ("batch_bytes_max", "in_flight", "number", "pending", "sent_at")

    def __init__(self, number: int) -> None:
        self.number = number
        self.batch_bytes_max = BATCH_BYTES_MAX
        self.pending: deque[RecordBatch] = deque()
        self.in_flight: RecordBatch | None = None
        self.sent_at: float | None = None
        """When the batch that Kafka has not answered yet was first sent."""

    def unpack(self) -> list[tuple[OutboxEvent, Group]]:
        """Remove everything that waits, and return it as events."""
        pending, self.pending = self.pending, deque()
        return [each for batch in pending for each in batch.unpack()]


class Publisher:
    """Publishes for one session. After an error it cannot be used: make another, and begin at the saved checkpoint.

    `on_progress` is called whenever `flush` has something to do again, or an error has occurred.
    """

    def __init__(
        self,
        config: RelayConfig,
        producer: AIOKafkaProducer,
        cluster: OneCluster,
        partitions: int,
        on_progress: Callable[[], None],
    ) -> None:
        self.unacknowledged = 0
        self.unacknowledged_bytes = 0
        self.payload_max = config.message_bytes_max
        self.blocked: set[bytes] = set()
        """Payments in quarantine: their events are diverted, in order, for `take_diverted`."""
        self.given_up: set[bytes] = set()
        """Events that an operator has dropped: they are diverted as well, and their payments go on."""
        self._diverted: list[Diverted] = []
        self._config = config
        self._cluster = cluster
        self.acknowledged_offsets = [-1] * partitions
        """The last acknowledged offset of each partition. The next one is above it, unless Kafka has lost events."""
        self._producers = Producers(config, cluster, producer, partitions, self._renewed)
        self._queues = [_PartitionQueue(number) for number in range(partitions)]
        self._new_records = records_class(is_native=config.uses_native)
        self._open: list[Records | None] = [None] * partitions
        """The records of each queue's last batch, while it may be appended to; otherwise None."""
        self._in_flight_bytes = 0
        self._turn = 0
        """The queue that is asked first: it rotates, so that none starves while there is room for only some of them."""
        self._on_progress = on_progress
        self._error: BaseException | None = None
        self._progress_at = time.monotonic()
        self._is_closed = False

    @classmethod
    async def connect(cls, config: RelayConfig, on_progress: Callable[[], None]) -> Self:
        """A publisher to the topic's partitions as they are now.

        Raises:
            KafkaError: the brokers cannot be reached, or this user may not see the topic.
            TopicMissing: the topic does not exist.
        """
        cluster = OneCluster()
        producer, partitions = await start_producer(config, cluster)
        try:
            await cluster.learn(producer.client)
        except BaseException:
            await abandon(producer)
            raise
        return cls(config, producer, cluster, partitions, on_progress)

    @property
    def kafka_cluster(self) -> str | None:
        """The id of the brokers' cluster; None if the brokers do not report one."""
        return self._cluster.id

    @property
    def room(self) -> Room:
        """How much more may be read before something is acknowledged."""
        config = self._config
        return Room(
            config.unacknowledged_max - self.unacknowledged, config.unacknowledged_bytes_max - self.unacknowledged_bytes
        )

    @property
    def is_full(self) -> bool:
        """Whether no more should be read until something is acknowledged."""
        return min(self.room) <= 0

    def exceed(self, offsets: Sequence[int]) -> None:
        """Expect only offsets above these, one for each partition that there was."""
        known = offsets[: len(self.acknowledged_offsets)]
        self.acknowledged_offsets[: len(known)] = known

    def publish(self, events: Sequence[OutboxEvent], group: Group) -> None:
        """Accept events for the next `flush`; their group counts them until they are acknowledged."""
        if self._config.uses_native and self.open_records is not None:
            count, size = native.encode(events, group, self.payload_max, self._open, self.renew)
            self.note(count, size)
            events = events[count:]
        group.missing += len(events)
        self.note(len(events), sum(len(event.payload) for event in events))
        for event in events:
            if event.aggregateid in self.blocked or event.id in self.given_up:
                self._diverted.append(Diverted(event, group, None))
            else:
                self._add(event, group)

    def _add(self, event: OutboxEvent, group: Group) -> None:
        """Append to its partition's queue; an event that is too large waits for its turn there as well."""
        number = partition_of(event.aggregateid, len(self._queues))
        if len(event.payload) > self.payload_max:
            self._open_batch(number).hold(event, group)
            return  # The batch is sealed, so the next `append` opens another.
        records = self._open[number]
        if records is None or not records.append(event, group):
            self.renew(number).append(event, group)

    def renew(self, number: int) -> Records:
        """Begin another batch of this partition, and return its records."""
        return self._open_batch(number).records

    def _open_batch(self, number: int) -> RecordBatch:
        queue = self._queues[number]
        batch = RecordBatch(self._new_records(min(queue.batch_bytes_max, self.payload_max)))
        queue.pending.append(batch)
        self._open[number] = batch.records
        return batch

    @property
    def open_records(self) -> list[Records | None] | None:
        """Each partition's open records, for a source that encodes events itself; None where it must call `renew`.

        None instead of the list while some events must be diverted.
        """
        return None if self.blocked or self.given_up else self._open

    def note(self, events: int, size: int) -> None:
        """Report events that were encoded, and counted in their groups; `size` is the bytes of their payloads."""
        if events and not self.unacknowledged:
            self._progress_at = time.monotonic()
        self.unacknowledged += events
        self.unacknowledged_bytes += size

    async def flush(self) -> None:
        """Send the batches of queues that have none in flight.

        Raises:
            KafkaAway: events could not be published; the session must end.
            EventsLost: Kafka has lost events that it had acknowledged.
        """
        self.check()
        while queue := self._next_queue():
            try:
                async with asyncio.timeout(SEND_SECONDS):
                    await self._send(queue)
            except TimeoutError as error:
                raise KafkaAway("the producer accepts no batch") from error
            self.check()

    def _next_queue(self) -> _PartitionQueue | None:
        if self._in_flight_bytes < IN_FLIGHT_BYTES_MAX:
            for queue in (*self._queues[self._turn :], *self._queues[: self._turn]):
                if queue.pending and queue.in_flight is None and queue.number not in self._producers.renewing:
                    self._turn = (queue.number + 1) % len(self._queues)
                    return queue
        return None

    def check(self) -> None:
        """Raise KafkaAway if this publisher cannot be used any more, or EventsLost."""
        self._cluster.check()
        if isinstance(self._error, EventsLost):
            raise self._error
        if self._error is not None:
            raise KafkaAway(f"{type(self._error).__name__}: {self._error}") from self._error

    def check_partitions(self) -> None:
        """Check that the topic has as many partitions as when this publisher was made, by its producers' metadata.

        Raises:
            KafkaAway: it was recreated or enlarged; events for a partition that is gone would never be acknowledged.
        """
        self._producers.check_partitions()

    @property
    def quiet_seconds(self) -> float:
        """Seconds since Kafka last acknowledged an event, or since events began to wait."""
        return time.monotonic() - self._progress_at

    @property
    def trouble(self) -> str | None:
        """What keeps events from being published, if anything: all events, or those of some partitions."""
        if not self.unacknowledged:
            return None
        before = time.monotonic() - self._config.stalled_seconds
        stuck = ", ".join(str(queue.number) for queue in self._queues if (queue.sent_at or before) < before)
        if self._progress_at < before:
            return "Kafka acknowledges nothing" + (f"; what waits is in partition {stuck}" if stuck else "")
        return f"Kafka acknowledges nothing in partition {stuck}" if stuck else None

    async def close(self) -> None:
        """Stop sending at once; what is not acknowledged is published again by the next session."""
        self._is_closed = True
        await self._producers.close()

    async def _send(self, queue: _PartitionQueue) -> None:
        if queue.number in self._producers.spent:
            queue.sent_at = queue.sent_at or time.monotonic()
            self._producers.begin_renewal(queue.number)
            return
        if queue.pending[0].held is not None:
            queue.sent_at = None
            self._refuse(queue, f"above our own limit of {self.payload_max} bytes")
            return
        queue.in_flight = batch = queue.pending.popleft()
        if not queue.pending:
            self._open[queue.number] = None
        self._in_flight_bytes += batch.payload_bytes
        queue.sent_at = queue.sent_at or time.monotonic()
        try:
            producer = self._producers.of_partition[queue.number]
            sent = await producer.send_batch(batch, self._config.topic, partition=queue.number)
        except AssertionError as error:  # aiokafka asserts that the partition exists.
            raise KafkaAway(f"topic {self._config.topic} has no partition {queue.number} any more") from error
        sent.add_done_callback(partial(self._sent, queue))

    def _renewed(self, error: Exception | None) -> None:
        self._error = self._error or error
        self._on_progress()

    def _sent(self, queue: _PartitionQueue, sent: asyncio.Future[Any]) -> None:
        if self._is_closed:
            return
        error = asyncio.CancelledError() if sent.cancelled() else sent.exception()
        batch, queue.in_flight = queue.in_flight, None
        assert batch is not None, "each queue has at most one batch in flight, and this is its answer"
        self._in_flight_bytes -= batch.payload_bytes
        if error is None:
            queue.sent_at = None
            self._acknowledge(batch)
            self._note_offset(queue.number, sent.result().offset, batch.record_count())
        else:
            queue.pending.appendleft(batch)
            self._failed(queue, batch, error)
        self._on_progress()

    def _note_offset(self, partition: int, offset: int, count: int) -> None:
        acknowledged = self.acknowledged_offsets[partition]
        if offset > acknowledged:
            self.acknowledged_offsets[partition] = offset + count - 1
        elif offset >= 0:  # -1: a batch that the broker had already, and no longer knows where.
            self._error = EventsLost(lost_by_kafka(self._config.topic, partition, offset, acknowledged))

    def _failed(self, queue: _PartitionQueue, batch: RecordBatch, error: BaseException) -> None:
        """Nothing may overtake a batch that was not written: it waits in its queue, or the session ends here."""
        if isinstance(error, LeaderNotAvailableError):
            # The other queues go on: a new session would send again what they have sent since.
            self._producers.spent.add(queue.number)
            self._put_back(self._take_out(queue))
            log.warning("a partition has no leader; its events wait", topic=self._config.topic, partition=queue.number)
        elif isinstance(error, REFUSALS):
            queue.sent_at = None
            self._refused(queue, batch, error)
        else:
            self._error = self._error or error  # The first one: after it, Kafka may not show again what it has lost.

    def _acknowledge(self, batch: RecordBatch) -> None:
        """Count the events of this batch as published."""
        batch.settle()
        self._settled(batch.record_count(), batch.payload_bytes)
        metrics.EVENTS.inc(batch.record_count())

    def acknowledge_diverted(self, diverted: Sequence[Diverted]) -> None:
        """Count these events as settled: they are stored in quarantine."""
        for _, group, _ in diverted:
            group.missing -= 1
        self._settled(len(diverted), sum(len(each.event.payload) for each in diverted))

    def _settled(self, count: int, size: int) -> None:
        self.unacknowledged -= count
        self.unacknowledged_bytes -= size
        self._progress_at = time.monotonic()

    def take_diverted(self) -> list[Diverted]:
        """Remove and return the events to be put into quarantine, in order."""
        diverted, self._diverted = self._diverted, []
        return diverted

    def _refused(self, queue: _PartitionQueue, batch: RecordBatch, error: BaseException) -> None:
        """Retry in smaller batches, down to the single event that is refused."""
        # The producer has counted the refused batch, the broker has not: their sequence numbers never match again here.
        self._producers.spent.add(queue.number)
        if batch.record_count() > 1 and isinstance(error, TOO_LARGE):
            queue.batch_bytes_max = min(queue.batch_bytes_max, batch.payload_bytes) // 2
            self._put_back(self._take_out(queue))
        else:
            # The event removed now may be what made batches too large.
            queue.batch_bytes_max = BATCH_BYTES_MAX
            self._refuse(queue, f"{type(error).__name__}: {error}")

    def _take_out(self, queue: _PartitionQueue) -> list[tuple[OutboxEvent, Group]]:
        self._open[queue.number] = None
        return queue.unpack()

    def _put_back(self, waiting: Iterable[tuple[OutboxEvent, Group]]) -> None:
        for event, group in waiting:
            self._add(event, group)

    def _refuse(self, queue: _PartitionQueue, reason: str) -> None:
        """Divert the first event of this queue and its payment's later events; the other events go on."""
        (event, group), *waiting = self._take_out(queue)
        self.blocked.add(key := event.aggregateid)
        self._diverted.append(Diverted(event, group, reason))
        self._diverted += [Diverted(*each, None) for each in waiting if each[0].aggregateid == key]
        self._put_back([each for each in waiting if each[0].aggregateid != key])
        metrics.REFUSED.inc()
        log.error(
            "Kafka refuses an outbox event; its payment goes to quarantine",
            outbox_id=event.id.decode(),
            payment_id=key.decode(),
            type=event.type.decode(),
            payload_bytes=len(event.payload),
            partition=queue.number,
            error=reason,
        )
        self._on_progress()
