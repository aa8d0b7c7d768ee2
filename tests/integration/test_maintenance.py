"""The outbox's partitions: made, filled without publishing again, and dropped only when nobody needs them."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Any

import asyncpg
import psycopg
import pytest

from infra.postgres import maintenance
from infra.postgres.maintenance import MaintenanceReport, maintain

TODAY = datetime.now(UTC).date()
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


def name_of(day: date) -> str:
    return f"outbox_{day:%Y%m%d}"


def noon(day: date) -> datetime:
    return datetime(day.year, day.month, day.day, 12, tzinfo=UTC)


async def test_partitions_are_made_ahead_and_only_once(postgres_url: str, connection: asyncpg.Connection) -> None:
    days = tuple(TODAY + timedelta(days=n) for n in range(4))
    assert await maintain(postgres_url, days_ahead=3, retention_days=14) == MaintenanceReport(days, 0, (), ())
    assert await partitions(connection) == [*map(name_of, days), "outbox_default"]
    assert await maintain(postgres_url, days_ahead=3, retention_days=14) == MaintenanceReport((), 0, (), ())
    assert (await maintain(postgres_url, days_ahead=4, retention_days=14)).made == (TODAY + timedelta(days=4),)


async def test_a_partition_holds_exactly_its_utc_day(postgres_url: str, connection: asyncpg.Connection) -> None:
    await maintain(postgres_url, days_ahead=1, retention_days=14)
    midnight = datetime(TODAY.year, TODAY.month, TODAY.day, tzinfo=UTC)
    moment, day = timedelta(microseconds=1), timedelta(days=1)
    places = {
        "before": (midnight - moment, "outbox_default"),
        "first": (midnight, name_of(TODAY)),
        "last": (midnight + day - moment, name_of(TODAY)),
        "next": (midnight + day, name_of(TODAY + day)),
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
    await insert(connection, "yesterday", noon(TODAY - timedelta(days=1)))
    await insert(connection, "far", noon(TODAY + timedelta(days=40)))
    before = await connection.fetch("SELECT * FROM outbox ORDER BY id")
    report = await maintain(postgres_url, days_ahead=0, retention_days=14)
    assert report.moved_rows == 3
    assert report.made == (TODAY - timedelta(days=1), TODAY, TODAY + timedelta(days=40))
    assert await where(connection) == {
        "today": name_of(TODAY),
        "yesterday": name_of(TODAY - timedelta(days=1)),
        "far": name_of(TODAY + timedelta(days=40)),
    }
    assert await connection.fetch("SELECT * FROM outbox ORDER BY id") == before


async def test_moved_rows_are_not_published_again(postgres_url: str, connection: asyncpg.Connection) -> None:
    await connection.execute("SELECT pg_create_logical_replication_slot('probe', 'pgoutput')")
    try:
        await insert(connection, "stranded")
        assert [name for name in await published(connection) if name] == ["stranded"]
        assert (await maintain(postgres_url, days_ahead=1, retention_days=14)).moved_rows == 1
        await insert(connection, "later")
        await insert(connection, "tomorrow", noon(TODAY + timedelta(days=1)))
        assert await published(connection) == ["later", "tomorrow"]
    finally:
        await connection.execute("SELECT pg_drop_replication_slot('probe')")


async def published(connection: asyncpg.Connection) -> list[str]:
    """The `aggregateid` of each row that the publication sends a subscriber since the last call."""
    rows = await connection.fetch(
        f"SELECT data FROM pg_logical_slot_get_binary_changes('probe', NULL, NULL, {PUBLICATION})"
    )
    return [third_column(row["data"]) for row in rows if row["data"][:1] == b"I"]


def third_column(message: bytes) -> str:
    """Of an insert in pgoutput's protocol: I, relation (4), N, count (2), then columns of t, length (4), text."""
    position = 8
    for _ in range(2):
        position += 5 + int.from_bytes(message[position + 1 : position + 5], "big")
    length = int.from_bytes(message[position + 1 : position + 5], "big")
    return message[position + 5 : position + 5 + length].decode()


async def test_payments_go_on_while_rows_move(postgres_url: str, connection: asyncpg.Connection) -> None:
    """No insert fails, and none is lost or doubled. One that failed would be taken for a bad command and parked."""
    total = 400

    async def write(part: int) -> None:
        own = await asyncpg.connect(postgres_url)
        for n in range(total // 4):
            await insert(own, f"{part}-{n}")
        await own.close()

    writers = [asyncio.create_task(write(part)) for part in range(4)]
    await asyncio.sleep(0.05)
    await maintain(postgres_url, days_ahead=2, retention_days=14)
    await asyncio.gather(*writers)
    assert await connection.fetchval("SELECT count(*) FROM outbox") == total
    assert set((await where(connection)).values()) == {name_of(TODAY)}


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
    await asyncio.sleep(2.6)
    assert not task.done()
    await transaction.rollback()
    assert (await task).made == (TODAY,)


async def test_it_gives_up_on_a_table_that_stays_busy(
    postgres_url: str, connection: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(maintenance, "LOCK_TIMEOUT", "50ms")
    async with connection.transaction():
        await connection.execute("LOCK TABLE outbox IN ROW EXCLUSIVE MODE")
        with pytest.raises(asyncpg.LockNotAvailableError):
            await maintain(postgres_url, days_ahead=0, retention_days=14)
    assert await partitions(connection) == ["outbox_default"]


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
        await insert(connection, str(n), noon(TODAY - timedelta(days=n)))
    await maintain(postgres_url, days_ahead=0, retention_days=100)
    return Aged(postgres_url, connection)


class Subscriber:
    """A replication connection that streams from slot `probe`, and confirms nothing unless told."""

    def __init__(self, url: str) -> None:
        self._connection = psycopg.connect(f"{url}?replication=database", autocommit=True)
        self._connection.execute("CREATE_REPLICATION_SLOT probe TEMPORARY LOGICAL pgoutput")

    def close(self) -> None:
        self._connection.close()


@pytest.fixture
async def subscriber(aged: Aged) -> AsyncIterator[Subscriber]:
    """An active slot that is up to date: a temporary one is active as long as its session."""
    subscriber = await asyncio.to_thread(Subscriber, aged.url)
    yield subscriber
    await asyncio.to_thread(subscriber.close)


async def test_partitions_past_retention_are_dropped(aged: Aged, subscriber: Any) -> None:
    report = await aged.maintain(retention_days=3)
    assert report.dropped == tuple(TODAY - timedelta(days=n) for n in range(10, 3, -1))
    assert report.kept_because == ()
    assert await aged.count() == 4
    assert (await aged.maintain(retention_days=3)) == MaintenanceReport((), 0, (), ())


async def test_nothing_is_dropped_while_nobody_publishes(aged: Aged) -> None:
    report = await aged.maintain()
    assert (report.dropped, await aged.count()) == ((), 11)
    assert report.kept_because == ("there is no replication slot: nobody publishes the outbox",)


async def test_nothing_is_dropped_while_a_slot_is_inactive(aged: Aged, subscriber: Any) -> None:
    await aged.connection.execute("SELECT pg_create_logical_replication_slot('idle', 'pgoutput')")
    report = await aged.maintain()
    assert (report.dropped, await aged.count()) == ((), 11)
    assert report.kept_because == ("slot idle is inactive",)
    await aged.connection.execute("SELECT pg_drop_replication_slot('idle')")
    assert (await aged.maintain()).dropped


async def test_nothing_is_dropped_while_a_slot_lags(
    aged: Aged, subscriber: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert maintenance.MAX_LAG_BYTES == 64 * 1024 * 1024
    monkeypatch.setattr(maintenance, "MAX_LAG_BYTES", 1_000_000)
    await aged.connection.execute("SELECT pg_logical_emit_message(false, 'filler', repeat('x', 3000000))")
    report = await aged.maintain()
    assert (report.dropped, await aged.count()) == ((), 11)
    (reason,) = report.kept_because
    assert reason.startswith("slot probe lags ")


async def test_slots_of_others_do_not_matter(aged: Aged, subscriber: Any) -> None:
    await aged.connection.execute("SELECT pg_create_logical_replication_slot('foreign', 'test_decoding')")
    try:
        assert (await aged.maintain()).dropped
    finally:
        await aged.connection.execute("SELECT pg_drop_replication_slot('foreign')")


async def test_dropping_gives_way_to_payments(aged: Aged, subscriber: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A drop that cannot have its lock leaves the queue, so that a payment behind it waits no longer than that."""
    monkeypatch.setattr(maintenance, "LOCK_TIMEOUT", "300ms")
    transaction = aged.connection.transaction()
    await transaction.start()
    await insert(aged.connection, "long transaction")
    task = asyncio.create_task(aged.maintain())
    await asyncio.sleep(0.1)
    other = await asyncpg.connect(aged.url)
    async with asyncio.timeout(1):
        await insert(other, "another payment")
    await other.close()
    await transaction.commit()
    assert (await task).dropped
