"""PayPal's webhooks: what each type of event proves. (`paypal_signatures.py` verifies that PayPal sent it.)

An event that is not about our money has no outcome; money that moved without our marks is reported as external
(docs/decisions/0012). Sources:
https://developer.paypal.com/api/rest/webhooks/rest/, https://developer.paypal.com/api/rest/webhooks/event-names/.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Final
from uuid import UUID

from domain.commands import OperationKind
from domain.errors import GatewayContractBroken, GatewayError
from domain.money import Money
from domain.notices import (
    Dispute,
    DisputeStage,
    External,
    Notice,
    Verdict,
    WebhookAnswer,
    WebhookRefused,
    WebhookRequest,
)
from domain.operations import GatewayRequest, Outcome
from infra.gateways.paypal_http import NAME, Json, PayPalConfig, PayPalHttp, code_of, quoted
from infra.gateways.paypal_objects import (
    CAPTURES,
    as_opening,
    linked_id,
    minor_of,
    read_authorization,
    read_capture,
    read_mark,
    read_refund,
    time_of,
)
from infra.gateways.paypal_signatures import PayPalSignatures

QUESTIONS_MAX: Final = 4
"""How many refunds are queried at once; further ones wait, or PayPal sends them again."""

ANSWERS: Final[Mapping[Verdict, int]] = {
    Verdict.STORED: 200,
    Verdict.DUPLICATE: 200,
    Verdict.ALREADY_FINAL: 200,
    Verdict.AMOUNT_DIFFERS: 200,
    Verdict.UNKNOWN_PAYMENT: 404,
    Verdict.FORGED: 400,
    Verdict.STALE: 400,
    Verdict.MALFORMED: 400,
    Verdict.TOO_LARGE: 413,
    Verdict.UNAVAILABLE: 503,
}
"""PayPal retries for three days whatever is not answered with a 2xx."""


class PayPalWebhooks:
    """PayPal's webhooks, verified and then read. Fits `domain.notices.WebhookReader`.

    A refund that somebody made in PayPal's pages does not name its order, so we query its capture, which does.
    """

    gateway = NAME

    def __init__(self, config: PayPalConfig) -> None:
        self._signatures = PayPalSignatures(config)
        self._api = PayPalHttp(config.model_copy(update={"max_connections": QUESTIONS_MAX}))

    async def read(self, request: WebhookRequest) -> Notice:
        """Verify the signature over the raw body, then read it.

        Raises:
            WebhookRefused: TOO_LARGE, FORGED, STALE, MALFORMED; or UNAVAILABLE if the certificate, or the capture that
                a refund belongs to, could not be fetched.
        """
        await self._signatures.verify(request)
        with _malformed_unless_read():
            return read_event(await self._placed(json.loads(request.body)))

    def answer(self, verdict: Verdict, request: WebhookRequest) -> WebhookAnswer:
        """Only a status: PayPal does not read the body."""
        return WebhookAnswer(ANSWERS[verdict])

    async def close(self) -> None:
        """Close the connections."""
        await self._signatures.close()
        await self._api.close()

    async def _placed(self, event: Json) -> Json:
        """The event; a refund completed with the order and marks that only its capture has, if one can be found."""
        capture_id = _unplaced_refund(event) or await self._capture_of(_nameless_refund(event))
        capture = await self._find("captures", capture_id)
        return event if capture is None else {**event, "resource": _refund_of(capture, event["resource"])}

    async def _capture_of(self, refund_id: str | None) -> str | None:
        refund = await self._find("refunds", refund_id)
        return None if refund is None else linked_id(refund, "/captures/")

    async def _find(self, kind: str, reference: str | None) -> Json | None:
        """The object, or None if there is none. If the query fails, the webhook is refused and PayPal retries it."""
        if reference is None:
            return None
        try:
            return await self._api.get(f"/v2/payments/{kind}/{quoted(reference)}")
        except GatewayError as error:
            raise WebhookRefused(Verdict.UNAVAILABLE, f"the refunded capture: {error.message}") from error


@contextmanager
def _malformed_unless_read() -> Iterator[None]:
    """Raises WebhookRefused(MALFORMED) if a signed body cannot be read."""
    try:
        yield
    except (GatewayContractBroken, AttributeError, LookupError, TypeError, ValueError, RecursionError) as error:
        raise WebhookRefused(Verdict.MALFORMED, f"{type(error).__name__} while reading the event") from error


REFUND_EVENTS: Final = ("PAYMENT.CAPTURE.REFUNDED", "PAYMENT.REFUND.")
REVERSAL: Final = "PAYMENT.CAPTURE.REVERSED"
"""PayPal returned money to the payer. In PayPal's sample the resource is a refund with a link to its capture, without
marks. Whether it can be the capture itself is unconfirmed, and makes no difference here."""
MARKED: Final = ("custom_id", "invoice_id")
CAPTURE_EVENTS: Final = frozenset(f"PAYMENT.CAPTURE.{what}" for what in ("COMPLETED", "PENDING", "DECLINED", "DENIED"))
"""The events whose resource is the capture itself."""


def read_event(event: Json) -> Notice:
    """The notice of an event. Types that do not concern our money, and unknown types, have no outcome.

    Source: https://developer.paypal.com/api/rest/webhooks/event-names/.
    """
    name, resource = str(event["event_type"]), event["resource"]
    notice = Notice(NAME, str(event["id"]), name)
    if name.startswith("CUSTOMER.DISPUTE."):
        return _dispute_notice(notice, resource)
    if name.startswith("CHECKOUT.ORDER."):
        return _order_notice(notice, resource)
    if name.startswith("PAYMENT.AUTHORIZATION."):
        return _payment_notice(notice, resource, (OperationKind.AUTHORIZE,))
    if name.startswith(REFUND_EVENTS):
        return _payment_notice(notice, resource, (OperationKind.REFUND,))
    if name == REVERSAL:
        return _reversal_notice(notice, resource)
    if name.startswith("PAYMENT.CAPTURE."):
        return _payment_notice(notice, resource, CAPTURES if name in CAPTURE_EVENTS else ())
    return notice


def _order_notice(notice: Notice, order: Json) -> Notice:
    """An order's notice. If the payer approved it, our call to execute it is due; nothing is held before that."""
    unit = (order.get("purchase_units") or [{}])[0]
    marks = read_mark(unit.get("custom_id"))
    return notice._replace(
        payment_id=marks.payment_id if marks else None,
        operation_number=marks.operation_number if marks else None,
        gateway_payment_id=str(order["id"]),
        is_ripe=notice.type == "CHECKOUT.ORDER.APPROVED",
    )


def _payment_notice(notice: Notice, resource: Json, kinds: tuple[OperationKind, ...]) -> Notice:
    """Evidence about the operation that the invoice id names, if its kind creates such a resource.

    A refund made in PayPal's pages may inherit the invoice id of its capture, and captures inherit the `custom_id` of
    their hold, so the kind in the mark must agree. `custom_id` alone names only the payment: the resource is then
    somebody else's, or ours without the invoice id.
    """
    inherited, own = read_mark(resource.get("custom_id")), read_mark(resource.get("invoice_id"))
    marks = own or inherited
    known = notice._replace(payment_id=marks.payment_id if marks else None, gateway_payment_id=_order_of(resource))
    if own is None or own.kind not in kinds:
        return _external_notice(known, resource, kinds)
    outcome = _event_outcome(own.kind, resource, known.gateway_payment_id)
    currency = resource["amount"]["currency_code"] if outcome is not None else None
    return known._replace(operation_number=own.operation_number, outcome=outcome, currency=currency)


def _external_notice(notice: Notice, resource: Json, kinds: tuple[OperationKind, ...]) -> Notice:
    """A refund, or a capture of a hold of ours, that no operation of ours has marked.

    Captures always inherit the mark of their order, so one without it belongs to an order that is not ours.
    """
    is_capture = OperationKind.CAPTURE in kinds and notice.payment_id is not None
    if not is_capture and OperationKind.REFUND not in kinds:
        return notice
    kind = OperationKind.CAPTURE if is_capture else OperationKind.REFUND
    outcome = _event_outcome(kind, resource, notice.gateway_payment_id)
    is_final = is_capture and resource.get("final_capture") is True
    external = External(kind, minor_of(resource["amount"]), time_of(resource.get("create_time")), is_final)
    return notice._replace(outcome=outcome, currency=resource["amount"]["currency_code"], external=external)


def _reversal_notice(notice: Notice, resource: Json) -> Notice:
    """Money that PayPal took back, whatever marks the resource inherits."""
    marks = read_mark(resource.get("custom_id")) or read_mark(resource.get("invoice_id"))
    moved_at = time_of(resource.get("create_time"))
    return notice._replace(
        payment_id=marks.payment_id if marks else None,
        gateway_payment_id=_order_of(resource),
        outcome=_event_outcome(OperationKind.REFUND, resource, None),
        currency=resource["amount"]["currency_code"],
        external=External(OperationKind.REFUND, minor_of(resource["amount"]), moved_at, is_reversal=True),
    )


def _unplaced_refund(event: Json) -> str | None:
    """The id of the refunded capture, if it must be queried because the refund does not name its order.

    A refund with our own mark needs no query. The link `up` to the capture is in PayPal's samples, but no document
    promises it; without it the refund belongs to the payment that `custom_id` names.
    """
    resource = event["resource"]
    if not str(event["event_type"]).startswith((*REFUND_EVENTS, REVERSAL)) or _order_of(resource) is not None:
        return None
    own = read_mark(resource.get("invoice_id"))
    return None if own is not None and own.kind is OperationKind.REFUND else linked_id(resource, "/captures/")


def _nameless_refund(event: Json) -> str | None:
    """The id of a refund without an order, capture or mark of ours. Querying it gives the link."""
    refund = event["resource"]
    if not str(event["event_type"]).startswith((*REFUND_EVENTS, REVERSAL)) or _order_of(refund) is not None:
        return None
    is_placed = linked_id(refund, "/captures/") or any(read_mark(refund.get(name)) for name in MARKED)
    return None if is_placed else str(refund["id"])


def _refund_of(capture: Json, refund: Json) -> Json:
    """The refund, completed from its capture with the order's id and the mark that names our payment.

    Source: `capture-2` and `refund` of the Payments v2 reference; only the capture has `supplementary_data`.
    """
    marks = {"custom_id": capture["custom_id"]} if read_mark(capture.get("custom_id")) else {}
    return {**refund, **marks, "supplementary_data": {"related_ids": {"order_id": _order_of(capture)}}}


def _event_outcome(kind: OperationKind, resource: Json, order_id: str | None) -> Outcome | None:
    """The outcome, as read from an answer; None for an opening without its order's id, the reference."""
    money = Money(minor_of(resource["amount"]), resource["amount"]["currency_code"])
    request = _RESOURCE_REQUEST._replace(kind=kind, amount=money)
    match kind:
        case OperationKind.REFUND:
            return read_refund(resource, request)
        case OperationKind.CAPTURE:
            return read_capture(resource, request)
        case OperationKind.CHARGE if order_id is not None:
            return as_opening(read_capture(resource, request), {"id": order_id})
        case OperationKind.AUTHORIZE if order_id is not None:
            return read_authorization(resource, {"id": order_id}, request)
        case _:
            return None


_RESOURCE_REQUEST: Final = GatewayRequest(
    kind=OperationKind.CAPTURE,
    payment_id=UUID(int=0),
    operation_number=1,
    provider_key="",
    gateway=NAME,
    amount=Money(0, "USD"),
)
"""A template for the request that the status tables need; kind and amount come from the resource."""


def _order_of(resource: Json) -> str | None:
    """The order that a payment belongs to. Source: `supplementary_data` of the Payments v2 reference."""
    related = (resource.get("supplementary_data") or {}).get("related_ids") or {}
    order_id = related.get("order_id") or linked_id(resource, "/checkout/orders/")
    return str(order_id) if order_id else None


DISPUTE_STAGES: Final[Mapping[str, DisputeStage]] = {
    "RESOLVED_SELLER_FAVOUR": DisputeStage.WON,
    "CANCELED_BY_BUYER": DisputeStage.WON,
    "DENIED": DisputeStage.WON,
    "RESOLVED_BUYER_FAVOUR": DisputeStage.LOST,
    "ACCEPTED": DisputeStage.LOST,
}
"""By `dispute_outcome.outcome_code`. RESOLVED_WITH_PAYOUT stays open, because the message does not say who paid.

ACCEPTED and DENIED are unconfirmed: taken as our acceptance of the claim, and as PayPal's denial of it. Source:
https://developer.paypal.com/docs/api/customer-disputes/v1/.
"""


def _dispute_notice(notice: Notice, resource: Json) -> Notice:
    """Disputes name the transaction, not the order: the transaction's mark identifies our payment.

    The amount lost is what the payer got back, if PayPal reports it; it may be less than the disputed amount.
    """
    disputed = (resource.get("disputed_transactions") or [{}])[0]
    marks = read_mark(disputed.get("invoice_number")) or read_mark(disputed.get("custom"))
    transaction = disputed.get("seller_transaction_id")
    outcome = (resource.get("dispute_outcome") or {}) if resource.get("status") == "RESOLVED" else {}
    stage = DISPUTE_STAGES.get(str(outcome.get("outcome_code")), DisputeStage.OPENED)
    returned = outcome.get("amount_refunded") if stage is DisputeStage.LOST else None
    amount = returned or resource["dispute_amount"]
    dispute = Dispute(
        dispute_id=str(resource["dispute_id"]),
        stage=stage,
        amount_minor=minor_of(amount),
        currency=str(amount["currency_code"]),
        reason=code_of(resource["reason"]) if resource.get("reason") else None,
    )
    return notice._replace(
        payment_id=marks.payment_id if marks else None,
        gateway_payment_id=str(transaction) if marks is None and transaction else None,
        dispute=dispute,
    )
