"""The relay against a real Postgres and a real Kafka: what subscribers receive, and how the slot advances."""

import asyncio
import contextlib
import socket
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit, urlunsplit
from uuid import UUID, uuid4

import aiokafka.client
import psycopg
import pytest
import structlog

from infra.kafka.access import KafkaAccess
from infra.kafka.topics import ensure_topics
from infra.local import EmbeddedKafka
from infra.local.postgres import drop_database
from infra.local.server import HOST
from infra.relay import Relay, RelayConfig, lag, metrics
from infra.relay.connection import with_settings
from infra.relay.progress.repairs import request_repair
from infra.relay.publish import producer, publisher
from infra.relay.publish.partitions import partition_of
from infra.relay.publish.publisher import Publisher
from infra.relay.session import LEADER_SETTINGS
from infra.relay.wal.stream import ReplicationStream
from tests.conftest import PARTITIONS, Topics
from tests.support.outbox import (
    Row,
    assert_first_deliveries_in_order,
    commit,
    fetch_value,
    ids,
    insert,
    rows_of,
    set_database,
)
from tests.support.relay_source import PLAIN, also_plain
from tests.support.relays import (
    frozen,
    is_all_proven,
    make_topic_anew,
    published,
    running,
    slot,
    wal_only,
    without_leader,
)
from tests.support.waiting import until

GOLDEN = [
    # key, its partition among eight, type, payload as stored, the value's bytes on the topic
    (
        "pay_0001",
        1,
        "payment.captured.v1",
        '{ "z" : [1, 2,3] ,\n\t"a":{"y":null,"b":{}}, "e":[] }',
        "7b20227a22203a205b312c20322c335d202c0a092261223a7b2279223a6e756c6c2c2262223a7b7d7d2c202265223a5b5d207d",
    ),
    (
        "pay_Đ4",
        2,
        "thanh_toán.tạo",
        '{"u":"\\u0111","s":"a\\/b"}',
        "7b2275223a225c7530313131222c2273223a22615c2f62227d",
    ),
    (
        "pay_0005",
        4,
        "payment.captured.v1",
        '{"amount":9007199254740993,"dec":10.50,"exp":1e3}',
        b'{"amount":9007199254740993,"dec":10.50,"exp":1e3}'.hex(),
    ),
    ("pay_0006", 3, "payment.captured.v1", '"scalar"', b'"scalar"'.hex()),
    ("pay_0007", 2, "payment.captured.v1", '[1,"a"]', b'[1,"a"]'.hex()),
    ("pay_0008", 0, "payment.captured.v1", '{"big":18446744073709551616,"dup":1,"dup":2}', None),
    ("pay_0013", 7, "payment.captured.v1", "null", b"null".hex()),
    ("pay_0002", 5, "payment.captured.v1", '{"text":"giấy 📄 \\u0000"}', None),
]
TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@contextlib.asynccontextmanager
async def without_kafka(config: RelayConfig) -> AsyncIterator[None]:
    """A leading relay whose Kafka bootstrap address has no broker."""
    stop = asyncio.Event()
    relay = Relay(replace(config, kafka=KafkaAccess("127.0.0.1:1"), retry_seconds_max=0.2))
    task = asyncio.create_task(relay.run(stop))
    try:
        yield
    finally:
        stop.set()
        await asyncio.wait_for(task, 30)


async def is_confirmed(config: RelayConfig, lsn: str) -> bool:
    return bool(await slot(config, f"confirmed_flush_lsn >= '{lsn}'::pg_lsn"))


# --- what a subscriber gets -------------------------------------------------------------------------------------------


@also_plain
async def test_golden_messages(config: RelayConfig) -> None:
    rows = [
        Row(uuid4(), key, number, payload, kind, traceparent=TRACEPARENT if number % 2 else None)
        for number, (key, _, kind, payload, _) in enumerate(GOLDEN, 1)
    ]
    async with running(config):
        await commit(config.postgres_url, rows)
        records = {record.key.decode(): record for record in await published(config, *rows)}
    for row, (key, partition, kind, payload, value_hex) in zip(rows, GOLDEN, strict=True):
        record = records[key]
        assert record.key == key.encode()
        assert record.partition == partition
        assert record.value == payload.encode()
        assert value_hex is None or record.value.hex() == value_hex
        assert record.headers == (
            ("id", str(row.id).encode()),
            ("ce_id", str(row.id).encode()),
            ("ce_type", kind.encode()),
            ("ce_source", b"/payments"),
            ("ce_time", b"2026-01-02T03:04:05.000006Z"),
            ("ce_specversion", b"1.0"),
            ("payment_seq", str(row.seq).encode()),
            ("traceparent", TRACEPARENT.encode() if row.seq % 2 else None),
        )


async def test_the_catch_up_scan_writes_the_same_bytes_as_the_stream(config: RelayConfig) -> None:
    rows = [Row(uuid4(), key, 1, payload, kind) for key, _, kind, payload, _ in GOLDEN]
    await commit(config.postgres_url, rows)
    async with running(config):
        scanned = await published(config, *rows)
        again = [row._replace(id=UUID(int=row.id.int ^ 1)) for row in rows]
        await commit(config.postgres_url, again)
        both = await published(config, *rows, *again)
    streamed = [record for record in both if record.key and ids([record])[0] in {row.id for row in again}]
    parts = [
        {record.key: (record.partition, record.value, record.headers[2:]) for record in records}
        for records in (scanned, streamed)
    ]
    assert parts[0] == parts[1]


@pytest.mark.parametrize("encoding", ["LATIN1", "SQL_ASCII"])
async def test_the_bytes_are_the_same_whatever_encoding_the_database_gives_its_clients(
    config: RelayConfig, encoding: str
) -> None:
    payload = '{"text":"café"}'
    scanned, streamed = Row(uuid4(), "pay_é1", 1, payload, "é"), Row(uuid4(), "pay_é2", 1, payload, "é")
    await commit(config.postgres_url, [scanned])
    await set_database(config.postgres_url, f"client_encoding = '{encoding}'")
    async with running(config):
        await commit(f"{config.postgres_url}?client_encoding=utf8", [streamed])
        records = await published(config, scanned, streamed)
    assert {record.key for record in records} == {"pay_é1".encode(), "pay_é2".encode()}
    for record in records:
        assert record.value == payload.encode()
        assert dict(record.headers)["ce_type"] == "é".encode()


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ("", {"statement_timeout": "0", "idle_in_transaction_session_timeout": "0", "idle_session_timeout": "0"}),
        (LEADER_SETTINGS, {"idle_in_transaction_session_timeout": "10s", "idle_session_timeout": "10s"}),
    ],
    ids=["all", "leader"],
)
async def test_no_time_limit_of_the_database_ends_what_takes_long_and_a_frozen_leader_loses_its_locks(
    postgres_url: str, settings: str, wanted: dict[str, str]
) -> None:
    for name in ("statement_timeout", "idle_in_transaction_session_timeout", "idle_session_timeout"):
        await set_database(postgres_url, f"{name} = '1min'")
    async with await psycopg.AsyncConnection.connect(postgres_url, **with_settings(settings)) as connection:
        for name, value in wanted.items():
            row = await (await connection.execute(f"SHOW {name}".encode())).fetchone()
            assert row == (value,), name


@also_plain
async def test_events_of_a_payment_keep_the_order_of_their_commits(config: RelayConfig) -> None:
    payments = [f"pay_{number}" for number in range(20)]
    rows = {key: rows_of(key, 25) for key in payments}
    async with running(config):
        await asyncio.gather(*(commit(config.postgres_url, *([row] for row in rows[key])) for key in payments))
        records = await published(config, *(row for each in rows.values() for row in each))
    for key, own in rows.items():
        assert ids(record for record in records if record.key == key.encode()) == [row.id for row in own]


async def test_events_rolled_back_are_not_published(config: RelayConfig) -> None:
    committed, rolled_back, released = rows_of("pay_a", 1), rows_of("pay_a", 1), rows_of("pay_a", 2, first=2)
    async with running(config):
        async with await psycopg.AsyncConnection.connect(config.postgres_url) as connection:
            await insert(connection, rolled_back)
            await connection.rollback()
            await insert(connection, committed)
            with contextlib.suppress(psycopg.errors.CheckViolation):
                async with connection.transaction():
                    await insert(connection, [released[0]._replace(payload="not json")])
            await insert(connection, released)
        records = await published(config, *committed, *released)
    assert ids(records) == [row.id for row in committed + released]


@also_plain
async def test_a_transaction_of_five_thousand_rows(config: RelayConfig) -> None:
    rows = [row for number in range(50) for row in rows_of(f"pay_{number}", 100, payload='{"n":1}')]
    async with running(config):
        await commit(config.postgres_url, rows)
        records = await published(config, *rows)
    assert len(records) == len(rows)
    assert_first_deliveries_in_order(records, rows)


@also_plain
async def test_a_relay_that_ends_inside_a_large_transaction_begins_it_again(config: RelayConfig) -> None:
    rows = [row for number in range(50) for row in rows_of(f"pay_{number}", 100, payload='{"n":1}')]
    # At most 10 events are unacknowledged at a time, so that the relay is stopped with only part of the rows published.
    relay = Relay(replace(config, unacknowledged_max=10))
    task = asyncio.create_task(relay.run(asyncio.Event()))
    await until(lambda: relay.health.detail == "active")
    before = metrics.EVENTS._value.get()
    await commit(config.postgres_url, rows)
    await until(lambda: metrics.EVENTS._value.get() > before)
    task.cancel()
    await asyncio.wait([task])
    assert metrics.EVENTS._value.get() < before + len(rows), "it had published all of it"
    async with running(config):
        records = await published(config, *rows)
    assert_first_deliveries_in_order(records, rows)


async def test_rows_that_were_copied_are_all_published(config: RelayConfig) -> None:
    """The rows of one COPY share one WAL record. We never use COPY, as other relays lose all but one of those rows."""
    rows = rows_of("pay_a", 50)
    statement = "COPY outbox (id, aggregateid, payment_seq, payload, type, occurred_at, source, specversion) FROM STDIN"
    async with running(config):
        connect = psycopg.AsyncConnection.connect
        async with await connect(config.postgres_url) as connection, connection.cursor().copy(statement) as copy:
            for row in rows:
                await copy.write_row([*row[:6], *row[7:]])
        records = await published(config, *rows)
    assert ids(records) == [row.id for row in rows]


# --- the slot ---------------------------------------------------------------------------------------------------------


@wal_only
async def test_an_idle_slot_moves_on_while_other_tables_are_written(config: RelayConfig) -> None:
    async with running(config), await psycopg.AsyncConnection.connect(config.postgres_url) as connection:
        await connection.execute("CREATE TABLE other (content text)")
        await connection.execute("INSERT INTO other SELECT repeat('x', 100) FROM generate_series(1, 10000)")
        await connection.commit()
        end = await fetch_value(config.postgres_url, "SELECT pg_current_wal_lsn()")
        await until(lambda: is_confirmed(config, end))


@wal_only
async def test_the_slot_waits_while_a_transaction_is_open_and_then_it_is_published(config: RelayConfig) -> None:
    early, late = rows_of("pay_early", 1), rows_of("pay_late", 3)
    async with running(config), await psycopg.AsyncConnection.connect(config.postgres_url) as connection:
        await insert(connection, early)
        await commit(config.postgres_url, *([row] for row in late))
        await published(config, *late)
        await until(lambda: is_confirmed(config, "0/1"))
        await connection.commit()
        await published(config, *early, *late)


async def test_rows_from_before_the_slot_are_published_when_the_relay_first_starts(config: RelayConfig) -> None:
    before = [row for number in range(30) for row in rows_of(f"pay_{number}", 100)]
    # Committed in the wrong order: only payment_seq shows the right one.
    await commit(config.postgres_url, before[1500:], before[:1500])
    async with running(config):
        after = rows_of("pay_0", 5, first=101)
        await commit(config.postgres_url, after)
        records = await published(config, *before, *after)
    assert len(records) == len(before) + len(after)
    assert_first_deliveries_in_order(records, before + after)


async def test_a_scan_that_did_not_end_begins_again(config: RelayConfig) -> None:
    """After a kill the slot exists, but no row in relay_slots records that the table was published."""
    rows = rows_of("pay_a", 5)
    await commit(config.postgres_url, rows)
    await fetch_value(config.postgres_url, "SELECT pg_create_logical_replication_slot(%s, 'pgoutput')", config.slot)
    async with running(config):
        records = await published(config, *rows)
    assert ids(records) == [row.id for row in rows]


@also_plain
async def test_a_restart_after_a_stop_in_good_order_repeats_nothing(config: RelayConfig) -> None:
    first, second = rows_of("pay_a", 300), rows_of("pay_a", 300, first=301)
    async with running(config):
        await commit(config.postgres_url, *(first[at : at + 10] for at in range(0, 300, 10)))
        await published(config, *first)
    async with running(config):
        await commit(config.postgres_url, *([row] for row in second))
        records = await published(config, *first, *second)
    assert ids(records) == [row.id for row in first + second]


@wal_only
async def test_a_slot_of_another_database_is_left_alone(config: RelayConfig, empty_postgres_url: str) -> None:
    create = "SELECT pg_create_logical_replication_slot(%s, 'pgoutput')"
    await fetch_value(empty_postgres_url, create, config.slot)
    relay, stop = Relay(config), asyncio.Event()
    task = asyncio.create_task(relay.run(stop))
    await until(lambda: "SlotOfAnother" in (relay.trouble or ""))
    stop.set()
    await task
    assert await slot(config, "database") != await fetch_value(config.postgres_url, "SELECT current_database()")


@wal_only
async def test_a_stop_does_not_wait_for_a_slot_that_waits_for_a_transaction(config: RelayConfig) -> None:
    async with await psycopg.AsyncConnection.connect(config.postgres_url) as connection:
        await insert(connection, rows_of("pay_a", 1))
        relay, stop = Relay(config), asyncio.Event()
        task = asyncio.create_task(relay.run(stop))
        waiting = (
            "SELECT 1 FROM pg_stat_activity WHERE query LIKE 'CREATE_REPLICATION_SLOT%%' AND wait_event_type = 'Lock'"
        )
        await until(lambda: fetch_value(config.postgres_url, waiting))
        stop.set()
        await asyncio.wait_for(task, 5)
    assert await slot(config, "slot_name") is None


# --- Kafka slow, away or unwilling ------------------------------------------------------------------------------------


async def test_a_frozen_kafka_stops_the_reading_and_costs_no_memory_and_no_connection(
    postgres_url: str, own_kafka: EmbeddedKafka
) -> None:
    config = RelayConfig(
        postgres_url=postgres_url,
        kafka=own_kafka.access,
        topic="slow.events",
        slot=f"test_{uuid4().hex[:12]}",
        unacknowledged_max=500,
        feedback_seconds=0.1,
        stalled_seconds=1,
    )
    await ensure_topics(own_kafka.access, {config.topic: 8})
    rows = [row for number in range(100) for row in rows_of(f"pay_{number}", 100, payload=f'"{"x" * 2000}"')]
    walsender = "SELECT pid FROM pg_stat_replication WHERE application_name = 'relay' AND usename IS NOT NULL"
    replied = f"SELECT reply_time > %s::timestamptz + interval '11 seconds' FROM ({walsender.replace('pid', '*')}) AS r"
    async with running(config) as relay:
        with frozen(own_kafka.pid):
            pid = await fetch_value(postgres_url, walsender)
            began = await fetch_value(postgres_url, "SELECT now()")
            await commit(postgres_url, rows)
            told = "active: Kafka acknowledges nothing; what waits is in partition "
            await until(lambda: (relay.trouble or "").startswith(told))
            # Longer than Postgres waits for a silent client: the relay must keep replying while it does not read.
            await until(lambda: fetch_value(postgres_url, replied, began))
            assert metrics.UNACKNOWLEDGED._value.get() == 500
            assert await fetch_value(postgres_url, walsender) == pid
        records = await published(config, *rows)
        await until(lambda: relay.trouble is None)
    assert len(records) == len(rows)
    assert_first_deliveries_in_order(records, rows)
    drop_database(postgres_url)


@wal_only
async def test_a_session_begins_at_what_was_written_down_though_the_slot_was_told_less(config: RelayConfig) -> None:
    rows, more = rows_of("pay_a", 3), rows_of("pay_a", 3, first=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ReplicationStream, "confirm", lambda *_: None)
        async with running(config):
            await commit(config.postgres_url, rows)
            await published(config, *rows)
            await asyncio.sleep(3 * config.feedback_seconds)
    await commit(config.postgres_url, more)
    async with running(config):
        records = await published(config, *rows, *more)
    assert ids(records) == [row.id for row in rows + more]


@also_plain
async def test_events_of_a_partition_without_a_leader_wait_and_no_other_is_sent_again(
    config: RelayConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """aiokafka eventually gives up a batch without a leader; a new session would then repeat everything sent since."""
    monkeypatch.setattr(producer, "REQUEST_SECONDS", 0.5)
    rows = [row for number in range(1, 10) for row in rows_of(f"pay_000{number}", 5)]
    before, rest = [row for row in rows if row.seq <= 2], [row for row in rows if row.seq > 2]
    others = [row for row in rows if partition_of(row.key.encode(), PARTITIONS) != 1]
    sessions = metrics.RECONNECTS.labels("kafka")._value.get()
    async with running(replace(config, stalled_seconds=2)) as relay:
        await commit(config.postgres_url, *([row] for row in before))
        await published(config, *before)
        with without_leader(config.topic, 1):
            await commit(config.postgres_url, *([row] for row in rest))
            await published(config, *others)

            async def is_told() -> bool:
                """The relay reports partition 1 alone, while Kafka acknowledges events in other partitions."""
                rows.append(Row(uuid4(), others[0].key, 1 + max(row.seq for row in rows if row.key == others[0].key)))
                await commit(config.postgres_url, [rows[-1]])
                return "Kafka acknowledges nothing in partition 1" in (relay.trouble or "")

            await until(is_told)
        records = await published(config, *rows)
        await until(lambda: relay.trouble is None)
    assert_first_deliveries_in_order(records, rows)
    assert len(records) == len(rows) > len(others)
    assert metrics.RECONNECTS.labels("kafka")._value.get() == sessions


@pytest.mark.parametrize("source", ["wal", PLAIN], indirect=True)
async def test_a_stream_that_the_server_ends_is_reported_with_the_servers_reason(config: RelayConfig) -> None:
    query = "SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE slot_name = %s"
    with structlog.testing.capture_logs() as logs:
        async with running(config) as relay:
            await fetch_value(config.postgres_url, query, config.slot)
            await until(lambda: any(each["event"] == "relay session ended" for each in logs))
            await until(lambda: relay.health.detail == "active")
    (error,) = [each["error"] for each in logs if each["event"] == "relay session ended"]
    assert "terminating connection due to administrator command" in error


async def test_a_relay_on_an_empty_database_says_what_to_do(config: RelayConfig, empty_postgres_url: str) -> None:
    stop, relay = asyncio.Event(), Relay(replace(config, postgres_url=empty_postgres_url))
    task = asyncio.create_task(relay.run(stop))
    try:
        await until(lambda: "run `payments migrate`" in relay.health.detail)
    finally:
        stop.set()
        await asyncio.wait_for(task, 20)


@wal_only
async def test_a_stop_that_waits_long_for_kafka_keeps_its_stream_and_saves_its_progress(config: RelayConfig) -> None:
    """Postgres disconnects a client from which it has heard nothing for `wal_sender_timeout`, ten seconds."""
    stop, stuck, sent = asyncio.Event(), rows_of("pay_0001", 1), rows_of("pay_0005", 3)
    relay = Relay(replace(config, stop_seconds=11))
    with structlog.testing.capture_logs() as logs, without_leader(config.topic, 1):
        task = asyncio.create_task(relay.run(stop))
        try:
            await until(lambda: relay.health.detail == "active")
            await commit(config.postgres_url, stuck)
            await commit(config.postgres_url, sent)
            await published(config, *sent)
            stop.set()
            await asyncio.wait_for(task, 30)
        finally:
            task.cancel()
    assert [each["event"] for each in logs if each["event"].startswith("relay s")] == ["relay stopped"]


@wal_only
async def test_a_partition_waits_for_its_producer_by_itself_though_a_broker_is_asked_first_that_is_gone(
    config: RelayConfig, silent_brokers: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The broker that is gone led the partitions without a leader, and it is still among the configured addresses."""
    monkeypatch.setattr(producer, "REQUEST_SECONDS", 1.5)
    monkeypatch.setattr(publisher, "SEND_SECONDS", 1.0)
    sessions = metrics.RECONNECTS.labels("kafka")._value.get()
    rows, others = rows_of("pay_0001", 5), rows_of("pay_0005", 80)
    assert partition_of(b"pay_0001", PARTITIONS) == 1 != partition_of(b"pay_0005", PARTITIONS)
    bootstrap = ",".join([*silent_brokers, config.kafka.bootstrap])
    async with running(replace(config, kafka=replace(config.kafka, bootstrap=bootstrap))):
        with without_leader(config.topic, 1):
            await commit(config.postgres_url, rows)
            for row in others:
                await commit(config.postgres_url, [row])
                await asyncio.sleep(0.1)
        records = await published(config, *rows, *others)
    assert len(records) == len(rows) + len(others)
    assert metrics.RECONNECTS.labels("kafka")._value.get() == sessions


@pytest.fixture
def silent_brokers() -> Iterator[list[str]]:
    """Two addresses that accept connections and never answer."""
    with socket.create_server((HOST, 0)) as one, socket.create_server((HOST, 0)) as another:
        yield [f"{HOST}:{server.getsockname()[1]}" for server in (one, another)]


@also_plain
async def test_many_bytes_stop_the_reading_too(config: RelayConfig) -> None:
    highest = 0
    rows = rows_of("pay_a", 200, payload=f'"{"x" * 100_000}"')
    async with running(replace(config, unacknowledged_bytes_max=300_000, feedback_seconds=0.001)):
        await commit(config.postgres_url, *([row] for row in rows))

        def is_done() -> bool:
            nonlocal highest
            highest = max(highest, int(metrics.UNACKNOWLEDGED._value.get()))
            return False

        with contextlib.suppress(TimeoutError):
            await until(is_done, timeout_seconds=0.5)
        await published(config, *rows)
    assert highest <= 3


async def test_a_topic_that_is_made_anew_with_fewer_partitions_gets_every_event_where_it_belongs(
    config: RelayConfig,
) -> None:
    config = replace(config, topic=f"{config.topic}.own", gap_seconds=0.1)
    await ensure_topics(config.kafka, {config.topic: 2 * PARTITIONS})
    before, after = ([Row(uuid4(), f"pay_{n}", seq) for n in range(40)] for seq in (1, 2))
    async with running(config) as relay:
        await commit(config.postgres_url, before)
        await until(lambda: is_all_proven(config))
        await make_topic_anew(config, PARTITIONS)
        await commit(config.postgres_url, after)
        # Sooner than a producer gives up its batches for partitions that are gone.
        await until(lambda: "Kafka has lost events" in relay.health.detail, timeout_seconds=10)
        async with await psycopg.AsyncConnection.connect(config.postgres_url, autocommit=True) as connection:
            assert await request_repair(connection, config.slot, "everything")
        records = await published(config, *before, *after)
    assert {(row.id, partition_of(row.key.encode(), PARTITIONS)) for row in before + after} <= {
        (UUID(dict(record.headers)["id"].decode()), record.partition) for record in records
    }


async def test_a_standby_waits_and_takes_over(config: RelayConfig) -> None:
    first, second = rows_of("pay_a", 50), rows_of("pay_a", 50, first=51)
    standby, stop = Relay(config), asyncio.Event()
    async with running(config):
        task = asyncio.create_task(standby.run(stop))
        await until(lambda: standby.health.detail == "standby")
        assert standby.health.ready
        await commit(config.postgres_url, first)
        await published(config, *first)
    began = time.monotonic()
    await until(lambda: standby.health.detail == "active")
    assert time.monotonic() - began < 2
    await commit(config.postgres_url, second)
    records = await published(config, *first, *second)
    stop.set()
    await task
    assert ids(records) == [row.id for row in first + second]


async def test_a_topic_that_is_not_there_is_named_and_waited_for(
    config: RelayConfig, kafka_bootstrap: str, capfd: pytest.CaptureFixture[str]
) -> None:
    missing, rows = replace(config, topic=f"{config.topic}.later"), rows_of("pay_a", 3)
    relay, stop = Relay(missing), asyncio.Event()
    task = asyncio.create_task(relay.run(stop))
    await until(lambda: "TopicMissing" in relay.health.detail)
    await commit(config.postgres_url, rows)
    await ensure_topics(KafkaAccess(kafka_bootstrap), {missing.topic: 8})
    assert_first_deliveries_in_order(await published(missing, *rows), rows)
    assert f"there is no topic {missing.topic}" in capfd.readouterr().err
    stop.set()
    await asyncio.wait_for(task, 30)


async def test_no_time_limit_of_the_database_ends_a_first_start(config: RelayConfig) -> None:
    """If one did, the first scan would start again and again, and never finish."""
    ended = metrics.RECONNECTS.labels("postgres")._value.get()
    rows = rows_of("pay_a", 3000)
    await commit(config.postgres_url, rows)
    await fetch_value(config.postgres_url, "UPDATE outbox SET xact = NULL, position = NULL RETURNING 1")
    await set_database(config.postgres_url, "transaction_timeout = '100ms'")
    async with running(replace(config, unacknowledged_max=20)):
        records = await published(config, *rows)
    assert len(records) == len(rows)
    assert metrics.RECONNECTS.labels("postgres")._value.get() == ended


async def test_the_lag_grows_while_kafka_is_away(config: RelayConfig) -> None:
    """While Kafka is away, every session ends before it reads anything."""
    rows, waiting = rows_of("pay_a", 3), metrics.LAG_SECONDS._value
    async with running(config):
        await commit(config.postgres_url, rows)
        await published(config, *rows)
    async with without_kafka(config):
        await commit(config.postgres_url, rows_of("pay_a", 1, first=4))
        await until(lambda: waiting.get() > 0.5)
        before = waiting.get()
        await until(lambda: waiting.get() > before + 0.5)
        assert waiting.get() < 60


@wal_only
async def test_a_leader_shows_its_backlog_while_kafka_is_away_and_who_stands_by_shows_none(config: RelayConfig) -> None:
    async with running(config):
        await commit(config.postgres_url, rows_of("pay_a", 3))
    async with without_kafka(config):
        await commit(config.postgres_url, rows_of("pay_a", 500, first=4))
        ended, lag = metrics.RECONNECTS.labels("kafka")._value, metrics.LAG_BYTES._value
        await until(lambda: lag.get() > 10_000)
        last = ended.get() + 3
        while ended.get() < last:
            assert lag.get() > 10_000, "sessions that end leave the lag as it is"
            await asyncio.sleep(0.005)
    assert metrics.LAG_BYTES._value.get() == 0, "it has stopped"


@wal_only
async def test_a_log_that_brings_nothing_though_events_wait_is_told(
    config: RelayConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The WAL sender hangs, or waits for a standby that is gone."""
    monkeypatch.setattr(lag, "UNREAD_SECONDS", 1.5)
    rows, more = rows_of("pay_a", 3), rows_of("pay_a", 3, first=4)
    async with running(replace(config, stalled_seconds=2.5)) as relay:
        await commit(config.postgres_url, rows)
        await published(config, *rows)
        sender = await slot(config, "active_pid")
        with frozen(sender):
            await commit(config.postgres_url, more)
            await until(lambda: metrics.LAG_SECONDS._value.get() > 1.5)
            await until(lambda: "Postgres has brought nothing" in relay.health.detail)
        await published(config, *more)
        await until(lambda: relay.health == (True, "active") and metrics.LAG_SECONDS._value.get() == 0)


async def test_a_role_that_may_read_the_outbox_and_does_not_own_it_suffices(config: RelayConfig) -> None:
    role, rows = f"relay_{uuid4().hex[:8]}", rows_of("pay_a", 3)
    grants = f"""
        CREATE ROLE {role} LOGIN REPLICATION PASSWORD 'x';
        GRANT SELECT, UPDATE ON ALL TABLES IN SCHEMA public TO {role};
        GRANT ALL ON relay_slots, relay_quarantine TO {role};
        GRANT USAGE ON ALL SEQUENCES IN SCHEMA public TO {role};
    """
    url = urlsplit(config.postgres_url)
    theirs = urlunsplit(url._replace(netloc=f"{role}:x@{url.hostname}:{url.port}"))
    async with await psycopg.AsyncConnection.connect(config.postgres_url, autocommit=True) as owner:
        await owner.execute(grants.encode())
        try:
            async with running(replace(config, postgres_url=theirs)):
                await commit(config.postgres_url, rows)
                await published(config, *rows)
        finally:
            await owner.execute(f"DROP OWNED BY {role}; DROP ROLE {role}".encode())


async def test_a_connection_that_is_being_made_while_a_publisher_closes_is_closed_too(
    kafka_bootstrap: str, topics: Topics, monkeypatch: pytest.MonkeyPatch
) -> None:
    create, is_begun, made = aiokafka.client.create_conn, asyncio.Event(), []

    async def create_slowly(*arguments: Any, **more: Any) -> Any:
        is_begun.set()
        made.append(await create(*arguments, **more))
        await asyncio.sleep(0.2)
        return made[-1]

    config = RelayConfig(postgres_url="", kafka=KafkaAccess(kafka_bootstrap), topic=topics.events)
    publisher = await Publisher.connect(config, lambda: None)
    producer = publisher._producers.of_partition[0]
    await producer.client.close()
    monkeypatch.setattr(aiokafka.client, "create_conn", create_slowly)
    await producer.send(topics.events, b"{}", partition=0)
    await is_begun.wait()
    await publisher.close()
    assert [each.connected() for each in made] == [False]
