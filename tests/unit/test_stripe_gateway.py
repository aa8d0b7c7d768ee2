"""Amounts, metadata and the status table of the Stripe gateway."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
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
from infra.gateways.stripe_objects import (
    ACTION_WINDOW,
    AmountNotRepresentable,
    from_stripe_amount,
    metadata_of,
    read_capture,
    read_opening,
    read_refund,
    read_void,
    to_stripe_amount,
)

REQUEST = GatewayRequest(
    kind=OperationKind.CHARGE,
    payment_id=UUID(int=7),
    operation_number=2,
    provider_key="7:2",
    gateway="stripe",
    amount=Money(1000, "USD"),
    order_id="order-7",
)
CAPTURE = REQUEST._replace(kind=OperationKind.CAPTURE)
VOID = REQUEST._replace(kind=OperationKind.VOID)
AUTHORIZE = REQUEST._replace(kind=OperationKind.AUTHORIZE)
CREATED = 1_800_000_000
ENDS = datetime.fromtimestamp(CREATED, UTC) + ACTION_WINDOW
FAILED = {"type": "card_error", "code": "payment_intent_authentication_failure"}


def intent(status: str, **fields: Any) -> stripe.PaymentIntent:
    given = {
        "id": "pi_1",
        "object": "payment_intent",
        "status": status,
        "amount": 1000,
        "amount_capturable": 0,
        "amount_received": 0,
        "currency": "usd",
        "cancellation_reason": None,
        "created": CREATED,
        "last_payment_error": None,
        "latest_charge": "ch_1",
        "metadata": {},
        "next_action": None,
    }
    return stripe.PaymentIntent.construct_from(given | fields, "sk_test_x")


def opening(found: stripe.PaymentIntent, request: GatewayRequest) -> Outcome:
    return read_opening(found, request, ACTION_WINDOW)


@pytest.mark.parametrize(
    ("money", "amount"),
    [
        (Money(1250, "USD"), 1250),
        (Money(1250, "JPY"), 1250),
        (Money(5, "ISK"), 500),
        (Money(5, "UGX"), 500),
        (Money(17500, "HUF"), 17500),
        (Money(5120, "KWD"), 5120),
    ],
)
def test_amounts_keep_their_value_in_stripes_scale(money: Money, amount: int) -> None:
    assert to_stripe_amount(money) == amount
    assert from_stripe_amount(amount, money.currency) == money.minor


@pytest.mark.parametrize("money", [Money(5123, "KWD"), Money(100, "XXX")])
def test_an_amount_that_stripe_cannot_take_is_refused_up_front(money: Money) -> None:
    with pytest.raises(AmountNotRepresentable):
        to_stripe_amount(money)


def test_every_currency_of_the_service_has_a_scale() -> None:
    for currency in MINOR_UNITS:
        assert from_stripe_amount(to_stripe_amount(Money(100, currency)), currency) == 100


def test_a_fraction_of_a_currency_without_fractions_is_a_broken_contract() -> None:
    with pytest.raises(GatewayContractBroken):
        from_stripe_amount(550, "ISK")


def test_metadata_is_cut_to_stripes_limits_and_our_marks_win() -> None:
    given = {f"k{n}": "v" for n in range(60)} | {"a[b]": "x", "y" * 41: "x", "last_capture": "9"}
    given = {"payment_id": "forged", "long": "v" * 501} | given

    sent = metadata_of(REQUEST._replace(metadata=given))

    assert len(sent) == 49
    assert sent["payment_id"] == str(REQUEST.payment_id)
    assert (sent["operation_number"], sent["order_id"]) == ("2", "order-7")
    assert len(sent["long"]) == 500
    assert not {"a[b]", "y" * 41, "last_capture"} & sent.keys()


@pytest.mark.parametrize(
    ("request_", "found", "outcome"),
    [
        (REQUEST, intent("succeeded", amount_received=1000), Succeeded("pi_1", 1000)),
        (REQUEST, intent("requires_capture", amount_capturable=1000), Pending("pi_1")),
        (AUTHORIZE, intent("requires_capture", amount_capturable=1000), Succeeded("pi_1", 1000)),
        (REQUEST, intent("processing"), Pending("pi_1")),
        (REQUEST, intent("requires_confirmation"), Pending("pi_1")),
        (REQUEST, intent("requires_payment_method"), Pending("pi_1")),
        (REQUEST, intent("a_status_of_tomorrow"), Pending("pi_1")),
        (REQUEST, intent("requires_action"), Pending("pi_1")),
        (REQUEST, intent("canceled", amount_received=1), Pending("pi_1")),
        (REQUEST, intent("canceled", cancellation_reason="expired"), Expired("pi_1", "expired")),
        (REQUEST, intent("canceled", cancellation_reason="automatic"), Expired("pi_1", "automatic")),
        (REQUEST, intent("canceled", cancellation_reason="abandoned"), Expired("pi_1", "abandoned")),
        (AUTHORIZE, intent("canceled", cancellation_reason="automatic"), Expired("pi_1", "automatic")),
        (
            REQUEST,
            intent("requires_payment_method", last_payment_error=FAILED),
            Declined(DeclineReason.AUTHENTICATION_FAILED, FAILED["code"], "pi_1"),
        ),
        (
            REQUEST,
            intent("requires_action", next_action={"type": "redirect_to_url", "redirect_to_url": {"url": "https://x"}}),
            RequiresAction("pi_1", "redirect_to_url", "https://x", ENDS),
        ),
        (
            REQUEST,
            intent("requires_action", next_action={"type": "use_stripe_sdk", "use_stripe_sdk": {}}),
            RequiresAction("pi_1", "use_stripe_sdk", None, ENDS),
        ),
    ],
)
def test_the_status_of_an_authorization_or_charge(
    request_: GatewayRequest, found: stripe.PaymentIntent, outcome: Outcome
) -> None:
    assert opening(found, request_) == outcome


def test_a_payer_has_as_long_as_is_configured_from_the_creation_on() -> None:
    asked = intent("requires_action", next_action={"type": "use_stripe_sdk"})

    outcome = read_opening(asked, REQUEST, timedelta(minutes=45))

    assert outcome == RequiresAction("pi_1", "use_stripe_sdk", None, datetime.fromtimestamp(CREATED + 45 * 60, UTC))


def test_money_taken_where_only_a_hold_was_asked_for_is_a_broken_contract() -> None:
    with pytest.raises(GatewayContractBroken):
        opening(intent("succeeded", amount_received=1000), AUTHORIZE)


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        (intent("succeeded", amount_received=400), "closed"),
        (intent("canceled", amount_received=400, cancellation_reason="automatic"), "automatic"),
    ],
)
def test_a_hold_that_was_closed_with_what_we_captured_of_it_has_lapsed(
    found: stripe.PaymentIntent, reason: str
) -> None:
    asked = AUTHORIZE._replace(state=OperationState.SUCCEEDED, captured_minor=400)
    assert opening(found, asked) == Expired("pi_1", reason)


@pytest.mark.parametrize(
    "asked",
    [
        AUTHORIZE._replace(state=OperationState.SUCCEEDED, captured_minor=300),
        AUTHORIZE._replace(state=OperationState.SUCCEEDED),
        AUTHORIZE._replace(captured_minor=400),
    ],
)
def test_a_hold_of_which_others_took_something_is_a_broken_contract(asked: GatewayRequest) -> None:
    with pytest.raises(GatewayContractBroken):
        opening(intent("succeeded", amount_received=400), asked)


def test_the_end_of_a_hold_is_read_from_the_expanded_charge() -> None:
    charge = {"id": "ch_1", "object": "charge", "payment_method_details": {"card": {"capture_before": 1_800_000_000}}}

    outcome = opening(intent("requires_capture", amount_capturable=1000, latest_charge=charge), AUTHORIZE)

    assert outcome == Succeeded("pi_1", 1000, datetime.fromtimestamp(1_800_000_000, UTC))


MARKED = {"last_capture": "2"}


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (intent("succeeded", amount_received=1000, metadata=MARKED), Succeeded),
        (intent("requires_capture", amount_received=1000, metadata=MARKED), Succeeded),
        (intent("processing", metadata=MARKED), Pending),
        (intent("succeeded", amount_received=1000), Unknown),
        (intent("succeeded", amount_received=1000, metadata={"last_capture": "3"}), Unknown),
        (intent("requires_capture"), Unknown),
        (intent("canceled"), NotExecuted),
        (intent("canceled", amount_received=1), Unknown),
    ],
)
def test_a_capture_is_known_by_its_mark_and_its_money(found: stripe.PaymentIntent, expected: type[Outcome]) -> None:
    assert isinstance(read_capture(found, CAPTURE), expected)


@pytest.mark.parametrize("received", [0, 999])
def test_a_marked_capture_without_its_money_is_a_broken_contract(received: int) -> None:
    with pytest.raises(GatewayContractBroken):
        read_capture(intent("requires_capture", amount_received=received, metadata=MARKED), CAPTURE)


@pytest.mark.parametrize(
    ("found", "amount", "expected"),
    [
        (intent("canceled"), 1000, Succeeded),
        (intent("succeeded", amount_received=400), 600, Succeeded),
        (intent("succeeded", amount_received=1000), 600, Unknown),
        (intent("succeeded", amount_received=1000), 1000, Unknown),
        (intent("requires_capture"), 1000, Unknown),
        (intent("processing"), 1000, Pending),
        (intent("a_status_of_tomorrow"), 1000, Unknown),
    ],
)
def test_a_release_is_known_by_the_money_that_was_not_received(
    found: stripe.PaymentIntent, amount: int, expected: type[Outcome]
) -> None:
    assert isinstance(read_void(found, VOID._replace(amount=Money(amount, "USD"))), expected)


@pytest.mark.parametrize(
    ("status", "outcome"),
    [
        ("succeeded", Succeeded("re_1", 1000)),
        ("pending", Pending("re_1")),
        ("requires_action", Pending("re_1")),
        ("a_status_of_tomorrow", Pending("re_1")),
        (None, Pending("re_1")),
        ("failed", Declined(DeclineReason.REFUND_FAILED, "lost_or_stolen_card", "re_1")),
        ("canceled", Declined(DeclineReason.REFUND_FAILED, "lost_or_stolen_card", "re_1")),
    ],
)
def test_the_status_of_a_refund(status: str | None, outcome: Outcome) -> None:
    given = {
        "id": "re_1",
        "object": "refund",
        "amount": 1000,
        "currency": "usd",
        "status": status,
        "failure_reason": "lost_or_stolen_card",
    }

    assert read_refund(stripe.Refund.construct_from(given, "sk_test_x"), REQUEST) == outcome


@pytest.mark.parametrize(
    ("read", "found"),
    [
        (opening, intent("succeeded", amount_received=1000, currency="eur")),
        (read_capture, intent("succeeded", amount_received=1000, metadata=MARKED, currency="eur")),
        (read_void, intent("canceled", currency="eur")),
        (
            read_refund,
            stripe.Refund.construct_from(
                {"id": "re_1", "object": "refund", "amount": 1000, "currency": "eur", "status": "succeeded"}, None
            ),
        ),
    ],
)
def test_an_answer_in_another_currency_is_a_broken_contract(read: Callable[..., Outcome], found: Any) -> None:
    with pytest.raises(GatewayContractBroken, match="eur"):
        read(found, REQUEST)
