"""Subscribers need no database lookup: an event may reach them before its transaction is visible there."""

import json
from typing import Any

from handlers.messages.events import PaymentState
from infra.postgres.tables import payments
from tests.support.provider import BookkeepingGateway
from tests.support.service import delivery, events_of, new_payment_id, running_worker, value

STEPS: list[tuple[str, dict[str, Any]]] = [
    ("authorize", {"customer_id": "customer-1"}),
    ("capture", {"amount_minor": 4_000}),
    ("refund", {"amount_minor": 1_500}),
    ("refund", {"amount_minor": 99_999}),
    ("void", {}),
    ("charge", {}),
]
STATE = set(PaymentState.model_fields) - {"owed_minor"}
PAYMENT = f"SELECT {', '.join(STATE)} FROM payments WHERE payment_id = $1 AND last_seq = $2"
OPERATION = """
    SELECT number AS operation_number, 'payment.' || kind || '.v1' AS command_type, idempotency_key, amount_minor,
           -- Beside a void stands the hold that it is to release.
           CASE WHEN kind <> 'void' THEN reference END AS provider_reference
      FROM operations WHERE payment_id = $1 AND idempotency_key = $2
"""

OF_EVERY_EVENT = {"payment_id", "last_seq", "amount_minor", "disputes"}
"""Carried in an event's own fields; a dispute in each dispute event."""
OWED = {"owed_held_minor", "owed_captured_minor", "owed_returned_minor"}
"""Carried as `owed_minor`."""
OF_WHAT_IS_UNDER_WAY = {"reserved_capture_minor", "reserved_refund_minor", "open_operations"}
"""Each of these operations has its own events."""
BOOKKEEPING = {
    "id",
    "version",
    "last_operation",
    "authorization_expires_at",
    "hold_due_at",
    "hold_questions",
    "created_at",
    "updated_at",
}
"""Controls our next steps; an expiry is published when it has happened."""


async def read_row(url: str, query: str, *arguments: Any) -> dict[str, Any]:
    """The row that a subscriber could read, or an empty dict."""
    found = await value(url, f"SELECT row_to_json(r) FROM ({query}) AS r", *arguments)
    return json.loads(found) if found else {}


async def test_an_event_says_what_a_subscriber_could_look_up_of_its_payment_and_operation(postgres_url: str) -> None:
    payment_id = new_payment_id()
    async with running_worker(postgres_url, BookkeepingGateway()) as worker:
        for number, (kind, fields) in enumerate(STEPS):
            await worker.accept(delivery(kind, payment_id, f"key {number}", **fields))
            await worker.idle()
            event = (await events_of(postgres_url, payment_id))[-1]
            assert event["idempotency_key"] == f"key {number}"
            assert event["payment"] == await read_row(postgres_url, PAYMENT, payment_id, event["payment_seq"])
            stored = await read_row(postgres_url, OPERATION, payment_id, event["idempotency_key"])
            # For a rejected command, the row holds less than the event.
            known = {name: stored[name] for name in stored if stored[name] is not None}
            assert known == {name: event[name] for name in known}


def test_of_a_payment_nothing_is_stored_that_its_subscribers_would_have_to_look_up() -> None:
    left_out = set(payments.c.keys()) - STATE
    assert left_out == OF_EVERY_EVENT | OWED | OF_WHAT_IS_UNDER_WAY | BOOKKEEPING
