"""What happened to a payment, in the domain's terms; `handlers.messages` puts it on the wire."""

from datetime import datetime
from enum import StrEnum
from typing import NamedTuple
from uuid import UUID

from domain.commands import OperationKind, Rejection
from domain.notices import Dispute
from domain.operations import DeclineReason, OperationState, RequiresAction


class EventKind(StrEnum):
    """Past tense, as in the message type `payment.<kind>.v1`."""

    AUTHORIZED = "authorized"
    CAPTURED = "captured"
    VOIDED = "voided"
    REFUNDED = "refunded"
    DECLINED = "declined"
    REQUIRES_ACTION = "requires_action"
    PENDING = "pending"
    NEEDS_REVIEW = "needs_review"
    COMMAND_REJECTED = "command_rejected"
    EXPIRED = "expired"
    LATE_SUCCESS = "late_success"
    AUTHORIZATION_EXPIRED = "authorization_expired"
    REFUND_FAILED = "refund_failed"
    DISPUTE_OPENED = "dispute_opened"
    DISPUTE_CLOSED = "dispute_closed"
    REFUNDED_EXTERNALLY = "refunded_externally"
    CAPTURED_EXTERNALLY = "captured_externally"


FINAL_EVENTS = frozenset(
    {
        EventKind.AUTHORIZED,
        EventKind.CAPTURED,
        EventKind.VOIDED,
        EventKind.REFUNDED,
        EventKind.DECLINED,
        EventKind.COMMAND_REJECTED,
        EventKind.EXPIRED,
    }
)
"""The kinds that end a command; every accepted command gets exactly one (and its replays)."""


AMENDING_EVENTS = frozenset({EventKind.LATE_SUCCESS, EventKind.REFUND_FAILED})
"""The kinds that correct a command's final event: from then on they are replayed together with it."""


class PendingCause(StrEnum):
    """Why there is no result yet."""

    PROVIDER_PENDING = "provider_pending"
    OUTCOME_UNKNOWN = "outcome_unknown"


class PaymentStatus(StrEnum):
    """A summary derived from a payment's amounts and operations; the amounts are the truth."""

    CREATED = "created"
    REQUIRES_ACTION = "requires_action"
    PROCESSING = "processing"
    AUTHORIZED = "authorized"
    PARTIALLY_CAPTURED = "partially_captured"
    CAPTURED = "captured"
    PARTIALLY_REFUNDED = "partially_refunded"
    REFUNDED = "refunded"
    CANCELED = "canceled"
    EXPIRED = "expired"
    FAILED = "failed"


class PaymentSnapshot(NamedTuple):
    """A payment's amounts and status right after an event, so that a subscriber needs no second source."""

    status: PaymentStatus
    currency: str | None
    authorized_minor: int
    captured_minor: int
    released_minor: int
    refunded_minor: int
    disputed_minor: int
    has_indeterminate: bool
    gateway: str | None
    gateway_payment_id: str | None
    order_id: str | None
    customer_id: str | None
    owed_minor: int = 0


class Event(NamedTuple):
    """One thing that happened to a payment, mostly because of one command. A dispute, or a movement that somebody made
    in the provider's dashboard, names none.

    `payment_seq` is gap-free per payment, from 1. `amount_minor` is what this operation moved or asked to move, and
    `currency` that amount's: of a refused command its own where it named one, otherwise the payment's.
    `operation_number` is None for a rejection that left no operation behind, and for a dispute.
    `told_before` is how the operation of a late success had ended. `owed_minor` is the part of a success that must be
    returned, since another opening of the payment was paid as well. `evidence` is set where a person decided, not the
    provider.
    """

    kind: EventKind
    payment_id: UUID
    payment_seq: int
    occurred_at: datetime
    command: OperationKind | None
    idempotency_key: str | None
    fingerprint: bytes | None
    snapshot: PaymentSnapshot
    operation_number: int | None = None
    amount_minor: int | None = None
    currency: str | None = None
    reference: str | None = None
    rejection: Rejection | None = None
    decline_reason: DeclineReason | None = None
    decline_code: str | None = None
    action: RequiresAction | None = None
    pending_cause: PendingCause | None = None
    told_before: OperationState | None = None
    owed_minor: int = 0
    dispute: Dispute | None = None
    replays_due: int = 0
    """How many more deliveries of the command are owed this (final) event."""
    traceparent: str | None = None
    evidence: str | None = None
    expires_at: datetime | None = None
    """Of a hold that came about: when its provider will release it by itself, if it says so."""

    @property
    def is_final(self) -> bool:
        return self.kind in FINAL_EVENTS

    @property
    def is_result(self) -> bool:
        """Whether it is stored with its operation: it ends a command, or reports what no command asked for."""
        return self.operation_number is not None and (self.is_final or self.fingerprint is None)

    @property
    def amends_result(self) -> bool:
        """Whether the stored result of its command would be untrue without it."""
        return self.kind in AMENDING_EVENTS and self.fingerprint is not None


class Replay(NamedTuple):
    """The stored result of a command, to be published again for one more delivery of it: the final event and, one per
    line, the events that corrected it since."""

    payment_id: UUID
    result: str
    traceparent: str | None = None
