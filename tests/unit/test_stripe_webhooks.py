"""Stripe's signatures and events. The known-answer vector was computed by hand from the published rule."""

import hashlib
import hmac
import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import stripe
from pydantic import SecretStr

from app.settings import Settings
from app.wiring import create_webhook_readers
from domain.commands import OperationKind
from domain.notices import DisputeStage, External, Notice, Verdict, WebhookRefused, WebhookRequest
from domain.operations import Declined, DeclineReason, Expired, OperationState, Pending, RequiresAction, Succeeded
from infra.gateways.stripe_objects import ACTION_WINDOW, read_opening
from infra.gateways.stripe_webhooks import StripeWebhooks
from tests.contract.gateway_requests import a_request
from tests.support.service import new_payment_id

SECRET = "whsec_5WbX5kEWLlfzsGNjH64I8lOOqUB6e8FH"
SIGNED_AT = 1_700_000_000
BODY = (
    b'{"id":"evt_kav_1","object":"event","api_version":"2026-10-28.endive","created":1700000000,"livemode":false,'
    b'"pending_webhooks":1,"request":{"id":"req_kav","idempotency_key":"order-42-capture"},'
    b'"type":"payment_intent.succeeded","data":{"object":{"id":"pi_kav_1","object":"payment_intent","amount":1099,'
    b'"amount_received":1099,"currency":"usd","status":"succeeded"}}}'
)
V1 = "3782d5e260b4039207cb2efb16edd09ebafd04ad19cd6ed68d4da3c31763932a"
PAYMENT_ID = new_payment_id()


def request(body: bytes, header: str, at: int = SIGNED_AT) -> WebhookRequest:
    return WebhookRequest("POST", "", {"stripe-signature": header}, body, datetime.fromtimestamp(at, UTC))


def reader(*secrets: str) -> StripeWebhooks:
    return StripeWebhooks([SecretStr(each) for each in secrets or (SECRET,)])


def signed(body: bytes, at: int = SIGNED_AT, secret: str = SECRET) -> WebhookRequest:
    digest = hmac.new(secret.encode(), f"{at}.".encode() + body, hashlib.sha256).hexdigest()
    return request(body, f"t={at},v1={digest}", at)


async def test_the_known_answer_is_accepted() -> None:
    assert hashlib.sha256(BODY).hexdigest() == "db28905526c238740ad53080d7d2e8de78c03c878806f7229858c68d88f48d36"
    for given in (reader(), reader("whsec_new", SECRET)):
        for header in (
            f"t={SIGNED_AT},v1={V1}",
            f"t={SIGNED_AT},v1={'0' * 64},v1={V1}",
            f"t={SIGNED_AT}=x,v1={V1}",
        ):
            with pytest.raises(WebhookRefused, match="malformed"):  # the vector's object lacks a PaymentIntent's fields
                await given.read(request(BODY, header))


@pytest.mark.parametrize(
    ("body", "header"),
    [
        (BODY + b"\n", f"t={SIGNED_AT},v1={V1}"),
        (json.dumps(json.loads(BODY)).encode(), f"t={SIGNED_AT},v1={V1}"),
        (BODY.replace(b"1099", b"1098", 1), f"t={SIGNED_AT},v1={V1}"),
        (BODY, f"t={SIGNED_AT},v1={V1[:-1]}b"),
        (BODY, f"t={SIGNED_AT + 1},v1={V1}"),
        (BODY, f"t={SIGNED_AT},v1={V1.upper()}"),
        (BODY, f"t={SIGNED_AT},v0={V1}"),
        (BODY, f"t={SIGNED_AT}, v1={V1}"),
        (BODY, f"t={SIGNED_AT},v1=é{V1}"),
        (BODY, ""),
        (BODY, "garbage"),
        (BODY, f"t=yesterday,v1={V1}"),
        (BODY, f"t=,v1={V1}"),
        (b"\xff\xfe", f"t={SIGNED_AT},v1={V1}"),
    ],
)
async def test_anything_altered_is_forged(body: bytes, header: str) -> None:
    with pytest.raises(WebhookRefused) as refused:
        await reader().read(request(body, header))
    assert refused.value.verdict is Verdict.FORGED


@pytest.mark.parametrize("secrets", [(), ("whsec_other",), ("",)])
async def test_without_the_right_secret_nothing_is_accepted(secrets: tuple[str, ...]) -> None:
    with pytest.raises(WebhookRefused) as refused:
        await StripeWebhooks([SecretStr(each) for each in secrets]).read(signed(BODY))
    assert refused.value.verdict is Verdict.FORGED


@pytest.mark.parametrize(("shift", "is_stale"), [(299, False), (301, True), (-299, False), (-301, True)])
async def test_too_old_or_from_the_future_is_stale(shift: int, is_stale: bool) -> None:
    given = signed(BODY)._replace(received_at=datetime.fromtimestamp(SIGNED_AT + shift, UTC))
    with pytest.raises(WebhookRefused) as refused:
        await reader().read(given)
    assert (refused.value.verdict is Verdict.STALE) == is_stale


@pytest.mark.parametrize("body", [b"not json", b"[]", b"7", b'{"object":"v2.core.event"}', b"{}", b'{"id":1,"data":7}'])
async def test_signed_but_unreadable_is_malformed(body: bytes) -> None:
    with pytest.raises(WebhookRefused) as refused:
        await reader().read(signed(body))
    assert refused.value.verdict is Verdict.MALFORMED


# --- what events say --------------------------------------------------------------------------------------------------


async def heard(type_: str, object_: dict[str, Any]) -> Notice:
    event = {"id": "evt_1", "object": "event", "type": type_, "created": SIGNED_AT - 1, "data": {"object": object_}}
    return await reader().read(signed(json.dumps(event).encode()))


def intent(status: str, **fields: Any) -> dict[str, Any]:
    return {
        "id": "pi_1",
        "object": "payment_intent",
        "amount": 1250,
        "amount_capturable": 0,
        "amount_received": 0,
        "currency": "usd",
        "capture_method": "automatic",
        "created": SIGNED_AT - 2,
        "status": status,
        "metadata": {"payment_id": str(PAYMENT_ID), "operation_number": "1"},
        "latest_charge": None,
        "last_payment_error": None,
        "cancellation_reason": None,
        "next_action": None,
    } | fields


ENDS = datetime.fromtimestamp(SIGNED_AT - 2, UTC) + ACTION_WINDOW
REDIRECT = {"type": "redirect_to_url", "redirect_to_url": {"url": "https://bank.invalid", "return_url": "x"}}
CASES = {
    "payment_intent.succeeded": (intent("succeeded", amount_received=1250), Succeeded("pi_1", 1250)),
    "payment_intent.amount_capturable_updated": (
        intent("requires_capture", capture_method="manual", amount_capturable=1250),
        Succeeded("pi_1", 1250),
    ),
    "payment_intent.payment_failed": (
        intent("requires_payment_method", last_payment_error={"code": "card_declined", "decline_code": "lost_card"}),
        Declined(DeclineReason.SUSPECTED_FRAUD, "lost_card", "pi_1"),
    ),
    "payment_intent.canceled": (intent("canceled", cancellation_reason="automatic"), Expired("pi_1", "automatic")),
    "payment_intent.requires_action": (
        intent("requires_action", next_action=REDIRECT),
        RequiresAction("pi_1", "redirect_to_url", "https://bank.invalid", ENDS),
    ),
    "payment_intent.processing": (intent("processing"), Pending("pi_1")),
}


@pytest.mark.parametrize("type_", CASES)
async def test_an_event_is_evidence_about_the_operation_whose_marks_it_carries(type_: str) -> None:
    object_, outcome = CASES[type_]
    notice = await heard(type_, object_)
    assert (notice.payment_id, notice.operation_number, notice.outcome) == (PAYMENT_ID, 1, outcome)
    assert (notice.gateway_payment_id, notice.currency) == ("pi_1", "USD")


async def test_the_last_capture_is_known_by_its_mark_and_without_one_it_is_somebody_elses() -> None:
    object_ = intent("succeeded", capture_method="manual", amount_received=1250, latest_charge="ch_1")
    notice = await heard("payment_intent.succeeded", object_)
    assert (notice.payment_id, notice.operation_number, notice.gateway_payment_id) == (PAYMENT_ID, None, "pi_1")
    assert notice.outcome == Succeeded("ch_1", 1250)
    told_at = datetime.fromtimestamp(SIGNED_AT - 1, UTC)
    assert notice.external == External(OperationKind.CAPTURE, 1250, told_at, is_final=True)
    assert (await heard("payment_intent.succeeded", object_ | {"metadata": {}})).is_about_nothing
    object_["metadata"]["last_capture"] = "3"
    notice = await heard("payment_intent.succeeded", object_)
    assert (notice.operation_number, notice.outcome) == (3, Succeeded("pi_1"))
    assert notice.captured_minor == 1250


async def test_a_notice_of_a_last_capture_reports_the_total_captured() -> None:
    marks = {"payment_id": str(PAYMENT_ID), "operation_number": "3", "last_capture": "4"}
    object_ = intent("succeeded", capture_method="manual", amount_received=1100, metadata=marks)
    notice = await heard("payment_intent.succeeded", object_)
    assert (notice.operation_number, notice.outcome) == (4, Succeeded("pi_1", 1100))
    assert notice.captured_minor == 1100


async def test_the_total_captured_is_not_reported_while_more_can_be_captured_or_of_a_charge() -> None:
    open_ = intent("requires_capture", capture_method="manual", amount_received=500, amount_capturable=750)
    assert (await heard("payment_intent.amount_capturable_updated", open_)).captured_minor is None
    charged = intent("succeeded", amount_received=1250)
    assert (await heard("payment_intent.succeeded", charged)).captured_minor is None


@pytest.mark.parametrize(
    ("status", "outcome"),
    [
        ("succeeded", Succeeded("re_1", 500)),
        ("failed", Declined(DeclineReason.REFUND_FAILED, None, "re_1")),
        ("canceled", Declined(DeclineReason.REFUND_FAILED, None, "re_1")),
        ("pending", Pending("re_1")),
        ("a_status_of_tomorrow", Pending("re_1")),
    ],
)
async def test_a_refund_tells_its_own_operation(status: str, outcome: object) -> None:
    metadata = {"payment_id": str(PAYMENT_ID), "operation_number": "2"}
    refund = {"id": "re_1", "amount": 500, "currency": "usd", "payment_intent": "pi_1", "status": status}
    notice = await heard("refund.updated", refund | {"metadata": metadata})
    assert (notice.payment_id, notice.operation_number, notice.outcome) == (PAYMENT_ID, 2, outcome)
    assert notice.external is None
    unmarked = refund | {"metadata": {}, "created": SIGNED_AT, "balance_transaction": "txn_1"}
    notice = await heard("refund.created", unmarked)
    assert (notice.payment_id, notice.operation_number, notice.outcome) == (None, None, outcome)
    assert notice.gateway_payment_id == "pi_1"
    assert notice.external == External(OperationKind.REFUND, 500, datetime.fromtimestamp(SIGNED_AT, UTC))


@pytest.mark.parametrize(
    "facts", [{"balance_transaction": None}, {"reason": "expired_uncaptured_charge", "balance_transaction": "txn_1"}]
)
async def test_a_hold_that_was_let_go_is_no_refund_though_stripe_calls_it_one(facts: dict[str, Any]) -> None:
    refund = {"id": "re_1", "amount": 500, "currency": "usd", "payment_intent": "pi_1", "status": "succeeded"}
    assert (await heard("refund.created", refund | {"created": SIGNED_AT, "metadata": {}} | facts)).is_about_nothing


@pytest.mark.parametrize(
    ("status", "stage"),
    [
        ("needs_response", DisputeStage.OPENED),
        ("under_review", DisputeStage.OPENED),
        ("won", DisputeStage.WON),
        ("lost", DisputeStage.LOST),
        ("warning_needs_response", None),
        ("a_status_of_tomorrow", None),
    ],
)
async def test_a_dispute_is_found_by_the_providers_payment(status: str, stage: DisputeStage | None) -> None:
    dispute = {"id": "dp_1", "amount": 1250, "currency": "usd", "payment_intent": "pi_1", "status": status}
    notice = await heard("charge.dispute.updated", dispute)
    assert (notice.dispute.stage if notice.dispute else None) is stage
    assert stage is None or (notice.gateway_payment_id, notice.payment_id) == ("pi_1", None)


async def test_an_unknown_type_says_nothing() -> None:
    notice = await heard("customer.created", {"id": "cus_1"})
    assert (notice.event_id, notice.outcome, notice.dispute) == ("evt_1", None, None)


async def test_an_event_of_a_connected_account_is_ignored() -> None:
    """The owner of an account connected to ours could create a payment that carries our marks."""
    event = {"id": "evt_1", "type": "payment_intent.succeeded", "account": "acct_2"}
    body = json.dumps(event | {"data": {"object": intent("succeeded", amount_received=1250)}})
    notice = await reader(SECRET).read(signed(body.encode()))
    assert notice.is_about_nothing


@pytest.mark.parametrize("reason", ["automatic", "expired", "abandoned", "requested_by_customer", None])
async def test_a_canceled_intent_is_read_alike_from_a_webhook_and_a_query(reason: str | None) -> None:
    object_ = intent("canceled", cancellation_reason=reason)
    asked = a_request(payment_id=PAYMENT_ID, reference="pi_1", state=OperationState.REQUIRES_ACTION)
    told = read_opening(stripe.PaymentIntent.construct_from(object_, None), asked, ACTION_WINDOW)
    assert (await heard("payment_intent.canceled", object_)).outcome == told == Expired("pi_1", reason)


async def test_a_webhook_an_answer_and_a_question_tell_the_same_end_of_a_payers_time() -> None:
    object_, window = intent("requires_action", next_action=REDIRECT), timedelta(minutes=45)
    event = {"id": "evt_1", "type": "payment_intent.requires_action", "data": {"object": object_}}
    own: dict[str, Any] = {
        "stripe_webhook_secrets": [SECRET],
        "stripe_return_url": "https://shop.invalid",
    }
    readers = create_webhook_readers(Settings(stripe_action_window_seconds=window.total_seconds(), **own))
    by_webhook = await readers["stripe"].read(signed(json.dumps(event).encode()))
    asked = a_request(payment_id=PAYMENT_ID, reference="pi_1")
    told = read_opening(stripe.PaymentIntent.construct_from(object_, None), asked, window)
    end = datetime.fromtimestamp(SIGNED_AT - 2, UTC) + window
    assert by_webhook.outcome == told == RequiresAction("pi_1", "redirect_to_url", "https://bank.invalid", end)
