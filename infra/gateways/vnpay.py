"""VNPay PAY 2.1.0: the payment URL, signatures, querydr, refund and the code tables. `vnpay_webhooks.py` reads the IPN.

Promise: a charge is a signed URL created here, so no money moves until the payer pays. Success and failure are only
what VNPay reports, signed, for this very TxnRef and amount (IPN or querydr). VNPay has no idempotency key for refunds,
so a refund whose answer was lost is never sent again: it is queried, and stays unknown if the answer is ambiguous.

Sources: https://sandbox.vnpayment.vn/apis/docs/thanh-toan-pay/pay.html and
https://sandbox.vnpayment.vn/apis/docs/truy-van-hoan-tien/querydr&refund.html. Plain httpx: VNPay has no Python library.
Only third parties document what is marked "hypothesis"; there the outcome is `Pending` or unknown.
"""

import hashlib
import hmac
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta, timezone
from email.utils import parsedate_to_datetime
from typing import Any, Final
from urllib.parse import quote_plus
from uuid import UUID, uuid4

import httpx
import structlog
from pydantic import BaseModel, ConfigDict, SecretStr

from domain.capabilities import AmountLimits, Capabilities
from domain.commands import OperationKind
from domain.errors import GatewayContractBroken, GatewayUnreachable, OutcomeUnknown
from domain.operations import (
    Declined,
    DeclineReason,
    Expired,
    GatewayRequest,
    NotExecuted,
    Outcome,
    Pending,
    RequiresAction,
    Succeeded,
    Unknown,
)
from domain.ports import Clock
from infra.gateways.evidence import understood
from infra.gateways.transport import ProviderHttp

log = structlog.get_logger(__name__)

NAME: Final = "vnpay"
VERSION: Final = "2.1.0"
VIETNAM: Final = timezone(timedelta(hours=7))
TIME: Final = "%Y%m%d%H%M%S"
HUNDREDTHS: Final = 100
"""VNPay sends and takes VND amounts times 100, although the currency has no fraction."""

GRACE: Final = timedelta(minutes=15)
"""How long after the URL expires a bank may still complete a payment (hypothesis: 60 to 90 s were observed)."""
BEGUN_GRACE: Final = timedelta(days=1)
"""The same if VNPay reports that the payer began, and neither paid nor failed (TransactionStatus 01)."""
UNDER_WAY: Final = timedelta(minutes=15)
"""How long after its dispatch a refund is assumed to have reached VNPay. If one is sent later and its answer is lost,
a person must look."""


class VNPayConfig(BaseModel):
    """One terminal. The payer's browser goes to `pay_url`; `api_url` takes queries and refunds."""

    model_config = ConfigDict(frozen=True)

    tmn_code: str
    hash_secret: SecretStr
    pay_url: str = "https://sandbox.vnpayment.vn/paymentv2/vpcpay.html"
    api_url: str = "https://sandbox.vnpayment.vn/merchant_webapi/api/transaction"
    return_url: str = "https://example.invalid/return"
    ip_address: str = "127.0.0.1"
    locale: str = "vn"
    expires_after: timedelta = timedelta(minutes=15)
    timeout_seconds: float = 20.0
    connect_timeout_seconds: float = 5.0
    max_connections: int = 64
    question_interval: timedelta = timedelta(minutes=5)
    """Minimum time between two queries of one TxnRef; sooner, VNPay answers 94. Its older table says 5 minutes."""


# --- names and times --------------------------------------------------------------------------------------------------


def txn_ref(payment_id: UUID, number: int) -> str:
    """Our marks as a TxnRef: letters and digits only, and unique per payment attempt."""
    return f"{payment_id.hex}{number:04d}"


def marks_of(reference: str) -> tuple[UUID, int] | None:
    """The payment id and operation number in a TxnRef; None if it is not one of ours."""
    found = re.fullmatch(r"([0-9a-f]{32})([0-9]{4,9})", reference)
    return (UUID(found[1]), int(found[2])) if found else None


def _reference(request: GatewayRequest) -> str:
    """What a query or refund needs to name a charge: its TxnRef and its CreateDate, exact to the second."""
    assert request.first_dispatched_at is not None, "a dispatched operation has a time"
    created = request.first_dispatched_at.astimezone(VIETNAM).strftime(TIME)
    return f"{txn_ref(request.payment_id, request.operation_number)}@{created}"


def _expires_at(reference: str, config: VNPayConfig) -> datetime:
    created = datetime.strptime(reference.partition("@")[2], TIME).replace(tzinfo=VIETNAM)
    return (created + config.expires_after).astimezone(UTC)


# --- signatures -------------------------------------------------------------------------------------------------------


def sign(secret: SecretStr, data: str) -> str:
    """HMAC-SHA512 as lower-case hex; the secret is used as written, not decoded."""
    return hmac.new(secret.get_secret_value().encode(), data.encode(), hashlib.sha512).hexdigest()


def form(fields: Mapping[str, str]) -> str:
    """The query string that is both sent and signed: sorted by name, spaces as plus signs, no empty values."""
    return "&".join(f"{name}={quote_plus(value)}" for name, value in sorted(fields.items()) if value)


def is_signed(secret: SecretStr, data: str, signature: str) -> bool:
    """Whether `signature` is VNPay's signature of `data`, in hex of either case. Compares in constant time."""
    return hmac.compare_digest(sign(secret, data).encode(), signature.lower().encode())


QUERY: Final = [
    "vnp_RequestId",
    "vnp_Version",
    "vnp_Command",
    "vnp_TmnCode",
    "vnp_TxnRef",
    "vnp_TransactionDate",
    "vnp_CreateDate",
    "vnp_IpAddr",
    "vnp_OrderInfo",
]
QUERY_ANSWER: Final = [
    "vnp_ResponseId",
    "vnp_Command",
    "vnp_ResponseCode",
    "vnp_Message",
    "vnp_TmnCode",
    "vnp_TxnRef",
    "vnp_Amount",
    "vnp_BankCode",
    "vnp_PayDate",
    "vnp_TransactionNo",
    "vnp_TransactionType",
    "vnp_TransactionStatus",
    "vnp_OrderInfo",
    "vnp_PromotionCode",
    "vnp_PromotionAmount",
]
REFUND: Final = [
    "vnp_RequestId",
    "vnp_Version",
    "vnp_Command",
    "vnp_TmnCode",
    "vnp_TransactionType",
    "vnp_TxnRef",
    "vnp_Amount",
    "vnp_TransactionNo",
    "vnp_TransactionDate",
    "vnp_CreateBy",
    "vnp_CreateDate",
    "vnp_IpAddr",
    "vnp_OrderInfo",
]
REFUND_ANSWER: Final = QUERY_ANSWER[:-2]
"""The fields whose values are joined with `|` and signed, in this order; an absent one counts as empty."""


def joined(fields: Mapping[str, Any], names: Sequence[str]) -> str:
    """The text that is signed: the values of these fields."""
    return "|".join("" if fields.get(name) is None else str(fields[name]) for name in names)


# --- the code tables --------------------------------------------------------------------------------------------------

DECLINES: Final[Mapping[str, DeclineReason]] = {
    "09": DeclineReason.METHOD_NOT_SUPPORTED,
    "10": DeclineReason.AUTHENTICATION_FAILED,
    "12": DeclineReason.REFUSED_BY_ISSUER,
    "13": DeclineReason.AUTHENTICATION_FAILED,
    "24": DeclineReason.CANCELED,
    "51": DeclineReason.INSUFFICIENT_FUNDS,
    "65": DeclineReason.LIMIT_EXCEEDED,
    "75": DeclineReason.PROCESSING_ERROR,
    "79": DeclineReason.AUTHENTICATION_FAILED,
}
"""ResponseCode of an IPN whose TransactionStatus is a failure. Source: the table of pay.html."""

STATUS_DECLINES: Final[Mapping[str, DeclineReason]] = {"11": DeclineReason.CANCELED}
"""TransactionStatus that states a reason, for queries, which have no ResponseCode of the payment. 02 is every other
failure: a 24 (the payer cancelled) in an IPN may be 02 in a query, where it cannot be told from other failures."""

OPEN_CODES: Final = frozenset({"00", "07", "08", "99"})
"""ResponseCode of an IPN that does not rule out a payment, whatever its TransactionStatus: 00 and 07 mean that the
payer was debited, 08 and 99 that the outcome is unknown. A later query decides."""

PAID: Final = frozenset({"00", "10", "20"})
FAILED: Final = frozenset({"02", "11"})
LATE: Final = frozenset({"08"})
"""TransactionStatus. Any other is undecided: 04 and 07 wait for people at VNPay or the bank."""
REFUND_TYPES: Final = frozenset({"02", "03"})
"""TransactionType of a refund, in full or in part; 01 is a payment."""

REFUSED: Final = frozenset({"02", "03", "04", "13", "16", "91", "93", "95", "97"})
"""ResponseCode of a refund that VNPay did not accept, and will not accept unchanged."""
OUR_MISTAKES: Final[Mapping[str, str]] = {
    "02": "unknown terminal, or the refunds would exceed the payment",
    "03": "VNPay cannot read the message",
    "97": "the signature is wrong",
}
"""ResponseCode that says nothing about any payment, and persists until our settings or this file are corrected.

02 is an unknown terminal in VNPay's present table, and a refund above the paid amount in its older one; either proves
that no refund was made.
"""


def read_payment(code: str | None, status: str, reference: str, amount_minor: int) -> Outcome:
    """The outcome of a payment, from TransactionStatus and, in an IPN, ResponseCode; `code` is None for a query."""
    if status in PAID and code in (None, "00"):
        return Succeeded(reference, amount_minor)
    if code in OPEN_CODES:
        return Pending(reference)
    if status in LATE or (status in FAILED and code == "11"):
        return Expired(reference, code or status)
    if status in FAILED:
        reason = DECLINES.get(code or "") or STATUS_DECLINES.get(status, DeclineReason.OTHER)
        return Declined(reason, code or status, reference)
    return Pending(reference)


def read_refund(status: str, number: str | None, amount_minor: int) -> Outcome:
    """The outcome of a refund that VNPay accepted; `number` is VNPay's own number of it, if known."""
    if status == "00":
        return Succeeded(number or "", amount_minor)
    if status in ("02", "09"):
        return Declined(DeclineReason.REFUND_FAILED, status, number or "")
    return Pending(number)


# --- the gateway ------------------------------------------------------------------------------------------------------


class VNPayGateway:
    """Payments by redirect, their queries, and refunds. Create it inside the event loop that uses it."""

    name = NAME

    def __init__(self, config: VNPayConfig, clock: Clock = lambda: datetime.now(UTC)) -> None:
        self._config = config
        self._clock = clock
        self.capabilities = Capabilities(
            operations=frozenset({OperationKind.CHARGE, OperationKind.REFUND}),
            currencies=frozenset({"VND"}),
            partial_capture=False,
            multi_capture=False,
            partial_refund=True,
            off_session=False,
            cancel_waiting=False,  # an unpaid URL stays payable until it expires
            idempotency_retention=timedelta(0),
            question_interval=config.question_interval,
            limits={"VND": AmountLimits(5_000, 999_999_999)},
        )
        self._http = ProviderHttp(
            NAME,
            max_connections=config.max_connections,
            timeout_seconds=config.timeout_seconds,
            connect_timeout_seconds=config.connect_timeout_seconds,
        )
        self.rests_seconds, self.connections = self._http.rest.seconds, self._http.connections

    async def authorize(self, request: GatewayRequest) -> Outcome:
        """Not offered by VNPay."""
        return NotExecuted("VNPay has no authorizations")

    async def capture(self, request: GatewayRequest) -> Outcome:
        """Not offered by VNPay."""
        return NotExecuted("VNPay has no captures")

    async def void(self, request: GatewayRequest) -> Outcome:
        """Not offered by VNPay."""
        return NotExecuted("VNPay cannot cancel a payment")

    async def charge(self, request: GatewayRequest) -> Outcome:
        """Return the URL where the payer pays. The same request gives the same URL; nothing is sent."""
        reference = _reference(request)
        return RequiresAction(reference, "redirect", self._pay_url(request, reference), self._ends(reference))

    async def refund(self, request: GatewayRequest) -> Outcome:
        """Return `request.amount`; VNPay accepts the refund and completes it later.

        Raises:
            GatewayUnreachable: nothing was sent.
            OutcomeUnknown: VNPay may have accepted the refund; it must not be sent again.
            GatewayContractBroken: the answer is not signed, or about another payment.
        """
        paid, body = await self._prepare_refund(request)
        answer, _ = await self._post(body, joined(body, REFUND))
        code = str(answer.get("vnp_ResponseCode", ""))
        _log_our_mistake(code)
        if code in REFUSED:
            return NotExecuted(f"VNPay refused the refund (code {code})", code)
        if code != "00":
            raise OutcomeUnknown(NAME, f"refund answered with code {code}")
        self._verify(answer, REFUND_ANSWER, body)
        status, amount = str(answer.get("vnp_TransactionStatus", "")), minor_of(answer.get("vnp_Amount"))
        return read_refund(status, _own_number(answer, paid), amount)

    async def resume(self, request: GatewayRequest) -> Outcome:
        """Query the provider; nothing is resumed, because VNPay goes on by itself."""
        return await self.status(request)

    async def status(self, request: GatewayRequest) -> Outcome:
        """Query the outcome of a charge or refund. Changes nothing at VNPay.

        Raises:
            GatewayUnreachable: the query was not sent.
            OutcomeUnknown: there was no readable answer, or VNPay refused the query.
            GatewayContractBroken: the answer is not signed, about another payment, or of an unexpected shape.
        """
        if request.kind is OperationKind.REFUND:
            answer, answered_at = await self._query(_charge_of(request))
            return understood(NAME, self._read_refunded, request, answer, answered_at)
        reference = request.reference or _reference(request)
        answer, answered_at = await self._query(reference)
        now = min(answered_at, self._clock())  # a clock that is ahead, VNPay's or ours, must not expire a payable URL
        if answer is None:
            return self._unpaid(request, reference, now)
        return understood(NAME, self._read_charge, request, reference, answer, now)

    async def close(self) -> None:
        """Close the connections."""
        await self._http.close()

    # --- the payment URL ----------------------------------------------------------------------------------------------

    def _pay_url(self, request: GatewayRequest, reference: str) -> str:
        ref, _, created = reference.partition("@")
        data = form(
            {
                "vnp_Version": VERSION,
                "vnp_Command": "pay",
                "vnp_TmnCode": self._config.tmn_code,
                "vnp_Amount": str(request.amount.minor * HUNDREDTHS),
                "vnp_CurrCode": request.amount.currency,
                "vnp_TxnRef": ref,
                "vnp_OrderInfo": f"Payment {ref}",
                "vnp_OrderType": "other",
                "vnp_ReturnUrl": self._config.return_url,
                "vnp_IpAddr": self._config.ip_address,
                "vnp_Locale": self._config.locale,
                "vnp_CreateDate": created,
                "vnp_ExpireDate": self._ends(reference).astimezone(VIETNAM).strftime(TIME),
            }
        )
        return f"{self._config.pay_url}?{data}&vnp_SecureHash={sign(self._config.hash_secret, data)}"

    def _ends(self, reference: str) -> datetime:
        return _expires_at(reference, self._config)

    def _unpaid(self, request: GatewayRequest, reference: str, now: datetime, grace: timedelta = GRACE) -> Outcome:
        """VNPay shows no payment. The URL works until it expires; a payment begun by then may end within `grace`."""
        if now < self._ends(reference) + grace:
            return RequiresAction(reference, "redirect", self._pay_url(request, reference), self._ends(reference))
        return Expired(reference, "91")

    # --- queries ------------------------------------------------------------------------------------------------------

    async def _query(self, reference: str) -> tuple[dict[str, Any] | None, datetime]:
        """The signed answer about a TxnRef, None if VNPay has no payment for it; and when it answered, by its clock."""
        ref, _, created = reference.partition("@")
        body = {
            "vnp_RequestId": uuid4().hex,  # a repeated one may be refused as a duplicate
            "vnp_Version": VERSION,
            "vnp_Command": "querydr",
            "vnp_TmnCode": self._config.tmn_code,
            "vnp_TxnRef": ref,
            "vnp_OrderInfo": f"Query {ref}",
            "vnp_TransactionDate": created,
            "vnp_CreateDate": self._clock().astimezone(VIETNAM).strftime(TIME),
            "vnp_IpAddr": self._config.ip_address,
        }
        answer, now = await self._post(body, joined(body, QUERY))
        code = str(answer.get("vnp_ResponseCode", ""))
        if code == "91":
            return None, now
        _log_our_mistake(code)
        if code != "00":
            # 94 means: queried again too soon. No such code says anything about the payment.
            raise OutcomeUnknown(NAME, f"query answered with code {code}")
        self._verify(answer, QUERY_ANSWER, body)
        return answer, now

    def _verify(self, answer: Mapping[str, Any], names: Sequence[str], sent: Mapping[str, str]) -> None:
        if not is_signed(self._config.hash_secret, joined(answer, names), str(answer.get("vnp_SecureHash", ""))):
            raise GatewayContractBroken(NAME, "an answer without a valid signature")
        if any(str(answer.get(name)) != sent[name] for name in ("vnp_TmnCode", "vnp_TxnRef")):
            raise GatewayContractBroken(NAME, "an answer about another payment")

    async def _prepare_refund(self, request: GatewayRequest) -> tuple[Mapping[str, Any], dict[str, str]]:
        """The charge as VNPay shows it, and the request, which must name that one's number. A query changes nothing.

        Raises:
            GatewayUnreachable: VNPay does not show the charge, or in a form that cannot be read.
        """
        try:
            paid, _ = await self._query(_charge_of(request))
            body = None if paid is None else understood(NAME, self._refund_body, request, paid)
        except OutcomeUnknown as error:
            raise GatewayUnreachable(NAME, f"no refund was sent: {error.message}") from error
        if paid is None or body is None:
            raise GatewayUnreachable(NAME, "no refund was sent: VNPay does not show the payment")
        return paid, body

    def _read_charge(
        self, request: GatewayRequest, reference: str, answer: Mapping[str, Any], now: datetime
    ) -> Outcome:
        """The outcome of a charge that VNPay shows; `now` is no later than VNPay's clock or ours."""
        type_ = str(answer["vnp_TransactionType"])
        if type_ in REFUND_TYPES:
            return Succeeded(reference, request.amount.minor)  # only what was paid can be refunded
        if type_ != "01":
            return Pending(reference)
        outcome = read_payment(None, str(answer["vnp_TransactionStatus"]), reference, minor_of(answer["vnp_Amount"]))
        if isinstance(outcome, Declined) and now >= self._ends(reference):
            # An IPN reports an expired URL as code 11. A query has no code: a failure after the end counts as that.
            return Expired(reference, outcome.code)
        is_begun = isinstance(outcome, Pending) and str(answer["vnp_TransactionStatus"]) == "01"
        return self._unpaid(request, reference, now, BEGUN_GRACE) if is_begun else outcome

    def _read_refunded(self, request: GatewayRequest, answer: Mapping[str, Any] | None, now: datetime) -> Outcome:
        """The outcome of one refund, from the query of its charge; `now` is by VNPay's clock.

        Hypothesis: once a charge has refunds, its query shows the latest one (type 02 or 03), with the same PayDate as
        the answer to that refund. Somebody may have made another refund in VNPay's portal at any time, so the one shown
        counts only if it has our amount and must be ours: it has the number that VNPay's answer to our refund gave; or,
        if no answer gave one, ours is the first operation after the charge, and it was under way at the PayDate.
        """
        if answer is None or str(answer["vnp_TransactionType"]) not in REFUND_TYPES:
            return Unknown("VNPay shows no refund")
        number, amount = str(answer["vnp_TransactionNo"]), minor_of(answer["vnp_Amount"])
        is_first = request.operation_number == 2 and _was_under_way(
            request, str(answer.get("vnp_PayDate")), now - self._clock()
        )
        is_ours = is_first if request.reference is None else request.reference == number
        if not is_ours or amount != request.amount.minor:
            return Unknown("VNPay shows a refund that may be another one")
        return read_refund(str(answer["vnp_TransactionStatus"]), number, amount)

    def _refund_body(self, request: GatewayRequest, paid: Mapping[str, Any]) -> dict[str, str]:
        ref, _, created = _charge_of(request).partition("@")
        is_whole = request.amount.minor == request.captured_minor
        number = paid.get("vnp_TransactionNo") if str(paid["vnp_TransactionType"]) == "01" else None
        return {
            "vnp_RequestId": hashlib.sha256(request.provider_key.encode()).hexdigest()[:32],
            "vnp_Version": VERSION,
            "vnp_Command": "refund",
            "vnp_TmnCode": self._config.tmn_code,
            "vnp_TransactionType": "02" if is_whole else "03",
            "vnp_TxnRef": ref,
            "vnp_Amount": str(request.amount.minor * HUNDREDTHS),
            "vnp_TransactionNo": str(number or "0"),
            "vnp_TransactionDate": created,
            "vnp_CreateBy": "payments",
            "vnp_CreateDate": self._clock().astimezone(VIETNAM).strftime(TIME),
            "vnp_IpAddr": self._config.ip_address,
            "vnp_OrderInfo": f"Refund {ref}",
        }

    async def _post(self, body: Mapping[str, str], signed: str) -> tuple[dict[str, Any], datetime]:
        """The answer, and when VNPay gave it: by its clock, or by ours if it does not say."""
        sealed = {**body, "vnp_SecureHash": sign(self._config.hash_secret, signed)}
        response = await self._http.request("POST", self._config.api_url, json=sealed)
        return _json(response), _given_at(response) or self._clock()


def _json(response: httpx.Response) -> dict[str, Any]:
    """The answer's JSON. VNPay does not document its HTTP statuses: any but 200 proves nothing, 429 included."""
    try:
        answer = response.json()
    except ValueError as error:
        raise OutcomeUnknown(NAME, f"status {response.status_code} without JSON") from error
    if response.status_code != httpx.codes.OK or not isinstance(answer, dict):
        raise OutcomeUnknown(NAME, f"status {response.status_code}")
    return answer


def _given_at(response: httpx.Response) -> datetime | None:
    """When VNPay answered, by its own clock; None if the answer does not say."""
    try:
        return parsedate_to_datetime(response.headers.get("date", "")).astimezone(UTC)
    except ValueError:
        return None


def _log_our_mistake(code: str) -> None:
    """Log an error that no retry can fix; it says nothing about the payment, so the outcome is left as it is."""
    if code in OUR_MISTAKES:
        log.error("vnpay rejected our request", code=code, meaning=OUR_MISTAKES[code])


def _charge_of(request: GatewayRequest) -> str:
    assert request.gateway_payment_id is not None, "a refund acts on a payment known to VNPay"
    return request.gateway_payment_id


def _was_under_way(request: GatewayRequest, pay_date: str, ahead: timedelta) -> bool:
    """Whether `pay_date` falls while `request` was under way. `ahead`: how far VNPay's clock is ahead of ours."""
    assert request.first_dispatched_at is not None, "a dispatched operation has a time"
    sent = request.first_dispatched_at + ahead
    try:
        made = datetime.strptime(pay_date, TIME).replace(tzinfo=VIETNAM)
    except ValueError:
        return False
    # PayDate is in whole seconds.
    return sent - timedelta(seconds=1) < made < sent + UNDER_WAY


def _own_number(answer: Mapping[str, Any], paid: Mapping[str, Any]) -> str | None:
    """VNPay's number of the refund itself; None if the answer has none, or has the payment's."""
    number = str(answer.get("vnp_TransactionNo") or "0")
    return None if number in ("0", str(paid.get("vnp_TransactionNo"))) else number


def minor_of(wire: Any) -> int:
    """An amount in dong, from VNPay's hundredths.

    Raises:
        GatewayContractBroken: not a whole number of dong.
    """
    text = str(wire)
    if not text.isascii() or not text.isdigit() or int(text) % HUNDREDTHS:
        raise GatewayContractBroken(NAME, "an amount that is not a whole number of dong")
    return int(text) // HUNDREDTHS
