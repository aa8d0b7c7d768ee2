"""The error table: what an exception of Stripe's SDK proves about an operation.

Promise: every exception that the SDK exports has a translation, and any other is a broken contract. A refusal proves
that nothing was executed only if every earlier attempt of the operation is accounted for; otherwise the translation is
`Look`.

Sources: https://docs.stripe.com/error-low-level, https://docs.stripe.com/error-handling, at the version that
`StripeConfig` pins.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, Final

import httpx
import stripe

from domain.commands import OperationKind
from domain.errors import GatewayContractBroken, GatewayUnreachable, OutcomeUnknown
from domain.operations import Declined, DeclineReason, GatewayRequest, NotExecuted, OperationState
from infra.gateways.evidence import Look, Translation
from infra.gateways.stripe_objects import NAME, declined
from infra.gateways.transport import NOTHING_WAS_SENT

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
"""The object is not in the state that the call needs, perhaps because this very operation was already executed."""


def translate_error(error: Exception, request: GatewayRequest) -> Translation:
    """Translate an exception of a POST; one that the table does not list is a broken contract."""
    translate = TRANSLATIONS.get(type(error), _not_understood)
    return translate(error, request)


def _card_error(error: Any, request: GatewayRequest) -> Translation:
    """A decline, even if it is the stored answer to an earlier attempt: that attempt was declined as well."""
    details = error.error
    if details is None or details.type != "card_error":
        return _not_understood(error, request)
    refusal = declined(details, getattr(getattr(details, "payment_intent", None), "id", None))
    if request.kind is OperationKind.REFUND:
        return Declined(DeclineReason.REFUND_FAILED, refusal.code, None)
    return refusal


def _invalid_request(error: Any, request: GatewayRequest) -> Translation:
    """A 400 or 404. Whether it proves anything depends on earlier attempts.

    A replayed one is Stripe's stored answer to this operation. If every earlier attempt is accounted for, it answers
    the only attempt that arrived. Otherwise a lost attempt may have caused the very state that Stripe complains about.
    """
    refused = NotExecuted(_safe(error.user_message), error.code)
    if _is_replayed(error):
        return refused
    if request.state is not OperationState.DISPATCHED:
        return Look(OutcomeUnknown(NAME, f"refused on a repeated attempt: {facts_of(error)}"))
    return Look(refused) if error.code in STATE_CONFLICTS else refused


def _rejected_before_execution(error: Any, request: GatewayRequest) -> Translation:
    """Rate limits and authentication are checked before the idempotency key, so this is proof for this attempt only."""
    return GatewayUnreachable(NAME, facts_of(error))


def _key_conflict(error: Any, request: GatewayRequest) -> Translation:
    """Our key was used with other parameters, say by a release with another return URL: an earlier request exists.

    https://docs.stripe.com/api/idempotent_requests
    """
    return Look(GatewayContractBroken(NAME, f"the key was used with other parameters: {facts_of(error)}"))


def _connection_error(error: Any, request: GatewayRequest) -> Translation:
    cause = type(error.__cause__).__name__
    if not isinstance(error.__cause__, httpx.HTTPError):
        return GatewayContractBroken(NAME, f"the call failed on our side of the connection ({cause})")
    if isinstance(error.__cause__, NOTHING_WAS_SENT):
        return GatewayUnreachable(NAME, f"not connected ({cause})")
    return OutcomeUnknown(NAME, f"the connection failed before an answer could be read ({cause})")


def _api_error(error: Any, request: GatewayRequest) -> Translation:
    """409, 5xx, anything that is not JSON, and statuses that Stripe does not document.

    A 409 means that a request with our key is being executed right now, the opposite of proof. A replayed 5xx is
    replayed for as long as Stripe keeps the key, so only a status query can show the outcome.
    """
    unknown = OutcomeUnknown(NAME, facts_of(error))
    if error.error is None or error.http_status == 409:
        return unknown
    if error.http_status is not None and error.http_status >= 500:
        return Look(unknown) if _is_replayed(error) else unknown
    return _not_understood(error, request)


def _not_understood(error: Any, request: GatewayRequest) -> Translation:
    return GatewayContractBroken(NAME, f"{type(error).__name__} is not understood: {facts_of(error)}")


TRANSLATIONS: Final[Mapping[type[Exception], Callable[[Any, GatewayRequest], Translation]]] = {
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


def facts_of(error: Any) -> str:
    """What may be logged of an error: never Stripe's message, which can quote what was sent."""
    details = getattr(error, "error", None)
    facts = {
        "status": getattr(error, "http_status", None),
        "type": getattr(details, "type", None),
        "code": getattr(details, "code", None),
        "request": getattr(error, "request_id", None),
    }
    return ", ".join(f"{name} {value}" for name, value in facts.items() if value is not None) or "no details"


def _safe(message: str | None) -> str:
    """Stripe's message for the sender of the command, without anything that looks like one of our keys."""
    return re.sub(r"\b(sk|rk|pk|whsec|ek)_\S+", "[removed]", message or "refused by Stripe")[:300]
