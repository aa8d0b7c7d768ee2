"""Kafka is killed under load and comes back with its data: no event is missing, and memory stays small meanwhile.

CI runs it with PAYMENTS_TEST_KAFKA_AWAY_SECONDS=60, the length for which we promise it.
"""

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from infra.kafka.topics import ensure_topics
from infra.local import EmbeddedKafka
from infra.local.postgres import drop_database
from infra.relay import RelayConfig
from tests.fault.test_relay_kills import MEMORY_MB_MAX, assert_all_arrived, load, more
from tests.fault.test_relay_network import streaming
from tests.support.outbox import Row, commit, rows_of

AWAY_SECONDS = float(os.environ.get("PAYMENTS_TEST_KAFKA_AWAY_SECONDS", "3"))
LARGE = f'"{"x" * 20_000}"'
"""So large that a limit on the number of events alone would not keep the memory small."""


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


async def write_large(config: RelayConfig) -> list[Row]:
    """400 MB of events, many times what a relay may hold; they take little disk, as Postgres compresses them."""
    rows = [row for number in range(100) for row in rows_of(f"pay_large_{number}", 200, payload=LARGE)]
    assert len(rows) * len(LARGE) > 5 * config.unacknowledged_bytes_max
    await commit(config.postgres_url, *(rows[at : at + 100] for at in range(0, len(rows), 100)))
    return rows


@pytest.mark.timeout(120 + 4 * AWAY_SECONDS)
async def test_nothing_is_missing_after_kafka_was_away_under_load(
    own_kafka: EmbeddedKafka, config: RelayConfig, tmp_path: Path
) -> None:
    await ensure_topics(own_kafka.access, {config.topic: 8})
    with streaming(config, tmp_path / "relay.log") as relay:
        await relay.streams()
        async with relay.peak_memory() as peak:
            async with load(config) as rows:
                await more(rows, 1_000)
                await asyncio.to_thread(own_kafka.kill)
                # Without delay: once Kafka has been silent for long, the relay ends its session and reads nothing.
                large = await write_large(config)
                await asyncio.sleep(AWAY_SECONDS)
                peak_away_mb = peak.mb
                await asyncio.to_thread(own_kafka.restart)
                await more(rows, 1_000)
            await assert_all_arrived(config, [*rows, *large])
        print(f"{len(rows) + len(large)} events, relay of {peak_away_mb:.0f} MB while away, {peak.mb:.0f} MB in all")
        assert peak.mb < MEMORY_MB_MAX
