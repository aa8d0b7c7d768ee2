"""A decision in the making: the payment as it is so far, what changed, and the steps that all inputs share."""

from dataclasses import dataclass, field
from datetime import datetime, timedelta
from operator import attrgetter
from typing import Final

from domain.commands import AnyCommand, Command, OperationKind, Rejection
from domain.decision import Decision
from domain.events import Event, EventKind, PendingCause, Replay
from domain.ledger import Account, Transfer
from domain.notices import Dispute, DisputeStage
from domain.operations import (
    IN_DOUBT,
    DeclineReason,
    GatewayRequest,
    Operation,
    OperationState,
    RequiresAction,
)
from domain.payment import Payment
from domain.requests import OPENING
from domain.rules import Rules, not_before

BOOKINGS: Final = {
    OperationKind.CHARGE: (Account.GATEWAY_CLEARING, Account.CUSTOMER_SALES),
    OperationKind.CAPTURE: (Account.GATEWAY_CLEARING, Account.CUSTOMER_SALES),
    OperationKind.REFUND: (Account.CUSTOMER_REFUNDS, Account.GATEWAY_CLEARING),
}
"""Debit and credit of each kind that moves money; a hold and its release move none."""


@dataclass(slots=True)
class Draft:
    """What `decide` works on; `decision()` turns it into the result."""

    payment: Payment
    now: datetime
    rules: Rules
    events: list[Event | Replay] = field(default_factory=list)
    changed: dict[int, Operation] = field(default_factory=dict)
    requests: list[GatewayRequest] = field(default_factory=list)
    transfers: list[Transfer] = field(default_factory=list)
    is_stale: bool = False
    disagrees: bool = False
    is_postponed: bool = False

    def decision(self) -> Decision:
        """The payment with its derived status, and everything that is new."""
        self._derive()
        changed = tuple(self.changed.values())
        return Decision(
            self.payment,
            self.events,
            changed,
            self.requests,
            self.transfers,
            self.is_stale,
            self.disagrees,
            self.is_postponed,
        )

    def _derive(self) -> None:
        payment = self.payment
        payment.status = payment.derived_status()
        payment.has_indeterminate = any(each.state in IN_DOUBT for each in payment.operations)

    def under_way(self, number: int) -> Operation | None:
        """The operation of this number, if it has not ended."""
        return next((each for each in self.payment.operations if each.number == number and each.is_under_way), None)

    def is_other_currency(self, currency: str | None) -> bool:
        """Whether this currency, if it is known, is not the payment's."""
        return currency is not None and currency != self.payment.currency

    def release_reservation(self, kind: OperationKind) -> None:
        """Stop reserving money of the payment for an operation of this kind."""
        if kind in (OperationKind.CAPTURE, OperationKind.VOID):
            self.payment.reserved_capture_minor = 0
        elif kind is OperationKind.REFUND:
            self.payment.reserved_refund_minor = 0

    def postpone(self, operation: Operation, state: OperationState, reference: str | None) -> None:
        """Keep the operation under way, released by its worker, to be taken up again later."""
        if reference is not None and operation.kind in OPENING and not self.payment.has_money:
            # Otherwise another opening was paid meanwhile and is the primary one.
            self.payment.gateway_payment_id = reference
        operation = operation.copy()
        operation.state = state
        if operation.kind is not OperationKind.VOID:  # whose reference is that of its target
            operation.reference = reference
        operation.is_leased = False
        operation.due_at = self.now + self._delay_in(state, operation)
        self.keep(operation)

    def _delay_in(self, state: OperationState, operation: Operation) -> timedelta:
        retry = self.rules.retry
        delay = retry.delay(operation.attempts, operation.payment_id)
        if state is OperationState.NEEDS_REVIEW:
            delay = retry.within_cut_off(retry.review_poll_interval)
        elif state in (OperationState.PENDING, OperationState.REQUIRES_ACTION):
            delay = min(retry.poll_interval, delay)
        gateway = self.rules.gateways.get(operation.gateway or "")
        return delay if gateway is None else not_before(delay, gateway.question_interval, operation.payment_id)

    def finish(self, operation: Operation, state: OperationState, reference: str | None) -> None:
        """End the operation in `state`: no worker has it, and nothing more is due."""
        operation = operation.copy()
        operation.state = state
        if operation.kind is not OperationKind.VOID or operation.reference is None:
            operation.reference = reference or operation.reference
        operation.is_leased = False
        operation.due_at = None
        self.keep(operation)

    def keep(self, operation: Operation) -> None:
        """Record a new or changed operation, and whether its payment still waits for it."""
        self.changed[operation.number] = operation
        kept = [each for each in self.payment.operations if each.number != operation.number]
        if operation.is_open:
            kept.append(operation)
            kept.sort(key=attrgetter("number"))
        self.payment.operations = tuple(kept)

    def publish(
        self,
        kind: EventKind,
        operation: Operation,
        *,
        reference: str | None = None,
        rejection: Rejection | None = None,
        decline_reason: DeclineReason | None = None,
        decline_code: str | None = None,
        action: RequiresAction | None = None,
        pending_cause: PendingCause | None = None,
        told_before: OperationState | None = None,
        owed_minor: int = 0,
        expires_at: datetime | None = None,
    ) -> None:
        """Publish what happened to `operation`, as the next event of its payment."""
        self.events.append(
            self._next_event(kind)._replace(
                command=None if operation.is_external else operation.kind,
                idempotency_key=operation.idempotency_key,
                fingerprint=operation.fingerprint or None,
                operation_number=operation.number,
                amount_minor=operation.amount_minor,
                reference=reference,
                rejection=rejection,
                decline_reason=decline_reason,
                decline_code=decline_code,
                action=action,
                pending_cause=pending_cause,
                told_before=told_before,
                owed_minor=owed_minor,
                expires_at=expires_at,
                replays_due=operation.replays_due,
                traceparent=operation.traceparent,
            )
        )

    def publish_rejection(self, command: AnyCommand, rejection: Rejection, operation: Operation | None) -> None:
        """Publish that a command was refused; without an `operation` this event is the only trace of it."""
        self.events.append(
            self._next_event(EventKind.COMMAND_REJECTED)._replace(
                command=command.kind,
                idempotency_key=command.idempotency_key,
                fingerprint=command.fingerprint,
                operation_number=operation.number if operation else None,
                amount_minor=command.amount_minor if isinstance(command, Command) else None,
                currency=command.currency or self.payment.currency,
                rejection=rejection,
                replays_due=operation.replays_due if operation else 0,
                traceparent=command.traceparent,
            )
        )

    def publish_dispute(self, dispute: Dispute) -> None:
        """Publish that the payer's bank took money back, or ended the dispute."""
        kind = EventKind.DISPUTE_OPENED if dispute.stage is DisputeStage.OPENED else EventKind.DISPUTE_CLOSED
        self.events.append(
            self._next_event(kind)._replace(
                amount_minor=dispute.amount_minor, reference=dispute.dispute_id, dispute=dispute
            )
        )

    def _next_event(self, kind: EventKind) -> Event:
        """The fields of every event: its place in the payment's order, and the payment as it is now."""
        self.payment.last_seq += 1
        self._derive()
        return Event(
            kind=kind,
            payment_id=self.payment.payment_id,
            payment_seq=self.payment.last_seq,
            occurred_at=self.now,
            command=None,
            idempotency_key=None,
            fingerprint=None,
            snapshot=self.payment.snapshot(),
            currency=self.payment.currency,
        )

    def book(self, kind: OperationKind, amount: int) -> None:
        """Book what an operation of this kind has moved, if it moves money."""
        accounts = BOOKINGS.get(kind)
        if accounts is not None:
            self.transfer(*accounts, amount)

    def transfer(self, debit: Account, credit: Account, amount: int) -> None:
        """Book a transfer under the event that was published last."""
        payment = self.payment
        assert payment.currency is not None, "money moves in a currency"
        self.transfers.append(Transfer(payment.payment_id, payment.last_seq, debit, credit, amount, payment.currency))
