"""`payments list`: payments by filters, page by page, or those that have waited for long."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta

from rich.console import Console
from rich.table import Table

from app.client import minor_units
from app.console import new_console, tell_of_more, time_text
from app.settings import GATEWAYS_KNOWN, Settings
from app.show import amount_text, facts_with_operations, money_text, payment_facts, with_repository
from app.tables import print_wide, table_of
from app.times import TimeUnusable, age, moment
from domain.events import PaymentStatus
from domain.operations import OperationState
from infra.postgres.repository import MAX_PAGE_SIZE, Page, PaymentFilters, PaymentRecord, PaymentRepository


class FilterUnusable(ValueError):
    """A filter cannot be used; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """The options of `payments list`, as they were typed."""

    status: str | None = None
    gateway: str | None = None
    currency: str | None = None
    amount_min: str | None = None
    amount_max: str | None = None
    since: str | None = None
    until: str | None = None
    customer: str | None = None
    order: str | None = None
    stuck: str | None = None
    limit: int
    cursor: str | None = None


def list_payments(settings: Settings, wanted: Wanted, *, as_json: bool) -> int:
    """Print a page of payments, newest first. Returns the exit code.

    Raises:
        FilterUnusable, TimeUnusable, AmountUnusable, ValueError: an option cannot be read, or cannot be combined with
            another.
    """
    if wanted.stuck is not None:
        return _list_stuck(settings, wanted, _stuck_age(wanted, wanted.stuck), as_json=as_json)
    find = _finder(wanted)
    page = asyncio.run(with_repository(settings, find))
    if as_json:
        print(json.dumps({"payments": list(map(payment_facts, page.items)), "next_cursor": page.next_cursor}, indent=2))
    else:
        _print_page(new_console(), page)
    return 0


def _list_stuck(settings: Settings, wanted: Wanted, since: timedelta, *, as_json: bool) -> int:
    found = asyncio.run(with_repository(settings, lambda each: each.find_stuck_payments(since, limit=wanted.limit)))
    if as_json:
        facts = [facts_with_operations(each, each.payment.operations) for each in found.items]
        print(json.dumps({"payments": facts}, indent=2))
    elif found.items:
        print_wide(new_console(), _stuck_table(found.items))
    else:
        new_console().print(f"No payment has waited for {wanted.stuck}, and none needs review.")
    if found.is_more:
        _tell_of_more_stuck(wanted.limit)
    return 0


def _tell_of_more_stuck(limit: int) -> None:
    if limit < MAX_PAGE_SIZE:
        tell_of_more(limit)
    else:
        text = f"… and more: no more than {limit} are listed; these have waited longest"
        new_console(to_stderr=True).print(text, soft_wrap=True)


def _stuck_age(wanted: Wanted, stuck: str) -> timedelta:
    if wanted != Wanted(stuck=stuck, limit=wanted.limit):
        raise FilterUnusable("--stuck cannot be combined with another filter, or with --cursor")
    found = age(stuck)
    if found is None:
        raise TimeUnusable(f"{stuck!r} is not an age; write 15m, 2h, or 7d")
    return found


def _finder(wanted: Wanted) -> Callable[[PaymentRepository], Awaitable[Page]]:
    filters = PaymentFilters(
        status=_status(wanted.status),
        gateway=_gateway(wanted.gateway),
        currency=wanted.currency,
        amount_min=_bound(wanted.amount_min, wanted.currency),
        amount_max=_bound(wanted.amount_max, wanted.currency),
        created_since=moment(wanted.since),
        created_until=moment(wanted.until),
    )
    if wanted.customer is None and wanted.order is None:
        return lambda repository: repository.find_by_filters(filters, limit=wanted.limit, cursor=wanted.cursor)
    if filters != PaymentFilters() or None not in (wanted.customer, wanted.order):
        raise FilterUnusable("--customer and --order cannot be combined with each other or with another filter")
    if wanted.customer is not None:
        customer = wanted.customer
        return lambda repository: repository.find_by_customer_id(customer, limit=wanted.limit, cursor=wanted.cursor)
    order = wanted.order or ""
    return lambda repository: repository.find_by_order_id(order, limit=wanted.limit, cursor=wanted.cursor)


def _status(text: str | None) -> PaymentStatus | None:
    try:
        return PaymentStatus(text) if text is not None else None
    except ValueError as error:
        raise FilterUnusable(f"{text!r} is not a status; use one of: {', '.join(PaymentStatus)}") from error


def _gateway(name: str | None) -> str | None:
    if name is not None and name not in GATEWAYS_KNOWN:
        raise FilterUnusable(f"{name!r} is not a gateway; use one of: {', '.join(GATEWAYS_KNOWN)}")
    return name


def _bound(amount: str | None, currency: str | None) -> int | None:
    if amount is None:
        return None
    if currency is None:
        raise FilterUnusable("--min and --max need --currency, to know its decimals")
    return minor_units(amount, currency)


def _print_page(console: Console, page: Page) -> None:
    names = ("payment", "status", "amount", "captured", "refunded", "gateway", "order", "created")
    rows = []
    for record in page.items:
        payment = record.payment
        amounts = (payment.amount_minor, payment.captured_minor, payment.refunded_minor)
        cells = (money_text(minor, payment) if minor else "" for minor in amounts)
        where = (payment.gateway or "", payment.order_id or "", time_text(record.created_at))
        rows.append((str(payment.payment_id), payment.status, *cells, *where))
    if not rows:
        console.print("No payment matches.")
        return
    print_wide(console, table_of(names, rows, whole=set(names)))
    if page.next_cursor:
        console.print(f"More: the same command with --cursor {page.next_cursor}", soft_wrap=True)


# --- those that wait --------------------------------------------------------------------------------------------------


def _stuck_table(found: Sequence[PaymentRecord]) -> Table:
    """One row for each open operation, except those that wait behind it."""
    names = ("payment", "operation", "amount", "state", "first sent", "gateway", "provider's id")
    rows = []
    for payment in (record.payment for record in found):
        for each in payment.operations:
            if each.state is OperationState.RECEIVED:
                continue
            sent = time_text(each.dispatched_at) if each.dispatched_at else "not yet"
            what = str(payment.payment_id), f"{each.kind} {each.number}", amount_text(each, payment)
            rows.append((*what, each.state, sent, each.gateway or "", each.reference or ""))
    return table_of(names, rows, whole=set(names))
