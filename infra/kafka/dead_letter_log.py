"""Reads the dead-letter topic, and publishes letters again as they once came: same bytes, key and headers."""

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final, Self

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.errors import KafkaError

PREFIX: Final = "dlq_"
LARGEST_BYTES: Final = 64 * 1024 * 1024


class LetterUnknown(ValueError):
    """The topic has no such letter (any more)."""


class OriginalGone(Exception):
    """The letter was parked without its value, and the topic that it came from no longer has the original."""


@dataclass(frozen=True, slots=True)
class LetterId:
    """Where a letter lies on the dead-letter topic; written as `PARTITION:OFFSET`."""

    partition: int
    offset: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Raises ValueError where `text` is no letter's name."""
        partition, _, offset = text.partition(":")
        if not (partition.isdecimal() and offset.isdecimal()):
            raise ValueError(
                f"{text!r} is no letter: write PARTITION:OFFSET as `payments dlq list` shows it, like 3:17"
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
    def source(self) -> tuple[str, int, int]:
        """Topic, partition and offset of the original."""
        return self.facts["topic"], int(self.facts["partition"]), int(self.facts["offset"])

    @property
    def size(self) -> int:
        """Bytes of the original value."""
        return int(self.facts["value_left_out"]) if "value_left_out" in self.facts else len(self.value or b"")


class DeadLetterLog:
    """The dead-letter topic of one installation. Every method raises KafkaError when Kafka is away."""

    def __init__(self, bootstrap: str, topic: str) -> None:
        self._bootstrap = bootstrap
        self._topic = topic

    async def letters(self) -> AsyncGenerator[Letter, None]:
        """All letters that are there now, oldest first in each partition; one at a time is in memory."""
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
        """The letter of this name.

        Raises:
            LetterUnknown: there is none.
        """
        record = await self._record(self._topic, wanted.partition, wanted.offset)
        if record is None:
            raise LetterUnknown(f"there is no letter {wanted} on {self._topic}")
        return _letter(record)

    async def original(self, letter: Letter) -> bytes | None:
        """The value as it came; read from its source if it was left out here.

        Raises:
            OriginalGone: it was left out, and is no longer there.
        """
        if "value_left_out" not in letter.facts:
            return letter.value
        topic, partition, offset = letter.source
        record = await self._record(topic, partition, offset)
        if record is None:
            raise OriginalGone(
                f"letter {letter.id} was parked without its {letter.size} bytes, and {topic} has lost them"
            )
        value: bytes | None = record.value
        return value

    async def publish(self, letter: Letter) -> None:
        """Send the original to its topic once more; on return Kafka has it.

        Raises:
            OriginalGone: as `original`.
        """
        value = await self.original(letter)
        async with AIOKafkaProducer(
            bootstrap_servers=self._bootstrap, acks="all", max_request_size=64 << 20
        ) as producer:
            await producer.send_and_wait(letter.source[0], value=value, key=letter.key, headers=list(letter.headers))

    async def _record(self, topic: str, partition: int, offset: int) -> Any:
        async with self._consumer() as consumer:
            where = TopicPartition(topic, partition)
            if partition not in (await consumer._client.fetch_all_metadata()).partitions_for_topic(topic):
                return None
            consumer.assign([where])
            first, end = (
                (await consumer.beginning_offsets([where]))[where],
                (await consumer.end_offsets([where]))[where],
            )
            if not first <= offset < end:
                return None
            consumer.seek(where, offset)
            record = await consumer.getone()
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
        async with AIOKafkaConsumer(
            bootstrap_servers=self._bootstrap, enable_auto_commit=False, auto_offset_reset="none", fetch_max_wait_ms=100
        ) as consumer:
            yield consumer


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
