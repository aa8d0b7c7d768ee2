"""The network between relay and Postgres breaks in mid-message, again and again, or swallows everything: nothing is
skipped, first deliveries stay in order, and nobody has to help."""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit
from uuid import uuid4

import pytest

from infra.local.postgres import drop_database
from infra.relay import RelayConfig
from tests.conftest import Topics
from tests.fault.test_relay_kills import assert_all_arrived, load, more
from tests.support.outbox import until
from tests.support.proxy import Proxy
from tests.support.relay_process import RelayProcess

CUTS = 8
STALL_SECONDS = 5


@pytest.fixture(params=["wal", "poll"])
def config(
    request: pytest.FixtureRequest, postgres_url: str, kafka_bootstrap: str, topics: Topics
) -> Iterator[RelayConfig]:
    yield RelayConfig(
        postgres_url=postgres_url,
        kafka_bootstrap=kafka_bootstrap,
        topic=topics.events,
        slot=f"network_{uuid4().hex[:12]}",
        source=request.param,
    )
    drop_database(postgres_url)


@contextlib.asynccontextmanager
async def behind_a_proxy(config: RelayConfig, log_path: Path) -> AsyncIterator[tuple[Proxy, RelayProcess]]:
    """A relay that reaches Postgres through the proxy alone."""
    parts = urlsplit(config.postgres_url)
    async with Proxy(parts.hostname or "127.0.0.1", parts.port or 5432) as proxy:
        user = parts.netloc.rpartition("@")[0]
        through = parts._replace(netloc=f"{user}@127.0.0.1:{proxy.port}")
        relay = RelayProcess(replace(config, postgres_url=urlunsplit(through)), log_path)
        try:
            await relay.streams()
            yield proxy, relay
        finally:
            relay.kill()


async def test_connections_cut_in_mid_message_under_load_skip_nothing(config: RelayConfig, tmp_path: Path) -> None:
    places = random.Random(20260103)
    async with behind_a_proxy(config, tmp_path / "relay.log") as (proxy, _):
        async with load(config) as rows:
            for number in range(CUTS):
                await more(rows, 300)
                proxy.cut_after(places.randint(1, 20_000))
                await until(lambda wanted=number + 1: proxy.cuts >= wanted)
            await more(rows, 300)
        await assert_all_arrived(config, rows)


async def test_a_network_that_swallows_everything_for_a_while_skips_nothing(
    config: RelayConfig, tmp_path: Path
) -> None:
    async with behind_a_proxy(config, tmp_path / "relay.log") as (proxy, _):
        async with load(config) as rows:
            await more(rows, 300)
            proxy.stall()
            await asyncio.sleep(STALL_SECONDS)
            proxy.resume()
            await more(rows, 300)
        await assert_all_arrived(config, rows)
