"""What a gateway is asked to do for an operation."""

from typing import Final

from domain.commands import Command, OperationKind
from domain.money import Money
from domain.operations import GatewayRequest, Operation
from domain.payment import Payment

OPENING: Final = (OperationKind.AUTHORIZE, OperationKind.CHARGE)
"""The kinds that open a payment, each such operation an *opening* (`domain.payment`); the others act on one."""


def gateway_request(payment: Payment, operation: Operation, command: Command) -> GatewayRequest:
    """What the gateway is asked to do for `operation`; the same at every attempt.

    Only what is known of it (`state`, `reference`) and who asks (`attempts`, `lease_token`) differ.
    """
    assert payment.currency is not None, "a payment with a dispatched operation has a currency"
    assert operation.amount_minor is not None, "a dispatched operation has an amount"
    return GatewayRequest(
        kind=operation.kind,
        payment_id=payment.payment_id,
        operation_number=operation.number,
        provider_key=operation.provider_key,
        gateway=operation.gateway or "",
        amount=Money(operation.amount_minor, payment.currency),
        gateway_payment_id=None if operation.kind in OPENING else _target(payment, operation),
        # A void's reference is not its own but its target's.
        reference=None if operation.kind is OperationKind.VOID else operation.reference,
        payment_method=command.payment_method,
        order_id=payment.order_id,
        customer_id=payment.customer_id,
        metadata=command.metadata,
        off_session=command.off_session,
        # A void is given nothing that may change while it is under way: its request must stay the same.
        is_final=operation.kind is not OperationKind.CAPTURE or payment.capturable_minor == 0,
        captured_minor=0 if operation.kind is OperationKind.VOID else payment.own_captured_minor,
        state=operation.state,
        attempts=operation.attempts,
        lease_token=operation.lease_token,
        first_dispatched_at=operation.dispatched_at,
        expires_at=command.expires_at,
    )


def _target(payment: Payment, operation: Operation) -> str | None:
    """The provider's payment that the operation acts on.

    For a void that reserved nothing it is the opening that the void was sent to cancel, whatever became of that one
    and of other openings since.
    """
    if operation.kind is not OperationKind.VOID:
        return payment.gateway_payment_id
    own = payment.gateway_payment_id
    return own if payment.reserved_capture_minor else operation.reference or own
