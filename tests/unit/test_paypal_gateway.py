"""Amounts, marks, the status tables and the error table of the PayPal gateway."""

import asyncio
import gc
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import httpx
import pytest
from pydantic import SecretStr, ValidationError

from domain.commands import OperationKind
from domain.errors import GatewayContractBroken, GatewayUnreachable, OutcomeUnknown
from domain.money import Money
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
from domain.ports import Movement
from infra.gateways.evidence import Look
from infra.gateways.paypal import PayPalConfig, PayPalGateway
from infra.gateways.paypal_errors import DECLINE_REASONS, translate_refusal
from infra.gateways.paypal_http import CURRENCIES, IN_COUNTRY_CURRENCIES, Json, PayPalHttp, PayPalRefused
from infra.gateways.paypal_objects import (
    APPROVAL_WINDOW,
    AmountNotRepresentable,
    from_paypal_amount,
    invoice_of,
    mark_of,
    read_captures,
    read_mark,
    read_opening,
    read_refunds,
    read_release,
    read_void,
    to_paypal_value,
)

LIVE = "https://api-m.paypal.com"
PAYMENT_ID = UUID("0192f0c1-2d5e-7cc0-8a11-5f1de2f6a001")
CHARGE = GatewayRequest(
    kind=OperationKind.CHARGE,
    payment_id=PAYMENT_ID,
    operation_number=1,
    provider_key=f"{PAYMENT_ID}:1",
    gateway="paypal",
    amount=Money(1000, "USD"),
)
AUTHORIZE = CHARGE._replace(kind=OperationKind.AUTHORIZE)
CAPTURE = CHARGE._replace(kind=OperationKind.CAPTURE, operation_number=2, gateway_payment_id="O1")
VOID = CAPTURE._replace(kind=OperationKind.VOID)
REFUND = CAPTURE._replace(kind=OperationKind.REFUND)
IN_DOUBT: dict[str, Any] = {"state": OperationState.INDETERMINATE, "attempts": 2}
TEN = {"currency_code": "USD", "value": "10.00"}
CREATED_AT = datetime(2026, 11, 22, 20, tzinfo=UTC)


def order(status: str, **payments: list[Json]) -> Json:
    unit = {"custom_id": mark_of(CHARGE), "amount": TEN, **({"payments": payments} if payments else {})}
    return {
        "id": "O1",
        "status": status,
        "purchase_units": [unit],
        "create_time": "2026-11-22T20:00:00Z",
        "links": [{"rel": "self", "href": "https://x/self"}, {"rel": "payer-action", "href": "https://x/pay"}],
    }


def payment(status: str, **fields: Any) -> Json:
    return {"id": "P1", "status": status, "amount": TEN, **fields}


def config(**settings: Any) -> PayPalConfig:
    return PayPalConfig(client_id="id", client_secret=SecretStr("very-secret"), **settings)


# --- amounts, marks and settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("money", "value"),
    [
        (Money(1099, "USD"), "10.99"),
        (Money(5, "EUR"), "0.05"),
        (Money(1250, "JPY"), "1250"),
        (Money(125_000, "HUF"), "1250"),
        (Money(100, "TWD"), "1"),
        (Money(10**15, "USD"), "10000000000000.00"),
    ],
)
def test_amounts_keep_their_value_in_paypals_scale(money: Money, value: str) -> None:
    assert to_paypal_value(money) == value
    assert from_paypal_amount({"currency_code": money.currency, "value": value}, money.currency) == money.minor


@pytest.mark.parametrize("money", [Money(150, "HUF"), Money(1, "TWD"), Money(1000, "VND"), Money(100, "XXX")])
def test_an_amount_that_paypal_cannot_take_is_not_sent(money: Money) -> None:
    with pytest.raises(AmountNotRepresentable):
        to_paypal_value(money)


@pytest.mark.parametrize(
    "amount",
    [
        {"currency_code": "EUR", "value": "10.00"},
        {"currency_code": "USD", "value": "10.001"},
        {"currency_code": "USD", "value": "-1.00"},
        {"currency_code": "USD", "value": "NaN"},
        {"currency_code": "USD", "value": "ten"},
    ],
)
def test_an_amount_that_cannot_be_is_a_broken_contract(amount: Json) -> None:
    with pytest.raises(GatewayContractBroken):
        from_paypal_amount(amount, "USD")


def test_a_whole_amount_with_zero_decimals_is_read() -> None:
    assert from_paypal_amount({"currency_code": "JPY", "value": "100.00"}, "JPY") == 100


@pytest.mark.parametrize("request_", [CHARGE, CAPTURE, REFUND])
def test_marks_are_read_as_they_were_written(request_: GatewayRequest) -> None:
    plain, full = read_mark(mark_of(request_)), read_mark(invoice_of(request_))

    assert plain == (PAYMENT_ID, request_.operation_number, None)
    assert full == (PAYMENT_ID, request_.operation_number, request_.kind)


@pytest.mark.parametrize(
    "text", [None, 7, "", "order-42", f"{PAYMENT_ID}", f"{PAYMENT_ID}.0", f"{PAYMENT_ID}.1.theft", f"{PAYMENT_ID}.1."]
)
def test_a_malformed_mark_is_read_as_none(text: object) -> None:
    assert read_mark(text) is None


@pytest.mark.parametrize("api_base", ["http://api-m.paypal.com", "ftp://127.0.0.1", "api-m.paypal.com"])
def test_credentials_travel_over_https_unless_the_simulator_is_local(api_base: str) -> None:
    with pytest.raises(ValidationError):
        config(api_base=api_base)
    assert config(api_base="http://127.0.0.1:8000/").api_base == "http://127.0.0.1:8000"
    assert config(api_base="http://sandbox:8090", allows_plain_http=True).is_simulated
    assert not config().is_simulated


def test_only_currencies_of_paypal_can_be_set() -> None:
    assert config(currencies=frozenset({"BRL"})).currencies == {"BRL"}
    with pytest.raises(ValidationError):
        config(currencies=frozenset({"VND"}))


async def test_the_capabilities_of_paypal_are_declared() -> None:
    gateway = PayPalGateway(config(api_base=LIVE))
    capabilities = gateway.capabilities
    await gateway.close()

    assert capabilities.currencies == CURRENCIES
    assert not capabilities.currencies & IN_COUNTRY_CURRENCIES
    assert capabilities.idempotency_retention < timedelta(hours=6)
    assert capabilities.multi_capture
    assert capabilities.cancel_waiting
    assert {code: limits.minimum_minor for code, limits in capabilities.limits.items()} == {
        "HUF": 100,
        "JPY": 1,
        "TWD": 100,
    }
    assert "very-secret" not in repr(config())


# --- the status tables ----------------------------------------------------------------------------------------------

ASKED = RequiresAction("O1", "redirect", "https://x/pay", CREATED_AT + APPROVAL_WINDOW)


@pytest.mark.parametrize(
    ("request_", "found", "outcome"),
    [
        (CHARGE, order("CREATED"), ASKED),
        (CHARGE, order("PAYER_ACTION_REQUIRED"), ASKED),
        (CHARGE, order("SAVED"), ASKED),
        (CHARGE, order("APPROVED"), Pending("O1")),
        (CHARGE, order("VOIDED"), Declined(DeclineReason.CANCELED, "VOIDED", "O1")),
        (CHARGE, order("COMPLETED"), Pending("O1")),
        (CHARGE, order("A_STATUS_OF_TOMORROW"), Pending("O1")),
        (CHARGE, order("PAYER_ACTION_REQUIRED") | {"links": []}, Pending("O1")),
        (CHARGE, order("COMPLETED", captures=[payment("COMPLETED")]), Succeeded("O1", 1000)),
        (CHARGE, order("COMPLETED", captures=[payment("REFUNDED")]), Succeeded("O1", 1000)),
        (CHARGE, order("COMPLETED", captures=[payment("PENDING")]), Pending("O1")),
        (CHARGE, order("COMPLETED", captures=[payment("A_STATUS_OF_TOMORROW")]), Pending("O1")),
        (
            CHARGE,
            order("COMPLETED", captures=[payment("DECLINED", processor_response={"response_code": "5120"})]),
            Declined(DeclineReason.INSUFFICIENT_FUNDS, "5120", "O1"),
        ),
        (
            CHARGE,
            order("COMPLETED", captures=[payment("FAILED")]),
            Declined(DeclineReason.REFUSED_BY_ISSUER, "FAILED", "O1"),
        ),
        (
            CHARGE,
            order("COMPLETED", captures=[payment("DECLINED"), payment("COMPLETED", id="P2")]),
            Succeeded("O1", 1000),
        ),
        (CHARGE, order("APPROVED", captures=[payment("PENDING"), payment("DECLINED", id="P2")]), Pending("O1")),
        (
            AUTHORIZE,
            order("COMPLETED", authorizations=[payment("CREATED", expiration_time="2026-11-22T20:00:00Z")]),
            Succeeded("O1", 1000, CREATED_AT),
        ),
        (AUTHORIZE, order("COMPLETED", authorizations=[payment("CAPTURED")]), Succeeded("O1", 1000)),
        (AUTHORIZE, order("COMPLETED", authorizations=[payment("PENDING")]), Pending("O1")),
        (AUTHORIZE, order("COMPLETED", authorizations=[payment("VOIDED")]), Expired("O1", "VOIDED")),
        (
            AUTHORIZE,
            order("COMPLETED", authorizations=[payment("VOIDED")], captures=[payment("COMPLETED")]),
            Pending("O1"),
        ),
        (
            AUTHORIZE._replace(state=OperationState.SUCCEEDED),
            order("COMPLETED", authorizations=[payment("VOIDED")], captures=[payment("COMPLETED")]),
            Expired("O1", "VOIDED"),
        ),
        (
            AUTHORIZE,
            order("COMPLETED", authorizations=[payment("DENIED", status_details={"reason": "X"})]),
            Declined(DeclineReason.REFUSED_BY_ISSUER, "X", "O1"),
        ),
    ],
)
def test_the_status_of_an_authorization_or_charge(request_: GatewayRequest, found: Json, outcome: Outcome) -> None:
    assert read_opening(found, request_) == outcome


def test_an_order_of_the_older_kind_is_approved_by_another_link() -> None:
    found = order("CREATED") | {"links": [{"rel": "approve", "href": "https://x/approve"}]}

    outcome = read_opening(found, CHARGE)

    assert isinstance(outcome, RequiresAction)
    assert outcome.url == "https://x/approve"


@pytest.mark.parametrize(
    ("request_", "found"),
    [
        (AUTHORIZE, order("COMPLETED", captures=[payment("COMPLETED")])),
        (CHARGE, order("COMPLETED", captures=[payment("COMPLETED"), payment("COMPLETED", id="P2")])),
        (CHARGE._replace(operation_number=3), order("COMPLETED", captures=[payment("COMPLETED")])),
        (CHARGE._replace(amount=Money(1000, "EUR")), order("COMPLETED", captures=[payment("COMPLETED")])),
    ],
    ids=["captured instead of held", "paid twice", "another operation's", "another currency"],
)
def test_an_order_that_cannot_be_ours_is_a_broken_contract(request_: GatewayRequest, found: Json) -> None:
    with pytest.raises(GatewayContractBroken):
        read_opening(found, request_)


def test_another_amount_is_reported_as_it_is() -> None:
    less = payment("COMPLETED") | {"amount": {"currency_code": "USD", "value": "9.99"}}

    assert read_opening(order("COMPLETED", captures=[less]), CHARGE) == Succeeded("O1", 999)


HELD = payment("PARTIALLY_CAPTURED", id="A1")
OWN = {"invoice_id": invoice_of(CAPTURE)}


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (order("COMPLETED", authorizations=[HELD], captures=[payment("COMPLETED", **OWN)]), Succeeded("P1", 1000)),
        (order("COMPLETED", authorizations=[HELD], captures=[payment("PENDING", **OWN)]), Pending("P1")),
        (
            order("COMPLETED", authorizations=[HELD], captures=[payment("DECLINED", **OWN)]),
            Declined(DeclineReason.REFUSED_BY_ISSUER, "DECLINED", "P1"),
        ),
    ],
)
def test_a_capture_is_known_by_its_invoice_id(found: Json, expected: Outcome) -> None:
    assert read_captures(found, CAPTURE) == expected


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (order("COMPLETED", authorizations=[HELD], captures=[payment("COMPLETED")]), Unknown),
        (order("COMPLETED", authorizations=[payment("CREATED")]), Unknown),
        (order("COMPLETED", authorizations=[payment("VOIDED")], captures=[payment("COMPLETED")]), Unknown),
        (order("COMPLETED", authorizations=[payment("VOIDED")]), NotExecuted),
        (order("COMPLETED", authorizations=[payment("VOIDED")], captures=[payment("DECLINED")]), NotExecuted),
        (order("COMPLETED"), Unknown),
    ],
)
def test_without_a_trace_only_a_hold_that_ended_untouched_is_proof(found: Json, expected: type[Outcome]) -> None:
    assert isinstance(read_captures(found, CAPTURE), expected)


def test_two_captures_of_one_operation_are_a_broken_contract() -> None:
    found = order("COMPLETED", captures=[payment("COMPLETED", **OWN), payment("COMPLETED", id="P2", **OWN)])

    with pytest.raises(GatewayContractBroken):
        read_captures(found, CAPTURE)


@pytest.mark.parametrize(
    ("status", "captured", "left", "expected"),
    [
        ("VOIDED", [], 1000, Succeeded),
        ("VOIDED", ["4.00"], 600, Succeeded),
        ("CAPTURED", ["4.00"], 600, Succeeded),
        ("CAPTURED", ["4.00", "6.00"], 600, NotExecuted),
        ("CAPTURED", ["10.00"], 1000, NotExecuted),
        ("VOIDED", ["4.00"], 1000, NotExecuted),
        ("PARTIALLY_CAPTURED", ["4.00", "1.00"], 600, NotExecuted),
        ("PARTIALLY_CAPTURED", ["4.00"], 600, Unknown),
        ("CREATED", [], 1000, Unknown),
        ("A_STATUS_OF_TOMORROW", [], 1000, Unknown),
    ],
)
def test_a_release_is_known_by_the_state_of_the_hold(
    status: str, captured: list[str], left: int, expected: type[Outcome]
) -> None:
    captures = [payment("COMPLETED", id=v, amount={"currency_code": "USD", "value": v}) for v in captured]
    hold = payment(status, id="A1")
    found = order("COMPLETED", authorizations=[hold], captures=captures)

    assert isinstance(read_void(hold, found, VOID._replace(amount=Money(left, "USD"))), expected)


@pytest.mark.parametrize(
    ("answer", "outcome"),
    [
        ({}, Succeeded("A1")),
        ({"status": "VOIDED"}, Succeeded("A1")),
        ({"status": "PENDING"}, Unknown("authorization A1 is PENDING")),
    ],
)
def test_the_answer_to_a_release(answer: Json, outcome: Outcome) -> None:
    assert read_release("A1", answer, VOID) == outcome


async def test_an_answer_to_a_release_that_says_something_else_is_none() -> None:
    hold = order("COMPLETED", authorizations=[payment("CREATED", id="A1")])

    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path.endswith("/token"):
            return httpx.Response(200, json={"access_token": "t", "expires_in": 3600})
        return httpx.Response(200, json=hold if request.method == "GET" else {"message": "we are back soon"})

    gateway = PayPalGateway(config())
    gateway._api._http._client = httpx.AsyncClient(transport=httpx.MockTransport(answer), base_url=LIVE)
    with pytest.raises(GatewayContractBroken):
        await gateway.void(VOID)


@pytest.mark.parametrize("mark", [{"invoice_id": invoice_of(REFUND)}, {"custom_id": mark_of(REFUND)}])
@pytest.mark.parametrize(
    ("status", "outcome"),
    [
        ("COMPLETED", Succeeded("P1", 1000)),
        ("PENDING", Pending("P1")),
        ("A_STATUS_OF_TOMORROW", Pending("P1")),
        ("FAILED", Declined(DeclineReason.REFUND_FAILED, "FAILED", "P1")),
        ("CANCELLED", Declined(DeclineReason.REFUND_FAILED, "CANCELLED", "P1")),
    ],
)
def test_the_status_of_a_refund(mark: Json, status: str, outcome: Outcome) -> None:
    assert read_refunds(order("COMPLETED", refunds=[payment(status, **mark)]), REFUND) == outcome


def test_a_refund_of_somebody_else_is_no_trace_of_ours() -> None:
    foreign = payment("COMPLETED", custom_id=mark_of(CHARGE), invoice_id=invoice_of(CHARGE))

    assert isinstance(read_refunds(order("COMPLETED", refunds=[foreign]), REFUND), Unknown)


# --- the error table ------------------------------------------------------------------------------------------------


def refused(issue: str | None, status: int = 422, name: str = "UNPROCESSABLE_ENTITY") -> PayPalRefused:
    details = [{"issue": issue, "description": "card 4111 of Jane"}] if issue else []
    return PayPalRefused(status, {"name": name, "message": "secret words", "debug_id": "f5ed4b", "details": details})


_PERMANENT = """
    INVALID_PARAMETER_VALUE INVALID_PARAMETER_SYNTAX MISSING_REQUIRED_PARAMETER INVALID_STRING_LENGTH
    MALFORMED_REQUEST_JSON PAYPAL_REQUEST_ID_REQUIRED ACTION_DOES_NOT_MATCH_INTENT AMOUNT_MISMATCH DECIMAL_PRECISION
    DECIMALS_NOT_SUPPORTED INVALID_CURRENCY_CODE CANNOT_BE_ZERO_OR_NEGATIVE AUTH_CAPTURE_CURRENCY_MISMATCH
    REFUND_CAPTURE_CURRENCY_MISMATCH REFUND_AMOUNT_EXCEEDED MAX_CAPTURE_AMOUNT_EXCEEDED MAX_CAPTURE_COUNT_EXCEEDED
    MAX_NUMBER_OF_REFUNDS_EXCEEDED PARTIAL_REFUND_NOT_ALLOWED REFUND_NOT_ALLOWED REFUND_IS_RESTRICTED
    REFUND_NOT_PERMITTED_DUE_TO_CHARGEBACK TRANSACTION_DISPUTED REAUTHORIZATION_NOT_SUPPORTED PAYEE_ACCOUNT_RESTRICTED
    PAYEE_ACCOUNT_LOCKED_OR_CLOSED AUTH_CAPTURE_NOT_ENABLED NOT_ENABLED_FOR_CARD_PROCESSING
    UNSUPPORTED_INTENT_FOR_PAYMENT_SOURCE NOT_ENABLED_TO_VAULT_PAYMENT_SOURCE AN_ISSUE_OF_TOMORROW
"""
_CONFLICTS = """
    ORDER_ALREADY_CAPTURED ORDER_ALREADY_AUTHORIZED AUTHORIZATION_ALREADY_CAPTURED PREVIOUSLY_CAPTURED PREVIOUSLY_VOIDED
    AUTHORIZATION_VOIDED CAPTURE_FULLY_REFUNDED ORDER_COMPLETED_OR_VOIDED DUPLICATE_INVOICE_ID AUTHORIZATION_EXPIRED
    REFUND_TIME_LIMIT_EXCEEDED
"""
_DECLINED = """
    INSTRUMENT_DECLINED PAYER_CANNOT_PAY TRANSACTION_REFUSED AUTHORIZATION_DENIED PAYMENT_SOURCE_DECLINED_BY_PROCESSOR
    PAYMENT_SOURCE_CANNOT_BE_USED PAYMENT_SOURCE_INFO_CANNOT_BE_VERIFIED TRANSACTION_BLOCKED_BY_PAYEE
    PAYEE_BLOCKED_TRANSACTION COMPLIANCE_VIOLATION CARD_EXPIRED REFERENCED_CARD_EXPIRED PAYER_ACCOUNT_LOCKED_OR_CLOSED
    PAYER_ACCOUNT_RESTRICTED TRANSACTION_LIMIT_EXCEEDED TRANSACTION_RECEIVING_LIMIT_EXCEEDED
    MAX_NUMBER_OF_PAYMENT_ATTEMPTS_EXCEEDED DECLINED_DUE_TO_RELATED_TXN AGREEMENT_ALREADY_CANCELLED
    BILLING_AGREEMENT_NOT_FOUND TOKEN_EXPIRED TOKEN_ID_NOT_FOUND DOMESTIC_TRANSACTION_REQUIRED CARD_BRAND_NOT_SUPPORTED
"""
PERMANENT, CONFLICTS, DECLINED = _PERMANENT.split(), _CONFLICTS.split(), _DECLINED.split()


@pytest.mark.parametrize("issue", PERMANENT)
def test_a_refusal_is_proof_on_the_first_attempt_and_none_on_a_repeated_one(issue: str) -> None:
    first, repeated = (
        translate_refusal(refused(issue), CAPTURE),
        translate_refusal(refused(issue), CAPTURE._replace(**IN_DOUBT)),
    )

    assert first == NotExecuted(f"refused by PayPal: {issue}", issue)
    assert isinstance(repeated, Look)
    assert isinstance(repeated.otherwise, OutcomeUnknown)


@pytest.mark.parametrize("issue", CONFLICTS)
def test_a_state_that_our_own_effect_may_have_caused_is_looked_at(issue: str) -> None:
    first, repeated = (
        translate_refusal(refused(issue), CAPTURE),
        translate_refusal(refused(issue), CAPTURE._replace(**IN_DOUBT)),
    )

    assert isinstance(first, Look)
    assert isinstance(first.otherwise, NotExecuted)
    assert isinstance(repeated, Look)
    assert isinstance(repeated.otherwise, OutcomeUnknown)


@pytest.mark.parametrize("issue", DECLINED)
def test_a_decline_keeps_its_code(issue: str) -> None:
    outcome = translate_refusal(refused(issue), CHARGE._replace(reference="O1"))

    assert outcome == Declined(DECLINE_REASONS[issue], issue, "O1")


def test_every_decline_of_the_table_is_tested_and_a_refund_has_its_own_reason() -> None:
    assert set(DECLINED) | {"CONSENT_NEEDED"} == set(DECLINE_REASONS)
    assert translate_refusal(refused("TRANSACTION_REFUSED"), REFUND) == Declined(
        DeclineReason.REFUND_FAILED, "TRANSACTION_REFUSED"
    )


@pytest.mark.parametrize(
    "issue", ["PAYER_ACTION_REQUIRED", "ORDER_NOT_APPROVED", "REDIRECT_PAYER_FOR_ALTERNATE_FUNDING"]
)
def test_a_payer_who_must_act_again_is_found_at_the_order(issue: str) -> None:
    assert translate_refusal(refused(issue), CHARGE._replace(reference="O1")) == Look(Pending("O1"))
    assert translate_refusal(refused(issue), CHARGE) == Declined(DeclineReason.AUTHENTICATION_REQUIRED, issue)


@pytest.mark.parametrize(
    "error",
    [
        refused(None, 429, "RATE_LIMIT_REACHED"),
        refused(None, 401, "AUTHENTICATION_FAILURE"),
        refused("PERMISSION_DENIED", 403, "NOT_AUTHORIZED"),
        refused("PENDING_CAPTURE"),
        refused("REFUND_FAILED_INSUFFICIENT_FUNDS"),
        PayPalRefused(403, {}),
    ],
)
@pytest.mark.parametrize("doubt", [{}, IN_DOUBT])
def test_a_refund_that_paypal_turned_away_may_be_sent_again(error: PayPalRefused, doubt: dict[str, Any]) -> None:
    assert isinstance(translate_refusal(error, REFUND._replace(**doubt)), GatewayUnreachable)


@pytest.mark.parametrize(
    "error",
    [
        refused("PREVIOUS_REQUEST_IN_PROGRESS", 409, "RESOURCE_CONFLICT"),
        refused("ORDER_COMPLETION_IN_PROGRESS"),
        refused(None, 409, "RESOURCE_CONFLICT"),
    ],
)
def test_a_request_that_is_being_executed_is_the_opposite_of_proof(error: PayPalRefused) -> None:
    assert isinstance(translate_refusal(error, CAPTURE), OutcomeUnknown)


def test_an_expired_order_has_expired_and_an_expired_consent_is_a_decline() -> None:
    known = CHARGE._replace(reference="O1")

    assert translate_refusal(refused("ORDER_EXPIRED"), known) == Expired("O1", "ORDER_EXPIRED")
    assert isinstance(translate_refusal(refused("CONSENT_NEEDED", 403, "NOT_AUTHORIZED"), CHARGE), Declined)


def test_an_error_says_nothing_that_paypal_or_the_sender_wrote() -> None:
    odd = PayPalRefused(422, {"name": "card 4111 of Jane", "debug_id": {"a": 1}, "details": [{"issue": "x y"}, "z"]})

    assert "Jane" not in f"{refused('TRANSACTION_REFUSED')} {odd} {odd.code}"
    assert "secret" not in f"{refused('TRANSACTION_REFUSED')!r}"


# --- lists ------------------------------------------------------------------------------------------------------------

DAY = datetime(2026, 11, 22, tzinfo=UTC)


def listed(name: str = "T1", **fields: Any) -> Json:
    """A capture as Transaction Search reports it, with the time zone in PayPal's format."""
    told = {
        "transaction_id": name,
        "transaction_event_code": "T0006",
        "transaction_initiation_date": "2026-11-22T20:00:00+0000",
        "transaction_amount": TEN,
        "transaction_status": "S",
        "invoice_id": invoice_of(CAPTURE),
        "custom_field": mark_of(CHARGE),
    }
    return {"transaction_info": told | fields}


MINUS_TEN = TEN | {"value": "-10.00"}
REFUNDED = {"transaction_event_code": "T1107", "transaction_amount": MINUS_TEN, "invoice_id": invoice_of(REFUND)}


class Search:
    """PayPal's transaction search: refuses a period with more than `at_once` results; `asked` has all queries."""

    def __init__(self, *found: Json, at_once: int = 10_000) -> None:
        self.asked: list[dict[str, str]] = []
        self._found = found
        self._at_once = at_once

    def gateway(self) -> PayPalGateway:
        built = PayPalGateway(config())
        transport = httpx.MockTransport(self._answer)
        built._api._http._client = httpx.AsyncClient(transport=transport, base_url=LIVE)
        return built

    def _answer(self, request: httpx.Request) -> httpx.Response:
        if request.method == "POST":
            return httpx.Response(200, json={"access_token": "t", "expires_in": 9_000})
        asked = dict(request.url.params)
        self.asked.append(asked)
        since, until = (datetime.fromisoformat(asked[name]) for name in ("start_date", "end_date"))
        found = [each for each in self._found if since <= _began(each) <= until]
        if len(found) > self._at_once:
            return httpx.Response(400, json={"name": "RESULTSET_TOO_LARGE", "debug_id": "d"})
        page, size = int(asked["page"]), int(asked["page_size"])
        told: Json = {"transaction_details": found[(page - 1) * size : page * size]}
        return httpx.Response(200, json=told | {"total_pages": -(-len(found) // size)})


def _began(told: Json) -> datetime:
    return datetime.fromisoformat(told["transaction_info"]["transaction_initiation_date"])


async def movements(search: Search, since: datetime = DAY, until: datetime = DAY + timedelta(days=1)) -> list[Movement]:
    gateway = search.gateway()
    found = [each async for each in gateway.movements(since, until)]
    await gateway.close()
    return found


@pytest.mark.parametrize(
    ("fields", "marks"),
    [
        ({}, (False, PAYMENT_ID, 2)),
        ({"transaction_status": "V"}, (False, PAYMENT_ID, 2)),
        ({"invoice_id": invoice_of(CHARGE)}, (False, PAYMENT_ID, 1)),
        (REFUNDED, (True, PAYMENT_ID, 2)),
        # A refund made in PayPal's dashboard carries the marks of the capture, which do not identify the refund.
        (REFUNDED | {"invoice_id": invoice_of(CAPTURE)}, (True, PAYMENT_ID, None)),
        (REFUNDED | {"invoice_id": "order-7"}, (True, PAYMENT_ID, None)),
        ({"invoice_id": "order-7", "custom_field": "x"}, (False, None, None)),
    ],
)
async def test_a_listed_movement_is_that_of_the_operation_whose_marks_it_carries(fields: Json, marks: object) -> None:
    [found] = await movements(Search(listed(**fields)))
    assert (found.is_refund, found.payment_id, found.operation_number) == marks
    assert (found.reference, found.currency, found.amount_minor) == ("T1", "USD", 1000)
    assert found.moved_at == CREATED_AT


@pytest.mark.parametrize(
    "fields",
    [
        {"transaction_status": "P"},
        {"transaction_status": "D"},
        {"transaction_event_code": "T0006", "transaction_amount": MINUS_TEN},
        {"transaction_event_code": "T1107"},
        {"transaction_event_code": "T0107", "transaction_amount": MINUS_TEN},
        {"transaction_event_code": "T1106", "transaction_amount": MINUS_TEN},
        {"transaction_event_code": "T1201", "transaction_amount": MINUS_TEN},
        {"transaction_event_code": "T1300"},
    ],
    ids=["pending", "denied", "sent by us", "refunded to us", "fee", "reversal", "chargeback", "hold"],
)
async def test_listed_transactions_that_are_no_movement_of_ours_are_skipped(fields: Json) -> None:
    assert await movements(Search(listed(**fields), listed("T2"))) == await movements(Search(listed("T2")))


@pytest.mark.parametrize(
    "fields",
    [
        {"transaction_amount": {"currency_code": "USD", "value": "ten"}},
        {"transaction_initiation_date": None},
        {"transaction_event_code": None, "transaction_status": None, "transaction_amount": None},
    ],
)
async def test_a_list_that_cannot_be_read_is_not_cut_short(fields: Json) -> None:
    search = Search()
    search._answer = lambda request: httpx.Response(  # type: ignore[method-assign]
        200, json={"access_token": "t", "expires_in": 9_000, "transaction_details": [listed(), listed("T2", **fields)]}
    )
    with pytest.raises(GatewayContractBroken):
        await movements(search)


async def test_a_list_of_many_pages_is_read_to_its_end_and_each_movement_counts_once() -> None:
    search = Search(*(listed(f"T{number}") for number in range(1_200)), listed("T7"))
    assert len(await movements(search)) == 1_200
    assert [each["page"] for each in search.asked] == ["1", "2", "3"]


async def test_a_list_too_long_for_one_answer_is_requested_in_parts() -> None:
    times = [DAY + timedelta(minutes=number) for number in range(100)]
    found = [listed(f"T{n}", transaction_initiation_date=f"{at:%Y-%m-%dT%H:%M:%S}Z") for n, at in enumerate(times)]
    search = Search(*found, at_once=30)
    assert sorted(each.moved_at for each in await movements(search)) == times
    assert len(search.asked) > 4


async def test_too_many_transactions_within_one_second_break_the_contract() -> None:
    with pytest.raises(GatewayContractBroken):
        await movements(Search(*(listed(f"T{number}") for number in range(3)), at_once=2))


async def test_a_long_time_is_asked_for_month_by_month_and_ends_before_its_end() -> None:
    days = [DAY + timedelta(days=number) for number in (0, 31, 62, 70)]
    found = [listed(f"T{n}", transaction_initiation_date=f"{at:%Y-%m-%dT%H:%M:%S}Z") for n, at in enumerate(days)]
    search = Search(*found)
    assert [each.moved_at for each in await movements(search, DAY, days[-1])] == days[:-1]
    for each in search.asked:
        since, until = (datetime.fromisoformat(each[name]) for name in ("start_date", "end_date"))
        assert until - since <= timedelta(days=31)


async def test_an_app_that_may_not_search_is_told_so() -> None:
    search = Search()
    search._answer = lambda request: (  # type: ignore[method-assign]
        httpx.Response(200, json={"access_token": "t", "expires_in": 9_000})
        if request.method == "POST"
        else httpx.Response(403, json={"name": "NOT_AUTHORIZED", "debug_id": "d"})
    )
    with pytest.raises(GatewayUnreachable, match="NOT_AUTHORIZED"):
        await movements(search)


# --- the access token -------------------------------------------------------------------------------------------------


class SlowTokens:
    """A PayPal whose token endpoint answers only once `release` is set; everything else answers at once."""

    def __init__(self, *, timeout_seconds: float = 12) -> None:
        self.asked = 0
        self.is_asked = asyncio.Event()
        self.release = asyncio.Event()
        self.api = PayPalHttp(config(timeout_seconds=timeout_seconds))
        self.api._http._client = httpx.AsyncClient(transport=httpx.MockTransport(self._answer), base_url=LIVE)

    async def _answer(self, request: httpx.Request) -> httpx.Response:
        if request.method == "POST":
            self.asked += 1
            self.is_asked.set()
            await self.release.wait()
        return httpx.Response(200, json={"access_token": "t", "expires_in": 9_000})


async def test_all_who_wait_for_a_token_share_one_attempt_and_its_failure() -> None:
    paypal = SlowTokens(timeout_seconds=0.05)

    ends = await asyncio.gather(*(paypal.api.get("/v2/anything") for _ in range(6)), return_exceptions=True)

    assert [type(each) for each in ends] == [GatewayUnreachable] * 6
    assert paypal.asked == 1
    paypal.release.set()
    assert await paypal.api.get("/v2/anything"), "the next one tries again"
    await paypal.api.close()


async def test_a_request_cancelled_while_waiting_for_a_token_leaves_it_to_the_others() -> None:
    paypal = SlowTokens()
    first, second = (asyncio.create_task(paypal.api.get("/v2/anything")) for _ in range(2))
    await paypal.is_asked.wait()

    first.cancel()
    await asyncio.wait([first])
    paypal.release.set()

    assert first.cancelled()
    assert await second
    assert paypal.asked == 1
    await paypal.api.close()


async def test_a_token_that_nobody_waits_for_any_more_fails_silently() -> None:
    complaints: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
    paypal = SlowTokens(timeout_seconds=0.05)
    only = asyncio.create_task(paypal.api.get("/v2/anything"))
    await paypal.is_asked.wait()
    only.cancel()
    fetching = paypal.api._fetching
    assert fetching is not None

    await asyncio.wait([only, fetching])
    await paypal.api.close()
    del paypal, only, fetching
    gc.collect()
    assert not complaints
