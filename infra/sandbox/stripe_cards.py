"""Stripe's test payment methods and their results. Source: https://docs.stripe.com/testing."""

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Card:
    """`declined_as` is (code, decline code); `refund_ends_as` is the status that a refund gets after a while."""

    declined_as: tuple[str, str | None] | None = None
    requires_action: bool = False
    refund_starts_as: str = "succeeded"
    refund_ends_as: str | None = None
    multicapture: str = "available"


def _declined(code: str, decline_code: str | None = None) -> Card:
    return Card(declined_as=(code, decline_code))


_SUCCESSFUL = (
    "visa visa_debit mastercard mastercard_debit mastercard_prepaid amex discover diners jcb unionpay"
    " authenticationRequiredSetupForOffSession amex_threeDSecureNotSupported bypassPending cvcCheckFail avsZipFail"
    " riskLevelElevated createDispute createIssuerFraudRecord"
)

CARDS: Final[dict[str, Card]] = {
    **{f"pm_card_{name}": Card() for name in _SUCCESSFUL.split()},
    "pm_card_credit_disableEnterpriseCardFeatures": Card(multicapture="unavailable"),
    "pm_card_visa_chargeDeclined": _declined("card_declined", "generic_decline"),
    "pm_card_chargeDeclined": _declined("card_declined", "generic_decline"),
    "pm_card_chargeCustomerFail": _declined("card_declined", "generic_decline"),
    "pm_card_visa_chargeDeclinedInsufficientFunds": _declined("card_declined", "insufficient_funds"),
    "pm_card_chargeDeclinedInsufficientFunds": _declined("card_declined", "insufficient_funds"),
    "pm_card_visa_chargeDeclinedLostCard": _declined("card_declined", "lost_card"),
    "pm_card_visa_chargeDeclinedStolenCard": _declined("card_declined", "stolen_card"),
    "pm_card_visa_chargeDeclinedVelocityLimitExceeded": _declined("card_declined", "card_velocity_exceeded"),
    "pm_card_radarBlock": _declined("card_declined", "fraudulent"),
    "pm_card_riskLevelHighest": _declined("card_declined", "fraudulent"),
    "pm_card_chargeDeclinedExpiredCard": _declined("expired_card"),
    "pm_card_chargeDeclinedIncorrectCvc": _declined("incorrect_cvc"),
    "pm_card_chargeDeclinedProcessingError": _declined("processing_error"),
    "pm_card_threeDSecure2Required": Card(requires_action=True),
    "pm_card_threeDSecureRequired": Card(requires_action=True),
    "pm_card_authenticationRequired": Card(requires_action=True),
    "pm_card_authenticationRequiredOnSetup": Card(requires_action=True),
    "pm_card_threeDSecureRequiredChargeDeclined": Card(("card_declined", "generic_decline"), requires_action=True),
    "pm_card_pendingRefund": Card(refund_starts_as="pending", refund_ends_as="succeeded"),
    "pm_card_refundFail": Card(refund_ends_as="failed"),
}


def find(payment_method: str) -> Card | None:
    """The card, or None if unknown. The simulator's own `pm_sandbox_…` tokens succeed, apart from their fault."""
    return Card() if payment_method.startswith("pm_sandbox_") else CARDS.get(payment_method)
