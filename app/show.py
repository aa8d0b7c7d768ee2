"""`payments show`: one payment as the store has it, printed as text or JSON."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterable
from datetime import datetime
from typing import Any, Final, TypeVar
from uuid import UUID

from rich.console import Console
from rich.table import Table
from rich.text import Text

from app.console import new_console, safe_text, time_text
from app.settings import Settings
from app.tables import print_wide, table_of
from domain.events import EventKind, PaymentStatus
from domain.money import Money
from domain.operations import Operation, OperationState
from domain.payment import Payment
from domain.ports import OutboxRow
from handlers.messages.events import event_type, write_time
from infra.postgres.repository import PaymentRecord, PaymentRepository, create_engine

T = TypeVar("T")
ASKED: Final = event_type(EventKind.REQUIRES_ACTION)
AMOUNTS: Final = ("authorized", "captured", "released", "refunded", "disputed")


def show_payment(settings: Settings, payment_id: UUID, *, as_json: bool) -> int:
    """Print one payment. Returns the exit code: 1 if the payment is not known."""

    async def read(repository: PaymentRepository) -> tuple[PaymentRecord | None, tuple[Operation, ...], Any]:
        record = await repository.find_by_payment_id(payment_id)
        return record, await repository.operations_of(payment_id), await repository.events_of(payment_id)

    record, operations, events = asyncio.run(with_repository(settings, read))
    if record is None:
        new_console(to_stderr=True).print(
            f"No payment {payment_id} was found. (Its command may not have been read yet.)"
        )
        return 1
    if as_json:
        facts = facts_with_operations(record, operations)
        print(json.dumps(facts | {"events": [json.loads(event.payload) for event in events]}, indent=2))
    else:
        _print_payment(new_console(), record, operations, events)
    return 0


async def with_repository(settings: Settings, read: Callable[[PaymentRepository], Awaitable[T]]) -> T:
    """What `read` returns, over a connection of its own."""
    engine = create_engine(settings.postgres_url, size=1)
    try:
        return await read(PaymentRepository(engine))
    finally:
        await engine.dispose()


# --- for programs -----------------------------------------------------------------------------------------------------


def payment_facts(record: PaymentRecord) -> dict[str, Any]:
    """One payment, without its operations."""
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


def facts_with_operations(record: PaymentRecord, operations: Iterable[Operation]) -> dict[str, Any]:
    """One payment with these operations; `dispatched_at` is when one was first sent to its gateway."""
    return payment_facts(record) | {"operations": list(map(_operation_facts, operations))}


def _operation_facts(operation: Operation) -> dict[str, Any]:
    names = ("number", "kind", "state", "amount_minor", "gateway", "idempotency_key", "reference", "attempts")
    sent = operation.dispatched_at
    return {name: getattr(operation, name) for name in names} | {"dispatched_at": sent and write_time(sent)}


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
    moved = ", ".join(f"{name} {money_text(minor, payment)}" for name, minor in amounts.items() if minor)
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
    return f"nothing moved of {money_text(payment.amount_minor, payment)}"


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
        amount = amount_text(each, payment)
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


def amount_text(operation: Operation, payment: Payment) -> str:
    """The amount that was asked for; empty if the command named none."""
    return "" if operation.amount_minor is None else money_text(operation.amount_minor, payment)


def money_text(minor: int, payment: Payment) -> str:
    """The amount in the payment's currency, once that is known."""
    return str(Money(minor, payment.currency)) if payment.currency else str(minor)
