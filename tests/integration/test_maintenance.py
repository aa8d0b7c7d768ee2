"""The outbox's partitions: created, filled without publishing events again, and dropped only when nobody needs them."""

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Any

import asyncpg
import pytest
from structlog.testing import capture_logs
from typer.testing import CliRunner

from app.cli import app
from app.maintenance import LAST_SUCCESS, Maintenance, maintain_once
from app.settings import Settings
from infra.postgres import maintenance
from infra.postgres.maintenance import MaintenanceReport, maintain
from infra.postgres.pool import IDLE_IN_TRANSACTION_MS
from infra.relay.wal.stream import ReplicationStream
from tests.conftest import Topics
from tests.support.outbox import set_database

SLOW_MOVE = """
    CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM pg_sleep(0.004); RETURN NULL; END $$;
    CREATE TRIGGER slow AFTER DELETE ON outbox_default FOR EACH ROW EXECUTE FUNCTION slow();
"""
PUBLICATION = "'proto_version', '1', 'publication_names', 'payments_outbox'"


@pytest.fixture
async def connection(postgres_url: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(postgres_url)
    yield connection
    await connection.close()


async def insert(connection: asyncpg.Connection, name: str, at: datetime | None = None) -> None:
    """One event whose `aggregateid` is `name`."""
    await connection.execute(
        """INSERT INTO outbox (id, aggregateid, type, payload, payment_seq, occurred_at, created_at)
           VALUES (gen_random_uuid(), $1, 't', '{}', 1, 'now', coalesce($2, now()))""",
        name,
        at,
    )


async def partitions(connection: asyncpg.Connection) -> list[str]:
    return [row["relname"] for row in await connection.fetch(maintenance.PARTITIONS)]


async def where(connection: asyncpg.Connection) -> dict[str, str]:
    rows = await connection.fetch("SELECT aggregateid, tableoid::regclass::text AS place FROM outbox")
    return {row["aggregateid"]: row["place"] for row in rows}


def assert_busy(report: MaintenanceReport, what: str) -> None:
    """Assert that this, and nothing else, failed to get its lock."""
    assert report == MaintenanceReport((), 0, (), (), (f"{what}: canceling statement due to lock timeout",))


def last_success() -> float:
    """The gauge as Prometheus would scrape it."""
    (metric,) = LAST_SUCCESS.collect()
    return metric.samples[0].value


def today() -> date:
    """The current day, read at each call, because a run may continue past midnight."""
    return datetime.now(UTC).date()


def name_of(day: date) -> str:
    return f"outbox_{day:%Y%m%d}"


def noon(day: date) -> datetime:
    return datetime(day.year, day.month, day.day, 12, tzinfo=UTC)


async def test_partitions_are_made_ahead_and_only_once(postgres_url: str, connection: asyncpg.Connection) -> None:
    days = tuple(today() + timedelta(days=n) for n in range(4))
    assert await maintain(postgres_url, days_ahead=3, retention_days=14) == MaintenanceReport(days, 0, (), ())
    assert await partitions(connection) == [*map(name_of, days), "outbox_default"]
    assert await maintain(postgres_url, days_ahead=3, retention_days=14) == MaintenanceReport((), 0, (), ())
    assert (await maintain(postgres_url, days_ahead=4, retention_days=14)).made == (today() + timedelta(days=4),)


async def test_a_partition_holds_exactly_its_utc_day(postgres_url: str, connection: asyncpg.Connection) -> None:
    await maintain(postgres_url, days_ahead=1, retention_days=14)
    midnight = noon(today()) - timedelta(hours=12)
    moment, day = timedelta(microseconds=1), timedelta(days=1)
    places = {
        "before": (midnight - moment, "outbox_default"),
        "first": (midnight, name_of(today())),
        "last": (midnight + day - moment, name_of(today())),
        "next": (midnight + day, name_of(today() + day)),
    }
    for name, (at, _) in places.items():
        await insert(connection, name, at)
    assert await where(connection) == {name: place for name, (_, place) in places.items()}


async def test_a_partition_is_like_the_rest(postgres_url: str, connection: asyncpg.Connection) -> None:
    await maintain(postgres_url, days_ahead=0, retention_days=14)
    with pytest.raises(asyncpg.CheckViolationError):
        await connection.execute(
            "INSERT INTO outbox (id, aggregateid, type, payload, payment_seq, occurred_at)"
            " VALUES (gen_random_uuid(), 'x', 't', 'not json', 1, 'now')"
        )
    attached = "SELECT count(*) FROM pg_inherits WHERE inhparent = 'outbox_aggregate'::regclass"
    assert await connection.fetchval(attached) == len(await partitions(connection))


async def test_stranded_rows_move_to_the_partition_of_their_day(
    postgres_url: str, connection: asyncpg.Connection
) -> None:
    await insert(connection, "today")
    await insert(connection, "yesterday", noon(today() - timedelta(days=1)))
    await insert(connection, "far", noon(today() + timedelta(days=40)))
    before = await connection.fetch("SELECT * FROM outbox ORDER BY id")
    report = await maintain(postgres_url, days_ahead=0, retention_days=14)
    assert report.moved_rows == 3
    assert report.made == (today(), today() - timedelta(days=1), today() + timedelta(days=40))
    assert await where(connection) == {
        "today": name_of(today()),
        "yesterday": name_of(today() - timedelta(days=1)),
        "far": name_of(today() + timedelta(days=40)),
    }
    assert await connection.fetch("SELECT * FROM outbox ORDER BY id") == before


async def test_rows_that_take_long_to_move_do_so_in_portions(
    postgres_url: str, connection: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No statement takes longer than one portion, and during the move every row is visible exactly once."""
    monkeypatch.setattr(maintenance, "PORTION_PAGES", 1)
    monkeypatch.setattr(maintenance, "COMMAND_TIMEOUT_SECONDS", 0.6)
    yesterday = today() - timedelta(days=1)
    for number in range(500):
        await insert(connection, str(number), noon(yesterday if number % 2 else today()))
    assert await connection.fetchval(maintenance.DEFAULT_PAGES) > 5
    await connection.execute(SLOW_MOVE)  # slow enough that each day takes a second
    maintaining = asyncio.create_task(maintain(postgres_url, days_ahead=0, retention_days=14))
    while not maintaining.done():
        assert await connection.fetchval("SELECT count(*) FROM outbox") == 500
        await asyncio.sleep(0.05)
    assert maintaining.result() == MaintenanceReport((today(), yesterday), 500, (), ())
    assert set((await where(connection)).values()) == {name_of(today()), name_of(yesterday)}


async def test_a_day_that_cannot_be_moved_holds_up_neither_coming_days_nor_retention(
    aged: "Aged", subscriber: Any, connection: asyncpg.Connection
) -> None:
    bad = today() - timedelta(days=30)
    await insert(connection, "stays", noon(bad))
    await insert(connection, "moves", noon(bad + timedelta(days=1)))
    await connection.execute(f"CREATE TABLE {name_of(bad)} ()")  # so that the partition's name is taken
    report = await maintain(aged.url, days_ahead=2, retention_days=3)
    assert report.made == (*(today() + timedelta(days=n) for n in (1, 2)), bad + timedelta(days=1))
    assert report.failed == (f'the partition of {bad}: relation "{name_of(bad)}" already exists',)
    assert len(report.dropped) == 8
    assert (await where(connection))["stays"] == "outbox_default"


async def test_a_round_that_leaves_nothing_undone_says_when(postgres_url: str, connection: asyncpg.Connection) -> None:
    settings = Settings(postgres_url=postgres_url)
    LAST_SUCCESS.set(0)
    await connection.execute(f"CREATE TABLE {name_of(today())} ()")  # so that the partition's name is taken
    assert (await maintain_once(settings)).failed
    assert last_success() == 0
    await connection.execute(f"DROP TABLE {name_of(today())}")
    await maintain_once(settings)
    assert time.time() - last_success() < 60


async def test_a_webhook_that_somebody_holds_ends_a_round_and_not_the_process(
    postgres_url: str, connection: asyncpg.Connection
) -> None:
    await connection.execute(
        """INSERT INTO inbox (gateway, event_id, type, content, body, received_at, applied_at)
           VALUES ('stripe', 'evt_1', 't', '{}', '', now() - interval '100 days', now() - interval '100 days')"""
    )
    await set_database(postgres_url, "lock_timeout = '50ms'")
    stop = asyncio.Event()
    settings = Settings(postgres_url=postgres_url, maintenance_interval_seconds=0.1)
    with capture_logs() as logs:
        async with connection.transaction():
            await connection.execute("SELECT FROM inbox FOR UPDATE")
            maintaining = asyncio.create_task(Maintenance(settings).run(stop))
            while not maintaining.done() and len(logs) < 2:
                await asyncio.sleep(0.01)
        while not maintaining.done() and await connection.fetchval("SELECT count(*) FROM inbox"):
            await asyncio.sleep(0.01)
        stop.set()
        await maintaining
    told = {"event": "maintenance failed", "step": "outbox and inbox", "error": "ConcurrentUpdate"}
    assert told | {"log_level": "warning", "message": "canceling statement due to lock timeout"} in logs


async def test_unfinished_maintenance_is_not_reported_as_an_unreachable_server(
    postgres_url: str,
    kafka_bootstrap: str,
    topics: Topics,
    connection: asyncpg.Connection,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    await connection.execute(f"CREATE TABLE {name_of(today())} ()")  # so that the partition's name is taken
    here = {"POSTGRES_URL": postgres_url, "KAFKA_BOOTSTRAP": kafka_bootstrap, "REDIS_URL": "redis://127.0.0.1:1"}
    here |= {"COMMANDS_TOPIC": topics.commands, "EVENTS_TOPIC": topics.events, "DEAD_LETTER_TOPIC": topics.dlq}
    for name, value in here.items():
        monkeypatch.setenv(f"PAYMENTS_{name}", value)
    done = await asyncio.to_thread(CliRunner().invoke, app, ["migrate"])
    assert done.exit_code == 1
    assert "already exists" in done.stderr
    assert "Schema and topics are there." in done.stderr


async def test_moved_rows_are_not_published_again(postgres_url: str, connection: asyncpg.Connection) -> None:
    await connection.execute("SELECT pg_create_logical_replication_slot('probe', 'pgoutput')")
    try:
        await insert(connection, "stranded")
        assert [name for name in await published(connection) if name] == ["stranded"]
        assert (await maintain(postgres_url, days_ahead=1, retention_days=14)).moved_rows == 1
        await insert(connection, "later")
        await insert(connection, "tomorrow", noon(today() + timedelta(days=1)))
        assert await published(connection) == ["later", "tomorrow"]
    finally:
        await connection.execute("SELECT pg_drop_replication_slot('probe')")


async def published(connection: asyncpg.Connection) -> list[str]:
    """The `aggregateid` of each row that the publication has sent a subscriber since the last call."""
    rows = await connection.fetch(
        f"SELECT data FROM pg_logical_slot_get_binary_changes('probe', NULL, NULL, {PUBLICATION})"
    )
    return [third_column(row["data"]) for row in rows if row["data"][:1] == b"I"]


def third_column(message: bytes) -> str:
    """The third column of an insert in pgoutput: I, relation (4), N, count (2), then columns of t, length (4), text."""
    position = 8
    for _ in range(2):
        position += 5 + int.from_bytes(message[position + 1 : position + 5], "big")
    length = int.from_bytes(message[position + 1 : position + 5], "big")
    return message[position + 5 : position + 5 + length].decode()


async def test_payments_go_on_while_rows_move(postgres_url: str, connection: asyncpg.Connection) -> None:
    """No insert fails, and no row is lost or doubled. A failed insert would be taken for a bad command and parked."""
    total = 400

    async def write(part: int) -> None:
        own = await asyncpg.connect(postgres_url)
        for n in range(total // 4):
            await insert(own, f"{part}-{n}")
        await own.close()

    writers = [asyncio.create_task(write(part)) for part in range(4)]
    while not await connection.fetchval("SELECT EXISTS (SELECT FROM outbox)"):
        await asyncio.sleep(0.001)
    await maintain(postgres_url, days_ahead=2, retention_days=14)
    await asyncio.gather(*writers)
    assert await connection.fetchval("SELECT count(*) FROM outbox") == total
    assert set((await where(connection)).values()) == {name_of(today())}


async def test_a_coming_day_needs_no_lock_that_payments_notice(
    postgres_url: str, connection: asyncpg.Connection
) -> None:
    """The maintenance of every day is not held up by an open transaction that has written an event."""
    await maintain(postgres_url, days_ahead=1, retention_days=14)
    transaction = connection.transaction()
    await transaction.start()
    await insert(connection, "under way")
    async with asyncio.timeout(5):
        report = await maintain(postgres_url, days_ahead=3, retention_days=14)
    assert report.made == (today() + timedelta(days=2), today() + timedelta(days=3))
    await transaction.commit()
    assert await where(connection) == {"under way": name_of(today())}


async def test_a_failed_attachment_leaves_the_rows_where_they_were(
    postgres_url: str, connection: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(maintenance, "PAUSES_SECONDS", (0.01,))
    await insert(connection, "stranded")
    async with connection.transaction():
        await connection.execute("LOCK TABLE outbox_default IN ACCESS SHARE MODE")  # as a reader does
        report = await maintain(postgres_url, days_ahead=0, retention_days=14)
    assert_busy(report, f"the partition of {today()}")
    assert await partitions(connection) == ["outbox_default"]
    assert await where(connection) == {"stranded": "outbox_default"}


async def test_two_may_maintain_at_once(postgres_url: str, connection: asyncpg.Connection) -> None:
    await insert(connection, "stranded")
    reports = await asyncio.gather(*(maintain(postgres_url, days_ahead=5, retention_days=14) for _ in range(4)))
    assert sorted(len(each.made) for each in reports) == [0, 0, 0, 6]
    assert sum(each.moved_rows for each in reports) == 1


async def test_a_busy_table_is_tried_again(postgres_url: str, connection: asyncpg.Connection) -> None:
    transaction = connection.transaction()
    await transaction.start()
    await connection.execute("LOCK TABLE outbox_default IN ACCESS SHARE MODE")  # as a reader does
    task = asyncio.create_task(maintain(postgres_url, days_ahead=0, retention_days=14))
    await refused_once(postgres_url)
    assert not task.done()
    await transaction.rollback()
    assert (await task).made == (today(),)


async def refused_once(url: str) -> None:
    """Wait until a lock request on the outbox or its default partition has waited and given up."""
    own = await asyncpg.connect(url)
    waiting = """SELECT EXISTS (SELECT FROM pg_locks
                  WHERE NOT granted AND relation IN ('outbox'::regclass, 'outbox_default'::regclass))"""
    for expected in (True, False):
        while await own.fetchval(waiting) is not expected:
            await asyncio.sleep(0.005)
    await own.close()


def test_it_outlasts_a_transaction_that_the_server_is_going_to_end() -> None:
    assert sum(maintenance.PAUSES_SECONDS) > IDLE_IN_TRANSACTION_MS / 1000


async def test_it_gives_up_on_a_table_that_stays_busy(
    postgres_url: str, connection: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(maintenance, "PAUSES_SECONDS", (0.01, 0.01))
    async with connection.transaction():
        await connection.execute("LOCK TABLE outbox IN ROW EXCLUSIVE MODE")
        report = await maintain(postgres_url, days_ahead=0, retention_days=14)
    assert_busy(report, f"the partition of {today()}")
    assert await partitions(connection) == ["outbox_default"]


async def test_a_lock_that_waits_holds_payments_up_for_its_timeout_only(
    postgres_url: str, connection: asyncpg.Connection
) -> None:
    assert maintenance.LOCK_TIMEOUT == "200ms"
    transaction = connection.transaction()
    await transaction.start()
    await insert(connection, "long transaction")
    task = asyncio.create_task(maintain(postgres_url, days_ahead=0, retention_days=14))
    other = await asyncpg.connect(postgres_url)
    async with asyncio.timeout(5):
        while not task.done() and not await other.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted"):
            await asyncio.sleep(0.005)
        await insert(other, "behind the lock")
    assert not task.done()
    await other.close()
    await transaction.commit()
    assert (await task).moved_rows == 2


# --- retention --------------------------------------------------------------------------------------------------


@dataclass
class Aged:
    """A database with partitions from ten days ago until today."""

    url: str
    connection: asyncpg.Connection

    async def maintain(self, retention_days: int = 3) -> MaintenanceReport:
        return await maintain(self.url, days_ahead=0, retention_days=retention_days)

    async def count(self) -> int:
        return int(await self.connection.fetchval("SELECT count(*) FROM outbox"))


@pytest.fixture
async def aged(postgres_url: str, connection: asyncpg.Connection) -> Aged:
    for n in range(11):
        await insert(connection, str(n), noon(today() - timedelta(days=n)))
    await maintain(postgres_url, days_ahead=0, retention_days=100)
    return Aged(postgres_url, connection)


class Subscriber:
    """Streams from slot `probe` like the relay, and confirms everything that it receives while it `is_confirming`."""

    def __init__(self, stream: ReplicationStream) -> None:
        self.is_confirming = True
        self._stream = stream

    async def run(self) -> None:
        """Run until cancelled."""
        while True:
            while self._stream.receive() is not None:
                pass
            if self.is_confirming:
                self._stream.confirm(self._stream.wal_end)
            await asyncio.sleep(0.02)


@pytest.fixture
async def subscriber(aged: Aged) -> AsyncIterator[Subscriber]:
    stream = await ReplicationStream.connect(aged.url)
    await stream.create_slot("probe")
    await stream.start("probe", "payments_outbox", 0)
    subscriber = Subscriber(stream)
    task = asyncio.create_task(subscriber.run())
    yield subscriber
    task.cancel()
    await stream.close()


async def test_partitions_past_retention_are_dropped(aged: Aged, subscriber: Any) -> None:
    report = await aged.maintain(retention_days=3)
    assert report.dropped == tuple(today() - timedelta(days=n) for n in range(10, 3, -1))
    assert report.kept_because == ()
    assert await aged.count() == 4
    assert (await aged.maintain(retention_days=3)) == MaintenanceReport((), 0, (), ())


async def test_nothing_is_dropped_while_nobody_publishes(aged: Aged) -> None:
    report = await aged.maintain()
    assert (report.dropped, await aged.count()) == ((), 11)
    assert report.kept_because == ("there is neither a replication slot nor a relay: nobody publishes the outbox",)


async def test_nothing_is_dropped_that_a_poll_has_not_published(
    aged: Aged, subscriber: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A polling relay has no slot, and the position of another reader's slot proves nothing for it."""
    monkeypatch.setattr(maintenance, "PASS_SECONDS", 0.3)
    await aged.connection.execute(
        "INSERT INTO relay_slots (slot_name, system_identifier, source)"
        " SELECT 'p', system_identifier::text, 'poll' FROM pg_control_system()"
    )
    report = await aged.maintain()
    assert (report.dropped, await aged.count()) == ((), 11)
    assert report.kept_because[0].startswith("relay p has not published all of it")
    await aged.connection.execute("UPDATE relay_slots SET published_below = (SELECT max(xact) + 1 FROM outbox)")
    assert (await aged.maintain()).dropped


async def test_a_poll_alone_is_a_publisher(aged: Aged) -> None:
    await relay_row(aged.connection, "(SELECT max(xact) + 1 FROM outbox)", source="poll")
    assert (await aged.maintain()).dropped


@pytest.mark.parametrize("gap", [None, "this is another Postgres server than before"])
async def test_progress_saved_on_another_server_lets_no_partition_be_dropped(
    aged: Aged, gap: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a restore on another server, the proof refers to the old server's transactions, which were further on."""
    monkeypatch.setattr(maintenance, "PASS_SECONDS", 0.3)
    await relay_row(aged.connection, "1000000000")
    await aged.connection.execute("UPDATE relay_slots SET system_identifier = '1', gap = $1", gap)
    report = await aged.maintain()
    assert (report.dropped, await aged.count()) == ((), 11)
    assert report.kept_because[0].startswith("relay proven has not published all of it")


async def test_nothing_is_dropped_while_a_slot_is_inactive(aged: Aged, subscriber: Any) -> None:
    await aged.connection.execute("SELECT pg_create_logical_replication_slot('idle', 'pgoutput')")
    report = await aged.maintain()
    assert (report.dropped, await aged.count()) == ((), 11)
    # The slot `probe` may be named too if it has not confirmed yet.
    assert any(each.startswith("slot idle is inactive") for each in report.kept_because)
    await aged.connection.execute("SELECT pg_drop_replication_slot('idle')")
    assert (await aged.maintain()).dropped


async def test_nothing_is_dropped_before_every_slot_has_confirmed_it(
    aged: Aged, subscriber: Subscriber, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However little is missing: a single event that Kafka refuses must stay replayable."""
    monkeypatch.setattr(maintenance, "PASS_SECONDS", 0.3)
    subscriber.is_confirming = False
    await insert(aged.connection, "unconfirmed", noon(today() - timedelta(days=9)))
    report = await aged.maintain()
    assert (report.dropped, await aged.count()) == ((), 12)
    (reason,) = report.kept_because
    assert reason.startswith("slot probe has not confirmed ")
    subscriber.is_confirming = True
    monkeypatch.undo()
    assert len((await aged.maintain()).dropped) == 7


async def test_a_publisher_that_is_a_little_behind_is_waited_for(aged: Aged, subscriber: Subscriber) -> None:
    subscriber.is_confirming = False
    await insert(aged.connection, "unconfirmed", noon(today() - timedelta(days=9)))
    task = asyncio.create_task(aged.maintain())
    asked = (
        "SELECT count(*) FROM pg_stat_activity WHERE query LIKE '%pg_replication_slots%' AND pid <> pg_backend_pid()"
    )
    while not await aged.connection.fetchval(asked):
        await asyncio.sleep(0.01)
    assert not task.done()
    subscriber.is_confirming = True
    assert len((await task).dropped) == 7


async def test_rows_on_their_way_into_an_old_partition_are_waited_for(
    aged: Aged, subscriber: Subscriber, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(maintenance, "PAUSES_SECONDS", (0.01,))
    async with aged.connection.transaction():
        await insert(aged.connection, "late", noon(today() - timedelta(days=9)))
        assert_busy(await aged.maintain(), "old partitions")
    assert await aged.count() == 12


async def test_slots_of_others_do_not_matter(aged: Aged, subscriber: Any) -> None:
    await aged.connection.execute("SELECT pg_create_logical_replication_slot('foreign', 'test_decoding')")
    try:
        assert (await aged.maintain()).dropped
    finally:
        await aged.connection.execute("SELECT pg_drop_replication_slot('foreign')")


async def test_dropping_gives_way_to_payments(aged: Aged, subscriber: Any) -> None:
    """A drop that cannot get its lock leaves the queue, so a payment behind it waits no longer than that timeout."""
    transaction = aged.connection.transaction()
    await transaction.start()
    await insert(aged.connection, "long transaction")
    task = asyncio.create_task(aged.maintain())
    await refused_once(aged.url)
    other = await asyncpg.connect(aged.url)
    async with asyncio.timeout(5):
        await insert(other, "another payment")
    await other.close()
    assert not task.done()
    await transaction.commit()
    assert (await task).dropped


async def test_postgres_has_no_gentler_way_to_drop(aged: Aged) -> None:
    """If this test fails one day, partitions can be detached without blocking inserts."""
    with pytest.raises(asyncpg.ObjectNotInPrerequisiteStateError, match="when a default partition exists"):
        await aged.connection.execute(f"ALTER TABLE outbox DETACH PARTITION {name_of(today())} CONCURRENTLY")


async def relay_row(connection: asyncpg.Connection, below: str, source: str = "wal") -> None:
    await connection.execute(
        f"""INSERT INTO relay_slots (slot_name, system_identifier, source, confirmed_lsn, published_below)
            SELECT 'proven', system_identifier::text, $1, '0/0', {below} FROM pg_control_system()""",
        source,
    )


@pytest.mark.parametrize("is_proven", [True, False])
async def test_while_nothing_happens_what_is_proven_to_be_published_may_go(
    postgres_url: str, connection: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch, *, is_proven: bool
) -> None:
    """An idle slot stands still, and would never pass the WAL that is written elsewhere in the meantime."""
    monkeypatch.setattr(maintenance, "PASS_SECONDS", 0.3)
    old = today() - timedelta(days=20)
    await insert(connection, "old", noon(old))
    stream = await ReplicationStream.connect(postgres_url)
    await stream.create_slot("proven")
    await stream.start("proven", "payments_outbox", 0)
    await relay_row(connection, "pg_snapshot_xmin(pg_current_snapshot())::text::bigint" if is_proven else "1")
    await connection.execute("SELECT pg_logical_emit_message(true, 'elsewhere', 'written')")
    report = await maintain(postgres_url, days_ahead=0, retention_days=14)
    await stream.close()
    assert report.dropped == ((old,) if is_proven else ())


async def test_a_partition_written_to_after_the_check_is_not_dropped(
    postgres_url: str, connection: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = today() - timedelta(days=20)
    await insert(connection, "old", noon(old))
    await relay_row(connection, "pg_snapshot_xmin(pg_current_snapshot())::text::bigint", source="poll")
    look = maintenance._reasons_to_keep

    async def then_written(asked: asyncpg.Connection, end: int, last: int) -> tuple[str, ...]:
        reasons = await look(asked, end, last)
        await insert(connection, "late", noon(old))
        return reasons

    monkeypatch.setattr(maintenance, "_reasons_to_keep", then_written)
    report = await maintain(postgres_url, days_ahead=0, retention_days=14)
    assert (report.dropped, report.kept_because) == ((), ("somebody has written into them since they were looked at",))
    assert set(await where(connection)) == {"old", "late"}
