"""The network between the relay and Postgres or Kafka repeatedly breaks in mid-message, or stalls for a while.

No event is skipped, first deliveries stay in order, and the relay recovers without help.
"""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit
from uuid import uuid4

import pytest
import uvloop

from infra.kafka.access import KafkaAccess
from infra.kafka.topics import ensure_topics
from infra.local.postgres import drop_database
from infra.relay import RelayConfig
from infra.relay.errors import PostgresAway
from infra.relay.wal.stream import ReplicationStream
from tests.conftest import Topics
from tests.fault.test_relay_kills import assert_all_arrived, load, more
from tests.support.proxy import ProxiedKafka, Proxy
from tests.support.relay_process import RelayProcess
from tests.support.relay_source import also_plain, reading
from tests.support.waiting import until

CUTS = 8
STALL_SECONDS = 5


@pytest.fixture(params=["wal", "poll"])
def source(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture
def config(postgres_url: str, kafka_bootstrap: str, topics: Topics, source: Any) -> Iterator[RelayConfig]:
    yield RelayConfig(
        postgres_url=postgres_url,
        kafka=KafkaAccess(kafka_bootstrap),
        topic=topics.events,
        slot=f"network_{uuid4().hex[:12]}",
        **reading(source),
    )
    drop_database(postgres_url)


@contextlib.asynccontextmanager
async def behind_a_proxy(config: RelayConfig, log_path: Path) -> AsyncIterator[Proxy]:
    """A relay that reaches Postgres only through the proxy."""
    parts = urlsplit(config.postgres_url)
    async with Proxy(parts.hostname or "127.0.0.1", parts.port or 5432) as proxy:
        user = parts.netloc.rpartition("@")[0]
        through = parts._replace(netloc=f"{user}@127.0.0.1:{proxy.port}")
        with streaming(replace(config, postgres_url=urlunsplit(through)), log_path) as relay:
            await relay.streams()
            yield proxy


@contextlib.contextmanager
def streaming(config: RelayConfig, log_path: Path) -> Iterator[RelayProcess]:
    relay = RelayProcess(config, log_path)
    try:
        yield relay
    finally:
        relay.kill()


async def cut_again_and_again(proxy: Proxy, config: RelayConfig) -> None:
    """Cut the connections under load; afterwards every event must arrive."""
    places = random.Random(20260103)
    async with load(config) as rows:
        for number in range(CUTS):
            await more(rows, 300)
            proxy.cut_after(places.randint(1, 20_000))
            await until(lambda wanted=number + 1: proxy.cuts >= wanted)
        await more(rows, 300)
    await assert_all_arrived(config, rows)


async def stall_for_a_while(proxy: Proxy, config: RelayConfig) -> None:
    """Stall the connections under load; afterwards every event must arrive."""
    async with load(config) as rows:
        await more(rows, 300)
        proxy.stall()
        await asyncio.sleep(STALL_SECONDS)
        proxy.resume()
        await more(rows, 300)
    await assert_all_arrived(config, rows)


@also_plain
async def test_connections_to_postgres_cut_in_mid_message_under_load_skip_nothing(
    config: RelayConfig, tmp_path: Path
) -> None:
    async with behind_a_proxy(config, tmp_path / "relay.log") as proxy:
        await cut_again_and_again(proxy, config)


async def test_a_network_that_swallows_everything_for_a_while_skips_nothing(
    config: RelayConfig, tmp_path: Path
) -> None:
    async with behind_a_proxy(config, tmp_path / "relay.log") as proxy:
        await stall_for_a_while(proxy, config)


@pytest.mark.parametrize("fault", [cut_again_and_again, stall_for_a_while])
async def test_the_same_between_relay_and_kafka_skips_nothing(
    postgres_url: str,
    tmp_data_dir: Path,
    tmp_path: Path,
    source: Any,
    fault: Callable[[Proxy, RelayConfig], Awaitable[None]],
) -> None:
    kafka = ProxiedKafka(tmp_data_dir)
    async with Proxy() as proxy:
        proxy.target = (proxy.target[0], kafka.set_door(proxy.port))
        await asyncio.to_thread(kafka.start)
        try:
            await ensure_topics(kafka.access, {"events": 8})
            slot = f"network_{uuid4().hex[:12]}"
            config = RelayConfig(
                postgres_url=postgres_url, kafka=kafka.access, topic="events", slot=slot, source=source
            )
            through = replace(config, kafka=KafkaAccess(f"{proxy.target[0]}:{proxy.port}"))
            with streaming(through, tmp_path / "relay.log") as relay:
                await relay.streams()
                await fault(proxy, config)
        finally:
            await asyncio.to_thread(kafka.erase)
    drop_database(postgres_url)


def test_the_socket_that_takes_the_place_of_a_lost_stream_is_left_alone(postgres_url: str) -> None:
    """libpq closes a lost socket; the next one opened, to Kafka or for a health check, gets the same descriptor."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:  # As in a relay's process.
        runner.run(lose_a_stream(postgres_url))


async def read_to_the_end(stream: ReplicationStream, arrived: asyncio.Event) -> None:
    while True:
        async with asyncio.timeout(5):
            await arrived.wait()
        stream.receive()


async def lose_a_stream(postgres_url: str) -> None:
    slot, server, writers = f"lost_{uuid4().hex[:12]}", urlsplit(postgres_url), list[asyncio.StreamWriter]()
    async with Proxy(server.hostname or "", server.port or 0) as proxy:
        stream = await ReplicationStream.connect(f"postgresql://postgres@127.0.0.1:{proxy.port}{server.path}")
        await stream.create_slot(slot)
        await stream.start(slot, "payments_outbox", 0)
        number, arrived = stream._pgconn.socket, asyncio.Event()
        stream.watch(arrived.set)
        proxy.resume()  # Breaks the connections that exist.
        with pytest.raises(PostgresAway):
            await read_to_the_end(stream, arrived)
        try:
            while number not in [each.get_extra_info("socket").fileno() for each in writers]:
                assert len(writers) < 20
                async with asyncio.timeout(5):
                    writers.append((await asyncio.open_connection(server.hostname, server.port))[1])
            await stream.close()
        finally:
            for each in writers:
                each.close()
                await each.wait_closed()
    drop_database(postgres_url)
