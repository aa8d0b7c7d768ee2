"""Reads on behind a record that the Kafka client itself cannot decode, which otherwise holds up its partition for ever.

A header's *name* must be UTF-8 (KIP-82); the broker does not check it, and aiokafka raises in the middle of a fetch.
"""

import time
from collections.abc import Awaitable, Callable
from typing import Any, Self

import structlog
from aiokafka import AIOKafkaConsumer, TopicPartition

log = structlog.get_logger(__name__)

CAREFUL_MS = 100

OnSkipped = Callable[[str, int, int, str], Awaitable[None]]
"""Told the topic, partition, offset and trouble of a record before it is skipped."""


class SkippingReader:
    """Takes the place of a consumer's `getmany`. While it looks for the one bad record it reads one at a time."""

    def __init__(self, consumer: AIOKafkaConsumer, on_skipped: OnSkipped) -> None:
        self._consumer = consumer
        self._getmany = consumer.getmany
        self._on_skipped = on_skipped
        self._is_careful = False
        self.read_at = time.monotonic()
        """When it was last asked, and did not fail."""

    @classmethod
    def install(cls, consumer: AIOKafkaConsumer, on_skipped: OnSkipped) -> Self:
        """Have this consumer skip what it cannot decode, from its next `getmany` on."""
        reader = cls(consumer, on_skipped)
        consumer.getmany = reader.getmany
        return reader

    async def getmany(self, *partitions: TopicPartition, **limits: Any) -> dict[TopicPartition, list[Any]]:
        """As the consumer's own."""
        records = await self._read(*partitions, **limits)
        self.read_at = time.monotonic()
        return records

    async def _read(self, *partitions: TopicPartition, **limits: Any) -> dict[TopicPartition, list[Any]]:
        if self._is_careful:
            return await self._read_carefully()
        try:
            records: dict[TopicPartition, list[Any]] = await self._getmany(*partitions, **limits)
        except UnicodeDecodeError as error:
            log.error("a record cannot be decoded; looking for it", error=str(error))
            self._is_careful = True
            await self._forget_what_was_fetched()
            return {}
        return records

    async def _forget_what_was_fetched(self) -> None:
        """Begin again at what is committed: the failed read has passed over good records of other partitions."""
        for partition in self._consumer.assignment():
            committed = await self._consumer.committed(partition)
            if committed is None:
                committed = (await self._consumer.beginning_offsets([partition]))[partition]
            self._consumer.seek(partition, committed)

    async def _read_carefully(self) -> dict[TopicPartition, list[Any]]:
        found: dict[TopicPartition, list[Any]] = {}
        for partition in self._consumer.assignment():
            try:
                found |= await self._getmany(partition, timeout_ms=CAREFUL_MS, max_records=1)
            except UnicodeDecodeError as error:
                await self._skip(partition, str(error))
        return found

    async def _skip(self, partition: TopicPartition, trouble: str) -> None:
        offset = await self._consumer.position(partition)
        await self._on_skipped(partition.topic, partition.partition, offset, trouble)
        self._consumer.seek(partition, offset + 1)
        self._is_careful = False
