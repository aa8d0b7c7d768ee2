"""Times the queries that find stuck operations and holds among ten million payments with their operations.

The server makes the rows, in a separate database. Its tables are unlogged, since nothing that is timed reads the WAL.
"""

import asyncio
import time
from typing import Any, Final

import asyncpg

from benchmarks.load import percentile
from infra.local.postgres import create_database, drop_database
from infra.postgres import statements
from infra.postgres.migrate import upgrade
from infra.postgres.pool import PINNED_PLANS

STUCK: Final = 500
"""How many operations are due, and how many holds are past their end. Ten times as many operations are open but not
due yet."""
TIMES: Final = 50

PAYMENTS: Final = """
    INSERT INTO payments (payment_id, order_id, customer_id, gateway, gateway_payment_id, currency, amount_minor,
                          authorized_minor, captured_minor, status, last_operation, last_seq, authorization_expires_at,
                          created_at)
    SELECT lpad(to_hex(n), 32, '0')::uuid, 'order-' || n, 'customer-' || n % 10000, 'stripe', 'pi_' || n, 'USD', 1000,
           1000, CASE WHEN n % 100 = 0 THEN 0 ELSE 1000 END,
           CASE WHEN n % 100 = 0 THEN 'authorized' ELSE 'captured' END, 1, 1,
           CASE WHEN n % 100 = 0 THEN now() + n * interval '1 second' END, now() - interval '1 year'
      FROM generate_series($1::bigint, $2::bigint) AS n
"""
OPERATIONS: Final = """
    INSERT INTO operations (payment_id, number, kind, idempotency_key, fingerprint, content, state, amount_minor,
                            gateway, reference, attempts, lease_token, dispatched_at, result, settled_at)
    SELECT lpad(to_hex(n), 32, '0')::uuid, 1, CASE WHEN n % 100 = 0 THEN 'authorize' ELSE 'charge' END,
           'old-' || lpad(n::text, 12, '0'), '\\x00', '{}', 'succeeded', 1000, 'stripe', 'pi_' || n, 1, 1, now(), '{}',
           now()
      FROM generate_series($1::bigint, $2::bigint) AS n
"""
GET_STUCK: Final = """
    UPDATE operations SET state = 'pending', result = NULL, settled_at = NULL,
           gateway = (ARRAY['stripe', 'paypal', 'vnpay', 'momo'])[1 + number_of % 4],
           due_at = now() + CASE WHEN number_of % 11 = 0 THEN -1 ELSE 1 END * number_of * interval '1 second'
      FROM (SELECT lpad(to_hex(n * $1::bigint + 1), 32, '0')::uuid AS id, n AS number_of
              FROM generate_series(1, $2::bigint) AS n) AS chosen
     WHERE payment_id = chosen.id
"""
LAPSE: Final = """
    UPDATE payments SET authorization_expires_at = now() - interval '1 day'
     WHERE payment_id IN (SELECT lpad(to_hex(n * $1::bigint * 100), 32, '0')::uuid
                            FROM generate_series(1, $2::bigint) AS n)
"""
OWN_INDEXES: Final = """
    SELECT indexname, indexdef FROM pg_indexes
     WHERE tablename IN ('payments', 'operations') AND schemaname = 'public'
       AND NOT EXISTS (SELECT FROM pg_constraint WHERE conname = indexname)
"""
FINDERS: Final[dict[str, tuple[str, tuple[Any, ...]]]] = {
    "due_operations_ms": (
        f"WITH RECURSIVE unused AS (SELECT $2::interval), {statements.DUE} SELECT * FROM due",
        (STUCK, None, [], [], None),
    ),
    "due_operations_with_a_full_gateway_ms": (
        f"WITH RECURSIVE unused AS (SELECT $2::interval), {statements.DUE} SELECT * FROM due",
        (STUCK, None, ["stripe"], [0], None),
    ),
    "due_holds_ms": (f"WITH {statements.HOLDS_DUE} SELECT * FROM due", (STUCK, None)),
    "how_much_is_stuck_ms": (statements.STUCK, ()),
}


async def time_finders(server_url: str, name: str, rows: int) -> dict[str, Any]:
    """Milliseconds of each query: the median and the slowest, both without the first run."""
    url = create_database(server_url, name)
    try:
        upgrade(url)
        started = time.perf_counter()
        await _fill(url, rows)
        results = {"payments": rows, "filled_in_seconds": round(time.perf_counter() - started)}
        return results | await _time(url)
    finally:
        drop_database(url)


async def _fill(url: str, rows: int) -> None:
    connection = await asyncpg.connect(url)
    for table in ("payments", "operations"):
        await connection.execute(f"ALTER TABLE {table} SET UNLOGGED")
    indexes = await connection.fetch(OWN_INDEXES)
    for index in indexes:
        await connection.execute(f"DROP INDEX {index['indexname']}")
    await asyncio.gather(*(_run(url, (statement, 1, rows)) for statement in (PAYMENTS, OPERATIONS)))
    of = {
        table: [row["indexdef"] for row in indexes if f" {table} " in row["indexdef"]]
        for table in ("public.payments", "public.operations")
    }
    await asyncio.gather(*(_run(url, *((each,) for each in definitions)) for definitions in of.values()))
    await connection.execute(GET_STUCK, rows // (11 * STUCK + 1), 11 * STUCK)
    await connection.execute(LAPSE, rows // 100 // (STUCK + 1), STUCK)
    await asyncio.gather(*(_run(url, (f"VACUUM ANALYZE {table}",)) for table in ("payments", "operations")))
    await connection.close()


async def _run(url: str, *statements: tuple[Any, ...]) -> None:
    connection = await asyncpg.connect(url, server_settings={"maintenance_work_mem": "512MB"})
    for statement, *arguments in statements:
        await connection.execute(statement, *arguments)
    await connection.close()


async def _time(url: str) -> dict[str, Any]:
    """Time the queries with plans pinned as in the workers; each statement is prepared once and run many times."""
    connection = await asyncpg.connect(url, server_settings=PINNED_PLANS | {"plan_cache_mode": "force_generic_plan"})
    results = {}
    for name, (statement, arguments) in FINDERS.items():
        found, taken = len(await connection.fetch(statement, *arguments)), []
        for _ in range(TIMES):
            started = time.perf_counter()
            await connection.fetch(statement, *arguments)
            taken.append((time.perf_counter() - started) * 1000)
        taken.sort()
        results[name] = {"found": found, "median": round(percentile(taken, 0.5), 2), "slowest": round(taken[-1], 2)}
    await connection.close()
    return results
