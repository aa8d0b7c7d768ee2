"""The open operations and holds that `payments reconcile` finds, with the provider's answers."""

from dataclasses import dataclass, replace
from datetime import datetime
from typing import Final
from uuid import UUID

from domain.commands import OperationKind
from domain.money import Money
from domain.operations import GatewayRequest, Outcome, Unknown, Unreachable, describe
from handlers.reconcile import HoldAnswer

PAST_ITS_END: Final = "hold_past_its_end"
"""Takes the place of an operation's state for a hold past its end."""


@dataclass(frozen=True, slots=True)
class Found:
    """One open operation or hold past its end, and the provider's answer."""

    payment_id: UUID
    kind: OperationKind
    number: int
    gateway: str
    state: str
    amount: Money
    since: datetime | None
    """When the operation was first sent, or when the hold ended; None if it was never sent."""
    outcome: Outcome | None
    why_not: str = ""
    """Why there is no outcome, if there is none."""

    @property
    def answer(self) -> str:
        return self.why_not if self.outcome is None else describe(self.outcome)

    @property
    def is_answered(self) -> bool:
        """Whether the provider gave an answer that counts."""
        return not isinstance(self.outcome, Unknown | Unreachable | None)


def found_by_request(request: GatewayRequest, outcome: Outcome | None, why_not: str = "") -> Found:
    """An operation with the result of asking about it."""
    return Found(
        request.payment_id,
        request.kind,
        request.operation_number,
        request.gateway,
        request.state.value,
        request.amount,
        request.first_dispatched_at,
        outcome,
        why_not,
    )


def found_by_answer(answer: HoldAnswer) -> Found:
    """The same, for an operation that may not be readable as a request."""
    payment, operation, outcome, why_not = answer
    return Found(
        payment.payment_id,
        operation.kind,
        operation.number,
        operation.gateway or "",
        operation.state.value,
        Money(operation.amount_minor or 0, payment.currency or ""),
        operation.dispatched_at,
        outcome,
        why_not,
    )


def hold_past_its_end(answer: HoldAnswer) -> Found:
    """A hold with the result of asking about it."""
    return replace(found_by_answer(answer), state=PAST_ITS_END, since=answer.payment.authorization_expires_at)
