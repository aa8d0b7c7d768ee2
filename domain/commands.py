"""What an order service may ask for. A command states a request; whether it is granted is `decide`'s business."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Final, NamedTuple
from uuid import UUID


class OperationKind(StrEnum):
    """What an operation does, named as in the command that asks for it."""

    AUTHORIZE = "authorize"
    CHARGE = "charge"
    CAPTURE = "capture"
    VOID = "void"
    REFUND = "refund"


class RejectionReason(StrEnum):
    """Why a command was refused without moving money. Closed: subscribers may switch over it."""

    INVALID_COMMAND = "invalid_command"
    INVALID_AMOUNT = "invalid_amount"
    UNKNOWN_CURRENCY = "unknown_currency"
    CURRENCY_MISMATCH = "currency_mismatch"
    AMOUNT_BELOW_MINIMUM = "amount_below_minimum"
    AMOUNT_ABOVE_MAXIMUM = "amount_above_maximum"
    COMMAND_EXPIRED = "command_expired"
    IDEMPOTENCY_CONFLICT = "idempotency_conflict"
    PAYMENT_NOT_FOUND = "payment_not_found"
    PAYMENT_ALREADY_EXISTS = "payment_already_exists"
    INVALID_STATE = "invalid_state"
    AMOUNT_EXCEEDS_CAPTURABLE = "amount_exceeds_capturable"
    AMOUNT_EXCEEDS_REFUNDABLE = "amount_exceeds_refundable"
    UNKNOWN_GATEWAY = "unknown_gateway"
    UNSUPPORTED_BY_GATEWAY = "unsupported_by_gateway"
    GATEWAY_REFUSED = "gateway_refused"
    GATEWAY_UNAVAILABLE = "gateway_unavailable"


@dataclass(frozen=True, slots=True)
class Rejection:
    """A refusal: a reason to switch over, a sentence to read, and the fields of the command that caused it."""

    reason: RejectionReason
    message: str
    fields: tuple[str, ...] = ()


NO_METADATA: Final[Mapping[str, str]] = {}


class Command(NamedTuple):
    """A readable command. `amount_minor` is None where the sender means "all that remains".

    `content` is the canonical JSON text of the command (known fields only, sorted) and `fingerprint` its SHA-256:
    two deliveries ask for the same thing if and only if these are equal. `off_session`: the payer is not there to
    consent, so a payment that would need them is to be declined.
    """

    kind: OperationKind
    idempotency_key: str
    payment_id: UUID
    content: str
    fingerprint: bytes
    amount_minor: int | None = None
    currency: str | None = None
    order_id: str | None = None
    customer_id: str | None = None
    payment_method: str | None = None
    gateway: str | None = None
    expires_at: datetime | None = None
    metadata: Mapping[str, str] = NO_METADATA
    off_session: bool = False
    traceparent: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class UnacceptableCommand:
    """A command of a known type for a usable payment id whose other fields cannot be accepted: it ends in a rejection.

    `idempotency_key` is None where that field itself is missing or unusable; such a rejection cannot be remembered.
    `currency` is None as well where the command names no known one.
    """

    kind: OperationKind
    idempotency_key: str | None
    payment_id: UUID
    content: str
    fingerprint: bytes
    rejection: Rejection
    currency: str | None = None
    traceparent: str | None = None


AnyCommand = Command | UnacceptableCommand


def command_id(fingerprint: bytes) -> UUID:
    """The stable id of a command: its fingerprint as a UUID version 8 (RFC 9562), the same for every delivery of it."""
    raw = int.from_bytes(fingerprint[:16], "big")
    return UUID(int=raw & ~(0xF << 76) & ~(0x3 << 62) | (8 << 76) | (2 << 62))
