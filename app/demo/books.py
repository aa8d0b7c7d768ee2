"""Compares the money in our ledger with the money in the providers' books, per provider and currency."""

from dataclasses import dataclass
from datetime import datetime

import asyncpg
import httpx

LEDGER_SUMS = """
    SELECT p.gateway, l.currency,
           coalesce(sum(l.amount_minor) FILTER (WHERE credit = 'customer_sales'), 0)::bigint  AS captured,
           coalesce(sum(l.amount_minor) FILTER (WHERE debit = 'customer_refunds'), 0)::bigint AS refunded,
           coalesce(sum(l.amount_minor) FILTER (WHERE debit = 'customer_disputes'), 0)::bigint
         - coalesce(sum(l.amount_minor) FILTER (WHERE credit = 'customer_disputes'), 0)::bigint AS disputed
      FROM ledger AS l JOIN payments AS p USING (payment_id)
     WHERE l.booked_at >= $1
     GROUP BY p.gateway, l.currency
"""


@dataclass(frozen=True, slots=True)
class Sums:
    """Minor units of one currency."""

    captured: int = 0
    refunded: int = 0
    disputed: int = 0
    """Taken back by payers' banks in disputes that we have not won."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """One currency of one provider, in both books."""

    gateway: str
    currency: str
    ours: Sums
    theirs: Sums

    @property
    def is_equal(self) -> bool:
        return self.ours == self.theirs


@dataclass(frozen=True, slots=True)
class Books:
    """Both books, compared. `charged_twice` lists payments with several successful charges at the provider."""

    currencies: list[Comparison]
    charged_twice: list[str]


async def compare(postgres_url: str, simulator_url: str, since: datetime) -> Books:
    """Compare our ledger from `since` on with everything that the simulator, which started empty, has booked."""
    ours = await _ledger(postgres_url, since)
    async with httpx.AsyncClient(trust_env=False, base_url=simulator_url) as client:
        totals = (await client.get("/_sandbox/all")).raise_for_status().json()
        charges = (await client.get("/_sandbox/books?details=false")).raise_for_status().json()["executed_charges"]
    theirs = {
        (gateway, currency.upper()): Sums(sums["captured"], sums["refunded"], sums.get("disputed", 0))
        for gateway, currencies in totals.items()
        for currency, sums in currencies.items()
    }
    both = sorted(ours.keys() | theirs.keys())
    compared = [Comparison(each[0], each[1], ours.get(each, Sums()), theirs.get(each, Sums())) for each in both]
    return Books(
        currencies=[each for each in compared if each.ours != Sums() or each.theirs != Sums()],
        charged_twice=[payment for payment, count in charges.items() if count > 1],
    )


async def _ledger(postgres_url: str, since: datetime) -> dict[tuple[str, str], Sums]:
    connection = await asyncpg.connect(postgres_url)
    try:
        rows = await connection.fetch(LEDGER_SUMS, since)
    finally:
        await connection.close()
    return {(row["gateway"], row["currency"]): Sums(row["captured"], row["refunded"], row["disputed"]) for row in rows}
