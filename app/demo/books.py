"""Money in our books against money in the provider's own, per currency."""

from dataclasses import dataclass
from datetime import datetime

import asyncpg
import httpx

LEDGER_SUMS = """
    SELECT currency,
           coalesce(sum(amount_minor) FILTER (WHERE credit = 'customer_sales'), 0)::bigint  AS captured,
           coalesce(sum(amount_minor) FILTER (WHERE debit = 'customer_refunds'), 0)::bigint AS refunded,
           coalesce(sum(amount_minor) FILTER (WHERE debit = 'customer_disputes'), 0)::bigint
         - coalesce(sum(amount_minor) FILTER (WHERE credit = 'customer_disputes'), 0)::bigint AS disputed
      FROM ledger
     WHERE booked_at >= $1
     GROUP BY currency
"""


@dataclass(frozen=True, slots=True)
class Sums:
    """Minor units of one currency."""

    captured: int = 0
    refunded: int = 0
    disputed: int = 0
    """Taken back by payers' banks, and not won back."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """One currency in both books."""

    currency: str
    ours: Sums
    theirs: Sums

    @property
    def is_equal(self) -> bool:
        return self.ours == self.theirs


@dataclass(frozen=True, slots=True)
class Books:
    """Both books, compared. `charged_twice` are payments with several successful charges at the provider."""

    currencies: list[Comparison]
    charged_twice: list[str]

    @property
    def are_equal(self) -> bool:
        return all(each.is_equal for each in self.currencies) and not self.charged_twice


async def database_time(postgres_url: str) -> datetime:
    """The database's clock, by which the ledger is dated."""
    connection = await asyncpg.connect(postgres_url)
    try:
        moment: datetime = await connection.fetchval("SELECT now()")
        return moment
    finally:
        await connection.close()


async def compare(postgres_url: str, simulator_url: str, since: datetime) -> Books:
    """Our ledger since then, against all that the simulator (which started empty) has booked."""
    ours = await _ledger(postgres_url, since)
    async with httpx.AsyncClient(trust_env=False) as client:
        answer = (await client.get(f"{simulator_url}/_sandbox/books?details=false")).raise_for_status().json()
    theirs = {
        name.upper(): Sums(sums["captured"], sums["refunded"], sums["disputed"])
        for name, sums in answer["currencies"].items()
    }
    both = sorted(ours.keys() | theirs.keys())
    currencies = [Comparison(name, ours.get(name, Sums()), theirs.get(name, Sums())) for name in both]
    return Books(
        currencies=[each for each in currencies if each.ours != Sums() or each.theirs != Sums()],
        charged_twice=[payment for payment, count in answer["executed_charges"].items() if count > 1],
    )


async def _ledger(postgres_url: str, since: datetime) -> dict[str, Sums]:
    connection = await asyncpg.connect(postgres_url)
    try:
        rows = await connection.fetch(LEDGER_SUMS, since)
    finally:
        await connection.close()
    return {row["currency"]: Sums(row["captured"], row["refunded"], row["disputed"]) for row in rows}
