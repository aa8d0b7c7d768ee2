"""Reads the dead-letter topic, and publishes letters again as they arrived: same bytes, key and headers."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final, Self

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.errors import (
    KafkaError,
    MessageSizeTooLargeError,
    RecordListTooLargeError,
    UnknownTopicOrPartitionError,
)

from infra.kafka.access import KafkaAccess

PREFIX: Final = "dlq_"
LARGEST_BYTES: Final = 64 * 1024 * 1024
READ_TIMEOUT_SECONDS: Final = 15
REQUEST_TIMEOUT_MS: Final = 10_000
REFUSALS: Final = (MessageSizeTooLargeError, RecordListTooLargeError, UnknownTopicOrPartitionError)


class LetterUnknown(ValueError):
    """The topic does not have this letter, or not any more."""


class NotRetriable(Exception):
    """This letter cannot be published again; the message says why, and what to do."""


@dataclass(frozen=True, slots=True, order=True)
class LetterId:
    """A letter's position on the dead-letter topic; written as `PARTITION:OFFSET`."""

    partition: int
    offset: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse `PARTITION:OFFSET`.

        Raises:
            ValueError: `text` does not have this form.
        """
        partition, _, offset = text.partition(":")
        if not (partition.isdecimal() and offset.isdecimal()):
            raise ValueError(
                f"{text!r} is not a letter: write PARTITION:OFFSET as `payments dlq list` shows it, like 3:17"
            )
        return cls(int(partition), int(offset))

    def __str__(self) -> str:
        return f"{self.partition}:{self.offset}"


@dataclass(frozen=True, slots=True)
class Letter:
    """One parked message. `facts` are our headers without their prefix; `headers` are the original ones."""

    id: LetterId
    parked_at: datetime
    key: bytes | None
    value: bytes | None
    headers: tuple[tuple[str, bytes], ...]
    facts: dict[str, str]

    @property
    def reason(self) -> str:
        return self.facts.get("reason", "unknown")

    @property
    def source(self) -> tuple[str, int, int] | None:
        """Topic, partition and offset of the original; None for a letter that no worker of ours parked."""
        partition, offset = self.facts.get("partition", ""), self.facts.get("offset", "")
        if "topic" not in self.facts or not (partition.isdecimal() and offset.isdecimal()):
            return None
        return self.facts["topic"], int(partition), int(offset)

    @property
    def is_left_out(self) -> bool:
        """Whether the value was too large to be parked."""
        return "value_left_out" in self.facts

    @property
    def size(self) -> int:
        """Bytes of the original value."""
        left_out = self.facts.get("value_left_out", "")
        return int(left_out) if left_out.isdecimal() else len(self.value or b"")


@dataclass(frozen=True, slots=True)
class Original:
    """A message as it first arrived."""

    topic: str
    key: bytes | None
    value: bytes | None
    headers: list[tuple[str, bytes]]


class DeadLetterLog:
    """The dead-letter topic of one installation. Every method raises KafkaError when Kafka is away."""

    def __init__(self, kafka: KafkaAccess, topic: str) -> None:
        self._kafka = kafka
        self._topic = topic

    async def letters(self) -> AsyncGenerator[Letter, None]:
        """All letters present now, oldest first in each partition, yielded one at a time."""
        async with self._consumer() as consumer:
            partitions = await self._assign_all(consumer)
            ends: dict[TopicPartition, int] = await consumer.end_offsets(partitions)
            await consumer.seek_to_beginning(*partitions)
            starts = await consumer.beginning_offsets(partitions)
            left = {each for each in partitions if starts[each] < ends[each]}
            while left:
                for partition, records in (await consumer.getmany(timeout_ms=200, max_records=200)).items():
                    for record in records:
                        if record.offset < ends[partition]:
                            yield _letter(record)
                    if await consumer.position(partition) >= ends[partition]:
                        left.discard(partition)

    async def letter(self, wanted: LetterId) -> Letter:
        """The letter with this id.

        Raises:
            LetterUnknown: there is no such letter.
        """
        record = await self._record(self._topic, wanted.partition, wanted.offset)
        if record is None:
            raise LetterUnknown(f"there is no letter {wanted} on {self._topic}")
        return _letter(record)

    async def original(self, letter: Letter) -> Original:
        """The message as it first arrived; read from its source if its value was left out of the letter.

        Raises:
            NotRetriable: the letter does not say where it came from, or its source no longer has it.
        """
        if letter.source is None:
            raise NotRetriable(f"letter {letter.id} does not say where it came from: no worker parked it; drop it")
        topic, partition, offset = letter.source
        if not letter.is_left_out:
            return Original(topic, letter.key, letter.value, list(letter.headers))
        record = await self._record(topic, partition, offset)
        if record is None or len(record.value or b"") != letter.size or letter.key not in (None, record.key):
            raise NotRetriable(
                f"letter {letter.id} was parked without its {letter.size} bytes, and they no longer stand at "
                f"{topic}:{partition}:{offset}; ask the producer to send it again, and drop it"
            )
        return Original(topic, record.key, record.value, list(record.headers))

    @asynccontextmanager
    async def publisher(self) -> AsyncIterator[AIOKafkaProducer]:
        """A producer for `publish`, with a size limit high enough for any message that some topic once accepted."""
        async with AIOKafkaProducer(
            **self._kafka.client_arguments(),
            acks="all",
            max_request_size=LARGEST_BYTES,
            request_timeout_ms=REQUEST_TIMEOUT_MS,
        ) as producer:
            yield producer

    async def publish(self, letter: Letter, producer: AIOKafkaProducer) -> None:
        """Publish the original to its topic again; on return Kafka has it.

        Raises:
            NotRetriable: as in `original`, or its topic is gone or does not accept it.
        """
        original = await self.original(letter)
        try:
            await producer.send_and_wait(
                original.topic, value=original.value, key=original.key, headers=original.headers
            )
        except REFUSALS as error:
            raise NotRetriable(
                f"letter {letter.id} is not accepted by {original.topic}: {type(error).__name__}; fix the topic"
            ) from error

    async def _record(self, topic: str, partition: int, offset: int) -> Any:
        async with self._consumer() as consumer:
            where = TopicPartition(topic, partition)
            metadata = await consumer._client.fetch_all_metadata()
            if partition not in (metadata.partitions_for_topic(topic) or ()):
                return None
            consumer.assign([where])
            first, end = (
                (await consumer.beginning_offsets([where]))[where],
                (await consumer.end_offsets([where]))[where],
            )
            if not first <= offset < end:
                return None
            consumer.seek(where, offset)
            try:
                # The offset may hold a transaction marker instead of a message: nothing arrives then.
                async with asyncio.timeout(READ_TIMEOUT_SECONDS):
                    record = await consumer.getone(where)
            except TimeoutError:
                return None
            return record if record.offset == offset else None

    async def _assign_all(self, consumer: AIOKafkaConsumer) -> list[TopicPartition]:
        metadata = await consumer._client.fetch_all_metadata()
        numbers = metadata.partitions_for_topic(self._topic)
        if numbers is None:
            raise KafkaError(f"there is no topic {self._topic}: `payments migrate` makes it")
        partitions = [TopicPartition(self._topic, number) for number in sorted(numbers)]
        consumer.assign(partitions)
        return partitions

    @asynccontextmanager
    async def _consumer(self) -> AsyncIterator[AIOKafkaConsumer]:
        consumer = AIOKafkaConsumer(
            **self._kafka.client_arguments(),
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            fetch_max_wait_ms=100,
        )
        try:
            await consumer.start()  # Its own context manager does not stop a consumer that failed to start.
            yield consumer
        finally:
            await consumer.stop()


def _letter(record: Any) -> Letter:
    facts = {name[len(PREFIX) :]: _text(value) for name, value in record.headers if name.startswith(PREFIX)}
    return Letter(
        LetterId(record.partition, record.offset),
        datetime.fromtimestamp(record.timestamp / 1000, UTC),
        record.key,
        record.value,
        tuple((name, value) for name, value in record.headers if not name.startswith(PREFIX)),
        facts,
    )


def _text(value: bytes | None) -> str:
    return (value or b"").decode(errors="replace")
