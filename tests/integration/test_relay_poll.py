"""The traps of polling a table in order: transactions do not end in the order they began, and ids are not an order."""

import asyncio
import random
import time
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

import asyncpg
import psycopg
import pytest

from infra.kafka.topics import ensure_topics
from infra.local import EmbeddedKafka
from infra.local.postgres import drop_database
from infra.postgres import maintenance
from infra.relay import Relay, RelayConfig, metrics, session
from infra.relay.lag import Lag
from infra.relay.outbox_rows import PORTION_BYTES
from infra.relay.poll import source as poll_source
from infra.relay.poll import window
from infra.relay.progress.snapshot import NOTHING, Snapshot
from infra.relay.wake_trigger import set_notify
from tests.support.outbox import (
    Row,
    assert_first_deliveries_in_order,
    commit,
    fetch_value,
    ids,
    insert,
    open_transaction,
    rows_of,
    write_next,
)
from tests.support.relays import frozen, published, running, slot, wal_only
from tests.support.waiting import until

NOTIFIES = "SELECT tgenabled <> 'D' FROM pg_trigger WHERE tgname = 'outbox_notify'"


@pytest.fixture(params=["poll"])
def source(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture(params=["near", "far", "large"])
def window_is(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """near, far: late transactions are read with the others, or separately; large: all is read by keys at once."""
    if request.param == "far":
        monkeypatch.setattr(window, "NEAR_MAX", -1)
    if request.param == "large":
        monkeypatch.setattr(poll_source, "LARGE", -1)


@pytest.mark.usefixtures("window_is")
async def test_a_transaction_that_began_earlier_and_ends_later_is_not_passed_over(config: RelayConfig) -> None:
    early, late = rows_of("pay_early", 3), rows_of("pay_late", 3)
    async with running(config):
        async with await open_transaction(config.postgres_url) as connection:
            await insert(connection, early)
            await commit(config.postgres_url, late)
            await asyncio.sleep(0.5)
        records = await published(config, *early, *late)
    assert_first_deliveries_in_order(records, early + late)


async def test_a_payments_events_keep_their_order_though_the_second_ones_transaction_is_older(
    config: RelayConfig,
) -> None:
    """The older transaction waited for the payment's lock, so it commits later."""
    first, second = rows_of("pay_a", 5), rows_of("pay_a", 5, first=6)
    async with running(config):
        async with await open_transaction(config.postgres_url) as older:
            await commit(config.postgres_url, first)
            await insert(older, second)
        records = await published(config, *first, *second)
    assert ids(records) == [row.id for row in first + second]


@pytest.mark.usefixtures("window_is")
async def test_the_order_holds_with_a_third_transaction_between(config: RelayConfig) -> None:
    """A third transaction, with an id between the two, is still open when both have ended: it must not part them."""
    first, second = rows_of("pay_a", 3), rows_of("pay_a", 3, first=4)
    async with running(config):
        async with await open_transaction(config.postgres_url) as older, await open_transaction(config.postgres_url):
            await commit(config.postgres_url, first)
            await insert(older, second)
            await older.commit()
            await published(config, *first, *second)
        records = await published(config, *first, *second)
    assert ids(records) == [row.id for row in first + second]


@pytest.mark.usefixtures("window_is")
async def test_the_order_holds_while_many_lock_several_payments_each(config: RelayConfig) -> None:
    """Like the write path: lock some payments in order of id, take their next numbers, insert, commit."""
    async with await psycopg.AsyncConnection.connect(config.postgres_url, autocommit=True) as connection:
        await connection.execute("CREATE TABLE seqs (id int PRIMARY KEY, seq int NOT NULL DEFAULT 0)")
        await connection.execute("INSERT INTO seqs SELECT generate_series(1, 40)")
    async with running(config):
        written = await asyncio.gather(*(write_to_some(config, random.Random(seed)) for seed in range(12)))
        rows = sorted((row for some in written for row in some), key=lambda row: row.seq)
        records = await published(config, *rows)
    assert_first_deliveries_in_order(records, rows)


async def write_to_some(config: RelayConfig, choose: random.Random) -> list[Row]:
    written = []
    async with await psycopg.AsyncConnection.connect(config.postgres_url) as connection:
        for _ in range(40):
            written += await write_next(connection, choose, 8, of=40)
    return written


async def test_an_open_transaction_holds_up_nobody(config: RelayConfig) -> None:
    newer = rows_of("pay_a", 5)
    async with running(replace(config, feedback_seconds=30)), await open_transaction(config.postgres_url):
        await commit(config.postgres_url, newer)
        await published(config, *newer)


async def test_published_events_are_proven_once_concurrent_transactions_have_ended(config: RelayConfig) -> None:
    """An old transaction delays the proof. Once it has ended, the proof is saved, though nothing new is published."""
    rows = rows_of("pay_a", 5)
    proven = "SELECT published_below > (SELECT max(xact) FROM outbox) FROM relay_slots WHERE slot_name = %s"
    async with running(config):
        async with await open_transaction(config.postgres_url):
            await commit(config.postgres_url, rows)
            await published(config, *rows)
            assert not await fetch_value(config.postgres_url, proven, config.slot)
        await until(lambda: fetch_value(config.postgres_url, proven, config.slot))


async def test_a_backlog_of_exactly_one_portion_is_proven(config: RelayConfig) -> None:
    rows = rows_of("pay_a", window.PORTION)
    proven = "SELECT published_below > (SELECT max(xact) FROM outbox) FROM relay_slots WHERE slot_name = %s"
    await commit(config.postgres_url, rows)
    async with running(config):
        await published(config, *rows)
        await until(lambda: fetch_value(config.postgres_url, proven, config.slot))


async def test_rows_from_before_there_was_an_order_are_published_after_an_upgrade(config: RelayConfig) -> None:
    """The relay read the log until the upgrade, and has no proof of anything."""
    rows = rows_of("pay_a", 5)
    await commit(config.postgres_url, rows)
    async with await psycopg.AsyncConnection.connect(config.postgres_url, autocommit=True) as connection:
        await connection.execute("UPDATE outbox SET xact = NULL, position = NULL")
        mark = "INSERT INTO relay_slots (slot_name, system_identifier) SELECT %s, system_identifier"
        await connection.execute(f"{mark} FROM pg_control_system()".encode(), [config.slot])
    async with running(config):
        assert_first_deliveries_in_order(await published(config, *rows), rows)


VALUES = {
    "first": "bigint",
    "end": "bigint",
    "open": "bigint[]",
    "late": "bigint[]",
    "oldest": "bigint",
    "position": "bigint",
}


async def plan_of(reader: psycopg.AsyncConnection, query: str, types: dict[str, str], values: str) -> str:
    """The generic plan of the prepared query; with literal values in the query, EXPLAIN would plan for those values."""
    for number, name in enumerate(types, start=1):
        query = query.replace(f"%({name})s", f"${number}")
    await reader.execute(f"PREPARE look ({','.join(types.values())}) AS {query}".encode())
    explained = await reader.execute(f"EXPLAIN EXECUTE look ({values})".encode())
    plan = "\n".join(row[0] for row in await explained.fetchall())
    await reader.execute("DEALLOCATE look")
    assert "$1" in plan, "the plan is generic"
    return plan


async def test_it_never_looks_through_the_whole_table(postgres_url: str) -> None:
    """Even if the statistics are of an empty table: otherwise each look at a full outbox took half a second."""
    async with await psycopg.AsyncConnection.connect(postgres_url, autocommit=True) as connection:
        await connection.execute("ANALYZE outbox")
        await insert(connection, rows_of("pay_a", 20_000))
    async with await poll_source.connect_reader(postgres_url) as reader:
        for query in (*window.READ, *window.KEYS):
            plan = await plan_of(reader, query, VALUES, "1099511627776, 2199023255552, '{}', '{}', 549755813888, 0")
            assert "Seq Scan" not in plan, plan
            assert "xact_idx" in plan, plan
        fetch = window.FETCH.format(partition="outbox_default").replace("%s", "$1")
        assert "Tid Scan" in await plan_of(reader, fetch, {"places": "tid[]"}, "'{\"(0,1)\"}'")


async def test_its_looks_are_planned_once_and_without_workers(postgres_url: str) -> None:
    """This must hold for any number of partitions."""
    begin, end = Snapshot(2**40, 2**40, frozenset({2**39})), Snapshot(2**41, 2**41, frozenset({2**40 + 1}))
    async with await poll_source.connect_reader(postgres_url) as reader:
        for _ in range(10):
            await window.read_first(reader, begin.until(end, 0))
        planned = await reader.execute("SELECT sum(custom_plans), sum(generic_plans) > 0 FROM pg_prepared_statements")
        assert await planned.fetchone() == (0, True)
        assert await (await reader.execute("SHOW max_parallel_workers_per_gather")).fetchone() == ("0",)


async def rest_of(url: str, position: int = 0) -> list[window.Portion]:
    """Everything in the outbox after a position, read as the rest of one window."""
    async with await poll_source.connect_reader(url) as reader:
        row = await (await reader.execute(poll_source.LOOK)).fetchone()
        assert row is not None
        rest = window.WindowReader(reader)
        await rest.open(NOTHING.until(Snapshot.read(row[0]), position))
        portions = []
        while (portion := await rest.read()) is not None:
            portions.append(portion)
        await rest.close()
    return portions


async def test_a_windows_rest_has_its_order_across_partitions(postgres_url: str) -> None:
    """The state around midnight: transactions from before and after midnight end alternately."""
    rows = rows_of("pay_a", window.PORTION * 5 // 2)
    async with await psycopg.AsyncConnection.connect(postgres_url, autocommit=True) as connection:
        for name, day in (("outbox_today", 0), ("outbox 100%", 1)):
            bounds = f"FROM (current_date - {day}) TO (current_date - {day} + 1)"
            await connection.execute(f'CREATE TABLE "{name}" PARTITION OF outbox FOR VALUES {bounds}'.encode())
        await insert(connection, rows)
        await connection.execute("UPDATE outbox SET created_at = created_at - interval '1 day' WHERE position % 3 = 2")
        # An updated row lies physically behind all others.
        await connection.execute("UPDATE outbox SET source = source WHERE position % 7 = 0")
    first = await fetch_value(postgres_url, "SELECT min(position) FROM outbox")
    portions = await rest_of(postgres_url, first)
    assert [event.id.decode() for portion in portions for event in portion.events] == [str(row.id) for row in rows[1:]]
    assert portions[0].position == first + window.PORTION
    assert portions[-1].position == first + len(rows) - 1
    assert all(len(portion.events) <= window.PORTION for portion in portions)
    assert portions[0].written_us < portions[1].written_us, "the first row of the first portion is of yesterday"


async def test_a_portion_of_a_windows_rest_ends_with_the_event_that_fills_it(postgres_url: str) -> None:
    large = f'"{"x" * (PORTION_BYTES // 2 - 100)}"'
    rows = [row for number in range(4) for row in rows_of(f"pay_{number}", 2, payload=large)]
    await commit(postgres_url, *([row, *rows_of(f"small_{number}", 3)] for number, row in enumerate(rows)))
    portions = await rest_of(postgres_url)
    assert len(portions) == 3, "of 4 MiB each: two of them do not quite fill one, and the third does"
    for portion in portions:
        assert sum(len(event.payload) for event in portion.events[:-1]) < PORTION_BYTES


async def test_two_relays_of_a_moved_outbox_forget_its_transactions_once(config: RelayConfig) -> None:
    """Events written after the first relay started must not count as missing for it when the second relay starts."""
    other = replace(config, slot=f"{config.slot}_too")
    before, after = rows_of("pay_a", 5), rows_of("pay_a", 5, first=6)
    await commit(config.postgres_url, before)
    columns = "slot_name, system_identifier, source, repair"
    moved = f"INSERT INTO relay_slots ({columns}) VALUES (%s, 'another', 'poll', 'everything')"
    async with await psycopg.AsyncConnection.connect(config.postgres_url, autocommit=True) as connection:
        for slot_name in (config.slot, other.slot):
            await connection.execute(moved.encode(), [slot_name])
    async with running(config):
        await published(config, *before)
    await commit(config.postgres_url, after)
    async with running(other):
        await published(config, *before, *after)
    async with running(config):
        proven = "SELECT published_below > (SELECT max(xact) FROM outbox) FROM relay_slots WHERE slot_name = %s"
        await until(lambda: fetch_value(config.postgres_url, proven, config.slot))
        records = await published(config, *before, *after)
    assert ids(records).count(after[0].id) == 2, "each of them has published it"


async def test_a_connection_that_is_lost_while_a_window_is_read_is_given_up_without_a_warning(
    postgres_url: str,
) -> None:
    await commit(postgres_url, rows_of("pay_a", window.PORTION * 3))
    reader = await poll_source.connect_reader(postgres_url)
    rest = window.WindowReader(reader)
    await rest.open(NOTHING.until(Snapshot(2**40, 2**40, frozenset()), 0))
    assert await rest.read() is not None
    assert rest._ahead is not None
    await rest._ahead
    await fetch_value(postgres_url, "SELECT pg_terminate_backend(%s)", reader.info.backend_pid)
    await rest.abandon()
    assert rest._cursor.closed


async def test_it_wakes_at_once_and_not_by_a_tick(config: RelayConfig) -> None:
    async with running(replace(config, feedback_seconds=30)):
        warm, row = rows_of("pay_a", 2)
        await commit(config.postgres_url, [warm])
        await published(config, warm)
        await asyncio.sleep(0.2)
        began = time.monotonic()
        await commit(config.postgres_url, [row])
        await published(config, warm, row)
    assert time.monotonic() - began < 2, "a tick would have been 30 s"


@pytest.mark.usefixtures("window_is")
async def test_a_window_larger_than_a_portion_goes_on_where_it_was_left(
    config: RelayConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A window that was interrupted goes on after what was acknowledged, not from its beginning."""
    rows = [row for number in range(50) for row in rows_of(f"pay_{number}", 200)]
    await commit(config.postgres_url, *(rows[at : at + 500] for at in range(0, len(rows), 500)))
    # The relay sends slowly and saves often, so that the test can see a moment in the middle of the window.
    async with running(replace(config, unacknowledged_max=20, feedback_seconds=0.02)):
        query = "SELECT window_position > 2000 FROM relay_slots WHERE slot_name = %s"
        async with asyncio.timeout(30):
            while not await fetch_value(config.postgres_url, query, config.slot):
                await asyncio.sleep(0.01)
    async with running(config):
        records = await published(config, *rows)
    assert_first_deliveries_in_order(records, rows)
    assert len(records) < len(rows) + window.PORTION, "only what was not written down comes again"


async def test_no_snapshot_is_kept_while_kafka_takes_nothing(postgres_url: str, own_kafka: EmbeddedKafka) -> None:
    """While a snapshot is kept, VACUUM cannot remove rows that died since; Kafka may be away for long."""
    config = RelayConfig(
        postgres_url=postgres_url,
        kafka=own_kafka.access,
        topic="slow.events",
        slot=f"test_{uuid4().hex[:12]}",
        source="poll",
        unacknowledged_max=4500,
        feedback_seconds=0.1,
    )
    await ensure_topics(own_kafka.access, {config.topic: 8})
    rows = [row for number in range(50) for row in rows_of(f"pay_{number}", 200)]
    kept = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'relay' AND backend_xmin IS NOT NULL"
    async with running(config):
        with frozen(own_kafka.pid):
            await commit(postgres_url, rows)
            await until(lambda: metrics.UNACKNOWLEDGED._value.get() == 4500)
            await until(lambda: fetch_value(postgres_url, f"SELECT ({kept}) = 0"))
        records = await published(config, *rows)
    assert len(records) == len(rows)
    assert_first_deliveries_in_order(records, rows)
    drop_database(postgres_url)


async def test_notices_are_on_only_while_a_relay_polls(config: RelayConfig) -> None:
    assert not await fetch_value(config.postgres_url, NOTIFIES)
    async with running(config):
        assert await fetch_value(config.postgres_url, NOTIFIES)
    async with running(replace(config, source="wal")):
        assert not await fetch_value(config.postgres_url, NOTIFIES)


@wal_only
async def test_the_slot_of_a_wal_relay_survives_a_fail_over(config: RelayConfig) -> None:
    async with running(config):
        assert await slot(config, "failover")


async def test_a_switch_of_source_waits_for_no_long_writer_and_holds_nobody_up(config: RelayConfig) -> None:
    """The relay enables NOTIFY once no writer holds the table; until then it polls once a second."""
    rows = rows_of("pay_b", 20)
    async with running(replace(config, source="wal")):
        long = await open_transaction(config.postgres_url)
        await insert(long, rows_of("pay_a", 1))
    async with running(replace(config, feedback_seconds=1)):
        started = time.monotonic()
        await commit(config.postgres_url, *([row] for row in rows))
        assert time.monotonic() - started < 1
        await published(config, *rows)
        await long.rollback()
        await long.close()
        await until(lambda: fetch_value(config.postgres_url, NOTIFIES))


async def test_no_session_ends_because_a_long_writer_keeps_the_trigger_as_it_is(
    config: RelayConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The attempts must not disturb other queries on the leader's connection."""
    monkeypatch.setattr(session, "WATCH_SECONDS", 0.01)
    async with running(replace(config, source="wal")):
        await commit(config.postgres_url, rows_of("pay_a", 1))
    looks, switches = 0, 0
    look, switch = Lag.look_for_unread, set_notify

    async def counted_look(lag: Lag) -> None:
        nonlocal looks
        await look(lag)
        looks += 1

    async def counted_switch(leader: psycopg.AsyncConnection, *, is_on: bool) -> bool:
        nonlocal switches
        is_done = await switch(leader, is_on=is_on)
        switches += not is_done
        return is_done

    monkeypatch.setattr(Lag, "look_for_unread", counted_look)
    monkeypatch.setattr("infra.relay.poll.source.set_notify", counted_switch)
    ended = metrics.RECONNECTS.labels("postgres")._value.get()
    async with await psycopg.AsyncConnection.connect(config.postgres_url) as long:
        await insert(long, rows_of("pay_b", 1))
        async with running(config):
            await until(lambda: looks >= 10 and switches >= 5)
            assert metrics.RECONNECTS.labels("postgres")._value.get() == ended


async def test_rows_that_move_to_their_partition_while_a_relay_starts_are_not_passed_over(config: RelayConfig) -> None:
    """The relay's queries are planned while maintenance holds the lock of the default partition."""
    before, moved, after = (rows_of("pay_a", 3, first=first) for first in (1, 4, 7))
    async with running(config):
        await commit(config.postgres_url, before)
        await published(config, *before)
    await commit(config.postgres_url, moved)
    maintaining = await asyncpg.connect(config.postgres_url)
    attaching = maintaining.transaction()
    await attaching.start()
    assert await maintenance._attach(maintaining, datetime.now(UTC).date()) == 6
    stop = asyncio.Event()
    relay = asyncio.create_task(Relay(config).run(stop))
    waiting = "SELECT count(*) > 0 FROM pg_locks WHERE NOT granted"
    await until(lambda: fetch_value(config.postgres_url, waiting))
    await asyncio.sleep(0.2)
    await attaching.commit()
    await maintaining.close()
    await commit(config.postgres_url, after)
    records = await published(config, *before, *moved, *after)
    stop.set()
    await relay
    assert_first_deliveries_in_order(records, before + moved + after)
