"""The load generator: charge commands made beforehand, and a reader that counts or times their results."""

import asyncio
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from uuid import uuid4

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.partitioner import murmur2

CHUNK = 500
KEY_MARK = b'"idempotency_key":"'


@dataclass(frozen=True, slots=True)
class Message:
    """One command, ready to send."""

    partition: int
    key: bytes
    value: bytes
    idempotency_key: bytes


def make_charges(count: int, partitions: int, *, gateway: str) -> list[Message]:
    """`count` charges of as many payments, realistic in size, each in the partition of its key."""
    return [_charge(number, partitions, gateway) for number in range(count)]


def _charge(number: int, partitions: int, gateway: str) -> Message:
    payment_id = str(uuid4())
    body = {
        "type": "payment.charge.v1",
        "idempotency_key": f"order-{payment_id}-charge",
        "payment_id": payment_id,
        "order_id": f"order-{payment_id}",
        "customer_id": f"customer-{number % 10_000}",
        "amount_minor": 1000 + number % 9000,
        "currency": "USD",
        "payment_method": "pm_card_visa",
        "gateway": gateway,
        "metadata": {"channel": "web"},
    }
    key = payment_id.encode()
    partition = (murmur2(key) & 0x7FFFFFFF) % partitions
    return Message(partition, key, json.dumps(body).encode(), body["idempotency_key"].encode())  # type: ignore[attr-defined]


class Load:
    """Sends commands and reads results; results from before `start` are not seen."""

    def __init__(self, bootstrap: str, commands_topic: str, events_topic: str) -> None:
        self._commands = commands_topic
        self._events = events_topic
        self._producer = AIOKafkaProducer(bootstrap_servers=bootstrap, acks=1, linger_ms=2, max_batch_size=131_072)
        self._consumer = AIOKafkaConsumer(
            bootstrap_servers=bootstrap,
            enable_auto_commit=False,
            fetch_max_wait_ms=100,
            max_partition_fetch_bytes=4 << 20,
        )

    async def start(self) -> None:
        """Connect, and stand at the end of the results."""
        await self._producer.start()
        await self._consumer.start()
        found = await self._consumer._client.fetch_all_metadata()
        partitions = [TopicPartition(self._events, each) for each in found.partitions_for_topic(self._events)]
        self._consumer.assign(partitions)
        await self._consumer.seek_to_end(*partitions)
        for partition in partitions:
            await self._consumer.position(partition)

    async def stop(self) -> None:
        await self._producer.stop()
        await self._consumer.stop()

    async def send_all(self, messages: list[Message]) -> None:
        """Send as fast as the broker takes it, in large batches of one partition each."""
        by_partition: dict[int, list[Message]] = {}
        for message in messages:
            by_partition.setdefault(message.partition, []).append(message)
        streams = [_chunks(each, CHUNK) for each in by_partition.values()]
        while streams:
            for stream in list(streams):
                chunk = next(stream, None)
                if chunk is None:
                    streams.remove(stream)
                else:
                    await self._send_chunk(chunk)
        await self._producer.flush()

    async def _send_chunk(self, chunk: list[Message]) -> None:
        batch = self._producer.create_batch()
        for message in chunk:
            if batch.append(key=message.key, value=message.value, timestamp=None) is None:
                await self._producer.send_batch(batch, self._commands, partition=message.partition)
                batch = self._producer.create_batch()
                batch.append(key=message.key, value=message.value, timestamp=None)
        await self._producer.send_batch(batch, self._commands, partition=chunk[0].partition)

    async def count_results(self, expected: int, *, stall_seconds: float = 60) -> float:
        """Read until `expected` results came; the time of the last one (`perf_counter`).

        Raises:
            TimeoutError: no further result for `stall_seconds`.
        """
        seen = 0
        while seen < expected:
            async with asyncio.timeout(stall_seconds):
                got = 0
                while not got:
                    got = sum(map(len, (await self._consumer.getmany(timeout_ms=100)).values()))
            seen += got
        return time.perf_counter()

    async def time_results(self, messages: list[Message], rate: int) -> list[float]:
        """Send at a steady `rate` per second; the seconds from each command to its result, in order of arrival."""
        sent: dict[bytes, float] = {}
        reader = asyncio.create_task(self._time(sent, len(messages)))
        started = time.perf_counter()
        for number, message in enumerate(messages):
            ahead = started + number / rate - time.perf_counter()
            if ahead > 0:
                await asyncio.sleep(ahead)
            sent[message.idempotency_key] = time.perf_counter()
            await self._producer.send(self._commands, message.value, key=message.key, partition=message.partition)
        return await reader

    async def _time(self, sent: dict[bytes, float], expected: int) -> list[float]:
        taken: list[float] = []
        while len(taken) < expected:
            async with asyncio.timeout(60):
                records = await self._consumer.getmany(timeout_ms=100)
            now = time.perf_counter()
            for batch in records.values():
                taken += [now - sent[_key_of(record.value)] for record in batch]
        return taken


def _key_of(value: bytes) -> bytes:
    start = value.index(KEY_MARK) + len(KEY_MARK)
    return value[start : value.index(b'"', start)]


def _chunks(messages: list[Message], size: int) -> Iterator[list[Message]]:
    return iter([messages[start : start + size] for start in range(0, len(messages), size)])


def percentile(values: list[float], share: float) -> float:
    """The value below which `share` (0 to 1) of `values` lie."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
