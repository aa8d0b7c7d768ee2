"""The load generator: charge commands made beforehand, and a reader that counts or times their results."""

import asyncio
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from aiokafka.partitioner import murmur2
from confluent_kafka import Consumer, Producer, TopicPartition

CHUNK = 500
KEY_MARK = b'"idempotency_key":"'
CAPTURED = b'"type":"payment.captured.v1"'
ACTION = b'"type":"payment.requires_action.v1"'


@dataclass(frozen=True, slots=True)
class Message:
    """One command, ready to send."""

    partition: int
    key: bytes
    value: bytes
    idempotency_key: bytes


def make_charges(count: int, partitions: int, *, gateway: str, currency: str = "USD") -> list[Message]:
    """`count` charges of as many payments, realistic in size, each in the partition of its key."""
    return [_charge(number, partitions, gateway, currency) for number in range(count)]


def _charge(number: int, partitions: int, gateway: str, currency: str) -> Message:
    payment_id = str(uuid4())
    body = {
        "type": "payment.charge.v1",
        "idempotency_key": f"order-{payment_id}-charge",
        "payment_id": payment_id,
        "order_id": f"order-{payment_id}",
        "customer_id": f"customer-{number % 10_000}",
        "amount_minor": 10_000 + number % 90_000,
        "currency": currency,
        "payment_method": "pm_card_visa",
        "gateway": gateway,
        "metadata": {"channel": "web"},
    }
    key = payment_id.encode()
    partition = (murmur2(key) & 0x7FFFFFFF) % partitions
    return Message(partition, key, json.dumps(body).encode(), body["idempotency_key"].encode())  # type: ignore[attr-defined]


class Load:
    """Sends commands and reads results; results from before `start` are not seen.

    Uses librdkafka, which does its work outside Python: the generator shares the machine with the service it measures.
    """

    def __init__(self, bootstrap: str, commands_topic: str, events_topic: str) -> None:
        self._commands = commands_topic
        self._events = events_topic
        servers = {"bootstrap.servers": bootstrap}
        self._producer = Producer(servers | {"acks": 1, "linger.ms": 2, "queue.buffering.max.messages": 1_000_000})
        self._consumer = Consumer(
            servers | {"group.id": "benchmark", "enable.auto.commit": False, "fetch.wait.max.ms": 100}
        )

    async def start(self) -> None:
        """Connect, and start reading at the end of the results topic."""
        await asyncio.to_thread(self._start)

    def _start(self) -> None:
        found = self._consumer.list_topics(self._events, timeout=10).topics[self._events].partitions
        partitions = [TopicPartition(self._events, number) for number in found]
        for each in partitions:
            _, each.offset = self._consumer.get_watermark_offsets(each, timeout=10)
        self._consumer.assign(partitions)

    async def stop(self) -> None:
        await asyncio.to_thread(self._producer.flush)
        await asyncio.to_thread(self._consumer.close)

    async def send_all(self, messages: list[Message]) -> None:
        """Send as fast as the broker takes it."""
        for chunk in _chunks(messages, CHUNK):
            for message in chunk:
                self._send(message)
            self._producer.poll(0)
            await asyncio.sleep(0)
        await asyncio.to_thread(self._producer.flush)

    def _send(self, message: Message) -> None:
        self._producer.produce(self._commands, message.value, message.key, message.partition)

    async def count_results(self, expected: int, *, stall_seconds: float = 60) -> float:
        """Read until `expected` results came; the time of the last one (`perf_counter`).

        Raises:
            TimeoutError: no further result for `stall_seconds`.
        """
        return await asyncio.to_thread(lambda: [now for now, _ in self._results(expected, stall_seconds)][-1])

    async def count_captures(self, expected: int, *, on_action: Callable[[bytes], None]) -> float:
        """Read until `expected` payments are captured; the time of the last one, as in `count_results`.

        `on_action` gets each event on which a payer must act. It is called in another thread.
        """
        return await asyncio.to_thread(self._count_captures, expected, on_action)

    def _count_captures(self, expected: int, on_action: Callable[[bytes], None]) -> float:
        captured = 0
        for now, batch in self._results(2**62, 60):
            for message in batch:
                value = message.value()
                if CAPTURED in value:
                    captured += 1
                else:
                    assert ACTION in value, value
                    on_action(value)
            if captured >= expected:
                return now
        raise AssertionError("there is no end to the results")

    async def time_results(self, messages: list[Message], rate: int) -> list[float]:
        """Send at a steady `rate` per second; the seconds from each command to its result, in order of arrival."""
        sent: dict[bytes, float] = {}
        reader = asyncio.create_task(asyncio.to_thread(self._time, sent, len(messages)))
        started = time.perf_counter()
        for number, message in enumerate(messages):
            ahead = started + number / rate - time.perf_counter()
            if ahead > 0:
                await asyncio.sleep(ahead)
            sent[message.idempotency_key] = time.perf_counter()
            self._send(message)
        return await reader

    def _time(self, sent: dict[bytes, float], expected: int) -> list[float]:
        return [now - sent[_key_of(each.value())] for now, batch in self._results(expected, 60) for each in batch]

    def _results(self, expected: int, stall_seconds: float) -> Iterator[tuple[float, list[Any]]]:
        seen = 0
        while seen < expected:
            # `consume` waits until it has as many messages as asked for. So wait for one, then take the rest as it is.
            batch = self._consumer.consume(1, stall_seconds)
            if not batch:
                raise TimeoutError(f"{seen} of {expected} results, and none for {stall_seconds} s")
            batch += self._consumer.consume(CHUNK, 0)
            yield time.perf_counter(), batch
            seen += len(batch)


def _key_of(value: bytes) -> bytes:
    start = value.index(KEY_MARK) + len(KEY_MARK)
    return value[start : value.index(b'"', start)]


def _chunks(messages: list[Message], size: int) -> Iterator[list[Message]]:
    return iter([messages[start : start + size] for start in range(0, len(messages), size)])


def percentile(values: list[float], share: float) -> float:
    """The value below which `share` (0 to 1) of `values` lie."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
