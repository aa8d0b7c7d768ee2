"""Operations: their states, the outcomes that a gateway may report, and the request that a gateway receives."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from datetime import datetime
from enum import StrEnum
from operator import attrgetter
from typing import Any, NamedTuple
from uuid import UUID

from domain.commands import NO_METADATA, Command, OperationKind
from domain.money import Money


class OperationState(StrEnum):
    """Where an operation stands. Only evidence from the provider makes it final once it was dispatched."""

    RECEIVED = "received"
    """Accepted and waiting for an earlier operation of its payment."""
    REJECTED = "rejected"
    DISPATCHED = "dispatched"
    """Committed for the gateway. Nothing is known of its execution yet, and no attempt is unaccounted for."""
    REQUIRES_ACTION = "requires_action"
    PENDING = "pending"
    INDETERMINATE = "indeterminate"
    """A call was made or may have been made, and its answer is lost. Money may have moved."""
    NEEDS_REVIEW = "needs_review"
    """Open past its deadline, or contradicted: a person should look, evidence still ends it."""
    SUCCEEDED = "succeeded"
    LAPSED = "lapsed"
    """An authorization that succeeded, and whose hold has ended at its provider since."""
    DECLINED = "declined"
    NOT_EXECUTED = "not_executed"
    EXPIRED = "expired"
    """The payer did not act in time; no money moved. A later verified success is still believed."""


UNDER_WAY = frozenset(
    {
        OperationState.DISPATCHED,
        OperationState.REQUIRES_ACTION,
        OperationState.PENDING,
        OperationState.INDETERMINATE,
        OperationState.NEEDS_REVIEW,
    }
)
"""States in which the gateway has, or may have, the operation: it holds its payment and its reservation."""

OPEN = UNDER_WAY | {OperationState.RECEIVED}
"""States that still owe the sender a final result."""

IN_DOUBT = frozenset({OperationState.INDETERMINATE, OperationState.NEEDS_REVIEW})


class DeclineReason(StrEnum):
    """Why the payer's side said no. Closed; a gateway maps its provider's many codes to these and keeps the code."""

    REFUSED_BY_ISSUER = "refused_by_issuer"
    INSUFFICIENT_FUNDS = "insufficient_funds"
    CARD_EXPIRED = "card_expired"
    INVALID_CARD_DATA = "invalid_card_data"
    AUTHENTICATION_REQUIRED = "authentication_required"
    AUTHENTICATION_FAILED = "authentication_failed"
    SUSPECTED_FRAUD = "suspected_fraud"
    LIMIT_EXCEEDED = "limit_exceeded"
    METHOD_NOT_SUPPORTED = "method_not_supported"
    PROCESSING_ERROR = "processing_error"
    CANCELED = "canceled"
    REFUND_FAILED = "refund_failed"
    OTHER = "other"


@dataclass(frozen=True, slots=True)
class Succeeded:
    """The provider executed it. `amount_minor` is what it says it moved, None where it does not say."""

    reference: str
    amount_minor: int | None = None
    expires_at: datetime | None = None
    """For an authorization: when the provider will release the hold by itself, if it says so."""


@dataclass(frozen=True, slots=True)
class Declined:
    """The payer's side refused for good; no money moved. `code` is the provider's own word."""

    reason: DeclineReason
    code: str | None = None
    reference: str | None = None


@dataclass(frozen=True, slots=True)
class RequiresAction:
    """The payer must do something first, such as 3-D Secure at `url`, before the provider's window closes."""

    reference: str
    action_type: str
    url: str | None = None
    expires_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class Pending:
    """The provider has it and has not decided; also every status that we do not recognise."""

    reference: str | None


@dataclass(frozen=True, slots=True)
class Expired:
    """The provider's own window for the payer has closed, or a hold came to its end: nothing more will move."""

    reference: str | None
    code: str | None = None


@dataclass(frozen=True, slots=True)
class NotExecuted:
    """Proof that the provider did not and will not execute it, such as a refused parameter on the first attempt."""

    message: str
    code: str | None = None
    is_hold_gone: bool = False
    """For a capture: refused because its hold seems to have ended, which the provider must be asked about."""
    has_expired: bool = False
    """Not sent, because the command expired before any attempt had reached the provider."""


@dataclass(frozen=True, slots=True)
class Unreachable:
    """This attempt did not reach execution (not connected, rate limited): proof for this attempt, not earlier ones."""

    message: str = ""


@dataclass(frozen=True, slots=True)
class Unknown:
    """Sent, and no readable answer came back. Money may have moved."""

    message: str = ""


Outcome = Succeeded | Declined | RequiresAction | Pending | Expired | NotExecuted | Unreachable | Unknown


def describe(outcome: Outcome) -> str:
    """An outcome as a line of text, without the payer's URL, which may hold a secret."""
    details: dict[str, Any] = {name: getattr(outcome, name) for name in outcome.__slots__}
    shown = ", ".join(f"{name} {value}" for name, value in details.items() if _is_shown(name, value))
    word = "".join(f" {letter.lower()}" if letter.isupper() else letter for letter in type(outcome).__name__).strip()
    return f"{word} ({shown})" if shown else word


def _is_shown(name: str, value: object) -> bool:
    return value not in (None, "") and value is not False and name != "url"


@dataclass(slots=True)
class Operation:
    """An accepted command and what became of it, named by `(payment_id, number)`; `number` counts in order accepted.

    A movement that somebody made in the provider's dashboard is an operation too, so that its reference is known. No
    command asked for it (`is_external`), so it has no key and no fingerprint, and its `content` is the provider's id of
    the payment it belongs to, or empty where the provider does not say.

    Not frozen, for speed (docs/decisions/0005): `decide` changes only the copies that it makes for itself.
    """

    payment_id: UUID
    number: int
    kind: OperationKind
    idempotency_key: str | None
    fingerprint: bytes
    content: str
    state: OperationState
    amount_minor: int | None = None
    gateway: str | None = None
    reference: str | None = None
    """The provider's id of this operation. A void has, from the beginning, the id of the opening that it cancels."""
    attempts: int = 0
    lease_token: int = 0
    """Raised at every claim: a write that carries an older token matches no row."""
    is_leased: bool = False
    """A worker has it and will answer. If the lease expires without an answer, the operation is in doubt."""
    due_at: datetime | None = None
    """When the sweep may claim it: at the end of the lease, or for the next attempt. None: nothing is due."""
    dispatched_at: datetime | None = None
    replays_due: int = 0
    """Repeated deliveries while it was open; each (of a thousand) is owed the result once that exists."""
    result: str | None = None
    """The wire text of the final event; then, one per line, of the events that took it back since."""
    traceparent: str | None = None
    command: Command | None = None
    """The command itself where it is loaded; `content` is its stored form."""

    def copy(self) -> "Operation":
        return Operation(*_values(self))

    @property
    def provider_key(self) -> str:
        """The idempotency key sent to the provider, the same at every attempt on any worker."""
        return f"{self.payment_id}:{self.number}"

    @property
    def is_under_way(self) -> bool:
        return self.state in UNDER_WAY

    @property
    def is_open(self) -> bool:
        return self.state in OPEN

    def is_held(self, now: datetime) -> bool:
        """Whether a worker has it under a lease that has not run out."""
        return self.is_leased and self.due_at is not None and self.due_at > now

    @property
    def is_external(self) -> bool:
        """Whether somebody did it in the provider's dashboard, without a command."""
        return not self.fingerprint


_values = attrgetter(*(each.name for each in fields(Operation)))


class GatewayRequest(NamedTuple):
    """What a gateway is asked to do, complete in itself: no further reads are needed to execute it.

    `gateway_payment_id` is the provider's payment that a capture, void or refund acts on. `reference` is the provider's
    id of this very operation where an earlier answer gave it. `off_session`: nobody is there to act, so decline.
    `is_final` is True for a capture that leaves nothing to capture. `captured_minor` was captured before this.
    `first_dispatched_at` bounds how long the provider still knows `provider_key`. Past `expires_at` it is not begun.
    """

    kind: OperationKind
    payment_id: UUID
    operation_number: int
    provider_key: str
    gateway: str
    amount: Money
    gateway_payment_id: str | None = None
    reference: str | None = None
    payment_method: str | None = None
    order_id: str | None = None
    customer_id: str | None = None
    metadata: Mapping[str, str] = NO_METADATA
    off_session: bool = False
    is_final: bool = True
    captured_minor: int = 0
    state: OperationState = OperationState.DISPATCHED
    attempts: int = 1
    lease_token: int = 1
    first_dispatched_at: datetime | None = None
    expires_at: datetime | None = None
