"""Checks that payments' amounts equal the sums of the ledger. Both are written in one transaction: only a defect, or a
manual change of the tables, makes them differ."""

from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Any, Final, NamedTuple
from uuid import UUID

import asyncpg

PORTION: Final = 10_000
"""Payments or events that one statement checks, in about 0.3 s."""
FIRST_ID: Final = UUID(int=0)
_LAST_ID: Final = UUID(int=2**128 - 1)

# One statement is one snapshot: no commit falls between reading a payment and its transfers. FULL JOIN: there may be
# transfers without a payment. Amounts are summed by account before the comparison, so that a transfer which a later one
# reversed does not count.
_DIFFERENCES: Final = """
    WITH net AS (
        SELECT payment_id, account, currency, sum(amount_minor) AS minor
          FROM ledger_postings WHERE {which} GROUP BY payment_id, account, currency
    ), told AS (
        SELECT payment_id, p.currency, coalesce(captured_minor, 0) AS captured_minor,
               coalesce(refunded_minor, 0) AS refunded_minor, coalesce(disputed_minor, 0) AS disputed_minor,
               account, minor, net.currency IS DISTINCT FROM p.currency AS is_foreign
          FROM (SELECT * FROM payments WHERE {which}) AS p FULL JOIN net USING (payment_id)
    ), compared AS (
        SELECT payment_id, currency, captured_minor, refunded_minor, disputed_minor,
               coalesce(-sum(minor) FILTER (WHERE NOT is_foreign AND account = 'customer_sales'), 0)::bigint
                   AS booked_captured_minor,
               coalesce(sum(minor) FILTER (WHERE NOT is_foreign AND account = 'customer_refunds'), 0)::bigint
                   AS booked_refunded_minor,
               coalesce(sum(minor) FILTER (WHERE NOT is_foreign AND account = 'customer_disputes'), 0)::bigint
                   AS booked_disputed_minor,
               coalesce(sum(minor) FILTER (WHERE NOT is_foreign AND account = 'gateway_clearing'), 0)::bigint
                   AS booked_clearing_minor,
               coalesce(sum(minor) FILTER (WHERE is_foreign AND minor > 0), 0)::bigint AS foreign_minor
          FROM told GROUP BY payment_id, currency, captured_minor, refunded_minor, disputed_minor
    )
    SELECT * FROM compared
     WHERE (captured_minor, refunded_minor, disputed_minor, captured_minor - refunded_minor - disputed_minor, 0)
        <> (booked_captured_minor, booked_refunded_minor, booked_disputed_minor, booked_clearing_minor, foreign_minor)
     ORDER BY payment_id
"""
_OF_RANGE: Final = _DIFFERENCES.format(which="payment_id BETWEEN $1 AND $2")
_OF_THESE: Final = _DIFFERENCES.format(which="payment_id = ANY($1::uuid[])")
# Where a portion ends: by transfers as well, of which a payment has a few, as they may have no payment.
_PORTION: Final = """
    SELECT least(
        (SELECT payment_id FROM payments WHERE payment_id >= $1 ORDER BY payment_id OFFSET $2 - 1 LIMIT 1),
        (SELECT payment_id FROM ledger WHERE payment_id >= $1 ORDER BY payment_id OFFSET 10 * $2 - 1 LIMIT 1))
"""
_COUNT: Final = "SELECT count(*) FROM payments WHERE payment_id BETWEEN $1 AND $2"
_END: Final = "SELECT pg_snapshot_xmax(pg_current_snapshot())::text::bigint"
# Every change of a payment publishes an event. Backwards by transaction id, which has an index, while `created_at` has
# none: a statement reads one portion and locks the outbox only as long as that takes. TIES: whole transactions.
_CHANGED: Final = """
    SELECT array_agg(DISTINCT aggregateid::uuid) FILTER (WHERE created_at >= $3), min(xact)
      FROM (SELECT aggregateid, created_at, xact FROM outbox
             WHERE xact < $1 ORDER BY xact DESC FETCH FIRST $2 ROWS WITH TIES) AS portion
"""


class LedgerDifference(NamedTuple):
    """A payment whose amounts differ from the sums of its transfers, in minor units of `currency`.

    `booked_clearing_minor` is what its provider owes us by the transfers; `foreign_minor` was booked in another
    currency. For transfers without a payment `currency` is None, and everything counts as foreign.
    """

    payment_id: UUID
    currency: str | None
    captured_minor: int
    refunded_minor: int
    disputed_minor: int
    booked_captured_minor: int
    booked_refunded_minor: int
    booked_disputed_minor: int
    booked_clearing_minor: int
    foreign_minor: int


class CheckedPortion(NamedTuple):
    """How many payments were checked, and which of them differ."""

    payments: int
    differences: list[LedgerDifference]
    next_id: UUID | None = None
    """The id at which `check_all` continues; None at its end."""


async def database_time(url: str) -> datetime:
    """The database's clock, which dates the rows of the ledger and the outbox.

    Raises:
        `infra.postgres.errors.AWAY`: Postgres cannot be reached, or is gone.
    """
    async with _connected(url) as connection:
        moment: datetime = await connection.fetchval("SELECT now()")
        return moment


async def check_all(url: str, begin: UUID = FIRST_ID) -> AsyncIterator[CheckedPortion]:
    """Check every payment and every transfer from `begin` on, in the order of payment ids, a portion at a time.

    Raises:
        `infra.postgres.errors.AWAY`: Postgres cannot be reached, or is gone.
    """
    next_id: UUID | None = begin
    async with _connected(url) as connection:
        while next_id is not None:
            begin, end = next_id, await connection.fetchval(_PORTION, next_id, PORTION) or _LAST_ID
            rows = await connection.fetch(_OF_RANGE, begin, end)
            count = await connection.fetchval(_COUNT, begin, end)
            next_id = UUID(int=end.int + 1) if end != _LAST_ID else None
            yield CheckedPortion(count, [LedgerDifference(*row) for row in rows], next_id)


async def check_changed(url: str, since: datetime, *, beside: Collection[UUID] = ()) -> AsyncIterator[CheckedPortion]:
    """Check the payments `beside`, and those with events published since then, the latest first.

    A portion at a time; a payment with events in several portions is checked in each. Events of a transaction that ran
    for minutes, and events published on another server, may be missed: `check_all` finds those payments.

    Raises:
        `infra.postgres.errors.AWAY`: Postgres cannot be reached, or is gone.
    """
    known = list(beside)
    async with _connected(url) as connection:
        below = await connection.fetchval(_END)
        for first in range(0, len(known), PORTION):
            yield await _check(connection, known[first : first + PORTION])
        while True:
            ids, below = await connection.fetchrow(_CHANGED, below, PORTION, since) or ([], None)
            if not ids:
                return
            yield await _check(connection, ids)


async def _check(connection: "asyncpg.Connection[Any]", ids: Sequence[UUID]) -> CheckedPortion:
    rows = await connection.fetch(_OF_THESE, ids)
    return CheckedPortion(len(ids), [LedgerDifference(*row) for row in rows])


@asynccontextmanager
async def _connected(url: str) -> "AsyncIterator[asyncpg.Connection[Any]]":
    # Portions must be found by an index, however Postgres estimates the number of rows.
    settings = {"enable_seqscan": "off"}
    connection = await asyncpg.connect(url, timeout=10, command_timeout=60, server_settings=settings)
    try:
        yield connection
    finally:
        await connection.close(timeout=10)
