"""MoMo's AIO v2 gateway: requests, signatures and the table of result codes. `momo_webhooks.py` reads the IPN.

Promise: a payment link is not a payment. Success and failure are only what MoMo reports for this very orderId and
amount, in a signed IPN or a query. Every POST carries a requestId derived from our operation, and its body is the same
at every attempt: MoMo answers with the first final outcome for it
(https://developers.momo.vn/v3/docs/payment/api/result-handling/idempotency).

Sources: https://developers.momo.vn/v3/docs/payment/api/wallet/onetime, …/payment-api/{query,confirm,refund},
…/result-handling/{notification,resultcode}, …/other/signature. Plain httpx: MoMo has no Python library. Apart
from IPNs, MoMo's answers are unsigned, so we accept one only if it repeats what we sent. MoMo does not document what is
marked "hypothesis"; there the outcome is `Pending` or unknown.
"""

import base64
import hashlib
import hmac
import json
import re
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any, Final
from uuid import UUID, uuid4

import httpx
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
    OperationState,
    Outcome,
    Pending,
    RequiresAction,
    Succeeded,
    Unknown,
)
from infra.gateways.evidence import understood
from infra.gateways.transport import ProviderHttp

NAME: Final = "momo"

Fields = Mapping[str, Any]
"""The JSON object of a request or an answer."""


class MoMoConfig(BaseModel):
    """One partner account. MoMo sends IPNs to `ipn_url` and the payer's browser to `redirect_url`."""

    model_config = ConfigDict(frozen=True)

    partner_code: str
    access_key: str
    secret_key: SecretStr
    api_base: str = "https://test-payment.momo.vn"
    redirect_url: str = "https://example.invalid/return"
    ipn_url: str = "https://example.invalid/webhooks/momo"
    lang: str = "vi"
    timeout_seconds: float = 30.0
    """MoMo asks for at least 30."""
    connect_timeout_seconds: float = 5.0
    max_connections: int = 64


# --- names and signatures ---------------------------------------------------------------------------------------------


def order_id(payment_id: UUID, number: int) -> str:
    """Our marks: MoMo's orderId and requestId for the operation."""
    return f"{payment_id}-{number}"


def marks_of(order: str) -> tuple[UUID, int] | None:
    """The payment id and operation number in an orderId; None if it is not one of ours."""
    found = re.fullmatch(r"([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})-([0-9]{1,9})", order)
    return (UUID(found[1]), int(found[2])) if found else None


def extra_data(kind: OperationKind) -> str:
    """The kind of operation that the link was made for; MoMo returns it, signed, in the IPN. Base64 of JSON."""
    return base64.b64encode(json.dumps({"kind": str(kind)}).encode()).decode()


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split())


CREATE: Final = _names("amount extraData ipnUrl orderId orderInfo partnerCode redirectUrl requestId requestType")
IPN: Final = _names(
    "amount extraData message orderId orderInfo orderType partnerCode payType requestId responseTime resultCode transId"
)
QUERY: Final = _names("orderId partnerCode requestId")
CONFIRM: Final = _names("amount description orderId partnerCode requestId requestType")
REFUND: Final = _names("amount description orderId partnerCode requestId transId")
"""The signed fields of each message, after the access key. Source: …/other/signature."""


def signed_text(access_key: str, fields: Fields, names: Sequence[str]) -> str:
    """The text that is signed: raw values in the order of `names`; an empty value stays empty."""
    return "&".join([f"accessKey={access_key}", *(f"{name}={fields[name]}" for name in names)])


def sign(secret: SecretStr, text: str) -> str:
    """HMAC-SHA256 as lower-case hex."""
    return hmac.new(secret.get_secret_value().encode(), text.encode(), hashlib.sha256).hexdigest()


def is_signed(secret: SecretStr, text: str, signature: str) -> bool:
    """Whether `signature` is MoMo's signature of `text`. Compares in constant time."""
    return hmac.compare_digest(sign(secret, text).encode(), signature.encode())


# --- the result table -------------------------------------------------------------------------------------------------

DECLINES: Final[Mapping[int, DeclineReason]] = {
    1001: DeclineReason.INSUFFICIENT_FUNDS,
    1002: DeclineReason.REFUSED_BY_ISSUER,
    1004: DeclineReason.LIMIT_EXCEEDED,
    1006: DeclineReason.CANCELED,
    1007: DeclineReason.INVALID_CARD_DATA,
    1017: DeclineReason.CANCELED,
    1026: DeclineReason.METHOD_NOT_SUPPORTED,
    4001: DeclineReason.REFUSED_BY_ISSUER,
    4002: DeclineReason.AUTHENTICATION_REQUIRED,
    4100: DeclineReason.AUTHENTICATION_FAILED,
}
"""Final refusals by the payer, or by the payer's wallet or bank. Source: …/result-handling/resultcode."""

PAID: Final = 0
AUTHORIZED: Final = 9000
WAITING: Final = 1000
RELEASED: Final = 1003
EXPIRED: Final = frozenset({RELEASED, 1005})
"""1005: the link has expired. 1003: the hold has expired, or we or MoMo cancelled it."""
UNKNOWN_ORDER: Final = 42
DUPLICATES: Final = frozenset({40, 41})
IN_PROGRESS: Final = 7000
MAINTENANCE: Final = 10
NOT_TAKEN: Final = frozenset({MAINTENANCE, 43, 98})
"""Maintenance, a conflicting transaction, or no QR code: this attempt was not executed."""
REFUSED: Final = frozenset({11, 12, 13, 20, 21, 22, 42, 45, 47, 1088, 2019})
"""The error is in our request or our account."""
REFUND_FAILED: Final = frozenset({1080})


def read_payment(code: int, reference: str, amount_minor: int) -> Outcome:
    """The outcome that a resultCode of an IPN or a query reports for a payment.

    9000 completes an authorization; MoMo says to treat it as a success of a one-step payment as well.
    Hypothesis: MoMo never reports when a hold ends, only that it may cancel one by itself (1003). So a hold has no
    `expires_at`, and is queried from `hold_end_unknown_after` on.
    """
    if code in (PAID, AUTHORIZED):
        return Succeeded(reference, amount_minor)
    if code in DECLINES:
        return Declined(DECLINES[code], str(code), reference)
    return Expired(reference, str(code)) if code in EXPIRED else Pending(reference)


# --- the gateway ------------------------------------------------------------------------------------------------------


class MoMoGateway:
    """MoMo wallet payments by redirect, in one step or two. Create it inside the event loop that uses it."""

    name = NAME
    capabilities = Capabilities(
        operations=frozenset(OperationKind),
        currencies=frozenset({"VND"}),
        partial_capture=False,
        multi_capture=False,
        partial_refund=True,
        off_session=False,
        cancel_waiting=False,  # an unpaid link stays payable until it expires
        idempotency_retention=timedelta(days=30),  # MoMo remembers a requestId for 31
        limits={"VND": AmountLimits(1_000, 50_000_000)},
    )

    def __init__(self, config: MoMoConfig) -> None:
        self._config = config
        self._http = ProviderHttp(
            NAME,
            max_connections=config.max_connections,
            timeout_seconds=config.timeout_seconds,
            connect_timeout_seconds=config.connect_timeout_seconds,
            base_url=config.api_base,
            wants_rest=_is_at_maintenance,
        )
        self.rests_seconds, self.connections = self._http.rest.seconds, self._http.connections

    async def authorize(self, request: GatewayRequest) -> Outcome:
        """Create a link where the payer authorizes a hold of `request.amount`."""
        return await self._create(request, captures=False)

    async def charge(self, request: GatewayRequest) -> Outcome:
        """Create a link where the payer pays `request.amount`."""
        return await self._create(request, captures=True)

    async def capture(self, request: GatewayRequest) -> Outcome:
        """Capture the whole hold: MoMo has no partial captures."""
        return await self._confirm(request, "capture")

    async def void(self, request: GatewayRequest) -> Outcome:
        """Release the hold."""
        return await self._confirm(request, "cancel")

    async def refund(self, request: GatewayRequest) -> Outcome:
        """Return `request.amount`; `Pending` while MoMo has not finished it.

        Raises:
            GatewayUnreachable: nothing was sent, or MoMo reports that it did not accept the request.
            OutcomeUnknown: the refund may have been executed.
        """
        found, body = await self._prepare_refund(request)
        if not isinstance(found, Unknown):
            return found  # an earlier attempt whose answer was lost
        answer = await self._post("refund", body, REFUND)
        code = _code(answer)
        reference = str(answer.get("transId") or request.provider_key)
        if code == PAID:
            _check_echo(answer, body, "amount")
            return Succeeded(reference, request.amount.minor)
        if code in REFUND_FAILED:
            return Declined(DeclineReason.REFUND_FAILED, str(code), reference)
        return await self._without_success(request, code)

    async def resume(self, request: GatewayRequest) -> Outcome:
        """Query the provider; nothing is resumed, because MoMo goes on by itself."""
        return await self.status(request)

    async def status(self, request: GatewayRequest) -> Outcome:
        """Query the operation's outcome. Changes nothing at MoMo.

        Raises:
            GatewayUnreachable: the query was not sent, or MoMo did not accept it.
            OutcomeUnknown: MoMo's answer did not arrive or cannot be read.
            GatewayContractBroken: the answer contradicts the request, or is of an unexpected shape.
        """
        is_opening = request.kind in (OperationKind.AUTHORIZE, OperationKind.CHARGE)
        answer = await self._query(_order_of(request) if is_opening else _payment_of(request))
        return understood(NAME, _read_status, answer, request)

    async def close(self) -> None:
        """Close the connections."""
        await self._http.close()

    # --- calls that change something ----------------------------------------------------------------------------------

    async def _create(self, request: GatewayRequest, *, captures: bool) -> Outcome:
        body = self._body(request) | {
            "amount": request.amount.minor,
            "orderInfo": f"Payment {_order_of(request)}",
            "redirectUrl": self._config.redirect_url,
            "ipnUrl": self._config.ipn_url,
            "requestType": "captureWallet",
            "extraData": extra_data(request.kind),
            "autoCapture": captures,
        }
        answer = await self._post("create", body, CREATE)
        code = _code(answer)
        if code != PAID:
            return await self._without_success(request, code)
        _check_echo(answer, body, "amount")
        url = answer.get("payUrl")
        return RequiresAction(_order_of(request), "redirect", url if isinstance(url, str) else None)

    async def _confirm(self, request: GatewayRequest, request_type: str) -> Outcome:
        body = self._body(request) | {
            "orderId": _payment_of(request),
            "requestType": request_type,
            "amount": request.amount.minor,
            "description": "",
        }
        answer = await self._post("confirm", body, CONFIRM)
        code = _code(answer)
        if code != PAID:
            return await self._without_success(request, code)
        _check_echo(answer, body, "amount")
        return Succeeded(str(answer.get("transId") or request.provider_key))

    async def _without_success(self, request: GatewayRequest, code: int) -> Outcome:
        """The outcome of a result other than 0. A refusal is proof only if every earlier attempt is accounted for."""
        if code in NOT_TAKEN:
            raise GatewayUnreachable(NAME, f"not accepted (result {code})")
        if code in DECLINES and request.kind in (OperationKind.AUTHORIZE, OperationKind.CHARGE):
            return Declined(DECLINES[code], str(code), _order_of(request))
        if code in EXPIRED and request.kind in (OperationKind.AUTHORIZE, OperationKind.CHARGE):
            return Expired(_order_of(request), str(code))
        if code in (WAITING, IN_PROGRESS, 7002):
            if request.kind in (OperationKind.CAPTURE, OperationKind.VOID):
                # A query shows these only once they have ended; a repeated request is answered with their outcome.
                raise OutcomeUnknown(NAME, f"still being executed (result {code})")
            return Pending(None)
        refusals = REFUSED | EXPIRED | DECLINES.keys()
        found = await self.status(request) if code in DUPLICATES | {1081} | refusals else Unknown()
        if not isinstance(found, Unknown):
            return found
        if code in refusals and request.state is OperationState.DISPATCHED:
            is_hold_gone = code == RELEASED and request.kind is OperationKind.CAPTURE
            return NotExecuted(f"MoMo refused it (result {code})", str(code), is_hold_gone)
        raise OutcomeUnknown(NAME, f"result {code}, and no evidence")

    async def _prepare_refund(self, request: GatewayRequest) -> tuple[Outcome, dict[str, Any]]:
        """What became of an earlier attempt, and the request, which must name the payment's transId.

        Raises:
            GatewayUnreachable: MoMo does not show the payment, or in a form that cannot be read.
        """
        try:
            paid = await self._query(_payment_of(request))
            if not paid.get("transId"):
                raise GatewayUnreachable(NAME, "no refund was sent: MoMo does not show the payment")
            number = _whole(paid["transId"], "a transId")
            body = self._body(request) | {"amount": request.amount.minor, "transId": number, "description": ""}
            return understood(NAME, _read_refunded, paid, request), body
        except OutcomeUnknown as error:
            raise GatewayUnreachable(NAME, f"no refund was sent: {error.message}") from error

    # --- queries ------------------------------------------------------------------------------------------------------

    async def _query(self, order: str) -> Fields:
        body = {
            "partnerCode": self._config.partner_code,
            "requestId": str(uuid4()),  # a repeated one may be refused as a duplicate
            "orderId": order,
            "lang": self._config.lang,
        }
        return await self._post("query", body, QUERY)

    # --- HTTP ---------------------------------------------------------------------------------------------------------

    def _body(self, request: GatewayRequest) -> dict[str, Any]:
        """The fields of every request. Our marks are the requestId, and the orderId unless the caller sets another."""
        own = order_id(request.payment_id, request.operation_number)
        return {
            "partnerCode": self._config.partner_code,
            "requestId": own,
            "orderId": own,
            "lang": self._config.lang,
        }

    async def _post(self, path: str, body: dict[str, Any], names: Sequence[str]) -> Fields:
        signature = sign(self._config.secret_key, signed_text(self._config.access_key, body, names))
        signed = {**body, "signature": signature}
        return _read(await self._http.request("POST", f"/v2/gateway/api/{path}", json=signed), body)


def _read(response: httpx.Response, body: Fields) -> Fields:
    """The answer, if it belongs to this request. MoMo's HTTP statuses are coarse: a 4xx carries a result as well."""
    if response.status_code == httpx.codes.TOO_MANY_REQUESTS:
        raise GatewayUnreachable(NAME, "too many requests")
    try:
        answer = response.json()
    except ValueError as error:
        raise OutcomeUnknown(NAME, f"status {response.status_code} without JSON") from error
    if response.status_code >= 500 or not isinstance(answer, dict) or "resultCode" not in answer:
        raise OutcomeUnknown(NAME, f"status {response.status_code} without a result")
    if response.status_code == httpx.codes.UNPROCESSABLE_ENTITY and _code(answer) == IN_PROGRESS:
        # A repeated request is answered with that one's outcome. Source: …/result-handling/idempotency.
        raise OutcomeUnknown(NAME, "an earlier request with this requestId is still being executed")
    names = ("orderId", "requestId", "partnerCode")
    # Hypothesis: the answer to a request that fails validation may lack any of these fields.
    _check_echo(answer, body, *(name for name in names if name in answer or _code(answer) not in REFUSED))
    return answer


def _is_at_maintenance(response: httpx.Response) -> bool:
    """Whether MoMo reports maintenance, which it does with HTTP 200, and so asks for fewer requests."""
    try:
        return bool(response.json()["resultCode"] == MAINTENANCE)
    except (ValueError, LookupError, TypeError):
        return False


def _check_echo(answer: Fields, body: Fields, *names: str) -> None:
    """Answers are unsigned, so they count only if they repeat these fields of the request.

    Raises:
        GatewayContractBroken: a field differs.
    """
    for name in names:
        if str(answer.get(name)) != str(body[name]):
            raise GatewayContractBroken(NAME, f"the answer does not repeat our {name}")


def _code(answer: Fields) -> int:
    return _whole(answer["resultCode"], "a result")


def _amount(answer: Fields) -> int:
    return _whole(answer.get("amount"), "an amount")


def _whole(value: object, what: str) -> int:
    """An integer, given as a number or as text. Rounding is unsafe: 0.9 or false would become 0, MoMo's success."""
    text = str(value) if isinstance(value, int | str) else ""
    if not re.fullmatch("-?[0-9]{1,18}", text):
        raise GatewayContractBroken(NAME, f"{what} that is not a whole number")
    return int(text)


def _order_of(request: GatewayRequest) -> str:
    return order_id(request.payment_id, request.operation_number)


def _payment_of(request: GatewayRequest) -> str:
    assert request.gateway_payment_id is not None, "a capture, void or refund acts on a payment known to MoMo"
    return request.gateway_payment_id


def _read_status(answer: Fields, request: GatewayRequest) -> Outcome:
    """The outcome of the operation, from a query of its payment."""
    match request.kind:
        case OperationKind.AUTHORIZE | OperationKind.CHARGE:
            return _read_opening(answer, request)
        case OperationKind.CAPTURE:
            return _read_confirmed(answer, request, PAID)
        case OperationKind.VOID:
            return _read_confirmed(answer, request, RELEASED)
        case OperationKind.REFUND:
            return _read_refunded(answer, request)


def _read_opening(answer: Fields, request: GatewayRequest) -> Outcome:
    code, order = _code(answer), _order_of(request)
    if code == WAITING:
        # MoMo returns the link only once. If that answer was lost, the payer has no link and cannot pay.
        is_link_known = request.state is OperationState.REQUIRES_ACTION
        return RequiresAction(order, "redirect") if is_link_known else Pending(order)
    if code == UNKNOWN_ORDER or code in NOT_TAKEN or code in REFUSED:
        return Unknown(f"MoMo shows no such order (result {code})")
    if code == PAID and request.kind is OperationKind.AUTHORIZE:
        raise GatewayContractBroken(NAME, "captured although only a hold was requested")
    amount = _amount(answer) if code in (PAID, AUTHORIZED) else 0
    return read_payment(code, order, amount)


def _read_confirmed(answer: Fields, request: GatewayRequest, wanted: int) -> Outcome:
    """The outcome of a capture or void, from a query of the payment: only the state that it leads to is evidence.

    A hold that MoMo cancels by itself becomes 1003 as well; nothing is held any more then, so a void has succeeded.
    """
    code = _code(answer)
    if code == wanted:
        return Succeeded(str(answer.get("transId") or request.provider_key))
    if request.kind is OperationKind.CAPTURE and code == RELEASED:
        return NotExecuted("the hold was released before the capture", str(code), is_hold_gone=True)
    return Unknown(f"MoMo shows result {code}")


def _read_refunded(answer: Fields, request: GatewayRequest) -> Outcome:
    """The outcome of the refund with our orderId and amount, among the refunds of the payment."""
    own = _order_of(request)
    rows = answer.get("refundTrans") or []
    found = [row for row in rows if str(row.get("orderId")) == own]
    if not found or _amount(found[0]) != request.amount.minor:
        return Unknown("MoMo shows no such refund")
    code, reference = _code(found[0]), str(found[0].get("transId") or own)
    if code == PAID:
        return Succeeded(reference, request.amount.minor)
    return Declined(DeclineReason.REFUND_FAILED, str(code), reference) if code in REFUND_FAILED else Pending(reference)
