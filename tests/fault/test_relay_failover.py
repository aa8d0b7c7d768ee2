"""Postgres fails over to a standby under load: the relay continues by itself.

Commits that the dead primary had not yet sent to the standby are lost, so their events must not be on the topic.
A relay on `wal` waits for the standby, which has a copy of its slot. For a relay on `poll`, every commit waits for the
standby (`synchronous_standby_names`).
"""

import asyncio
import contextlib
import random
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple
from uuid import uuid4

import psycopg
import pytest
from psycopg import sql

from infra.kafka.access import KafkaAccess
from infra.local import EmbeddedPostgres
from infra.local.server import HOST
from infra.relay import Relay, RelayConfig
from tests.conftest import Topics
from tests.fault.test_relay_faults import (
    Subscriber,
    assert_first_deliveries_are_in_order,
    confirmations,
    header,
    running,
    slot_position,
    subscriber,
)
from tests.support.outbox import fetch_value, write_next
from tests.support.relay_source import reading
from tests.support.standby import PHYSICAL_SLOT, Standby
from tests.support.waiting import until

__all__ = ["subscriber"]

PAYMENTS = 20
WRITERS = 4


@pytest.fixture
def primary(own_postgres: EmbeddedPostgres) -> EmbeddedPostgres:
    """The primary, with a table `seqs` that counts each payment's events in a row that writers lock."""
    with psycopg.connect(own_postgres.url) as connection:
        connection.execute("CREATE TABLE seqs (id int PRIMARY KEY, seq int NOT NULL DEFAULT 0)")
        connection.execute("INSERT INTO seqs SELECT generate_series(1, %s)", [PAYMENTS])
    return own_postgres


@pytest.fixture
def standby(primary: EmbeddedPostgres, tmp_data_dir: Path) -> Iterator[Standby]:
    """A standby that follows the primary; the primary's fail-over slots wait for it."""
    server = Standby(tmp_data_dir / "standby", primary)
    try:
        server.start()
        change_setting(primary, "synchronized_standby_slots", PHYSICAL_SLOT)
        yield server
    finally:
        server.erase()


def change_setting(server: EmbeddedPostgres, name: str, value: str) -> None:
    statement = sql.SQL("ALTER SYSTEM SET {} = {}").format(sql.Identifier(name), value)
    with psycopg.connect(server.url, autocommit=True) as connection:
        connection.execute(statement)
        connection.execute("SELECT pg_reload_conf()")


@pytest.fixture
def config(primary: EmbeddedPostgres, standby: Standby, kafka_bootstrap: str, topics: Topics) -> RelayConfig:
    """A relay whose URL names both servers and connects to the one that takes writes."""
    servers = f"host={HOST},{HOST}&port={primary.port},{standby.port}"
    return RelayConfig(
        postgres_url=f"postgresql://postgres@/payments?{servers}&target_session_attrs=read-write",
        kafka=KafkaAccess(kafka_bootstrap),
        topic=topics.events,
        slot=f"relay_{uuid4().hex[:12]}",
        feedback_seconds=0.1,
        retry_seconds_max=0.5,
    )


@pytest.fixture
def polling(config: RelayConfig, primary: EmbeddedPostgres) -> RelayConfig:
    """The same with `poll`, where every commit waits for the standby."""
    change_setting(primary, "synchronous_standby_names", PHYSICAL_SLOT)
    return replace(config, **reading("poll"))


class Committed(NamedTuple):
    """An event, and a WAL position after its commit."""

    id: str
    behind: int


@contextlib.asynccontextmanager
async def writers(url: str) -> AsyncIterator[list[Committed]]:
    """Several writers, until the block ends or the server dies; yields the events that they have committed."""
    committed: list[Committed] = []
    writing = [asyncio.create_task(write(url, random.Random(seed), committed)) for seed in range(WRITERS)]
    try:
        yield committed
    finally:
        for each in writing:
            each.cancel()
        ends = await asyncio.gather(*writing, return_exceptions=True)
        assert all(isinstance(end, (asyncio.CancelledError, psycopg.OperationalError)) for end in ends), ends


async def write(url: str, choose: random.Random, committed: list[Committed]) -> None:
    async with await psycopg.AsyncConnection.connect(url) as connection:
        while True:
            rows = await write_next(connection, choose, 5, of=PAYMENTS)
            cursor = await connection.execute("SELECT (pg_current_wal_insert_lsn() - '0/0'::pg_lsn)::bigint")
            behind = (await cursor.fetchall())[0][0]
            await connection.rollback()
            committed += [Committed(str(row.id), behind) for row in rows]
            await asyncio.sleep(0.005)


async def more(committed: list[Committed], count: int = 500) -> None:
    wanted = len(committed) + count
    await until(lambda: len(committed) >= wanted)


async def slot_is_copied(primary: EmbeddedPostgres, standby: Standby, slot: str) -> None:
    """Wait until the standby's copy of the slot is persistent and would survive a promotion."""
    query = "SELECT synced AND NOT temporary FROM pg_replication_slots WHERE slot_name = %s"

    async def is_copied() -> bool:
        # The slot cannot be copied before such a record; Postgres itself writes one only every 15 s.
        await fetch_value(primary.url, "SELECT pg_log_standby_snapshot()")
        return bool(await fetch_value(standby.url, query, slot))

    await until(is_copied)


async def outbox(url: str) -> set[str]:
    async with await psycopg.AsyncConnection.connect(url) as connection:
        return {str(row[0]) for row in await (await connection.execute("SELECT id FROM outbox")).fetchall()}


async def follows(primary: EmbeddedPostgres, standby: Standby, slot: str, committed: list[Committed]) -> None:
    """Wait until the standby keeps up with the load, and its copy of the slot keeps up with the relay."""
    await slot_is_copied(primary, standby, slot)
    await more(committed)
    behind = committed[-1].behind
    await until(lambda: slot_position(standby.url, slot) > behind)


async def promote(standby: Standby, relay: Relay) -> None:
    """Promote the standby once the relay has noticed that its primary is gone."""
    await until(lambda: not relay.health.ready)
    await asyncio.to_thread(standby.promote)


async def goes_on(relay: Relay, standby: Standby, subscriber: Subscriber) -> None:
    """The events published before and after are exactly those in this server's outbox, in order per payment."""
    await until(lambda: relay.health.detail.startswith(("active", "gap")))
    assert relay.health == (True, "active")
    async with writers(standby.url) as later:
        await more(later)
    await subscriber.read_all_of(standby.url)
    assert {header(record, "id") for record in subscriber.records} == await outbox(standby.url)
    assert_first_deliveries_are_in_order(subscriber.records)


def repeated(subscriber: Subscriber) -> set[str]:
    counts = Counter(header(record, "id") for record in subscriber.records)
    return {event for event, count in counts.items() if count > 1}


async def test_a_relay_goes_on_at_a_standby_that_is_promoted_under_load(
    primary: EmbeddedPostgres, standby: Standby, config: RelayConfig, subscriber: Subscriber
) -> None:
    async with running(config) as relay:
        async with writers(primary.url) as committed:
            await follows(primary, standby, config.slot, committed)
            await asyncio.to_thread(primary.kill)
        await promote(standby, relay)
        confirmed = slot_position(standby.url, config.slot)
        await goes_on(relay, standby, subscriber)
    assert not repeated(subscriber) & {event.id for event in committed if event.behind <= confirmed}


async def test_nothing_was_published_that_a_standby_which_had_fallen_behind_does_not_know(
    primary: EmbeddedPostgres, standby: Standby, config: RelayConfig, subscriber: Subscriber
) -> None:
    """The relay waits for the standby, writers do not.

    The relay's last checkpoint has not reached the standby, but the standby's copy of the slot is up to date.
    """
    async with running(config) as relay:
        async with writers(primary.url) as committed:
            await follows(primary, standby, config.slot, committed)
            receiver = standby.wal_receiver
            receiver.suspend()
            await more(committed)
            await confirmations(primary.url, config.slot, count=10)  # Meanwhile the slot's copy catches up.
            assert relay.health.ready
            await asyncio.to_thread(primary.kill)
        receiver.terminate()  # It never reads what has arrived meanwhile.
        receiver.resume()
        await promote(standby, relay)
        assert {event.id for event in committed} - await outbox(standby.url), "it had fallen behind"
        await goes_on(relay, standby, subscriber)


async def test_a_poll_goes_on_at_a_synchronous_standby_that_is_promoted_under_load(
    primary: EmbeddedPostgres, standby: Standby, polling: RelayConfig, subscriber: Subscriber
) -> None:
    async with running(polling) as relay:
        async with writers(primary.url) as committed:
            await more(committed)
            await asyncio.to_thread(primary.kill)
        await promote(standby, relay)
        assert {event.id for event in committed} <= await outbox(standby.url)
        await goes_on(relay, standby, subscriber)


async def test_a_poll_publishes_nothing_that_a_synchronous_standby_does_not_have(
    primary: EmbeddedPostgres, standby: Standby, polling: RelayConfig, subscriber: Subscriber
) -> None:
    """Writers wait for a suspended standby and die with the primary, so their last commits never return."""
    async with running(polling) as relay:
        async with writers(primary.url) as committed:
            await more(committed)
            receiver = standby.wal_receiver
            receiver.suspend()
            await until(lambda: commit_waits_for_the_standby(primary.url))
            await nothing_more(committed)
            assert relay.health.ready
            await asyncio.to_thread(primary.kill)
        receiver.terminate()  # It never reads what has arrived meanwhile.
        receiver.resume()
        await promote(standby, relay)
        await goes_on(relay, standby, subscriber)


def commit_waits_for_the_standby(url: str) -> bool:
    waits = "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE wait_event = 'SyncRep' AND query = 'COMMIT')"
    with psycopg.connect(url) as connection:
        return connection.execute(waits).fetchone() == (True,)


async def nothing_more(committed: list[Committed]) -> None:
    """Wait until no commit has returned for a second: writers wait for the standby or for each other's row locks."""
    before = -1
    while len(committed) != before:
        before = len(committed)
        await asyncio.sleep(1)
