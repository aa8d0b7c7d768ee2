"""VNPay's signatures, tested with published and computed vectors, and its code tables: an unknown code ends nothing."""

import json
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from itertools import pairwise
from typing import Any
from urllib.parse import parse_qsl
from uuid import UUID

import httpx
import pytest
from pydantic import SecretStr
from structlog.testing import capture_logs

from domain.commands import OperationKind
from domain.errors import GatewayContractBroken, GatewayUnreachable, OutcomeUnknown
from domain.money import Money
from domain.notices import Verdict, WebhookRefused, WebhookRequest
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
from domain.ports import Clock
from domain.rules import RetryPolicy
from infra.gateways import vnpay
from infra.gateways.vnpay import VNPayConfig, VNPayGateway
from infra.gateways.vnpay_webhooks import VNPayWebhooks
from tests.contract.gateway_requests import a_request
from tests.support.service import rules
from tests.support.story import Story

SECRET = SecretStr("test_secret")
PAYMENT_ID = UUID("0190b3a1-7a3c-7e11-9c53-1f0a3a8b9c00")
V1 = (
    "vnp_Amount=1000000&vnp_BankCode=NCB&vnp_BankTranNo=VNP14422574&vnp_CardType=ATM"
    "&vnp_OrderInfo=Thanh+toan+don+hang+2024-05-21T02%3A17%3A31.249Z&vnp_PayDate=20240521091806&vnp_ResponseCode=00"
    "&vnp_TmnCode=TEST_TMN_CODE&vnp_TransactionNo=14422574&vnp_TransactionStatus=00&vnp_TxnRef=1716257871703"
)
S1 = {
    "vnp_Amount": "1806000",
    "vnp_Command": "pay",
    "vnp_CreateDate": "20210801153333",
    "vnp_CurrCode": "VND",
    "vnp_IpAddr": "127.0.0.1",
    "vnp_Locale": "vn",
    "vnp_OrderInfo": "Thanh toan don hang :5",
    "vnp_OrderType": "other",
    "vnp_ReturnUrl": "https://domainmerchant.vn/ReturnUrl",
    "vnp_TmnCode": "DEMOV210",
    "vnp_TxnRef": "5",
    "vnp_Version": "2.1.0",
}
S2 = (
    "vnp_Amount=1000000&vnp_BankCode=NCB&vnp_BankTranNo=VNP14226112&vnp_CardType=ATM"
    "&vnp_OrderInfo=Thanh+toan+don+hang+thoi+gian%3A+2023-12-07+17%3A00%3A44&vnp_PayDate=20231207170112"
    "&vnp_ResponseCode=00&vnp_TmnCode=CTTVNP01&vnp_TransactionNo=14226112&vnp_TransactionStatus=00&vnp_TxnRef=166117"
)
VECTORS = {
    "V1": (
        V1,
        "649982421beb422556a1374713c74e58e716ecbd05007c0c0e1f7effdfaf361d"
        "bf146889ca446139afe11b9954c4d5c486e99e3b86fcfab6957f29eb0be72895",
    ),
    "V2": (
        V1.replace("vnp_ResponseCode=00", "vnp_ResponseCode=99"),
        "503194f6d93b57b357b2d1d09742565e67e86d771352c5dca4fc8d39df3d392c"
        "6b3809add9405f97cfb9631f445e36c80656cfbf47eac67d97fa165865c13e1b",
    ),
    "S1": (
        vnpay.form(S1),
        "82e281791241bd557865c11acff0dc6d0db876fcb1ad76787e6e420887bce562"
        "875f7a9c221678416e30984262efa017e906bff5834b0b645331d2c2ba3eeed6",
    ),
    "S2": (
        S2,
        "d82b2711f095a752ccd31ed8dd02cfd8ecf99b6607d032623c05bc3b37da16fa"
        "7d6bf3ef8c3763d4e261ed863a7bfb3492f23b82726274fe2f6d5da52eb32e08",
    ),
    "S3": (
        "REQUEST123456|2.1.0|querydr|TEST1234|TXN123456789|20231221103000|20231221110000|127.0.0.1|Test order query",
        "854f161ec69deadb6111b32c7ce27d7d49467ae09db3695acd47669c4069efde"
        "04ad6eee7ad56b53affaf1ea71a88d264572196164f8045132c1fc7f48fcc7a2",
    ),
    "S4": (
        "RESPONSE123456|querydr|00|Success|TEST1234|TXN123456789|1000000|NCB|20231221103000|14422574|01|00"
        "|Test order query||",
        "a26cd4a1ec349fae731645c32d6cfa901dbdefef352eb080e8ea2476177f94d3"
        "4470f55d861ae70b42cbe6de06ed689397624036f824eeadd720f58db794a302",
    ),
    "S5": (
        "REFUND123456|2.1.0|refund|TEST1234|02|TXN123456789|1000000|14422574|20231221103000|merchant_user"
        "|20231222090000|127.0.0.1|Test refund order",
        "43885121fb8a1b3356fba20926e6e7ea5d5d72bdc749a6771716a0d99a9b48c3"
        "a86536d51b25ec6d3221ca9347e4cc8b6a0a59d686ba845b5d803f9e179ef7d8",
    ),
    "S6": (
        "REFUND_RESPONSE123|refund|00|Success|TEST1234|TXN123456789|1000000|NCB|20231222090001|14422574|02|05"
        "|Test refund order",
        "b3693efb6ad893be30b73c49a5ad3a4f029c0b3e751656f9385f5e3ac3774baf"
        "46c6fe98ecf7a3f2e08ed23f388c95869e43ab2acdb939e113a9f9ab6230d662",
    ),
}


@pytest.mark.parametrize("name", VECTORS)
def test_a_vector_is_accepted_and_altered_by_one_byte_refused(name: str) -> None:
    data, signature = VECTORS[name]
    assert vnpay.is_signed(SECRET, data, signature)
    assert vnpay.is_signed(SECRET, data, signature.upper())
    assert not vnpay.is_signed(SECRET, data + " ", signature)
    assert not vnpay.is_signed(SECRET, data.replace("1", "2", 1), signature)
    assert not vnpay.is_signed(SECRET, data, signature[:-1] + ("0" if signature[-1] != "0" else "1"))
    assert not vnpay.is_signed(SecretStr("other"), data, signature)


def test_the_shortest_vector() -> None:
    expected = (
        "6274071d33dec2728a2a1c903697fc1210b3252221c3d137e12d9f1ae5c8ed53"
        "e05e692b05a9eefff289667e2387c0fc0bd8a3d9bd7000782730c856a77a77d5"
    )
    assert vnpay.sign(SecretStr("secret"), "data") == expected


def test_signed_fields_stand_in_their_own_order() -> None:
    query = "REQUEST123456|2.1.0|querydr|TEST1234|TXN123456789|20231221103000|20231221110000|127.0.0.1|Test order query"
    fields = dict(zip(vnpay.QUERY, query.split("|"), strict=True))
    assert vnpay.joined(dict(reversed(fields.items())), vnpay.QUERY) == query
    answer, _ = VECTORS["S4"]
    fields = dict(zip(vnpay.QUERY_ANSWER[:-2], answer.split("|"), strict=False))
    assert vnpay.joined(fields, vnpay.QUERY_ANSWER) == answer


# --- the IPN ----------------------------------------------------------------------------------------------------------


def config(tmn_code: str = "TEST1234", **more: Any) -> VNPayConfig:
    return VNPayConfig(tmn_code=tmn_code, hash_secret=SECRET, api_url="https://vnpay.invalid/api", **more)


def ipn(query: str) -> WebhookRequest:
    return WebhookRequest("GET", query, {}, b"", datetime.now(UTC))


def told(**fields: str) -> str:
    given = {
        "vnp_TmnCode": "TEST1234",
        "vnp_Amount": "1000000",
        "vnp_BankCode": "NCB",
        "vnp_OrderInfo": "Payment with spaces",
        "vnp_ResponseCode": "00",
        "vnp_TransactionNo": "14422574",
        "vnp_TransactionStatus": "00",
        "vnp_TxnRef": vnpay.txn_ref(PAYMENT_ID, 1),
    } | fields
    data = vnpay.form(given)
    return f"{data}&vnp_SecureHash={vnpay.sign(SECRET, data)}"


async def test_a_published_callback_is_verified_and_its_marks_are_not_ours() -> None:
    data, signature = VECTORS["V1"]
    notice = await VNPayWebhooks(config("TEST_TMN_CODE")).read(ipn(f"{data}&vnp_SecureHash={signature}"))
    assert (notice.payment_id, notice.outcome) == (None, Pending(None))


@pytest.mark.parametrize(
    "query",
    [
        told().replace("1000000", "1000001", 1),
        told()[:-1] + ("0" if told()[-1] != "0" else "1"),
        told().replace("vnp_SecureHash", "vnp_SecureHashType"),
        told(vnp_TmnCode="OTHER123"),
        "",
    ],
)
async def test_an_altered_callback_is_forged(query: str) -> None:
    with pytest.raises(WebhookRefused) as refused:
        await VNPayWebhooks(config()).read(ipn(query))
    assert refused.value.verdict is Verdict.FORGED


@pytest.mark.parametrize("query", ["garbage", told() + "&vnp_Amount=1", told(vnp_Amount="x"), told(vnp_Amount="150")])
async def test_an_unreadable_webhook_is_malformed(query: str) -> None:
    with pytest.raises(WebhookRefused) as refused:
        await VNPayWebhooks(config()).read(ipn(query))
    assert refused.value.verdict is Verdict.MALFORMED


async def test_a_callback_with_a_body_is_refused_for_only_its_query_is_signed() -> None:
    for method in ("GET", "POST"):
        with pytest.raises(WebhookRefused) as refused:
            await VNPayWebhooks(config()).read(ipn(told())._replace(method=method, body=b"vnp_ResponseCode=24"))
        assert refused.value.verdict is Verdict.MALFORMED


async def test_the_payers_own_url_that_we_signed_is_no_callback() -> None:
    action = await gateway(AssertionError()).charge(charge())
    assert isinstance(action, RequiresAction)
    assert action.url is not None
    signed = action.url.partition("?")[2]
    paid = ("ResponseCode=00", "TransactionStatus=00", "TransactionNo=1")
    hidden = "&".join(f"%76np_{each}" for each in paid)
    plain = "&".join(f"vnp_{each}" for each in paid)
    for query in (signed, f"{signed}&{hidden}", f"{hidden}&{signed}", f"{signed}&{plain}"):
        with pytest.raises(WebhookRefused) as refused:
            await VNPayWebhooks(config()).read(ipn(query))
        assert refused.value.verdict is Verdict.FORGED


@pytest.mark.parametrize("name", ["%76np_PayDate", "vnp%5FPayDate", "vnp_Pay+Date", "x%79"])
async def test_a_parameter_whose_name_is_encoded_was_not_signed(name: str) -> None:
    with pytest.raises(WebhookRefused) as refused:
        await VNPayWebhooks(config()).read(ipn(f"{told()}&{name}=1"))
    assert refused.value.verdict is Verdict.FORGED


async def test_another_amount_is_another_message() -> None:
    read = VNPayWebhooks(config()).read
    ids = {(await read(ipn(told(vnp_Amount=each)))).event_id for each in ("1000000", "999900")}
    assert len(ids) == 2


async def test_a_signature_over_percent_encoded_spaces_is_accepted() -> None:
    fields = dict(parse_qsl(told()))
    fields.pop("vnp_SecureHash")
    data = vnpay.form(fields).replace("+", "%20")
    notice = await VNPayWebhooks(config()).read(ipn(f"{data}&vnp_SecureHash={vnpay.sign(SECRET, data)}"))
    assert notice.outcome == Succeeded("", 10_000)


@pytest.mark.parametrize(
    ("code", "status", "outcome"),
    [
        ("00", "00", Succeeded("", 10_000)),
        ("24", "02", Declined(DeclineReason.CANCELED, "24", "")),
        ("51", "02", Declined(DeclineReason.INSUFFICIENT_FUNDS, "51", "")),
        ("13", "02", Declined(DeclineReason.AUTHENTICATION_FAILED, "13", "")),
        ("42", "02", Declined(DeclineReason.OTHER, "42", "")),
        ("42", "11", Declined(DeclineReason.CANCELED, "42", "")),
        ("11", "02", Expired("", "11")),
        ("11", "08", Expired("", "11")),
        # Debited but suspected, reversed, unknown and contradictory codes: nothing is concluded.
        ("07", "07", Pending("")),
        ("00", "04", Pending("")),
        ("00", "99", Pending("")),
        ("99", "00", Pending("")),
        ("24", "00", Pending("")),
        *((code, status, Pending("")) for code in ("00", "07", "08", "99") for status in ("02", "08", "11")),
    ],
)
async def test_only_two_zeros_are_a_payment_and_only_a_failed_status_is_a_refusal(
    code: str, status: str, outcome: Outcome
) -> None:
    query = told(vnp_ResponseCode=code, vnp_TransactionStatus=status)
    notice = await VNPayWebhooks(config()).read(ipn(query))
    assert (notice.payment_id, notice.operation_number) == (PAYMENT_ID, 1)
    assert (notice.outcome, notice.currency) == (outcome, "VND")


def test_each_verdict_is_answered_as_vnpay_demands() -> None:
    codes = {each: json.loads(VNPayWebhooks(config()).answer(each, ipn(told())).body)["RspCode"] for each in Verdict}
    assert codes == {
        Verdict.STORED: "00",
        Verdict.DUPLICATE: "02",
        Verdict.ALREADY_FINAL: "02",
        Verdict.AMOUNT_DIFFERS: "04",
        Verdict.UNKNOWN_PAYMENT: "01",
        Verdict.FORGED: "97",
        Verdict.STALE: "99",
        Verdict.MALFORMED: "99",
        Verdict.TOO_LARGE: "99",
        Verdict.UNAVAILABLE: "99",
    }


# --- the gateway, with VNPay's answers replaced at the HTTP boundary --------------------------------------------------


def gateway(
    answer: Callable[[dict[str, Any]], httpx.Response] | Exception, clock: Clock = lambda: datetime.now(UTC)
) -> VNPayGateway:
    def handle(request: httpx.Request) -> httpx.Response:
        if isinstance(answer, Exception):
            raise answer
        return answer(json.loads(request.content))

    built = VNPayGateway(config(), clock)
    built._http._client = httpx.AsyncClient(transport=httpx.MockTransport(handle))
    return built


def charge(**more: Any) -> GatewayRequest:
    given: dict[str, Any] = {"payment_id": PAYMENT_ID, "amount": Money(10_000, "VND")} | more
    return a_request(OperationKind.CHARGE, **given)


def refund(**more: Any) -> GatewayRequest:
    reference = f"{vnpay.txn_ref(PAYMENT_ID, 1)}@{at(datetime.now(UTC))}"
    given = {"number": 2, "gateway_payment_id": reference, "captured_minor": 10_000} | more
    return charge(**given)._replace(kind=OperationKind.REFUND)


def at(time: datetime) -> str:
    return time.astimezone(vnpay.VIETNAM).strftime(vnpay.TIME)


def answered(clock: timedelta = timedelta(0), /, **told: str) -> Callable[[dict[str, Any]], httpx.Response]:
    """A signed answer of VNPay to any request. VNPay's clock is ahead of ours by `clock`."""
    now = datetime.now(UTC) + clock

    def answer(body: dict[str, Any]) -> httpx.Response:
        names = vnpay.QUERY_ANSWER if body["vnp_Command"] == "querydr" else vnpay.REFUND_ANSWER
        fields = {name: body.get(name, "") for name in ("vnp_Command", "vnp_TmnCode", "vnp_TxnRef", "vnp_OrderInfo")}
        fields |= {"vnp_ResponseCode": "00", "vnp_Amount": "1000000", "vnp_TransactionNo": "14422574"}
        fields |= {"vnp_TransactionType": "01", "vnp_TransactionStatus": "00", "vnp_PayDate": at(now)}
        fields |= {f"vnp_{name}": value for name, value in told.items()}
        sealed = fields | {"vnp_SecureHash": vnpay.sign(SECRET, vnpay.joined(fields, names))}
        return httpx.Response(200, headers={"Date": format_datetime(now, usegmt=True)}, json=sealed)

    return answer


async def test_a_charge_is_a_signed_url_the_same_at_every_attempt() -> None:
    request = charge()
    first, second = await gateway(AssertionError()).charge(request), await gateway(AssertionError()).charge(request)
    assert isinstance(first, RequiresAction)
    assert first == second
    assert first.url is not None
    query = dict(parse_qsl(first.url.partition("?")[2]))
    signature = query.pop("vnp_SecureHash")
    assert vnpay.is_signed(SECRET, vnpay.form(query), signature)
    assert query["vnp_Amount"] == "1000000"
    assert vnpay.marks_of(query["vnp_TxnRef"]) == (PAYMENT_ID, 1)
    assert first.expires_at is not None
    assert timedelta(minutes=14) < first.expires_at - datetime.now(UTC) < timedelta(minutes=16)


@pytest.mark.parametrize(
    ("told", "outcome"),
    [
        ({}, Succeeded),
        ({"TransactionStatus": "02"}, Declined),
        ({"TransactionStatus": "08"}, Expired),
        ({"TransactionStatus": "07"}, Pending),
        ({"TransactionStatus": "04"}, Pending),
        ({"TransactionStatus": "77"}, Pending),
        ({"TransactionStatus": "01"}, RequiresAction),
        ({"ResponseCode": "91"}, RequiresAction),
        ({"TransactionType": "02"}, Succeeded),
        ({"TransactionType": "03", "Amount": "5000"}, Succeeded),
        ({"TransactionType": "77"}, Pending),
    ],
)
async def test_the_outcome_of_a_vnpay_query_by_its_answer(told: dict[str, str], outcome: type[Outcome]) -> None:
    assert isinstance(await gateway(answered(**told)).status(charge()), outcome)


async def test_nobody_paid_until_the_end_and_a_while_longer_so_it_has_expired() -> None:
    ended = datetime.now(UTC) - timedelta(minutes=20)
    asked = charge()._replace(first_dispatched_at=ended)
    assert isinstance(await gateway(answered(ResponseCode="91")).status(asked), RequiresAction)
    ended = datetime.now(UTC) - timedelta(minutes=31)
    asked = charge()._replace(first_dispatched_at=ended)
    assert isinstance(await gateway(answered(ResponseCode="91")).status(asked), Expired)


@pytest.mark.parametrize(
    ("minutes", "clock", "outcome"), [(31, -2, RequiresAction), (33, -1, Expired), (29, 2, RequiresAction)]
)
async def test_nothing_expires_before_both_clocks_say_so(minutes: int, clock: int, outcome: type[Outcome]) -> None:
    """Either our clock or VNPay's may be ahead."""
    asked = charge()._replace(first_dispatched_at=datetime.now(UTC) - timedelta(minutes=minutes))
    unpaid = gateway(answered(timedelta(minutes=clock), ResponseCode="91"))
    assert isinstance(await unpaid.status(asked), outcome)


async def test_a_failed_payment_is_declined_within_the_urls_time_and_expired_after_it() -> None:
    failed = gateway(answered(TransactionStatus="02"))
    asked = charge()._replace(first_dispatched_at=datetime.now(UTC) - timedelta(minutes=14))
    assert isinstance(await failed.status(asked), Declined)
    asked = charge()._replace(first_dispatched_at=datetime.now(UTC) - timedelta(minutes=16))
    assert isinstance(await failed.status(asked), Expired)
    by_ipn = await VNPayWebhooks(config()).read(ipn(told(vnp_ResponseCode="11", vnp_TransactionStatus="02")))
    assert isinstance(by_ipn.outcome, Expired)


async def test_a_payment_that_the_payer_began_expires_after_a_day() -> None:
    begun = gateway(answered(TransactionStatus="01"))
    asked = charge()._replace(first_dispatched_at=datetime.now(UTC) - timedelta(hours=24))
    assert isinstance(await begun.status(asked), RequiresAction)
    asked = charge()._replace(first_dispatched_at=datetime.now(UTC) - timedelta(hours=24, minutes=16))
    assert isinstance(await begun.status(asked), Expired)
    # We set no deadline where people at VNPay or the bank have to decide.
    assert isinstance(await gateway(answered(TransactionStatus="04")).status(asked), Pending)


@pytest.mark.parametrize("code", ["94", "99", "98", "08", "02", "03", "97", "x"])
async def test_a_query_without_a_result_says_nothing(code: str) -> None:
    with pytest.raises(OutcomeUnknown):
        await gateway(answered(ResponseCode=code)).status(charge())


@pytest.mark.parametrize("code", ["02", "03", "97"])
async def test_our_own_mistake_is_told_loudly_and_is_no_word_about_the_payment(code: str) -> None:
    def refuses(command: str) -> Callable[[dict[str, Any]], httpx.Response]:
        return lambda body: answered(**({"ResponseCode": code} if body["vnp_Command"] == command else {}))(body)

    with capture_logs() as logs:
        with pytest.raises(OutcomeUnknown):
            await gateway(refuses("querydr")).status(charge())
        with pytest.raises(OutcomeUnknown):
            await gateway(refuses("querydr")).status(refund())
        with pytest.raises(GatewayUnreachable, match="no refund was sent"):
            await gateway(refuses("querydr")).refund(refund())
        assert isinstance(await gateway(refuses("refund")).refund(refund()), NotExecuted)
    assert [(each["log_level"], each["code"]) for each in logs] == [("error", code)] * 4


@pytest.mark.parametrize("code", ["00", "91", "94", "08", "99"])
async def test_an_answer_that_is_not_our_mistake_logs_nothing(code: str) -> None:
    with capture_logs() as logs, suppress(OutcomeUnknown):
        await gateway(answered(ResponseCode=code)).status(charge())
    assert logs == []


async def test_an_answer_that_vnpay_did_not_sign_or_that_is_about_another_payment_is_not_believed() -> None:
    def unsigned(body: dict[str, Any]) -> httpx.Response:
        return httpx.Response(200, json=answered()(body).json() | {"vnp_TransactionStatus": "02"})

    for answer in (unsigned, answered(TxnRef="5"), answered(TmnCode="OTHER")):
        with pytest.raises(GatewayContractBroken):
            await gateway(answer).status(charge())


def lacking(name: str, sent: list[str]) -> Callable[[dict[str, Any]], httpx.Response]:
    """A signed answer without this field; notes what was sent."""

    def answer(body: dict[str, Any]) -> httpx.Response:
        sent.append(body["vnp_Command"])
        fields = {key: value for key, value in answered()(body).json().items() if key not in (name, "vnp_SecureHash")}
        return httpx.Response(
            200, json=fields | {"vnp_SecureHash": vnpay.sign(SECRET, vnpay.joined(fields, vnpay.QUERY_ANSWER))}
        )

    return answer


@pytest.mark.parametrize("name", ["vnp_TransactionType", "vnp_TransactionStatus", "vnp_Amount"])
async def test_a_charge_that_is_shown_without_a_field_is_a_broken_contract(name: str) -> None:
    with pytest.raises(GatewayContractBroken):
        await gateway(lacking(name, [])).status(charge())


async def test_no_refund_is_sent_of_a_charge_that_cannot_be_read() -> None:
    sent: list[str] = []
    with pytest.raises(GatewayUnreachable, match="no refund was sent") as refused:
        await gateway(lacking("vnp_TransactionType", sent)).refund(refund())
    assert sent == ["querydr"]
    assert refused.value.is_caused_by(GatewayContractBroken)


@pytest.mark.parametrize(
    ("failure", "error"),
    [
        (httpx.ConnectError(""), GatewayUnreachable),
        (httpx.ReadTimeout(""), OutcomeUnknown),
        (httpx.RemoteProtocolError(""), OutcomeUnknown),
        (httpx.Response(429), OutcomeUnknown),
        (httpx.Response(503, json={}), OutcomeUnknown),
        (httpx.Response(400, json={"vnp_ResponseCode": "91"}), OutcomeUnknown),
    ],
)
async def test_connections_that_fail_are_proof_only_if_nothing_was_sent(
    failure: Exception | httpx.Response, error: type[Exception]
) -> None:
    broken = gateway(failure if isinstance(failure, Exception) else lambda _: failure)
    with pytest.raises(error):
        await broken.status(charge())
    with pytest.raises(GatewayUnreachable):  # the query before the refund failed, so no refund was sent
        await broken.refund(refund())


async def test_a_refund_that_was_answered_with_too_many_requests_may_have_been_taken_on() -> None:
    def answer(body: dict[str, Any]) -> httpx.Response:
        return httpx.Response(429) if body["vnp_Command"] == "refund" else answered()(body)

    with pytest.raises(OutcomeUnknown):
        await gateway(answer).refund(refund())


@pytest.mark.parametrize(
    ("told", "outcome"),
    [
        ({"TransactionStatus": "05"}, Pending),
        ({"TransactionStatus": "06"}, Pending),
        ({"TransactionStatus": "00"}, Succeeded),
        ({"TransactionStatus": "09"}, Declined),
        ({"TransactionStatus": "55"}, Pending),
        ({"ResponseCode": "93"}, NotExecuted),
        ({"ResponseCode": "95"}, NotExecuted),
    ],
)
async def test_the_outcome_of_a_refund_by_vnpays_answer(told: dict[str, str], outcome: type[Outcome]) -> None:
    sent: list[dict[str, Any]] = []

    def answer(body: dict[str, Any]) -> httpx.Response:
        sent.append(body)
        return answered(**(told if body["vnp_Command"] == "refund" else {}))(body)

    assert isinstance(await gateway(answer).refund(refund()), outcome)
    body = sent[1]
    assert vnpay.is_signed(SECRET, vnpay.joined(body, vnpay.REFUND), body["vnp_SecureHash"])
    assert (body["vnp_TransactionType"], body["vnp_TransactionNo"]) == ("02", "14422574")


@pytest.mark.parametrize(("number", "own"), [("14422575", "14422575"), ("14422574", None), ("0", None), ("", None)])
async def test_a_refund_is_named_by_a_number_of_its_own_and_not_by_the_payments(number: str, own: str | None) -> None:
    def answer(body: dict[str, Any]) -> httpx.Response:
        given = {"TransactionNo": number, "TransactionStatus": "05"} if body["vnp_Command"] == "refund" else {}
        return answered(**given)(body)

    assert await gateway(answer).refund(refund()) == Pending(own)


async def test_a_refund_of_another_amount_than_asked_is_told_as_it_is() -> None:
    def answer(body: dict[str, Any]) -> httpx.Response:
        given = {"TransactionNo": "7", "Amount": "500000"} if body["vnp_Command"] == "refund" else {}
        return answered(**given)(body)

    assert await gateway(answer).refund(refund()) == Succeeded("7", 5_000)


@pytest.mark.parametrize("code", ["94", "99", "98", "08", "42"])
async def test_a_refund_that_may_have_been_taken_on_is_unknown(code: str) -> None:
    def answer(body: dict[str, Any]) -> httpx.Response:
        return answered(**({"ResponseCode": code} if body["vnp_Command"] == "refund" else {}))(body)

    with pytest.raises(OutcomeUnknown):
        await gateway(answer).refund(refund())


async def test_a_lost_refund_is_found_only_where_no_other_could_be_meant() -> None:
    seen = answered(TransactionType="02")
    lost = refund()._replace(state=OperationState.INDETERMINATE, attempts=2)
    assert isinstance(await gateway(seen).status(lost), Succeeded)
    assert isinstance(await gateway(seen).status(lost._replace(operation_number=3)), Unknown)
    assert isinstance(await gateway(answered(TransactionType="03", Amount="500000")).status(lost), Unknown)
    assert isinstance(await gateway(answered()).status(lost), Unknown)


@pytest.mark.parametrize("clock", [timedelta(0), timedelta(minutes=30), timedelta(minutes=-30)])
@pytest.mark.parametrize(
    ("seconds", "outcome"), [(-1200, Unknown), (-5, Unknown), (0, Succeeded), (870, Succeeded), (930, Unknown)]
)
async def test_a_lost_refund_is_one_that_was_made_while_it_was_under_way_by_vnpays_own_clock(
    clock: timedelta, seconds: int, outcome: type[Outcome]
) -> None:
    sent = datetime.now(UTC) - timedelta(hours=1)
    lost = refund()._replace(state=OperationState.INDETERMINATE, attempts=2, first_dispatched_at=sent)
    made = at(sent + clock + timedelta(seconds=seconds))
    assert isinstance(await gateway(answered(clock, TransactionType="02", PayDate=made)).status(lost), outcome)


@pytest.mark.parametrize("off", [timedelta(hours=1), timedelta(hours=-1)])
async def test_when_a_refund_was_sent_and_what_time_it_is_are_of_one_clock(off: timedelta) -> None:
    """Both come from the store's clock: a wrong clock of this machine neither hides our refund nor claims another's."""
    store = datetime.now(UTC) + off
    lost = refund()._replace(state=OperationState.INDETERMINATE, attempts=2, first_dispatched_at=store)
    for seconds, outcome in ((2, Succeeded), (-3000, Unknown), (1500, Unknown)):
        seen = answered(TransactionType="02", PayDate=at(datetime.now(UTC) + timedelta(seconds=seconds)))
        assert isinstance(await gateway(seen, lambda: datetime.now(UTC) + off).status(lost), outcome)


@pytest.mark.parametrize("made", ["", "yesterday"])
async def test_a_refund_without_a_time_is_not_taken_for_a_lost_one(made: str) -> None:
    lost = refund()._replace(state=OperationState.INDETERMINATE, attempts=2)
    assert isinstance(await gateway(answered(TransactionType="02", PayDate=made)).status(lost), Unknown)


async def test_without_a_date_from_vnpay_our_clock_is_used() -> None:
    def answer(body: dict[str, Any]) -> httpx.Response:
        told = answered(TransactionType="02")(body)
        return httpx.Response(200, content=told.content)

    lost = refund()._replace(state=OperationState.INDETERMINATE, attempts=2)
    assert isinstance(await gateway(answer).status(lost), Succeeded)


async def test_a_refund_that_has_a_number_is_found_by_it_however_many_there_are() -> None:
    seen = answered(TransactionType="03", TransactionNo="14422580", TransactionStatus="00")
    waiting = refund(number=4, reference="14422580")._replace(state=OperationState.PENDING)
    assert await gateway(seen).status(waiting) == Succeeded("14422580", 10_000)
    assert isinstance(await gateway(seen).status(waiting._replace(reference="14422579")), Unknown)
    first = waiting._replace(operation_number=2, reference="14422579")
    assert isinstance(await gateway(seen).status(first), Unknown)


def test_our_marks_come_back_and_what_is_not_ours_has_none() -> None:
    assert vnpay.marks_of(vnpay.txn_ref(PAYMENT_ID, 12)) == (PAYMENT_ID, 12)
    for foreign in ("166117", PAYMENT_ID.hex, f"{PAYMENT_ID}0001", ""):
        assert vnpay.marks_of(foreign) is None


async def test_vnpay_is_asked_about_one_payment_no_more_often_than_it_answers() -> None:
    built = gateway(AssertionError())
    told = Story(rules(RetryPolicy(), gateways={"vnpay": built.capabilities}, default_gateway="vnpay"))
    told.send("charge", amount_minor=100_000, currency="VND")
    told.answer(RequiresAction("ref", "redirect", "https://vnpay.invalid"))
    asked = [told.now]
    answers: list[Outcome] = [Unknown("asked too soon"), Pending("ref")]
    for outcome in answers * 5:
        told.claim()
        asked.append(told.now)
        told.answer(outcome)
    gaps = [later - earlier for earlier, later in pairwise(asked)]
    assert min(gaps) >= built.capabilities.question_interval == timedelta(minutes=5)
    assert max(gaps) <= timedelta(minutes=6, seconds=15)
    await built.close()


@pytest.mark.parametrize("wrong", ["unsigned", "TxnRef", "TmnCode"])
async def test_an_answer_to_a_refund_that_is_not_signed_or_about_another_payment_is_not_believed(wrong: str) -> None:
    def answer(body: dict[str, Any]) -> httpx.Response:
        if body["vnp_Command"] != "refund":
            return answered()(body)
        if wrong == "unsigned":
            return httpx.Response(200, json=answered()(body).json() | {"vnp_TransactionStatus": "09"})
        return answered(**{wrong: "5"})(body)

    with pytest.raises(GatewayContractBroken):
        await gateway(answer).refund(refund())


async def test_a_second_refund_does_not_name_the_first_ones_number_for_the_payments() -> None:
    sent: list[dict[str, Any]] = []

    def answer(body: dict[str, Any]) -> httpx.Response:
        sent.append(body)
        before = {"TransactionType": "03", "TransactionNo": "14422580"}
        return answered(**(before if body["vnp_Command"] == "querydr" else {"TransactionStatus": "05"}))(body)

    await gateway(answer).refund(refund(number=3))
    assert sent[1]["vnp_TransactionNo"] == "0"


@pytest.mark.parametrize("status", ["00", "04", "07", "99"])
def test_the_code_of_an_expiry_ends_nothing_that_did_not_fail(status: str) -> None:
    assert vnpay.read_payment("11", status, "r", 1) == Pending("r")
