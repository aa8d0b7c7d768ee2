"""MoMo's signatures, tested with vectors from its own gateway, and its result table: an unknown code ends nothing."""

import base64
import json
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from typing import Any
from urllib.parse import urlencode
from uuid import UUID

import httpx
import pytest
from pydantic import SecretStr

from domain.commands import OperationKind
from domain.errors import GatewayContractBroken, GatewayUnreachable, OutcomeUnknown
from domain.money import Money
from domain.notices import Verdict, WebhookRefused, WebhookRequest
from domain.operations import (
    Declined,
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
from infra.gateways import momo
from infra.gateways.momo import MoMoConfig, MoMoGateway
from infra.gateways.momo_webhooks import MoMoWebhooks
from tests.contract.gateway_requests import a_request

K1 = ("klm05TvNBzhg7h7j", SecretStr("at67qH6mk8w5Y1nAyMoYKMWACiEi2bsa"))
K2 = ("F8BBA842ECF85", SecretStr("K951B6PE1waDMi640xX08PD3vg6EkVlz"))
"""MoMo publishes both for tests, in the repository momo-wallet/payment."""
CREATE_ANSWER = ("amount", "orderId", "partnerCode", "payUrl", "requestId", "responseTime", "resultCode")
PARTNER = "MOMOBKUN20180529"
PAYMENT_ID = UUID("0190b3a1-7a3c-7e11-9c53-1f0a3a8b9c00")


def redirected(  # noqa: PLR0917 - the columns of the published table
    amount: str, message: str, order: str, info: str, pay: str, request: str, rest: str
) -> dict[str, str]:
    time, code, transaction = rest.split()
    return {
        "amount": amount,
        "extraData": "",
        "message": message,
        "orderId": order,
        "orderInfo": info,
        "orderType": "momo_wallet",
        "partnerCode": PARTNER,
        "payType": pay,
        "requestId": request,
        "responseTime": time,
        "resultCode": code,
        "transId": transaction,
    }


REJECTED = "Transaction rejected by the issuers of the payment accounts."
VIA = "Thanh toán qua MoMo"
WEBHOOK = "https://webhook.site/04561cd2-489b-4982-9e68-5111a84a097a"
PAY_URL = "https://test-payment.momo.vn/v2/gateway/pay?t=TU9NT0JLVU4yMDE4MDUyOXxPRDE2NjMzNDA2MTg2MjM="
VECTORS: dict[str, tuple[Any, Any, tuple[str, ...], str]] = {
    "M1 create": (
        K1,
        {
            "amount": 10000,
            "extraData": "",
            "ipnUrl": WEBHOOK,
            "orderId": "OD1696393612323",
            "orderInfo": "Thanh toan hoa don OD1696393612323",
            "partnerCode": PARTNER,
            "redirectUrl": WEBHOOK,
            "requestId": "RE1696393612323",
            "requestType": "captureWallet",
        },
        momo.CREATE,
        "232cc5b7b748555cb32d66a3552092ba117ce88b0cd2508f684e00607fb44ba3",
    ),
    "M2": (
        K1,
        redirected("1579000", "Successful.", "1661866315", VIA, "napas", "1661866315", "1661866457628 0 2722713142"),
        momo.IPN,
        "3c93f8aa13351cea9e5074749fe9364d0d6d516b81813351758a96edd4ca9d9f",
    ),
    "M3": (
        K1,
        redirected("10000", REJECTED, "1732804656", VIA, "napas", "1732804656", "1732804678758 1002 4248103194"),
        momo.IPN,
        "e442b5c2e45717740f64b8ebc21a58eb101ae3cd62fb75571f0914071c37b6c9",
    ),
    "M6": (
        K1,
        redirected("720000", "Successful.", "27_1679159221", VIA, "napas", "1679159221", "1679159287643 0 2937335899"),
        momo.IPN,
        "a59354d19c6f50d7070406826faeb4304ae6fbfe297790a85859bc1b9ba98ec9",
    ),
    "M9": (
        K1,
        redirected(
            "5910000",
            "Successful.",
            "673_20260602231442",
            "Thanh toan don hang #673",
            "napas",
            "673_20260602231442",
            "1780416956088 0 4755295878",
        ),
        momo.IPN,
        "38ec8d629f1756abd4b267bad14dc39a4a56a70a56a16fdb3f0a6ad82af45cb2",
    ),
    "M10": (
        K2,
        redirected(
            "1000",
            "Successful.",
            "MOMO1731137931267",
            "undefined nạp tiền vào tài khoản",
            "qr",
            "MOMO1731137931267",
            "1731137968770 0 4225107942",
        )
        | {"partnerCode": "MOMO"},
        momo.IPN,
        "2068ac90836a9aacdefd4995b58ed03f0b1f1d27046b7ca371b92175bb5437a6",
    ),
    "Q1 query": (
        K1,
        {"orderId": "OD1663340618623", "partnerCode": PARTNER, "requestId": "RE1663340978403"},
        momo.QUERY,
        "9b13aa69e88e0271b431561f9441e8956fbd32dee629985ae8a91e6dabeea092",
    ),
    "C1 capture": (
        K1,
        {
            "amount": 10000,
            "description": "",
            "orderId": "OD1663340310435",
            "partnerCode": PARTNER,
            "requestId": "re_1663340362683",
            "requestType": "capture",
        },
        momo.CONFIRM,
        "f3212272d85292dbbeaf68b7b74ea012225fac2c04315b82d6e5e2a40c0e4cff",
    ),
    "C2 cancel": (
        K1,
        {
            "amount": 10000,
            "description": "",
            "orderId": "OD1663340618623",
            "partnerCode": PARTNER,
            "requestId": "RE1663340744772",
            "requestType": "cancel",
        },
        momo.CONFIRM,
        "e70dc527683d308ebf480ce11e09742b1ed0764031604463fb9b0547369563a5",
    ),
    "R1 refund": (
        K1,
        {
            "amount": 10000,
            "description": "Hoàn tiền",
            "orderId": "OD1663341395713",
            "partnerCode": PARTNER,
            "requestId": "RE1663341395713",
            "transId": 2727604374,
        },
        momo.REFUND,
        "c6fd3ba9e7f2e8d488dc99872002cd998c48467cade8aa8759d25735e13b6040",
    ),
    "P1 create's answer": (
        K1,
        {
            "amount": 10000,
            "orderId": "OD1663340618623",
            "partnerCode": PARTNER,
            "payUrl": PAY_URL,
            "requestId": "RE1663340618623",
            "responseTime": 1663340619666,
            "resultCode": 0,
        },
        CREATE_ANSWER,
        "f85b1b4ea5dd9b251c8104bdaafa79fc7eb545c775e2cdda3911305c4b6861bc",
    ),
}


@pytest.mark.parametrize("name", VECTORS)
def test_a_vector_is_accepted_and_altered_by_one_byte_refused(name: str) -> None:
    (access, secret), fields, names, signature = VECTORS[name]
    text = momo.signed_text(access, fields, names)
    assert momo.is_signed(secret, text, signature)
    assert not momo.is_signed(secret, text + " ", signature)
    assert not momo.is_signed(secret, text, signature[:-1] + ("0" if signature[-1] != "0" else "1"))
    assert not momo.is_signed(secret, momo.signed_text("other", fields, names), signature)
    for each in names:
        altered = fields | {each: f"{fields[each]}1"}
        assert not momo.is_signed(secret, momo.signed_text(access, altered, names), signature)


# --- the IPN ----------------------------------------------------------------------------------------------------------


def config(key: tuple[str, SecretStr] = K1, partner: str = PARTNER) -> MoMoConfig:
    access, secret = key
    return MoMoConfig(partner_code=partner, access_key=access, secret_key=secret, api_base="https://momo.invalid")


def ipn(fields: dict[str, Any]) -> WebhookRequest:
    return WebhookRequest("POST", "", {}, json.dumps(fields, ensure_ascii=False).encode(), datetime.now(UTC))


def told(**fields: Any) -> dict[str, Any]:
    given: dict[str, Any] = VECTORS["M3"][1] | {
        "amount": 10_000,
        "resultCode": 0,
        "transId": 42,
        "responseTime": 1_732_804_678_758,
    }
    given |= {"orderId": momo.order_id(PAYMENT_ID, 1), "requestId": momo.order_id(PAYMENT_ID, 1)} | fields
    access, secret = K1
    return given | {"signature": momo.sign(secret, momo.signed_text(access, given, momo.IPN))}


async def test_a_message_that_momo_signed_is_verified_and_its_marks_are_not_ours() -> None:
    _, fields, _, signature = VECTORS["M3"]
    numbers = {name: int(fields[name]) for name in ("amount", "responseTime", "resultCode", "transId")}
    notice = await MoMoWebhooks(config()).read(ipn(fields | numbers | {"signature": signature, "userFee": 0}))
    assert (notice.payment_id, notice.outcome) == (None, Pending(None))


@pytest.mark.parametrize(
    "fields",
    [
        told() | {"amount": 10_001},
        told() | {"resultCode": 9000},
        told() | {"signature": "0" * 64},
        told() | {"signature": "é"},
        told(partnerCode="OTHER"),
        told() | {"amount": 10_000.0},
    ],
)
async def test_an_altered_message_is_forged(fields: dict[str, Any]) -> None:
    with pytest.raises(WebhookRefused) as refused:
        await MoMoWebhooks(config()).read(ipn(fields))
    assert refused.value.verdict is Verdict.FORGED


@pytest.mark.parametrize("body", [b"", b"[]", b"\xff", b"{}", b'{"amount": 1}'])
async def test_an_unreadable_webhook_is_malformed(body: bytes) -> None:
    with pytest.raises(WebhookRefused) as refused:
        await MoMoWebhooks(config()).read(ipn({})._replace(body=body))
    assert refused.value.verdict is Verdict.MALFORMED


@pytest.mark.parametrize(
    ("code", "outcome"),
    [
        (0, Succeeded),
        (9000, Succeeded),
        (1001, Declined),
        (1006, Declined),
        (1003, Expired),
        (1005, Expired),
        (1000, Pending),
        (7000, Pending),
        (99, Pending),
        (123456, Pending),
    ],
)
async def test_a_momo_message_reports_the_operation_named_by_its_order_id(code: int, outcome: type[Outcome]) -> None:
    notice = await MoMoWebhooks(config()).read(ipn(told(resultCode=code)))
    assert (notice.payment_id, notice.operation_number, notice.currency) == (PAYMENT_ID, 1, "VND")
    assert isinstance(notice.outcome, outcome)
    if isinstance(notice.outcome, Succeeded):
        assert notice.outcome.amount_minor == 10_000


@pytest.mark.parametrize(
    ("kind", "code", "outcome"),
    [
        (OperationKind.AUTHORIZE, 9000, Succeeded),
        (OperationKind.AUTHORIZE, 0, Pending),
        (OperationKind.AUTHORIZE, 1003, Expired),
        (OperationKind.CHARGE, 0, Succeeded),
        (OperationKind.CHARGE, 9000, Succeeded),
    ],
)
async def test_money_taken_where_only_a_hold_was_asked_for_is_no_hold_by_a_message_either(
    kind: OperationKind, code: int, outcome: type[Outcome]
) -> None:
    given = told(resultCode=code, extraData=momo.extra_data(kind))
    assert isinstance((await MoMoWebhooks(config()).read(ipn(given))).outcome, outcome)


async def test_a_hold_has_no_end_since_momo_reports_none() -> None:
    asked = a(OperationKind.AUTHORIZE, reference=momo.order_id(PAYMENT_ID, 1))
    by_question = await gateway(lambda path, body: {"resultCode": 9000}).status(asked)
    by_ipn = (await MoMoWebhooks(config()).read(ipn(told(resultCode=9000)))).outcome
    for outcome in (by_question, by_ipn):
        assert isinstance(outcome, Succeeded)
        assert outcome.expires_at is None
    paid = await gateway(lambda path, body: {"resultCode": 0}).status(a(OperationKind.CHARGE))
    assert paid == Succeeded(momo.order_id(PAYMENT_ID, 1), 10_000)


async def test_another_amount_is_another_message() -> None:
    ids = {(await MoMoWebhooks(config()).read(ipn(told(amount=each)))).event_id for each in (10_000, 9_999)}
    assert len(ids) == 2


def test_momo_is_answered_204_for_every_received_notice() -> None:
    answers = {each: MoMoWebhooks(config()).answer(each, ipn({})).status for each in Verdict}
    assert {each for each, status in answers.items() if status == 204} == {
        Verdict.STORED,
        Verdict.DUPLICATE,
        Verdict.ALREADY_FINAL,
        Verdict.AMOUNT_DIFFERS,
    }


# --- the return of the payer's browser --------------------------------------------------------------------------------


def returned(fields: dict[str, Any]) -> WebhookRequest:
    return WebhookRequest("GET", urlencode(fields), {}, b"", datetime.now(UTC))


@pytest.mark.parametrize("vector", [name for name, (_, _, signed, _) in VECTORS.items() if signed == momo.IPN])
async def test_a_return_that_momo_signed_is_verified(vector: str) -> None:
    (access, secret), fields, _, signature = VECTORS[vector]
    reader = MoMoWebhooks(config((access, secret), fields["partnerCode"]))
    notice = await reader.read(returned(fields | {"signature": signature, "userFee": "0"}))
    assert notice.outcome == Pending(None)


async def test_a_return_is_the_same_message_as_the_ipn() -> None:
    reader = MoMoWebhooks(config())
    by_browser, by_ipn = await reader.read(returned(told())), await reader.read(ipn(told()))
    assert by_browser == by_ipn
    assert by_ipn.outcome == Succeeded(momo.order_id(PAYMENT_ID, 1), 10_000)


@pytest.mark.parametrize(
    "fields", [told() | {"resultCode": 9000}, told() | {"signature": "0" * 64}, told(partnerCode="OTHER")]
)
async def test_an_altered_return_is_forged(fields: dict[str, Any]) -> None:
    with pytest.raises(WebhookRefused) as refused:
        await MoMoWebhooks(config()).read(returned(fields))
    assert refused.value.verdict is Verdict.FORGED


@pytest.mark.parametrize("more", ["&resultCode=0", "&a", "&%ff=%ff"])
async def test_a_return_that_cannot_be_read_is_malformed(more: str) -> None:
    given = returned(told(resultCode=1006))
    for query in (given.query + more, "", more):
        with pytest.raises(WebhookRefused) as refused:
            await MoMoWebhooks(config()).read(given._replace(query=query))
        assert refused.value.verdict is Verdict.MALFORMED


async def test_a_return_with_a_body_is_refused_for_only_its_query_is_signed() -> None:
    with pytest.raises(WebhookRefused) as refused:
        await MoMoWebhooks(config()).read(returned(told())._replace(body=ipn(told(resultCode=1006)).body))
    assert refused.value.verdict is Verdict.MALFORMED


def test_a_browser_is_shown_a_text() -> None:
    reader = MoMoWebhooks(config())
    answers = {each: reader.answer(each, returned({})) for each in Verdict}
    assert {each for each, answer in answers.items() if answer.status == 200} == {
        Verdict.STORED,
        Verdict.DUPLICATE,
        Verdict.ALREADY_FINAL,
        Verdict.AMOUNT_DIFFERS,
    }
    assert all(answer.body for answer in answers.values())


# --- the gateway, with MoMo's answers replaced at the HTTP boundary ---------------------------------------------------

Handle = Callable[[str, dict[str, Any]], dict[str, Any] | httpx.Response]


def gateway(handle: Handle | Exception) -> MoMoGateway:
    def answer(request: httpx.Request) -> httpx.Response:
        if isinstance(handle, Exception):
            raise handle
        body = json.loads(request.content)
        given = handle(request.url.path.rpartition("/api/")[2], body)
        if isinstance(given, httpx.Response):
            return given
        echo = {name: body[name] for name in ("partnerCode", "orderId", "requestId")}
        told = echo | {"amount": 10_000, "transId": 42} | given
        return httpx.Response(200, json={name: value for name, value in told.items() if value is not None})

    built = MoMoGateway(config())
    built._http._client = httpx.AsyncClient(transport=httpx.MockTransport(answer), base_url="https://momo.invalid")
    return built


def result(code: int, **more: Any) -> Handle:
    """Answer every call with this result code, except queries: they get 42 (no such operation)."""
    return lambda path, body: {"resultCode": code if path != "query" else 42} | more


def a(kind: OperationKind, **more: Any) -> GatewayRequest:
    given: dict[str, Any] = {"payment_id": PAYMENT_ID, "amount": Money(10_000, "VND")}
    if kind not in (OperationKind.CHARGE, OperationKind.AUTHORIZE):
        given |= {"number": 2, "gateway_payment_id": momo.order_id(PAYMENT_ID, 1)}
    return a_request(kind, **(given | more))


@pytest.mark.parametrize(("kind", "captures"), [(OperationKind.CHARGE, True), (OperationKind.AUTHORIZE, False)])
async def test_a_link_is_no_payment_and_the_same_request_has_the_same_body(kind: OperationKind, captures: bool) -> None:
    bodies: list[dict[str, Any]] = []

    def handle(_: str, body: dict[str, Any]) -> dict[str, Any]:
        bodies.append(body)
        return {"resultCode": 0, "payUrl": "https://momo.invalid/pay"}

    for _ in range(2):
        outcome = await (gateway(handle).charge if captures else gateway(handle).authorize)(a(kind))
        assert outcome == RequiresAction(momo.order_id(PAYMENT_ID, 1), "redirect", "https://momo.invalid/pay")
    assert bodies[0] == bodies[1]
    assert (bodies[0]["autoCapture"], bodies[0]["amount"]) == (captures, 10_000)
    assert json.loads(base64.b64decode(bodies[0]["extraData"])) == {"kind": kind}
    access, secret = K1
    assert momo.is_signed(secret, momo.signed_text(access, bodies[0], momo.CREATE), bodies[0]["signature"])
    assert len(bodies[0]["orderId"]) <= 50


@pytest.mark.parametrize(
    ("code", "outcome"),
    [
        (1001, Declined),
        (1006, Declined),
        (1003, Expired),
        (1005, Expired),
        (11, NotExecuted),
        (13, NotExecuted),
        (22, NotExecuted),
        (7000, Pending),
    ],
)
async def test_the_outcome_of_a_first_momo_attempt_by_its_code(code: int, outcome: type[Outcome]) -> None:
    assert isinstance(await gateway(result(code)).charge(a(OperationKind.CHARGE)), outcome)


@pytest.mark.parametrize("code", [10, 43, 98])
async def test_momo_codes_of_a_request_not_accepted_raise_gateway_unreachable(code: int) -> None:
    with pytest.raises(GatewayUnreachable):
        await gateway(result(code)).charge(a(OperationKind.CHARGE))


@pytest.mark.parametrize("code", [99, 1080, 12345, 40, 41])
async def test_an_unexpected_momo_code_leaves_the_outcome_unknown(code: int) -> None:
    with pytest.raises(OutcomeUnknown):
        await gateway(result(code)).charge(a(OperationKind.CHARGE))


@pytest.mark.parametrize("code", [0.9, -0.5, False, "0.0", "", [], "\u0660"])
async def test_only_a_whole_number_is_a_result(code: Any) -> None:
    """Rounded, most of these would be 0, which is MoMo's code for success."""
    for path in ("create", "query"):
        answers = {"create": {"resultCode": 42}, "query": {"resultCode": 42}} | {path: {"resultCode": code}}
        answered = gateway(partial(_from, answers))
        call = answered.status if path == "query" else answered.charge
        with pytest.raises(GatewayContractBroken):
            await call(a(OperationKind.CHARGE))


def _from(answers: dict[str, dict[str, Any]], path: str, body: dict[str, Any]) -> dict[str, Any]:
    return answers[path]


@pytest.mark.parametrize("amount", [10_000.9, True, "1_0000", " 10000 "])
async def test_only_a_whole_number_is_an_amount(amount: Any) -> None:
    with pytest.raises(GatewayContractBroken):
        await gateway(lambda *_: {"resultCode": 0, "amount": amount}).status(a(OperationKind.CHARGE))


@pytest.mark.parametrize("code", [11, 13, 22, 1088])
async def test_a_refusal_is_no_proof_once_an_attempt_is_unaccounted_for(code: int) -> None:
    for kind in (OperationKind.CHARGE, OperationKind.REFUND):
        lost = a(kind)._replace(state=OperationState.INDETERMINATE, attempts=2)
        handle: Handle = lambda path, body: {"resultCode": code if path != "query" else 1000}  # noqa: E731
        if kind is OperationKind.REFUND:
            with pytest.raises(OutcomeUnknown):
                await gateway(handle).refund(lost)
        else:
            assert await gateway(handle).charge(lost) == Pending(momo.order_id(PAYMENT_ID, 1))


@pytest.mark.parametrize("code", [7000, 7002])
@pytest.mark.parametrize("kind", [OperationKind.CAPTURE, OperationKind.VOID])
async def test_a_capture_or_void_that_is_still_being_executed_is_sent_again(kind: OperationKind, code: int) -> None:
    """A query would show the hold as it was before, and never that this request came to nothing."""
    call = getattr(gateway(result(code)), kind.value)
    with pytest.raises(OutcomeUnknown):
        await call(a(kind))


async def test_a_duplicate_is_looked_for() -> None:
    def handle(path: str, _: dict[str, Any]) -> dict[str, Any]:
        return {"resultCode": 0} if path == "query" else {"resultCode": 41}

    assert await gateway(handle).charge(a(OperationKind.CHARGE)) == Succeeded(momo.order_id(PAYMENT_ID, 1), 10_000)


@pytest.mark.parametrize(
    ("kind", "code", "outcome"),
    [
        (OperationKind.CHARGE, 0, Succeeded),
        (OperationKind.CHARGE, 9000, Succeeded),
        (OperationKind.CHARGE, 1000, Pending),
        (OperationKind.CHARGE, 1003, Expired),
        (OperationKind.CHARGE, 1005, Expired),
        (OperationKind.CHARGE, 7002, Pending),
        (OperationKind.CHARGE, 77, Pending),
        (OperationKind.CHARGE, 42, Unknown),
        (OperationKind.AUTHORIZE, 9000, Succeeded),
        (OperationKind.AUTHORIZE, 1003, Expired),
        (OperationKind.CAPTURE, 0, Succeeded),
        (OperationKind.CAPTURE, 9000, Unknown),
        (OperationKind.CAPTURE, 1003, NotExecuted),
        (OperationKind.VOID, 1003, Succeeded),
        (OperationKind.VOID, 9000, Unknown),
        (OperationKind.VOID, 0, Unknown),
        (OperationKind.REFUND, 0, Unknown),
    ],
)
async def test_the_outcome_of_a_momo_query_by_its_code(kind: OperationKind, code: int, outcome: type[Outcome]) -> None:
    assert isinstance(await gateway(lambda *_: {"resultCode": code}).status(a(kind)), outcome)


@pytest.mark.parametrize(
    ("state", "outcome"),
    [
        (OperationState.REQUIRES_ACTION, RequiresAction),
        (OperationState.INDETERMINATE, Pending),
        (OperationState.PENDING, Pending),
        (OperationState.NEEDS_REVIEW, Pending),
    ],
)
async def test_nobody_is_sent_to_a_link_that_was_lost_with_its_answer(
    state: OperationState, outcome: type[Outcome]
) -> None:
    asked = a(OperationKind.CHARGE, state=state)
    assert isinstance(await gateway(lambda *_: {"resultCode": 1000}).status(asked), outcome)


async def test_a_refund_is_found_by_its_own_order_id_and_amount() -> None:
    own = momo.order_id(PAYMENT_ID, 2)

    def refunded(row: dict[str, Any]) -> Handle:
        return lambda *_: {"resultCode": 0, "refundTrans": [row]}

    row = {"orderId": own, "amount": 10_000, "resultCode": 0, "transId": 7}
    asked = a(OperationKind.REFUND)
    assert await gateway(refunded(row)).status(asked) == Succeeded("7", 10_000)
    assert isinstance(await gateway(refunded(row | {"resultCode": 7002})).status(asked), Pending)
    assert isinstance(await gateway(refunded(row | {"resultCode": 1080})).status(asked), Declined)
    assert isinstance(await gateway(refunded(row | {"amount": 9})).status(asked), Unknown)
    assert isinstance(await gateway(refunded(row | {"orderId": "other"})).status(asked), Unknown)


async def test_a_refund_that_was_made_at_an_attempt_whose_answer_was_lost_is_seen_before_it_is_sent_again() -> None:
    row = {"orderId": momo.order_id(PAYMENT_ID, 2), "amount": 10_000, "resultCode": 0, "transId": 7}

    def handle(path: str, body: dict[str, Any]) -> dict[str, Any]:
        assert path == "query", "sent again"
        return {"resultCode": 0, "refundTrans": [row]}

    asked = a(OperationKind.REFUND, state=OperationState.INDETERMINATE)
    assert await gateway(handle).refund(asked) == Succeeded("7", 10_000)


@pytest.mark.parametrize("told", [{"refundTrans": "none"}, {"refundTrans": [5]}, {"transId": "4 2"}], ids=str)
async def test_no_refund_is_sent_of_a_payment_that_cannot_be_read(told: dict[str, Any]) -> None:
    sent: list[str] = []

    def handle(path: str, body: dict[str, Any]) -> dict[str, Any]:
        sent.append(path)
        return {"resultCode": 0} | told

    with pytest.raises(GatewayUnreachable, match="no refund was sent") as refused:
        await gateway(handle).refund(a(OperationKind.REFUND))
    assert sent == ["query"]
    assert refused.value.is_caused_by(GatewayContractBroken)
    if "refundTrans" in told:
        with pytest.raises(GatewayContractBroken):
            await gateway(handle).status(a(OperationKind.REFUND))


async def test_a_refund_names_the_payments_own_number() -> None:
    bodies: dict[str, dict[str, Any]] = {}

    def handle(path: str, body: dict[str, Any]) -> dict[str, Any]:
        bodies[path] = body
        return {"resultCode": 0, "transId": 4242 if path == "query" else 9}

    assert await gateway(handle).refund(a(OperationKind.REFUND)) == Succeeded("9", 10_000)
    assert bodies["refund"]["transId"] == 4242
    assert bodies["refund"]["orderId"] == momo.order_id(PAYMENT_ID, 2)


@pytest.mark.parametrize("seen", [1003, 42])
async def test_a_capture_of_what_was_released_says_that_the_hold_is_gone(seen: int) -> None:
    def handle(path: str, _: dict[str, Any]) -> dict[str, Any]:
        return {"resultCode": seen if path == "query" else 1003}

    outcome = await gateway(handle).capture(a(OperationKind.CAPTURE))
    assert isinstance(outcome, NotExecuted)
    assert outcome.is_hold_gone


@pytest.mark.parametrize("name", ["orderId", "requestId", "partnerCode", "amount"])
async def test_an_answer_about_something_else_is_not_believed(name: str) -> None:
    for other in ("7", None):
        with pytest.raises(GatewayContractBroken):
            await gateway(lambda *_, given=other: {"resultCode": 0, name: given}).capture(a(OperationKind.CAPTURE))


async def test_a_refusal_at_the_door_need_not_repeat_what_was_asked_and_must_not_contradict_it() -> None:
    silent = {"partnerCode": None, "orderId": None, "requestId": None}
    assert isinstance(await gateway(result(20, **silent)).charge(a(OperationKind.CHARGE)), NotExecuted)
    for code, told in ((20, {"orderId": "7"}), (1006, silent)):
        with pytest.raises(GatewayContractBroken):
            await gateway(result(code, **told)).charge(a(OperationKind.CHARGE))


@pytest.mark.parametrize(
    ("failure", "error"),
    [
        (httpx.ConnectError(""), GatewayUnreachable),
        (httpx.ReadTimeout(""), OutcomeUnknown),
        (httpx.Response(500, text="x"), OutcomeUnknown),
        (httpx.Response(200, text="<html>"), OutcomeUnknown),
        (httpx.Response(200, json=[]), OutcomeUnknown),
        (httpx.Response(429, text="x"), GatewayUnreachable),
        (httpx.Response(200, json={"resultCode": "x"}), GatewayContractBroken),
    ],
)
async def test_without_a_readable_answer_nothing_is_known(failure: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        await gateway(failure if isinstance(failure, Exception) else lambda *_: failure).capture(
            a(OperationKind.CAPTURE)
        )


def test_our_marks_come_back_and_what_is_not_ours_has_none() -> None:
    assert momo.marks_of(momo.order_id(PAYMENT_ID, 12)) == (PAYMENT_ID, 12)
    for foreign in ("673_20260602231442", str(PAYMENT_ID), f"{PAYMENT_ID}-x", ""):
        assert momo.marks_of(foreign) is None
