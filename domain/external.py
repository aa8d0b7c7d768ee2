"""Money that moved without us: somebody refunded or captured in the provider's dashboard, and a webhook reports it.

Such a movement carries no mark of ours. It is identified by the provider's id alone and kept as an operation that no
command asked for, so any number of deliveries, in any order, count once. The worst mistake here would be to count our
own refund a second time, should a provider ever report it without our marks. So nothing is taken for somebody else's
while it may be ours.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from domain.amounts import move
from domain.commands import OperationKind
from domain.decision import Notified
from domain.draft import Draft
from domain.events import EventKind
from domain.notices import External, Notice
from domain.operations import Declined, Operation, OperationState, Succeeded
from domain.payment import Payment

EVENTS: Final = {
    OperationKind.REFUND: EventKind.REFUNDED_EXTERNALLY,
    OperationKind.CAPTURE: EventKind.CAPTURED_EXTERNALLY,
}


def known_as(given: Notified) -> Operation | None:
    """The operation that the notice is about, ours or an external one reported before; None if it is new."""
    reference = _reference(given.notice)
    return next((each for each in given.known if reference is not None and each.reference == reference), None)


def take_note(draft: Draft, given: Notified, external: External) -> None:
    """Count a new movement, if it is certainly not ours and the amounts have room for it."""
    match given.notice.outcome:
        case Declined() if external.is_reversal:
            pass  # Nothing was reversed.
        case _ if external.is_reversal:
            _compare(draft, given.notice, external)
        case Succeeded() | Declined() if _may_be_under_way(given.known):
            draft.is_postponed = True
        case Succeeded():
            _count(draft, given, external)
        case Declined() if external.kind is OperationKind.REFUND:
            _note_failure(draft, given.notice, external)
        case _:
            pass  # Not final: a later notice will report its end.


def _may_be_under_way(known: Sequence[Operation]) -> bool:
    """Whether it may be our own operation whose provider id is not known yet: the answer to that will show it."""
    return any(each.is_under_way and not each.reference for each in known)


def _may_have_ended(known: Sequence[Operation]) -> bool:
    """Whether it may be our own operation that ended without a provider id, as by a person's ruling."""
    return any(each.state is OperationState.SUCCEEDED and not each.reference for each in known)


def _count(draft: Draft, given: Notified, external: External) -> None:
    notice, payment = given.notice, draft.payment
    is_owed = not _is_of_primary(payment, notice)
    room = _owed(notice, payment, external.kind) if is_owed else _room(payment, external.kind)
    if draft.is_other_currency(notice.currency) or _may_have_ended(given.known):
        draft.disagrees = True
    elif 0 < external.amount_minor <= room:
        _book(draft, notice, external, is_owed=is_owed)
    elif payment.under_way is not None or _is_fresh(draft, external):
        # An operation under way, or news still to come, may make room for it or turn out to be its cause.
        draft.is_postponed = True
    else:
        draft.disagrees = True


def _compare(draft: Draft, notice: Notice, external: External) -> None:
    """Look for the dispute that explains a reversal; mostly the money is in the books as disputed, or will be.

    Neither message refers to the other. So a reversal is never booked, lest money be counted as gone twice. Where no
    dispute accounts for it, a person must find out what it was.
    """
    is_disputed = not draft.is_other_currency(notice.currency) and draft.payment.disputed_minor >= external.amount_minor
    draft.is_postponed = not is_disputed and _is_fresh(draft, external)
    draft.disagrees = not is_disputed and not draft.is_postponed


def _is_fresh(draft: Draft, external: External) -> bool:
    """Whether it is recent: providers report in any order, for example a refund before its capture."""
    moved_at = external.moved_at
    return moved_at is not None and draft.now - moved_at < draft.rules.retry.review_after


def _is_of_primary(payment: Payment, notice: Notice) -> bool:
    """Whether the movement belongs to the payment's primary opening.

    A notice that names none qualifies only if no other opening holds or took money.
    """
    if notice.gateway_payment_id is not None:
        return (notice.gateway, notice.gateway_payment_id) == (payment.gateway, payment.gateway_payment_id)
    return notice.gateway == payment.gateway and not payment.owed_minor and not payment.owed_held_minor


def _room(payment: Payment, kind: OperationKind) -> int:
    """How much the amounts can bear, beside what is disputed or reserved for our own operation under way.

    (What a lost dispute took may also be reported as a refund.) A capture waits for whatever is under way: our own
    request states what was captured before it, and must stay the same when it is repeated.
    """
    if kind is OperationKind.CAPTURE:
        return 0 if payment.under_way is not None else payment.capturable_minor
    return payment.refundable_minor


def _owed(notice: Notice, payment: Payment, kind: OperationKind) -> int:
    """How much of another opening's money is still to be returned, if this is a refund of it."""
    is_of_another = notice.gateway_payment_id is not None and kind is OperationKind.REFUND
    return payment.owed_minor if is_of_another else 0


def _book(draft: Draft, notice: Notice, external: External, *, is_owed: bool) -> None:
    assert isinstance(notice.outcome, Succeeded), "only what was executed is booked"
    operation = _operation(draft, notice, external, OperationState.SUCCEEDED)
    move(draft, operation, notice.outcome)
    if is_owed:
        draft.payment.owed_returned_minor += external.amount_minor
    if external.is_final:
        draft.payment.released_minor += draft.payment.capturable_minor
    draft.keep(operation)
    draft.publish(EVENTS[operation.kind], operation, reference=operation.reference)
    draft.book(operation.kind, external.amount_minor)


def _note_failure(draft: Draft, notice: Notice, external: External) -> None:
    """Remember a refund that failed before it was reported: an older notice of its success must not count."""
    operation = _operation(draft, notice, external, OperationState.DECLINED)
    draft.keep(operation)
    draft.publish(EventKind.REFUND_FAILED, operation, reference=operation.reference)


def _operation(draft: Draft, notice: Notice, external: External, state: OperationState) -> Operation:
    draft.payment.last_operation += 1
    return Operation(
        payment_id=draft.payment.payment_id,
        number=draft.payment.last_operation,
        kind=external.kind,
        idempotency_key=None,
        fingerprint=b"",
        content=notice.gateway_payment_id or "",
        state=state,
        amount_minor=external.amount_minor,
        gateway=notice.gateway,
        reference=_reference(notice),
        dispatched_at=external.moved_at or draft.now,
    )


def _reference(notice: Notice) -> str | None:
    return notice.outcome.reference if isinstance(notice.outcome, Succeeded | Declined) else None


# --- what others captured beside us, reported only as a sum -------------------------------------------------------


def must_wait(draft: Draft, notice: Notice) -> bool:
    """Whether others captured as well while an operation of ours, which may change the hold, is under way."""
    return draft.payment.under_way is not None and _beyond_ours(draft, notice) > 0


def own_share(draft: Draft, notice: Notice, named: Operation) -> Notice:
    """The notice without its amount, where that includes others' captures and the hold has room for those."""
    outcome, gateway = notice.outcome, draft.rules.gateways.get(notice.gateway)
    if notice.captured_minor is None or not isinstance(outcome, Succeeded) or named.kind is not OperationKind.CAPTURE:
        return notice
    more_minor = (outcome.amount_minor or 0) - (named.amount_minor or 0)
    is_shared = gateway is not None and gateway.multi_capture and 0 < more_minor <= draft.payment.capturable_minor
    return notice._replace(outcome=replace(outcome, amount_minor=None)) if is_shared else notice


def count_more_captured(draft: Draft, given: Notified) -> None:
    """Count what was captured beyond ours, once the notice's word on our own operation has been counted.

    Delivered again, the sum exceeds ours no more, so it counts once. If that operation is still under way, the notice
    was not believed; then this part of it is not believed either.
    """
    more_minor = _beyond_ours(draft, given.notice)
    if more_minor <= 0 or draft.disagrees:
        return
    if draft.payment.under_way is not None:
        draft.disagrees = True
    else:
        _count(draft, given, External(OperationKind.CAPTURE, more_minor, is_final=True))


def _beyond_ours(draft: Draft, notice: Notice) -> int:
    """How much more was captured of that opening than our books show; all our captures are of the primary one."""
    if notice.captured_minor is None:
        return 0
    ours_minor = draft.payment.own_captured_minor if _is_of_primary(draft.payment, notice) else 0
    return notice.captured_minor - ours_minor
