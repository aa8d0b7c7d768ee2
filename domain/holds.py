"""How a hold ends: what it may still keep, when it is asked about, and what its lapse does to the payment.

Only the provider's word ends a hold. A guess of its end, or a capture that failed, merely has it asked about.
"""

from datetime import datetime

from domain.commands import OperationKind
from domain.decision import Notified
from domain.draft import Draft
from domain.events import EventKind
from domain.operations import Declined, Expired, NotExecuted, Operation, OperationState, Outcome, Succeeded


def is_end_of_hold(operation: Operation, outcome: Outcome | None) -> bool:
    """Whether `outcome` says that this authorization, which succeeded and has not lapsed, holds nothing any more."""
    is_hold = operation.kind is OperationKind.AUTHORIZE and operation.state is OperationState.SUCCEEDED
    return is_hold and isinstance(outcome, Expired | Declined)


def is_open_hold(draft: Draft, given: Notified, hold: Operation) -> bool:
    """Whether this authorization still holds money, with none of our own operations at work on it.

    One that has lapsed, or that a void of ours has released, holds none, whatever the payment's other openings hold.
    """
    if not is_end_of_hold(hold, given.notice.outcome) or draft.payment.under_way is not None:
        return False
    return _held_minor(draft, hold) > 0 and not any(_has_released(each, hold) for each in given.known)


def release_hold(draft: Draft, hold: Operation) -> None:
    """End a hold of which nothing is left. What another opening holds stays."""
    released = _held_minor(draft, hold)
    draft.payment.released_minor += released
    if not draft.payment.is_primary(hold):
        draft.payment.owed_held_minor -= released
    draft.finish(hold, OperationState.LAPSED, hold.reference)
    draft.publish(EventKind.AUTHORIZATION_EXPIRED, hold, reference=hold.reference)


def doubt_hold(draft: Draft, outcome: Outcome) -> None:
    """Have a hold that could not be captured asked about soon, like one past its end: only that answer ends it."""
    if isinstance(outcome, NotExecuted) and outcome.is_hold_gone and not draft.is_stale:
        draft.payment.authorization_expires_at = draft.now


def next_end_of_holds(draft: Draft, outcome: Succeeded) -> datetime:
    """When the payment's holds are first asked about, a new one included: at the earliest end of those still open."""
    end = outcome.expires_at or draft.now + draft.rules.retry.hold_end_unknown_after
    payment = draft.payment
    is_held = payment.authorized_minor > payment.captured_minor + payment.released_minor
    others = payment.authorization_expires_at if is_held else None
    return end if others is None else min(end, others)


def _has_released(void: Operation, hold: Operation) -> bool:
    return void.state is OperationState.SUCCEEDED and void.reference == hold.reference and bool(void.amount_minor)


def _held_minor(draft: Draft, hold: Operation) -> int:
    """The most that may be left of this hold."""
    payment = draft.payment
    left = payment.capturable_minor if payment.is_primary(hold) else payment.owed_held_minor
    return min(left, hold.amount_minor or 0)
