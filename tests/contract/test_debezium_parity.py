"""A subscriber cannot tell our relay from the real Debezium. Tested with golden messages, and by running both.

Tests that run Debezium are skipped where it cannot be had; with PAYMENTS_TEST_DEBEZIUM=required, as in CI, they fail.
"""

import asyncio
import contextlib
import json
import os
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import UUID

import psycopg
import pytest

from infra.kafka.access import KafkaAccess
from infra.local.connect import ARTIFACTS
from infra.local.kafka import maven_jars
from infra.local.postgres import drop_database
from infra.local.server import LocalServerError, silent
from infra.relay import RelayConfig
from infra.relay.progress.repairs import request_repair
from tests.conftest import PARTITIONS, Topics
from tests.support.outbox import Row, assert_first_deliveries_in_order, commit, complete, fetch_value, ids, rows_of
from tests.support.parity import (
    Message,
    create_slot,
    debezium,
    debeziums,
    first_difference,
    message_of,
    messages_on,
    our_relay,
    varied_transactions,
)
from tests.support.topic import read_until
from tests.support.waiting import until

GOLDENS_PATH = Path(__file__).parent / "goldens" / "debezium" / "messages.json"
GOLDENS: list[dict[str, Any]] = json.loads(GOLDENS_PATH.read_text())


def golden_row(golden: dict[str, Any]) -> Row:
    return Row(**golden["row"] | {"id": UUID(golden["row"]["id"])})


def golden_message(golden: dict[str, Any]) -> Message:
    message = golden["message"]
    headers = tuple((name, value) for name, value in message["headers"])
    return Message(**message | {"headers": headers})


@pytest.fixture
def config(postgres_url: str, kafka_bootstrap: str, topics: Topics) -> Iterator[RelayConfig]:
    """The configuration of a relay of this test's own."""
    yield RelayConfig(
        postgres_url=postgres_url,
        kafka=KafkaAccess(kafka_bootstrap),
        topic=topics.events,
        slot=f"test_{uuid.uuid4().hex[:12]}",
        feedback_seconds=0.1,
        gap_seconds=0.2,
    )
    drop_database(postgres_url)


@pytest.mark.parametrize("source", ["wal", "poll"])
async def test_our_messages_are_those_that_debezium_made_of_the_same_rows(config: RelayConfig, source: Any) -> None:
    rows = [golden_row(golden) for golden in GOLDENS]
    async with our_relay(replace(config, source=source)):
        await commit(config.postgres_url, *([row] for row in rows))
        published = await messages_on(config, rows)
    ours = {dict(message.headers)["id"]: message for messages in published.values() for message in messages}
    for golden, row in zip(GOLDENS, rows, strict=True):
        assert ours[str(row.id).encode().hex()] == golden_message(golden)


def test_the_goldens_are_varied() -> None:
    rows = [golden_row(golden) for golden in GOLDENS]
    assert len({golden["message"]["partition"] for golden in GOLDENS}) == PARTITIONS
    assert {row.traceparent is None for row in rows} == {True, False}
    assert len({row.payload for row in rows}) > 10
    assert len({row.type for row in rows}) > 3


# --- the real Debezium ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def artifacts() -> None:
    """Debezium's jars, from the cache or from Maven Central; skips with the reason where they cannot be had."""
    try:
        maven_jars(ARTIFACTS, "Kafka Connect and Debezium, about 60 MB", silent)
    except LocalServerError as error:
        if os.environ.get("PAYMENTS_TEST_DEBEZIUM") == "required":
            raise
        pytest.skip(f"Debezium cannot be had here: {error.reason}")


@pytest.mark.usefixtures("artifacts")
async def test_the_real_debezium_publishes_the_same_messages(
    config: RelayConfig, topics: Topics, tmp_data_dir: Path
) -> None:
    theirs = debeziums(config, topics.dlq)
    transactions = varied_transactions(1000, seed=2)
    rows = [row for each in transactions for row in each]
    await create_slot(theirs)
    async with debezium(theirs, tmp_data_dir), our_relay(config):
        await commit(config.postgres_url, *transactions)
        await roll_back(config.postgres_url)
        difference = first_difference(await messages_on(theirs, rows), await messages_on(config, rows))
    assert difference is None, difference


async def roll_back(url: str) -> None:
    async with await psycopg.AsyncConnection.connect(url) as connection:
        values = "VALUES (gen_random_uuid(), 'k', 't', '{}', 1, 'now')"
        await connection.execute(
            f"INSERT INTO outbox (id, aggregateid, type, payload, payment_seq, occurred_at) {values}"
        )
        await connection.rollback()


@pytest.fixture
async def writing(config: RelayConfig) -> AsyncIterator[list[Row]]:
    """Write rows of three payments until the test ends; the list has all rows committed so far."""
    rows: list[Row] = []
    stop = asyncio.Event()
    await fetch_value(config.postgres_url, "SELECT 1")

    async def write() -> None:
        async with await psycopg.AsyncConnection.connect(config.postgres_url, autocommit=True):
            seq = 0
            while not stop.is_set():
                seq += 1
                batch = [rows_of(f"pay_{number}", 1, first=seq)[0] for number in range(3)]
                await commit(config.postgres_url, batch)
                rows.extend(batch)
                await asyncio.sleep(0.01)

    task = asyncio.create_task(write())
    yield rows
    stop.set()
    await task


@pytest.mark.usefixtures("artifacts")
async def test_debezium_takes_over_and_gives_back_while_payments_go_on(
    config: RelayConfig, tmp_data_dir: Path, writing: list[Row]
) -> None:
    """The procedure of docs/operations/hand-over-to-debezium.md, both ways, on one slot."""

    async def grows() -> None:
        before = len(writing)
        await until(lambda: len(writing) > before + 60)
        await read_until(config.kafka.bootstrap, config.topic, complete(writing[: before + 60]), timeout_seconds=90)

    async with our_relay(config):
        await grows()
    async with debezium(config, tmp_data_dir):
        await grows()
        settled = list(writing)
        before = await read_until(config.kafka.bootstrap, config.topic, complete(settled))
        position = await fetch_value(config.postgres_url, "SELECT pg_current_wal_insert_lsn()")
        await until(lambda: is_confirmed(config, position))  # Debezium saves and confirms every second.
    await until(lambda: is_free(config))
    async with adopting_relay(config):
        await grows()
        rows = list(writing)
        records = await read_until(config.kafka.bootstrap, config.topic, complete(rows))
    known = {str(row.id) for row in rows}
    of_rows = [record for record in records if dict(record.headers)["id"].decode() in known]
    assert_first_deliveries_in_order(of_rows, rows)
    assert not repeated(before), "our relay ended in good order, and had not confirmed what it had published"
    again = repeated(of_rows) & {row.id for row in settled}
    assert not again, f"{len(again)} of {len(settled)} were published again that Debezium had confirmed"
    assert len({(message_of(each).key, message_of(each).value, message_of(each).headers) for each in of_rows}) == len(
        rows
    )


def repeated(records: Iterable[Any]) -> set[UUID]:
    """The ids that appear more than once."""
    return {event_id for event_id, count in Counter(ids(records)).items() if count > 1}


@contextlib.asynccontextmanager
async def adopting_relay(config: RelayConfig) -> AsyncIterator[None]:
    """Start our relay, which stops at a gap until the `adopt` repair says that Debezium published the events before."""
    adopting = asyncio.create_task(adopt(config))
    async with our_relay(config):
        await adopting
        yield


async def adopt(config: RelayConfig) -> None:
    async with await psycopg.AsyncConnection.connect(config.postgres_url, autocommit=True) as connection:
        await until(lambda: fetch_value(config.postgres_url, "SELECT gap IS NOT NULL FROM relay_slots"))
        assert await request_repair(connection, config.slot, "adopt")
        await until(lambda: fetch_value(config.postgres_url, "SELECT gap IS NULL FROM relay_slots"))


async def is_confirmed(config: RelayConfig, lsn: str) -> bool:
    query = "SELECT confirmed_flush_lsn >= %s::pg_lsn FROM pg_replication_slots WHERE slot_name = %s"
    return bool(await fetch_value(config.postgres_url, query, lsn, config.slot))


async def is_free(config: RelayConfig) -> bool:
    query = "SELECT NOT active FROM pg_replication_slots WHERE slot_name = %s"
    return bool(await fetch_value(config.postgres_url, query, config.slot))
