"""Why a command may be refused, given its payment as it stands now."""

from datetime import datetime

from domain.capabilities import AmountLimits
from domain.commands import Command, OperationKind, Rejection, RejectionReason
from domain.events import PaymentStatus
from domain.payment import Payment
from domain.requests import OPENING
from domain.rules import Rules

RETRYABLE_STATUSES = (PaymentStatus.CREATED, PaymentStatus.FAILED, PaymentStatus.EXPIRED)
"""No money is held and none may have moved: another authorization or charge may be tried."""


def amount_of(command: Command, payment: Payment) -> int:
    """The amount that the command is about, in minor units; omitted means all that remains."""
    if command.kind is OperationKind.VOID:
        waiting = payment.waiting_for_payer
        return payment.capturable_minor if waiting is None else waiting.amount_minor or 0
    if command.amount_minor is not None:
        return command.amount_minor
    return payment.refundable_minor if command.kind is OperationKind.REFUND else payment.capturable_minor


def gateway_of(command: Command, payment: Payment, rules: Rules) -> str | None:
    """The gateway that executes the command. A void's is that of the waiting opening, if there is one."""
    if command.kind in OPENING:
        return command.gateway or rules.default_gateway
    waiting = payment.waiting_for_payer
    return payment.gateway if waiting is None else waiting.gateway


def refusal_of(command: Command, payment: Payment, *, now: datetime, rules: Rules) -> Rejection | None:
    """The first reason to refuse this command, or None when it may go to the gateway."""
    if command.expires_at is not None and command.expires_at <= now:
        return Rejection(RejectionReason.COMMAND_EXPIRED, "the command expired before its turn came", ("expires_at",))
    match command.kind:
        case OperationKind.AUTHORIZE | OperationKind.CHARGE:
            return _refusal_to_open(command, payment, rules)
        case OperationKind.CAPTURE:
            return _refusal_to_continue(command, payment, rules) or _refusal_to_capture(command, payment, rules)
        case OperationKind.REFUND:
            return _refusal_to_continue(command, payment, rules) or _refusal_to_refund(command, payment, rules)
        case OperationKind.VOID:
            return _refusal_to_continue(command, payment, rules) or _refusal_to_void(payment)


def _refusal_to_open(command: Command, payment: Payment, rules: Rules) -> Rejection | None:
    if payment.status not in RETRYABLE_STATUSES:
        message = f"payment {payment.payment_id} exists and is {payment.status}; a new payment needs a new payment_id"
        return Rejection(RejectionReason.PAYMENT_ALREADY_EXISTS, message, ("payment_id",))
    return (
        _refusal_of_currency(command, payment, rules)
        or _refusal_of_gateway(command, command.gateway or rules.default_gateway, rules)
        or _refusal_of_limits(command, rules)
    )


def _refusal_of_currency(command: Command, payment: Payment, rules: Rules) -> Rejection | None:
    if command.currency not in rules.currencies:
        message = f"currency {command.currency} is not accepted here"
        return Rejection(RejectionReason.UNKNOWN_CURRENCY, message, ("currency",))
    return _mismatch(command, payment)


def _refusal_of_gateway(command: Command, name: str, rules: Rules) -> Rejection | None:
    capabilities = rules.gateways.get(name)
    if capabilities is None:
        known = ", ".join(sorted(rules.gateways))
        return Rejection(RejectionReason.UNKNOWN_GATEWAY, f"gateway {name} is not one of: {known}", ("gateway",))
    if command.kind not in capabilities.operations:
        return _unsupported(f"gateway {name} cannot {command.kind}", "type")
    if command.currency is not None and command.currency not in capabilities.currencies:
        return _unsupported(f"gateway {name} does not take {command.currency}", "currency")
    if command.off_session and not capabilities.off_session:
        return _unsupported(f"gateway {name} cannot charge while the payer is away", "off_session")
    return None


def _refusal_of_limits(command: Command, rules: Rules) -> Rejection | None:
    name = command.gateway or rules.default_gateway
    currency = command.currency or ""
    limits = rules.limits.get((name, currency)) or rules.gateways[name].limits.get(currency, AmountLimits())
    amount = command.amount_minor or 0
    if amount < limits.minimum_minor:
        message = f"the minimum amount in {command.currency} is {limits.minimum_minor} minor units"
        return Rejection(RejectionReason.AMOUNT_BELOW_MINIMUM, message, ("amount_minor",))
    if amount > limits.maximum_minor:
        message = f"the maximum amount in {command.currency} is {limits.maximum_minor} minor units"
        return Rejection(RejectionReason.AMOUNT_ABOVE_MAXIMUM, message, ("amount_minor",))
    return None


def _refusal_to_continue(command: Command, payment: Payment, rules: Rules) -> Rejection | None:
    gateway = gateway_of(command, payment, rules)
    if gateway is None:
        message = f"payment {payment.payment_id} was never authorized or charged"
        return Rejection(RejectionReason.PAYMENT_NOT_FOUND, message, ("payment_id",))
    return _mismatch(command, payment) or _refusal_of_gateway(command, gateway, rules)


def _mismatch(command: Command, payment: Payment) -> Rejection | None:
    if command.currency is not None and payment.currency not in (None, command.currency):
        message = f"the payment is in {payment.currency}, the command in {command.currency}"
        return Rejection(RejectionReason.CURRENCY_MISMATCH, message, ("currency",))
    return None


def _refusal_to_capture(command: Command, payment: Payment, rules: Rules) -> Rejection | None:
    left = payment.capturable_minor
    if left == 0:
        return _invalid_state(payment, "nothing is left to capture")
    amount = amount_of(command, payment)
    if amount > left:
        message = f"{amount} is more than the {left} minor units that can still be captured"
        return Rejection(RejectionReason.AMOUNT_EXCEEDS_CAPTURABLE, message, ("amount_minor",))
    if amount < left and not rules.gateways[payment.gateway or ""].partial_capture:
        return _unsupported(f"gateway {payment.gateway} cannot capture in part", "amount_minor")
    return None


def _refusal_to_refund(command: Command, payment: Payment, rules: Rules) -> Rejection | None:
    left = payment.refundable_minor
    amount = amount_of(command, payment)
    if payment.own_captured_minor == 0:
        instead = "; void what is held" if payment.capturable_minor else ""
        why = f"nothing was captured, so there is nothing to refund{instead}{_besides(payment)}"
        return _invalid_state(payment, why)
    if left <= 0:
        message = f"the payment is {payment.status}: nothing is left to refund{_besides(payment)}"
        return Rejection(RejectionReason.AMOUNT_EXCEEDS_REFUNDABLE, message, ("amount_minor",))
    if amount > left:
        message = f"{amount} is more than the {left} minor units that can still be refunded{_besides(payment)}"
        return Rejection(RejectionReason.AMOUNT_EXCEEDS_REFUNDABLE, message, ("amount_minor",))
    if amount < payment.own_kept_minor and not rules.gateways[payment.gateway or ""].partial_refund:
        return _unsupported(f"gateway {payment.gateway} cannot refund in part", "amount_minor")
    return None


def _besides(payment: Payment) -> str:
    owed = payment.owed_minor
    return f"; {owed} were taken by another attempt, and are returned in the provider's dashboard" if owed else ""


def _refusal_to_void(payment: Payment) -> Rejection | None:
    if payment.waiting_for_payer is not None or payment.capturable_minor:
        return None
    return _invalid_state(payment, "nothing is held that could be released")


def _invalid_state(payment: Payment, why: str) -> Rejection:
    return Rejection(RejectionReason.INVALID_STATE, f"the payment is {payment.status}: {why}", ("type",))


def _unsupported(message: str, field: str) -> Rejection:
    return Rejection(RejectionReason.UNSUPPORTED_BY_GATEWAY, message, (field,))
