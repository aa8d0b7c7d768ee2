"""Whether payments' amounts are what the ledger adds up to. Both are written in one transaction: only a defect, or a
hand in the tables, makes them differ."""

from collections.abc import AsyncIterator, Collection
from datetime import datetime
from typing import Final, NamedTuple
from uuid import UUID

import asyncpg

PORTION: Final = 10_000
"""Payments that are looked at in one statement, some 0.1 s."""

# One statement is one snapshot: nobody's commit falls between a payment and its transfers.
_DIFFERENCES: Final = """
    SELECT p.payment_id, p.currency, p.captured_minor, p.refunded_minor, p.disputed_minor,
           l.captured_minor, l.refunded_minor, l.disputed_minor, l.foreign_minor
      FROM payments AS p
      CROSS JOIN LATERAL (
          SELECT coalesce(-sum(amount_minor) FILTER (WHERE account = 'customer_sales'), 0)::bigint AS captured_minor,
                 coalesce(sum(amount_minor) FILTER (WHERE account = 'customer_refunds'), 0)::bigint AS refunded_minor,
                 coalesce(sum(amount_minor) FILTER (WHERE account = 'customer_disputes'), 0)::bigint AS disputed_minor,
                 coalesce(sum(amount_minor) FILTER (
                     WHERE amount_minor > 0 AND currency IS DISTINCT FROM p.currency), 0)::bigint AS foreign_minor
            FROM ledger_postings WHERE payment_id = p.payment_id) AS l
     WHERE (p.captured_minor, p.refunded_minor, p.disputed_minor, 0)
           <> (l.captured_minor, l.refunded_minor, l.disputed_minor, l.foreign_minor)
"""
_OF_PORTION: Final = f"{_DIFFERENCES} AND p.id > $1 AND p.id <= $2 ORDER BY p.id"
# Whatever changes a payment publishes it.
_CHANGED: Final = f"""
    WITH changed AS (
        SELECT unnest($2::uuid[]) AS payment_id
        UNION SELECT aggregateid::uuid FROM outbox WHERE created_at >= $1)
    {_DIFFERENCES.replace("payments AS p", "changed JOIN payments AS p USING (payment_id)")} ORDER BY p.id
"""  # noqa: S608 - constants of this module
_END_OF_PORTION: Final = """
    SELECT max(id), count(*) FROM (SELECT id FROM payments WHERE id > $1 ORDER BY id LIMIT $2) AS portion
"""


class LedgerDifference(NamedTuple):
    """A payment whose amounts are not what its transfers add up to, in minor units of `currency`.

    `foreign_minor` was booked in another currency.
    """

    payment_id: UUID
    currency: str | None
    captured_minor: int
    refunded_minor: int
    disputed_minor: int
    booked_captured_minor: int
    booked_refunded_minor: int
    booked_disputed_minor: int
    foreign_minor: int


class CheckedPortion(NamedTuple):
    """So many payments were looked at, and these differ."""

    payments: int
    differences: list[LedgerDifference]


async def check_all(url: str) -> AsyncIterator[CheckedPortion]:
    """Look at every payment there is, in the order in which they came, a portion at a time.

    Raises:
        `infra.postgres.errors.AWAY`: Postgres cannot be reached, or is gone.
    """
    connection = await asyncpg.connect(url, timeout=10, command_timeout=60)
    try:
        begin = 0
        while True:
            end, count = await connection.fetchrow(_END_OF_PORTION, begin, PORTION) or (None, 0)
            if end is None:
                return
            rows = await connection.fetch(_OF_PORTION, begin, end)
            yield CheckedPortion(count, [LedgerDifference(*row) for row in rows])
            begin = end
    finally:
        await connection.close(timeout=10)


async def check_changed(url: str, since: datetime, *, beside: Collection[UUID] = ()) -> list[LedgerDifference]:
    """Look at the payments that something was published of since then, and at those `beside`.

    Raises:
        `infra.postgres.errors.AWAY`: Postgres cannot be reached, or is gone.
    """
    connection = await asyncpg.connect(url, timeout=10, command_timeout=300)
    try:
        rows = await connection.fetch(_CHANGED, since, list(beside))
        return [LedgerDifference(*row) for row in rows]
    finally:
        await connection.close(timeout=10)
