"""What a webhook does to a payment: an unsolicited word of the provider, at any time and any number of times."""

from dataclasses import replace
from typing import Final

from domain import disputes, external
from domain.accept import begin_waiting
from domain.amounts import fits, move
from domain.commands import OperationKind
from domain.decision import Notified
from domain.draft import Draft
from domain.events import EventKind, PaymentStatus
from domain.holds import is_open_hold, release_hold
from domain.ledger import Account
from domain.notices import OWN_ANSWER, Dispute, DisputeStage, Notice
from domain.operations import Declined, DeclineReason, Expired, Operation, OperationState, Succeeded
from domain.payment import Payment
from domain.requests import OPENING, gateway_request
from domain.settle import review, settle_outcome
from domain.voids import hand_to_void

ENDED_WITHOUT_EFFECT: Final = (OperationState.DECLINED, OperationState.NOT_EXECUTED, OperationState.EXPIRED)


def apply_notice(draft: Draft, given: Notified) -> None:
    """Apply a provider's notice. Delivered again, in any order, it changes nothing the second time."""
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
        external.count_more_captured(draft, given)
        begin_waiting(draft)
    elif notice.is_ripe:
        _dispatch_again(draft, current)
    elif isinstance(notice.outcome, Succeeded) and draft.is_other_currency(notice.currency):
        review(draft, current, notice.outcome.reference)
    elif isinstance(notice.outcome, Succeeded | Declined | Expired):
        # An outcome that is not final adds nothing: the worker that holds the operation, or asks next, will get it.
        settle_outcome(draft, current, notice.outcome)
        external.count_more_captured(draft, given)
        begin_waiting(draft)


def _dispatch_again(draft: Draft, operation: Operation) -> None:
    """Resume at once, since the payer consented, unless a worker has the operation or a void is cancelling it."""
    if operation.is_leased or operation.due_at is None or operation.command is None:
        return
    operation = operation.copy()
    operation.attempts += 1
    operation.is_leased = True  # under its present token: nobody holds it, and a claim meanwhile raises the token
    operation.due_at = draft.now + draft.rules.retry.lease
    draft.keep(operation)
    assert operation.command is not None, "as checked"
    draft.requests.append(gateway_request(draft.payment, operation, operation.command))


def _apply_late(draft: Draft, given: Notified, operation: Operation, notice: Notice) -> None:
    """Apply news of an operation that has ended. Only a status query's answer is certainly the latest state."""
    was_asked = given.notice_id is None
    match notice.outcome:
        case Succeeded() if was_asked and operation.kind is OperationKind.VOID:
            pass  # It is about what there was to cancel when it was sent: see `settle`.
        case Succeeded() as outcome:
            _apply_late_success(draft, given, operation, notice, outcome)
        case Declined() if operation.kind is OperationKind.REFUND and operation.state is OperationState.SUCCEEDED:
            _reverse_refund(draft, operation)
        case Expired() if is_open_hold(draft, given, operation):
            release_hold(draft, operation)
        case Declined(reason=DeclineReason.CANCELED) if was_asked and is_open_hold(draft, given, operation):
            release_hold(draft, operation)
        case _:
            pass  # Old news, from before the operation ended.


def _apply_late_success(
    draft: Draft, given: Notified, operation: Operation, notice: Notice, outcome: Succeeded
) -> None:
    """Count a late success that is new, is ours and fits the amounts.

    Otherwise it is a disagreement for a person to look at, unless it repeats what we know.
    """
    is_ours = outcome.amount_minor in (None, operation.amount_minor) and not draft.is_other_currency(notice.currency)
    is_news = _may_count_late_success(operation)
    if is_ours and is_news and fits(draft, operation) and not _is_known_otherwise(given, outcome):
        draft.is_postponed = _takes_what_is_reserved(draft.payment, operation)
        if not draft.is_postponed:
            _count_late_success(draft, operation, outcome)
    else:
        is_told = given.notice_id is not None or notice.type == OWN_ANSWER
        draft.disagrees = is_news or not is_ours or (is_told and _is_one_more(operation, outcome))


def _is_known_otherwise(given: Notified, outcome: Succeeded) -> bool:
    """Whether it was counted already, as a movement that somebody made in the provider's dashboard."""
    named = given.operation.number if given.operation else None
    return any(each.reference == outcome.reference != "" and each.number != named for each in given.known)


def _takes_what_is_reserved(payment: Payment, operation: Operation) -> bool:
    """Whether that money is reserved for another operation, whose outcome is not known yet."""
    amount = operation.amount_minor or 0
    match operation.kind:
        case OperationKind.REFUND:
            return amount > payment.own_kept_minor - payment.reserved_refund_minor
        case OperationKind.CAPTURE | OperationKind.VOID:
            return amount > payment.capturable_minor
        case _:
            return False


def _is_one_more(operation: Operation, outcome: Succeeded) -> bool:
    """Whether the provider executed the operation twice: it reports a success under another id than the stored one."""
    is_done = operation.state in (OperationState.SUCCEEDED, OperationState.LAPSED, OperationState.DECLINED)
    has_own_id = operation.kind in (*OPENING, OperationKind.REFUND)  # a capture's id may be its payment's
    return is_done and has_own_id and bool(operation.reference) and outcome.reference not in ("", operation.reference)


def _count_late_success(draft: Draft, operation: Operation, outcome: Succeeded) -> None:
    """Count money of an operation that was called declined or expired, and publish the correction."""
    told_before, may_be_void = operation.state, draft.payment.status is PaymentStatus.CANCELED
    # Of a hold that had expired: the news of it came after the news of its end.
    is_gone = operation.kind is OperationKind.AUTHORIZE and told_before is OperationState.EXPIRED
    owed = move(draft, operation, outcome)
    if operation.kind is OperationKind.AUTHORIZE and may_be_void:
        # Its void released it, or it is held beside an opening that was voided: the provider is asked.
        draft.payment.authorization_expires_at = draft.now
    draft.finish(operation, OperationState.SUCCEEDED, outcome.reference)
    draft.publish(
        EventKind.LATE_SUCCESS,
        operation,
        reference=outcome.reference,
        told_before=told_before,
        owed_minor=0 if is_gone else owed,
        expires_at=None if is_gone else outcome.expires_at,
    )
    draft.book(operation.kind, operation.amount_minor or 0)
    if is_gone:
        release_hold(draft, draft.changed[operation.number])
    else:
        hand_to_void(draft, operation, outcome.reference, owed)


def _reverse_refund(draft: Draft, operation: Operation) -> None:
    """Take back a refund that the provider had called done: the money is with us again, and still owed."""
    amount = operation.amount_minor or 0
    draft.payment.refunded_minor -= amount
    if operation.is_external and operation.content not in ("", draft.payment.gateway_payment_id):
        draft.payment.owed_returned_minor -= amount
    draft.finish(operation, OperationState.DECLINED, operation.reference)
    draft.publish(EventKind.REFUND_FAILED, operation, reference=operation.reference)
    draft.transfer(Account.GATEWAY_CLEARING, Account.CUSTOMER_REFUNDS, amount)


def _dispute(draft: Draft, dispute: Dispute) -> None:
    """Book what the payer's bank took back, or returned; each stage of a dispute counts once, in any order.

    The amount lost may be less than the amount disputed, or more: the latest reported one counts. A second, different
    ending needs a person: messages arrive in any order, so nothing shows which one is later.
    """
    kept = draft.payment.disputes
    if draft.is_other_currency(dispute.currency) or disputes.contradicts(kept, dispute):
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
    """The notice with the operation's own reference, where the message names none."""
    outcome = notice.outcome
    if isinstance(outcome, Succeeded | Declined | Expired) and not outcome.reference and operation.reference:
        return notice._replace(outcome=replace(outcome, reference=operation.reference))
    return notice


def _may_count_late_success(operation: Operation) -> bool:
    """Whether a reported success can be newer than the way the operation ended.

    A declined refund stays declined: providers let a refund fail after it succeeded, never the other way round.
    """
    is_refund = operation.kind is OperationKind.REFUND
    return operation.state in ENDED_WITHOUT_EFFECT and not (is_refund and operation.state is OperationState.DECLINED)
