"""Stripe's webhooks: how they are verified, and what each type of event proves.

Promise: an event counts only with a valid signature over its raw bytes, made within the tolerance of our clock. Stripe
sends events in any order and more than once, which `domain.decide` handles; an event is evidence only about the one
operation whose marks its object carries.

Sources: https://docs.stripe.com/webhooks, https://docs.stripe.com/api/events/types.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any, Final
from uuid import UUID

import stripe
from pydantic import SecretStr

from domain.commands import OperationKind
from domain.errors import GatewayContractBroken
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
from domain.operations import Declined, DeclineReason, Expired, Outcome, Pending, RequiresAction, Succeeded
from infra.gateways.stripe_objects import (
    ACTION_WINDOW,
    LAST_CAPTURE,
    NAME,
    action_end,
    canceled,
    declined,
    expires_at,
    from_stripe_amount,
    redirect_url,
)

TOLERANCE_SECONDS: Final = 300

ANSWERS: Final[Mapping[Verdict, int]] = {
    Verdict.UNKNOWN_PAYMENT: 404,
    Verdict.FORGED: 400,
    Verdict.STALE: 400,
    Verdict.MALFORMED: 400,
    Verdict.TOO_LARGE: 413,
    Verdict.UNAVAILABLE: 503,
}
"""Any other verdict is 200. Stripe retries for three days whatever is not answered with a 2xx."""

DISPUTE_STAGES: Final[Mapping[str, DisputeStage]] = {
    "needs_response": DisputeStage.OPENED,
    "under_review": DisputeStage.OPENED,
    "won": DisputeStage.WON,
    "lost": DisputeStage.LOST,
}
"""Inquiries (`warning_…`) move no money. Source: https://docs.stripe.com/api/disputes/object."""


class StripeWebhooks:
    """Fits `domain.notices.WebhookReader`. Several secrets are valid while one is being rotated.

    `action_window` must be the gateway's, so that webhooks and answers agree on the end of a payer's time.
    """

    gateway = NAME

    def __init__(self, secrets: list[SecretStr], action_window: timedelta = ACTION_WINDOW) -> None:
        self._secrets = secrets
        self._action_window = action_window

    async def read(self, request: WebhookRequest) -> Notice:
        """Verify and read one event.

        Raises:
            WebhookRefused: FORGED, STALE or MALFORMED.
        """
        self._verify(request)
        try:
            event = json.loads(request.body)
            return _limited(_notice(event), event, self._action_window)
        except (ValueError, KeyError, TypeError, AttributeError, GatewayContractBroken) as error:
            raise WebhookRefused(Verdict.MALFORMED, f"signed, but unreadable ({type(error).__name__})") from error

    def answer(self, verdict: Verdict, request: WebhookRequest) -> WebhookAnswer:
        return WebhookAnswer(ANSWERS.get(verdict, 200))

    async def close(self) -> None:
        """Nothing to close."""

    def _verify(self, request: WebhookRequest) -> None:
        header = request.headers.get("stripe-signature", "")
        now = int(request.received_at.timestamp())
        if not any(_is_signed(request.body, header, secret.get_secret_value()) for secret in self._secrets):
            raise WebhookRefused(Verdict.FORGED, "no valid signature")
        # The library checks only the past, and by the wall clock.
        if abs(now - _timestamp(header)) > TOLERANCE_SECONDS:
            raise WebhookRefused(Verdict.STALE, "signed too long ago, or in the future")


def _is_signed(body: bytes, header: str, secret: str) -> bool:
    try:
        return bool(secret) and stripe.WebhookSignature.verify_header(body.decode(), header, secret, tolerance=None)
    except (stripe.SignatureVerificationError, TypeError, UnicodeDecodeError):
        return False


def _timestamp(header: str) -> int:
    """The `t` of a header with a valid signature, read as the library reads it."""
    return int(next(part.split("=")[1] for part in header.split(",") if part.startswith("t=")))


def _notice(event: Mapping[str, Any]) -> Notice:
    object_, type_ = event["data"]["object"], event["type"]
    notice = Notice(NAME, str(event["id"]), str(type_))
    # With Connect, `account` names another account: its objects are not ours, whatever marks they carry.
    read = None if event.get("account") else READERS.get(type_)
    return notice if read is None else _dated(read(notice, object_), event)


def _dated(notice: Notice, event: Mapping[str, Any]) -> Notice:
    """The notice with a time: a PaymentIntent does not show when it was captured, so the event's time is used."""
    external = notice.external
    if external is None or external.moved_at is not None:
        return notice
    return notice._replace(external=external._replace(moved_at=datetime.fromtimestamp(event["created"], UTC)))


def _limited(notice: Notice, event: Mapping[str, Any], window: timedelta) -> Notice:
    """The notice with the end of the payer's time, which Stripe does not report."""
    if not isinstance(notice.outcome, RequiresAction):
        return notice
    end = action_end(event["data"]["object"]["created"], window)
    return notice._replace(outcome=replace(notice.outcome, expires_at=end))


def _of_payment(notice: Notice, intent: Mapping[str, Any]) -> Notice:
    number, outcome = _evidence(notice.type, intent)
    payment_id, marked = _marks(intent)
    known = notice._replace(payment_id=payment_id, gateway_payment_id=intent["id"], currency=intent["currency"].upper())
    if payment_id is not None and _is_external_capture(notice.type, intent):
        return _external_capture(known, intent)
    captured = _minor(intent, "amount_received") if _is_closed_hold(notice.type, intent) else None
    return known._replace(
        operation_number=marked if number is None else number, outcome=outcome, captured_minor=captured
    )


def _is_external_capture(type_: str, intent: Mapping[str, Any]) -> bool:
    """Whether a hold of ours was captured without the mark of any capture of ours."""
    return _is_closed_hold(type_, intent) and not intent["metadata"].get(LAST_CAPTURE)


def _is_closed_hold(type_: str, intent: Mapping[str, Any]) -> bool:
    """Whether nothing more can be captured of a hold, so that `amount_received` is final."""
    return type_ == "payment_intent.succeeded" and intent["capture_method"] == "manual"


def _external_capture(notice: Notice, intent: Mapping[str, Any]) -> Notice:
    """Known by the charge's id, which no operation of ours has. Reported once the PaymentIntent is closed."""
    amount = _minor(intent, "amount_received")
    outcome = Succeeded(str(intent["latest_charge"] or intent["id"]), amount)
    return notice._replace(outcome=outcome, external=External(OperationKind.CAPTURE, amount, is_final=True))


def _evidence(type_: str, intent: Mapping[str, Any]) -> tuple[int | None, Outcome | None]:
    """The outcome that the object proves, and the operation's number if it is not the one that created the object.

    Read from plain JSON: building the SDK's objects would be half of the cost of a webhook.
    """
    reference, status = intent["id"], intent["status"]
    match type_.removeprefix("payment_intent."):
        case "amount_capturable_updated" if status == "requires_capture":
            held = _minor(intent, "amount_capturable", "amount_received")
            return None, Succeeded(reference, held, expires_at(_sdk(intent)))
        case "succeeded" if intent["capture_method"] == "manual":
            return _capture(intent)
        case "succeeded":
            return None, Succeeded(reference, _minor(intent, "amount_received"))
        case "payment_failed" if intent["last_payment_error"] is not None:
            return None, declined(_sdk(intent).last_payment_error, reference)
        case "canceled" if intent["amount_received"] == 0:
            return None, canceled(reference, intent["cancellation_reason"])
        case "requires_action" if intent["next_action"] is not None:
            action = _sdk(intent).next_action
            return None, RequiresAction(reference, action.type, redirect_url(action))
        case "processing":
            return None, Pending(reference)
        case _:
            return None, None


def _capture(intent: Mapping[str, Any]) -> tuple[int | None, Outcome | None]:
    """The capture whose mark the object carries; its amount is what was received in all, if no capture was before it.

    The mark of our last capture stays when somebody else captures the rest; our books tell the two apart by the
    notice's `captured_minor`.
    """
    metadata = intent["metadata"]
    mark = metadata.get(LAST_CAPTURE)
    if not mark:
        return None, None  # somebody else's capture
    is_first = int(mark) == int(metadata.get("operation_number", 0)) + 1
    return int(mark), Succeeded(intent["id"], _minor(intent, "amount_received") if is_first else None)


def _sdk(intent: Mapping[str, Any]) -> Any:
    return stripe.PaymentIntent.construct_from(dict(intent), None)


def _of_expired_charge(notice: Notice, given: Mapping[str, Any]) -> Notice:
    payment_id, number = _marks(given)
    reference = given["payment_intent"]
    outcome = Expired(reference, "charge_expired")
    return notice._replace(
        payment_id=payment_id, operation_number=number, gateway_payment_id=reference, outcome=outcome
    )


def _of_refund(notice: Notice, given: Mapping[str, Any]) -> Notice:
    payment_id, number = _marks(given)
    currency = given["currency"].upper()
    known = notice._replace(payment_id=payment_id, gateway_payment_id=given["payment_intent"], currency=currency)
    if number is not None:
        return known._replace(operation_number=number, outcome=_refund_outcome(given, currency))
    return known if _is_release(given) else _external_refund(known, given, currency)


def _is_release(given: Mapping[str, Any]) -> bool:
    """Whether a refund returned no captured money: Stripe also calls it a refund when a hold is released.

    Such a refund has no balance transaction. For a hold that lapsed, Stripe documents a `reason` of its own; for the
    rest that a partial capture releases, this is a hypothesis.
    """
    return given.get("reason") == "expired_uncaptured_charge" or not given.get("balance_transaction")


def _external_refund(notice: Notice, given: Mapping[str, Any], currency: str) -> Notice:
    moved_at = datetime.fromtimestamp(given["created"], UTC)
    external = External(OperationKind.REFUND, from_stripe_amount(given["amount"], currency), moved_at)
    return notice._replace(outcome=_refund_outcome(given, currency), external=external)


def _refund_outcome(given: Mapping[str, Any], currency: str) -> Outcome:
    match given["status"]:
        case "succeeded":
            return Succeeded(given["id"], from_stripe_amount(given["amount"], currency))
        case "failed" | "canceled":
            return Declined(DeclineReason.REFUND_FAILED, given.get("failure_reason"), given["id"])
        case _:
            return Pending(given["id"])


def _of_dispute(notice: Notice, given: Mapping[str, Any]) -> Notice:
    stage, currency = DISPUTE_STAGES.get(given["status"]), given["currency"].upper()
    if stage is None:
        return notice
    amount = from_stripe_amount(given["amount"], currency)
    dispute = Dispute(given["id"], stage, amount, currency, given.get("reason"))
    return notice._replace(gateway_payment_id=given["payment_intent"], dispute=dispute)


READERS: Final[Mapping[str, Callable[[Notice, Mapping[str, Any]], Notice]]] = {
    **dict.fromkeys(
        (
            "payment_intent.amount_capturable_updated",
            "payment_intent.succeeded",
            "payment_intent.payment_failed",
            "payment_intent.canceled",
            "payment_intent.requires_action",
            "payment_intent.processing",
        ),
        _of_payment,
    ),
    "charge.expired": _of_expired_charge,
    **dict.fromkeys(("refund.created", "refund.updated", "refund.failed", "charge.refund.updated"), _of_refund),
    **dict.fromkeys(("charge.dispute.created", "charge.dispute.updated", "charge.dispute.closed"), _of_dispute),
}
"""The event types that we act on. All others are stored and ignored."""


def _minor(intent: Mapping[str, Any], *names: str) -> int:
    return from_stripe_amount(sum(int(intent[name]) for name in names), intent["currency"].upper())


def _marks(given: Mapping[str, Any]) -> tuple[UUID | None, int | None]:
    """Our payment and operation, as `stripe_objects.marks_of` wrote them; None if the object is not ours."""
    metadata = given.get("metadata") or {}
    try:
        return UUID(metadata["payment_id"]), int(metadata["operation_number"])
    except (KeyError, ValueError):
        return None, None
