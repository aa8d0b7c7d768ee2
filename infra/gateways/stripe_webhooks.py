"""Stripe's webhooks: the signature, and what each type of event is evidence of.

Promise: an event counts only with a valid signature over its raw bytes, not older than the tolerance and not from the
future. Stripe sends events in any order and more than once, and `domain.decide` copes: what is read here is never more
than what the object in the event says of the one operation whose marks it carries.

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
"""Any other is 200: Stripe sends again, for three days, what is not answered with a 2xx."""

DISPUTE_STAGES: Final[Mapping[str, DisputeStage]] = {
    "needs_response": DisputeStage.OPENED,
    "under_review": DisputeStage.OPENED,
    "won": DisputeStage.WON,
    "lost": DisputeStage.LOST,
}
"""Inquiries (`warning_…`) move no money. Source: https://docs.stripe.com/api/disputes/object."""


class StripeWebhooks:
    """Fits `domain.notices.WebhookReader`. Several secrets are valid while one is being rolled.

    `action_window` is the gateway's own: what a webhook tells of a payer's time, an answer tells, too.
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
        """Nothing is held open."""

    def _verify(self, request: WebhookRequest) -> None:
        header = request.headers.get("stripe-signature", "")
        now = int(request.received_at.timestamp())
        if not any(_is_signed(request.body, header, secret.get_secret_value()) for secret in self._secrets):
            raise WebhookRefused(Verdict.FORGED, "no valid signature")
        # The library knows a tolerance for the past only, and asks the wall clock.
        if abs(now - _timestamp(header)) > TOLERANCE_SECONDS:
            raise WebhookRefused(Verdict.STALE, "signed too long ago, or in the future")


def _is_signed(body: bytes, header: str, secret: str) -> bool:
    try:
        return bool(secret) and stripe.WebhookSignature.verify_header(body.decode(), header, secret, tolerance=None)
    except (stripe.SignatureVerificationError, TypeError, UnicodeDecodeError):
        return False


def _timestamp(header: str) -> int:
    """The `t` of a header whose signature was valid, read as the library reads it."""
    return int(next(part.split("=")[1] for part in header.split(",") if part.startswith("t=")))


def _notice(event: Mapping[str, Any]) -> Notice:
    object_, type_ = event["data"]["object"], event["type"]
    notice = Notice(NAME, str(event["id"]), str(type_))
    # With Connect, of another account's object, which is none of ours whatever marks it carries.
    read = None if event.get("account") else READERS.get(type_)
    return notice if read is None else _dated(read(notice, object_), event)


def _dated(notice: Notice, event: Mapping[str, Any]) -> Notice:
    """A capture has no time of its own in the object that tells of it; the event has one."""
    external = notice.external
    if external is None or external.moved_at is not None:
        return notice
    return notice._replace(external=external._replace(moved_at=datetime.fromtimestamp(event["created"], UTC)))


def _limited(notice: Notice, event: Mapping[str, Any], window: timedelta) -> Notice:
    """With the end of the payer's time, which Stripe does not tell."""
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
    """Whether a hold of ours was captured, and none of our own captures left its mark on it."""
    return _is_closed_hold(type_, intent) and not intent["metadata"].get(LAST_CAPTURE)


def _is_closed_hold(type_: str, intent: Mapping[str, Any]) -> bool:
    """Whether nothing can be captured of it any more: what was received is all that ever will be."""
    return type_ == "payment_intent.succeeded" and intent["capture_method"] == "manual"


def _external_capture(notice: Notice, intent: Mapping[str, Any]) -> Notice:
    """By the charge's id, which no operation of ours is known by. It is told when it has closed the PaymentIntent."""
    amount = _minor(intent, "amount_received")
    outcome = Succeeded(str(intent["latest_charge"] or intent["id"]), amount)
    return notice._replace(outcome=outcome, external=External(OperationKind.CAPTURE, amount, is_final=True))


def _evidence(type_: str, intent: Mapping[str, Any]) -> tuple[int | None, Outcome | None]:
    """What the object says, and of which operation if it is not the one that created it.

    Read from plain JSON: to build the SDK's objects of it would cost half of what a webhook costs in all.
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
    """What was received in all is what the capture took, if none can have been before it.

    The mark is that of our last capture, and stays when somebody captures the rest: who took what, `captured_minor`
    lets our books tell.
    """
    metadata = intent["metadata"]
    mark = metadata.get(LAST_CAPTURE)
    if not mark:
        return None, None  # Somebody else's.
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
    """Whether nothing was returned that had been taken: Stripe calls it a refund, too, when a hold is let go.

    It then has no entry on our balance. Hypothesis for what a partial capture leaves; of a hold that has lapsed it is
    documented, by a reason of its own.
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
"""What says something that we act upon. All other types are stored, and ignored."""


def _minor(intent: Mapping[str, Any], *names: str) -> int:
    return from_stripe_amount(sum(int(intent[name]) for name in names), intent["currency"].upper())


def _marks(given: Mapping[str, Any]) -> tuple[UUID | None, int | None]:
    """Our payment and operation, as `stripe_objects.marks_of` wrote them; None where the object is not ours."""
    metadata = given.get("metadata") or {}
    try:
        return UUID(metadata["payment_id"]), int(metadata["operation_number"])
    except (KeyError, ValueError):
        return None, None
