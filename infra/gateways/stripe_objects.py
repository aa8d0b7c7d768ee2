"""How Stripe's objects are read: amounts, our marks on them, the status table, and decline reasons.

Promise: an outcome is a success or a refusal only if the object says so explicitly, for this very operation. An object
that does not is `Pending` or `Unknown`, and one that contradicts the request is a broken contract. Every object that we
create or capture carries our payment id and operation number in its metadata. Nothing here sends a request.

Sources: https://docs.stripe.com/api/payment_intents, https://docs.stripe.com/api/refunds,
https://docs.stripe.com/payments/multicapture, at the version that `StripeConfig` pins.
"""

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, Final, TypeVar
from uuid import UUID

import stripe

from domain.commands import OperationKind
from domain.errors import GatewayContractBroken
from domain.money import MINOR_UNITS, Money
from domain.operations import (
    Declined,
    DeclineReason,
    Expired,
    GatewayRequest,
    NotExecuted,
    OperationState,
    Outcome,
    Pending,
    RequiresAction,
    Succeeded,
    Unknown,
)
from domain.ports import Statement

NAME: Final = "stripe"

HUNDREDTHS_WITHOUT_FRACTIONS: Final = frozenset({"ISK", "UGX"})
"""No decimals in ISO 4217, but Stripe takes them times 100. Source: https://docs.stripe.com/currencies."""

ROUNDED_TO_TEN: Final = frozenset({"BHD", "JOD", "KWD", "OMR", "TND"})
"""Three decimals, of which the last must be 0 at Stripe. Source: as above."""

CURRENCIES: Final = frozenset(MINOR_UNITS)

METADATA_KEYS_MAX: Final = 50
METADATA_KEY_CHARACTERS_MAX: Final = 40
METADATA_VALUE_CHARACTERS_MAX: Final = 500

LAST_CAPTURE: Final = "last_capture"
"""Metadata key on a PaymentIntent: the number of our operation that captured or released last.

It is sent with the capture itself, which merges metadata. A PaymentIntent shows only the sum of its captures; this mark
shows which operation made the last one. Our operations on one payment run one at a time.
"""

ACTION_WINDOW: Final = timedelta(hours=24)
"""As long as a Checkout Session, Stripe's own payment page, lives by default.

Source: https://docs.stripe.com/api/checkout/sessions/create, `expires_at`.
"""


# --- amounts and metadata -------------------------------------------------------------------------------------------


class AmountNotRepresentable(ValueError):
    """Stripe cannot represent this amount."""


def to_stripe_amount(money: Money) -> int:
    """The amount in Stripe's own scale.

    Raises:
        AmountNotRepresentable: unknown currency, or a third decimal that is not 0.
    """
    if money.currency not in CURRENCIES:
        raise AmountNotRepresentable(f"Stripe's scale of {money.currency} is unknown")
    if money.currency in ROUNDED_TO_TEN and money.minor % 10:
        raise AmountNotRepresentable(f"Stripe takes {money.currency} only with a last decimal of 0, not {money.minor}")
    return money.minor * 100 if money.currency in HUNDREDTHS_WITHOUT_FRACTIONS else money.minor


def from_stripe_amount(amount: int, currency: str) -> int:
    """Our minor units, from an amount in Stripe's scale.

    Raises:
        GatewayContractBroken: a fraction of a currency that has none.
    """
    if currency not in HUNDREDTHS_WITHOUT_FRACTIONS:
        return amount
    minor, rest = divmod(amount, 100)
    if rest:
        raise GatewayContractBroken(NAME, f"{currency} amount {amount} has a fraction")
    return minor


def marks_of(request: GatewayRequest) -> dict[str, str]:
    """What identifies this operation at Stripe."""
    return {"payment_id": str(request.payment_id), "operation_number": str(request.operation_number)}


def metadata_of(request: GatewayRequest) -> dict[str, str]:
    """The sender's metadata as far as Stripe's limits allow, and our marks, which take precedence.

    Source of the limits: https://docs.stripe.com/api/metadata.
    """
    own = marks_of(request)
    if request.order_id is not None:
        own["order_id"] = request.order_id[:METADATA_VALUE_CHARACTERS_MAX]
    kept = {
        key: value[:METADATA_VALUE_CHARACTERS_MAX]
        for key, value in request.metadata.items()
        if _is_usable_key(key) and key not in own
    }
    room = METADATA_KEYS_MAX - len(own) - 1  # one stays free, for LAST_CAPTURE
    return dict(list(kept.items())[:room]) | own


def _is_usable_key(key: str) -> bool:
    return 0 < len(key) <= METADATA_KEY_CHARACTERS_MAX and not set(key) & set("[]") and key != LAST_CAPTURE


# --- the status table: what Stripe's objects prove about an operation -----------------------------------------------


def read_opening(intent: stripe.PaymentIntent, request: GatewayRequest, action_window: timedelta) -> Outcome:
    """The outcome of the authorization or charge that created a PaymentIntent.

    The payer may act within `action_window` of its creation.

    Raises:
        GatewayContractBroken: another currency, or money was captured although only a hold was requested.
    """
    _check_currency(intent, request)
    match intent.status:
        case "requires_capture" if request.kind is OperationKind.AUTHORIZE:
            held = intent.amount_capturable + intent.amount_received
            return Succeeded(intent.id, from_stripe_amount(held, request.amount.currency), expires_at(intent))
        case "succeeded" if request.kind is OperationKind.CHARGE:
            return Succeeded(intent.id, from_stripe_amount(intent.amount_received, request.amount.currency))
        case "succeeded" | "canceled" if _is_lapsed(intent, request):
            return Expired(intent.id, intent.cancellation_reason or "closed")
        case "succeeded":
            raise GatewayContractBroken(NAME, f"{intent.id} is captured although only a hold was requested")
        case "requires_action" if intent.next_action is not None:
            action, end = intent.next_action, action_end(intent.created, action_window)
            return RequiresAction(intent.id, action.type, redirect_url(action), end)
        case "requires_payment_method" if intent.last_payment_error is not None:
            return declined(intent.last_payment_error, intent.id)
        case "canceled" if intent.amount_received == 0:
            return canceled(intent.id, intent.cancellation_reason)
        case _:
            return Pending(intent.id)


def canceled(reference: str, reason: str | None) -> Expired:
    """The outcome of a PaymentIntent that was canceled before any money was received, in a webhook or an answer.

    Stripe cancels one whose time is up, a person can cancel one in the dashboard, and we cancel one that its payer has
    abandoned. In each case nothing more moves. If a void of ours cancels it, the void ends the operation.
    """
    return Expired(reference, reason)


def _is_lapsed(intent: stripe.PaymentIntent, request: GatewayRequest) -> bool:
    """Whether a hold was closed with only our partial captures taken, so that nothing is left to capture."""
    captured = Money(request.captured_minor, request.amount.currency)
    is_asked_later = request.state is OperationState.SUCCEEDED and request.captured_minor > 0
    return is_asked_later and intent.amount_received == to_stripe_amount(captured)


def read_capture(intent: stripe.PaymentIntent, request: GatewayRequest) -> Outcome:
    """The outcome of one capture of a PaymentIntent.

    Evidence of success is our operation number in `LAST_CAPTURE`, and at least as much money received as the captures
    up to this one add up to. Evidence of failure is a PaymentIntent that was canceled without receiving anything:
    `canceled` is final at Stripe. Anything else is no evidence.

    Raises:
        GatewayContractBroken: another currency; or marked as captured by this operation, but its amounts or status
            contradict that.
    """
    _check_currency(intent, request)
    if _mark(intent) != str(request.operation_number):
        if intent.status == "canceled" and intent.amount_received == 0:
            message = f"the hold of {intent.id} was released before the capture"
            return NotExecuted(message, intent.cancellation_reason, is_hold_gone=True)
        return Unknown(f"{intent.id} shows no trace of operation {request.operation_number}")
    if intent.status == "processing":
        return Pending(intent.id)
    expected = Money(request.captured_minor + request.amount.minor, request.amount.currency)
    is_moved = intent.amount_received >= to_stripe_amount(expected)
    if is_moved and intent.status in ("succeeded", "requires_capture"):
        return Succeeded(intent.id)
    raise GatewayContractBroken(
        NAME, f"{intent.id} is {intent.status} and marked as captured, but its amounts contradict that"
    )


def read_void(intent: stripe.PaymentIntent, request: GatewayRequest) -> Outcome:
    """The outcome of releasing the hold of a PaymentIntent.

    It does not matter who released it, so the state is the evidence: `canceled` without money received, or closed as
    `succeeded` with exactly the voided amount not received (after partial captures).

    Raises:
        GatewayContractBroken: another currency.
    """
    _check_currency(intent, request)
    released = intent.amount - intent.amount_received
    match intent.status:
        case "canceled" if intent.amount_received == 0:
            return Succeeded(intent.id)
        case "succeeded" if released == to_stripe_amount(request.amount):
            return Succeeded(intent.id)
        case "processing":
            return Pending(intent.id)
        case _:
            return Unknown(f"{intent.id} is {intent.status} and shows no release of the hold")


def read_refund(refund: stripe.Refund, request: GatewayRequest) -> Outcome:
    """The outcome of a Refund. `requires_action` waits for something that the payer does elsewhere, so it is pending.

    Raises:
        GatewayContractBroken: another currency.
    """
    _check_currency(refund, request)
    match refund.status:
        case "succeeded":
            return Succeeded(refund.id, from_stripe_amount(refund.amount, request.amount.currency))
        case "failed" | "canceled":
            return Declined(DeclineReason.REFUND_FAILED, getattr(refund, "failure_reason", None), refund.id)
        case _:
            return Pending(refund.id)


def _check_currency(shown: stripe.PaymentIntent | stripe.Refund, request: GatewayRequest) -> None:
    if shown.currency.upper() != request.amount.currency:
        raise GatewayContractBroken(NAME, f"{shown.id} is in {shown.currency}, not in {request.amount.currency}")


def expires_at(intent: stripe.PaymentIntent) -> datetime | None:
    """When Stripe releases the hold by itself; None if the charge is not expanded or does not say."""
    details = getattr(intent.latest_charge, "payment_method_details", None)
    capture_before = getattr(getattr(details, "card", None), "capture_before", None)
    return datetime.fromtimestamp(capture_before, UTC) if isinstance(capture_before, int) else None


def action_end(created: int, window: timedelta) -> datetime:
    """Until when the payer may act. Counted from the object's creation, so that answers and webhooks agree on it."""
    return datetime.fromtimestamp(created, UTC) + window


def redirect_url(action: Any) -> str | None:
    url = getattr(getattr(action, "redirect_to_url", None), "url", None)
    return url if isinstance(url, str) else None


def _mark(intent: stripe.PaymentIntent) -> str | None:
    return intent.metadata[LAST_CAPTURE] if LAST_CAPTURE in intent.metadata else None  # noqa: SIM401 - not a dict


# --- declines -------------------------------------------------------------------------------------------------------

_REASONS: Final[Mapping[DeclineReason, str]] = {
    DeclineReason.INSUFFICIENT_FUNDS: "insufficient_funds",
    DeclineReason.CARD_EXPIRED: "expired_card invalid_expiry_month invalid_expiry_year",
    DeclineReason.INVALID_CARD_DATA: (
        "incorrect_number invalid_number incorrect_cvc invalid_cvc incorrect_zip incorrect_address incorrect_pin"
        " invalid_pin invalid_account invalid_amount new_account_information_available"
    ),
    DeclineReason.AUTHENTICATION_REQUIRED: (
        "authentication_required authentication_not_handled online_or_offline_pin_required offline_pin_required"
    ),
    DeclineReason.AUTHENTICATION_FAILED: "payment_intent_authentication_failure setup_intent_authentication_failure",
    DeclineReason.SUSPECTED_FRAUD: (
        "fraudulent highest_risk_level lost_card stolen_card pickup_card merchant_blacklist security_violation"
    ),
    DeclineReason.LIMIT_EXCEEDED: "card_velocity_exceeded withdrawal_count_limit_exceeded pin_try_exceeded",
    DeclineReason.METHOD_NOT_SUPPORTED: "card_not_supported currency_not_supported service_not_allowed",
    DeclineReason.PROCESSING_ERROR: (
        "processing_error issuer_not_available reenter_transaction try_again_later approve_with_id"
    ),
    DeclineReason.REFUSED_BY_ISSUER: (
        "generic_decline do_not_honor card_declined call_issuer restricted_card transaction_not_allowed not_permitted"
        " no_action_taken stop_payment_order revocation_of_authorization revocation_of_all_authorizations"
        " do_not_try_again testmode_decline live_mode_test_card duplicate_transaction"
    ),
}
DECLINE_REASONS: Final[Mapping[str, DeclineReason]] = {
    code: reason for reason, codes in _REASONS.items() for code in codes.split()
}
"""Stripe's decline codes and card error codes. Source: https://docs.stripe.com/declines/codes."""


def declined(error: Any, reference: str | None) -> Declined:
    """The decline in an error object, with its decline code, or its error code if it has none."""
    decline_code, code = getattr(error, "decline_code", None), getattr(error, "code", None)
    reason = DECLINE_REASONS.get(decline_code or "") or DECLINE_REASONS.get(code or "") or DeclineReason.OTHER
    return Declined(reason, decline_code or code, reference)


# --- lists ----------------------------------------------------------------------------------------------------------


Marked = TypeVar("Marked", stripe.PaymentIntent, stripe.Refund)


def only(objects: list[Marked], marks: Mapping[str, str]) -> Marked | None:
    """The object that carries these marks, or None.

    Raises:
        GatewayContractBroken: several do: the operation was executed more than once.
    """
    found = [each for each in objects if _carries(each.metadata, marks)]
    if len(found) > 1:
        raise GatewayContractBroken(NAME, f"several objects for {dict(marks)}: {[each.id for each in found]}")
    return found[0] if found else None


def _carries(metadata: Any, marks: Mapping[str, str]) -> bool:
    return metadata is not None and all(key in metadata and metadata[key] == value for key, value in marks.items())


def statement_of(intent: stripe.PaymentIntent) -> Statement:
    currency = intent.currency.upper()
    refunded = getattr(intent.latest_charge, "amount_refunded", 0)
    mark = intent.metadata["payment_id"] if "payment_id" in intent.metadata else None  # noqa: SIM401 - not a dict
    return Statement(
        intent.id,
        _payment_id(mark),
        currency,
        from_stripe_amount(intent.amount_received, currency),
        from_stripe_amount(refunded, currency),
    )


def _payment_id(mark: str | None) -> UUID | None:
    try:
        return UUID(mark) if mark else None
    except ValueError:
        return None
