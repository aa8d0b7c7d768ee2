"""How far the commands' topic has been read: offsets of batches that are in Postgres, committed in the background."""

import asyncio
import contextlib
from collections.abc import Sequence
from typing import Any, Final

import structlog
from aiokafka import TopicPartition
from aiokafka.errors import CommitFailedError, IllegalStateError, KafkaError

log = structlog.get_logger(__name__)

Record = Any
"""An `aiokafka.ConsumerRecord` with bytes for key and value; aiokafka ships no types."""

COMMIT_INTERVAL_SECONDS: Final = 0.05
POSITION_SECONDS: Final = 1.0
"""How long Kafka's client may take to tell the position in a partition that was just assigned again."""


class Offsets:
    """Collects the offsets that may be committed, and commits them. A late or lost commit only repeats work."""

    def __init__(self) -> None:
        self._consumer: Any = None
        self._next: dict[TopicPartition, int] = {}

    async def accepted(self, consumer: Any, records: Sequence[Record]) -> None:
        """Note that everything up to these records, the last that were read, is in Postgres.

        Transaction markers, which are not records, count as read: if Kafka deletes only them, nothing is lost.
        """
        self._consumer = consumer
        for partition, read_to in {
            TopicPartition(each.topic, each.partition): each.offset + 1 for each in records
        }.items():
            # Where a partition has moved, its new owner reads these again.
            with contextlib.suppress(IllegalStateError):
                self._next[partition] = max(read_to, await _position(consumer, partition))

    async def run(self) -> None:
        """Commit every `COMMIT_INTERVAL_SECONDS` until cancelled."""
        while True:
            await asyncio.sleep(COMMIT_INTERVAL_SECONDS)
            await self.commit()

    async def commit(self) -> None:
        """Commit what was accepted since the last time. If that is refused, other workers read the batch again."""
        accepted, self._next = self._next, {}
        # A partition that has moved would have the whole commit refused.
        due = {each: offset for each, offset in accepted.items() if each in self._consumer.assignment()}
        if not due:
            return
        try:
            await self._consumer.commit(due)
        except (CommitFailedError, IllegalStateError) as error:
            log.info("offsets not committed, partitions moved", error=str(error))
        except KafkaError as error:
            self._next = due | self._next
            log.warning("offsets not committed yet", error=str(error))


async def _position(consumer: Any, partition: TopicPartition) -> int:
    """The next offset to read; 0 if it is not known yet because the partition has only just been assigned again."""
    try:
        async with asyncio.timeout(POSITION_SECONDS):
            return int(await consumer.position(partition))
    except TimeoutError:
        return 0
