"""What a void acts on, which may change while it is under way: the payer can still pay what it was sent to cancel.

A void names its target by `reference`, from the beginning. What its success does depends on the target by then:

- a hold of the primary opening (`reserved_capture_minor` is the void's amount): that much is released;
- an opening that waits for its payer (nothing is reserved): it is `declined` as `canceled`, and nothing is released;
- that opening, now a hold and the primary one (its amount is reserved from then on): the hold is released;
- that opening, now a hold beside a primary one (nothing is reserved): it is released, and `owed_held_minor` shrinks;
- that opening, ended without money (nothing is reserved): nothing is released, and the void ends at once where another
  opening has money.

A charge that was paid meanwhile stays captured, and the provider refuses the void.
"""

from dataclasses import replace

from domain.commands import OperationKind
from domain.draft import Draft
from domain.events import EventKind
from domain.operations import Operation, OperationState


def cancels_unpaid(draft: Draft) -> bool:
    """Whether the void under way cancels an opening that waits, or waited, for its payer.

    Another opening's hold is not touched by it.
    """
    return draft.payment.is_cancelling or not draft.payment.has_money


def of_nothing(void: Operation) -> Operation:
    """The void with the amount 0, since it released nothing: if its target is paid after all, that money is held."""
    return replace(void, amount_minor=0)


def leave_to_void(draft: Draft, hold: Operation, reference: str, owed_minor: int) -> None:
    """Let the void that is under way release a hold which came about while it was being cancelled, at every attempt."""
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


def hand_to_void(draft: Draft, paid: Operation, reference: str, owed_minor: int) -> None:
    """Adapt the void under way, if any, to a payment of an opening that had ended: it releases that one, or nothing."""
    void = draft.payment.under_way
    if void is not None and void.kind is OperationKind.VOID and void.reference == reference:
        leave_to_void(draft, paid, reference, owed_minor)
    else:
        end_void_of_nothing(draft)


def end_void_of_nothing(draft: Draft) -> None:
    """End the void whose target has ended without it, where another opening is paid.

    Where no other is paid, the void is sent on until its provider answers.
    """
    void, payment = draft.payment.under_way, draft.payment
    if void is None or void.kind is not OperationKind.VOID or payment.reserved_capture_minor or not payment.has_money:
        return
    draft.finish(of_nothing(void), OperationState.SUCCEEDED, void.reference)
    draft.publish(EventKind.VOIDED, void, reference=void.reference)
