"""The error table of the Stripe gateway: every exception of the SDK, and which of them prove anything."""

import inspect
import json
from typing import Any
from uuid import UUID

import httpx
import pytest
import stripe

from domain.commands import OperationKind
from domain.errors import GatewayContractBroken, GatewayError, GatewayUnreachable, OutcomeUnknown
from domain.money import Money
from domain.operations import Declined, DeclineReason, GatewayRequest, NotExecuted, OperationState
from infra.gateways.evidence import Look
from infra.gateways.stripe_errors import TRANSLATIONS, translate_error

SECRET = "sk_live_51secret"
REQUEST = GatewayRequest(
    kind=OperationKind.CHARGE,
    payment_id=UUID(int=7),
    operation_number=1,
    provider_key="7:1",
    gateway="stripe",
    amount=Money(1250, "USD"),
)
IN_DOUBT = REQUEST._replace(state=OperationState.INDETERMINATE, attempts=2)

EXPORTED = [
    each
    for name, (module, _) in sorted(stripe._import_map.items())
    if "error" in f"{module} {name}".lower() and inspect.isclass(each := getattr(stripe, name))
    if issubclass(each, Exception)
]
"""The SDK loads its names lazily: `dir` does not show them, but its own map does."""


def raised(status: int, error: dict[str, Any] | None, *, is_replayed: bool = False) -> stripe.StripeError:
    """The exception that the SDK itself builds from such an answer."""
    headers = {"request-id": "req_1"} | ({"idempotent-replayed": "true"} if is_replayed else {})
    requestor = stripe.StripeClient("sk_test_x", http_client=stripe.HTTPXClient())._requestor
    body = "<html></html>" if error is None else json.dumps({"error": error})
    with pytest.raises(stripe.StripeError) as caught:
        requestor._interpret_response(body, status, headers, "V1")
    return caught.value


def not_sent(cause: Exception) -> stripe.APIConnectionError:
    error: stripe.APIConnectionError = stripe.APIConnectionError("x")  # type: ignore[no-untyped-call]
    error.__cause__ = cause
    return error


def test_the_sdk_still_exports_its_exceptions() -> None:
    assert len(EXPORTED) >= 30


@pytest.mark.parametrize("exported", EXPORTED, ids=lambda each: each.__name__)
def test_every_exception_of_the_sdk_has_a_translation(exported: type[Exception]) -> None:
    assert exported in TRANSLATIONS


@pytest.mark.parametrize("exported", EXPORTED, ids=lambda each: each.__name__)
def test_no_exception_alone_is_a_success_or_a_failure(exported: type[Exception]) -> None:
    names = inspect.signature(exported).parameters
    error = exported(
        **{name: SECRET if name == "message" else None for name in names if name not in ("args", "kwargs")}
    )

    verdict = translate_error(error, IN_DOUBT)

    assert isinstance(verdict, GatewayError | Look)
    assert SECRET not in str(verdict)


def test_an_exception_that_the_table_does_not_know_is_a_broken_contract() -> None:
    assert isinstance(translate_error(type("New", (stripe.StripeError,), {})("x"), REQUEST), GatewayContractBroken)


@pytest.mark.parametrize(
    ("status", "error", "expected"),
    [
        (429, {"code": "rate_limit"}, GatewayUnreachable),
        (429, {"code": "lock_timeout"}, GatewayUnreachable),
        (400, {"code": "rate_limit"}, GatewayUnreachable),
        (401, {"type": "invalid_request_error"}, GatewayUnreachable),
        (403, {"type": "invalid_request_error"}, GatewayUnreachable),
        (409, {"code": "idempotency_key_in_use"}, OutcomeUnknown),
        (500, {"type": "api_error"}, OutcomeUnknown),
        (503, None, OutcomeUnknown),
        (502, None, OutcomeUnknown),
        (200, None, OutcomeUnknown),
        (400, None, OutcomeUnknown),
        (413, {"type": "invalid_request_error"}, GatewayContractBroken),
        (402, {"type": "api_error"}, GatewayContractBroken),
    ],
)
@pytest.mark.parametrize("request_", [REQUEST, IN_DOUBT], ids=["first", "in doubt"])
def test_errors_without_an_outcome(
    status: int, error: dict[str, Any] | None, expected: type[GatewayError], request_: GatewayRequest
) -> None:
    error = None if error is None else {"message": SECRET, **error}

    verdict = translate_error(raised(status, error), request_)

    assert type(verdict) is expected
    assert SECRET not in str(verdict)


@pytest.mark.parametrize(
    ("cause", "expected"),
    [
        (httpx.ConnectError("x"), GatewayUnreachable),
        (httpx.ConnectTimeout("x"), GatewayUnreachable),
        (httpx.PoolTimeout("x"), GatewayUnreachable),
        (httpx.ReadTimeout("x"), OutcomeUnknown),
        (httpx.WriteError("x"), OutcomeUnknown),
        (httpx.RemoteProtocolError("x"), OutcomeUnknown),
        (TypeError("x"), GatewayContractBroken),
    ],
)
def test_only_a_connection_that_was_never_made_proves_that_nothing_was_sent(
    cause: Exception, expected: type[GatewayError]
) -> None:
    assert type(translate_error(not_sent(cause), REQUEST)) is expected


def test_a_refused_parameter_is_proof_only_when_no_attempt_is_unaccounted_for() -> None:
    error = raised(400, {"type": "invalid_request_error", "code": "parameter_invalid", "message": "No such thing"})

    assert translate_error(error, REQUEST) == NotExecuted("No such thing", "parameter_invalid")
    assert isinstance(translate_error(error, REQUEST._replace(attempts=3)), NotExecuted)
    doubted = translate_error(error, IN_DOUBT)
    assert isinstance(doubted, Look)
    assert isinstance(doubted.otherwise, OutcomeUnknown)


def test_a_replayed_refusal_is_the_answer_to_the_lost_attempt() -> None:
    error = raised(400, {"type": "invalid_request_error", "message": "No"}, is_replayed=True)

    assert isinstance(translate_error(error, IN_DOUBT), NotExecuted)


def test_a_state_conflict_is_looked_into_even_at_the_first_attempt() -> None:
    error = raised(400, {"type": "invalid_request_error", "code": "payment_intent_unexpected_state", "message": "No"})

    assert isinstance(translate_error(error, REQUEST), Look)


def test_a_key_used_with_other_parameters_is_looked_into() -> None:
    verdict = translate_error(raised(400, {"type": "idempotency_error"}), REQUEST)

    assert isinstance(verdict, Look)
    assert isinstance(verdict.otherwise, GatewayContractBroken)


def test_a_replayed_server_error_is_looked_into() -> None:
    assert isinstance(translate_error(raised(500, {"type": "api_error"}, is_replayed=True), IN_DOUBT), Look)


def test_a_text_of_stripe_reaches_the_sender_without_keys() -> None:
    error = raised(400, {"type": "invalid_request_error", "message": f"Invalid key {SECRET}"})

    verdict = translate_error(error, REQUEST)

    assert isinstance(verdict, NotExecuted)
    assert SECRET not in verdict.message


@pytest.mark.parametrize(
    ("code", "decline_code", "reason", "word"),
    [
        ("card_declined", "insufficient_funds", DeclineReason.INSUFFICIENT_FUNDS, "insufficient_funds"),
        ("card_declined", "lost_card", DeclineReason.SUSPECTED_FRAUD, "lost_card"),
        ("expired_card", None, DeclineReason.CARD_EXPIRED, "expired_card"),
        ("card_declined", "a_code_of_tomorrow", DeclineReason.REFUSED_BY_ISSUER, "a_code_of_tomorrow"),
        ("a_code_of_tomorrow", None, DeclineReason.OTHER, "a_code_of_tomorrow"),
        ("authentication_required", None, DeclineReason.AUTHENTICATION_REQUIRED, "authentication_required"),
    ],
)
def test_a_card_error_is_a_refusal_with_the_issuers_word(
    code: str, decline_code: str | None, reason: DeclineReason, word: str
) -> None:
    details = {"type": "card_error", "code": code, "payment_intent": {"id": "pi_1", "object": "payment_intent"}}

    verdict = translate_error(raised(402, details | ({"decline_code": decline_code} if decline_code else {})), IN_DOUBT)

    assert verdict == Declined(reason, word, "pi_1")


def test_a_card_error_on_a_refund_is_a_failed_refund() -> None:
    error = raised(402, {"type": "card_error", "code": "card_declined"})

    verdict = translate_error(error, REQUEST._replace(kind=OperationKind.REFUND))

    assert verdict == Declined(DeclineReason.REFUND_FAILED, "card_declined")
