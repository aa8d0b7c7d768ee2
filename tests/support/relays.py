"""Relays in a test's own process, on its topic and slot, and the faults that tests cause."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from typing import Any

import psutil
import psycopg
import pytest
from aiokafka import TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.cluster import ClusterMetadata
from aiokafka.producer.message_accumulator import MessageAccumulator

from infra.kafka.topics import ensure_topics, has_topic
from infra.relay import Relay, RelayConfig
from infra.relay.progress.checkpoint import Repair
from infra.relay.progress.repairs import count_unproven, find_repair, request_repair
from infra.relay.status import read_status
from tests.support.outbox import Row, complete, fetch_value, rows_of
from tests.support.topic import read_until
from tests.support.waiting import until

wal_only = pytest.mark.parametrize("source", ["wal"], indirect=True)
DROP = "SELECT pg_drop_replication_slot(%s)"
CREATE = "SELECT pg_create_logical_replication_slot(%s, 'pgoutput')"
ADVANCE = "SELECT pg_replication_slot_advance(%s, pg_current_wal_lsn())"
HUGE = f'"{"x" * 2_000_000}"'


@contextlib.asynccontextmanager
async def running(config: RelayConfig, until_it_says: str = "active") -> AsyncIterator[Relay]:
    """A relay whose health detail contains `until_it_says`; stopped cleanly at the end."""
    relay, stop = Relay(config), asyncio.Event()
    task = asyncio.create_task(relay.run(stop))
    try:
        await until(lambda: task.done() or until_it_says in relay.health.detail)
        yield relay
    finally:
        stop.set()
        await asyncio.wait_for(task, 30)


async def published(config: RelayConfig, *rows: Row) -> list[Any]:
    """The topic's records, read once these rows have arrived."""
    return await read_until(config.kafka.bootstrap, config.topic, complete(rows))


async def slot(config: RelayConfig, column: str) -> Any:
    return await fetch_value(
        config.postgres_url, f"SELECT {column} FROM pg_replication_slots WHERE slot_name = %s", config.slot
    )


@contextlib.contextmanager
def frozen(pid: int) -> Iterator[None]:
    """Suspend the process during the block."""
    process = psutil.Process(pid)
    process.suspend()
    try:
        yield
    finally:
        process.resume()


@contextlib.contextmanager
def without_leader(topic: str, partition: int) -> Iterator[None]:
    """During the block, producers find no leader for this partition when they send."""
    drain, asked = MessageAccumulator.drain_by_nodes, ClusterMetadata.leader_for_partition

    def answer(cluster: ClusterMetadata, of: TopicPartition) -> int | None:
        return -1 if of == (topic, partition) else asked(cluster, of)

    def drain_without(accumulator: MessageAccumulator, *arguments: Any, **options: Any) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ClusterMetadata, "leader_for_partition", answer)
            return drain(accumulator, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MessageAccumulator, "drain_by_nodes", drain_without)
        yield


async def set_topic_limit(config: RelayConfig, limit: int) -> None:
    admin = AIOKafkaAdminClient(bootstrap_servers=config.kafka.bootstrap)
    await admin.start()
    resource = ConfigResource(ConfigResourceType.TOPIC, config.topic, {"max.message.bytes": str(limit)})
    await admin.alter_configs([resource])
    await admin.close()


async def make_topic_anew(config: RelayConfig, partitions: int) -> None:
    """Delete the events' topic, and create it again under its name."""
    admin = AIOKafkaAdminClient(bootstrap_servers=config.kafka.bootstrap)
    await admin.start()
    await admin.delete_topics([config.topic])
    await until(lambda: _has_no_topic(config))
    await ensure_topics(config.kafka, {config.topic: partitions})
    await admin.close()


async def _has_no_topic(config: RelayConfig) -> bool:
    return not await has_topic(config.kafka, config.topic)


class StandingStill:
    """A relay that is expected to stop at a gap and wait for a decision."""

    def __init__(self, config: RelayConfig) -> None:
        self.config = replace(config, gap_seconds=0.1)
        self.relay = Relay(self.config)
        self._stop = asyncio.Event()

    async def __aenter__(self) -> "StandingStill":
        self._task = asyncio.create_task(self.relay.run(self._stop))
        await until(lambda: self._task.done() or self.relay.health.detail.startswith("gap"))
        return self

    async def __aexit__(self, *exception: object) -> None:
        self._stop.set()
        await asyncio.wait_for(self._task, 30)

    async def decide(self, repair: Repair) -> int:
        """Request a repair as `payments relay repair` does; returns how many events it published."""
        async with await psycopg.AsyncConnection.connect(self.config.postgres_url, autocommit=True) as connection:
            assert await request_repair(connection, self.config.slot, repair)
            await until(lambda: self.relay.health.detail == "active")
            return (await find_repair(connection, self.config.slot))[2]

    async def unproven(self) -> int:
        async with await psycopg.AsyncConnection.connect(self.config.postgres_url, autocommit=True) as connection:
            return (await count_unproven(connection, self.config.slot))[0]


async def is_all_proven(config: RelayConfig) -> bool:
    return (await StandingStill(config).unproven(), (await read_status(config.postgres_url)).relays[0].lag_seconds) == (
        0,
        0,
    )


def poisoned_payment() -> list[Row]:
    """Three events; the second is too large for the topic."""
    rows = rows_of("pay_0001", 3)
    rows[1] = rows[1]._replace(payload=HUGE)
    return rows
