"""That payments' amounts are what the ledger adds up to is looked at, by command and all along."""

import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import UUID

import asyncpg
import pytest
from prometheus_client import REGISTRY
from structlog.testing import capture_logs

from app.maintenance import Maintenance
from app.settings import Settings
from infra.postgres import ledger
from infra.postgres.ledger import LedgerDifference, check_all, check_changed
from tests.integration.test_cli import run
from tests.support.provider import BookkeepingGateway
from tests.support.service import delivery, new_payment_id, running_worker


@pytest.fixture
async def connection(postgres_url: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(postgres_url)
    yield connection
    await connection.close()


async def pay(postgres_url: str, count: int) -> list[UUID]:
    """So many payments of 100.00, each with 20.00 refunded in two parts."""
    payments = [new_payment_id() for _ in range(count)]
    async with running_worker(postgres_url, BookkeepingGateway()) as worker:
        await worker.accept(*(delivery("charge", each, f"{each} charge") for each in payments))
        await worker.idle()
        for part in ("one", "two"):
            await worker.accept(*(delivery("refund", each, f"{each} {part}", amount_minor=1_000) for each in payments))
            await worker.idle()
    return payments


async def everything(postgres_url: str) -> tuple[int, list[LedgerDifference]]:
    portions = [each async for each in check_all(postgres_url)]
    return sum(each.payments for each in portions), [each for portion in portions for each in portion.differences]


TAMPERED = [
    ("UPDATE payments SET captured_minor = captured_minor - 1", (9_999, 2_000, 0, 10_000, 2_000, 0, 0)),
    ("UPDATE payments SET refunded_minor = 0", (10_000, 0, 0, 10_000, 2_000, 0, 0)),
    ("UPDATE payments SET disputed_minor = 5", (10_000, 2_000, 5, 10_000, 2_000, 0, 0)),
    (
        "INSERT INTO ledger SELECT payment_id, 99, 'gateway_clearing', 'customer_refunds', 7, 'EUR' FROM payments",
        (10_000, 2_000, 0, 10_000, 1_993, 0, 7),
    ),
]


@pytest.mark.parametrize(("statement", "amounts"), TAMPERED)
async def test_a_payment_that_is_not_what_its_ledger_says_is_found(
    postgres_url: str, connection: asyncpg.Connection, statement: str, amounts: tuple[int, ...]
) -> None:
    payments = await pay(postgres_url, 3)
    since = datetime.now(UTC) - timedelta(hours=1)
    assert await everything(postgres_url) == (3, [])
    assert await check_changed(postgres_url, since) == []
    filtered = statement.replace(" FROM payments", " FROM payments WHERE payment_id = $1")
    await connection.execute(filtered if filtered != statement else f"{statement} WHERE payment_id = $1", payments[1])
    found = [LedgerDifference(payments[1], "USD", *amounts)]
    assert await everything(postgres_url) == (3, found)
    assert await check_changed(postgres_url, since) == found


async def test_portion_by_portion_every_payment_is_looked_at(
    postgres_url: str, connection: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger, "PORTION", 2)
    payments = await pay(postgres_url, 5)
    await connection.execute("UPDATE payments SET captured_minor = captured_minor - 1")
    count, found = await everything(postgres_url)
    assert count == 5
    assert {each.payment_id for each in found} == set(payments)


async def test_what_changed_is_looked_at_all_along_and_what_differs_until_it_is_mended(
    postgres_url: str, connection: asyncpg.Connection
) -> None:
    payments = await pay(postgres_url, 2)
    maintenance = Maintenance(Settings(postgres_url=postgres_url))
    await connection.execute(
        "UPDATE payments SET captured_minor = captured_minor - 1 WHERE payment_id = $1", payments[0]
    )
    # Later it is not among what changed any more.
    await connection.execute("UPDATE outbox SET created_at = created_at - interval '20 minutes'")
    with capture_logs() as logs:
        await maintenance.check_ledger()
        await maintenance.check_ledger()
    assert REGISTRY.get_sample_value("payments_ledger_differences") == 1
    told = [each["payment_id"] for each in logs if each["event"] == "payment differs from the ledger"]
    assert told == [str(payments[0])], "it is told once"
    await connection.execute("UPDATE payments SET captured_minor = 10_000")
    await connection.execute(
        "UPDATE payments SET captured_minor = captured_minor - 1 WHERE payment_id = $1", payments[1]
    )
    await maintenance.check_ledger()
    assert REGISTRY.get_sample_value("payments_ledger_differences") == 0


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
    assert "is no time; write" in done.stderr
