"""`payments reconcile --day`: the provider's own list of a day against our books, both ways, and why they may differ.

It changes nothing. A difference is a question for a person, or for the sweep, if an operation is still open.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, date, datetime, time, timedelta
from typing import Any, Final, NamedTuple

import asyncpg

from app import wiring
from app.console import new_console, print_json
from app.differences import Booked, Difference, of_movements, of_payments
from app.settings import Settings
from app.tables import print_wide, table_of
from domain.errors import GatewayError
from domain.operations import UNDER_WAY
from domain.ports import Gateway, Movements, Statements

# Attempt by attempt, as several may have been paid: captures and refunds are of the one that the payment refers to, but
# for refunds in the provider's dashboard, whose content is the attempt that they are of.
ATTEMPTS: Final = """
    SELECT a.reference AS gateway_payment_id, a.payment_id, p.currency,
           CASE WHEN a.kind = 'charge' AND a.state = 'succeeded' THEN a.amount_minor ELSE 0 END
               + CASE WHEN p.is_of THEN p.captures_minor ELSE 0 END AS captured_minor,
           CASE WHEN p.is_of THEN p.refunded_minor - r.of_others_minor ELSE r.of_this_minor END AS refunded_minor,
           (SELECT min(o.state) FROM operations AS o
             WHERE o.payment_id = a.payment_id AND o.due_at IS NOT NULL) AS open_state
      FROM operations AS a
      CROSS JOIN LATERAL (
          SELECT currency, refunded_minor, gateway = a.gateway AND gateway_payment_id = a.reference AS is_of,
                 (SELECT coalesce(sum(c.amount_minor), 0)::bigint FROM operations AS c
                   WHERE c.payment_id = a.payment_id AND c.kind = 'capture' AND c.state = 'succeeded') AS captures_minor
            FROM payments WHERE payment_id = a.payment_id) AS p
      CROSS JOIN LATERAL (
          SELECT coalesce(sum(amount_minor) FILTER (WHERE content = a.reference), 0)::bigint AS of_this_minor,
                 coalesce(sum(amount_minor) FILTER (WHERE content NOT IN ('', a.reference)), 0)::bigint
                     AS of_others_minor
            FROM operations
           WHERE payment_id = a.payment_id AND kind = 'refund' AND state = 'succeeded' AND idempotency_key IS NULL) AS r
     WHERE a.gateway = $1 AND a.kind IN ('authorize', 'charge') AND a.reference IS NOT NULL
       AND (a.reference = ANY($2::text[])
            OR (a.dispatched_at >= $3 AND a.dispatched_at < $4 AND (a.state = 'succeeded' OR p.is_of)))
"""
OPERATIONS: Final = """
    SELECT o.payment_id, o.number, o.kind = 'refund' AS is_refund, o.state, o.state = ANY($2::text[]) AS is_open,
           p.currency, o.amount_minor, o.reference, o.dispatched_at, o.settled_at
      FROM operations AS o JOIN payments AS p ON p.payment_id = o.payment_id
     WHERE o.gateway = $1 AND o.kind IN ('charge', 'capture', 'refund') AND o.dispatched_at IS NOT NULL
"""
# The ledger says which payments to look at: what is settled is booked in the same transaction. It has no index by time,
# which only this would use, and so is read through.
OF_DAY: Final = f"""{OPERATIONS}
       AND o.payment_id IN (SELECT payment_id FROM ledger WHERE booked_at >= $3 AND booked_at < $4)
       AND o.state = 'succeeded' AND o.settled_at >= $3 AND o.settled_at < $4
"""  # noqa: S608 - constants of this module
OF_PAYMENTS: Final = f"{OPERATIONS} AND o.payment_id = ANY($3::uuid[])"
MARGIN: Final = timedelta(minutes=5)
"""Clocks differ, and a payment is created with us before it is with the provider: what stands at the day's edges is
looked for beyond them before it is called missing."""


class NoList(ValueError):
    """The provider offers no list of its movements, so there is nothing to compare with."""

    def __init__(self, gateway: str) -> None:
        super().__init__(
            f"{gateway} offers no list of a day's payments; what is open there is asked about one by one: "
            "payments reconcile --now"
        )
        self.gateway = gateway


class ListUnreadable(ValueError):
    """The provider's list could not be read to its end: nothing was compared."""


class Day(NamedTuple):
    """From midnight until before the next midnight, in UTC."""

    start: datetime
    end: datetime


def report_day(settings: Settings, day: date, gateway: str | None, *, as_json: bool) -> int:
    """Print the differences of a UTC day. Returns 1 if there are any, or if the day has not begun.

    Raises:
        NoList: the provider offers none. As JSON that is an answer like any other (`error`), with exit code 1.
        ListUnreadable: the provider's list could not be read.
        ValueError: the gateway is not in use here.
    """
    name = gateway or settings.default_gateway
    today = datetime.now(UTC).date()
    if day > today:
        return _refuse_to_come(name, day, as_json=as_json)
    head = {"gateway": name, "day": day.isoformat(), "is_over": day < today}
    try:
        count, found = asyncio.run(_compare(settings, name, day))
    except NoList as error:
        if not as_json:
            raise
        print_json(head | {"error": "no_list", "message": str(error)})
        return 1
    if as_json:
        print_json(head | {"listed": count, "differences": [each._asdict() for each in found]})
    else:
        _print(name, day, count, found)
        if day == today:
            new_console().print("The day is not over yet (UTC): what is to come is not in this.")
    return 1 if found else 0


def _refuse_to_come(name: str, day: date, *, as_json: bool) -> int:
    message = f"{day} has not begun in UTC, so there is nothing to compare yet"
    if as_json:
        print_json({"gateway": name, "day": day.isoformat(), "error": "day_to_come", "message": message})
    else:
        new_console(to_stderr=True).print(f"payments: {message}")
    return 1


async def _compare(settings: Settings, name: str, day: date) -> tuple[int, list[Difference]]:
    start = datetime.combine(day, time(), UTC)
    whole = Day(start, start + timedelta(days=1))
    async with _gateway(settings, name) as gateway:
        if not isinstance(gateway, Movements | Statements):
            raise NoList(name)
        connection = await asyncpg.connect(settings.postgres_url, timeout=10)
        try:
            if isinstance(gateway, Movements):
                return await _compare_movements(connection, name, gateway, whole)
            return await _compare_payments(connection, name, gateway, whole)
        except GatewayError as error:
            raise ListUnreadable(f"the list of {name} could not be read, so nothing was compared: {error}") from error
        finally:
            await connection.close()


@asynccontextmanager
async def _gateway(settings: Settings, name: str) -> AsyncIterator[Gateway]:
    if name not in settings.gateways:
        used = ", ".join(sorted(settings.gateways))
        raise ValueError(f"gateway {name} is not used here; PAYMENTS_GATEWAYS has: {used}")
    gateway = wiring.GATEWAYS[name].create(settings, wiring.now)
    try:
        yield gateway
    finally:
        await gateway.close()


async def _compare_payments(
    connection: "asyncpg.Connection[Any]", name: str, gateway: Statements, day: Day
) -> tuple[int, list[Difference]]:
    listed = [each async for each in gateway.statements(day.start - MARGIN, day.end + MARGIN)]
    theirs = {each.gateway_payment_id: each for each in listed}
    rows = await connection.fetch(ATTEMPTS, name, list(theirs), *day)
    return len(theirs), of_payments({row["gateway_payment_id"]: row for row in rows}, theirs)


async def _compare_movements(
    connection: "asyncpg.Connection[Any]", name: str, gateway: Movements, day: Day
) -> tuple[int, list[Difference]]:
    """The list begins where the first of ours was sent, which may be days before its answer was known."""
    states = sorted(UNDER_WAY)
    ours = [Booked(*row) for row in await connection.fetch(OF_DAY, name, states, *day)]
    since = min([day.start, *(each.dispatched_at for each in ours)])
    theirs = [each async for each in gateway.movements(since - MARGIN, day.end + MARGIN)]
    marked = sorted({each.payment_id for each in theirs if each.payment_id is not None})
    known = [Booked(*row) for row in await connection.fetch(OF_PAYMENTS, name, states, marked)]
    count = sum(day.start <= each.moved_at < day.end for each in theirs)
    return count, of_movements(ours, known, theirs, start=day.start, end=day.end)


def _print(name: str, day: date, count: int, found: list[Difference]) -> None:
    console = new_console()
    if found:
        names = ("provider's id", "payment", "what", "ours", "theirs", "likely cause")
        rows = ((text or "" for text in each) for each in found)
        print_wide(console, table_of(names, rows, whole={"provider's id", "payment"}))
    console.print(f"{name}, {day}: {count:,} listed there, {len(found):,} differences.")
