"""The events on the wire, version 1: what subscribers read, and how a domain event becomes text.

Promises: every event of a type has the same fields in the same order, `type` first, and null where a field has no
value. Three fields are optional: only a replay has `original_event_id`; `owed_minor` is in every late success, and
elsewhere only if it is not 0; only an event that a person decided has `evidence`. The models declare the events,
for the AsyncAPI document. `write_event` builds the text without them, several times faster; a test compares the two.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from typing import Annotated, Any, Final, Literal
from uuid import UUID

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field
from pydantic_core import to_json

from domain.commands import RejectionReason
from domain.events import Event, EventKind, PaymentSnapshot, PaymentStatus, PendingCause
from domain.notices import DisputeStage
from domain.operations import DeclineReason
from handlers.messages.commands import command_type

_Minor = Annotated[int, Field(ge=0, description="Minor units of `currency`.")]
_OWED: Final = (
    "to be returned to the payer in any case. Do not send a refund for it, which would return the other attempt's "
    "money: an operator returns it in the provider's dashboard."
)
_Owed = Annotated[
    _Minor | None, Field(description=f"Only if an earlier attempt was paid late, too: what this one took, {_OWED}")
]

_Evidence = Annotated[
    str | None,
    Field(description="Only if a person decided because the provider gives no evidence: how they know."),
]

_HoldEnd = Annotated[
    AwareDatetime | None,
    Field(
        description="Only where the provider says it: when it will release the hold by itself, so capture before. The "
        "end itself is reported by `payment.authorization_expired.v1`."
    ),
]


class _Wire(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class PaymentState(_Wire):
    """The payment right after the event. The amounts are authoritative; `status` is derived from them."""

    status: PaymentStatus
    currency: str | None
    authorized_minor: _Minor
    captured_minor: _Minor
    released_minor: _Minor
    refunded_minor: _Minor
    disputed_minor: _Minor
    has_indeterminate: Annotated[bool, Field(description="An operation's outcome is unknown: money may have moved.")]
    owed_minor: Annotated[
        _Minor | None,
        Field(
            description="Only if not zero: the part of the captured amount that another attempt took than the one "
            "that captures, voids and refunds act on, and has not been returned yet."
        ),
    ] = None
    gateway: str | None
    gateway_payment_id: str | None
    order_id: str | None
    customer_id: str | None


class Action(_Wire):
    """What the payer must do first, such as 3-D Secure at `url`."""

    type: Annotated[
        str,
        Field(
            description="The provider's word: `redirect` (PayPal, VNPay, MoMo) and `redirect_to_url` (Stripe) send the "
            "payer to `url`; `use_stripe_sdk` (Stripe) is for Stripe's own client."
        ),
    ]
    url: str | None
    expires_at: Annotated[AwareDatetime | None, Field(description="The deadline for the payer; null if unknown.")] = (
        None
    )


class _WireEvent(_Wire):
    type: str
    event_id: Annotated[UUID, Field(description="Unique for each event, replays included: use it to drop duplicates.")]
    occurred_at: Annotated[AwareDatetime, Field(description="RFC 3339 in UTC, with microseconds.")]
    payment_id: UUID
    payment_seq: Annotated[
        int,
        Field(ge=1, description="1, 2, 3 … for each payment: shows order and gaps. A replay repeats its original's."),
    ]
    command_id: Annotated[
        UUID | None,
        Field(
            description="Opaque; the same for each delivery of a command. Distinguishes commands of one key: the "
            "accepted one from a conflicting one. Null if no command caused the event."
        ),
    ]
    command_type: Annotated[str | None, Field(description="Null if no command caused it, such as a dispute.")]
    idempotency_key: Annotated[str | None, Field(description="The command's; null if it was missing or unusable.")]
    operation_number: Annotated[
        int | None, Field(description="Counts a payment's operations from 1; null if a refusal created none.")
    ]
    amount_minor: Annotated[
        int | None,
        Field(
            description="What the operation moved or asked to move, in minor units; null if a refused command had no "
            "readable amount. Do not add these up: the amounts in `payment` are the sums. (A `voided` event that only "
            "canceled an attempt that waited for its payer has that attempt's amount, but released nothing.)"
        ),
    ]
    currency: Annotated[
        str | None,
        Field(description="ISO 4217. For a refused command its own currency, if it had one; otherwise the payment's."),
    ]
    provider_reference: Annotated[str | None, Field(description="The provider's id of the operation.")]
    replayed: Annotated[
        bool, Field(description="True if this repeats an earlier result for another delivery of its command.")
    ]
    payment: PaymentState
    original_event_id: Annotated[UUID | None, Field(description="Only in a replay: the event that it repeats.")] = None


class PaymentAuthorized(_WireEvent):
    """The amount is held for a later capture. Final for an authorize command."""

    type: Literal["payment.authorized.v1"]
    owed_minor: _Owed = None
    expires_at: _HoldEnd = None
    evidence: _Evidence = None


class PaymentCaptured(_WireEvent):
    """The money was collected. Final for a charge or capture command."""

    type: Literal["payment.captured.v1"]
    owed_minor: _Owed = None
    evidence: _Evidence = None


class PaymentVoided(_WireEvent):
    """The hold was released. Final for a void command."""

    type: Literal["payment.voided.v1"]
    evidence: _Evidence = None


class PaymentRefunded(_WireEvent):
    """The money was returned. Final for a refund command."""

    type: Literal["payment.refunded.v1"]
    evidence: _Evidence = None


class PaymentDeclined(_WireEvent):
    """The payer, their bank or the provider refused, and no money moved. Final.

    `canceled`: a void, the payer or the provider ended the attempt; after a void, its `voided` event follows.
    """

    type: Literal["payment.declined.v1"]
    decline_reason: DeclineReason
    decline_code: Annotated[str | None, Field(description="The provider's own word.")]


class PaymentRequiresAction(_WireEvent):
    """The payer must act first. Not final: the result follows."""

    type: Literal["payment.requires_action.v1"]
    action: Action


class PaymentPending(_WireEvent):
    """There is no result yet. Not final: the result follows, perhaps after `needs_review`. Money may have moved."""

    type: Literal["payment.pending.v1"]
    cause: PendingCause


class PaymentNeedsReview(_WireEvent):
    """The outcome is still unknown, or the provider's answer contradicts the request; a person should look. Not final:
    the service keeps asking the provider, without a limit. By default this comes one hour after dispatch if there is no
    answer, and seven days after dispatch if the provider says that the operation is pending or waits for the payer.
    """

    type: Literal["payment.needs_review.v1"]


class PaymentCommandRejected(_WireEvent):
    """The command was refused and moved no money. Final, except for `idempotency_conflict`: that is not the result of
    the first command with this key, which remains valid and has its own result."""

    type: Literal["payment.command_rejected.v1"]
    reason: RejectionReason
    message: Annotated[str, Field(description="For people: what is wrong and what to do. The wording may change.")]
    fields: Annotated[list[str], Field(description="The command's fields that caused it.")]
    evidence: _Evidence = None


class PaymentExpired(_WireEvent):
    """The payer did not act in time, and no money moved. Final; a later verified success is a `late_success`."""

    type: Literal["payment.expired.v1"]


class PaymentLateSuccess(_WireEvent):
    """The provider executed an operation that had been reported as declined, rejected or expired. The money has moved,
    and is counted.

    If `owed_minor` is 0, accept the money, or return it with a refund or void.
    """

    type: Literal["payment.late_success.v1"]
    told_before: Annotated[
        str,
        Field(
            description="The result reported before: `declined`, `expired`, or `not_executed`, which was published as "
            "`command_rejected`.",
            json_schema_extra={"enum": ["declined", "not_executed", "expired"]},
        ),
    ]
    owed_minor: Annotated[_Minor, Field(description=f"0, unless another attempt was paid, too: {_OWED}")]
    expires_at: _HoldEnd = None


class PaymentAuthorizationExpired(_WireEvent):
    """The provider released the rest of the hold: nothing more can be captured."""

    type: Literal["payment.authorization_expired.v1"]


class PaymentRefundFailed(_WireEvent):
    """A refund that had been reported as done came back: the payer did not receive the money and is still owed it.

    Somebody may have made the refund in the provider's dashboard; then there is no command, and perhaps
    no earlier report.
    """

    type: Literal["payment.refund_failed.v1"]


class PaymentRefundedExternally(_WireEvent):
    """Somebody returned money in the provider's dashboard, without a command. `payment.refunded_minor` counts it."""

    type: Literal["payment.refunded_externally.v1"]


class PaymentCapturedExternally(_WireEvent):
    """Somebody captured a hold in the provider's dashboard, without a command. `payment.captured_minor` counts it."""

    type: Literal["payment.captured_externally.v1"]


class DisputeState(_Wire):
    """A dispute that the payer opened with their bank; `dispute_id` is the provider's."""

    dispute_id: str
    stage: DisputeStage
    reason: str | None


class PaymentDisputeOpened(_WireEvent):
    """The payer's bank took the money back until the dispute is closed; meanwhile it cannot be refunded."""

    type: Literal["payment.dispute_opened.v1"]
    dispute: DisputeState


class PaymentDisputeClosed(_WireEvent):
    """`won`: the money was returned to us. `lost`: it is gone for good."""

    type: Literal["payment.dispute_closed.v1"]
    dispute: DisputeState


WireEvent = (
    PaymentAuthorized
    | PaymentCaptured
    | PaymentVoided
    | PaymentRefunded
    | PaymentDeclined
    | PaymentRequiresAction
    | PaymentPending
    | PaymentNeedsReview
    | PaymentCommandRejected
    | PaymentExpired
    | PaymentLateSuccess
    | PaymentAuthorizationExpired
    | PaymentRefundFailed
    | PaymentDisputeOpened
    | PaymentDisputeClosed
    | PaymentRefundedExternally
    | PaymentCapturedExternally
)

EVENT_MODELS: Final[Mapping[str, type[WireEvent]]] = {
    "payment.authorized.v1": PaymentAuthorized,
    "payment.captured.v1": PaymentCaptured,
    "payment.voided.v1": PaymentVoided,
    "payment.refunded.v1": PaymentRefunded,
    "payment.declined.v1": PaymentDeclined,
    "payment.requires_action.v1": PaymentRequiresAction,
    "payment.pending.v1": PaymentPending,
    "payment.needs_review.v1": PaymentNeedsReview,
    "payment.command_rejected.v1": PaymentCommandRejected,
    "payment.expired.v1": PaymentExpired,
    "payment.late_success.v1": PaymentLateSuccess,
    "payment.authorization_expired.v1": PaymentAuthorizationExpired,
    "payment.refund_failed.v1": PaymentRefundFailed,
    "payment.dispute_opened.v1": PaymentDisputeOpened,
    "payment.dispute_closed.v1": PaymentDisputeClosed,
    "payment.refunded_externally.v1": PaymentRefundedExternally,
    "payment.captured_externally.v1": PaymentCapturedExternally,
}
"""Every event that this service writes, by its `type`."""

_HEAD: Final = re.compile(
    r'\{"type":"(?P<type>[^"]+)","event_id":"(?P<event_id>[^"]+)","occurred_at":"(?P<occurred_at>[^"]+)",'
    r'"payment_id":"[^"]+","payment_seq":(?P<payment_seq>[0-9]+),'
)


@dataclass(frozen=True, slots=True)
class WrittenReplay:
    """A replay's text, with the fields that its row in the outbox repeats."""

    type: str
    text: str
    payment_seq: int
    occurred_at: str


def event_type(kind: EventKind) -> str:
    """The wire type of an event: `payment.captured.v1` for CAPTURED."""
    return f"payment.{kind}.v1"


@lru_cache(maxsize=64)  # All events of a batch share the time of its decision.
def write_time(moment: datetime) -> str:
    """RFC 3339 in UTC with six decimals: `2026-01-31T12:00:00.000000Z`."""
    in_utc = moment if moment.tzinfo is UTC else moment.astimezone(UTC)
    return in_utc.isoformat(timespec="microseconds")[:-6] + "Z"


def write_event(event: Event, event_id: UUID) -> str:
    """The event as JSON text, the exact body of its message."""
    # Enumerations are converted to str here: the JSON writer takes ten times as long for them.
    snapshot = event.snapshot
    body: dict[str, Any] = {
        "type": event_type(event.kind),
        "event_id": event_id,
        "occurred_at": write_time(event.occurred_at),
        "payment_id": event.payment_id,
        "payment_seq": event.payment_seq,
        "command_id": _command_id(event.fingerprint) if event.fingerprint else None,
        "command_type": command_type(event.command) if event.command else None,
        "idempotency_key": event.idempotency_key,
        "operation_number": event.operation_number,
        "amount_minor": event.amount_minor,
        "currency": event.currency,
        "provider_reference": event.reference,
        "replayed": False,
        **_particulars(event),
        "payment": _payment_state(snapshot),
    }
    if event.evidence is not None:
        body["evidence"] = event.evidence
    return to_json(body).decode()


def write_replay(result: str, event_id: UUID) -> WrittenReplay:
    """The same result again, with an id of its own, `replayed` true, and the original's id.

    `result` must be exactly the text that `write_event` returned.
    """
    head = _HEAD.match(result)
    assert head is not None, "a stored result is exactly the text that write_event wrote, kept in a text column"
    original_id = head["event_id"]
    text = (
        result[: head.start("event_id")]
        + str(event_id)
        + result[head.end("event_id") :].replace('"replayed":false', '"replayed":true', 1)[:-1]
        + f',"original_event_id":"{original_id}"}}'
    )
    return WrittenReplay(head["type"], text, int(head["payment_seq"]), head["occurred_at"])


def _command_id(fingerprint: bytes) -> str:
    """The text of `domain.commands.command_id`, without building a UUID object."""
    digits = fingerprint[:16].hex()
    variant = "89ab"[fingerprint[8] >> 4 & 3]
    return f"{digits[:8]}-{digits[8:12]}-8{digits[13:16]}-{variant}{digits[17:20]}-{digits[20:]}"


def _particulars(event: Event) -> dict[str, Any]:
    """The fields that only this type of event has."""
    match event.kind:
        case EventKind.DECLINED:
            return {"decline_reason": str(event.decline_reason), "decline_code": event.decline_code}
        case EventKind.REQUIRES_ACTION:
            assert event.action is not None, "an event that asks for an action says which"
            action = event.action
            expires_at = write_time(action.expires_at) if action.expires_at else None
            return {"action": {"type": action.action_type, "url": action.url, "expires_at": expires_at}}
        case EventKind.PENDING:
            return {"cause": str(event.pending_cause)}
        case EventKind.COMMAND_REJECTED:
            assert event.rejection is not None, "an event that refuses a command says why"
            rejection = event.rejection
            return {"reason": str(rejection.reason), "message": rejection.message, "fields": rejection.fields}
        case EventKind.AUTHORIZED | EventKind.CAPTURED:
            return ({"owed_minor": event.owed_minor} if event.owed_minor else {}) | _hold_end(event)
        case EventKind.LATE_SUCCESS:
            return {"told_before": str(event.told_before), "owed_minor": event.owed_minor} | _hold_end(event)
        case EventKind.DISPUTE_OPENED | EventKind.DISPUTE_CLOSED:
            assert event.dispute is not None, "an event about a dispute says which"
            dispute = event.dispute
            state = {"dispute_id": dispute.dispute_id, "stage": str(dispute.stage), "reason": dispute.reason}
            return {"dispute": state}
        case _:
            return {}


def _hold_end(event: Event) -> dict[str, Any]:
    return {"expires_at": write_time(event.expires_at)} if event.expires_at else {}


def _payment_state(snapshot: PaymentSnapshot) -> dict[str, Any]:
    return {
        "status": str(snapshot.status),
        "currency": snapshot.currency,
        "authorized_minor": snapshot.authorized_minor,
        "captured_minor": snapshot.captured_minor,
        "released_minor": snapshot.released_minor,
        "refunded_minor": snapshot.refunded_minor,
        "disputed_minor": snapshot.disputed_minor,
        "has_indeterminate": snapshot.has_indeterminate,
        **({"owed_minor": snapshot.owed_minor} if snapshot.owed_minor else {}),
        "gateway": snapshot.gateway,
        "gateway_payment_id": snapshot.gateway_payment_id,
        "order_id": snapshot.order_id,
        "customer_id": snapshot.customer_id,
    }
