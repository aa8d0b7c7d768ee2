"""What a provider can do, declared by its gateway."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from enum import StrEnum

from domain.commands import OperationKind


class Listing(StrEnum):
    """How a provider lists what it did in a time, for a comparison with our books."""

    NONE = "none"
    PAYMENTS = "payments"
    """The payments created in it, each with what became of it until now (`domain.ports.Statements`)."""
    MOVEMENTS = "movements"
    """Each capture and refund made in it, whenever its payment was created (`domain.ports.Movements`)."""


@dataclass(frozen=True, slots=True)
class AmountLimits:
    """Inclusive bounds of one authorization or charge, in minor units."""

    minimum_minor: int = 1
    maximum_minor: int = 10**12


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """What a provider can do: what is not declared is refused up front, never emulated."""

    operations: frozenset[OperationKind]
    currencies: frozenset[str]
    partial_capture: bool
    multi_capture: bool
    partial_refund: bool
    off_session: bool
    """Whether a saved method may be charged while the payer is away, to be declined where they would have to act."""
    cancel_waiting: bool
    """Whether a void ends, for good, a payment that still waits for the payer (3-D Secure, a redirect).

    Where not, the void waits as any command does: it releases a hold that the payer consented to, and is rejected where
    a charge was paid, which stays captured until it is refunded.
    """
    idempotency_retention: timedelta
    """How long a repeated provider key surely returns the first answer. Afterwards only a status query is safe.

    Zero: the provider knows no keys, so an attempt whose answer is lost is never sent again.
    """
    question_interval: timedelta = timedelta(0)
    """The provider refuses to be asked about one payment again sooner than this."""
    listing: Listing = Listing.NONE
    limits: Mapping[str, AmountLimits] = field(default_factory=dict)
    """The provider's own bounds by currency; an installation may set others (`domain.rules.Rules.limits`)."""
