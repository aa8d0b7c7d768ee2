"""The write path's plans over 100,000 payments: none reads a whole table.

The plans are generic, which asyncpg's cached statements end up with: made once, without knowing the arrays' sizes.
"""

import re
import uuid
from collections.abc import AsyncIterator, Iterator

import asyncpg
import pytest

from infra.local import StackUrls, create_database, drop_database
from infra.postgres import inbox, statements
from infra.postgres.pool import PINNED_PLANS, create_pool
from tests.integration.bulk import fill_now

STATEMENTS = {
    name: text
    for name, text in (vars(statements) | vars(inbox)).items()
    if name.isupper() and isinstance(text, str) and re.match(r"\s*(SELECT|INSERT|UPDATE|DELETE|WITH)\b", text)
}
INDEXES = {
    "LOCK_PAYMENTS": {"payments_payment_id_key"},
    "PAYMENTS_OF": {"payments_payment_id_key"},
    "OPEN_OPERATIONS": {"operations_pkey"},
    "FIND_OPERATIONS": {"operations_idempotency_key_key"},
    "UPDATE_PAYMENTS": {"payments_payment_id_key"},
    "UPDATE_OPERATIONS": {"operations_pkey"},
    "CLAIM_DUE": {"operations_refused", "operations_due_by_gateway", "operations_pkey"},
    "IN_DOUBT": {"operations_in_doubt"},
    "FIND_UNDER_WAY": {"operations_due_by_gateway"},
    "COUNT_UNDER_WAY": {"operations_due_by_gateway"},
    "COUNT_DUE_BUT": {"operations_due_by_gateway"},
    "MAKE_DUE": {"operations_due_by_gateway"},
    "FIND_LAPSED_HOLDS": {"payments_hold_due", "operations_pkey"},
    "CLAIM_HOLDS": {"payments_hold_due", "payments_pkey", "operations_pkey"},
    "MAKE_HOLDS_DUE": {"payments_hold_due"},
    "STUCK": {"operations_due_by_gateway", "payments_hold_due", "inbox_due"},
    "RENEW_LEASES": {"operations_pkey"},
    "OPERATIONS_AT": {"operations_pkey"},
    "OPERATIONS_OF_KIND": {"operations_pkey"},
    "APPLY_NOTICES": {"inbox_pkey"},
    "ACCEPT": {"payments_payment_id_key", "payments_gateway_payment_id", "operations_attempt", "operations_pkey"},
    "CLAIM": {"inbox_due", "inbox_pkey"},
    "FORGET": {"inbox_pkey"},
    "SAVE": {"payments_payment_id_key", "operations_pkey", "inbox_pkey"},
}


@pytest.fixture(scope="module")
def filled_url(stack: StackUrls, migrated_template: str) -> Iterator[str]:
    url = create_database(stack.postgres_url, f"test_{uuid.uuid4().hex[:12]}", template=migrated_template)
    fill_now(url)
    yield url
    drop_database(url)


@pytest.fixture
async def pinned(filled_url: str) -> AsyncIterator[asyncpg.Connection]:
    settings = PINNED_PLANS | {"plan_cache_mode": "force_generic_plan"}
    connection = await asyncpg.connect(filled_url, server_settings=settings)
    yield connection
    await connection.close()


async def generic_plan(connection: asyncpg.Connection, statement: str) -> str:
    """The plan that holds for any parameters; parameters that the statement does not use are declared as text."""
    used = {int(number) for number in re.findall(r"\$(\d+)", statement)}
    unused = [f"${number}::text IS NULL" for number in range(1, max(used, default=0) + 1) if number not in used]
    if unused:
        statement = f"WITH unused AS (SELECT {', '.join(unused)}) {statement.strip()}"
    await connection.execute(f"PREPARE probe AS {statement}")
    try:
        nothing = f"({', '.join(['NULL'] * max(used))})" if used else ""
        return "\n".join(row[0] for row in await connection.fetch(f"EXPLAIN EXECUTE probe{nothing}"))
    finally:
        await connection.execute("DEALLOCATE probe")


def test_every_statement_is_looked_at() -> None:
    assert set(STATEMENTS) == set(INDEXES) | {"INSERT_PAYMENTS", "INSERT_OPERATIONS", "INSERT_LEDGER", "INSERT_OUTBOX"}


@pytest.mark.parametrize("name", STATEMENTS)
async def test_statement_walks_its_indexes(name: str, pinned: asyncpg.Connection) -> None:
    plan = await generic_plan(pinned, STATEMENTS[name])
    assert not re.search(r"Seq Scan on (payments|operations|outbox|ledger|inbox)", plan), plan
    assert "Hash Join" not in plan, plan
    assert "Merge Join" not in plan, plan
    for index in INDEXES.get(name, ()):
        assert f" {index} " in plan, plan


@pytest.mark.parametrize("name", ["CLAIM_DUE", "CLAIM_HOLDS"])
async def test_however_much_is_stuck_no_more_of_it_is_read_than_is_claimed(
    name: str, pinned: asyncpg.Connection
) -> None:
    """The rows are read in index order, up to the limit. A sort would read all of them first."""
    plan = await generic_plan(pinned, STATEMENTS[name])
    assert "Limit" in plan, plan
    assert "Sort" not in plan, plan


async def test_due_operations_are_read_by_an_index_on_their_gateway(pinned: asyncpg.Connection) -> None:
    plan = await generic_plan(pinned, STATEMENTS["CLAIM_DUE"])
    assert re.search(r"Index Cond: \(\(gateway = [\w.]+\) AND \(due_at IS NOT NULL\) AND \(due_at <= .+\)\)", plan), (
        plan
    )


async def test_the_plans_hold_though_statistics_say_that_the_tables_are_empty(postgres_url: str) -> None:
    """A plan that a worker prepares on its first day may still be in use on its hundredth."""
    settings = PINNED_PLANS | {"plan_cache_mode": "force_generic_plan"}
    connection = await asyncpg.connect(postgres_url, server_settings=settings)
    await connection.execute("ANALYZE")
    for name, statement in STATEMENTS.items():
        plan = await generic_plan(connection, statement)
        assert not re.search(r"Seq Scan on (payments|operations|inbox)", plan), f"{name}\n{plan}"
        assert "Hash Join" not in plan, plan
        assert "Merge Join" not in plan, plan
    await connection.close()


async def test_the_write_path_pins_its_plans(postgres_url: str) -> None:
    pool = await create_pool(postgres_url, size=1)
    async with pool.acquire() as connection:
        for name in PINNED_PLANS:
            assert await connection.fetchval(f"SHOW {name}") == "off"
    await pool.close()
