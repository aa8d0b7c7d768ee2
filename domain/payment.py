"""The payment: its amounts, the operations that are open on it, and the status that follows from both."""

from dataclasses import dataclass, fields
from datetime import datetime
from operator import attrgetter
from typing import Final
from uuid import UUID

from domain.events import PaymentSnapshot, PaymentStatus
from domain.operations import Operation, OperationState

ENDED_WITHOUT_MONEY: Final = frozenset({PaymentStatus.EXPIRED, PaymentStatus.CANCELED})
"""How the last opening ended, which the amounts do not show: the status stays until another one begins."""


@dataclass(slots=True)
class Payment:
    """Amounts in minor units of `currency`; they are the truth, the status is derived from them.

    Each authorization or charge is an *opening*. The first that holds or took money is the *primary* one: captures,
    voids and refunds act on it, and `gateway` and `gateway_payment_id` name it. What a later opening took is owed.

    Not frozen, for speed (docs/decisions/0005): `decide` changes only the copy that it makes for itself.

    `operations` holds the open ones in the order accepted. `version` is 0 until the payment was stored.
    """

    payment_id: UUID
    order_id: str | None = None
    customer_id: str | None = None
    gateway: str | None = None
    gateway_payment_id: str | None = None
    currency: str | None = None
    amount_minor: int = 0
    """What the last opening asked for."""
    authorized_minor: int = 0
    captured_minor: int = 0
    released_minor: int = 0
    refunded_minor: int = 0
    disputed_minor: int = 0
    reserved_capture_minor: int = 0
    reserved_refund_minor: int = 0
    status: PaymentStatus = PaymentStatus.CREATED
    has_indeterminate: bool = False
    last_operation: int = 0
    last_seq: int = 0
    version: int = 0
    authorization_expires_at: datetime | None = None
    disputes: str | None = None
    """Every dispute ever reported, as `domain.disputes` writes it; None for almost every payment."""
    owed_held_minor: int = 0
    """The part of `authorized_minor` that other openings than the primary one hold."""
    owed_captured_minor: int = 0
    """The part of `captured_minor` that other openings took."""
    owed_returned_minor: int = 0
    """The part of `refunded_minor` that returned what other openings took."""
    operations: tuple[Operation, ...] = ()

    def copy(self) -> "Payment":
        return Payment(*_values(self))

    @property
    def has_money(self) -> bool:
        """Whether the primary opening holds something, or captured it."""
        elsewhere = self.owed_held_minor + self.owed_captured_minor
        return self.authorized_minor > self.released_minor + elsewhere

    @property
    def capturable_minor(self) -> int:
        """Authorized, and neither captured, released, reserved nor held by another opening."""
        spent = self.captured_minor + self.released_minor + self.reserved_capture_minor
        return self.authorized_minor - spent - self.owed_held_minor

    @property
    def refundable_minor(self) -> int:
        """Captured, and neither refunded, disputed nor reserved."""
        return self.own_kept_minor - self.disputed_minor - self.reserved_refund_minor

    @property
    def own_captured_minor(self) -> int:
        """Captured from the primary opening."""
        return self.captured_minor - self.owed_captured_minor

    @property
    def own_kept_minor(self) -> int:
        """`own_captured_minor` less what was refunded of it."""
        return self.own_captured_minor - (self.refunded_minor - self.owed_returned_minor)

    @property
    def owed_minor(self) -> int:
        """Taken by other openings, and not returned yet."""
        return self.owed_captured_minor - self.owed_returned_minor

    @property
    def under_way(self) -> Operation | None:
        """The operation that the gateway has, or may have; the first of the two while a void cancels a waiting one."""
        return next((operation for operation in self.operations if operation.is_under_way), None)

    @property
    def waiting_for_payer(self) -> Operation | None:
        """The opening that waits for the payer, if any."""
        current = self.under_way
        return current if current is not None and current.state is OperationState.REQUIRES_ACTION else None

    @property
    def is_cancelling(self) -> bool:
        """Whether a void of the opening that waits for the payer is under way."""
        return sum(operation.is_under_way for operation in self.operations) > 1

    @property
    def void_releases_secondary(self) -> bool:
        """Of the void that is under way: whether its target is a hold beside the primary one (`domain.voids`)."""
        return not self.reserved_capture_minor

    def is_primary(self, opening: Operation) -> bool:
        """Whether captures, voids and refunds act on this opening."""
        return (opening.gateway, opening.reference) == (self.gateway, self.gateway_payment_id)

    def derived_status(self) -> PaymentStatus:
        """What the amounts, and the operation under way, add up to."""
        # A hold beside what another opening took, and gave back, is a hold.
        if self.captured_minor > (self.owed_returned_minor if self.has_money else 0):
            return self._status_of_captured()
        if self.authorized_minor:
            is_held = self.authorized_minor > self.released_minor
            return PaymentStatus.AUTHORIZED if is_held else PaymentStatus.CANCELED
        current = self.under_way
        if current is None:
            if self.status in ENDED_WITHOUT_MONEY:
                return self.status
            return PaymentStatus.FAILED if self.amount_minor else PaymentStatus.CREATED
        if current.state is OperationState.REQUIRES_ACTION:
            return PaymentStatus.REQUIRES_ACTION
        return PaymentStatus.PROCESSING

    def _status_of_captured(self) -> PaymentStatus:
        if self.refunded_minor:
            is_all = self.refunded_minor == self.captured_minor
            return PaymentStatus.REFUNDED if is_all else PaymentStatus.PARTIALLY_REFUNDED
        is_all = self.captured_minor + self.released_minor == self.authorized_minor
        return PaymentStatus.CAPTURED if is_all else PaymentStatus.PARTIALLY_CAPTURED

    def snapshot(self) -> PaymentSnapshot:
        return PaymentSnapshot(
            self.status,
            self.currency,
            self.authorized_minor,
            self.captured_minor,
            self.released_minor,
            self.refunded_minor,
            self.disputed_minor,
            self.has_indeterminate,
            self.gateway,
            self.gateway_payment_id,
            self.order_id,
            self.customer_id,
            self.owed_minor,
        )


_values = attrgetter(*(field.name for field in fields(Payment)))
