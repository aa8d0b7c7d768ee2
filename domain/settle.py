"""What a gateway's answer does to a payment. Only evidence ends an operation; the passing of time does not.

One exception: an operation proven never to have been executed may be given up after a deadline (`_retry_or_give_up`).
"""

from typing import Final, assert_never

from domain.accept import begin_waiting
from domain.amounts import fits, move
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
from domain.requests import OPENING
from domain.voids import cancels_unpaid, end_void_of_nothing, leave_to_void, of_nothing

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
    """Apply a gateway's answer to the operation it is about, then begin what waited for that.

    A stale answer (the operation has ended, or another worker has taken it over since) changes nothing, unless it says
    that money moved.
    """
    operation = draft.under_way(answer.operation_number)
    if operation is None or not _counts(operation, answer):
        draft.is_stale = True
        return
    settle_outcome(draft, operation, answer.outcome)
    begin_waiting(draft)


def _counts(operation: Operation, answer: Answer) -> bool:
    """Whether the answer may be applied: its caller still holds the lease, or it says that money moved.

    Anything else may be outdated, since the new holder may have had the operation executed. A void's success says only
    that what it was sent to cancel then is cancelled.
    """
    if operation.lease_token == answer.lease_token:
        return True
    return isinstance(answer.outcome, Succeeded) and operation.kind is not OperationKind.VOID


def settle_outcome(draft: Draft, operation: Operation, outcome: Outcome) -> None:
    """End the operation, or keep it under way, as the provider's word on it demands.

    A success that contradicts our books (another amount, no room for it) is left for a person to review.
    """
    match outcome:
        case Succeeded() | Expired() if _is_no_answer(operation, outcome):
            review(draft, operation, outcome.reference)
        case Succeeded() if operation.kind is OperationKind.VOID and cancels_unpaid(draft):
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
    """Whether it says neither yes nor no to what was asked.

    Either another amount was moved, or the payer's window is said to have closed for an operation that has no payer to
    wait for.
    """
    if isinstance(outcome, Expired):
        return operation.kind not in OPENING
    return outcome.amount_minor not in (None, operation.amount_minor)


def _cancel_unpaid(draft: Draft, void: Operation, outcome: Succeeded) -> None:
    """The provider will not execute the opening that waited, unless a webhook has ended that one already."""
    waiting = draft.payment.waiting_for_payer
    if waiting is not None:
        _decline(draft, waiting, Declined(DeclineReason.CANCELED, None, waiting.reference))
    draft.finish(of_nothing(void), OperationState.SUCCEEDED, outcome.reference)
    draft.payment.status = PaymentStatus.CANCELED
    draft.publish(EventKind.VOIDED, void, reference=outcome.reference)


def _succeed(draft: Draft, operation: Operation, outcome: Succeeded) -> None:
    amount = operation.amount_minor
    assert amount is not None, "a dispatched operation has an amount"
    if operation.kind is OperationKind.VOID and draft.payment.void_releases_secondary:
        draft.payment.owed_held_minor -= amount
    draft.release_reservation(operation.kind)
    owed = move(draft, operation, outcome)
    if draft.payment.is_cancelling:
        leave_to_void(draft, operation, outcome.reference, owed)
    draft.finish(operation, OperationState.SUCCEEDED, outcome.reference)
    draft.publish(
        SUCCESS_EVENTS[operation.kind],
        operation,
        reference=outcome.reference,
        owed_minor=owed,
        expires_at=outcome.expires_at,
    )
    draft.book(operation.kind, amount)


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
    if draft.payment.is_cancelling:
        # Our own void caused it, and this was reported before the void's answer.
        _decline(draft, operation, Declined(DeclineReason.CANCELED, outcome.code, outcome.reference))
        return
    draft.finish(operation, OperationState.EXPIRED, outcome.reference)
    draft.payment.status = PaymentStatus.EXPIRED
    draft.publish(EventKind.EXPIRED, operation, reference=outcome.reference)


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
    """Have the opening that could not be cancelled asked about again."""
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
    """Here time may end the operation, since it is proven that no attempt of it was executed."""
    assert operation.dispatched_at is not None, "a dispatched operation has a time"
    if draft.now - operation.dispatched_at > draft.rules.retry.give_up_after:
        _fail(draft, operation, Rejection(RejectionReason.GATEWAY_UNAVAILABLE, message or "the gateway was away"))
    else:
        draft.postpone(operation, OperationState.DISPATCHED, operation.reference)


def _doubt(draft: Draft, operation: Operation) -> None:
    """Ask again later, for lack of evidence. Past the deadline a person should look as well; nothing is concluded."""
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
    # A sweep that took it over has marked it as in doubt without an event.
    is_new = operation.state is not OperationState.INDETERMINATE or not draft.payment.has_indeterminate
    draft.postpone(operation, OperationState.INDETERMINATE, operation.reference)
    if is_new:
        draft.publish(EventKind.PENDING, operation, pending_cause=PendingCause.OUTCOME_UNKNOWN)


def review(draft: Draft, operation: Operation, reference: str | None) -> None:
    """Leave the operation for a person to look at; it is still asked about, and evidence still ends it."""
    is_new = operation.state is not OperationState.NEEDS_REVIEW
    draft.postpone(operation, OperationState.NEEDS_REVIEW, reference)
    if is_new:
        draft.publish(EventKind.NEEDS_REVIEW, operation, reference=reference)
