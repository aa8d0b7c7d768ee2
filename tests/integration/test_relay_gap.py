"""No gap is passed silently: the relay stands still, reports which events may be missing; a repair publishes them."""

import asyncio
import contextlib
import re
from dataclasses import replace

import psycopg
import pytest
from aiokafka import AIOKafkaConsumer, TopicPartition

from app.relay_troubles import troubles_of
from infra.kafka.access import KafkaAccess
from infra.kafka.topics import ensure_topics
from infra.local import EmbeddedKafka, EmbeddedPostgres, postgres
from infra.relay import Relay, RelayConfig, metrics
from infra.relay import relay as relay_module
from infra.relay.leadership import LEADERSHIP, lock_key
from infra.relay.progress.checkpoint import Repair
from infra.relay.progress.gaps import NOT_IN_PUBLICATION, PUBLICATION_CHANGED, SLOT_AHEAD, SLOT_LOST
from infra.relay.progress.repairs import find_repair, request_repair
from infra.relay.progress.snapshot import Snapshot
from infra.relay.publish.replay import EventReplay, Selection
from infra.relay.status import Overview, RelayStatus, read_status
from tests.conftest import PARTITIONS, Topics
from tests.support.outbox import (
    Row,
    assert_first_deliveries_in_order,
    commit,
    complete,
    fetch_value,
    ids,
    insert,
    open_transaction,
    rows_of,
    set_database,
)
from tests.support.relay_source import PLAIN
from tests.support.relays import (
    ADVANCE,
    CREATE,
    DROP,
    StandingStill,
    is_all_proven,
    make_topic_anew,
    published,
    running,
    wal_only,
)
from tests.support.topic import read_until
from tests.support.waiting import until


async def before_the_gap(config: RelayConfig, rows: list[Row]) -> None:
    """Publish these rows, and let the relay save the proof that they are published."""
    async with running(config):
        await commit(config.postgres_url, *([row] for row in rows))
        await published(config, *rows)
        await asyncio.sleep(3 * config.feedback_seconds)


async def alter_publication(config: RelayConfig, change: str) -> None:
    async with await psycopg.AsyncConnection.connect(config.postgres_url, autocommit=True) as connection:
        await connection.execute(f"ALTER PUBLICATION {config.publication} {change}".encode())


async def write_unread(config: RelayConfig, rows: list[Row], *damages: str) -> None:
    """Commit these rows while no relay runs; then damage the slot."""
    await commit(config.postgres_url, *([row] for row in rows))
    for damage in damages:
        await fetch_value(config.postgres_url, damage, config.slot)


@wal_only
@pytest.mark.parametrize("style", ["SQL", "German", "Postgres"])
async def test_a_gap_is_told_and_status_too_whatever_the_databases_style_of_dates(
    config: RelayConfig, style: str
) -> None:
    await set_database(config.postgres_url, f"DateStyle = '{style}'")
    await before_the_gap(config, rows_of("pay_a", 1))
    await write_unread(config, rows_of("pay_a", 2, first=2), DROP)
    async with StandingStill(config) as standing:
        await until(lambda: "2 retained events have no proof" in standing.relay.health.detail)
        assert await standing.decide("unproven") == 2
        (status,) = (await read_status(config.postgres_url)).relays
        assert status.gap is None


@wal_only
@pytest.mark.parametrize(
    ("damages", "reason"),
    [
        ([DROP], "the slot has disappeared"),
        ([DROP, CREATE], "the slot stands further on than this relay ever confirmed"),
        ([ADVANCE], "the slot stands further on than this relay ever confirmed"),
    ],
    ids=["dropped", "recreated", "advanced"],
)
async def test_a_damaged_slot_is_noticed_and_a_repair_publishes_what_was_missed(
    config: RelayConfig, damages: list[str], reason: str
) -> None:
    before, missed, after = (rows_of("pay_a", 20, first=first) for first in (1, 21, 41))
    await before_the_gap(config, before)
    await write_unread(config, missed, *damages)
    async with StandingStill(config) as standing:
        health = standing.relay.health
        assert not health.ready
        assert reason in health.detail
        assert metrics.GAP._value.get() == 1
        assert 20 <= await standing.unproven() <= 25, "all that was missed, and hardly anything that was not"
        await commit(config.postgres_url, after)
        assert 20 <= await standing.decide("unproven") <= 45
        records = await published(config, *before, *missed, *after)
    assert_first_deliveries_in_order(records, before + missed + after)
    async with running(config):
        assert metrics.GAP._value.get() == 0


@wal_only
@pytest.mark.parametrize(
    ("damage", "mending"),
    [
        ("DROP TABLE outbox", "ADD TABLE outbox"),
        ("SET TABLE outbox WHERE (payment_seq < 0)", "SET TABLE outbox"),
        ("SET (publish = 'update')", "SET (publish = 'insert')"),
    ],
)
async def test_events_left_out_of_the_publication_are_noticed_and_published_by_a_repair(
    config: RelayConfig, damage: str, mending: str
) -> None:
    """The log does not show the omission, and restoring the publication does not bring the missed events back."""
    before, missed, after = (rows_of("pay_a", 5, first=first) for first in (1, 6, 11))
    await before_the_gap(config, before)
    async with running(replace(config, gap_seconds=0.1)) as relay:
        await alter_publication(config, damage)
        await commit(config.postgres_url, missed)
        await until(lambda: NOT_IN_PUBLICATION in relay.health.detail)
    async with StandingStill(config) as standing:
        await alter_publication(config, mending)
        await commit(config.postgres_url, after)
        await asyncio.sleep(0.5)
        assert NOT_IN_PUBLICATION in standing.relay.health.detail
        assert 10 <= await standing.decide("unproven") <= 15
        records = await published(config, *before, *missed, *after)
    assert_first_deliveries_in_order(records, before + missed + after)


@wal_only
@pytest.mark.parametrize("is_running", [False, True], ids=["while none runs", "before the next look"])
async def test_a_publication_that_is_whole_again_is_not_taken_for_one_that_always_was(
    config: RelayConfig, *, is_running: bool
) -> None:
    before, missed, after = (rows_of("pay_a", 5, first=first) for first in (1, 6, 11))
    await before_the_gap(config, before)
    async with contextlib.AsyncExitStack() as stack:
        if is_running:
            await stack.enter_async_context(running(replace(config, feedback_seconds=1, gap_seconds=0.1)))
        await alter_publication(config, "DROP TABLE outbox")
        await commit(config.postgres_url, missed)
        await alter_publication(config, "ADD TABLE outbox")
    async with StandingStill(config) as standing:
        assert PUBLICATION_CHANGED in standing.relay.health.detail
        await commit(config.postgres_url, after)
        await standing.decide("unproven")
        records = await published(config, *before, *missed, *after)
    assert_first_deliveries_in_order(records, before + missed + after)


@pytest.mark.parametrize("source", ["wal", PLAIN], indirect=True)
async def test_another_table_in_the_publication_is_none_of_ours(config: RelayConfig) -> None:
    before, after = (rows_of("pay_a", 5, first=first) for first in (1, 6))
    async with await psycopg.AsyncConnection.connect(config.postgres_url, autocommit=True) as connection:
        await connection.execute("CREATE TABLE stranger (id int PRIMARY KEY)")
    async with running(config):
        await commit(config.postgres_url, before)
        await alter_publication(config, "ADD TABLE stranger")
        await fetch_value(config.postgres_url, "INSERT INTO stranger VALUES (1) RETURNING id")
        await commit(config.postgres_url, after)
        records = await published(config, *before, *after)
    assert_first_deliveries_in_order(records, before + after)


@wal_only
async def test_an_adoption_does_not_wait_for_a_slot_that_is_made_later(config: RelayConfig) -> None:
    """Nobody has published the events up to the point where a later slot would start."""
    before, missed, after = (rows_of("pay_a", 5, first=first) for first in (1, 6, 11))
    await before_the_gap(config, before)
    await write_unread(config, missed, DROP)
    async with StandingStill(config) as standing:
        async with await psycopg.AsyncConnection.connect(config.postgres_url, autocommit=True) as connection:
            assert await request_repair(connection, config.slot, "adopt")
            await until(lambda: fetch_value(config.postgres_url, "SELECT repair IS NULL FROM relay_slots"))
        await fetch_value(config.postgres_url, CREATE, config.slot)
        await commit(config.postgres_url, after)
        await asyncio.sleep(0.5)
        assert not standing.relay.health.ready
        await standing.decide("unproven")
        records = await published(config, *before, *missed, *after)
    assert_first_deliveries_in_order(records, before + missed + after)


async def test_another_server_is_noticed_and_everything_retained_is_published(config: RelayConfig) -> None:
    rows = rows_of("pay_a", 10)
    await before_the_gap(config, rows)
    await fetch_value(config.postgres_url, "UPDATE relay_slots SET system_identifier = '1' RETURNING 1")
    async with StandingStill(config) as standing:
        assert "another Postgres server" in standing.relay.health.detail
        await until(lambda: "10 retained events" in standing.relay.health.detail)
        await standing.decide("unproven")
        await until(lambda: standing.relay.health.detail == "active")
        records = await published(config, *rows, *rows)
        while len(records) < 20:
            records = await published(config, *rows)
    assert sorted(ids(records)) == sorted([row.id for row in rows] * 2)


async def test_rows_of_another_servers_transactions_are_published_by_a_repair(config: RelayConfig) -> None:
    """After a dump and restore, the transaction ids of the rows and of the proof mean nothing."""
    known, late, more = rows_of("pay_a", 3), rows_of("pay_b", 3), rows_of("pay_a", 2, first=4)
    await before_the_gap(config, known)
    await commit(config.postgres_url, late)
    async with await psycopg.AsyncConnection.connect(config.postgres_url, autocommit=True) as connection:
        await connection.execute("UPDATE relay_slots SET system_identifier = '1', published_below = 1000000000")
        await connection.execute("UPDATE outbox SET xact = xact + 1000000000")
    async with StandingStill(config) as standing:
        await standing.decide("unproven")
        await commit(config.postgres_url, more)
        await published(config, *known, *late, *more)


@wal_only
async def test_a_count_that_takes_long_keeps_no_decision_waiting(
    config: RelayConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def counting(connection: psycopg.AsyncConnection, _: Snapshot) -> tuple[int, None, None]:
        await connection.execute("SELECT pg_sleep(300)")
        return 2, None, None

    monkeypatch.setattr(relay_module, "count_beyond", counting)
    await before_the_gap(config, rows_of("pay_a", 5))
    await write_unread(config, rows_of("pay_a", 2, first=6), DROP)
    async with StandingStill(config) as standing:
        assert await standing.decide("unproven") == 2


@wal_only
async def test_a_gap_stays_told_while_the_relay_looks_again_and_is_counted_once(
    config: RelayConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = []

    async def counting(connection: psycopg.AsyncConnection, published: Snapshot) -> tuple[int, None, None]:
        counts.append(published)
        return 5, None, None

    monkeypatch.setattr(relay_module, "count_beyond", counting)
    await before_the_gap(config, rows_of("pay_a", 5))
    await alter_publication(config, "DROP TABLE outbox")
    samples = set()
    async with StandingStill(config) as standing:
        await until(lambda: "5 retained events" in standing.relay.health.detail)
        ends = asyncio.get_running_loop().time() + 2
        while asyncio.get_running_loop().time() < ends:
            await asyncio.sleep(0)
            retained = [sample for metric in metrics.RETAINED_BYTES.collect() for sample in metric.samples]
            samples.add((standing.relay.health.detail[:3], metrics.GAP._value.get(), len(retained)))
        (told,) = (await read_status(config.postgres_url)).relays
    assert samples == {("gap", 1.0, 1)}
    assert len(counts) == 1
    assert not told.is_running
    assert not [each for metric in metrics.RETAINED_BYTES.collect() for each in metric.samples], (
        "a relay that is off knows nothing of its slot"
    )


async def test_the_lag_grows_while_a_relay_stands_before_a_gap(config: RelayConfig, topics: Topics) -> None:
    """The metric agrees with the lag that `status` shows."""
    waiting = metrics.LAG_SECONDS._value
    await before_the_gap(config, rows_of("pay_a", 3))
    await commit(config.postgres_url, rows_of("pay_a", 1, first=4))
    async with StandingStill(replace(config, topic=topics.dlq)) as standing:
        await until(lambda: waiting.get() > 0.5)
        before = waiting.get()
        await until(lambda: waiting.get() > before + 0.5)
        (told,) = (await read_status(config.postgres_url)).relays
        assert told.lag_seconds - 1 < waiting.get() <= told.lag_seconds + 1
        assert standing.relay.health.detail.startswith("gap")
    assert waiting.get() == 0, "it has stopped"


@wal_only
async def test_adopting_on_another_server_proves_nothing_about_its_transactions(config: RelayConfig) -> None:
    await before_the_gap(config, rows_of("pay_a", 3))
    there = "system_identifier = '1', published_below = 1000000000, publication = 'another'"
    await fetch_value(config.postgres_url, f"UPDATE relay_slots SET {there} RETURNING 1")
    async with StandingStill(config) as standing:
        await standing.decide("adopt")
        await until(lambda: standing.relay.health.detail == "active")
    assert await fetch_value(config.postgres_url, "SELECT published_below < 1000000000 FROM relay_slots")


@wal_only
@pytest.mark.parametrize("is_whole_again", [True, False])
async def test_events_left_out_of_the_publication_cannot_be_adopted(
    config: RelayConfig, *, is_whole_again: bool
) -> None:
    """Another reader of the slot in the meantime has not received those events either."""
    rows, missed = rows_of("pay_a", 5), rows_of("pay_a", 5, first=6)
    await before_the_gap(config, rows)
    await alter_publication(config, "DROP TABLE outbox")
    await commit(config.postgres_url, missed)
    if is_whole_again:
        await alter_publication(config, "ADD TABLE outbox")
    async with StandingStill(config) as standing:
        async with await psycopg.AsyncConnection.connect(config.postgres_url, autocommit=True) as connection:
            assert await request_repair(connection, config.slot, "adopt")
            await until(lambda: fetch_value(config.postgres_url, "SELECT repair IS NULL FROM relay_slots"))
        assert not standing.relay.health.ready
        if not is_whole_again:
            await alter_publication(config, "ADD TABLE outbox")
        await standing.decide("unproven")
        assert_first_deliveries_in_order(await published(config, *rows, *missed), rows + missed)


@wal_only
async def test_adopting_a_slot_that_somebody_else_moved_skips_what_it_has_passed(config: RelayConfig) -> None:
    before, theirs, after = (rows_of("pay_a", 5, first=first) for first in (1, 6, 11))
    await before_the_gap(config, before)
    await write_unread(config, theirs, ADVANCE)
    async with StandingStill(config) as standing:
        await standing.decide("adopt")
        await commit(config.postgres_url, after)
        records = await published(config, *before, *after)
    assert ids(records) == [row.id for row in before + after]


@wal_only
async def test_adopted_events_count_as_published_and_concurrent_ones_do_not(config: RelayConfig) -> None:
    """No later event arrives to prove them; and the other publisher has not had what commits after the adoption."""
    before, theirs, late = rows_of("pay_a", 3), rows_of("pay_a", 3, first=4), rows_of("pay_b", 2)
    await before_the_gap(config, before)
    async with await open_transaction(config.postgres_url) as under_way:
        await insert(under_way, late)
        await write_unread(config, theirs, ADVANCE)
        async with StandingStill(config) as standing:
            assert not await is_all_proven(config)
            await standing.decide("adopt")
            await until(lambda: is_all_proven(config))
        await under_way.commit()
    assert await StandingStill(config).unproven() == len(late)
    async with running(config):
        assert set(ids(await published(config, *before, *late))) == {row.id for row in before + late}


@wal_only
async def test_events_published_but_unproven_at_a_kill_are_left_to_the_next_relay(
    config: RelayConfig,
) -> None:
    """Otherwise events that are all on the topic would be reported as waiting until something else happens."""
    rows = rows_of("pay_a", 3)
    await before_the_gap(config, rows)
    earlier = "published_below = (SELECT min(xact) FROM outbox), window_begin = NULL"
    await fetch_value(config.postgres_url, f"UPDATE relay_slots SET {earlier} RETURNING 1")
    assert not await is_all_proven(config)
    async with running(config):
        await until(lambda: is_all_proven(config))
    assert len(await published(config, *rows)) == len(rows)


async def test_an_active_relay_cannot_be_told_to_adopt_or_repair(config: RelayConfig) -> None:
    async with (
        running(config),
        await psycopg.AsyncConnection.connect(config.postgres_url, autocommit=True) as connection,
    ):
        assert not await request_repair(connection, config.slot, "adopt")


async def test_a_relay_that_leads_for_a_moment_only_can_be_told(config: RelayConfig) -> None:
    """A relay that fails to become active leads for a moment, again and again."""
    async with running(config):
        pass
    connect = psycopg.AsyncConnection.connect
    async with await connect(config.postgres_url) as leader, await connect(config.postgres_url) as connection:
        await leader.execute("SELECT pg_advisory_lock(%s, %s)", lock_key(LEADERSHIP, config.slot))
        asking = asyncio.create_task(request_repair(connection, config.slot, "adopt"))
        await asyncio.sleep(0.1)
        assert not asking.done()
        await leader.execute("SELECT pg_advisory_unlock(%s, %s)", lock_key(LEADERSHIP, config.slot))
        assert await asking


@wal_only
async def test_the_slot_is_never_confirmed_beyond_what_was_written_down(config: RelayConfig) -> None:
    rows = rows_of("pay_a", 300)
    async with running(config):
        for row in rows:
            await commit(config.postgres_url, [row])
            query = """SELECT s.confirmed_flush_lsn <= r.confirmed_lsn FROM pg_replication_slots AS s
                         JOIN relay_slots AS r ON r.slot_name = s.slot_name::text WHERE r.slot_name = %s"""
            assert await fetch_value(config.postgres_url, query, config.slot)
        await published(config, *rows)


@wal_only
async def test_an_idle_relay_writes_nothing_down(config: RelayConfig) -> None:
    """Saving a position writes WAL, so an idle relay that saved would never come to rest."""
    query = "SELECT updated_at FROM relay_slots WHERE slot_name = %s"
    async with running(config):
        rows = rows_of("pay_a", 5)
        await commit(config.postgres_url, rows)
        await published(config, *rows)
        await asyncio.sleep(10 * config.feedback_seconds)
        written = await fetch_value(config.postgres_url, query, config.slot)
        await asyncio.sleep(10 * config.feedback_seconds)
        assert await fetch_value(config.postgres_url, query, config.slot) == written


async def test_the_source_can_be_changed_and_back(config: RelayConfig) -> None:
    """After each change no event is missing, and new events come in order."""
    other = replace(config, source="poll" if config.source == "wal" else "wal")
    first, second, third = (rows_of("pay_a", 20, first=at) for at in (1, 21, 41))
    await before_the_gap(config, first)
    await commit(config.postgres_url, second)
    async with running(other):
        await published(config, *first, *second)
        await asyncio.sleep(0.3)
    if config.source == "wal":  # An unread slot would retain WAL.
        await fetch_value(config.postgres_url, DROP, config.slot)
    await fetch_value(
        config.postgres_url, "UPDATE relay_slots SET source = 'poll' WHERE slot_name = %s RETURNING 1", config.slot
    )
    await commit(config.postgres_url, third)
    async with running(config):
        records = await published(config, *first, *second, *third)
    assert_first_deliveries_in_order(records, first + second + third)


async def published_beside_a_long_transaction(config: RelayConfig, rows: list[Row]) -> psycopg.AsyncConnection:
    """The transaction stays open after the relay ends. Creating a slot would have waited for it to end."""
    async with running(config):
        long = await open_transaction(config.postgres_url)
        await commit(config.postgres_url, rows)
        await published(config, *rows)
        await asyncio.sleep(3 * config.feedback_seconds)
    return long


async def test_events_published_beside_a_long_transaction_are_proven(config: RelayConfig) -> None:
    """No lag is reported, a replay includes them, and a repair would leave them out."""
    async with await published_beside_a_long_transaction(config, rows_of("pay_a", 5)):
        (told,) = (await read_status(config.postgres_url)).relays
        assert told.lag_seconds == 0
        assert await EventReplay(config, Selection(), topic=config.topic, rate=1).count() == 5
        assert await StandingStill(config).unproven() == 0


@wal_only
async def test_a_repair_after_a_long_transaction_repeats_nothing_and_skips_nothing(config: RelayConfig) -> None:
    rows, late, missed = rows_of("pay_a", 5), rows_of("pay_b", 2), rows_of("pay_a", 5, first=6)
    async with await published_beside_a_long_transaction(config, rows) as long:
        await insert(long, late)
    await write_unread(config, missed, DROP)
    async with StandingStill(config) as standing:
        assert await standing.decide("unproven") == 7
        records = await published(config, *rows, *late, *missed)
    assert sorted(ids(records)) == sorted(row.id for row in rows + late + missed)


async def test_a_relay_with_another_topic_does_not_go_on_where_this_one_ended(
    config: RelayConfig, topics: Topics
) -> None:
    rows, late = rows_of("pay_a", 5), rows_of("pay_a", 5, first=6)
    await before_the_gap(config, rows)
    await commit(config.postgres_url, late)
    async with StandingStill(replace(config, topic=topics.dlq)) as standing:
        assert f"went to topic {config.topic}" in standing.relay.health.detail
    async with running(config):
        assert_first_deliveries_in_order(await published(config, *rows, *late), rows + late)
        assert await fetch_value(config.postgres_url, "SELECT gap IS NULL FROM relay_slots")


async def test_a_relay_with_another_kafka_cluster_does_not_go_on_where_this_one_ended(
    config: RelayConfig, topics: Topics, own_kafka: EmbeddedKafka
) -> None:
    """This also happens when Kafka loses its data and comes back empty at the same address."""
    rows, late = rows_of("pay_a", 5), rows_of("pay_a", 5, first=6)
    await before_the_gap(config, rows)
    # The state after an upgrade from a version that did not record the cluster.
    await fetch_value(config.postgres_url, "UPDATE relay_slots SET kafka_cluster = NULL RETURNING 1")
    async with running(config):
        pass
    await commit(config.postgres_url, late)
    elsewhere = replace(config, kafka=own_kafka.access)
    await ensure_topics(elsewhere.kafka, {config.topic: PARTITIONS})
    async with StandingStill(elsewhere) as standing:
        assert "went to Kafka cluster " in standing.relay.health.detail
        assert "set PAYMENTS_KAFKA_BOOTSTRAP back" in standing.relay.health.detail
    await ensure_topics(elsewhere.kafka, {topics.dlq: PARTITIONS})
    async with StandingStill(replace(elsewhere, topic=topics.dlq)) as standing:
        assert "went to Kafka cluster " in standing.relay.health.detail
        assert "set PAYMENTS_EVENTS_TOPIC and PAYMENTS_KAFKA_BOOTSTRAP back" in standing.relay.health.detail
    async with running(config):
        assert_first_deliveries_in_order(await published(config, *rows, *late), rows + late)
    async with StandingStill(elsewhere) as standing:
        await standing.decide("everything")
        assert_first_deliveries_in_order(await published(elsewhere, *rows, *late), rows + late)
    async with running(elsewhere):
        assert await fetch_value(config.postgres_url, "SELECT gap IS NULL FROM relay_slots")


async def test_a_running_relay_publishes_nothing_to_another_kafka_behind_its_address(
    config: RelayConfig, own_kafka: EmbeddedKafka
) -> None:
    """The session would survive the reconnect, and count what the other Kafka acknowledges as published."""
    config = replace(config, kafka=own_kafka.access)
    rows, late = rows_of("pay_a", 5), rows_of("pay_a", 5, first=6)
    await ensure_topics(config.kafka, {config.topic: PARTITIONS})
    async with running(config) as relay:
        await commit(config.postgres_url, rows)
        await published(config, *rows)
        await until(lambda: is_all_proven(config))
        await asyncio.to_thread(exchange_data, own_kafka, away="the first", back="another")
        await ensure_topics(config.kafka, {config.topic: PARTITIONS})
        await commit(config.postgres_url, late)
        await until(lambda: "went to Kafka cluster " in relay.health.detail)
        assert not await is_all_proven(config)
        assert await count_records(config) == 0
        await asyncio.to_thread(exchange_data, own_kafka, away="another", back="the first")
        await until(lambda: relay.health.detail == "active")
        assert_first_deliveries_in_order(await published(config, *rows, *late), rows + late)


def exchange_data(kafka: EmbeddedKafka, *, away: str, back: str) -> None:
    """Kill Kafka and restart it at the same address with other data: the first time none, and another cluster id."""
    kafka.kill()
    data, stamp = kafka.data_dir / kafka.name / "log", kafka.data_dir / kafka.name / "formatted"
    data.rename(data.with_name(away))
    if data.with_name(back).exists():
        data.with_name(back).rename(data)
    else:
        stamp.unlink()
    kafka.restart()


@pytest.mark.parametrize("is_running", [True, False], ids=["while it runs", "while it is off"])
async def test_a_topic_that_is_made_anew_is_noticed_and_everything_retained_is_published(
    config: RelayConfig, is_running: bool
) -> None:
    """It has as many partitions and takes events as before, but those that were on it are gone."""
    config = replace(config, topic=f"{config.topic}.own")
    await ensure_topics(config.kafka, {config.topic: PARTITIONS})
    rows, late = rows_of("pay_a", 5), rows_of("pay_a", 5, first=6)
    async with contextlib.AsyncExitStack() as stack:
        await before_the_gap(config, rows)
        if is_running:
            relay = await stack.enter_async_context(running(config))
            await make_topic_anew(config, PARTITIONS)
            await commit(config.postgres_url, late)
            await until(lambda: relay.health.detail.startswith("gap"), timeout_seconds=30)
        else:
            await make_topic_anew(config, PARTITIONS)
            await commit(config.postgres_url, late)
    async with StandingStill(config) as standing:
        assert "Kafka has lost events that it had acknowledged: partition " in standing.relay.health.detail
        assert "`payments relay repair --everything`" in standing.relay.health.detail
        await until(lambda: "10 retained events have no proof of publication" in standing.relay.health.detail)
        assert await standing.unproven() == 10
        await standing.decide("everything")
        records = await published(config, *rows, *late)
        assert set(ids(records)) == {row.id for row in rows + late}
        await until(lambda: is_all_proven(config))
    async with running(config):  # The offsets from before count no more.
        last = rows_of("pay_a", 1, first=11)
        await commit(config.postgres_url, last)
        await published(config, *last)


async def test_lost_events_can_be_let_go(config: RelayConfig) -> None:
    config = replace(config, topic=f"{config.topic}.own")
    await ensure_topics(config.kafka, {config.topic: PARTITIONS})
    rows, late, last = (rows_of("pay_a", 5, first=first) for first in (1, 6, 11))
    await before_the_gap(config, rows)
    await make_topic_anew(config, PARTITIONS)
    await commit(config.postgres_url, late)
    async with StandingStill(config) as standing:
        await standing.decide("adopt")
    async with running(config):
        await commit(config.postgres_url, last)
        assert not set(ids(await published(config, *last))) & {row.id for row in rows}


async def count_records(config: RelayConfig) -> int:
    async with AIOKafkaConsumer(bootstrap_servers=config.kafka.bootstrap) as consumer:
        partitions = [TopicPartition(config.topic, number) for number in range(PARTITIONS)]
        return sum((await consumer.end_offsets(partitions)).values())


async def test_a_change_of_topic_that_somebody_confirms_repeats_and_skips_nothing(
    config: RelayConfig, topics: Topics
) -> None:
    rows, late = rows_of("pay_a", 5), rows_of("pay_a", 5, first=6)
    await before_the_gap(config, rows)
    await commit(config.postgres_url, late)
    async with StandingStill(replace(config, topic=topics.dlq)) as standing:
        await standing.decide("adopt")
        records = await read_until(config.kafka.bootstrap, topics.dlq, complete(late))
    assert ids(records) == [row.id for row in late]
    async with running(replace(config, topic=topics.dlq)):
        pass


@wal_only
@pytest.mark.parametrize("damage", ["slot", "publication"])
async def test_another_topic_hides_no_other_reason(config: RelayConfig, topics: Topics, damage: str) -> None:
    """An operator who adopts the new topic must also learn that events were left out."""
    rows, missed = rows_of("pay_a", 5), rows_of("pay_a", 5, first=6)
    await before_the_gap(config, rows)
    if damage == "slot":
        await write_unread(config, missed, ADVANCE)
    else:
        await alter_publication(config, "DROP TABLE outbox")
        await commit(config.postgres_url, missed)
        await alter_publication(config, "ADD TABLE outbox")
    async with StandingStill(replace(config, topic=topics.dlq)) as standing:
        reason = SLOT_AHEAD if damage == "slot" else PUBLICATION_CHANGED
        assert f"went to topic {config.topic}, " in standing.relay.health.detail
        assert f"; and {reason}" in standing.relay.health.detail
        async with await psycopg.AsyncConnection.connect(config.postgres_url, autocommit=True) as connection:
            assert await request_repair(connection, config.slot, "adopt")
            await until(lambda: fetch_value(config.postgres_url, "SELECT repair IS NULL FROM relay_slots"))
        await until(lambda: standing.relay.health.detail.startswith("gap"))
    async with StandingStill(config) as standing:
        assert reason in standing.relay.health.detail
        await standing.decide("unproven")
        assert_first_deliveries_in_order(await published(config, *rows, *missed), rows + missed)


@pytest.fixture
def little_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Postgres that keeps next to no WAL for a slot: a command-line setting, so it is made before the start."""
    monkeypatch.setitem(postgres.SETTINGS, "max_slot_wal_keep_size", "1MB")


@pytest.mark.usefixtures("little_log")
async def test_a_lost_slot_is_a_gap_that_a_repair_closes(
    own_postgres: EmbeddedPostgres, kafka_bootstrap: str, topics: Topics
) -> None:
    config = RelayConfig(
        postgres_url=own_postgres.url, kafka=KafkaAccess(kafka_bootstrap), topic=topics.events, feedback_seconds=0.1
    )
    rows, missed = rows_of("pay_a", 5), rows_of("pay_a", 5, first=6)
    await before_the_gap(config, rows)
    await commit(config.postgres_url, missed)
    await write_until(config.postgres_url, "unreserved", "SELECT pg_switch_wal()")
    assert any("raise max_slot_wal_keep_size" in each for each in troubles_of(await read_status(config.postgres_url)))
    await write_until(config.postgres_url, "lost", "SELECT pg_switch_wal()", "CHECKPOINT")
    (lost,) = (await read_status(config.postgres_url)).relays
    polled = replace(lost, source="poll", is_running=True)
    (told,) = troubles(polled)
    assert "the slot that it had before is lost" in told, "a poll goes on without it"
    async with StandingStill(config) as standing:
        assert SLOT_LOST in standing.relay.health.detail
        assert await standing.decide("unproven") == 5
        assert_first_deliveries_in_order(await published(config, *rows, *missed), rows + missed)


@pytest.mark.usefixtures("little_log")
async def test_a_transaction_that_holds_the_log_of_a_slot_though_all_is_read_is_told(
    own_postgres: EmbeddedPostgres, kafka_bootstrap: str, topics: Topics
) -> None:
    """The transaction may be in another database. Starting a relay or checking Kafka would not help."""
    url = own_postgres.url
    config = RelayConfig(
        postgres_url=url, kafka=KafkaAccess(kafka_bootstrap), topic=topics.events, feedback_seconds=0.1
    )
    async with running(config):
        async with await psycopg.AsyncConnection.connect(own_postgres.url_of("postgres")) as long:
            await long.execute("CREATE TABLE of_a_batch ()")
            await write_until(url, "unreserved", "SELECT pg_switch_wal()")
            await until(lambda: fetch_value(url, IS_READ))
            (status,) = (await read_status(url)).relays
            (told,) = troubles(status)
            assert "raise max_slot_wal_keep_size" in told
            assert "an open transaction that has written something holds it" in told
            in_time = replace(status, slot_state="active, extended")
            assert not troubles(in_time), "soon it ends by itself"
            assert troubles(replace(in_time, retained_bytes=2**31))[0].endswith(
                told[told.index("an open transaction") :]
            )
            assert not troubles(replace(in_time, retained_bytes=2**31, lag_bytes=2**31)), "it lags"
            (query,) = re.findall("SELECT pid, .* ORDER BY xact_start", told)
            assert await fetch_value(url, query) == long.info.backend_pid
            await long.rollback()

        async def is_let_go() -> bool:
            await fetch_value(url, "SELECT pg_log_standby_snapshot()")
            await fetch_value(url, "SELECT pg_logical_emit_message(false, 'none', repeat('x', 1100000))")
            return not troubles_of(await read_status(url))

        await until(is_let_go)


IS_READ = """
    SELECT pg_current_wal_lsn() - confirmed_flush_lsn < (pg_current_wal_lsn() - restart_lsn) / 2
      FROM pg_replication_slots
"""


def troubles(relay: RelayStatus) -> list[str]:
    return troubles_of(Overview(relays=[relay], starting=[], strangers=[], last_event_at=None))


async def write_until(url: str, wal_status: str, *statements: str) -> None:
    """Write more WAL than the server may keep for the slot, until the slot has this status."""
    async with await psycopg.AsyncConnection.connect(url, autocommit=True) as connection:
        while not await fetch_value(url, "SELECT wal_status = %s FROM pg_replication_slots", wal_status):
            for statement in ("SELECT pg_logical_emit_message(true, 'none', 'whose')", *statements):
                await connection.execute(statement.encode())


@wal_only
async def test_a_slot_that_somebody_else_is_making_is_waited_for(config: RelayConfig) -> None:
    rows, late = rows_of("pay_a", 5), rows_of("pay_a", 5, first=6)
    await before_the_gap(config, rows)
    await fetch_value(config.postgres_url, DROP, config.slot)
    async with await open_transaction(config.postgres_url) as long:
        making = asyncio.create_task(fetch_value(config.postgres_url, CREATE, config.slot))
        query = "SELECT confirmed_flush_lsn IS NULL FROM pg_replication_slots WHERE slot_name = %s"
        await until(lambda: fetch_value(config.postgres_url, query, config.slot))
        relay, stop = Relay(replace(config, gap_seconds=0.1)), asyncio.Event()
        task = asyncio.create_task(relay.run(stop))
        await until(lambda: relay.health.detail == "standby")
        await long.rollback()
    await making
    await until(lambda: relay.health.detail.startswith(f"gap: {SLOT_AHEAD}"))
    async with await psycopg.AsyncConnection.connect(config.postgres_url, autocommit=True) as connection:
        await request_repair(connection, config.slot, "unproven")
    await commit(config.postgres_url, late)
    assert_first_deliveries_in_order(await published(config, *rows, *late), rows + late)
    stop.set()
    await task


async def test_a_restored_outbox_is_published_in_order_though_some_of_its_ids_are_of_the_past_here(
    config: RelayConfig,
) -> None:
    rows = rows_of("pay_a", 6)
    await commit(config.postgres_url, *([row] for row in rows))
    future = "UPDATE outbox SET xact = xact + 1000000 WHERE payment_seq > 3 RETURNING 1"
    await fetch_value(config.postgres_url, future)
    async with running(config):
        assert_first_deliveries_in_order(await published(config, *rows), rows)


async def test_a_restored_outbox_is_published_whatever_the_ids_of_its_transactions(config: RelayConfig) -> None:
    """The other server had counted further than this one, and its `relay_slots` row was not restored."""
    theirs, ours = rows_of("pay_a", 5), rows_of("pay_b", 5)
    await commit(config.postgres_url, theirs)
    await fetch_value(config.postgres_url, "UPDATE outbox SET xact = xact + 1000000000 RETURNING 1")
    async with running(config):
        await commit(config.postgres_url, ours)
        assert_first_deliveries_in_order(await published(config, *theirs, *ours), theirs + ours)
        await until(lambda: is_all_proven(config))


async def test_on_another_server_nothing_counts_as_published(config: RelayConfig) -> None:
    """A replay leaves out events without a first delivery here; a dry run counts those that a repair will publish."""
    await before_the_gap(config, rows_of("pay_a", 5))
    await fetch_value(config.postgres_url, "UPDATE relay_slots SET system_identifier = '1' RETURNING 1")
    assert await StandingStill(config).unproven() == 5
    assert await EventReplay(config, Selection(), topic=config.topic, rate=1).count() == 0
    (told,) = (await read_status(config.postgres_url)).relays
    assert told.lag_seconds > 0


@wal_only
async def test_before_the_gap_of_another_server_it_is_told_how_long_events_wait(config: RelayConfig) -> None:
    """It does not matter how high the other server's transaction ids were. The metric shows the wait, too."""
    await before_the_gap(config, rows_of("pay_a", 5))
    there = "system_identifier = '1', published_below = 1000000000, window_begin = '1000000000:1000000000:'"
    await fetch_value(config.postgres_url, f"UPDATE relay_slots SET {there} RETURNING 1")
    async with StandingStill(config) as standing:
        await until(lambda: "another Postgres server" in standing.relay.health.detail)
        await until(lambda: metrics.LAG_SECONDS._value.get() > 0.5)
        (told,) = (await read_status(config.postgres_url)).relays
        assert told.lag_seconds > 0.5


async def test_an_event_that_a_synchronous_standby_holds_back_is_proven_in_the_end(
    own_postgres: EmbeddedPostgres, kafka_bootstrap: str, topics: Topics
) -> None:
    """The event is in the log, and on the topic, long before any snapshot sees it; no other event comes after it."""
    config = RelayConfig(
        postgres_url=own_postgres.url, kafka=KafkaAccess(kafka_bootstrap), topic=topics.events, feedback_seconds=0.1
    )
    row = rows_of("pay_a", 1)
    async with running(config):
        await set_synchronous_standby(config.postgres_url, "nobody")
        committing = asyncio.create_task(commit(config.postgres_url, row))
        await published(config, *row)
        await asyncio.sleep(5 * config.feedback_seconds)
        assert not await fetch_value(config.postgres_url, "SELECT count(*) FROM outbox")
        await set_synchronous_standby(config.postgres_url, "")
        await committing
        await until(lambda: is_all_proven(config))


async def set_synchronous_standby(url: str, name: str) -> None:
    async with await psycopg.AsyncConnection.connect(url, autocommit=True) as connection:
        await connection.execute("SET synchronous_commit = local")
        # The relay's own writes must not wait for the standby, which does not exist.
        await connection.execute(f"ALTER SYSTEM SET synchronous_standby_names = '{name}'".encode())
        await connection.execute("SELECT pg_reload_conf()")


@pytest.mark.parametrize(("first", "second"), [("unproven", "adopt"), ("everything", "unproven")], ids=str)
async def test_a_pending_repair_request_is_not_replaced_by_another(
    config: RelayConfig, first: Repair, second: Repair
) -> None:
    """A repair may be half done: adopting at that point would skip the other half."""
    await before_the_gap(config, rows_of("pay_a", 3))
    async with await psycopg.AsyncConnection.connect(config.postgres_url, autocommit=True) as connection:
        for repair, is_taken in ((first, True), (second, False), (first, True)):
            assert await request_repair(connection, config.slot, repair) == is_taken
        assert (await find_repair(connection, config.slot))[1] == first


async def test_all_that_is_retained_has_in_it_what_is_not_proven(config: RelayConfig) -> None:
    await before_the_gap(config, rows_of("pay_a", 3))
    connect = psycopg.AsyncConnection.connect
    async with await connect(config.postgres_url, autocommit=True) as connection:
        assert await request_repair(connection, config.slot, "unproven")
        async with await connect(config.postgres_url) as leader:
            await leader.execute("SELECT pg_advisory_lock(%s, %s)", lock_key(LEADERSHIP, config.slot))
            assert not await request_repair(connection, config.slot, "everything"), "the first repair has begun"
        assert await request_repair(connection, config.slot, "everything")


@pytest.mark.parametrize("source", ["poll"], indirect=True)
async def test_adopting_a_new_topic_when_the_log_is_read_instead_of_the_table_leaves_nothing_out(
    config: RelayConfig,
) -> None:
    """The slot is our own, from before; nobody else has moved it."""
    before, missed = rows_of("pay_a", 3), rows_of("pay_a", 5, first=4)
    await before_the_gap(config, before)
    await commit(config.postgres_url, missed)
    await fetch_value(config.postgres_url, CREATE, config.slot)
    moved = replace(config, source="wal", topic=f"{config.topic}.new")
    await ensure_topics(config.kafka, {moved.topic: PARTITIONS})
    async with StandingStill(moved) as standing:
        assert "further on" not in standing.relay.health.detail
        await standing.decide("adopt")
        records = await published(moved, *missed)
    assert_first_deliveries_in_order(records, missed)


@pytest.mark.parametrize("is_slot_gone", [True, False])
async def test_a_repair_that_was_asked_for_does_not_open_a_mistyped_topic(
    config: RelayConfig, *, is_slot_gone: bool
) -> None:
    before, missed = rows_of("pay_a", 3), rows_of("pay_a", 3, first=4)
    await before_the_gap(config, before)
    if is_slot_gone and config.source == "wal":
        await fetch_value(config.postgres_url, DROP, config.slot)
    await commit(config.postgres_url, missed)
    async with await psycopg.AsyncConnection.connect(config.postgres_url, autocommit=True) as connection:
        assert await request_repair(connection, config.slot, "unproven")
    mistyped = replace(config, topic=f"{config.topic}.typo")
    await ensure_topics(config.kafka, {mistyped.topic: PARTITIONS})
    async with StandingStill(mistyped) as standing:
        assert "the events before went to topic" in standing.relay.health.detail
    async with running(config):
        assert_first_deliveries_in_order(await published(config, *before, *missed), before + missed)


@wal_only
async def test_a_publication_of_a_schema_that_left_it_out_for_a_while_is_noticed(config: RelayConfig) -> None:
    of_schema = "FOR TABLES IN SCHEMA public WITH (publish = 'insert', publish_via_partition_root = true)"
    async with await psycopg.AsyncConnection.connect(config.postgres_url, autocommit=True) as connection:
        await connection.execute(f"DROP PUBLICATION {config.publication}".encode())
        await connection.execute(f"CREATE PUBLICATION {config.publication} {of_schema}".encode())
    before, missed = rows_of("pay_a", 3), rows_of("pay_a", 3, first=4)
    await before_the_gap(config, before)
    await alter_publication(config, "DROP TABLES IN SCHEMA public")
    await commit(config.postgres_url, missed)
    await alter_publication(config, "ADD TABLES IN SCHEMA public")
    async with StandingStill(config) as standing:
        assert "the publication was changed" in standing.relay.health.detail
        await standing.decide("unproven")
        assert_first_deliveries_in_order(await published(config, *before, *missed), before + missed)


async def test_a_relay_that_cannot_save_progress_does_not_republish(config: RelayConfig) -> None:
    rows, more = rows_of("pay_a", 3), rows_of("pay_a", 50, first=4)
    await before_the_gap(config, rows)
    await commit(config.postgres_url, more)
    task, stop = None, asyncio.Event()
    async with await psycopg.AsyncConnection.connect(config.postgres_url) as forgotten:
        await forgotten.execute("SELECT FROM relay_slots FOR UPDATE")
        ended = metrics.RECONNECTS.labels("postgres")._value.get()
        task = asyncio.create_task(Relay(config).run(stop))
        await until(lambda: metrics.RECONNECTS.labels("postgres")._value.get() > ended)
    await published(config, *more)
    stop.set()
    await task
    async with running(config):
        last = rows_of("pay_b", 1)
        await commit(config.postgres_url, last)
        records = await published(config, *last)
    assert len(records) == len(rows + more + last)


async def test_a_record_of_progress_that_is_deleted_is_begun_anew(config: RelayConfig) -> None:
    rows, more = rows_of("pay_a", 3), rows_of("pay_a", 3, first=4)
    async with running(config):
        await commit(config.postgres_url, rows)
        await published(config, *rows)
        await until(lambda: fetch_value(config.postgres_url, "SELECT published_below > 1 FROM relay_slots"))
        await fetch_value(config.postgres_url, "DELETE FROM relay_slots RETURNING 1")
        await commit(config.postgres_url, more)
        await until(lambda: fetch_value(config.postgres_url, "SELECT count(*) = 1 FROM relay_slots"))
        assert_first_deliveries_in_order(await published(config, *more), rows + more)


@wal_only
async def test_another_table_of_the_outboxs_name_is_none_of_ours(config: RelayConfig) -> None:
    rows, more = rows_of("pay_a", 3), rows_of("pay_a", 3, first=4)
    async with await psycopg.AsyncConnection.connect(config.postgres_url, autocommit=True) as connection:
        await connection.execute("CREATE SCHEMA archive")
        await connection.execute("CREATE TABLE archive.outbox (LIKE public.outbox INCLUDING DEFAULTS)")
        await connection.execute("CREATE SCHEMA other")
        await connection.execute("CREATE TABLE other.outbox (id int PRIMARY KEY)")
        await alter_publication(config, "ADD TABLE archive.outbox, other.outbox")
        async with running(config):
            await commit(config.postgres_url, rows)
            await connection.execute("INSERT INTO archive.outbox SELECT * FROM public.outbox")
            await connection.execute("INSERT INTO other.outbox VALUES (1)")
            await commit(config.postgres_url, more)
            records = await published(config, *more)
    assert ids(records) == [row.id for row in rows + more]
