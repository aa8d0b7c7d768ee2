"""Fills the tables with settled payments, as if the service had run for a long time."""

import asyncpg

FILL = """
    WITH made AS (
        INSERT INTO payments (payment_id, order_id, customer_id, gateway, gateway_payment_id, currency, amount_minor,
                              authorized_minor, captured_minor, status, last_operation, last_seq, created_at)
        SELECT gen_random_uuid(), 'order-' || n, 'customer-' || n % 10000, 'instant', 'instant_old_' || n, 'USD', 1000,
               1000, 1000, 'captured', 1, 1, now() - interval '30 days' + n * interval '1 second'
          FROM generate_series($1::bigint, $2::bigint) AS n
        RETURNING payment_id
    ), operated AS (
        INSERT INTO operations (payment_id, number, kind, idempotency_key, fingerprint, content, state, amount_minor,
                                gateway, reference, attempts, lease_token, dispatched_at, result, settled_at)
        SELECT payment_id, 1, 'charge', 'old-' || payment_id, '\\x00', repeat('x', 300), 'succeeded', 1000, 'instant',
               'instant_old', 1, 1, now(), repeat('y', 700), now()
          FROM made
    )
    INSERT INTO ledger (payment_id, payment_seq, debit, credit, amount_minor, currency)
    SELECT payment_id, 1, 'gateway_clearing', 'customer_sales', 1000, 'USD' FROM made
"""
PORTION = 50_000


async def preload_payments(url: str, count: int) -> None:
    """Add `count` settled payments with operation and ledger row, but no events, as if published long ago."""
    connection = await asyncpg.connect(url)
    try:
        first = await connection.fetchval("SELECT coalesce(max(id), 0) FROM payments")
        for start in range(first + 1, first + 1 + count, PORTION):
            await connection.execute(FILL, start, min(start + PORTION - 1, first + count))
        await connection.execute("VACUUM ANALYZE payments, operations, ledger")
        await connection.execute("CHECKPOINT")
    finally:
        await connection.close()
