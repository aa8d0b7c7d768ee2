"""A reader that loses no readable record: it skips and reports records that cannot be decoded or were deleted.

aiokafka takes the records of one partition after the other and advances each position at once: if it then raises, the
caller loses the records already taken. It raises for a header whose *name* is not UTF-8 (KIP-82; the broker does not
check it), and for a batch with a wrong checksum or compression. So after such a read everything begins again at the
committed offsets, and each partition is read by itself: a record that cannot be decoded is skipped and reported, and a
batch that cannot be read holds up only its own partition.

If Kafka has deleted the next records, aiokafka would silently continue after them (`auto_offset_reset` "earliest").
With "none" it raises instead; the reader then continues at the log's beginning, and reports it. Only Kafka knows of the
deletion: gaps between offsets prove nothing (ends of transactions, aborted transactions, compaction).
"""

import asyncio
import contextlib
import math
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final, NamedTuple, Self

import structlog
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import (
    ConsumerStoppedError,
    CorruptRecordException,
    KafkaError,
    NoOffsetForPartitionError,
    OffsetOutOfRangeError,
)

log = structlog.get_logger(__name__)

CAREFUL_MS: Final = 100
BEGINNING_SECONDS: Final = 2.0
POSITION_SECONDS: Final = 1.0
TROUBLE_SECONDS: Final = 60.0
"""The least time between two log records about a partition that cannot be read while others can."""
IDLE_PASSES_MAX: Final = 3
"""After so many passes without records or errors, reading returns to normal: the bad record is gone."""

OnSkipped = Callable[[str, int, int, str], Awaitable[None]]
"""Called with the topic, partition, offset and trouble of a record before it is skipped."""

OnDeleted = Callable[[str, int, int, int], None]
"""Called with the topic, the partition, the offset that was next, and the offset at which the log begins now."""

Records = dict[TopicPartition, list[Any]]


class ReadPosition(NamedTuple):
    """The offset that is read next, and how many offsets remain to the partition's end, as Kafka reported it last."""

    next_offset: int
    lag: int


class SkippingReader:
    """Replaces a consumer's `getmany`. While something cannot be read, it reads one record at a time."""

    def __init__(self, consumer: AIOKafkaConsumer, on_skipped: OnSkipped, on_deleted: OnDeleted) -> None:
        self._consumer = consumer
        self._getmany = consumer.getmany
        self._on_skipped = on_skipped
        self._on_deleted = on_deleted
        self._is_rewind_due = False
        """A read has failed and may have skipped good records."""
        self._careful_of: frozenset[TopicPartition] | None = None
        """The assignment during which partitions are read one by one; a new assignment ends that."""
        self._idle_passes = 0
        self._trouble_told_at = -math.inf
        self.read_at = time.monotonic()
        """When a read last succeeded (monotonic clock)."""

    @classmethod
    def install(cls, consumer: AIOKafkaConsumer, on_skipped: OnSkipped, on_deleted: OnDeleted) -> Self:
        """Make this consumer skip records that it cannot decode, from its next `getmany` on.

        Its `auto_offset_reset` must be "none".
        """
        reader = cls(consumer, on_skipped, on_deleted)
        consumer.getmany = reader.getmany
        return reader

    @property
    def is_careful(self) -> bool:
        """Whether each partition is read by itself because something could not be read."""
        return self._careful_of is not None

    def knows(self, topic: str) -> bool:
        """Whether the topic has partitions, as Kafka reported last. (None need be assigned to this consumer.)"""
        return bool(self._consumer.partitions_for_topic(topic))

    async def places(self) -> dict[int, ReadPosition]:
        """The read position in each assigned partition; partitions whose position is unknown now are left out."""
        found: dict[int, ReadPosition] = {}
        for partition in self._consumer.assignment():
            # It was just assigned or revoked, or Kafka refuses: the next read of it meets the same error and retries.
            with contextlib.suppress(TimeoutError, KafkaError):
                async with asyncio.timeout(POSITION_SECONDS):
                    next_offset = await self._consumer.position(partition)
                is_ours = partition in self._consumer.assignment()
                end = self._consumer.highwater(partition) if is_ours else None
                if end is not None:
                    found[partition.partition] = ReadPosition(next_offset, max(0, end - next_offset))
        return found

    async def getmany(self, *partitions: TopicPartition, **limits: Any) -> Records:
        """As the consumer's own.

        Raises:
            KafkaError: nothing could be read; the next read returns every record that this one skipped.
        """
        if self._is_rewind_due:
            await self._rewind()
        if self._careful_of not in (None, self._consumer.assignment()):
            self._careful_of = None  # The trouble may be another worker's now; if not, it shows again.
        read = self._read_carefully() if self.is_careful else self._read(*partitions, **limits)
        records = await read
        self.read_at = time.monotonic()
        return records

    async def _read(self, *partitions: TopicPartition, **limits: Any) -> Records:
        try:
            return await self._get(*partitions, **limits)
        except ConsumerStoppedError:
            raise
        except Exception as error:
            log.error("a read from Kafka failed; each partition is read by itself now", error=str(error))
            self._is_rewind_due = True
            self._careful_of, self._idle_passes = frozenset(self._consumer.assignment()), 0
            if isinstance(error, UnicodeDecodeError):
                return {}
            raise _kafka_error(error) from error

    async def _get(self, *partitions: TopicPartition, **limits: Any) -> Records:
        """As the consumer's own; returns nothing if there is no valid offset, and sets one for the next read."""
        try:
            return dict(await self._getmany(*partitions, **limits))
        except NoOffsetForPartitionError as error:  # This group has never read it, or not for a week.
            await self._go_on(error.args[0], None)
        except OffsetOutOfRangeError as error:
            for partition, offset in error.args[0].items():
                await self._go_on(partition, offset)
        return {}

    async def _go_on(self, partition: TopicPartition, offset: int | None) -> None:
        try:
            async with asyncio.timeout(BEGINNING_SECONDS):
                beginning = await self._beginning_of(partition)
        except TimeoutError:
            return  # Its leader is away; the others need not wait, and the next read asks again.
        if partition not in self._consumer.assignment():
            return  # It is another worker's now, and that worker meets the same error.
        if offset is not None:
            self._on_deleted(partition.topic, partition.partition, offset, beginning)
        self._consumer.seek(partition, beginning)

    async def _beginning_of(self, partition: TopicPartition) -> int:
        return int((await self._consumer.beginning_offsets([partition]))[partition])

    async def _rewind(self) -> None:
        """Seek to the committed offsets; stays due until it has succeeded."""
        for partition in self._consumer.assignment():
            committed = await self._consumer.committed(partition)
            if committed is None:
                committed = await self._beginning_of(partition)
            self._consumer.seek(partition, committed)
        self._is_rewind_due = False

    async def _read_carefully(self) -> Records:
        """At most one record of each partition, and none of a partition in trouble, which does not stop the others.

        Raises:
            KafkaError: the first trouble, if no partition has a record.
        """
        found: Records = {}
        troubles: list[Exception] = []
        for timeout_ms in (0, CAREFUL_MS):  # First the records that are here already, then wait for some.
            for partition in self._consumer.assignment():
                try:
                    found |= await self._read_one(partition, timeout_ms)
                except ConsumerStoppedError:
                    raise
                except Exception as error:
                    troubles.append(error)
            if found or troubles or not self.is_careful:
                break
        if troubles and not found:
            raise _kafka_error(troubles[0]) from troubles[0]
        if troubles and time.monotonic() - self._trouble_told_at >= TROUBLE_SECONDS:
            self._trouble_told_at = time.monotonic()
            log.error("a partition cannot be read; the others are read on", error=str(troubles[0]))
        self._note_pass(is_idle=not found)
        return found

    async def _read_one(self, partition: TopicPartition, timeout_ms: int) -> Records:
        try:
            return await self._get(partition, timeout_ms=timeout_ms, max_records=1)
        except UnicodeDecodeError as error:
            await self._skip(partition, str(error))
            return {}

    async def _skip(self, partition: TopicPartition, trouble: str) -> None:
        offset = await self._consumer.position(partition)
        await self._on_skipped(partition.topic, partition.partition, offset, trouble)
        self._consumer.seek(partition, offset + 1)
        self._careful_of = None

    def _note_pass(self, *, is_idle: bool) -> None:
        self._idle_passes = self._idle_passes + 1 if is_idle else 0
        if self._idle_passes >= IDLE_PASSES_MAX:
            self._careful_of = None


def _kafka_error(error: Exception) -> KafkaError:
    """Any read failure as a `KafkaError`, which the calling loop survives by waiting and retrying.

    Another exception type, such as a decompressor's own, would end it.
    """
    return error if isinstance(error, KafkaError) else CorruptRecordException(f"{type(error).__name__}: {error}")
