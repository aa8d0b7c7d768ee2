"""One example of every message: shown in the AsyncAPI document, and read and written by the tests."""

from collections.abc import Mapping
from datetime import UTC, datetime
from hashlib import sha256
from typing import Any, Final
from uuid import UUID

from domain.commands import OperationKind, Rejection, RejectionReason
from domain.events import Event, EventKind, PaymentSnapshot, PaymentStatus, PendingCause
from domain.notices import Dispute, DisputeStage
from domain.operations import DeclineReason, OperationState, RequiresAction

PAYMENT_ID: Final = "0190b3a1-7a3c-7e11-9c53-1f0a3a8b9c00"
EVENT_ID: Final = UUID("0190b3a1-8c1d-7a52-8d0f-5b1d2c3e4f50")

_NEW_PAYMENT: Final = {
    "payment_id": PAYMENT_ID,
    "order_id": "order-1001",
    "customer_id": "customer-77",
    "amount_minor": 1250,
    "currency": "USD",
    "payment_method": "pm_card_visa",
}

COMMAND_EXAMPLES: Final[Mapping[str, Mapping[str, Any]]] = {
    "payment.charge.v1": {
        "type": "payment.charge.v1",
        "idempotency_key": "order-1001-charge",
        **_NEW_PAYMENT,
        "metadata": {"channel": "web"},
    },
    "payment.authorize.v1": {
        "type": "payment.authorize.v1",
        "idempotency_key": "order-1001-authorize",
        **_NEW_PAYMENT,
        "gateway": "stripe",
        "expires_at": "2030-01-01T12:00:00Z",
    },
    "payment.capture.v1": {
        "type": "payment.capture.v1",
        "idempotency_key": "order-1001-capture-1",
        "payment_id": PAYMENT_ID,
        "amount_minor": 1000,
        "currency": "USD",
    },
    "payment.void.v1": {
        "type": "payment.void.v1",
        "idempotency_key": "order-1001-void",
        "payment_id": PAYMENT_ID,
    },
    "payment.refund.v1": {
        "type": "payment.refund.v1",
        "idempotency_key": "order-1001-refund-1",
        "payment_id": PAYMENT_ID,
        "amount_minor": 250,
    },
}
"""By `type`, as a sender would write them."""

_NOTHING_YET: Final = PaymentSnapshot(
    status=PaymentStatus.PROCESSING,
    currency="USD",
    authorized_minor=0,
    captured_minor=0,
    released_minor=0,
    refunded_minor=0,
    disputed_minor=0,
    has_indeterminate=False,
    gateway="stripe",
    gateway_payment_id=None,
    order_id="order-1001",
    customer_id="customer-77",
)
_CAPTURED: Final = _NOTHING_YET._replace(
    status=PaymentStatus.CAPTURED,
    authorized_minor=1250,
    captured_minor=1250,
    gateway_payment_id="pay_9f2c",
)
_AUTHORIZED: Final = _CAPTURED._replace(status=PaymentStatus.AUTHORIZED, captured_minor=0)


def _example(kind: EventKind, command: OperationKind, key: str, snapshot: PaymentSnapshot, **particulars: Any) -> Event:
    given: dict[str, Any] = {
        "payment_seq": 1,
        "operation_number": 1,
        "amount_minor": 1250,
        "reference": "op_51ab",
    } | particulars
    return Event(
        kind=kind,
        payment_id=UUID(PAYMENT_ID),
        occurred_at=datetime(2026, 1, 31, 12, 0, 0, 250_000, tzinfo=UTC),
        command=command,
        idempotency_key=key,
        # Neither this fingerprint nor the command id made from it matches the example command: the goldens keep both.
        fingerprint=sha256(key.encode()).digest(),
        snapshot=snapshot,
        currency=snapshot.currency,
        **given,
    )


def _dispute(stage: DisputeStage, payment_seq: int, disputed_minor: int) -> Event:
    event = _example(
        EventKind.DISPUTE_OPENED if stage is DisputeStage.OPENED else EventKind.DISPUTE_CLOSED,
        OperationKind.CHARGE,
        "",
        _CAPTURED._replace(disputed_minor=disputed_minor),
        payment_seq=payment_seq,
        operation_number=None,
        reference="dp_7c01",
        dispute=Dispute("dp_7c01", stage, 1250, "USD", "product_not_received"),
    )
    return event._replace(command=None, idempotency_key=None, fingerprint=None)


def _external(kind: EventKind, command: OperationKind, snapshot: PaymentSnapshot, **particulars: Any) -> Event:
    event = _example(kind, command, "", snapshot, payment_seq=2, operation_number=2, **particulars)
    return event._replace(command=None, idempotency_key=None, fingerprint=None)


EVENT_EXAMPLES: Final[Mapping[str, Event]] = {
    "payment.authorized.v1": _example(
        EventKind.AUTHORIZED, OperationKind.AUTHORIZE, "order-1001-authorize", _AUTHORIZED
    ),
    "payment.captured.v1": _example(EventKind.CAPTURED, OperationKind.CHARGE, "order-1001-charge", _CAPTURED),
    "payment.voided.v1": _example(
        EventKind.VOIDED,
        OperationKind.VOID,
        "order-1001-void",
        _AUTHORIZED._replace(status=PaymentStatus.CANCELED, released_minor=1250),
        payment_seq=2,
        operation_number=2,
    ),
    "payment.refunded.v1": _example(
        EventKind.REFUNDED,
        OperationKind.REFUND,
        "order-1001-refund-1",
        _CAPTURED._replace(status=PaymentStatus.PARTIALLY_REFUNDED, refunded_minor=250),
        payment_seq=2,
        operation_number=2,
        amount_minor=250,
    ),
    "payment.declined.v1": _example(
        EventKind.DECLINED,
        OperationKind.CHARGE,
        "order-1001-charge",
        _NOTHING_YET._replace(status=PaymentStatus.FAILED),
        decline_reason=DeclineReason.INSUFFICIENT_FUNDS,
        decline_code="insufficient_funds",
    ),
    "payment.requires_action.v1": _example(
        EventKind.REQUIRES_ACTION,
        OperationKind.CHARGE,
        "order-1001-charge",
        _NOTHING_YET._replace(status=PaymentStatus.REQUIRES_ACTION, gateway_payment_id="pay_9f2c"),
        action=RequiresAction(
            "op_51ab",
            "redirect_to_url",
            "https://bank.example/3ds/51ab",
            datetime(2026, 1, 31, 12, 15, 0, 250_000, tzinfo=UTC),
        ),
    ),
    "payment.pending.v1": _example(
        EventKind.PENDING,
        OperationKind.CHARGE,
        "order-1001-charge",
        _NOTHING_YET._replace(has_indeterminate=True),
        reference=None,
        pending_cause=PendingCause.OUTCOME_UNKNOWN,
    ),
    "payment.needs_review.v1": _example(
        EventKind.NEEDS_REVIEW,
        OperationKind.CHARGE,
        "order-1001-charge",
        _NOTHING_YET._replace(has_indeterminate=True),
        payment_seq=2,
        reference=None,
    ),
    "payment.command_rejected.v1": _example(
        EventKind.COMMAND_REJECTED,
        OperationKind.CAPTURE,
        "order-1001-capture-1",
        _AUTHORIZED,
        payment_seq=2,
        operation_number=2,
        amount_minor=2000,
        reference=None,
        rejection=Rejection(
            RejectionReason.AMOUNT_EXCEEDS_CAPTURABLE,
            "`amount_minor` is 2000, but only 1250 can still be captured.",
            ("amount_minor",),
        ),
    ),
    "payment.expired.v1": _example(
        EventKind.EXPIRED,
        OperationKind.CHARGE,
        "order-1001-charge",
        _NOTHING_YET._replace(status=PaymentStatus.EXPIRED, gateway_payment_id="pay_9f2c"),
        payment_seq=2,
    ),
    "payment.late_success.v1": _example(
        EventKind.LATE_SUCCESS,
        OperationKind.CHARGE,
        "order-1001-charge",
        _CAPTURED,
        payment_seq=3,
        told_before=OperationState.EXPIRED,
    ),
    "payment.authorization_expired.v1": _example(
        EventKind.AUTHORIZATION_EXPIRED,
        OperationKind.AUTHORIZE,
        "order-1001-authorize",
        _AUTHORIZED._replace(status=PaymentStatus.CANCELED, released_minor=1250),
        payment_seq=2,
    ),
    "payment.refund_failed.v1": _example(
        EventKind.REFUND_FAILED,
        OperationKind.REFUND,
        "order-1001-refund-1",
        _CAPTURED,
        payment_seq=3,
        operation_number=2,
        amount_minor=250,
    ),
    "payment.dispute_opened.v1": _dispute(DisputeStage.OPENED, 2, 1250),
    "payment.dispute_closed.v1": _dispute(DisputeStage.WON, 3, 0),
    "payment.refunded_externally.v1": _external(
        EventKind.REFUNDED_EXTERNALLY,
        OperationKind.REFUND,
        _CAPTURED._replace(status=PaymentStatus.PARTIALLY_REFUNDED, refunded_minor=250),
        amount_minor=250,
    ),
    "payment.captured_externally.v1": _external(
        EventKind.CAPTURED_EXTERNALLY, OperationKind.CAPTURE, _CAPTURED, reference="ch_77aa"
    ),
}
"""By `type`, as domain events; `write_event` turns them into messages."""
