"""The schema: forward and back, and what it refuses, whoever writes."""

import asyncio
import contextlib
import subprocess
import sys
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, LiteralString

import asyncpg
import psycopg
import pytest
import sqlalchemy as sa
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from psycopg import sql
from typer.testing import CliRunner

import migrations
from app.cli import app
from app.command_line import advice_on
from domain.commands import OperationKind
from domain.decision import Delivery
from domain.errors import StoreUnavailable
from infra.postgres import migrate
from infra.postgres.schema import REVISIONS, schema_trouble
from infra.postgres.tables import metadata
from migrations import steps
from tests.support.provider import BookkeepingGateway
from tests.support.service import InProcessWorker, NoHint, delivery, new_payment_id, running_worker

# Everything that makes up the schema, as text.
SCHEMA = """
    SELECT 'column', table_name || '.' || column_name,
           concat_ws(' ', data_type, collation_name, is_nullable, column_default, is_identity, ordinal_position)
      FROM information_schema.columns WHERE table_schema = 'public'
    UNION ALL
    SELECT 'constraint', conrelid::regclass || '.' || conname, pg_get_constraintdef(oid)
      FROM pg_constraint WHERE connamespace = 'public'::regnamespace
    UNION ALL SELECT 'index', indexname, indexdef FROM pg_indexes WHERE schemaname = 'public'
    UNION ALL SELECT 'trigger', tgname, pg_get_triggerdef(oid) FROM pg_trigger WHERE NOT tgisinternal
    UNION ALL SELECT 'view', viewname, definition FROM pg_views WHERE schemaname = 'public'
    UNION ALL SELECT 'function', proname, prosrc FROM pg_proc WHERE pronamespace = 'public'::regnamespace
    UNION ALL
    SELECT 'type', t.typname || '.' || a.attname, format_type(a.atttypid, a.atttypmod) || ' ' || a.attnum
      FROM pg_type t JOIN pg_class c ON c.oid = t.typrelid JOIN pg_attribute a ON a.attrelid = c.oid
     WHERE c.relkind = 'c' AND t.typnamespace = 'public'::regnamespace
    UNION ALL
    SELECT 'partition', inhrelid::regclass::text, inhparent::regclass::text
      FROM pg_inherits WHERE inhrelid::regclass::text NOT LIKE '%idx'
    UNION ALL
    SELECT 'options', relname, coalesce(array_to_string(reloptions, ','), '')
      FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'p', 'i')
    UNION ALL
    SELECT 'publication', pubname, concat_ws(' ', pubinsert, pubupdate, pubdelete, pubtruncate, pubviaroot)
      FROM pg_publication
    UNION ALL SELECT 'published', pubname, tablename FROM pg_publication_tables
    ORDER BY 1, 2, 3
"""


@pytest.fixture
async def connection(postgres_url: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(postgres_url)
    yield connection
    await connection.close()


def schema_of(url: str) -> list[tuple[Any, ...]]:
    engine = sa.create_engine(migrate.sync_url(url), poolclass=sa.NullPool)
    with engine.connect() as connection:
        return [tuple(row) for row in connection.execute(sa.text(SCHEMA))]


def test_up_down_up_gives_the_same_schema(empty_postgres_url: str) -> None:
    migrate.upgrade(empty_postgres_url)
    first = schema_of(empty_postgres_url)
    migrate.downgrade(empty_postgres_url, "base")
    left = {name for kind, name, _ in schema_of(empty_postgres_url) if kind != "options"}
    assert {name.split(".")[0] for name in left} <= {"alembic_version", "alembic_version_pkc"}
    migrate.upgrade(empty_postgres_url)
    assert schema_of(empty_postgres_url) == first
    assert {"column", "constraint", "index", "trigger", "view", "function", "type", "partition", "publication"} <= {
        kind for kind, _, _ in first
    }


async def test_refunds_of_other_attempts_do_not_prevent_a_downgrade(
    postgres_url: str, connection: asyncpg.Connection
) -> None:
    """Both payments were paid twice; for one of them the second hundred was refunded."""
    returned = {"authorized_minor": 200, "captured_minor": 200, "refunded_minor": 100, "owed_captured_minor": 100}
    for number, more in enumerate(({}, {"owed_returned_minor": 100})):
        row = {"payment_id": uuid.UUID(int=number), "status": "partially_refunded", "currency": "EUR"}
        await insert(connection, "payments", row | returned | more)
    written = "SELECT owed_captured_minor, xmin::text FROM payments ORDER BY payment_id"
    before = await connection.fetch(written)
    migrate.downgrade(postgres_url, "0011")
    after = await connection.fetch(written)
    assert [row["owed_captured_minor"] for row in after] == [100, 0]
    assert after[0] == before[0], "it was written for nothing"


def test_two_may_upgrade_at_once(empty_postgres_url: str, postgres_url: str) -> None:
    """Both wait for the migration lock before either has begun, and neither has a transaction open while it waits."""
    # Processes, because Alembic's state is shared by all threads of a process.
    upgrade = [sys.executable, "-c", "import sys; from infra.postgres.migrate import upgrade; upgrade(sys.argv[1])"]
    queue = """SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()
                  AND backend_type = 'client backend' AND state = 'idle' AND query = 'COMMIT'"""
    with psycopg.connect(empty_postgres_url, autocommit=True) as door:
        door.execute("SELECT pg_advisory_lock(%s)", [migrate.MIGRATION_LOCK])
        running = [subprocess.Popen([*upgrade, empty_postgres_url]) for _ in range(2)]
        while one_value(door, queue) < len(running):
            assert [each.poll() for each in running] == [None, None], "one went past the lock"
            time.sleep(0.05)
    assert [each.wait(timeout=120) for each in running] == [0, 0]
    assert schema_of(empty_postgres_url) == schema_of(postgres_url)


def one_value(connection: psycopg.Connection[Any], query: LiteralString, values: Sequence[object] = ()) -> Any:
    row = connection.execute(query, values).fetchone()
    assert row is not None
    return row[0]


BUSY = ("payments", "operations")
LOCKS = """
    SELECT count(*) FROM pg_locks WHERE database = (SELECT oid FROM pg_database WHERE datname = current_database())
       AND relation IN ('payments'::regclass, 'operations'::regclass)
       AND mode IN ('ShareLock', 'ShareRowExclusiveLock', 'ExclusiveLock', 'AccessExclusiveLock') AND
"""
"""Modes that keep payments from being written or read."""


@contextlib.contextmanager
def each_statement(event: str, seen: Callable[[str], None]) -> Iterator[None]:
    """Call `seen` with the SQL of each statement that SQLAlchemy executes, before or after its execution."""

    def told(connection: object, cursor: object, statement: str, *others: object) -> None:
        seen(statement)

    sa.event.listen(sa.Engine, event, told)
    try:
        yield
    finally:
        sa.event.remove(sa.Engine, event, told)


def test_no_lock_on_payments_outlives_the_statement_that_takes_it(empty_postgres_url: str) -> None:
    """Otherwise a lock would be held while another statement reads a whole table or creates an index."""
    migrate.upgrade(empty_postgres_url, "0004")
    holding: list[str] = []
    with psycopg.connect(empty_postgres_url, autocommit=True) as watch:

        def look(statement: str) -> None:
            if one_value(watch, f"{LOCKS} granted"):
                holding.append(statement)

        with each_statement("after_cursor_execute", look):
            migrate.upgrade(empty_postgres_url)
    assert holding == []


@pytest.mark.parametrize("table", BUSY)
def test_payments_do_not_wait_behind_a_migration_that_waits(empty_postgres_url: str, table: str) -> None:
    """Behind a long reader of a table, no lock request of a migration makes payments wait long."""
    migrate.upgrade(empty_postgres_url, "0004")
    with (
        ThreadPoolExecutor() as pool,
        psycopg.connect(empty_postgres_url) as report,
        psycopg.connect(empty_postgres_url, autocommit=True) as payment,
    ):
        report.execute(sql.SQL("SELECT FROM {}").format(sql.Identifier(table)))
        upgrading = pool.submit(migrate.upgrade, empty_postgres_url)
        while not one_value(payment, f"{LOCKS} NOT granted"):
            assert not upgrading.done()
        payment.execute("SET statement_timeout = '1s'")
        payment.execute(sql.SQL("SELECT FROM {}").format(sql.Identifier(table)))
        assert not upgrading.done()
        report.rollback()
        assert upgrading.result() > "0004"


def test_a_migration_gives_up_on_a_table_that_stays_busy(
    empty_postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "PAUSES_SECONDS", (0.01,))
    migrate.upgrade(empty_postgres_url, "0011")
    with psycopg.connect(empty_postgres_url) as report:
        report.execute("SELECT FROM payments")
        with pytest.raises(sa.exc.OperationalError, match="lock timeout"):
            migrate.upgrade(empty_postgres_url, "0012")
    assert migrate.upgrade(empty_postgres_url, "0012") == "0012"


class Interrupted(Exception):
    pass


def test_an_upgrade_that_is_interrupted_anywhere_is_done_by_the_next(
    empty_postgres_url: str, postgres_url: str
) -> None:
    done: set[str] = set()

    def interrupt(statement: str) -> None:
        if statement not in done:
            done.add(statement)
            raise Interrupted

    migrate.upgrade(empty_postgres_url, "0001")
    with each_statement("before_cursor_execute", interrupt):
        while True:
            with contextlib.suppress(Interrupted):
                migrate.upgrade(empty_postgres_url)
                break
    assert len(done) > 30
    assert schema_of(empty_postgres_url) == schema_of(postgres_url)


def test_an_index_whose_making_broke_off_is_made_anew(empty_postgres_url: str, postgres_url: str) -> None:
    migrate.upgrade(empty_postgres_url, "0012")
    with psycopg.connect(empty_postgres_url, autocommit=True) as connection:
        connection.execute("CREATE INDEX operations_refused ON operations (gateway)")
        connection.execute("UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'operations_refused'::regclass")
    migrate.upgrade(empty_postgres_url)
    assert schema_of(empty_postgres_url) == schema_of(postgres_url)


COLLATIONS = """
    SELECT a.attrelid::regclass || '.' || a.attname, l.collname
      FROM (SELECT indrelid, unnest(indkey) AS number, unnest(indcollation) AS collation
              FROM pg_index WHERE indisunique AND indrelid = ANY($1::text[]::regclass[])) AS i
      JOIN pg_attribute AS a ON a.attrelid = indrelid AND a.attnum = i.number
      JOIN pg_collation AS l ON l.oid = i.collation AND l.oid = a.attcollation
"""


async def test_no_key_that_money_hangs_on_goes_by_how_an_operating_system_sorts(
    postgres_url: str, connection: asyncpg.Connection
) -> None:
    """If the order under a unique index changes, a key that is there is not found, and money moves again."""
    rows = await connection.fetch(COLLATIONS, ["payments", "operations", "inbox"])
    keys = (
        "operations.idempotency_key",
        "payments.gateway_payment_id",
        "payments.gateway",
        "inbox.gateway",
        "inbox.event_id",
    )
    assert {tuple(row) for row in rows} == {(key, "C") for key in keys}


async def test_a_worker_goes_on_beside_the_migration_that_changes_what_it_has_prepared(
    empty_postgres_url: str,
) -> None:
    migrate.upgrade(empty_postgres_url, "0015")
    gateway, payment_id = BookkeepingGateway(), new_payment_id()
    charge, refund = (delivery(kind, payment_id, kind, amount_minor=10_000) for kind in ("charge", "refund"))
    async with running_worker(empty_postgres_url, gateway, hint=NoHint()) as worker:
        await worker.accept(charge)
        await worker.accept(charge)
        await worker.idle()
        await asyncio.to_thread(migrate.upgrade, empty_postgres_url, "0016")
        for again in (refund, charge, refund):
            await until_accepted(worker, again)
        await worker.idle()
    assert gateway.moved == {OperationKind.CHARGE: 1, OperationKind.REFUND: 1}


async def until_accepted(worker: InProcessWorker, given: Delivery) -> None:
    """Retry until it is saved, as the consumer does."""
    async with asyncio.timeout(10):
        while True:
            with contextlib.suppress(StoreUnavailable):
                await worker.accept(given)
                return
            await asyncio.sleep(0.05)


@pytest.mark.parametrize("table", ["operations", "inbox"])
async def test_autovacuum_of_settled_rows_is_set_to_an_absolute_threshold(
    connection: asyncpg.Connection, table: str
) -> None:
    options = await connection.fetchval("SELECT reloptions FROM pg_class WHERE oid = $1::text::regclass", table)
    assert {
        "autovacuum_vacuum_scale_factor=0",
        "autovacuum_vacuum_threshold=200000",
        "vacuum_index_cleanup=on",
    } <= set(options or ())


def test_versions_form_one_line() -> None:
    """With two heads, it would be undefined which schema is the newest."""
    scripts = ScriptDirectory(str(Path(migrations.__file__).parent))
    assert len(scripts.get_heads()) == len(scripts.get_bases()) == 1


def test_a_second_upgrade_changes_nothing(postgres_url: str) -> None:
    before = schema_of(postgres_url)
    migrate.upgrade(postgres_url)
    assert schema_of(postgres_url) == before


def test_the_tables_in_code_are_those_of_the_schema(postgres_url: str) -> None:
    engine = sa.create_engine(migrate.sync_url(postgres_url), poolclass=sa.NullPool)
    found = sa.MetaData()
    found.reflect(engine, only=list(metadata.tables))
    for name, table in metadata.tables.items():
        ours = {c.name: (str(c.type.compile(engine.dialect)), c.nullable, c.primary_key) for c in table.columns}
        theirs = {
            c.name: (str(c.type.compile(engine.dialect)), c.nullable, c.primary_key) for c in found.tables[name].columns
        }
        assert ours == theirs, name


# --- what the schema refuses ---------------------------------------------------------------------------------------

GOOD = {
    "payment_id": uuid.UUID(int=1), "status": "captured", "currency": "EUR", "amount_minor": 10,
    "authorized_minor": 10, "captured_minor": 6, "released_minor": 3, "reserved_capture_minor": 1,
    "refunded_minor": 4, "reserved_refund_minor": 2, "disputed_minor": 0, "open_operations": 0,
    "owed_held_minor": 0, "owed_captured_minor": 0, "owed_returned_minor": 0,
}  # fmt: skip


async def insert(connection: asyncpg.Connection, table: str, row: dict[str, Any]) -> None:
    places = ", ".join(f"${number}" for number in range(1, len(row) + 1))
    await connection.execute(f"INSERT INTO {table} ({', '.join(row)}) VALUES ({places})", *row.values())


async def test_amounts_may_go_to_their_limits(connection: asyncpg.Connection) -> None:
    await insert(connection, "payments", GOOD)
    await insert(connection, "payments", {"payment_id": uuid.uuid4(), "status": "created"})


@pytest.mark.parametrize(
    ("constraint", "bad"),
    [
        *(("payments_amounts_not_negative", {name: -1}) for name in GOOD if name.endswith("_minor")),
        ("payments_amounts_not_negative", {"open_operations": -1}),
        ("payments_captured_within_authorized", {"captured_minor": 7}),
        ("payments_captured_within_authorized", {"released_minor": 4}),
        ("payments_captured_within_authorized", {"reserved_capture_minor": 2}),
        ("payments_captured_within_authorized", {"authorized_minor": 9}),
        ("payments_captured_within_authorized", {"owed_held_minor": 1}),
        ("payments_refunded_within_captured", {"refunded_minor": 5}),
        ("payments_refunded_within_captured", {"reserved_refund_minor": 3}),
        ("payments_refunded_within_captured", {"owed_captured_minor": 1}),
        ("payments_returned_within_owed", {"owed_returned_minor": 1}),
        ("payments_amounts_have_currency", {"currency": None}),
        ("payments_status_known", {"status": "fine"}),
        ("payments_gateway_payment_has_gateway", {"gateway_payment_id": "pi_1"}),
    ],
)
async def test_impossible_amounts_are_refused(
    connection: asyncpg.Connection, constraint: str, bad: dict[str, Any]
) -> None:
    with pytest.raises(asyncpg.CheckViolationError) as refused:
        await insert(connection, "payments", GOOD | bad)
    assert refused.value.constraint_name == constraint
    await insert(connection, "payments", GOOD)
    column, value = next(iter(bad.items()))
    with pytest.raises(asyncpg.CheckViolationError, match=constraint):
        await connection.execute(f"UPDATE payments SET {column} = $1", value)


OPERATION = {
    "payment_id": uuid.UUID(int=1), "number": 1, "kind": "charge", "fingerprint": b"", "content": "{}",
    "state": "received", "idempotency_key": "key", "due_at": None, "result": None, "gateway": "stripe",
    "is_leased": False, "lease_token": 0, "amount_minor": 0,
}  # fmt: skip
UNDER_WAY = OPERATION | {
    "state": "dispatched", "due_at": datetime.now(UTC), "is_leased": True, "lease_token": 1,
}  # fmt: skip


@pytest.mark.parametrize("state", ["dispatched", "pending", "indeterminate", "needs_review"])
@pytest.mark.parametrize(
    ("constraint", "bad"),
    [
        ("operations_under_way_are_due", {"due_at": None, "is_leased": False}),
        ("operations_due_at_a_gateway", {"gateway": None}),
        ("operations_leased_have_end_and_token", {"lease_token": 0}),
        ("operations_amount_not_negative", {"amount_minor": -1}),
    ],
)
async def test_nothing_is_under_way_where_nobody_would_look(
    connection: asyncpg.Connection, state: str, constraint: str, bad: dict[str, Any]
) -> None:
    with pytest.raises(asyncpg.CheckViolationError) as refused:
        await insert(connection, "operations", UNDER_WAY | bad | {"state": state})
    assert refused.value.constraint_name == constraint
    await insert(connection, "operations", UNDER_WAY | {"state": state})
    column, value = next(iter(bad.items()))
    with pytest.raises(asyncpg.CheckViolationError):
        await connection.execute(f"UPDATE operations SET {column} = $1", value)


async def test_a_row_where_nobody_would_look_is_told_by_the_migration_which_goes_on_once_it_is_mended(
    postgres_url: str, connection: asyncpg.Connection
) -> None:
    migrate.downgrade(postgres_url, "0016")
    await insert(connection, "operations", UNDER_WAY | {"due_at": None, "is_leased": False})
    with pytest.raises(sa.exc.IntegrityError, match="operations_under_way_are_due"):
        migrate.upgrade(postgres_url, "0017")
    await connection.execute("UPDATE operations SET due_at = now()")
    assert migrate.upgrade(postgres_url, "0017") == "0017"


async def test_a_lease_has_an_end(connection: asyncpg.Connection) -> None:
    with pytest.raises(asyncpg.CheckViolationError, match="operations_leased_have_end_and_token"):
        await insert(connection, "operations", UNDER_WAY | {"state": "received", "due_at": None})


@pytest.mark.parametrize("state", ["rejected", "succeeded", "declined", "not_executed"])
async def test_a_final_operation_has_a_result(connection: asyncpg.Connection, state: str) -> None:
    with pytest.raises(asyncpg.CheckViolationError, match="operations_final_has_result"):
        await insert(connection, "operations", OPERATION | {"state": state})
    await insert(connection, "operations", OPERATION | {"state": state, "result": "{}"})
    with pytest.raises(asyncpg.CheckViolationError, match="operations_final_has_result"):
        await connection.execute("UPDATE operations SET due_at = now()")


@pytest.mark.parametrize("bad", [{"state": "done"}, {"kind": "give"}], ids=["state", "kind"])
async def test_unknown_words_are_refused(connection: asyncpg.Connection, bad: dict[str, Any]) -> None:
    with pytest.raises(asyncpg.CheckViolationError):
        await insert(connection, "operations", OPERATION | bad)


async def test_a_key_is_accepted_once(connection: asyncpg.Connection) -> None:
    await insert(connection, "operations", OPERATION)
    with pytest.raises(asyncpg.UniqueViolationError, match="operations_idempotency_key_key"):
        await insert(connection, "operations", OPERATION | {"payment_id": uuid.UUID(int=2)})
    with pytest.raises(asyncpg.UniqueViolationError, match="operations_pkey"):
        await insert(connection, "operations", OPERATION | {"idempotency_key": "other"})


TRANSFER = {
    "payment_id": uuid.UUID(int=1), "payment_seq": 1, "debit": "a", "credit": "b", "amount_minor": 5, "currency": "EUR",
}  # fmt: skip


@pytest.mark.parametrize("statement", ["UPDATE ledger SET amount_minor = 6", "DELETE FROM ledger", "TRUNCATE ledger"])
async def test_the_ledger_is_append_only(connection: asyncpg.Connection, statement: str) -> None:
    await insert(connection, "ledger", TRANSFER)
    with pytest.raises(asyncpg.RestrictViolationError, match="append-only"):
        await connection.execute(statement)
    assert await connection.fetchval("SELECT sum(amount_minor) FROM ledger") == 5


@pytest.mark.parametrize("bad", [{"amount_minor": 0}, {"amount_minor": -5}, {"credit": "a"}])
async def test_a_transfer_moves_something_somewhere(connection: asyncpg.Connection, bad: dict[str, Any]) -> None:
    with pytest.raises(asyncpg.CheckViolationError):
        await insert(connection, "ledger", TRANSFER | bad)


async def test_a_payments_event_books_once(connection: asyncpg.Connection) -> None:
    await insert(connection, "ledger", TRANSFER)
    with pytest.raises(asyncpg.UniqueViolationError):
        await insert(connection, "ledger", TRANSFER | {"amount_minor": 6})


async def test_postings_sum_to_zero(connection: asyncpg.Connection) -> None:
    for number in range(1, 8):
        debit, credit = ("a", "b") if number % 3 else ("b", "c")
        await insert(
            connection,
            "ledger",
            TRANSFER | {"payment_seq": number, "debit": debit, "credit": credit, "amount_minor": number},
        )
    totals = await connection.fetch("SELECT account, sum(amount_minor)::int FROM ledger_postings GROUP BY 1 ORDER BY 1")
    assert [tuple(row) for row in totals] == [("a", 19), ("b", -10), ("c", -9)]
    assert await connection.fetchval("SELECT count(*) FROM ledger_postings") == 14


async def test_postings_sum_to_zero_per_payment_and_currency(connection: asyncpg.Connection) -> None:
    for number in range(1, 25):
        row = {"payment_id": uuid.UUID(int=number % 4), "currency": ("EUR", "USD", "JPY")[number % 3]}
        await insert(connection, "ledger", TRANSFER | row | {"payment_seq": number, "amount_minor": number})
    sums = "SELECT sum(amount_minor)::int FROM ledger_postings GROUP BY payment_id, currency"
    assert [row[0] for row in await connection.fetch(sums)] == [0] * 12


async def test_a_database_without_the_schema_is_not_ready(empty_postgres_url: str, postgres_url: str) -> None:
    for url, trouble in ((empty_postgres_url, "run `payments migrate`"), (postgres_url, "")):
        connection = await asyncpg.connect(url)
        told = await schema_trouble(connection)
        await connection.close()
        assert trouble in (told or "")
        assert bool(told) == bool(trouble)


async def test_a_database_of_an_earlier_release_is_not_ready_and_one_of_a_later_is(postgres_url: str) -> None:
    connection = await asyncpg.connect(postgres_url)
    assert await schema_trouble(connection) is None
    for revision, trouble in ((REVISIONS[-2], f"needs {REVISIONS[-1]}: run `payments migrate`"), ("9999", None)):
        await connection.execute("UPDATE alembic_version SET version_num = $1", revision)
        told = await schema_trouble(connection)
        assert told == trouble or (told and trouble and trouble in told)
    await connection.execute(f"CREATE ROLE works_{(role := uuid.uuid4().hex)}; SET ROLE works_{role}")
    assert await schema_trouble(connection) is None, "a role that may not ask is not told that it cannot work"
    await connection.execute(f"RESET ROLE; DROP ROLE works_{role}")
    await connection.close()


def test_an_older_schema_is_made_alone_and_a_newer_one_is_not_called_older(
    empty_postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PAYMENTS_POSTGRES_URL", empty_postgres_url)
    for words, now in ((["0004"], "0004"), (["0005"], "0005"), (["0004"], "0005"), (["0004", "--down"], "0004")):
        done = CliRunner().invoke(app, ["migrate", "--to", *words])
        assert (done.exit_code, done.output) == (0, f"The schema is at {now}.\n")


@pytest.mark.parametrize("more", [[], ["--down"]])
def test_a_revision_that_is_empty_is_told(postgres_url: str, more: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAYMENTS_POSTGRES_URL", postgres_url)
    done = CliRunner().invoke(app, ["migrate", "--to", "", *more])
    assert (done.exit_code, "--to is empty" in done.output) == (1, True)


def test_a_revision_that_is_none_is_told_with_what_to_do(postgres_url: str) -> None:
    for step in (migrate.upgrade, migrate.downgrade):
        with pytest.raises(CommandError, match="nope") as caught:
            step(postgres_url, "nope")
        assert "migrations/versions" in (advice_on(caught.value) or "")
