"""What a webhook does to a payment: a provider's word that nobody asked for, at any time and any number of times."""

from dataclasses import replace
from typing import Final

from domain import disputes, external
from domain.accept import begin_waiting
from domain.commands import OperationKind
from domain.decision import Notified
from domain.draft import Draft
from domain.events import EventKind, PaymentStatus
from domain.ledger import Account
from domain.notices import OWN_ANSWER, Dispute, DisputeStage, Notice
from domain.operations import Declined, DeclineReason, Expired, Operation, OperationState, Outcome, Succeeded
from domain.payment import Payment
from domain.requests import OPENING, gateway_request
from domain.settle import end_void_of_nothing, fits, leave_to_void, move, review, settle_outcome

ENDED_WITHOUT_EFFECT: Final = (OperationState.DECLINED, OperationState.NOT_EXECUTED, OperationState.EXPIRED)


def apply_notice(draft: Draft, given: Notified) -> None:
    """A provider's word that nobody asked for. Heard twice or late, it changes nothing the second time."""
    notice = given.notice
    if notice.dispute is not None:
        _dispute(draft, notice.dispute)
    if notice.external is not None:
        given = given._replace(operation=external.known_as(given))
        if given.operation is None:
            external.take_note(draft, given, notice.external)
    if given.operation is None:
        return
    current = draft.under_way(given.operation.number)
    if current is None and external.must_wait(draft, notice):
        draft.is_postponed = True
        return
    notice = _with_reference(notice, current or given.operation)
    notice = external.own_share(draft, notice, given.operation)
    if current is None:
        _apply_late(draft, given, given.operation, notice)
        external.take_rest(draft, given)
        begin_waiting(draft)
    elif notice.is_ripe:
        _dispatch_again(draft, current)
    elif isinstance(notice.outcome, Succeeded) and draft.is_foreign(notice.currency):
        review(draft, current, notice.outcome.reference)
    elif isinstance(notice.outcome, Succeeded | Declined | Expired):
        # What is not final adds nothing: whoever holds the operation, or asks about it next, hears it, too.
        settle_outcome(draft, current, notice.outcome)
        external.take_rest(draft, given)
        begin_waiting(draft)


def _dispatch_again(draft: Draft, operation: Operation) -> None:
    """The payer consented: go on at once, unless somebody is at it or it is being cancelled."""
    if operation.is_leased or operation.due_at is None or operation.command is None:
        return
    operation = operation.copy()
    operation.attempts += 1
    operation.is_leased = True  # by the token that it has: nobody holds it, and a claim meanwhile raises it
    operation.due_at = draft.now + draft.rules.retry.lease
    draft.keep(operation)
    assert operation.command is not None, "as checked"
    draft.requests.append(gateway_request(draft.payment, operation, operation.command))


def _apply_late(draft: Draft, given: Notified, operation: Operation, notice: Notice) -> None:
    """News of an operation that has ended. Only a status query's answer is certainly the latest state."""
    was_asked = given.notice_id is None
    match notice.outcome:
        case Succeeded() if was_asked and operation.kind is OperationKind.VOID:
            pass  # Of what there was to cancel when it was sent: see `settle`.
        case Succeeded() as outcome:
            _hear_success(draft, given, operation, notice, outcome)
        case Declined() if operation.kind is OperationKind.REFUND and operation.state is OperationState.SUCCEEDED:
            _reverse_refund(draft, operation)
        case Expired() if _is_open_hold(draft, given, operation):
            _release_hold(draft, operation)
        case Declined(reason=DeclineReason.CANCELED) if was_asked and _is_open_hold(draft, given, operation):
            _release_hold(draft, operation)
        case _:
            pass  # Old news: it was true before what ended the operation.


def _hear_success(draft: Draft, given: Notified, operation: Operation, notice: Notice, outcome: Succeeded) -> None:
    """It counts where it is news, ours and fits; otherwise a person is told, unless it is what we know."""
    is_ours = outcome.amount_minor in (None, operation.amount_minor) and not draft.is_foreign(notice.currency)
    is_news = _may_succeed_late(operation)
    if is_ours and is_news and fits(draft, operation) and not _is_known_otherwise(given, outcome):
        draft.is_postponed = _takes_what_is_reserved(draft.payment, operation)
        if not draft.is_postponed:
            _succeed_late(draft, operation, outcome)
    else:
        is_told = given.notice_id is not None or notice.type == OWN_ANSWER
        draft.disagrees = is_news or not is_ours or (is_told and _is_one_more(operation, outcome))


def _is_known_otherwise(given: Notified, outcome: Succeeded) -> bool:
    """Whether it was counted already, as what somebody did in the provider's pages."""
    named = given.operation.number if given.operation else None
    return any(each.reference == outcome.reference != "" and each.number != named for each in given.known)


def _takes_what_is_reserved(payment: Payment, operation: Operation) -> bool:
    """Whether another operation, whose end nobody knows yet, has set that money aside."""
    amount = operation.amount_minor or 0
    match operation.kind:
        case OperationKind.REFUND:
            return amount > payment.own_kept_minor - payment.reserved_refund_minor
        case OperationKind.CAPTURE | OperationKind.VOID:
            return amount > payment.capturable_minor
        case _:
            return False


def _is_one_more(operation: Operation, outcome: Succeeded) -> bool:
    """Whether the provider moved the money twice, by its own ids: with our mark on both, one of them is too many."""
    is_done = operation.state in (OperationState.SUCCEEDED, OperationState.LAPSED, OperationState.DECLINED)
    has_own_name = operation.kind in (*OPENING, OperationKind.REFUND)  # a capture's may be its payment's
    return is_done and has_own_name and bool(operation.reference) and outcome.reference not in ("", operation.reference)


def _succeed_late(draft: Draft, operation: Operation, outcome: Succeeded) -> None:
    """What was called declined or expired was paid: it counts, and whoever was told otherwise is told again."""
    told_before, may_be_void = operation.state, draft.payment.status is PaymentStatus.CANCELED
    # Of a hold: then its news came after the news of its end.
    is_gone = operation.kind is OperationKind.AUTHORIZE and told_before is OperationState.EXPIRED
    owed = move(draft, operation, outcome)
    if operation.kind is OperationKind.AUTHORIZE and may_be_void:
        # Released by the void of it, or held beside an attempt that was voided: the provider is asked.
        draft.payment.authorization_expires_at = draft.now
    draft.finish(operation, OperationState.SUCCEEDED, outcome.reference)
    draft.publish(
        EventKind.LATE_SUCCESS,
        operation,
        reference=outcome.reference,
        told_before=told_before,
        owed_minor=0 if is_gone else owed,
    )
    draft.book(operation.kind, operation.amount_minor or 0)
    if is_gone:
        _release_hold(draft, draft.changed[operation.number])
    else:
        _tell_void(draft, operation, outcome.reference, owed)


def _tell_void(draft: Draft, paid: Operation, reference: str, owed_minor: int) -> None:
    """A void under way whose attempt had ended already: what it was to cancel is what was paid now, or is nothing."""
    void = draft.payment.under_way
    if void is not None and void.kind is OperationKind.VOID and void.reference == reference:
        leave_to_void(draft, paid, reference, owed_minor)
    else:
        end_void_of_nothing(draft)


def _reverse_refund(draft: Draft, operation: Operation) -> None:
    """A refund that the provider had called done came back: the money is ours again, and still owed."""
    amount = operation.amount_minor or 0
    draft.payment.refunded_minor -= amount
    if operation.is_external and operation.content not in ("", draft.payment.gateway_payment_id):
        draft.payment.owed_returned_minor -= amount
    draft.finish(operation, OperationState.DECLINED, operation.reference)
    draft.publish(EventKind.REFUND_FAILED, operation, reference=operation.reference)
    draft.transfer(Account.GATEWAY_CLEARING, Account.CUSTOMER_REFUNDS, amount)


def is_end_of_hold(operation: Operation, outcome: Outcome | None) -> bool:
    """Whether it says of an authorization that succeeded, and whose end was not told, that it holds nothing."""
    is_hold = operation.kind is OperationKind.AUTHORIZE and operation.state is OperationState.SUCCEEDED
    return is_hold and isinstance(outcome, Expired | Declined)


def _is_open_hold(draft: Draft, given: Notified, hold: Operation) -> bool:
    """Whether it is an authorization that still holds money, with none of our own operations at work on it.

    One whose end was told, or that a void of ours has released, holds none, whatever the payment's other attempts hold.
    """
    if not is_end_of_hold(hold, given.notice.outcome) or draft.payment.under_way is not None:
        return False
    return _held_minor(draft, hold) > 0 and not any(_has_released(each, hold) for each in given.known)


def _has_released(void: Operation, hold: Operation) -> bool:
    return void.state is OperationState.SUCCEEDED and void.reference == hold.reference and bool(void.amount_minor)


def _is_another(draft: Draft, operation: Operation) -> bool:
    """Whether it is not the attempt that captures, voids and refunds refer to."""
    payment = draft.payment
    return (operation.gateway, operation.reference) != (payment.gateway, payment.gateway_payment_id)


def _held_minor(draft: Draft, operation: Operation) -> int:
    """What may be left of this hold."""
    payment = draft.payment
    left = payment.owed_held_minor if _is_another(draft, operation) else payment.capturable_minor
    return min(left, operation.amount_minor or 0)


def _release_hold(draft: Draft, operation: Operation) -> None:
    """Nothing is left of this hold; what another attempt holds stays."""
    released = _held_minor(draft, operation)
    draft.payment.released_minor += released
    if _is_another(draft, operation):
        draft.payment.owed_held_minor -= released
    draft.finish(operation, OperationState.LAPSED, operation.reference)
    draft.publish(EventKind.AUTHORIZATION_EXPIRED, operation, reference=operation.reference)


def _dispute(draft: Draft, dispute: Dispute) -> None:
    """Book what the payer's bank took back, or gave back; each stage of a dispute counts once, in any order.

    What was lost may be less than what was disputed, or more: the amount told last counts. A second end that is not
    the first one is for a person: messages come in any order, and none tells which end is the later.
    """
    kept = draft.payment.disputes
    if draft.is_foreign(dispute.currency) or disputes.contradicts(kept, dispute):
        draft.disagrees = True
    elif disputes.is_news(kept, dispute):
        before = disputes.disputed(kept, dispute.dispute_id)
        after = 0 if dispute.stage is DisputeStage.WON else dispute.amount_minor
        draft.payment.disputed_minor += after - before
        draft.payment.disputes = disputes.remember(kept, dispute.dispute_id, dispute.stage, after)
        draft.publish_dispute(dispute)
        if after > before:
            draft.transfer(Account.CUSTOMER_DISPUTES, Account.GATEWAY_CLEARING, after - before)
        elif before > after:
            draft.transfer(Account.GATEWAY_CLEARING, Account.CUSTOMER_DISPUTES, before - after)


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
