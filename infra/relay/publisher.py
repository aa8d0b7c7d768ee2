"""Publishes outbox events to Kafka, in order per partition, and knows how far all of them are acknowledged.

Each partition has one sender. While its batch is on its way, the next events gather: small batches when there is little
to do, large ones under load, and no timer in between.
"""

import asyncio
from collections import deque
from typing import Any, NamedTuple

from aiokafka import AIOKafkaProducer
from aiokafka.partitioner import murmur2

from infra.relay.errors import KafkaAway
from infra.relay.pgoutput import Commit, OutboxEvent


class Group:
    """Events up to a commit (None: amid a transaction), and how many of them are not acknowledged."""

    __slots__ = ("commit", "missing")

    def __init__(self) -> None:
        self.missing = 0
        self.commit: Commit | None = None


class Prefix:
    """The acknowledged prefix: the slot may move only past groups before which nothing is missing."""

    def __init__(self) -> None:
        self._groups: deque[Group] = deque()
        self.lsn = 0

    def append(self, group: Group) -> None:
        """Groups come in the order of the log."""
        self._groups.append(group)

    def advance(self) -> int:
        """Move past what is complete; the position up to which everything is acknowledged."""
        while self._groups and not self._groups[0].missing:
            commit = self._groups.popleft().commit
            if commit is not None:
                self.lsn = commit.end_lsn
        return self.lsn

    @property
    def oldest(self) -> Group | None:
        """The first group with something missing."""
        return self._groups[0] if self._groups else None


class _Pending(NamedTuple):
    key: bytes
    value: bytes
    headers: list[tuple[str, bytes | None]]
    group: Group


class Publisher:
    """One producer's life. After an error it is useless: make another and begin at the acknowledged prefix."""

    def __init__(self, producer: AIOKafkaProducer, topic: str, partitions: int) -> None:
        self.unacknowledged = 0
        self.published = 0
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.progress = asyncio.Event()
        self._producer = producer
        self._senders = [_Sender(self, producer, topic, number) for number in range(partitions)]

    def publish(self, event: OutboxEvent, group: Group) -> None:
        """Hand an event over; its group counts it until it is acknowledged."""
        group.missing += 1
        self.unacknowledged += 1
        key = event.aggregateid
        sender = self._senders[(murmur2(key) & 0x7FFFFFFF) % len(self._senders)]
        sender.add(_Pending(key, event.payload, headers_of(event), group))

    def acknowledged(self, batch: list[_Pending]) -> None:
        """These are on the topic for good."""
        for pending in batch:
            pending.group.missing -= 1
        self.unacknowledged -= len(batch)
        self.published += len(batch)
        self.progress.set()

    def fail(self, error: BaseException) -> None:
        """The first failure ends the session."""
        if not self.failed.done():
            self.failed.set_exception(KafkaAway(f"{type(error).__name__}: {error}"))
        self.progress.set()

    async def close(self) -> None:
        """Stop sending; what is not acknowledged is sent again by the next session."""
        for sender in self._senders:
            sender.close()
        if self.failed.done():
            self.failed.exception()
        await self._producer.stop()


class _Sender:
    """The events of one partition, in order."""

    def __init__(self, publisher: Publisher, producer: AIOKafkaProducer, topic: str, partition: int) -> None:
        self._publisher = publisher
        self._producer = producer
        self._topic = topic
        self._partition = partition
        self._pending: deque[_Pending] = deque()
        self._task: asyncio.Task[None] | None = None
        self._is_closed = False

    def add(self, pending: _Pending) -> None:
        self._pending.append(pending)
        if self._task is None and not self._is_closed:
            self._task = asyncio.create_task(self._send())

    def close(self) -> None:
        self._is_closed = True
        if self._task is not None:
            self._task.cancel()

    async def _send(self) -> None:
        try:
            while self._pending:
                batch, gathered = self._gather()
                await (await self._producer.send_batch(batch, self._topic, partition=self._partition))
                self._publisher.acknowledged(gathered)
        except Exception as error:
            # Nothing may overtake what was not sent: this sender is done, and the session with it.
            self._is_closed = True
            self._publisher.fail(error)
        finally:
            self._task = None

    def _gather(self) -> tuple[Any, list[_Pending]]:
        batch = self._producer.create_batch()
        gathered: list[_Pending] = []
        while self._pending:
            key, value, headers, _ = self._pending[0]
            # None: the batch is full. The first message always fits; whether the broker takes it is its own decision.
            if batch.append(timestamp=None, key=key, value=value, headers=headers) is None:
                break
            gathered.append(self._pending.popleft())
        return batch, gathered


def headers_of(event: OutboxEvent) -> list[tuple[str, bytes | None]]:
    """The headers in the order that Debezium's outbox event router gives them (docs/decisions/0002)."""
    return [
        ("id", event.id),
        ("ce_id", event.id),
        ("ce_type", event.type),
        ("ce_source", event.source),
        ("ce_time", event.occurred_at),
        ("ce_specversion", event.specversion),
        ("payment_seq", event.payment_seq),
        ("traceparent", event.traceparent),
    ]
