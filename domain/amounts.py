"""What an operation's success does to its payment's amounts, and whether they have room for it."""

from typing import assert_never

from domain.commands import OperationKind
from domain.draft import Draft
from domain.holds import next_end_of_holds
from domain.operations import Operation, Succeeded


def fits(draft: Draft, operation: Operation) -> bool:
    """Whether the amounts have room for the operation's effect, its own reservation included.

    They always have, unless the provider's word contradicts our books.
    """
    amount, payment = operation.amount_minor or 0, draft.payment
    match operation.kind:
        case OperationKind.VOID if operation.is_under_way and payment.void_releases_secondary:
            return amount <= payment.owed_held_minor
        case OperationKind.CAPTURE | OperationKind.VOID:
            return amount <= payment.capturable_minor + payment.reserved_capture_minor
        case OperationKind.REFUND:
            return amount <= payment.own_kept_minor
        case _:
            return True


def move(draft: Draft, operation: Operation, outcome: Succeeded) -> int:
    """Count what the operation moved. Returns how much of it is owed to the payer, since another opening was paid."""
    payment, amount = draft.payment, operation.amount_minor or 0
    match operation.kind:
        case OperationKind.AUTHORIZE | OperationKind.CHARGE:
            return _open(draft, operation, outcome)
        case OperationKind.CAPTURE:
            payment.captured_minor += amount
            gateway = draft.rules.gateways.get(payment.gateway or "")
            # The rule of a gateway that is not configured any more is unknown: nothing is marked released.
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
    """The first opening that has money becomes the primary one; whatever a later one takes is owed."""
    payment, amount, is_first = draft.payment, operation.amount_minor or 0, not draft.payment.has_money
    is_charge = operation.kind is OperationKind.CHARGE
    if not is_charge:
        payment.authorization_expires_at = next_end_of_holds(draft, outcome)
    payment.authorized_minor += amount
    payment.captured_minor += amount if is_charge else 0
    if not is_first:
        payment.owed_captured_minor += amount if is_charge else 0
        payment.owed_held_minor += 0 if is_charge else amount
        return amount
    payment.gateway = operation.gateway
    payment.gateway_payment_id = outcome.reference
    return 0
