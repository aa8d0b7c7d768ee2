"""A hundred thousand payments in one database, created by SQL, for tests of query plans and pages."""

import asyncio
import uuid
from typing import Final
from uuid import UUID

import asyncpg

PAYMENTS: Final = 100_000

PAYMENT_ROWS: Final = """
    INSERT INTO payments (payment_id, order_id, customer_id, gateway, gateway_payment_id, currency, amount_minor,
        authorized_minor, captured_minor, status, has_indeterminate, open_operations, last_operation, last_seq,
        authorization_expires_at, created_at)
    SELECT md5('payment-' || n)::uuid, 'order-' || (n / 3), 'customer-' || (n % 1000),
           CASE WHEN n % 10 = 0 THEN 'other' ELSE 'stripe' END, 'pi_' || n,
           CASE WHEN n % 4 = 0 THEN 'USD' ELSE 'EUR' END, n % 5000 + 100,
           CASE WHEN n % 100 < 97 THEN n % 5000 + 100 ELSE 0 END,
           CASE WHEN n % 100 < 90 THEN n % 5000 + 100 WHEN n % 100 < 92 THEN 50 ELSE 0 END,
           CASE WHEN n % 100 < 90 THEN 'captured' WHEN n % 100 < 92 THEN 'partially_captured'
                WHEN n % 100 < 97 THEN 'authorized' ELSE 'failed' END,
           n % 5000 = 98, CASE WHEN n % 1000 = 98 THEN 1 ELSE 0 END, 1, 1,
           CASE WHEN n % 100 < 97 THEN now() + n * interval '1 second' END,
           now() - ($1 - n) * interval '1 minute'
      FROM generate_series(1, $1::integer) AS n
"""
# One payment in 1000 is open. One in 5000 needs review, due in an hour; other open ones were due n / 1000 hours ago.
OPERATION_ROWS: Final = """
    INSERT INTO operations (payment_id, number, kind, idempotency_key, fingerprint, content, state, amount_minor,
        gateway, attempts, lease_token, due_at, dispatched_at, result)
    SELECT md5('payment-' || n)::uuid, 1, 'authorize', 'key-' || n, '\\x00', '{}',
           CASE WHEN n % 1000 <> 98 THEN 'succeeded' WHEN n % 5000 = 98 THEN 'needs_review' ELSE 'pending' END,
           n % 5000 + 100, 'stripe', 1, 1,
           CASE WHEN n % 5000 = 98 THEN now() + interval '1 hour'
                WHEN n % 1000 = 98 THEN now() - (n / 1000) * interval '1 hour' END,
           now() - (n / 1000) * interval '1 hour',
           CASE WHEN n % 1000 <> 98 THEN '{}' END
      FROM generate_series(1, $1::integer) AS n
"""


async def fill(url: str, count: int = PAYMENTS) -> None:
    """Put `count` payments with one operation each into the migrated database at `url`, and gather statistics."""
    connection = await asyncpg.connect(url)
    try:
        await connection.execute(PAYMENT_ROWS, count)
        await connection.execute(OPERATION_ROWS, count)
        await connection.execute("VACUUM ANALYZE payments")
        await connection.execute("VACUUM ANALYZE operations")
    finally:
        await connection.close()


def fill_now(url: str, count: int = PAYMENTS) -> None:
    """`fill`, for fixtures that live longer than an event loop."""
    asyncio.run(fill(url, count))


def payment_id(n: int) -> UUID:
    """The id of payment number `n`."""
    import hashlib

    return uuid.UUID(hashlib.md5(f"payment-{n}".encode()).hexdigest())
