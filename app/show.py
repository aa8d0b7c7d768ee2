"""`payments show` and `payments list`: payments as the store has them, printed as text or JSON."""

import asyncio
import json
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final, TypeVar
from uuid import UUID

from rich.console import Console
from rich.table import Table
from rich.text import Text

from app.client import minor_units
from app.console import new_console, safe_text, time_text
from app.settings import Settings
from app.tables import print_wide, table_of
from domain.events import EventKind, PaymentStatus
from domain.money import Money
from domain.operations import Operation, OperationState
from domain.payment import Payment
from domain.ports import OutboxRow
from handlers.messages.events import event_type, write_time
from infra.postgres.repository import Page, PaymentFilters, PaymentRecord, PaymentRepository, create_engine

UNITS: Final = {"m": "minutes", "h": "hours", "d": "days"}
T = TypeVar("T")
ASKED: Final = event_type(EventKind.REQUIRES_ACTION)
AMOUNTS: Final = ("authorized", "captured", "released", "refunded", "disputed")


class FilterUnusable(ValueError):
    """A filter cannot be used; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """The options of `payments list`, as they were typed."""

    status: str | None
    gateway: str | None
    currency: str | None
    amount_min: str | None
    amount_max: str | None
    since: str | None
    until: str | None
    customer: str | None
    order: str | None
    limit: int
    cursor: str | None


def show_payment(settings: Settings, payment_id: UUID, *, as_json: bool) -> int:
    """Print one payment. Returns the exit code: 1 if the payment is not known."""

    async def read(repository: PaymentRepository) -> tuple[PaymentRecord | None, tuple[Operation, ...], Any]:
        record = await repository.find_by_payment_id(payment_id)
        return record, await repository.operations_of(payment_id), await repository.events_of(payment_id)

    record, operations, events = asyncio.run(_with_repository(settings, read))
    if record is None:
        new_console(to_stderr=True).print(
            f"No payment {payment_id} was found. (Its command may not have been read yet.)"
        )
        return 1
    if as_json:
        facts = _facts(record) | {"operations": list(map(_operation_facts, operations))}
        print(json.dumps(facts | {"events": [json.loads(event.payload) for event in events]}, indent=2))
    else:
        _print_payment(new_console(), record, operations, events)
    return 0


def list_payments(settings: Settings, wanted: Wanted, *, as_json: bool) -> int:
    """Print a page of payments, newest first. Returns the exit code.

    Raises:
        FilterUnusable, AmountUnusable, ValueError: an option cannot be read, or cannot be combined with another.
    """
    find = _finder(wanted)
    page = asyncio.run(_with_repository(settings, find))
    if as_json:
        print(json.dumps({"payments": list(map(_facts, page.items)), "next_cursor": page.next_cursor}, indent=2))
    else:
        _print_page(new_console(), page)
    return 0


def _finder(wanted: Wanted) -> Callable[[PaymentRepository], Awaitable[Page]]:
    filters = PaymentFilters(
        status=_status(wanted.status),
        gateway=wanted.gateway,
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


def _bound(amount: str | None, currency: str | None) -> int | None:
    if amount is None:
        return None
    if currency is None:
        raise FilterUnusable("--min and --max need --currency, to know its decimals")
    return minor_units(amount, currency)


def moment(text: str | None) -> datetime | None:
    """`2026-01-31` (its midnight), `2026-01-31T12:00:00Z`, or an age: `15m`, `2h`, `7d`. Without a zone, in UTC."""
    if text is None:
        return None
    try:
        if age := re.fullmatch(r"([0-9]{1,6})([mhd])", text):
            return datetime.now(UTC) - timedelta(**{UNITS[age[2]]: int(age[1])})
        found = datetime.fromisoformat(text)
        return found.replace(tzinfo=UTC) if found.tzinfo is None else found.astimezone(UTC)
    except (ValueError, OverflowError) as error:  # An age may reach back before the year 1.
        raise FilterUnusable(
            f"{text!r} is not a date or age; write 2026-01-31, 2026-01-31T12:00:00Z, or 2h (ago)"
        ) from error


async def _with_repository(settings: Settings, read: Callable[[PaymentRepository], Awaitable[T]]) -> T:
    engine = create_engine(settings.postgres_url, size=1)
    try:
        return await read(PaymentRepository(engine))
    finally:
        await engine.dispose()


# --- for programs -----------------------------------------------------------------------------------------------------


def _facts(record: PaymentRecord) -> dict[str, Any]:
    payment = record.payment
    names = ("status", "currency", "gateway", "gateway_payment_id", "order_id", "customer_id", "has_indeterminate")
    amounts = {f"{name}_minor": getattr(payment, f"{name}_minor") for name in AMOUNTS}
    return {
        "payment_id": str(payment.payment_id),
        **{name: getattr(payment, name) for name in names},
        "amount_minor": payment.amount_minor,
        **amounts,
        "created_at": write_time(record.created_at),
        "updated_at": write_time(record.updated_at),
    }


def _operation_facts(operation: Operation) -> dict[str, Any]:
    names = ("number", "kind", "state", "amount_minor", "idempotency_key", "reference", "attempts")
    return {name: getattr(operation, name) for name in names}


# --- for people -------------------------------------------------------------------------------------------------------


def _print_payment(
    console: Console, record: PaymentRecord, operations: tuple[Operation, ...], events: tuple[OutboxRow, ...]
) -> None:
    payment = record.payment
    id_and_status = (str(payment.payment_id), "bold"), "  ", (payment.status.value, "bold")
    console.print(Text.assemble("payment ", *id_and_status), soft_wrap=True)
    for name, value in (_lines(record) | _awaited(payment, events)).items():
        console.print(f"  {name:<14}{safe_text(value)}", soft_wrap=True)
    print_wide(console, _operations_table(payment, operations))
    print_wide(console, _events_table(events))


def _lines(record: PaymentRecord) -> dict[str, str]:
    payment = record.payment
    amounts = {name: getattr(payment, f"{name}_minor") for name in AMOUNTS}
    moved = ", ".join(f"{name} {_money(minor, payment)}" for name, minor in amounts.items() if minor)
    lines = {
        "amounts": moved or _nothing_moved(payment),
        "in doubt": "yes: an outcome is unknown, money may have moved" if payment.has_indeterminate else "",
        "gateway": " ".join(filter(None, (payment.gateway, payment.gateway_payment_id))),
        "order": payment.order_id or "",
        "customer": payment.customer_id or "",
        "created": time_text(record.created_at),
    }
    return {name: value for name, value in lines.items() if value}


def _nothing_moved(payment: Payment) -> str:
    if not payment.amount_minor:
        return "none: no charge or authorize of it was accepted"
    return f"nothing moved of {_money(payment.amount_minor, payment)}"


def _awaited(payment: Payment, events: tuple[OutboxRow, ...]) -> dict[str, str]:
    """Where the payer must go and until when, while we wait for them; from the newest event that asked for it."""
    if payment.status is not PaymentStatus.REQUIRES_ACTION:
        return {}
    asked = [json.loads(event.payload)["action"] for event in events if event.type == ASKED]
    if not asked:
        return {}
    action = asked[-1]
    until = action["expires_at"] and time_text(datetime.fromisoformat(action["expires_at"]))
    lines = {"payer's page": action["url"] or action["type"], "until": until or ""}
    return {name: value for name, value in lines.items() if value}


def _operations_table(payment: Payment, operations: tuple[Operation, ...]) -> Table:
    names = ("#", "operation", "amount", "state", "provider's id", "idempotency key")
    rows = []
    for each in operations:
        amount = "" if each.amount_minor is None else _money(each.amount_minor, payment)
        key = "(in the provider's dashboard)" if each.is_external else each.idempotency_key
        state = "received: waits its turn" if each.state is OperationState.RECEIVED else each.state
        rows.append((str(each.number), each.kind, amount, state, each.reference or "", key or ""))
    return table_of(names, rows, whole=set(names))


def _events_table(events: tuple[OutboxRow, ...]) -> Table:
    rows = [
        (str(event.payment_seq), event.type, event.occurred_at, _note(json.loads(event.payload))) for event in events
    ]
    return table_of(("seq", "event", "time", ""), rows, whole={"event", "time"})


def _note(body: dict[str, Any]) -> str:
    """Why an event came out as it did, where its type alone does not say."""
    if "evidence" in body:
        return f"decided by a person: {body['evidence']}"
    if body["replayed"]:
        return "replayed"
    if "message" in body:
        return f"{body['reason']}: {body['message']}"
    return body.get("decline_reason") or body.get("cause") or ""


def _print_page(console: Console, page: Page) -> None:
    names = ("payment", "status", "amount", "captured", "refunded", "gateway", "order", "created")
    rows = []
    for record in page.items:
        payment = record.payment
        amounts = (payment.amount_minor, payment.captured_minor, payment.refunded_minor)
        cells = (_money(minor, payment) if minor else "" for minor in amounts)
        where = (payment.gateway or "", payment.order_id or "", time_text(record.created_at))
        rows.append((str(payment.payment_id), payment.status, *cells, *where))
    if not rows:
        console.print("No payment matches.")
        return
    print_wide(console, table_of(names, rows, whole=set(names)))
    if page.next_cursor:
        console.print(f"More: the same command with --cursor {page.next_cursor}", soft_wrap=True)


def _money(minor: int, payment: Payment) -> str:
    return str(Money(minor, payment.currency)) if payment.currency else str(minor)
