"""`payments reconcile --day`: the provider's own list of a day against our books, both ways, and why they may differ.

It changes nothing. A difference is a question for a person, or for the sweep, if an operation is still open.
"""

import asyncio
import json
from collections.abc import Mapping
from datetime import UTC, date, datetime, time, timedelta
from typing import Any, Final, NamedTuple

import asyncpg
from rich import box
from rich.console import Console
from rich.table import Table

from app import wiring
from app.settings import Settings
from domain.money import Money
from domain.ports import Statement

OURS: Final = """
    SELECT p.payment_id, p.gateway_payment_id, p.currency, p.captured_minor, p.refunded_minor,
           (SELECT min(o.state) FROM operations AS o
             WHERE o.payment_id = p.payment_id AND o.due_at IS NOT NULL) AS open_state
      FROM payments AS p
     WHERE p.gateway = $1 AND p.gateway_payment_id IS NOT NULL
       AND (p.gateway_payment_id = ANY($2::text[]) OR (p.created_at >= $3 AND p.created_at < $4))
"""
MARGIN: Final = timedelta(minutes=5)
"""Clocks differ, and a payment is created with us before it is with the provider: what stands at the day's edges is
looked for beyond them before it is called missing."""


class Difference(NamedTuple):
    """One payment on which the books differ. Amounts are ours and theirs; None where one side does not know it."""

    gateway_payment_id: str
    payment_id: str | None
    what: str
    ours: str
    theirs: str
    likely_cause: str


def report_day(settings: Settings, day: date, gateway: str | None, *, as_json: bool) -> int:
    """Print the differences of a UTC day; the exit code, 1 if there are any.

    Raises:
        ValueError: the gateway is not in use here, or its provider offers no list.
    """
    name = gateway or settings.default_gateway
    count, found = asyncio.run(_compare(settings, name, day))
    if as_json:
        told = {"gateway": name, "day": day.isoformat(), "payments": count}
        Console().print_json(json.dumps(told | {"differences": [each._asdict() for each in found]}))
    else:
        _print(name, day, count, found)
    return 1 if found else 0


async def _compare(settings: Settings, name: str, day: date) -> tuple[int, list[Difference]]:
    if name not in settings.gateways:
        raise ValueError(f"gateway {name} is not one of {settings.gateways}")
    gateway = wiring.GATEWAYS[name](settings)
    if not hasattr(gateway, "statements"):
        await gateway.close()
        raise ValueError(f"{name} offers no list of a day's payments")
    start = datetime.combine(day, time(), UTC)
    end = start + timedelta(days=1)
    try:
        listed = [each async for each in gateway.statements(start - MARGIN, end + MARGIN)]
    finally:
        await gateway.close()
    theirs = {each.gateway_payment_id: each for each in listed}
    connection = await asyncpg.connect(settings.postgres_url)
    try:
        rows = await connection.fetch(OURS, name, list(theirs), start, end)
    finally:
        await connection.close()
    ours = {row["gateway_payment_id"]: row for row in rows}
    return len(theirs), [
        each for key in sorted(ours.keys() | theirs.keys()) for each in _differences(key, ours, theirs)
    ]


def _differences(key: str, ours: Mapping[str, Any], theirs: Mapping[str, Statement]) -> list[Difference]:
    own, other = ours.get(key), theirs.get(key)
    if own is None:
        assert other is not None, "one of the two knows it"
        return [_unknown_here(other)] if other.captured_minor else []
    payment_id = str(own["payment_id"])
    if other is None:
        return [Difference(key, payment_id, "not at the provider", "", "", "another account, or another day there")]
    found = []
    for what, mine, yours in (
        ("captured", own["captured_minor"], other.captured_minor),
        ("refunded", own["refunded_minor"], other.refunded_minor),
    ):
        if mine != yours or own["currency"] != other.currency:
            amounts = str(Money(mine, own["currency"])), str(Money(yours, other.currency))
            found.append(Difference(key, payment_id, what, *amounts, _cause(own["open_state"], what, mine, yours)))
    return found


def _unknown_here(other: Statement) -> Difference:
    marked = str(other.payment_id) if other.payment_id else None
    cause = "an answer that was lost: see whether it is open" if marked else "not made by this service"
    theirs = str(Money(other.captured_minor, other.currency))
    return Difference(other.gateway_payment_id, marked, "not in our books", "", theirs, cause)


def _cause(open_state: str | None, what: str, mine: int, yours: int) -> str:
    if open_state is not None:
        return f"an operation is still open ({open_state}): `payments reconcile --now`"
    if what == "refunded" and yours > mine:
        return "a refund made in the provider's portal, or not settled there yet"
    return "changed outside of this service"


def _print(name: str, day: date, count: int, found: list[Difference]) -> None:
    console = Console()
    if found:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for column in ("provider's id", "payment", "what", "ours", "theirs", "likely cause"):
            table.add_column(column, overflow="fold")
        for each in found:
            table.add_row(*(text or "" for text in each))
        console.print(table)
    console.print(f"{name}, {day}: {count:,} payments there, {len(found):,} differences.")
