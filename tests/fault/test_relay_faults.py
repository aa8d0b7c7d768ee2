"""The relay or Postgres dies under load: every committed row still arrives, in order per payment."""

import asyncio
import contextlib
import json
import tempfile
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import psycopg
import pytest
from aiokafka import AIOKafkaConsumer
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.structs import ConsumerRecord

from infra import last_resort
from infra.kafka.access import KafkaAccess
from infra.local import EmbeddedKafka, EmbeddedPostgres
from infra.relay import Relay, RelayConfig
from infra.relay.outbox_rows import SCAN
from tests.conftest import PARTITIONS, Topics
from tests.support.relay_process import RelayProcess
from tests.support.relay_source import also_plain, reading
from tests.support.waiting import until

PAYMENTS = [f"pay_{number}" for number in range(20)]
LATENCY_OF_TAKEOVER_SECONDS = 5.0

TIMEOUT_SECONDS = 40.0
INSERT = """
    INSERT INTO outbox (id, aggregateid, type, payload, payment_seq, occurred_at)
    SELECT gen_random_uuid(), x.key, 'payment.captured.v1', %s, x.seq, '2026-01-02T03:04:05.000000Z'
      FROM unnest(%s::text[], %s::int[]) AS x(key, seq)
"""

Records = list[ConsumerRecord[bytes, bytes]]


def write(url: str, rows: Iterable[tuple[str, int]], payload: str = "{}") -> None:
    """Write all rows, given as payment and seq, in one transaction."""
    keys, seqs = zip(*rows, strict=True)
    with psycopg.connect(url) as connection:
        connection.execute(INSERT, [payload, list(keys), list(seqs)])


class Subscriber:
    """Reads a topic from its beginning into `records`."""

    def __init__(self, consumer: AIOKafkaConsumer) -> None:
        self._consumer = consumer
        self.records: Records = []

    async def read_until(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while not condition():
            assert time.monotonic() < deadline, f"never happened: {what}"
            for records in (await self._consumer.getmany(timeout_ms=50)).values():
                self.records += records

    async def read_all_of(self, url: str) -> None:
        """Read until every row of the outbox has arrived at least once."""
        with psycopg.connect(url) as connection:
            wanted = {str(found[0]) for found in connection.execute("SELECT id FROM outbox")}
        await self.read_until(lambda: {header(each, "id") for each in self.records} >= wanted, "every row on the topic")


@contextlib.asynccontextmanager
async def subscribed(bootstrap: str, topic: str) -> AsyncIterator[Subscriber]:
    consumer = AIOKafkaConsumer(topic, bootstrap_servers=bootstrap, auto_offset_reset="earliest")
    await consumer.start()
    try:
        yield Subscriber(consumer)
    finally:
        await consumer.stop()


def header(record: ConsumerRecord[bytes, bytes], name: str) -> str:
    return str(dict(record.headers)[name], "utf-8")


def assert_first_deliveries_are_in_order(records: Records) -> None:
    """Per payment, the events with new ids come with `payment_seq` 1, 2, 3 …"""
    seen: set[str] = set()
    last: dict[bytes | None, int] = {}
    for record in sorted(records, key=lambda record: (record.partition, record.offset)):
        if header(record, "id") not in seen:
            seen.add(header(record, "id"))
            seq = int(header(record, "payment_seq"))
            assert seq == last.get(record.key, 0) + 1, f"{record.key!r}: {seq} after {last.get(record.key, 0)}"
            last[record.key] = seq


@contextlib.asynccontextmanager
async def running(config: RelayConfig, state: str = "active") -> AsyncIterator[Relay]:
    """A relay in this process, stopped cleanly when the block ends."""
    relay, stop = Relay(config), asyncio.Event()
    task = asyncio.create_task(relay.run(stop))
    try:
        await until(lambda: relay.health.detail.startswith(state) or task.done())
        yield relay
    finally:
        stop.set()
        await asyncio.wait_for(task, TIMEOUT_SECONDS)


def slot_position(url: str, slot: str) -> int:
    with psycopg.connect(url) as connection:
        found = connection.execute(
            "SELECT confirmed_flush_lsn - '0/0'::pg_lsn FROM pg_replication_slots WHERE slot_name = %s", [slot]
        ).fetchone()
    assert found
    return int(found[0])


@contextlib.asynccontextmanager
async def administering(bootstrap: str) -> AsyncIterator[AIOKafkaAdminClient]:
    admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap)
    await admin.start()
    try:
        yield admin
    finally:
        await admin.close()


async def make_topic(bootstrap: str, name: str) -> None:
    async with administering(bootstrap) as admin:
        await admin.create_topics([NewTopic(name, PARTITIONS, 1)])


wal_only = pytest.mark.parametrize("source", ["wal"], indirect=True)


@pytest.fixture(params=["wal", "poll"])
def source(request: pytest.FixtureRequest) -> Any:
    """Every test runs with both, except those about the slot (`wal_only`)."""
    return request.param


@pytest.fixture
def config(postgres_url: str, kafka_bootstrap: str, topics: Topics, source: Any) -> RelayConfig:
    return RelayConfig(
        postgres_url=postgres_url,
        kafka=KafkaAccess(kafka_bootstrap),
        topic=topics.events,
        slot=f"relay_{uuid.uuid4().hex[:12]}",
        **reading(source),
        feedback_seconds=0.1,
        retry_seconds_max=0.5,
    )


@pytest.fixture
async def subscriber(config: RelayConfig) -> AsyncIterator[Subscriber]:
    async with subscribed(config.kafka.bootstrap, config.topic) as found:
        yield found


@contextlib.contextmanager
def relay_process(config: RelayConfig) -> Iterator[RelayProcess]:
    with tempfile.TemporaryDirectory() as directory:
        process = RelayProcess(config, Path(directory) / "relay.log")
        try:
            yield process
        finally:
            process.kill()


class Load:
    """Writes the next event of every payment in one transaction, repeatedly, until it is stopped.

    If Postgres goes away during a commit, the next number is read from the table: the commit may have happened.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.seq = 0

    def __enter__(self) -> "Load":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    async def more(self, rounds: int = 30) -> None:
        """Wait for this many further transactions."""
        wanted = self.seq + rounds
        await until(lambda: self.seq >= wanted)

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                write(self._url, [(payment, self.seq + 1) for payment in PAYMENTS])
                self.seq += 1
            except psycopg.Error:
                self._stop.wait(0.05)
                with contextlib.suppress(psycopg.Error):
                    self.seq = self._committed()

    def _committed(self) -> int:
        with psycopg.connect(self._url) as connection:
            found = connection.execute("SELECT coalesce(max(payment_seq), 0) FROM outbox").fetchone()
        assert found
        return int(found[0])


@also_plain
async def test_a_relay_killed_again_and_again_under_load_skips_nothing(
    config: RelayConfig, subscriber: Subscriber
) -> None:
    with Load(config.postgres_url) as load:
        for rounds in (1, 7, 20, 3):
            with relay_process(config) as relay:
                await relay.streams()
                await load.more(rounds)
    with relay_process(config) as relay:
        await subscriber.read_all_of(config.postgres_url)
        assert relay.terminate() == 0
    assert_first_deliveries_are_in_order(subscriber.records)


@wal_only
async def test_a_relay_killed_while_it_catches_up_begins_the_scan_again(
    config: RelayConfig, subscriber: Subscriber
) -> None:
    for seq in range(1, 301):
        write(config.postgres_url, [(payment, seq) for payment in PAYMENTS])
    with relay_process(replace(config, unacknowledged_max=5)):
        await subscriber.read_until(lambda: len(subscriber.records) > 0, "the scan has begun")
    with psycopg.connect(config.postgres_url) as connection:
        assert connection.execute("SELECT count(*) FROM relay_slots").fetchone() == (0,)
    with relay_process(config):
        await subscriber.read_all_of(config.postgres_url)
    assert_first_deliveries_are_in_order(subscriber.records)


@also_plain
async def test_events_killed_after_kafkas_acknowledgement_and_before_it_is_noted_are_repeated_with_the_same_bytes(
    config: RelayConfig, subscriber: Subscriber
) -> None:
    with relay_process(replace(config, feedback_seconds=3600)) as relay:
        await relay.streams()
        write(config.postgres_url, [("a", seq) for seq in range(1, 51)])
        await subscriber.read_all_of(config.postgres_url)
    with relay_process(config):
        await subscriber.read_until(lambda: len(subscriber.records) == 100, "all of them once more")
    messages = [(record.key, record.value, record.headers, record.partition) for record in subscriber.records]
    assert messages[:50] == messages[50:]


@wal_only
async def test_the_slot_does_not_move_past_events_that_kafka_has_not_acknowledged(
    postgres_url: str, own_kafka: EmbeddedKafka, config: RelayConfig
) -> None:
    config = replace(config, kafka=own_kafka.access)
    await make_topic(config.kafka.bootstrap, config.topic)
    broker = psutil.Process(own_kafka.pid)
    async with subscribed(config.kafka.bootstrap, config.topic) as subscriber:
        with relay_process(config) as relay:
            await relay.streams()
            broker.suspend()
            before = wal_position(postgres_url)
            write(postgres_url, [(payment, 1) for payment in PAYMENTS])
            committed = wal_position(postgres_url)
            await confirmations(postgres_url, config.slot, count=5)
            position = slot_position(postgres_url, config.slot)
            assert position <= before < committed
        broker.resume()
        with relay_process(config):
            await subscriber.read_all_of(postgres_url)
        assert_first_deliveries_are_in_order(subscriber.records)


def wal_position(url: str) -> int:
    with psycopg.connect(url) as connection:
        found = connection.execute("SELECT pg_current_wal_insert_lsn() - '0/0'::pg_lsn").fetchone()
    assert found
    return int(found[0])


async def confirmations(url: str, slot: str, *, count: int) -> None:
    """Wait until the relay has reported its position to the server this many times."""
    seen: set[object] = set()

    def is_enough() -> bool:
        with psycopg.connect(url) as connection:
            query = (
                "SELECT reply_time FROM pg_stat_replication AS r JOIN pg_replication_slots AS s ON s.active_pid = r.pid"
                " WHERE slot_name = %s"
            )
            seen.add(connection.execute(query, [slot]).fetchone())
        return len(seen) > count

    await until(is_enough)


async def test_a_standby_takes_over_at_once_when_the_active_relay_is_killed(
    config: RelayConfig, subscriber: Subscriber
) -> None:
    with relay_process(config) as relay, Load(config.postgres_url) as load:
        await relay.streams()
        async with running(config, state="standby") as second:
            await load.more(10)
            relay.kill()
            killed_at = time.monotonic()
            await until(lambda: second.health == (True, "active"))
            assert time.monotonic() - killed_at < LATENCY_OF_TAKEOVER_SECONDS
            await load.more(10)
            load.stop()
            await subscriber.read_all_of(config.postgres_url)
    assert_first_deliveries_are_in_order(subscriber.records)


@pytest.mark.parametrize("end", ["kill", "stop"])
async def test_nothing_is_missing_after_postgres_was_away_under_load(
    own_postgres: EmbeddedPostgres, config: RelayConfig, subscriber: Subscriber, end: str
) -> None:
    """Postgres is killed (SIGKILL), after which it runs recovery, or shut down cleanly while clients are connected."""
    config = replace(config, postgres_url=own_postgres.url)
    async with running(config) as relay:
        with Load(own_postgres.url) as load:
            for _ in range(2):
                await load.more()
                await asyncio.to_thread(getattr(own_postgres, end))
                await until(lambda: not relay.health.ready)
                await asyncio.to_thread(own_postgres.restart)
            await load.more()
        await subscriber.read_all_of(own_postgres.url)
    assert_first_deliveries_are_in_order(subscriber.records)


@pytest.mark.parametrize("is_streaming", [True, False])
async def test_a_stop_while_kafka_is_away_does_not_wait_for_it(
    postgres_url: str, own_kafka: EmbeddedKafka, config: RelayConfig, *, is_streaming: bool
) -> None:
    config = replace(config, kafka=own_kafka.access, stop_seconds=0.5)
    await make_topic(config.kafka.bootstrap, config.topic)
    if not is_streaming:
        await asyncio.to_thread(own_kafka.kill)
    with relay_process(config) as relay:
        if is_streaming:
            await relay.streams()
            await asyncio.to_thread(own_kafka.kill)
            write(postgres_url, [("a", 1)])
        else:
            await until(lambda: leaders(postgres_url) > 0)
        begun = time.monotonic()
        assert relay.terminate() == 0
        assert time.monotonic() - begun < 10


async def test_a_stop_ends_though_postgres_neither_answers_nor_hangs_up(
    own_postgres: EmbeddedPostgres, config: RelayConfig
) -> None:
    """Postgres is frozen, so no connection reports an error."""
    config = replace(config, postgres_url=own_postgres.url, stop_seconds=0.5)
    with relay_process(config) as relay:
        await relay.streams()
        server = psutil.Process(own_postgres.pid)
        everyone = [server, *server.children(recursive=True)]
        for each in everyone:
            each.suspend()
        try:
            begun = time.monotonic()
            assert await asyncio.to_thread(relay.terminate) in (0, last_resort.STATUS)
            assert time.monotonic() - begun < config.end_seconds + 5
        finally:
            for each in everyone:
                each.resume()


LEADERS = """
    SELECT count(*) FROM pg_locks JOIN pg_database ON pg_database.oid = pg_locks.database
     WHERE locktype = 'advisory' AND granted AND datname = current_database()
"""


def leaders(url: str) -> int:
    with psycopg.connect(url) as connection:
        found = connection.execute(LEADERS).fetchone()
    assert found
    return int(found[0])


# --- damage to the slot, and limits of the topic ----------------------------------------------------------------------

DAMAGES = {
    "the mark is gone": "DELETE FROM relay_slots",
}


@wal_only
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
async def test_a_slot_that_cannot_be_trusted_is_made_anew_and_no_row_is_left_out(
    config: RelayConfig, subscriber: Subscriber, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    async with running(config):
        write(config.postgres_url, [("a", 1), ("a", 2)])
        await subscriber.read_all_of(config.postgres_url)
    with psycopg.connect(config.postgres_url) as connection:
        connection.execute(damage.encode())
    write(config.postgres_url, [("a", 3), ("b", 1)])
    capsys.readouterr()
    async with running(config):
        await subscriber.read_all_of(config.postgres_url)
    assert_first_deliveries_are_in_order(subscriber.records)
    assert "retained events were published from the table" in capsys.readouterr().err


@wal_only
async def test_the_scan_takes_payment_seq_as_a_number_wherever_transactions_began(
    config: RelayConfig, subscriber: Subscriber
) -> None:
    with psycopg.connect(config.postgres_url) as early:
        early.execute("SELECT 1")  # Fixes its now(), so its row has the last seq but an earlier created_at.
        write(config.postgres_url, [("a", seq) for seq in range(1, 121)])
        early.execute(INSERT, ["{}", ["a"], [121]])
    async with running(config):
        await subscriber.read_all_of(config.postgres_url)
    assert_first_deliveries_are_in_order(subscriber.records)


def test_the_scan_streams_from_the_index_without_a_sort(postgres_url: str) -> None:
    write(postgres_url, [(f"pay_{number}", 1) for number in range(5000)])
    with psycopg.connect(postgres_url) as connection:
        connection.execute("ANALYZE outbox")
        plan = connection.execute(f"EXPLAIN DECLARE scan CURSOR FOR {SCAN}".encode()).fetchall()
    assert "outbox_default_aggregateid_payment_seq_idx" in str(plan)
    assert "Sort" not in str(plan)


@also_plain
async def test_batches_too_large_for_the_topic_are_halved_until_they_fit(
    config: RelayConfig, subscriber: Subscriber
) -> None:
    limit = ConfigResource(ConfigResourceType.TOPIC, config.topic, configs={"max.message.bytes": "10000"})
    async with administering(config.kafka.bootstrap) as admin:
        await admin.alter_configs([limit])
    async with running(config) as relay:
        write(config.postgres_url, [("a", seq) for seq in range(1, 301)], payload=json.dumps("y" * 1000))
        await subscriber.read_all_of(config.postgres_url)
        assert relay.health.ready
    assert len(subscriber.records) == 300
    assert_first_deliveries_are_in_order(subscriber.records)
