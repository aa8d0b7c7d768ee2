"""Workers in a test's own process, and their progress."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from uuid import UUID

from aiokafka import AIOKafkaConsumer, TopicPartition

from app.settings import Settings
from app.worker import Worker
from tests.conftest import PARTITIONS
from tests.support.service import body, value
from tests.support.waiting import until

UNREADABLE = b" \xff{ not json \n"


@asynccontextmanager
async def running(settings: Settings) -> AsyncIterator[Worker]:
    """A worker; leaving the block stops it cleanly and raises its error if it failed."""
    stop, worker = asyncio.Event(), Worker(settings)
    task = asyncio.create_task(worker.run(stop))
    try:
        yield worker
    finally:
        stop.set()
        async with asyncio.timeout(40):
            await task


async def until_captured(settings: Settings, count: int) -> None:
    async def is_done() -> bool:
        return bool(await captured(settings) >= count)

    await until(is_done)


async def captured(settings: Settings) -> int:
    return int(await value(settings.postgres_url, "SELECT count(*) FROM payments WHERE status = 'captured'"))


async def committed(settings: Settings) -> int:
    """The sum of the group's committed offsets: how many commands Kafka will not deliver to it again."""
    async with AIOKafkaConsumer(
        bootstrap_servers=settings.kafka_bootstrap, group_id=settings.consumer_group, enable_auto_commit=False
    ) as reader:
        offsets = [
            await reader.committed(TopicPartition(settings.commands_topic, number)) for number in range(PARTITIONS)
        ]
    return sum(each or 0 for each in offsets)


def charges(payments: list[UUID]) -> list[tuple[bytes | None, bytes | None]]:
    return [(str(each).encode(), body("charge", each, f"charge-{each}")) for each in payments]
