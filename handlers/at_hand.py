"""Payments whose state this process knows without asking Postgres, so that most batches are one statement.

It is only a guess: a decision based on it is saved on the condition that the guess was right (docs/decisions/0007), and
otherwise decided again on locked rows.
"""

from collections.abc import Iterable, Sequence
from typing import Final
from uuid import UUID

from domain.decision import Answer, Delivery, Input
from domain.payment import Payment
from domain.requests import OPENING

CAPACITY: Final = 50_000
"""Payments kept; more than the backlog's capacity, so that only leaked entries are ever dropped."""


class AtHand:
    """Payments with a single operation that this process sent to its gateway, as they were committed."""

    def __init__(self) -> None:
        self._payments: dict[UUID, Payment] = {}

    def note(self, payment_ids: Iterable[UUID], committed: Iterable[Payment]) -> None:
        """Note a committed batch: `payment_ids` may have changed; `committed` holds their new states."""
        for payment_id in payment_ids:
            self._payments.pop(payment_id, None)
        if len(self._payments) > CAPACITY:
            self._payments.clear()
        for payment in committed:
            if len(payment.operations) == 1 and payment.operations[0].is_leased:
                self._payments[payment.payment_id] = payment

    def assume(self, inputs: Sequence[Input]) -> dict[UUID, Payment] | None:
        """The payments of `inputs` that exist, or None unless that is known for each of them.

        A command that opens a payment is assumed to mean a new one. An answer to a request of this process finds the
        payment as it was then.
        """
        assumed: dict[UUID, Payment | None] = {}
        for given in inputs:
            if isinstance(given, Delivery):
                if not self._opens(given, assumed):
                    return None
                assumed[given.command.payment_id] = None
            else:
                payment = self._payments.get(given.payment_id)
                if (
                    not isinstance(given, Answer)
                    or payment is None
                    or given.payment_id in assumed
                    or not _is_of(given, payment)
                ):
                    return None
                assumed[given.payment_id] = payment
        return {payment_id: payment for payment_id, payment in assumed.items() if payment is not None}

    def _opens(self, given: Delivery, assumed: dict[UUID, Payment | None]) -> bool:
        payment_id = given.command.payment_id
        if payment_id in assumed:
            return assumed[payment_id] is None
        return given.command.kind in OPENING and payment_id not in self._payments


def _is_of(answer: Answer, payment: Payment) -> bool:
    """Whether the answer is to the attempt that is known here; after another attempt the store knows more."""
    operation = payment.operations[0]
    return (operation.number, operation.lease_token) == (answer.operation_number, answer.lease_token)
