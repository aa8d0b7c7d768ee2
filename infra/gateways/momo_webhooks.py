"""MoMo's webhooks: how the IPN and the payer's return are verified and read.

Promise: a message counts only if MoMo signed its fields, for this partner; only signed fields are read. They are
evidence about no other operation than the one that the orderId names.

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
"""Any other verdict is answered with 204, which MoMo takes as "received". A browser would stay on its page after a 204,
so it is shown a text with 200. Another installation may have just opened an unknown order, so the IPN is refused, and
MoMo may send it again."""

BACK_TO_THE_SHOP: Final = b"MoMo's result of this payment was received. You may return to the shop.\n"
NOT_RECEIVED: Final = b"This result was not received. The shop will ask MoMo for it; you may return there.\n"


class MoMoWebhooks:
    """The IPN, a POST of signed JSON, and the return of the payer's browser, a GET.

    Fits `domain.notices.WebhookReader`. The return is evidence as well: MoMo signs the same fields of both in the same
    way, so a copy of one could be sent as the other, and only MoMo can create either. What both report counts once.
    """

    gateway = NAME

    def __init__(self, config: MoMoConfig) -> None:
        self._config = config

    async def read(self, request: WebhookRequest) -> Notice:
        """Verify and read one IPN or one return; only the signed fields count.

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
        """MoMo reads the status; the payer reads a text, which leaves it to the shop to say whether they paid."""
        status = ANSWERS.get(verdict, 204)
        if request.method != "GET":
            return WebhookAnswer(status)
        return WebhookAnswer(200, BACK_TO_THE_SHOP) if status == 204 else WebhookAnswer(status, NOT_RECEIVED)

    async def close(self) -> None:
        """Nothing to close."""


def _plain(body: bytes) -> dict[str, str]:
    """The strings and numbers of the body; numbers stay as written, because that text is signed."""
    try:
        fields = json.loads(body, parse_int=str, parse_float=str)
    except ValueError as error:
        raise WebhookRefused(Verdict.MALFORMED, "not JSON") from error
    if not isinstance(fields, dict):
        raise WebhookRefused(Verdict.MALFORMED, "not a JSON object")
    return {name: value for name, value in fields.items() if isinstance(value, str)}


def _notice(fields: Mapping[str, str]) -> Notice:
    order, transaction = fields["orderId"], fields["transId"]
    marks = marks_of(order)
    try:
        code, amount = int(fields["resultCode"]), int(fields["amount"])
    except ValueError as error:
        raise WebhookRefused(Verdict.MALFORMED, "signed, but a number cannot be read") from error
    notice = Notice(NAME, f"{order}:{fields['requestId']}:{transaction}:{code}:{amount}", "ipn", currency="VND")
    if marks is None:
        return notice._replace(gateway_payment_id=order, outcome=Pending(None))
    outcome = read_payment(code, order, amount)
    if code == PAID and fields["extraData"] == extra_data(OperationKind.AUTHORIZE):
        # Captured although only a hold was requested, or captured by us: a query shows which.
        outcome = Pending(order)
    return notice._replace(payment_id=marks[0], operation_number=marks[1], outcome=outcome)
