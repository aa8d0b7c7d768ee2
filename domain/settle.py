"""What a gateway's answer does to a payment. Only evidence ends an operation; without any, time ends nothing.

The exception proves the rule: what was never executed, on proof, may be given up (`_retry_or_give_up`).
"""

from dataclasses import replace
from datetime import datetime
from typing import Final, assert_never

from domain.accept import begin_waiting
from domain.commands import OperationKind, Rejection, RejectionReason
from domain.decision import Answer
from domain.draft import Draft
from domain.events import EventKind, PaymentStatus, PendingCause
from domain.operations import (
    Declined,
    DeclineReason,
    Expired,
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
from domain.requests import OPENING

SUCCESS_EVENTS: Final = {
    OperationKind.AUTHORIZE: EventKind.AUTHORIZED,
    OperationKind.CHARGE: EventKind.CAPTURED,
    OperationKind.CAPTURE: EventKind.CAPTURED,
    OperationKind.VOID: EventKind.VOIDED,
    OperationKind.REFUND: EventKind.REFUNDED,
}
ENDINGS: Final = {
    kind: (
        success,
        EventKind.DECLINED,
        *((EventKind.EXPIRED,) if kind in OPENING else ()),
        EventKind.COMMAND_REJECTED,
    )
    for kind, success in SUCCESS_EVENTS.items()
}
"""The events that may end a command of each kind, of which it gets exactly one."""


def settle(draft: Draft, answer: Answer) -> None:
    operation = draft.under_way(answer.operation_number)
    if operation is None or not _counts(operation, answer):
        draft.is_stale = True
        return
    settle_outcome(draft, operation, answer.outcome)
    begin_waiting(draft)


def _counts(operation: Operation, answer: Answer) -> bool:
    """Whether it may be applied: its caller still holds the lease, or it says that money moved.

    Anything else may be outdated: the new holder may have had it executed since. A void's success is of what there was
    to cancel then.
    """
    if operation.lease_token == answer.lease_token:
        return True
    return isinstance(answer.outcome, Succeeded) and operation.kind is not OperationKind.VOID


def settle_outcome(draft: Draft, operation: Operation, outcome: Outcome) -> None:
    match outcome:
        case Succeeded() | Expired() if _is_no_answer(operation, outcome):
            review(draft, operation, outcome.reference)
        case Succeeded() if operation.kind is OperationKind.VOID and _cancels_unpaid(draft):
            _cancel_unpaid(draft, operation, outcome)
        case Succeeded() if not fits(draft, operation):
            review(draft, operation, outcome.reference)
        case Succeeded():
            _succeed(draft, operation, outcome)
        case Declined():
            _decline(draft, operation, outcome)
            end_void_of_nothing(draft)
        case Expired():
            _expire(draft, operation, outcome)
            end_void_of_nothing(draft)
        case NotExecuted():
            _fail(draft, operation, _rejection_of(outcome))
        case RequiresAction(reference):
            _wait_for_action(draft, operation, outcome, reference)
        case Pending(reference):
            _wait_for_provider(draft, operation, reference)
        case Unreachable(message) if operation.state is OperationState.DISPATCHED:
            _retry_or_give_up(draft, operation, message)
        case Unreachable() | Unknown():
            _doubt(draft, operation)
        case _:
            assert_never(outcome)


def _is_no_answer(operation: Operation, outcome: Succeeded | Expired) -> bool:
    """Whether it says neither yes nor no to what was asked: another amount was moved, or a window of the payer's has
    closed, of what no payer is waited for."""
    if isinstance(outcome, Expired):
        return operation.kind not in OPENING
    return outcome.amount_minor not in (None, operation.amount_minor)


def fits(draft: Draft, operation: Operation) -> bool:
    """Whether the amounts have room for its effect; they always have, unless the provider's word contradicts them.

    Its own reservation, if it has one, is part of the room.
    """
    amount, payment = operation.amount_minor or 0, draft.payment
    match operation.kind:
        case OperationKind.VOID if operation.is_under_way and releases_another(payment):
            return amount <= payment.owed_held_minor
        case OperationKind.CAPTURE | OperationKind.VOID:
            return amount <= payment.capturable_minor + payment.reserved_capture_minor
        case OperationKind.REFUND:
            return amount <= payment.own_kept_minor
        case _:
            return True


def _cancels_unpaid(draft: Draft) -> bool:
    """Whether a void is of what waits for the payer, or waited; what another attempt holds is not touched by it."""
    return draft.payment.is_cancelling() or not draft.payment.has_money


def releases_another(payment: Payment) -> bool:
    """Whether the void that is under way is of an attempt that waited and was paid meanwhile, beside the first one."""
    return not payment.reserved_capture_minor


def _cancel_unpaid(draft: Draft, void: Operation, outcome: Succeeded) -> None:
    """The provider will not execute what waited for the payer, if no webhook has ended that one already."""
    waiting = draft.payment.waiting_for_payer
    if waiting is not None:
        _decline(draft, waiting, Declined(DeclineReason.CANCELED, None, waiting.reference))
    draft.finish(_of_nothing(void), OperationState.SUCCEEDED, outcome.reference)
    draft.payment.status = PaymentStatus.CANCELED
    draft.publish(EventKind.VOIDED, void, reference=outcome.reference)


def _of_nothing(void: Operation) -> Operation:
    """The void as one that has released nothing: should its attempt be paid after all, that is held."""
    return replace(void, amount_minor=0)


def _succeed(draft: Draft, operation: Operation, outcome: Succeeded) -> None:
    amount = operation.amount_minor
    assert amount is not None, "a dispatched operation has an amount"
    if operation.kind is OperationKind.VOID and releases_another(draft.payment):
        draft.payment.owed_held_minor -= amount
    draft.release_reservation(operation.kind)
    owed = move(draft, operation, outcome)
    if draft.payment.is_cancelling():
        leave_to_void(draft, operation, outcome.reference, owed)
    draft.finish(operation, OperationState.SUCCEEDED, outcome.reference)
    draft.publish(SUCCESS_EVENTS[operation.kind], operation, reference=outcome.reference, owed_minor=owed)
    draft.book(operation.kind, amount)


def leave_to_void(draft: Draft, hold: Operation, reference: str, owed_minor: int) -> None:
    """A hold came about while it was being cancelled: the void that is under way releases it, at every attempt."""
    if hold.kind is not OperationKind.AUTHORIZE:
        return
    if not owed_minor:
        draft.payment.reserved_capture_minor = hold.amount_minor or 0
        return
    for each in draft.payment.operations:
        if each.kind is OperationKind.VOID and each.is_under_way:
            void = each.copy()
            void.reference = reference
            draft.keep(void)


def move(draft: Draft, operation: Operation, outcome: Succeeded) -> int:
    """Count what it moved; how much of that is owed to the payer, since another attempt was paid, too."""
    payment, amount = draft.payment, operation.amount_minor or 0
    match operation.kind:
        case OperationKind.AUTHORIZE | OperationKind.CHARGE:
            return _open(draft, operation, outcome)
        case OperationKind.CAPTURE:
            payment.captured_minor += amount
            gateway = draft.rules.gateways.get(payment.gateway or "")
            # Of one that is not here any more nothing is said to be released.
            if gateway is not None and not gateway.multi_capture:
                payment.released_minor += payment.capturable_minor
        case OperationKind.VOID:
            payment.released_minor += amount
        case OperationKind.REFUND:
            payment.refunded_minor += amount
        case _:
            assert_never(operation.kind)
    return 0


def _open(draft: Draft, operation: Operation, outcome: Succeeded) -> int:
    """The first attempt that has money is the one that captures, voids and refunds refer to."""
    payment, amount, is_first = draft.payment, operation.amount_minor or 0, not draft.payment.has_money
    is_charge = operation.kind is OperationKind.CHARGE
    if not is_charge:
        payment.authorization_expires_at = _end_of_holds(draft, outcome)
    payment.authorized_minor += amount
    payment.captured_minor += amount if is_charge else 0
    if not is_first:
        payment.owed_captured_minor += amount if is_charge else 0
        payment.owed_held_minor += 0 if is_charge else amount
        return amount
    payment.gateway = operation.gateway
    payment.gateway_payment_id = outcome.reference
    return 0


def _end_of_holds(draft: Draft, outcome: Succeeded) -> datetime:
    """From when the payment's holds are asked about, with this new one: the earliest end of those that are open."""
    end = outcome.expires_at or draft.now + draft.rules.retry.hold_end_unknown_after
    payment = draft.payment
    is_held = payment.authorized_minor > payment.captured_minor + payment.released_minor
    others = payment.authorization_expires_at if is_held else None
    return end if others is None else min(end, others)


def _decline(draft: Draft, operation: Operation, outcome: Declined) -> None:
    draft.release_reservation(operation.kind)
    if operation.kind is OperationKind.VOID:
        _ask_again(draft, draft.payment.waiting_for_payer)
    draft.finish(operation, OperationState.DECLINED, outcome.reference)
    draft.publish(
        EventKind.DECLINED,
        operation,
        reference=outcome.reference,
        decline_reason=outcome.reason,
        decline_code=outcome.code,
    )


def _expire(draft: Draft, operation: Operation, outcome: Expired) -> None:
    if draft.payment.is_cancelling():
        # Our own void's doing, told before the void's answer.
        _decline(draft, operation, Declined(DeclineReason.CANCELED, outcome.code, outcome.reference))
        return
    draft.finish(operation, OperationState.EXPIRED, outcome.reference)
    draft.payment.status = PaymentStatus.EXPIRED
    draft.publish(EventKind.EXPIRED, operation, reference=outcome.reference)


def end_void_of_nothing(draft: Draft) -> None:
    """What a void was to cancel has ended without it, and another attempt is paid: with that the void ends, too.

    Where no other is paid it is sent on until its provider answers.
    """
    void, payment = draft.payment.under_way, draft.payment
    if void is None or void.kind is not OperationKind.VOID or payment.reserved_capture_minor or not payment.has_money:
        return
    draft.finish(_of_nothing(void), OperationState.SUCCEEDED, void.reference)
    draft.publish(EventKind.VOIDED, void, reference=void.reference)


def _rejection_of(outcome: NotExecuted) -> Rejection:
    if outcome.has_expired:
        return Rejection(RejectionReason.COMMAND_EXPIRED, outcome.message, ("expires_at",))
    return Rejection(RejectionReason.GATEWAY_REFUSED, outcome.message)


def _fail(draft: Draft, operation: Operation, rejection: Rejection) -> None:
    """End an operation that is proven not to have been executed."""
    draft.release_reservation(operation.kind)
    _ask_again(draft, draft.payment.waiting_for_payer)
    draft.finish(operation, OperationState.NOT_EXECUTED, operation.reference)
    draft.publish(EventKind.COMMAND_REJECTED, operation, rejection=rejection)


def _ask_again(draft: Draft, waiting: Operation | None) -> None:
    """What could not be cancelled is looked after again."""
    if waiting is not None and waiting.due_at is None:
        waiting = waiting.copy()
        waiting.due_at = draft.now
        draft.keep(waiting)


def _wait_for_action(draft: Draft, operation: Operation, outcome: RequiresAction, reference: str) -> None:
    if _is_overdue(draft, operation):
        review(draft, operation, reference)
        return
    is_new = operation.state is not OperationState.REQUIRES_ACTION
    draft.postpone(operation, OperationState.REQUIRES_ACTION, reference)
    if is_new:
        draft.publish(EventKind.REQUIRES_ACTION, operation, reference=reference, action=outcome)


def _wait_for_provider(draft: Draft, operation: Operation, reference: str | None) -> None:
    if _is_overdue(draft, operation):
        review(draft, operation, reference)
        return
    is_new = operation.state is not OperationState.PENDING
    draft.postpone(operation, OperationState.PENDING, reference)
    if is_new:
        draft.publish(EventKind.PENDING, operation, reference=reference, pending_cause=PendingCause.PROVIDER_PENDING)


def _is_overdue(draft: Draft, operation: Operation) -> bool:
    assert operation.dispatched_at is not None, "a dispatched operation has a time"
    return draft.now - operation.dispatched_at > draft.rules.retry.review_pending_after


def _retry_or_give_up(draft: Draft, operation: Operation, message: str) -> None:
    """No attempt of this operation was executed, so here time may end it: nothing moved, and that is proven."""
    assert operation.dispatched_at is not None, "a dispatched operation has a time"
    if draft.now - operation.dispatched_at > draft.rules.retry.give_up_after:
        _fail(draft, operation, Rejection(RejectionReason.GATEWAY_UNAVAILABLE, message or "the gateway was away"))
    else:
        draft.postpone(operation, OperationState.DISPATCHED, operation.reference)


def _doubt(draft: Draft, operation: Operation) -> None:
    """No evidence. Look again later; past the deadline a person should look, too, but nothing is concluded."""
    if operation.state in (OperationState.PENDING, OperationState.REQUIRES_ACTION):
        if _is_overdue(draft, operation):
            review(draft, operation, operation.reference)
        else:
            draft.postpone(operation, operation.state, operation.reference)
        return
    assert operation.dispatched_at is not None, "a dispatched operation has a time"
    is_late = draft.now - operation.dispatched_at > draft.rules.retry.review_after
    if is_late or operation.state is OperationState.NEEDS_REVIEW:
        review(draft, operation, operation.reference)
        return
    # A sweep that took it over has put it in doubt without a word; then nobody has been told yet.
    is_new = operation.state is not OperationState.INDETERMINATE or not draft.payment.has_indeterminate
    draft.postpone(operation, OperationState.INDETERMINATE, operation.reference)
    if is_new:
        draft.publish(EventKind.PENDING, operation, pending_cause=PendingCause.OUTCOME_UNKNOWN)


def review(draft: Draft, operation: Operation, reference: str | None) -> None:
    is_new = operation.state is not OperationState.NEEDS_REVIEW
    draft.postpone(operation, OperationState.NEEDS_REVIEW, reference)
    if is_new:
        draft.publish(EventKind.NEEDS_REVIEW, operation, reference=reference)
