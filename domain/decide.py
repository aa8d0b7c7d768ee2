"""`decide`: what an input does to a payment. Pure: no database, no Kafka, no clock, same input same decision.

Operations of one payment run one at a time, in the order accepted: what arrives meanwhile waits as `received` and is
decided as soon as the operation before it has its outcome.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from operator import attrgetter
from typing import Final, NamedTuple, assert_never
from uuid import UUID

from domain import disputes
from domain.commands import AnyCommand, Command, OperationKind, Rejection, RejectionReason, UnacceptableCommand
from domain.events import Event, EventKind, PaymentStatus, PendingCause, Replay
from domain.ledger import Account, Transfer
from domain.money import Money
from domain.notices import Dispute, DisputeStage, Notice
from domain.operations import (
    IN_DOUBT,
    Declined,
    DeclineReason,
    Expired,
    GatewayRequest,
    NotExecuted,
    Operation,
    OperationState,
    Outcome,
    Pending,
    RequiresAction,
    Succeeded,
    Unknown,
    Unreachable,
)
from domain.payment import Payment
from domain.refusals import amount_of, refusal_of
from domain.rules import Rules

OPENING: Final = (OperationKind.AUTHORIZE, OperationKind.CHARGE)

SUCCESS_EVENTS: Final = {
    OperationKind.AUTHORIZE: EventKind.AUTHORIZED,
    OperationKind.CHARGE: EventKind.CAPTURED,
    OperationKind.CAPTURE: EventKind.CAPTURED,
    OperationKind.VOID: EventKind.VOIDED,
    OperationKind.REFUND: EventKind.REFUNDED,
}

ENDED_WITHOUT_EFFECT: Final = (OperationState.DECLINED, OperationState.NOT_EXECUTED, OperationState.EXPIRED)

BOOKINGS: Final = {
    OperationKind.CHARGE: (Account.GATEWAY_CLEARING, Account.CUSTOMER_SALES),
    OperationKind.CAPTURE: (Account.GATEWAY_CLEARING, Account.CUSTOMER_SALES),
    OperationKind.REFUND: (Account.CUSTOMER_REFUNDS, Account.GATEWAY_CLEARING),
}
"""Debit and credit of what moves money; a hold and its release move none."""


class Delivery(NamedTuple):
    """A command as it came from the topic, and what is stored under its idempotency key, if anything."""

    command: AnyCommand
    stored: Operation | None = None


class Answer(NamedTuple):
    """What came of one gateway call. `lease_token` proves that the caller still held the operation."""

    payment_id: UUID
    operation_number: int
    lease_token: int
    outcome: Outcome


class Notified(NamedTuple):
    """A verified webhook about this payment, and the operation that it names, if any, as it is stored.

    `notice_id` is its place in the inbox: it is applied once, in the transaction that saves what it changed. None is
    for what did not come by itself: the answer to a question about an operation that has ended.
    """

    notice_id: int | None
    payment_id: UUID
    notice: Notice
    operation: Operation | None = None


Input = Delivery | Answer | Notified


class Decision(NamedTuple):
    """What an input does. `operations` are the new and changed ones; `requests` go to the gateway after the commit.

    `is_stale` marks an answer whose lease was taken over: it changes nothing. `disagrees` marks a provider's word that
    contradicts what it said before, and that changes nothing either: a person must look.
    """

    payment: Payment
    events: Sequence[Event | Replay] = ()
    operations: Sequence[Operation] = ()
    requests: Sequence[GatewayRequest] = ()
    transfers: Sequence[Transfer] = ()
    is_stale: bool = False
    disagrees: bool = False


def decide(payment: Payment | None, given: Input, *, now: datetime, rules: Rules) -> Decision:
    """What this input does to this payment: new state, events, operations, gateway requests, ledger transfers.

    A refusal is a decision too: its event is `command_rejected`. An input that was applied before changes nothing,
    except that a repeated command is owed its stored result again.
    """
    draft = _Draft(payment.copy() if payment else Payment(_payment_id(given)), now, rules)
    match given:
        case Delivery():
            if given.stored is None:
                draft.accept(given.command)
            else:
                draft.repeat(given.command, given.stored)
        case Answer():
            draft.settle(given)
        case Notified():
            draft.heed(given)
        case _:
            assert_never(given)
    return draft.decision()


def gateway_request(payment: Payment, operation: Operation, command: Command) -> GatewayRequest:
    """What the gateway is asked to do for `operation`, the same at every attempt but for state, attempts and token."""
    assert payment.currency is not None, "a payment with a dispatched operation has a currency"
    assert operation.amount_minor is not None, "a dispatched operation has an amount"
    return GatewayRequest(
        kind=operation.kind,
        payment_id=payment.payment_id,
        operation_number=operation.number,
        provider_key=operation.provider_key,
        gateway=operation.gateway or "",
        amount=Money(operation.amount_minor, payment.currency),
        gateway_payment_id=None if operation.kind in OPENING else payment.gateway_payment_id,
        reference=operation.reference,
        payment_method=command.payment_method,
        order_id=payment.order_id,
        customer_id=payment.customer_id,
        metadata=command.metadata,
        # What a void does not need is left out of it: the payment may change while one is under way, its request not.
        is_final=operation.kind is not OperationKind.CAPTURE or payment.capturable_minor == 0,
        captured_minor=0 if operation.kind is OperationKind.VOID else payment.captured_minor,
        state=operation.state,
        attempts=operation.attempts,
        lease_token=operation.lease_token,
        first_dispatched_at=operation.dispatched_at,
    )


def _payment_id(given: Input) -> UUID:
    return given.command.payment_id if isinstance(given, Delivery) else given.payment_id


def _with_reference(notice: Notice, operation: Operation) -> Notice:
    """The notice with the reference that the operation has, where the message does not tell one."""
    outcome = notice.outcome
    if isinstance(outcome, Succeeded | Declined | Expired) and not outcome.reference and operation.reference:
        return notice._replace(outcome=replace(outcome, reference=operation.reference))
    return notice


def _may_succeed_late(operation: Operation) -> bool:
    """Whether word of its success can be newer than how it ended.

    A refund that was declined stays so: providers let a refund fail after it succeeded, never the other way round.
    """
    is_refund = operation.kind is OperationKind.REFUND
    return operation.state in ENDED_WITHOUT_EFFECT and not (is_refund and operation.state is OperationState.DECLINED)


@dataclass(slots=True)
class _Draft:
    """A decision in the making."""

    payment: Payment
    now: datetime
    rules: Rules
    events: list[Event | Replay] = field(default_factory=list)
    changed: dict[int, Operation] = field(default_factory=dict)
    requests: list[GatewayRequest] = field(default_factory=list)
    transfers: list[Transfer] = field(default_factory=list)
    is_stale: bool = False
    disagrees: bool = False

    def decision(self) -> Decision:
        self._derive()
        changed = tuple(self.changed.values())
        return Decision(
            self.payment, self.events, changed, self.requests, self.transfers, self.is_stale, self.disagrees
        )

    def _derive(self) -> None:
        payment = self.payment
        payment.status = payment.derived_status()
        payment.has_indeterminate = any(each.state in IN_DOUBT for each in payment.operations)

    # --- commands ---------------------------------------------------------------------------------------------------

    def accept(self, command: AnyCommand) -> None:
        """A command whose key was never seen."""
        if command.idempotency_key is None:
            assert isinstance(command, UnacceptableCommand), "an acceptable command has a key"
            self._publish_rejection(command, command.rejection, None)
            return
        operation = self._receive(command)
        if isinstance(command, UnacceptableCommand):
            self._reject(operation, command, command.rejection)
        elif self._may_begin(command):
            self._begin(operation, command)
        else:
            self._keep(operation)

    def _may_begin(self, command: Command) -> bool:
        """Nothing else is under way; or what is waits for the payer, at rest, and this would cancel it."""
        if self.payment.under_way is None:
            return True
        waiting = self.payment.waiting_for_payer
        if waiting is None or waiting.is_leased or self.payment.is_cancelling():
            return False
        gateway = self.rules.gateways.get(waiting.gateway or "")
        return command.kind is OperationKind.VOID and gateway is not None and gateway.cancel_waiting

    def repeat(self, command: AnyCommand, stored: Operation) -> None:
        """A command whose key was seen: its stored result again, or a conflict if it asks for something else."""
        if stored.fingerprint != command.fingerprint:
            message = "this idempotency key was used for a different command; use a new key for a new command"
            refused = Rejection(RejectionReason.IDEMPOTENCY_CONFLICT, message, ("idempotency_key",))
            self._publish_rejection(command, refused, None)
        elif stored.result is not None:
            self.events.append(Replay(stored.payment_id, stored.result, command.traceparent))
        else:
            operation = stored.copy()
            operation.replays_due += 1
            self._keep(operation)

    def _receive(self, command: AnyCommand) -> Operation:
        self.payment.last_operation += 1
        return Operation(
            payment_id=command.payment_id,
            number=self.payment.last_operation,
            kind=command.kind,
            idempotency_key=command.idempotency_key,
            fingerprint=command.fingerprint,
            content=command.content,
            state=OperationState.RECEIVED,
            traceparent=command.traceparent,
            command=command if isinstance(command, Command) else None,
        )

    def _begin(self, operation: Operation, command: Command) -> None:
        """Decide a command whose turn it is: refuse it, or reserve its amount and hand it to the gateway."""
        refused = refusal_of(command, self.payment, now=self.now, rules=self.rules)
        if refused is not None:
            self._reject(operation, command, refused)
            return
        amount = amount_of(command, self.payment)
        gateway = self.payment.gateway if command.kind not in OPENING else command.gateway or self.rules.default_gateway
        operation = operation.copy()
        operation.state = OperationState.DISPATCHED
        operation.amount_minor = amount
        operation.gateway = gateway
        operation.attempts = 1
        operation.lease_token += 1
        operation.is_leased = True
        operation.due_at = self.now + self.rules.retry.lease
        operation.dispatched_at = self.now
        self._let_rest(self.payment.waiting_for_payer)
        self._reserve(command, amount, gateway)
        self._keep(operation)
        self.requests.append(gateway_request(self.payment, operation, command))

    def _reserve(self, command: Command, amount: int, gateway: str | None) -> None:
        payment = self.payment
        match command.kind:
            case OperationKind.AUTHORIZE | OperationKind.CHARGE:
                payment.order_id = command.order_id
                payment.customer_id = command.customer_id
                payment.gateway = gateway
                payment.currency = command.currency
                payment.amount_minor = amount
            case OperationKind.CAPTURE | OperationKind.VOID:
                payment.reserved_capture_minor = min(amount, payment.capturable_minor)
            case OperationKind.REFUND:
                payment.reserved_refund_minor = amount
            case _:
                assert_never(command.kind)

    def _let_rest(self, waiting: Operation | None) -> None:
        """What waits for the payer is not asked about while it is being cancelled: that could execute it."""
        if waiting is not None:
            waiting = waiting.copy()
            waiting.due_at = None
            self._keep(waiting)

    # --- gateway answers --------------------------------------------------------------------------------------------

    def settle(self, answer: Answer) -> None:
        operation = self._under_way(answer.operation_number)
        if operation is None or operation.lease_token != answer.lease_token:
            self.is_stale = True
            return
        self._settle_outcome(operation, answer.outcome)
        self._begin_waiting()

    def _under_way(self, number: int) -> Operation | None:
        return next((each for each in self.payment.operations if each.number == number and each.is_under_way), None)

    def _settle_outcome(self, operation: Operation, outcome: Outcome) -> None:
        match outcome:
            case Succeeded(amount_minor=moved) if moved is not None and moved != operation.amount_minor:
                self._review(operation, outcome.reference)
            case Succeeded() if operation.kind is OperationKind.VOID and not self.payment.authorized_minor:
                self._cancel_unpaid(operation, outcome)
            case Succeeded() if not self._fits(operation):
                self._review(operation, outcome.reference)
            case Succeeded():
                self._succeed(operation, outcome)
            case Declined():
                self._decline(operation, outcome)
            case Expired():
                self._expire(operation, outcome)
            case NotExecuted(message):
                self._fail(operation, Rejection(RejectionReason.GATEWAY_REFUSED, message))
            case RequiresAction(reference):
                self._wait_for_action(operation, outcome, reference)
            case Pending(reference):
                self._wait_for_provider(operation, reference)
            case Unreachable(message) if operation.state is OperationState.DISPATCHED:
                self._retry_or_give_up(operation, message)
            case Unreachable() | Unknown():
                self._doubt(operation)
            case _:
                assert_never(outcome)

    def _fits(self, operation: Operation) -> bool:
        """Whether the amounts have room for its effect; they always have, unless the provider's word contradicts them.

        Its own reservation, if it has one, is part of the room.
        """
        amount, payment = operation.amount_minor or 0, self.payment
        match operation.kind:
            case OperationKind.CAPTURE | OperationKind.VOID:
                return amount <= payment.capturable_minor + payment.reserved_capture_minor
            case OperationKind.REFUND:
                return amount <= payment.captured_minor - payment.refunded_minor
            case _:
                return True

    def _cancel_unpaid(self, void: Operation, outcome: Succeeded) -> None:
        """The provider will not execute what waited for the payer, if no webhook has ended that one already."""
        waiting = self.payment.waiting_for_payer
        if waiting is not None:
            self._decline(waiting, Declined(DeclineReason.CANCELED, None, waiting.reference))
        self._finish(void, OperationState.SUCCEEDED, outcome.reference)
        self.payment.status = PaymentStatus.CANCELED
        self._publish(EventKind.VOIDED, void, reference=outcome.reference)

    def _succeed(self, operation: Operation, outcome: Succeeded) -> None:
        amount = operation.amount_minor
        assert amount is not None, "a dispatched operation has an amount"
        self._release_reservation(operation.kind)
        self._move(operation.kind, amount, outcome)
        self._finish(operation, OperationState.SUCCEEDED, outcome.reference)
        self._publish(SUCCESS_EVENTS[operation.kind], operation, reference=outcome.reference)
        self._book(operation.kind, amount)

    def _move(self, kind: OperationKind, amount: int, outcome: Succeeded) -> None:
        payment = self.payment
        match kind:
            case OperationKind.AUTHORIZE | OperationKind.CHARGE:
                payment.authorized_minor = amount
                payment.captured_minor = amount if kind is OperationKind.CHARGE else 0
                payment.gateway_payment_id = outcome.reference
                payment.authorization_expires_at = outcome.expires_at
            case OperationKind.CAPTURE:
                payment.captured_minor += amount
                if not self.rules.gateways[payment.gateway or ""].multi_capture:
                    payment.released_minor += payment.capturable_minor
            case OperationKind.VOID:
                payment.released_minor += amount
            case OperationKind.REFUND:
                payment.refunded_minor += amount
            case _:
                assert_never(kind)

    def _book(self, kind: OperationKind, amount: int) -> None:
        accounts = BOOKINGS.get(kind)
        if accounts is not None:
            self._transfer(*accounts, amount)

    def _transfer(self, debit: Account, credit: Account, amount: int) -> None:
        """Book a transfer of the event that was published last."""
        payment = self.payment
        assert payment.currency is not None, "money moves in a currency"
        self.transfers.append(Transfer(payment.payment_id, payment.last_seq, debit, credit, amount, payment.currency))

    def _decline(self, operation: Operation, outcome: Declined) -> None:
        self._release_reservation(operation.kind)
        self._finish(operation, OperationState.DECLINED, outcome.reference)
        self._publish(
            EventKind.DECLINED,
            operation,
            reference=outcome.reference,
            decline_reason=outcome.reason,
            decline_code=outcome.code,
        )

    def _expire(self, operation: Operation, outcome: Expired) -> None:
        if self.payment.is_cancelling():
            # Our own void's doing, told before the void's answer.
            self._decline(operation, Declined(DeclineReason.CANCELED, outcome.code, outcome.reference))
            return
        self._release_reservation(operation.kind)
        self._finish(operation, OperationState.EXPIRED, outcome.reference)
        self.payment.status = PaymentStatus.EXPIRED
        self._publish(EventKind.EXPIRED, operation, reference=outcome.reference)

    def _fail(self, operation: Operation, rejection: Rejection) -> None:
        """End an operation that is proven not to have been executed."""
        self._release_reservation(operation.kind)
        self._ask_again(self.payment.waiting_for_payer)
        self._finish(operation, OperationState.NOT_EXECUTED, operation.reference)
        self._publish(EventKind.COMMAND_REJECTED, operation, rejection=rejection)

    def _ask_again(self, waiting: Operation | None) -> None:
        """What could not be cancelled is looked after again."""
        if waiting is not None and waiting.due_at is None:
            waiting = waiting.copy()
            waiting.due_at = self.now
            self._keep(waiting)

    def _wait_for_action(self, operation: Operation, outcome: RequiresAction, reference: str) -> None:
        if self._is_overdue(operation):
            self._review(operation, reference)
            return
        is_new = operation.state is not OperationState.REQUIRES_ACTION
        self._postpone(operation, OperationState.REQUIRES_ACTION, reference)
        if is_new:
            self._publish(EventKind.REQUIRES_ACTION, operation, reference=reference, action=outcome)

    def _wait_for_provider(self, operation: Operation, reference: str | None) -> None:
        if self._is_overdue(operation):
            self._review(operation, reference)
            return
        is_new = operation.state is not OperationState.PENDING
        self._postpone(operation, OperationState.PENDING, reference)
        if is_new:
            self._publish(
                EventKind.PENDING, operation, reference=reference, pending_cause=PendingCause.PROVIDER_PENDING
            )

    def _is_overdue(self, operation: Operation) -> bool:
        assert operation.dispatched_at is not None, "a dispatched operation has a time"
        return self.now - operation.dispatched_at > self.rules.retry.review_pending_after

    def _retry_or_give_up(self, operation: Operation, message: str) -> None:
        """No attempt of this operation was executed, so here time may end it: nothing moved, and that is proven."""
        assert operation.dispatched_at is not None, "a dispatched operation has a time"
        if self.now - operation.dispatched_at > self.rules.retry.give_up_after:
            self._fail(operation, Rejection(RejectionReason.GATEWAY_UNAVAILABLE, message or "the gateway was away"))
        else:
            self._postpone(operation, OperationState.DISPATCHED, operation.reference)

    def _doubt(self, operation: Operation) -> None:
        """No evidence. Look again later; past the deadline a person should look, too, but nothing is concluded."""
        if operation.state in (OperationState.PENDING, OperationState.REQUIRES_ACTION):
            self._postpone(operation, operation.state, operation.reference)
            return
        assert operation.dispatched_at is not None, "a dispatched operation has a time"
        is_late = self.now - operation.dispatched_at > self.rules.retry.review_after
        if is_late or operation.state is OperationState.NEEDS_REVIEW:
            self._review(operation, operation.reference)
            return
        # A sweep that took it over has put it in doubt without a word; then nobody has been told yet.
        is_new = operation.state is not OperationState.INDETERMINATE or not self.payment.has_indeterminate
        self._postpone(operation, OperationState.INDETERMINATE, operation.reference)
        if is_new:
            self._publish(EventKind.PENDING, operation, pending_cause=PendingCause.OUTCOME_UNKNOWN)

    def _review(self, operation: Operation, reference: str | None) -> None:
        is_new = operation.state is not OperationState.NEEDS_REVIEW
        self._postpone(operation, OperationState.NEEDS_REVIEW, reference)
        if is_new:
            self._publish(EventKind.NEEDS_REVIEW, operation, reference=reference)

    def _begin_waiting(self) -> None:
        """Decide what waited, until one of it is under way."""
        for operation in self.payment.operations:
            if operation.state is OperationState.RECEIVED:
                assert operation.command is not None, "a waiting operation is loaded with its command"
                if self._may_begin(operation.command):
                    self._begin(operation, operation.command)

    # --- webhooks ---------------------------------------------------------------------------------------------------

    def heed(self, given: Notified) -> None:
        """A provider's word that nobody asked for. Heard twice or late, it changes nothing the second time."""
        notice = given.notice
        if notice.dispute is not None:
            self._dispute(notice.dispute)
        if given.operation is None:
            return
        current = self._under_way(given.operation.number)
        notice = _with_reference(notice, current or given.operation)
        if current is None:
            self._heed_late(given.operation, notice, was_asked=given.notice_id is None)
        elif notice.is_ripe:
            self._dispatch_again(current)
        elif isinstance(notice.outcome, Succeeded) and self._is_foreign(notice.currency):
            self._review(current, notice.outcome.reference)
        elif isinstance(notice.outcome, Succeeded | Declined | Expired):
            # What is not final adds nothing: whoever holds the operation, or asks about it next, hears it, too.
            self._settle_outcome(current, notice.outcome)
            self._begin_waiting()

    def _is_foreign(self, currency: str | None) -> bool:
        return currency is not None and currency != self.payment.currency

    def _dispatch_again(self, operation: Operation) -> None:
        """The payer consented: go on at once, unless somebody is at it or it is being cancelled."""
        if operation.is_leased or operation.due_at is None or operation.command is None:
            return
        operation = operation.copy()
        operation.attempts += 1
        operation.is_leased = True  # by the token that it has: nobody holds it, and a claim meanwhile raises it
        operation.due_at = self.now + self.rules.retry.lease
        self._keep(operation)
        assert operation.command is not None, "as checked"
        self.requests.append(gateway_request(self.payment, operation, operation.command))

    def _heed_late(self, operation: Operation, notice: Notice, *, was_asked: bool) -> None:
        """Word about an operation that has ended. Only in answer to a question is it surely the latest word."""
        match notice.outcome:
            case Succeeded(amount_minor=moved) as outcome:
                is_ours = moved in (None, operation.amount_minor) and not self._is_foreign(notice.currency)
                if is_ours and _may_succeed_late(operation) and self._fits(operation):
                    self._succeed_late(operation, outcome)
                else:
                    self.disagrees = not is_ours
            case Declined() if operation.kind is OperationKind.REFUND and operation.state is OperationState.SUCCEEDED:
                self._reverse_refund(operation)
            case Expired() if self._is_open_hold(operation):
                self._release_hold(operation)
            case Declined(reason=DeclineReason.CANCELED) if was_asked and self._is_open_hold(operation):
                self._release_hold(operation)
            case _:
                pass  # Old news: it was true before what ended the operation.

    def _succeed_late(self, operation: Operation, outcome: Succeeded) -> None:
        """What was called declined or expired was paid: it counts, and whoever was told otherwise is told again."""
        amount, payment = operation.amount_minor or 0, self.payment
        told_before, has_money = operation.state, payment.authorized_minor > 0
        is_gone = told_before is OperationState.EXPIRED or payment.status is PaymentStatus.CANCELED
        if operation.kind not in OPENING or not has_money:
            self._move(operation.kind, amount, outcome)
        else:
            payment.authorized_minor += amount
            payment.captured_minor += amount if operation.kind is OperationKind.CHARGE else 0
        self._finish(operation, OperationState.SUCCEEDED, outcome.reference)
        owed = amount if operation.kind in OPENING and has_money else 0
        self._publish(
            EventKind.LATE_SUCCESS, operation, reference=outcome.reference, told_before=told_before, owed_minor=owed
        )
        self._book(operation.kind, amount)
        if operation.kind is OperationKind.AUTHORIZE and is_gone:
            # The news of the hold came after the news of its end.
            self._release_hold(operation)

    def _reverse_refund(self, operation: Operation) -> None:
        """A refund that the provider had called done came back: the money is ours again, and still owed."""
        amount = operation.amount_minor or 0
        self.payment.refunded_minor -= amount
        self._finish(operation, OperationState.DECLINED, operation.reference)
        self._publish(EventKind.REFUND_FAILED, operation, reference=operation.reference)
        self._transfer(Account.GATEWAY_CLEARING, Account.CUSTOMER_REFUNDS, amount)

    def _is_open_hold(self, operation: Operation) -> bool:
        """Whether it is an authorization that still holds money, with none of our own operations at work on it."""
        is_hold = operation.kind is OperationKind.AUTHORIZE and operation.state is OperationState.SUCCEEDED
        return is_hold and self.payment.capturable_minor > 0 and self.payment.under_way is None

    def _release_hold(self, operation: Operation) -> None:
        self.payment.released_minor += self.payment.capturable_minor
        self._publish(EventKind.AUTHORIZATION_EXPIRED, operation, reference=operation.reference)

    def _dispute(self, dispute: Dispute) -> None:
        """Book what the payer's bank took back, or gave back; each stage of a dispute counts once, in any order."""
        kept = self.payment.disputes
        if self._is_foreign(dispute.currency):
            self.disagrees = True
        elif disputes.is_news(kept, dispute):
            before = disputes.disputed(kept, dispute.dispute_id)
            after = 0 if dispute.stage is DisputeStage.WON else before or dispute.amount_minor
            self.payment.disputed_minor += after - before
            self.payment.disputes = disputes.remember(kept, dispute.dispute_id, dispute.stage, after)
            self._publish_dispute(dispute)
            if after > before:
                self._transfer(Account.CUSTOMER_DISPUTES, Account.GATEWAY_CLEARING, after - before)
            elif before > after:
                self._transfer(Account.GATEWAY_CLEARING, Account.CUSTOMER_DISPUTES, before - after)

    # --- shared steps -----------------------------------------------------------------------------------------------

    def _release_reservation(self, kind: OperationKind) -> None:
        if kind in (OperationKind.CAPTURE, OperationKind.VOID):
            self.payment.reserved_capture_minor = 0
        elif kind is OperationKind.REFUND:
            self.payment.reserved_refund_minor = 0

    def _postpone(self, operation: Operation, state: OperationState, reference: str | None) -> None:
        """Keep it under way, released by its worker, to be looked at again."""
        if reference is not None and operation.kind in OPENING:
            self.payment.gateway_payment_id = reference
        operation = operation.copy()
        operation.state = state
        operation.reference = reference
        operation.is_leased = False
        operation.due_at = self.now + self._delay_in(state, operation)
        self._keep(operation)

    def _delay_in(self, state: OperationState, operation: Operation) -> timedelta:
        retry = self.rules.retry
        match state:
            case OperationState.NEEDS_REVIEW:
                return retry.review_poll_interval
            case OperationState.PENDING | OperationState.REQUIRES_ACTION:
                return min(retry.poll_interval, retry.delay(operation.attempts, operation.payment_id))
            case _:
                return retry.delay(operation.attempts, operation.payment_id)

    def _reject(self, operation: Operation, command: AnyCommand, rejection: Rejection) -> None:
        operation = operation.copy()
        operation.state = OperationState.REJECTED
        self._keep(operation)
        self._publish_rejection(command, rejection, operation)

    def _finish(self, operation: Operation, state: OperationState, reference: str | None) -> None:
        operation = operation.copy()
        operation.state = state
        operation.reference = reference or operation.reference
        operation.is_leased = False
        operation.due_at = None
        self._keep(operation)

    def _keep(self, operation: Operation) -> None:
        """Record a new or changed operation, and whether its payment still waits for it."""
        self.changed[operation.number] = operation
        kept = [each for each in self.payment.operations if each.number != operation.number]
        if operation.is_open:
            kept.append(operation)
            kept.sort(key=attrgetter("number"))
        self.payment.operations = tuple(kept)

    def _publish(
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
    ) -> None:
        self.payment.last_seq += 1
        self._derive()
        self.events.append(
            Event(
                kind=kind,
                payment_id=self.payment.payment_id,
                payment_seq=self.payment.last_seq,
                occurred_at=self.now,
                command=operation.kind,
                idempotency_key=operation.idempotency_key,
                fingerprint=operation.fingerprint,
                snapshot=self.payment.snapshot(),
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
                replays_due=operation.replays_due,
                traceparent=operation.traceparent,
            )
        )

    def _publish_dispute(self, dispute: Dispute) -> None:
        self.payment.last_seq += 1
        self._derive()
        kind = EventKind.DISPUTE_OPENED if dispute.stage is DisputeStage.OPENED else EventKind.DISPUTE_CLOSED
        self.events.append(
            Event(
                kind=kind,
                payment_id=self.payment.payment_id,
                payment_seq=self.payment.last_seq,
                occurred_at=self.now,
                command=None,
                idempotency_key=None,
                fingerprint=None,
                snapshot=self.payment.snapshot(),
                amount_minor=dispute.amount_minor,
                reference=dispute.dispute_id,
                dispute=dispute,
            )
        )

    def _publish_rejection(self, command: AnyCommand, rejection: Rejection, operation: Operation | None) -> None:
        self.payment.last_seq += 1
        self._derive()
        self.events.append(
            Event(
                kind=EventKind.COMMAND_REJECTED,
                payment_id=self.payment.payment_id,
                payment_seq=self.payment.last_seq,
                occurred_at=self.now,
                command=command.kind,
                idempotency_key=command.idempotency_key,
                fingerprint=command.fingerprint,
                snapshot=self.payment.snapshot(),
                operation_number=operation.number if operation else None,
                amount_minor=command.amount_minor if isinstance(command, Command) else None,
                rejection=rejection,
                replays_due=operation.replays_due if operation else 0,
                traceparent=command.traceparent,
            )
        )
