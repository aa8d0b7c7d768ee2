"""The error table: what PayPal's refusals prove about an operation.

Promise: a refusal proves that nothing was executed only if every earlier attempt of the operation is accounted for;
otherwise the translation is `Look`. An issue that the table does not list is neither a success nor a decline.

Sources: https://developer.paypal.com/docs/api/orders/v2/, https://developer.paypal.com/docs/api/payments/v2/.
"""

from collections.abc import Mapping
from typing import Final

from domain.commands import OperationKind
from domain.errors import GatewayUnreachable, OutcomeUnknown
from domain.operations import (
    Declined,
    DeclineReason,
    Expired,
    GatewayRequest,
    NotExecuted,
    OperationState,
    Outcome,
    Pending,
)
from infra.gateways.evidence import Look, Translation
from infra.gateways.paypal_http import NAME, REFUSED_AT_THE_DOOR, PayPalRefused

_DECLINES: Final[Mapping[DeclineReason, str]] = {
    DeclineReason.REFUSED_BY_ISSUER: (
        "INSTRUMENT_DECLINED TRANSACTION_REFUSED AUTHORIZATION_DENIED PAYMENT_SOURCE_DECLINED_BY_PROCESSOR"
        " DECLINED_DUE_TO_RELATED_TXN"
    ),
    DeclineReason.CARD_EXPIRED: "CARD_EXPIRED REFERENCED_CARD_EXPIRED",
    DeclineReason.INVALID_CARD_DATA: "PAYMENT_SOURCE_INFO_CANNOT_BE_VERIFIED TOKEN_EXPIRED TOKEN_ID_NOT_FOUND",
    DeclineReason.AUTHENTICATION_REQUIRED: "CONSENT_NEEDED",
    DeclineReason.SUSPECTED_FRAUD: "COMPLIANCE_VIOLATION",
    DeclineReason.LIMIT_EXCEEDED: (
        "TRANSACTION_LIMIT_EXCEEDED TRANSACTION_RECEIVING_LIMIT_EXCEEDED MAX_NUMBER_OF_PAYMENT_ATTEMPTS_EXCEEDED"
    ),
    DeclineReason.METHOD_NOT_SUPPORTED: (
        "PAYMENT_SOURCE_CANNOT_BE_USED CARD_BRAND_NOT_SUPPORTED DOMESTIC_TRANSACTION_REQUIRED"
    ),
    DeclineReason.CANCELED: "AGREEMENT_ALREADY_CANCELLED BILLING_AGREEMENT_NOT_FOUND",
    DeclineReason.OTHER: (
        "PAYER_CANNOT_PAY TRANSACTION_BLOCKED_BY_PAYEE PAYEE_BLOCKED_TRANSACTION PAYER_ACCOUNT_LOCKED_OR_CLOSED"
        " PAYER_ACCOUNT_RESTRICTED"
    ),
}
DECLINE_REASONS: Final[Mapping[str, DeclineReason]] = {
    issue: reason for reason, issues in _DECLINES.items() for issue in issues.split()
}

NEEDS_PAYER: Final = frozenset({"PAYER_ACTION_REQUIRED", "ORDER_NOT_APPROVED", "REDIRECT_PAYER_FOR_ALTERNATE_FUNDING"})
"""The payer must consent again, to the same order."""

STATE_CONFLICTS: Final = frozenset(
    {
        "ORDER_ALREADY_CAPTURED",
        "ORDER_ALREADY_AUTHORIZED",
        "AUTHORIZATION_ALREADY_CAPTURED",
        "PREVIOUSLY_CAPTURED",
        "PREVIOUSLY_VOIDED",
        "AUTHORIZATION_VOIDED",
        "CAPTURE_FULLY_REFUNDED",
        "ORDER_COMPLETED_OR_VOIDED",
        "DUPLICATE_INVOICE_ID",
    }
)
"""The object is not in the state that the call needs, perhaps because this very operation was already executed."""

IN_PROGRESS: Final = frozenset({"PREVIOUS_REQUEST_IN_PROGRESS", "ORDER_COMPLETION_IN_PROGRESS"})
"""The same request is being executed right now, which is the opposite of proof."""

LATER: Final = frozenset({"PENDING_CAPTURE", "REFUND_FAILED_INSUFFICIENT_FUNDS"})
"""Not executed, and may be retried once the capture has completed, or once our account has funds."""

ENDED: Final = frozenset({"AUTHORIZATION_EXPIRED", "ORDER_EXPIRED", "REFUND_TIME_LIMIT_EXCEEDED"})


def translate_refusal(refused: PayPalRefused, request: GatewayRequest) -> Translation:
    """Translate a refusal of a POST.

    A refusal proves that nothing was executed only if every earlier attempt is accounted for; otherwise a lost attempt
    may have caused the very state that PayPal complains about. A decline or expiry is about the payment itself, so it
    counts at any attempt: had an earlier one succeeded, the repeated request id would return that success.
    """
    if refused.names(IN_PROGRESS) or refused.status == 409:
        return OutcomeUnknown(NAME, f"being executed by another attempt: {refused}")
    if refused.names(NEEDS_PAYER):
        return _needs_payer(refused, request)
    if issue := refused.names(DECLINE_REASONS):
        is_refund = request.kind is OperationKind.REFUND
        reason = DeclineReason.REFUND_FAILED if is_refund else DECLINE_REASONS[issue]
        return Declined(reason, issue, request.reference)
    if refused.status in REFUSED_AT_THE_DOOR or refused.names(LATER):
        return GatewayUnreachable(NAME, str(refused))
    if refused.names(frozenset({"ORDER_EXPIRED"})) and request.reference is not None:
        return Expired(request.reference, "ORDER_EXPIRED")
    return _not_accepted(refused, request)


def _needs_payer(refused: PayPalRefused, request: GatewayRequest) -> Outcome | Look:
    """The order has the payer's link; without an order there is nowhere to send the payer."""
    if request.reference is None:
        return Declined(DeclineReason.AUTHENTICATION_REQUIRED, refused.code)
    return Look(Pending(request.reference))


def _not_accepted(refused: PayPalRefused, request: GatewayRequest) -> Translation:
    if request.state is not OperationState.DISPATCHED:
        return Look(OutcomeUnknown(NAME, f"refused on a repeated attempt: {refused}"))
    proof = NotExecuted(f"refused by PayPal: {refused.code}", refused.code)
    return Look(proof) if refused.names(STATE_CONFLICTS | ENDED) else proof
