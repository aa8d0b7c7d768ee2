"""The real Debezium over our outbox, measured: how fast it works off a backlog, and left running for latencies.

Best case for Debezium: the tuned files of `deploy/debezium`, the optimizing compiler, a warm JVM, and no time counted
before its first event. `python -m benchmarks.debezium` is a short run by itself.
"""

import argparse
import asyncio
import contextlib
import sys
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal
from uuid import uuid4

import asyncpg
import httpx
import psutil
from aiokafka import AIOKafkaConsumer, TopicPartition
from rich.console import Console
from uuid_utils.compat import uuid7

from handlers.messages.events import write_event
from handlers.messages.examples import EVENT_EXAMPLES, EVENT_ID
from infra.kafka.topics import ensure_topics
from infra.local import EmbeddedKafka, EmbeddedPostgres
from infra.local.connect import EmbeddedConnect
from infra.local.postgres import create_database, drop_database
from infra.postgres.migrate import upgrade

ROOT = Path(__file__).resolve().parents[1]
OPTIMIZED = ("-Xmx1g", "-XX:+UseParallelGC")
POLL_SECONDS = 0.01
MIB = 1024 * 1024
TYPE = "payment.captured.v1"
INSERT = """
    INSERT INTO outbox (id, aggregateid, type, payload, payment_seq, occurred_at)
    SELECT id, key, $3, $4, 1, '2026-01-31T12:00:00.250000Z' FROM unnest($1::uuid[], $2::text[]) AS x(id, key)
"""

Tuning = Literal["latency", "throughput"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Migrated database, broker, existing topic and slot, and a folder for Connect."""

    postgres_url: str
    kafka_bootstrap: str
    topic: str
    slot: str
    data_dir: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Drained:
    """A backlog worked off, from its first event on the topic to its last; CPU and memory of the publisher alone."""

    rows: int
    rows_per_second: int
    cpu_us_per_row: float
    rss_mb: int


@contextlib.asynccontextmanager
async def debezium(place: Place, tuning: Tuning) -> AsyncIterator[EmbeddedConnect]:
    """Debezium that streams from the slot, for as long as the block runs; its data is gone afterwards."""
    connect = EmbeddedConnect(
        place.data_dir,
        postgres_url=place.postgres_url,
        kafka_bootstrap=place.kafka_bootstrap,
        topic=place.topic,
        slot=place.slot,
        tuning=tuning,
        jvm_options=OPTIMIZED,
    )
    await asyncio.to_thread(connect.erase)
    await asyncio.to_thread(connect.start)
    try:
        yield connect
    finally:
        await asyncio.to_thread(connect.erase)


async def drain(place: Place, rows: int, *, warm_up_rows: int = 50_000, rows_per_transaction: int = 100) -> Drained:
    """Have Debezium publish `warm_up_rows`, then `rows` that were written while it stood still; only these count."""
    async with debezium(place, "throughput") as connect, Topic(place) as topic:
        await write_backlog(place.postgres_url, warm_up_rows, rows_per_transaction)
        await topic.grows_by(warm_up_rows)
        with standing_still(connect):
            await until_slot_is_free(place)
            await write_backlog(place.postgres_url, rows, rows_per_transaction)
            topic.mark()
        return await measure(connect.pid, topic, rows)


async def measure(pid: int, topic: "Topic", rows: int) -> Drained:
    """Wait until `rows` were added to the topic since its mark by the process `pid`, and say what that took."""
    process = psutil.Process(pid)
    head = await topic.grows_by(1)
    started, before = time.perf_counter(), process.cpu_times()
    await topic.grows_by(rows)
    seconds, after = time.perf_counter() - started, process.cpu_times()
    cpu = after.user + after.system - before.user - before.system
    counted = rows - head
    return Drained(
        rows=rows,
        rows_per_second=round(counted / seconds),
        cpu_us_per_row=round(cpu / counted * 1e6, 1),
        rss_mb=round(process.memory_info().rss / MIB),
    )


class Topic:
    """How much a topic has grown; asking for its end costs next to nothing, reading it would share the machine."""

    def __init__(self, place: Place) -> None:
        self._name = place.topic
        self._consumer = AIOKafkaConsumer(bootstrap_servers=place.kafka_bootstrap)
        self._marked = 0
        self._end = 0

    async def __aenter__(self) -> "Topic":
        await self._consumer.start()
        self._end = await self._find_end()
        self.mark()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._consumer.stop()

    def mark(self) -> None:
        """Count from what has been seen so far."""
        self._marked = self._end

    async def grows_by(self, count: int, *, stall_seconds: float = 60) -> int:
        """Wait until `count` messages came since the mark; how many did.

        Raises:
            TimeoutError: nothing came for `stall_seconds`.
        """
        progress_at = time.monotonic()
        while self._end - self._marked < count:
            await asyncio.sleep(POLL_SECONDS)
            end = await self._find_end()
            if end > self._end:
                self._end, progress_at = end, time.monotonic()
            elif time.monotonic() - progress_at > stall_seconds:
                raise TimeoutError(f"{self._end - self._marked} of {count} messages, and none for {stall_seconds} s")
        return self._end - self._marked

    async def _find_end(self) -> int:
        found = await self._consumer._client.fetch_all_metadata()
        partitions = [TopicPartition(self._name, number) for number in found.partitions_for_topic(self._name)]
        return sum((await self._consumer.end_offsets(partitions)).values())


@contextlib.contextmanager
def standing_still(connect: EmbeddedConnect) -> Iterator[None]:
    """The connector gives the slot back, and its JVM stays warm; it goes on after the block."""
    httpx.put(f"{connect.connector_url}/stop", timeout=10).raise_for_status()
    yield
    httpx.put(f"{connect.connector_url}/resume", timeout=10).raise_for_status()


async def until_slot_is_free(place: Place) -> None:
    """Wait until nobody streams from the slot."""
    connection = await asyncpg.connect(place.postgres_url)
    is_active = "SELECT active FROM pg_replication_slots WHERE slot_name = $1"
    try:
        while await connection.fetchval(is_active, place.slot):  # noqa: ASYNC110 - it is another process's state
            await asyncio.sleep(POLL_SECONDS)
    finally:
        await connection.close()


async def write_backlog(postgres_url: str, rows: int, rows_per_transaction: int) -> None:
    """Commit events of as many payments, in transactions of that many rows."""
    payload = write_event(EVENT_EXAMPLES[TYPE], EVENT_ID)
    connection = await asyncpg.connect(postgres_url)
    try:
        await connection.execute("SET synchronous_commit = off")
        for start in range(0, rows, rows_per_transaction):
            count = min(rows_per_transaction, rows - start)
            keys = [str(uuid4()) for _ in range(count)]
            await connection.execute(INSERT, [uuid7() for _ in keys], keys, TYPE, payload)
    finally:
        await connection.close()


async def make_slot(postgres_url: str, slot: str) -> None:
    """A slot from here on."""
    connection = await asyncpg.connect(postgres_url)
    try:
        await connection.execute("SELECT pg_create_logical_replication_slot($1, 'pgoutput')", slot)
    finally:
        await connection.close()


def main() -> int:
    """Drain one backlog, on servers of its own."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.debezium", description=__doc__)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--rows-per-transaction", type=int, default=100)
    arguments = parser.parse_args()
    data_dir, run = ROOT / ".local" / "bench", uuid4().hex[:8]
    with EmbeddedKafka(data_dir) as kafka, EmbeddedPostgres(data_dir) as postgres:
        url = create_database(postgres.url, f"bench_{run}")
        place = Place(
            postgres_url=url,
            kafka_bootstrap=kafka.bootstrap,
            topic=f"bench.{run}.debezium",
            slot=f"bench_{run}",
            data_dir=data_dir,
        )
        try:
            upgrade(url)
            drained = asyncio.run(_drain(place, arguments.rows, arguments.rows_per_transaction))
        finally:
            drop_database(url)
    Console().print(asdict(drained))
    return 0


async def _drain(place: Place, rows: int, rows_per_transaction: int) -> Drained:
    await ensure_topics(place.kafka_bootstrap, {place.topic: 8})
    await make_slot(place.postgres_url, place.slot)
    return await drain(place, rows, rows_per_transaction=rows_per_transaction)


if __name__ == "__main__":
    sys.exit(main())
