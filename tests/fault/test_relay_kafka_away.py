"""Kafka is gone under load and comes back with its data: nothing is missing, and memory stays small meanwhile.

PAYMENTS_TEST_KAFKA_AWAY_SECONDS=60 makes the long run that the promise is measured by, which is CI's.
"""

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import psutil
import pytest

from infra.kafka.topics import ensure_topics
from infra.local import EmbeddedKafka
from infra.local.postgres import drop_database
from infra.relay import RelayConfig
from tests.fault.test_relay_kills import assert_all_arrived, load, more
from tests.fault.test_relay_network import streaming

AWAY_SECONDS = float(os.environ.get("PAYMENTS_TEST_KAFKA_AWAY_SECONDS", "3"))
MEMORY_MB_MAX = 250


@pytest.fixture(params=["wal", "poll"])
def config(request: pytest.FixtureRequest, postgres_url: str, own_kafka: EmbeddedKafka) -> Iterator[RelayConfig]:
    yield RelayConfig(
        postgres_url=postgres_url,
        kafka=own_kafka.access,
        topic="payments.events",
        slot=f"away_{uuid4().hex[:12]}",
        source=request.param,
    )
    drop_database(postgres_url)


@pytest.mark.timeout(120 + 4 * AWAY_SECONDS)
async def test_nothing_is_missing_after_kafka_was_away_under_load(
    own_kafka: EmbeddedKafka, config: RelayConfig, tmp_path: Path
) -> None:
    await ensure_topics(own_kafka.access, {config.topic: 8})
    with streaming(config, tmp_path / "relay.log") as relay:
        await relay.streams()
        async with load(config) as rows:
            await more(rows, 1_000)
            await asyncio.to_thread(own_kafka.kill)
            await asyncio.sleep(AWAY_SECONDS)
            await more(rows, config.unacknowledged_max + 1_000)
            await asyncio.to_thread(own_kafka.restart)
            await more(rows, 1_000)
        await assert_all_arrived(config, rows)
        memory_mb = psutil.Process(relay.pid).memory_info().rss / 2**20
        assert memory_mb < MEMORY_MB_MAX
        print(f"{len(rows)} events, relay of {memory_mb:.0f} MB")
