"""VNPay's webhooks, which it calls IPN: how they are verified and read.

Promise: a message counts only if VNPay signed its fields, for this terminal; a text that we signed ourselves does not
count. An IPN is evidence about no other operation than the one that its TxnRef names.

Source: https://sandbox.vnpayment.vn/apis/docs/thanh-toan-pay/pay.html.
"""

from collections.abc import Mapping
from typing import Final
from urllib.parse import quote

from domain.errors import GatewayContractBroken
from domain.notices import Notice, Verdict, WebhookAnswer, WebhookRefused, WebhookRequest
from domain.operations import Pending
from infra.gateways.signed_query import signed_pairs
from infra.gateways.vnpay import NAME, VNPayConfig, form, is_signed, marks_of, minor_of, read_payment

ANSWERS: Final[Mapping[Verdict, tuple[str, str]]] = {
    Verdict.STORED: ("00", "Confirm Success"),
    Verdict.DUPLICATE: ("02", "Order already confirmed"),
    Verdict.ALREADY_FINAL: ("02", "Order already confirmed"),
    Verdict.AMOUNT_DIFFERS: ("04", "Invalid amount"),
    Verdict.UNKNOWN_PAYMENT: ("01", "Order not found"),
    Verdict.FORGED: ("97", "Invalid signature"),
}
"""RspCode and Message, always with HTTP 200; any other verdict is 99, after which VNPay sends the IPN again."""


class VNPayWebhooks:
    """The IPN: a GET with a signed query. Fits `domain.notices.WebhookReader`."""

    gateway = NAME

    def __init__(self, config: VNPayConfig) -> None:
        self._config = config

    async def read(self, request: WebhookRequest) -> Notice:
        """Verify and read one IPN.

        Raises:
            WebhookRefused: FORGED or MALFORMED.
        """
        fields = self._verified(request)
        try:
            return _notice(fields)
        except (KeyError, ValueError, GatewayContractBroken) as error:
            raise WebhookRefused(Verdict.MALFORMED, f"signed, but unreadable ({type(error).__name__})") from error

    def answer(self, verdict: Verdict, request: WebhookRequest) -> WebhookAnswer:
        code, message = ANSWERS.get(verdict, ("99", "Unknown error"))
        return WebhookAnswer(200, f'{{"RspCode":"{code}","Message":"{message}"}}'.encode(), "application/json")

    async def close(self) -> None:
        """Nothing to close."""

    def _verified(self, request: WebhookRequest) -> dict[str, str]:
        given, query = signed_pairs(request), request.query
        fields = {name: value for name, value in given.items() if name.startswith("vnp_")}
        # We may read only what was signed: `_as_received` would skip a percent-encoded name, yet we would read it.
        # A request must be refused because the payer has one that we signed ourselves: the payment URL.
        if list(given) != [each.partition("=")[0] for each in query.split("&")]:
            raise WebhookRefused(Verdict.FORGED, "a parameter name is encoded")
        if "vnp_Command" in fields:
            raise WebhookRefused(Verdict.FORGED, "a request, not an IPN")
        signature = fields.pop("vnp_SecureHash", "")
        fields.pop("vnp_SecureHashType", None)
        # All candidates encode the same values under the same secret, so none of them is weaker than another.
        candidates = (_as_received(query), form(fields), form(fields).replace("+", "%20"), _with_blanks(fields))
        # A list, not a generator: the time taken must not reveal which candidate matched.
        if not any([is_signed(self._config.hash_secret, each, signature) for each in candidates]):  # noqa: C419
            raise WebhookRefused(Verdict.FORGED, "no valid signature")
        if fields.get("vnp_TmnCode") != self._config.tmn_code:
            raise WebhookRefused(Verdict.FORGED, "signed for another terminal")
        return fields


def _as_received(query: str) -> str:
    pairs = (each.partition("=") for each in query.split("&"))
    signed = sorted(
        (name, value)
        for name, _, value in pairs
        if name.startswith("vnp_") and name not in ("vnp_SecureHash", "vnp_SecureHashType")
    )
    return "&".join(f"{name}={value}" for name, value in signed)


def _with_blanks(fields: Mapping[str, str]) -> str:
    return "&".join(f"{name}={quote(value, safe='')}" for name, value in sorted(fields.items()))


def _notice(fields: Mapping[str, str]) -> Notice:
    ref, code, status = fields["vnp_TxnRef"], fields["vnp_ResponseCode"], fields["vnp_TransactionStatus"]
    number = fields.get("vnp_TransactionNo", "0")
    marks = marks_of(ref)
    notice = Notice(NAME, f"{ref}:{number}:{code}:{status}:{fields['vnp_Amount']}", "ipn", currency="VND")
    if marks is None:
        return notice._replace(gateway_payment_id=ref, outcome=Pending(None))
    outcome = read_payment(code, status, "", minor_of(fields["vnp_Amount"]))
    return notice._replace(payment_id=marks[0], operation_number=marks[1], outcome=outcome)
