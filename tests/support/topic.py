"""Sends commands to topics, and reads topics from the beginning until a condition holds."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from typing import Any
from uuid import UUID

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition

from tests.support.outbox import ids

PARTITIONS = 8


async def send(bootstrap: str, topic: str, *messages: tuple[bytes | None, bytes | None]) -> None:
    """Send (key, value) pairs in order and have them acknowledged."""
    async with AIOKafkaProducer(bootstrap_servers=bootstrap) as producer:
        for acknowledgement in [await producer.send(topic, value, key=key) for key, value in messages]:
            await acknowledgement


async def read_until(
    bootstrap: str, topic: str, is_enough: Callable[[list[Any]], bool], *, timeout_seconds: float = 60
) -> list[Any]:
    """The topic's records, read from the beginning until `is_enough` is true of them; each partition in its order."""
    records: list[Any] = []
    async with AIOKafkaConsumer(bootstrap_servers=bootstrap, enable_auto_commit=False) as consumer:
        partitions = [TopicPartition(topic, number) for number in range(PARTITIONS)]
        consumer.assign(partitions)
        await consumer.seek_to_beginning(*partitions)
        async with asyncio.timeout(timeout_seconds):
            while not is_enough(records):
                for batch in (await consumer.getmany(timeout_ms=100)).values():
                    records += batch
    return records


@contextlib.asynccontextmanager
async def arriving(bootstrap: str, topic: str) -> AsyncIterator[set[UUID]]:
    """The outbox ids of the records that arrive on the topic from now on; the set grows during the block."""
    arrived: set[UUID] = set()
    async with AIOKafkaConsumer(bootstrap_servers=bootstrap, enable_auto_commit=False) as consumer:
        partitions = [TopicPartition(topic, number) for number in range(PARTITIONS)]
        consumer.assign(partitions)
        for partition, end in (await consumer.end_offsets(partitions)).items():
            consumer.seek(partition, end)

        async def read() -> None:
            async for record in consumer:
                arrived.update(ids([record]))

        reading = asyncio.create_task(read())
        try:
            yield arrived
        finally:
            reading.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await reading


def bodies(records: list[Any]) -> list[dict[str, Any]]:
    """The JSON of each record."""
    return [json.loads(record.value) for record in records]


def finals(records: list[Any]) -> set[str]:
    """The idempotency keys of the commands that have their result."""
    interim = ("payment.pending.v1", "payment.requires_action.v1", "payment.needs_review.v1")
    return {event["idempotency_key"] for event in bodies(records) if event["type"] not in interim}


def assert_first_deliveries_are_gap_free(records: list[Any]) -> None:
    """Per payment, events seen for the first time come in the order 1, 2, 3, … and none is missing."""
    seen: dict[str, list[int]] = {}
    ids: set[str] = set()
    for event in bodies(records):
        if event["event_id"] not in ids and not event["replayed"]:
            ids.add(event["event_id"])
            seen.setdefault(event["payment_id"], []).append(event["payment_seq"])
    for payment_id, sequence in seen.items():
        assert sequence == list(range(1, len(sequence) + 1)), payment_id
