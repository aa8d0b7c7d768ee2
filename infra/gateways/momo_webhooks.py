"""MoMo's webhooks: the IPN and the payer's return, how they are verified, and what they say.

Promise: a message counts only with MoMo's signature over its fields, made for this partner; of its fields only the
signed ones are read. What is read is never more than MoMo says of the one operation that its orderId names.

Sources: https://developers.momo.vn/v3/docs/payment/api/result-handling/notification, …/resultcode, …/other/signature.
"""

import json
from collections.abc import Mapping
from typing import Final

from domain.commands import OperationKind
from domain.notices import Notice, Verdict, WebhookAnswer, WebhookRefused, WebhookRequest
from domain.operations import Pending
from infra.gateways.momo import (
    IPN,
    NAME,
    PAID,
    MoMoConfig,
    extra_data,
    is_signed,
    marks_of,
    read_payment,
    signed_text,
)
from infra.gateways.signed_query import signed_pairs

ANSWERS: Final[Mapping[Verdict, int]] = {
    Verdict.FORGED: 400,
    Verdict.MALFORMED: 400,
    Verdict.STALE: 400,
    Verdict.TOO_LARGE: 413,
    Verdict.UNKNOWN_PAYMENT: 404,
    Verdict.UNAVAILABLE: 503,
}
"""Any other is 204, MoMo's word for "received"; a browser, which would stay where it is then, is shown a text with 200.
An unknown order may be one that another installation just opened, so it is refused, and MoMo may send it again."""

BACK_TO_THE_SHOP: Final = b"MoMo's result of this payment was received. You may go back to the shop.\n"
NOT_RECEIVED: Final = b"This result was not received. The shop will ask MoMo for it; you may go back there.\n"


class MoMoWebhooks:
    """The IPN, a POST of signed JSON, and the return of the payer's browser, a GET.

    Fits `domain.notices.WebhookReader`. The return is evidence, too: MoMo signs the same fields of both in one way,
    so that whoever has one could send the other, and only MoMo can make either. What both tell counts once.
    """

    gateway = NAME

    def __init__(self, config: MoMoConfig) -> None:
        self._config = config

    async def read(self, request: WebhookRequest) -> Notice:
        """Verify and read one IPN, or one return; of its fields only the signed ones count.

        Raises:
            WebhookRefused: FORGED or MALFORMED.
        """
        fields = signed_pairs(request) if request.method == "GET" else _plain(request.body)
        try:
            text = signed_text(self._config.access_key, fields, IPN)
            signature = str(fields["signature"])
        except KeyError as error:
            raise WebhookRefused(Verdict.MALFORMED, f"no {error.args[0]}") from error
        if not is_signed(self._config.secret_key, text, signature):
            raise WebhookRefused(Verdict.FORGED, "no valid signature")
        if fields["partnerCode"] != self._config.partner_code:
            raise WebhookRefused(Verdict.FORGED, "signed for another partner")
        return _notice(fields)

    def answer(self, verdict: Verdict, request: WebhookRequest) -> WebhookAnswer:
        """MoMo reads the status; the payer reads a text, which does not say whether they paid: the shop knows."""
        status = ANSWERS.get(verdict, 204)
        if request.method != "GET":
            return WebhookAnswer(status)
        return WebhookAnswer(200, BACK_TO_THE_SHOP) if status == 204 else WebhookAnswer(status, NOT_RECEIVED)

    async def close(self) -> None:
        """Nothing is held open."""


def _plain(body: bytes) -> dict[str, str]:
    """The body's texts, and its numbers as the texts that they stand there as: that is what is signed."""
    try:
        fields = json.loads(body, parse_int=str, parse_float=str)
    except ValueError as error:
        raise WebhookRefused(Verdict.MALFORMED, "no JSON") from error
    if not isinstance(fields, dict):
        raise WebhookRefused(Verdict.MALFORMED, "no object")
    return {name: value for name, value in fields.items() if isinstance(value, str)}


def _notice(fields: Mapping[str, str]) -> Notice:
    order, transaction = fields["orderId"], fields["transId"]
    marks = marks_of(order)
    try:
        code, amount = int(fields["resultCode"]), int(fields["amount"])
    except ValueError as error:
        raise WebhookRefused(Verdict.MALFORMED, "signed, but a number is none") from error
    notice = Notice(NAME, f"{order}:{fields['requestId']}:{transaction}:{code}:{amount}", "ipn", currency="VND")
    if marks is None:
        return notice._replace(gateway_payment_id=order, outcome=Pending(None))
    outcome = read_payment(code, order, amount)
    if code == PAID and fields["extraData"] == extra_data(OperationKind.AUTHORIZE):
        # Captured although only a hold was asked for, or after our own capture: a question tells which.
        outcome = Pending(order)
    return notice._replace(payment_id=marks[0], operation_number=marks[1], outcome=outcome)
