"""All that we know about Stripe: configuration, capabilities, requests, the status table and the error table.

Promise: a success or a refusal is reported only on Stripe's explicit word for this very operation. Whatever we cannot
read is `Pending` or an `OutcomeUnknown`. Every POST carries `request.provider_key`, and every object that we create or
capture carries our payment id and operation number in its metadata, so that an answer that got lost can be found.

Sources: https://docs.stripe.com/api/payment_intents, https://docs.stripe.com/api/refunds,
https://docs.stripe.com/error-low-level, https://docs.stripe.com/payments/multicapture, at the version that
`StripeConfig` pins.
"""

import asyncio
import logging
import re
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final, TypeVar, assert_never
from uuid import UUID

import httpx
import stripe
from pydantic import BaseModel, ConfigDict, SecretStr
from stripe.params import (
    PaymentIntentCaptureParams,
    PaymentIntentCreateParams,
    PaymentIntentListParams,
    RefundCreateParams,
)

from domain.capabilities import AmountLimits, Capabilities, Listing
from domain.commands import OperationKind
from domain.errors import GatewayContractBroken, GatewayError, GatewayUnreachable, OutcomeUnknown
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
from domain.ports import Clock, Connections, Statement
from infra.gateways.transport import NOTHING_WAS_SENT, Rest, create_client

NAME: Final = "stripe"

HUNDREDTHS_WITHOUT_FRACTIONS: Final = frozenset({"ISK", "UGX"})
"""No decimals in ISO 4217, but sent to Stripe times 100. Source: https://docs.stripe.com/currencies."""

ROUNDED_TO_TEN: Final = frozenset({"BHD", "JOD", "KWD", "OMR", "TND"})
"""Three decimals, of which Stripe takes the last one only as 0. Source: as above."""

CURRENCIES: Final = frozenset(MINOR_UNITS)

MINIMUMS: Final[Mapping[str, int]] = {
    **dict.fromkeys(("AUD", "BRL", "CAD", "CHF", "EUR", "INR", "JPY", "NZD", "SGD", "USD"), 50),
    **dict.fromkeys(("AED", "MYR", "PLN", "RON"), 200),
    **dict.fromkeys(("NOK", "SEK"), 300),
    **dict.fromkeys(("MXN", "THB"), 1_000),
    **{"BGN": 100, "CZK": 1_500, "DKK": 250, "GBP": 30, "HKD": 400, "HUF": 17_500},
}
"""In minor units, for settlement in the same currency. Source: https://docs.stripe.com/currencies."""

MAXIMUMS: Final[Mapping[str, int]] = {"HUF": 9_999_999_999, "IDR": 999_999_999_999, "INR": 999_999_999}
MAXIMUM: Final = 99_999_999
"""Eight digits, in Stripe's units, for every currency not named above (JPY has more for cards). Source: as above."""

METADATA_KEYS_MAX: Final = 50
METADATA_KEY_CHARACTERS_MAX: Final = 40
METADATA_VALUE_CHARACTERS_MAX: Final = 500

LAST_CAPTURE: Final = "last_capture"
"""Metadata of a PaymentIntent: the number of our operation that captured or released last.

It is sent with the capture itself, which merges metadata. A PaymentIntent only tells the sum of its captures, so this
is what says whose effect the last one was; our operations of one payment run one at a time.
"""

LIST_PAGES_MAX: Final = 3

ACTION_WINDOW: Final = timedelta(hours=24)
"""As long as a Checkout Session, Stripe's own page for payers, lives by default.

Source: https://docs.stripe.com/api/checkout/sessions/create, `expires_at`.
"""

# The SDK logs whole bodies at DEBUG and Stripe's texts at INFO; neither belongs in our logs.
logging.getLogger("stripe").setLevel(logging.WARNING)

T = TypeVar("T")


class StripeConfig(BaseModel):
    """How to reach Stripe. `api_base` is None for the real one; the key decides between live and test mode.

    `multi_capture` asks for several captures per authorization, which Stripe grants per account and card
    (https://docs.stripe.com/payments/multicapture); where False, the first capture releases the rest. Where True, a
    capture of a part is refused with a card that has no multicapture.
    """

    model_config = ConfigDict(frozen=True)

    api_key: SecretStr
    api_base: str | None = None
    api_version: str = "2026-10-28.endive"
    timeout_seconds: float = 20.0
    """From the first byte sent to the last byte read, waiting for a connection included."""
    connect_timeout_seconds: float = 5.0
    max_connections: int = 64
    return_url: str = "https://example.invalid/return"
    """Where Stripe sends the payer's browser after 3-D Secure."""
    multi_capture: bool = False
    action_window: timedelta = ACTION_WINDOW
    """How long a payer may take for 3-D Secure, from the PaymentIntent's creation. Stripe itself waits for ever."""


# --- amounts and metadata -------------------------------------------------------------------------------------------


class AmountNotRepresentable(ValueError):
    """Stripe has no form for this amount."""


def to_stripe_amount(money: Money) -> int:
    """The amount in Stripe's own scale.

    Raises:
        AmountNotRepresentable: unknown currency, or a third decimal that is not 0.
    """
    if money.currency not in CURRENCIES:
        raise AmountNotRepresentable(f"Stripe's scale of {money.currency} is not known here")
    if money.currency in ROUNDED_TO_TEN and money.minor % 10:
        raise AmountNotRepresentable(f"Stripe takes {money.currency} only with a last decimal of 0, not {money.minor}")
    return money.minor * 100 if money.currency in HUNDREDTHS_WITHOUT_FRACTIONS else money.minor


def from_stripe_amount(amount: int, currency: str) -> int:
    """Our minor units of an amount that Stripe tells.

    Raises:
        GatewayContractBroken: a fraction where this currency has none.
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
    """The sender's metadata as far as Stripe takes it, and our marks, which win.

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
    room = METADATA_KEYS_MAX - len(own) - 1  # one stays free for LAST_CAPTURE
    return dict(list(kept.items())[:room]) | own


def _is_usable_key(key: str) -> bool:
    return 0 < len(key) <= METADATA_KEY_CHARACTERS_MAX and not set(key) & set("[]") and key != LAST_CAPTURE


# --- the status table: what Stripe's objects say about an operation -------------------------------------------------


def read_opening(intent: stripe.PaymentIntent, request: GatewayRequest, action_window: timedelta) -> Outcome:
    """What a PaymentIntent says about the authorization or charge that created it.

    Its payer may take `action_window`, from its creation.

    Raises:
        GatewayContractBroken: another currency; or money was captured although only a hold was asked for.
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
            raise GatewayContractBroken(NAME, f"{intent.id} is captured although only a hold was asked for")
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
    """What a PaymentIntent says that was canceled before any money was received, in a webhook as in an answer.

    Stripe cancels what is past its time, and so can people in the dashboard: it is the same end, nothing more moves.
    So is it where we cancel what its payer has abandoned. What we cancel for a void is ended by the void.
    """
    return Expired(reference, reason)


def _is_lapsed(intent: stripe.PaymentIntent, request: GatewayRequest) -> bool:
    """Whether a hold of which we captured a part was closed with that: nothing is left to capture."""
    captured = Money(request.captured_minor, request.amount.currency)
    is_asked_later = request.state is OperationState.SUCCEEDED and request.captured_minor > 0
    return is_asked_later and intent.amount_received == to_stripe_amount(captured)


def read_capture(intent: stripe.PaymentIntent, request: GatewayRequest) -> Outcome:
    """What a PaymentIntent says about one of its captures.

    Evidence of success is our operation number in `LAST_CAPTURE` together with as much money received as
    all captures up to this one come to.
    Evidence of failure is a canceled PaymentIntent that never received anything: `canceled` is final at Stripe.
    Everything else is no evidence.

    Raises:
        GatewayContractBroken: another currency; or marked as captured by this operation, but the amounts or the status
            deny it.
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
    raise GatewayContractBroken(NAME, f"{intent.id} is {intent.status} and marked as captured, but its amounts deny it")


def read_void(intent: stripe.PaymentIntent, request: GatewayRequest) -> Outcome:
    """What a PaymentIntent says about releasing its hold.

    Releasing is the same whoever does it, so the state is the evidence: `canceled` without money received, or closed
    as `succeeded` with exactly the voided amount not received (after partial captures).

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
    """What a Refund says. `requires_action` waits for the payer outside of our reach, so it is pending.

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


def _check_currency(told: stripe.PaymentIntent | stripe.Refund, request: GatewayRequest) -> None:
    if told.currency.upper() != request.amount.currency:
        raise GatewayContractBroken(NAME, f"{told.id} is in {told.currency}, not in {request.amount.currency}")


def expires_at(intent: stripe.PaymentIntent) -> datetime | None:
    """When Stripe releases the hold by itself, if the charge is expanded and says so."""
    details = getattr(intent.latest_charge, "payment_method_details", None)
    capture_before = getattr(getattr(details, "card", None), "capture_before", None)
    return datetime.fromtimestamp(capture_before, UTC) if isinstance(capture_before, int) else None


def action_end(created: int, window: timedelta) -> datetime:
    """Until when a payer may act. Counted from the object's own time, so that whatever tells it tells the same."""
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
    """From an error object: the decline code where there is one, the error code otherwise."""
    decline_code, code = getattr(error, "decline_code", None), getattr(error, "code", None)
    reason = DECLINE_REASONS.get(decline_code or "") or DECLINE_REASONS.get(code or "") or DeclineReason.OTHER
    return Declined(reason, decline_code or code, reference)


# --- the error table: what an exception of the SDK says about an operation ------------------------------------------


@dataclass(frozen=True, slots=True)
class Look:
    """The error alone does not tell: look for evidence, and without any take `otherwise`."""

    otherwise: NotExecuted | OutcomeUnknown


Verdict = Declined | NotExecuted | GatewayUnreachable | OutcomeUnknown | Look

STATE_CONFLICTS: Final = frozenset(
    {
        "payment_intent_unexpected_state",
        "intent_invalid_state",
        "charge_already_captured",
        "charge_already_refunded",
        "charge_expired_for_capture",
        "capture_charge_authorization_expired",
        "capture_unauthorized_payment",
    }
)
"""The object is not in the state that the call needs: perhaps because this very operation was executed before."""


def verdict_of(error: Exception, request: GatewayRequest) -> Verdict:
    """What an exception of a POST says about `request`; what the table does not know is a broken contract."""
    translate = TRANSLATIONS.get(type(error), _not_understood)
    return translate(error, request)


def _card_error(error: Any, request: GatewayRequest) -> Verdict:
    """A refusal, also when it is the stored answer to an earlier attempt: that attempt was refused as well."""
    details = error.error
    if details is None or details.type != "card_error":
        return _not_understood(error, request)
    refusal = declined(details, getattr(getattr(details, "payment_intent", None), "id", None))
    if request.kind is OperationKind.REFUND:
        return Declined(DeclineReason.REFUND_FAILED, refusal.code, None)
    return refusal


def _invalid_request(error: Any, request: GatewayRequest) -> Verdict:
    """A 400 or 404. Whether it is proof depends on what may have happened before it.

    Replayed, it is Stripe's stored answer to this operation; on an operation of which no attempt is unaccounted for,
    it is the answer to the only attempt that arrived. Otherwise the lost attempt may have caused the very state that
    is complained about.
    """
    refused = NotExecuted(_safe(error.user_message), error.code)
    if _is_replayed(error):
        return refused
    if request.state is not OperationState.DISPATCHED:
        return Look(OutcomeUnknown(NAME, f"refused on a repeated attempt: {_facts(error)}"))
    return Look(refused) if error.code in STATE_CONFLICTS else refused


def _rejected_before_execution(error: Any, request: GatewayRequest) -> Verdict:
    """Limiters and authentication run before Stripe looks at the idempotency key: proof for this attempt only."""
    return GatewayUnreachable(NAME, _facts(error))


def _key_conflict(error: Any, request: GatewayRequest) -> Verdict:
    """Our key was used with other parameters, say by a release with another return URL: something was asked for before.

    https://docs.stripe.com/api/idempotent_requests
    """
    return Look(GatewayContractBroken(NAME, f"this key was used with other parameters: {_facts(error)}"))


def _connection_error(error: Any, request: GatewayRequest) -> Verdict:
    cause = type(error.__cause__).__name__
    if not isinstance(error.__cause__, httpx.HTTPError):
        return GatewayContractBroken(NAME, f"the call failed on our side of the connection ({cause})")
    if isinstance(error.__cause__, NOTHING_WAS_SENT):
        return GatewayUnreachable(NAME, f"not connected ({cause})")
    return OutcomeUnknown(NAME, f"the connection failed before an answer could be read ({cause})")


def _api_error(error: Any, request: GatewayRequest) -> Verdict:
    """409, 5xx, anything that is not JSON, and statuses that Stripe does not document.

    A 409 says that a request with our key is being executed right now, so it is the opposite of proof. A replayed 5xx
    will be replayed for as long as Stripe keeps the key: only evidence can help then.
    """
    unknown = OutcomeUnknown(NAME, _facts(error))
    if error.error is None or error.http_status == 409:
        return unknown
    if error.http_status is not None and error.http_status >= 500:
        return Look(unknown) if _is_replayed(error) else unknown
    return _not_understood(error, request)


def _not_understood(error: Any, request: GatewayRequest) -> Verdict:
    return GatewayContractBroken(NAME, f"{type(error).__name__} is not understood: {_facts(error)}")


TRANSLATIONS: Final[Mapping[type[Exception], Callable[[Any, GatewayRequest], Verdict]]] = {
    stripe.CardError: _card_error,
    stripe.InvalidRequestError: _invalid_request,
    stripe.IdempotencyError: _key_conflict,
    stripe.RateLimitError: _rejected_before_execution,
    stripe.AuthenticationError: _rejected_before_execution,
    stripe.PermissionError: _rejected_before_execution,
    stripe.APIConnectionError: _connection_error,
    stripe.APIError: _api_error,
    # Base classes, webhooks, and errors of Stripe's v2 API, which none of our calls uses.
    stripe.StripeError: _not_understood,
    stripe.StripeErrorWithParamCode: _not_understood,
    stripe.SignatureVerificationError: _not_understood,
    stripe.AlreadyCanceledError: _not_understood,
    stripe.BlockedByStripeError: _not_understood,
    stripe.CannotProceedError: _not_understood,
    stripe.CapabilityNotEnabledError: _not_understood,
    stripe.ControlledByAlternateResourceError: _not_understood,
    stripe.FeatureNotEnabledError: _not_understood,
    stripe.FinancialAccountNotOpenError: _not_understood,
    stripe.FxQuoteNeedsRefreshError: _not_understood,
    stripe.InsufficientFundsError: _not_understood,
    stripe.InvalidPaymentMethodError: _not_understood,
    stripe.InvalidPayoutMethodError: _not_understood,
    stripe.InvalidVaultedCredentialError: _not_understood,
    stripe.NotCancelableError: _not_understood,
    stripe.QuotaExceededError: _not_understood,
    stripe.RecipientNotNotifiableError: _not_understood,
    stripe.TemporarySessionExpiredError: _not_understood,
    stripe.VerificationAttemptFailedError: _not_understood,
    stripe.VerificationExpiredError: _not_understood,
    stripe.VerificationNotInitiatedError: _not_understood,
}
"""Every exception that the SDK exports. Source: https://docs.stripe.com/error-handling, stripe 16.1.0."""


def _is_replayed(error: Any) -> bool:
    return str((error.headers or {}).get("idempotent-replayed", "")).lower() == "true"


def _facts(error: Any) -> str:
    """What may be logged of an error: never Stripe's text, which can quote what was sent."""
    details = getattr(error, "error", None)
    facts = {
        "status": getattr(error, "http_status", None),
        "type": getattr(details, "type", None),
        "code": getattr(details, "code", None),
        "request": getattr(error, "request_id", None),
    }
    return ", ".join(f"{name} {value}" for name, value in facts.items() if value is not None) or "no details"


def _safe(message: str | None) -> str:
    """Stripe's text for the sender of the command, without anything that looks like a key of ours."""
    return re.sub(r"\b(sk|rk|pk|whsec|ek)_\S+", "[removed]", message or "refused by Stripe")[:300]


# --- the gateway ----------------------------------------------------------------------------------------------------


class StripeGateway:
    """Stripe's PaymentIntents and Refunds, for cards. Create it inside the event loop that uses it.

    By `clock` it tells whether a payer's time is over. Each method may be called any number of times with the same
    request: within Stripe's memory of the key the second call returns the first one's answer. A message of an exception
    never contains a secret or a body.
    """

    name = NAME

    def __init__(self, config: StripeConfig, clock: Clock = lambda: datetime.now(UTC)) -> None:
        stripe.enable_telemetry = False  # it reports timings and writes an id to the home folder
        self._config = config
        self._clock = clock
        self._http = _BoundedHttpClient(config)
        self._api = stripe.StripeClient(
            config.api_key.get_secret_value(),
            stripe_version=config.api_version,
            base_addresses={"api": config.api_base} if config.api_base else None,
            max_network_retries=0,
            http_client=self._http,
        ).v1
        self.capabilities = Capabilities(
            operations=frozenset(OperationKind),
            currencies=CURRENCIES,
            partial_capture=True,
            multi_capture=config.multi_capture,
            partial_refund=True,
            off_session=True,
            cancel_waiting=True,
            idempotency_retention=timedelta(hours=23),  # Stripe promises 24
            listing=Listing.PAYMENTS,
            limits={
                currency: AmountLimits(
                    MINIMUMS.get(currency, 1), from_stripe_amount(_maximum_in_stripes_units(currency), currency)
                )
                for currency in CURRENCIES
            },
        )

    async def authorize(self, request: GatewayRequest) -> Outcome:
        """Hold `request.amount` for a later capture; `expires_at` is when Stripe lets go of it."""
        return await self._open(request, capture_method="manual")

    async def charge(self, request: GatewayRequest) -> Outcome:
        """Take `request.amount` at once."""
        return await self._open(request, capture_method="automatic")

    async def capture(self, request: GatewayRequest) -> Outcome:
        """Take `request.amount` of the hold; `request.is_final` releases what is left of it."""
        return await self._capture(request, request.amount, is_final=request.is_final, read=read_capture)

    async def void(self, request: GatewayRequest) -> Outcome:
        """Release what is left of the hold.

        Stripe cancels an untouched hold, but closes a partly captured one by a final capture of 0, so the
        PaymentIntent is read first; where the hold is gone already, nothing is sent.

        Source: https://docs.stripe.com/payments/multicapture, "Release uncaptured funds".
        """
        if not self._config.multi_capture:
            return await self._cancel(request)
        try:
            intent = await self._payment_intent(_payment_of(request))
        except GatewayError as error:
            raise GatewayUnreachable(NAME, f"nothing was released: {error.message}") from error
        if intent is None or intent.status != "requires_capture" or not intent.amount_received:
            is_released = intent is not None and isinstance(read_void(intent, request), Succeeded)
            return Succeeded(_payment_of(request)) if is_released else await self._cancel(request)
        nothing = Money(0, request.amount.currency)
        return await self._capture(request, nothing, is_final=True, read=read_void)

    async def refund(self, request: GatewayRequest) -> Outcome:
        """Return `request.amount` of the captured money; Stripe may need days, which is `Pending`."""
        try:
            params: RefundCreateParams = {
                "payment_intent": _payment_of(request),
                "amount": to_stripe_amount(request.amount),
                "metadata": metadata_of(request),
            }
        except AmountNotRepresentable as error:
            return NotExecuted(str(error))
        return await self._post(
            request,
            lambda options: self._api.refunds.create_async(params, options),
            read_refund,
        )

    async def resume(self, request: GatewayRequest) -> Outcome:
        """Ask: Stripe goes on by itself once the payer has acted. What the payer has abandoned is canceled.

        For Stripe would let it be paid at any time to come, long after the order service has given up the order.

        Raises:
            GatewayUnreachable: the question or the cancellation did not arrive.
            OutcomeUnknown: there was no readable answer; the next call asks again.
        """
        told = await self.status(request)
        if not isinstance(told, RequiresAction) or told.expires_at is None or self._clock() < told.expires_at:
            return told
        return await self._abandon(request._replace(reference=told.reference))

    async def status(self, request: GatewayRequest) -> Outcome:
        """What Stripe shows of this operation. Causes nothing.

        An authorization or charge without a reference is searched for by our metadata. Stripe's search lags by a minute
        or more, so not finding it proves nothing.

        Raises:
            GatewayUnreachable: the question did not arrive.
            OutcomeUnknown: there was no readable answer to it.
        """
        match request.kind:
            case OperationKind.AUTHORIZE | OperationKind.CHARGE:
                intent = await self._find_opened(request)
                return (
                    _understood(self._read_opening, intent, request)
                    if intent
                    else Unknown("Stripe shows no such payment")
                )
            case OperationKind.CAPTURE:
                intent = await self._payment_intent(_payment_of(request))
                return _understood(read_capture, intent, request) if intent else Unknown("Stripe shows no such payment")
            case OperationKind.VOID:
                intent = await self._payment_intent(_payment_of(request))
                return _understood(read_void, intent, request) if intent else Unknown("Stripe shows no such payment")
            case OperationKind.REFUND:
                refund = await self._find_refund(request)
                return _understood(read_refund, refund, request) if refund else Unknown("Stripe shows no such refund")
            case _:
                assert_never(request.kind)

    async def statements(self, since: datetime, until: datetime) -> AsyncIterator[Statement]:
        """Every PaymentIntent created in this time, with what was received and refunded of it.

        Raises:
            GatewayError: the list could not be read to its end.
        """
        params: PaymentIntentListParams = {
            "created": {"gte": int(since.timestamp()), "lt": int(until.timestamp())},
            "limit": 100,
            "expand": ["data.latest_charge"],
        }
        while True:
            page = await self._answer(self._api.payment_intents.list_async(params))
            if page is None:
                raise GatewayContractBroken(NAME, "a list was refused")
            for intent in page.data:
                yield _statement(intent)
            if not page.has_more:
                return
            params["starting_after"] = page.data[-1].id

    def rests_seconds(self) -> float:
        return self._http.rest.seconds()

    def connections(self) -> Connections:
        return self._http.connections()

    async def close(self) -> None:
        """Close the connections."""
        await self._http.close_async()

    # --- mutating calls ---------------------------------------------------------------------------------------------

    async def _open(self, request: GatewayRequest, *, capture_method: str) -> Outcome:
        try:
            params = self._opening_params(request, capture_method)
        except AmountNotRepresentable as error:
            return NotExecuted(str(error))
        return await self._post(
            request,
            lambda options: self._api.payment_intents.create_async(params, options),
            self._read_opening,
        )

    def _read_opening(self, intent: stripe.PaymentIntent, request: GatewayRequest) -> Outcome:
        return read_opening(intent, request, self._config.action_window)

    def _opening_params(self, request: GatewayRequest, capture_method: str) -> PaymentIntentCreateParams:
        params: PaymentIntentCreateParams = {
            "amount": to_stripe_amount(request.amount),
            "currency": request.amount.currency.lower(),
            "capture_method": capture_method,
            "confirm": True,
            "allowed_payment_method_types": ["card"],
            "return_url": self._config.return_url,
            "metadata": metadata_of(request),
            "expand": ["latest_charge"],
        }
        if request.payment_method is not None:
            params["payment_method"] = request.payment_method
        if request.customer_id is not None and request.customer_id.startswith("cus_"):
            params["customer"] = request.customer_id
        if request.off_session:
            params["off_session"] = True
        if capture_method == "manual" and self._config.multi_capture:
            params["payment_method_options"] = {"card": {"request_multicapture": "if_available"}}
        return params

    async def _capture(
        self,
        request: GatewayRequest,
        amount: Money,
        *,
        is_final: bool,
        read: Callable[[stripe.PaymentIntent, GatewayRequest], Outcome],
    ) -> Outcome:
        try:
            params: PaymentIntentCaptureParams = {
                "amount_to_capture": to_stripe_amount(amount),
                "metadata": {LAST_CAPTURE: str(request.operation_number)},
            }
        except AmountNotRepresentable as error:
            return NotExecuted(str(error))
        if self._config.multi_capture and not is_final:
            params["final_capture"] = False  # Stripe's default is True; either is refused without multicapture
        return await self._post(
            request,
            lambda options: self._api.payment_intents.capture_async(_payment_of(request), params, options),
            read,
        )

    async def _cancel(self, request: GatewayRequest) -> Outcome:
        return await self._post(
            request,
            lambda options: self._api.payment_intents.cancel_async(
                _payment_of(request), {"cancellation_reason": "requested_by_customer"}, options
            ),
            read_void,
        )

    async def _abandon(self, request: GatewayRequest) -> Outcome:
        """Cancel a PaymentIntent whose payer did not come in time, and tell what Stripe says of it then.

        Only `canceled` is evidence that nothing was paid and nothing will be. Where Stripe refuses, the payer may have
        been faster, so that it is asked again: a refusal to cancel proves nothing by itself. A hold that the payer
        consents to in this very moment is released by it. The key is the cancellation's own: under the operation's,
        Stripe would answer as it did when the PaymentIntent was created.

        Source: https://docs.stripe.com/api/payment_intents/cancel.
        """
        assert request.reference is not None, "Stripe has named it"
        key = f"{request.provider_key}:abandoned"
        intent = await self._answer(
            self._api.payment_intents.cancel_async(
                request.reference, {"cancellation_reason": "abandoned"}, {"idempotency_key": key}
            )
        )
        return await self.status(request) if intent is None else _understood(self._read_opening, intent, request)

    async def _post(
        self,
        request: GatewayRequest,
        call: Callable[[stripe.RequestOptions], Awaitable[T]],
        read: Callable[[T, GatewayRequest], Outcome],
    ) -> Outcome:
        """Send with the operation's key and read the answer, or say what is known without one."""
        try:
            answer = await self._in_time(call({"idempotency_key": request.provider_key}))
        except stripe.StripeError as error:
            return await self._conclude(verdict_of(error, request), request, error)
        return _understood(read, answer, request)

    async def _conclude(self, verdict: Verdict, request: GatewayRequest, error: stripe.StripeError) -> Outcome:
        match verdict:
            case Declined() | NotExecuted():
                return verdict
            case Look(otherwise):
                return await self._look(request, otherwise, error)
            case GatewayError():
                raise verdict from error
            case _:
                assert_never(verdict)

    async def _look(
        self, request: GatewayRequest, otherwise: NotExecuted | OutcomeUnknown, error: stripe.StripeError
    ) -> Outcome:
        """Evidence of this operation at Stripe, else `otherwise`. Not being able to look is no proof of anything."""
        try:
            found = await self.status(request)
        except GatewayError as failure:
            raise OutcomeUnknown(NAME, f"{_facts(error)}; no evidence: {failure.message}") from error
        if not isinstance(found, Unknown):
            return found
        if isinstance(otherwise, NotExecuted):
            return otherwise
        raise otherwise from error

    # --- questions --------------------------------------------------------------------------------------------------

    async def _payment_intent(self, reference: str) -> stripe.PaymentIntent | None:
        return await self._answer(self._api.payment_intents.retrieve_async(reference, {"expand": ["latest_charge"]}))

    async def _find_opened(self, request: GatewayRequest) -> stripe.PaymentIntent | None:
        if request.reference is not None:
            return await self._payment_intent(request.reference)
        marks = marks_of(request)
        query = " AND ".join(f"metadata['{key}']:'{value}'" for key, value in marks.items())
        found = await self._answer(
            self._api.payment_intents.search_async({"query": query, "expand": ["data.latest_charge"]})
        )
        if found is not None and found.data:
            return _only(found.data, marks)
        return await self._find_recent(request, marks)

    async def _find_recent(self, request: GatewayRequest, marks: Mapping[str, str]) -> stripe.PaymentIntent | None:
        """Look through the newest PaymentIntents, which search may not show yet."""
        if request.first_dispatched_at is None:
            return None
        params: PaymentIntentListParams = {
            "created": {"gte": int(request.first_dispatched_at.timestamp()) - 60},
            "limit": 100,
            "expand": ["data.latest_charge"],
        }
        for _ in range(LIST_PAGES_MAX):
            page = await self._answer(self._api.payment_intents.list_async(params))
            found = _only(page.data, marks) if page is not None else None
            if found is not None or page is None or not page.has_more:
                return found
            params["starting_after"] = page.data[-1].id
        return None

    async def _find_refund(self, request: GatewayRequest) -> stripe.Refund | None:
        if request.reference is not None:
            return await self._answer(self._api.refunds.retrieve_async(request.reference))
        page = await self._answer(self._api.refunds.list_async({"payment_intent": _payment_of(request), "limit": 100}))
        return _only(page.data, marks_of(request)) if page is not None else None

    async def _answer(self, call: Awaitable[T]) -> T | None:
        """What Stripe answers; None where it refuses, as it does to a question about what does not exist."""
        try:
            return await self._in_time(call)
        except stripe.InvalidRequestError:
            return None
        except (stripe.RateLimitError, stripe.AuthenticationError, stripe.PermissionError) as error:
            raise GatewayUnreachable(NAME, _facts(error)) from error
        except stripe.APIConnectionError as error:
            is_sent = not isinstance(error.__cause__, NOTHING_WAS_SENT)
            failure = OutcomeUnknown if is_sent else GatewayUnreachable
            raise failure(NAME, f"no answer ({type(error.__cause__).__name__})") from error
        except stripe.StripeError as error:
            raise OutcomeUnknown(NAME, _facts(error)) from error

    async def _in_time(self, call: Awaitable[T]) -> T:
        """Cancelling our own task passes through; whatever else is no `StripeError` is an answer we cannot read.

        Raises:
            OutcomeUnknown: the time is up.
            GatewayContractBroken: the SDK stumbled over the answer.
        """
        try:
            async with asyncio.timeout(self._config.timeout_seconds):
                return await call
        except stripe.StripeError:
            raise
        except TimeoutError as error:
            raise OutcomeUnknown(NAME, f"no answer within {self._config.timeout_seconds} s") from error
        except Exception as error:
            raise GatewayContractBroken(NAME, f"{type(error).__name__} while reading an answer") from error


def _statement(intent: stripe.PaymentIntent) -> Statement:
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


def _maximum_in_stripes_units(currency: str) -> int:
    maximum = MAXIMUMS.get(currency, MAXIMUM)
    return maximum - maximum % 100 if currency in HUNDREDTHS_WITHOUT_FRACTIONS else maximum


def _understood(read: Callable[[T, GatewayRequest], Outcome], answer: T, request: GatewayRequest) -> Outcome:
    """The answer as an outcome.

    Raises:
        GatewayContractBroken: the answer lacks what it must have.
    """
    try:
        return read(answer, request)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise GatewayContractBroken(NAME, f"the answer has an unexpected shape ({type(error).__name__})") from error


def _payment_of(request: GatewayRequest) -> str:
    assert request.gateway_payment_id is not None, "a capture, void or refund acts on a payment known to Stripe"
    return request.gateway_payment_id


Marked = TypeVar("Marked", stripe.PaymentIntent, stripe.Refund)


def _only(objects: list[Marked], marks: Mapping[str, str]) -> Marked | None:
    """The one that carries these marks.

    Raises:
        GatewayContractBroken: several do, so that one operation was executed more than once.
    """
    found = [each for each in objects if _carries(each.metadata, marks)]
    if len(found) > 1:
        raise GatewayContractBroken(NAME, f"several objects for {dict(marks)}: {[each.id for each in found]}")
    return found[0] if found else None


def _carries(metadata: Any, marks: Mapping[str, str]) -> bool:
    return metadata is not None and all(key in metadata and metadata[key] == value for key, value in marks.items())


class _BoundedHttpClient(stripe.HTTPXClient):
    """Stripe's httpx client with a bounded pool.

    The SDK's own one cannot be given limits, and passes the body in a form that httpx has deprecated.
    """

    def __init__(self, config: StripeConfig) -> None:
        super().__init__(timeout=None)
        self.rest = Rest()
        self._bounded = create_client(
            max_connections=config.max_connections,
            timeout_seconds=config.timeout_seconds,
            connect_timeout_seconds=config.connect_timeout_seconds,
            verify=ssl.create_default_context(cafile=stripe.ca_bundle_path),
        )

    async def request_async(
        self, method: str, url: str, headers: Mapping[str, str], post_data: Any = None
    ) -> tuple[bytes, int, Mapping[str, str]]:
        try:
            response = await self._bounded.request(method, url, headers=dict(headers), content=post_data)
        except Exception as error:
            raise _connection_failed(error) from error
        self.rest.note(response)
        return response.content, response.status_code, response.headers

    def connections(self) -> Connections:
        return self._bounded.pools.connections()

    async def close_async(self) -> None:
        await self._bounded.aclose()
        await self._client_async.aclose()


def _connection_failed(error: Exception) -> Exception:
    return stripe.APIConnectionError(f"{type(error).__name__} was raised")  # type: ignore[no-untyped-call]
