"""The ledger check: payments' amounts are compared with the sums of their transfers, by command and continuously."""

import asyncio
import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta, tzinfo
from pathlib import Path
from typing import Self
from uuid import UUID

import asyncpg
import pytest
from prometheus_client import REGISTRY
from structlog.testing import capture_logs

from app.maintenance import LAST_SUCCESS, LEDGER_DIFFERENCES, Maintenance
from app.settings import Settings
from infra.postgres import ledger
from infra.postgres.ledger import CheckedPortion, LedgerDifference, check_all, check_changed, database_time
from tests.support.cli import run
from tests.support.provider import BookkeepingGateway
from tests.support.service import delivery, new_payment_id, running_worker

AN_HOUR_AGO = datetime.now(UTC) - timedelta(hours=1)


@pytest.fixture
async def connection(postgres_url: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(postgres_url)
    yield connection
    await connection.close()


async def pay(postgres_url: str, count: int) -> list[UUID]:
    """Create `count` payments of 100.00, each with 20.00 refunded in two parts."""
    payments = [new_payment_id() for _ in range(count)]
    async with running_worker(postgres_url, BookkeepingGateway()) as worker:
        await worker.accept(*(delivery("charge", each, f"{each} charge") for each in payments))
        await worker.idle()
        for part in ("one", "two"):
            await worker.accept(*(delivery("refund", each, f"{each} {part}", amount_minor=1_000) for each in payments))
            await worker.idle()
    return payments


async def looked_at(portions: AsyncIterator[CheckedPortion]) -> tuple[int, list[LedgerDifference]]:
    """The number of payments checked, and the differences."""
    found = [each async for each in portions]
    return sum(each.payments for each in found), [each for portion in found for each in portion.differences]


async def book(connection: asyncpg.Connection, payment: UUID, seq: int, transfer: str) -> None:
    """Insert one transfer, given as `debit credit amount currency`, as a person would by hand."""
    debit, credit, amount, currency = transfer.split()
    await connection.execute(
        "INSERT INTO ledger VALUES ($1, $2, $3, $4, $5, $6)", payment, seq, debit, credit, int(amount), currency
    )


async def take_a_cent(connection: asyncpg.Connection, payment: UUID) -> None:
    await connection.execute("UPDATE payments SET captured_minor = captured_minor - 1 WHERE payment_id = $1", payment)


TAMPERED = [
    ("captured_minor = captured_minor - 1", (9_999, 2_000, 0, 10_000, 2_000, 0, 8_000, 0)),
    ("refunded_minor = 0", (10_000, 0, 0, 10_000, 2_000, 0, 8_000, 0)),
    ("disputed_minor = 5", (10_000, 2_000, 5, 10_000, 2_000, 0, 8_000, 0)),
]
BOOKED = [
    ("customer_disputes gateway_clearing 5 USD", (10_000, 2_000, 0, 10_000, 2_000, 5, 7_995, 0)),
    ("gateway_clearing customer_refunds 7 EUR", (10_000, 2_000, 0, 10_000, 2_000, 0, 8_000, 7)),
    # The account is in none of the payment's amounts, so the difference shows in what the provider owes.
    ("gateway_clearing somebody 7 USD", (10_000, 2_000, 0, 10_000, 2_000, 0, 8_007, 0)),
]


@pytest.mark.parametrize(("change", "amounts"), TAMPERED)
async def test_a_payment_that_is_not_what_its_ledger_says_is_found(
    postgres_url: str, connection: asyncpg.Connection, change: str, amounts: tuple[int, ...]
) -> None:
    payments = await pay(postgres_url, 3)
    assert await looked_at(check_all(postgres_url)) == (3, [])
    assert await looked_at(check_changed(postgres_url, AN_HOUR_AGO)) == (3, [])
    await connection.execute(f"UPDATE payments SET {change} WHERE payment_id = $1", payments[1])
    found = [LedgerDifference(payments[1], "USD", *amounts)]
    assert await looked_at(check_all(postgres_url)) == (3, found)
    assert await looked_at(check_changed(postgres_url, AN_HOUR_AGO)) == (3, found)


@pytest.mark.parametrize(("transfer", "amounts"), BOOKED)
async def test_a_transfer_that_nothing_moved_is_found_until_it_is_taken_back(
    postgres_url: str, connection: asyncpg.Connection, transfer: str, amounts: tuple[int, ...]
) -> None:
    payments = await pay(postgres_url, 3)
    await book(connection, payments[1], -1, transfer)
    found = [LedgerDifference(payments[1], "USD", *amounts)]
    assert await looked_at(check_all(postgres_url)) == (3, found)
    assert await looked_at(check_changed(postgres_url, AN_HOUR_AGO)) == (3, found)
    debit, credit, rest = transfer.split(maxsplit=2)
    await book(connection, payments[1], -2, f"{credit} {debit} {rest}")
    assert await looked_at(check_all(postgres_url)) == (3, [])


@pytest.mark.parametrize("payment", [UUID(int=0), UUID(int=2**128 - 1)], ids=["first", "last"])
async def test_transfers_of_a_payment_that_is_not_there_are_found(
    postgres_url: str, connection: asyncpg.Connection, payment: UUID
) -> None:
    await book(connection, payment, 1, "gateway_clearing customer_sales 100 USD")
    assert await looked_at(check_all(postgres_url)) == (0, [LedgerDifference(payment, None, 0, 0, 0, 0, 0, 0, 0, 100)])


async def test_portion_by_portion_everything_is_looked_at(
    postgres_url: str, connection: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger, "PORTION", 1)
    payments = [*await pay(postgres_url, 2), *await pay(postgres_url, 2)]
    await book(connection, new_payment_id(), 1, "gateway_clearing customer_sales 100 USD")
    await connection.execute("UPDATE payments SET captured_minor = captured_minor - 1")
    count, found = await looked_at(check_all(postgres_url))
    assert count == 4
    assert len(found) == 5
    count, found = await looked_at(check_changed(postgres_url, AN_HOUR_AGO))
    assert count > 4, "in the portions of several transactions"
    assert {each.payment_id for each in found} == set(payments)


async def test_changed_payments_are_read_by_an_index_in_portions(
    postgres_url: str, connection: asyncpg.Connection
) -> None:
    """A sequential scan would hold the lock on a busy day's outbox for longer than a statement may take."""
    await connection.execute(
        """INSERT INTO outbox (id, aggregateid, type, payload, payment_seq, occurred_at, xact)
           SELECT gen_random_uuid(), gen_random_uuid(), 't', '{}', 1, 'now', n FROM generate_series(1, 50000) AS n"""
    )
    await connection.execute("ANALYZE outbox")
    explained = await connection.fetch(f"EXPLAIN ANALYZE {ledger._CHANGED}", 50_000, 100, AN_HOUR_AGO)
    plan = "\n".join(row[0] for row in explained)
    assert "Index Scan Backward using outbox_default_xact_idx" in plan
    assert "rows=101 " in plan, "a portion, and the first that is none of it"


async def look(maintenance: Maintenance) -> None:
    """Check the changed payments, then all."""
    await maintenance.check_changes()
    await maintenance.check_everything()


async def test_changed_payments_are_checked_repeatedly_and_differing_ones_until_they_agree(
    postgres_url: str, connection: asyncpg.Connection
) -> None:
    payments = await pay(postgres_url, 2)
    maintenance = Maintenance(Settings(postgres_url=postgres_url))
    await look(maintenance)
    await take_a_cent(connection, payments[0])
    with capture_logs() as logs:
        await look(maintenance)
        # After 20 minutes the payment no longer counts as changed.
        await connection.execute("UPDATE outbox SET created_at = created_at - interval '20 minutes'")
        await look(maintenance)
    assert REGISTRY.get_sample_value("payments_ledger_differences") == 1
    told = [each["payment_id"] for each in logs if each["event"] == "payment differs from the ledger"]
    assert told == [str(payments[0])], "it is told once"
    await connection.execute("UPDATE payments SET captured_minor = 10_000")
    await take_a_cent(connection, payments[1])
    await look(maintenance)
    assert REGISTRY.get_sample_value("payments_ledger_differences") == 0


async def test_at_first_and_once_a_day_everything_is_looked_at(
    postgres_url: str, connection: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A manual change in the tables publishes no event, and a restarted process remembers nothing."""
    (payment,) = await pay(postgres_url, 1)
    await connection.execute("UPDATE outbox SET created_at = created_at - interval '2 days'")
    maintenance = Maintenance(Settings(postgres_url=postgres_url))
    await look(maintenance)
    await take_a_cent(connection, payment)
    await look(maintenance)
    assert REGISTRY.get_sample_value("payments_ledger_differences") == 0
    await look(Maintenance(Settings(postgres_url=postgres_url)))
    assert REGISTRY.get_sample_value("payments_ledger_differences") == 1
    monkeypatch.setattr("app.maintenance.WHOLE_AGAIN", timedelta(0))
    LEDGER_DIFFERENCES.set(0)
    await look(maintenance)
    assert REGISTRY.get_sample_value("payments_ledger_differences") == 1


async def test_a_look_that_breaks_off_keeps_what_it_found_and_says_up_to_when_all_was_looked_at(
    postgres_url: str, connection: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    payments = await pay(postgres_url, 1)
    before = await database_time(postgres_url)
    maintenance = Maintenance(Settings(postgres_url=postgres_url))
    await look(maintenance)
    checked = REGISTRY.get_sample_value("payments_ledger_checked_timestamp_seconds")
    assert checked is not None
    assert before.timestamp() < checked < (await database_time(postgres_url)).timestamp()
    await take_a_cent(connection, payments[0])
    await connection.execute("UPDATE outbox SET aggregateid = 'no payment' WHERE payment_seq = 1")
    monkeypatch.setattr(ledger, "PORTION", 1)
    with pytest.raises(asyncpg.DataError):
        await maintenance.check_changes()
    assert REGISTRY.get_sample_value("payments_ledger_differences") == 1
    assert REGISTRY.get_sample_value("payments_ledger_checked_timestamp_seconds") == checked


async def test_changed_payments_are_checked_though_a_full_check_breaks_off_and_later_resumes(
    postgres_url: str, connection: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    payments = sorted(await pay(postgres_url, 3))
    monkeypatch.setattr(ledger, "PORTION", 1)
    looked, maintenance = [], Maintenance(Settings(postgres_url=postgres_url))

    async def broken(url: str, begin: UUID) -> AsyncIterator[CheckedPortion]:
        looked.append(begin)
        async for portion in check_all(url, begin):
            yield portion
            if begin == ledger.FIRST_ID:
                raise TimeoutError

    monkeypatch.setattr("app.maintenance.check_all", broken)
    await maintenance.check_changes()
    with pytest.raises(TimeoutError):
        await maintenance.check_everything()
    assert REGISTRY.get_sample_value("payments_ledger_checked_timestamp_seconds") == 0
    await take_a_cent(connection, payments[0])
    await maintenance.check_changes()
    assert REGISTRY.get_sample_value("payments_ledger_differences") == 1
    await maintenance.check_everything()
    assert looked == [ledger.FIRST_ID, UUID(int=payments[0].int + 1)]
    assert REGISTRY.get_sample_value("payments_ledger_checked_timestamp_seconds") != 0


async def test_no_statement_looks_at_many_transfers_of_payments_that_are_not_there(
    postgres_url: str, connection: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger, "PORTION", 10)
    await connection.execute(
        """INSERT INTO ledger SELECT gen_random_uuid(), 1, 'gateway_clearing', 'customer_sales', 100, 'USD'
             FROM generate_series(1, 1000)"""
    )
    found = [len(portion.differences) async for portion in check_all(postgres_url)]
    assert (sum(found), max(found)) == (1000, 100)
    missing = [row["payment_id"] for row in await connection.fetch("SELECT payment_id FROM ledger")]
    found = [len(portion.differences) async for portion in check_changed(postgres_url, AN_HOUR_AGO, beside=missing)]
    assert (sum(found), max(found)) == (1000, 10)


async def test_a_clock_of_this_machine_that_is_off_hides_nothing(
    postgres_url: str, connection: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Ahead(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> Self:
            return super().now(tz) + timedelta(hours=1)

    monkeypatch.setattr("app.maintenance.datetime", Ahead)
    (payment,) = await pay(postgres_url, 1)
    maintenance = Maintenance(Settings(postgres_url=postgres_url))
    await look(maintenance)
    await take_a_cent(connection, payment)
    await look(maintenance)
    assert REGISTRY.get_sample_value("payments_ledger_differences") == 1


async def test_partitions_do_not_wait_for_the_ledger(postgres_url: str, connection: asyncpg.Connection) -> None:
    """A check of the whole ledger may take hours."""
    stop = asyncio.Event()
    settings = Settings(postgres_url=postgres_url, maintenance_interval_seconds=0.05)
    async with connection.transaction():
        await connection.execute("LOCK TABLE ledger")
        maintaining = asyncio.create_task(Maintenance(settings).run(stop))
        for _ in range(2):
            LAST_SUCCESS.set(0)
            while not REGISTRY.get_sample_value("payments_maintenance_last_success_timestamp_seconds"):
                await asyncio.sleep(0.01)
    stop.set()
    await maintaining


async def test_a_person_sees_what_differs_and_a_program_reads_it(
    postgres_url: str, connection: asyncpg.Connection, tmp_path: Path
) -> None:
    (payment,) = await pay(postgres_url, 1)
    there = {"PAYMENTS_POSTGRES_URL": postgres_url}
    done = run("check", data_dir=tmp_path, **there)
    assert (done.returncode, done.stdout) == (0, "0 payments differ from the ledger.\n")
    assert "1 payments looked at" in done.stderr
    await connection.execute("UPDATE payments SET captured_minor = captured_minor - 1")
    done = run("check", "--since", "1h", data_dir=tmp_path, **there)
    assert done.returncode == 1
    row = next(line for line in done.stdout.splitlines() if str(payment) in line)
    assert "USD 99.99" in row
    assert "USD 100.00" in row
    told = json.loads(run("check", "--json", data_dir=tmp_path, **there).stdout)["differences"]
    assert [(each["payment_id"], each["captured_minor"]) for each in told] == [(str(payment), 9_999)]
    done = run("check", "--since", "yesterday", data_dir=tmp_path, **there)
    assert done.returncode == 1
    assert "is not a date or age; write" in done.stderr
