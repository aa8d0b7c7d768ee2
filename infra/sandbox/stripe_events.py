"""The Stripe simulator's events: one for each change that Stripe reports, signed again at each attempt.

Sources: https://docs.stripe.com/api/events/types, https://docs.stripe.com/webhooks#verify-manually.
"""

import json
import time
from collections.abc import Mapping
from secrets import token_hex
from typing import Any, Final

import stripe

from infra.sandbox.webhooks import Outgoing, WebhookSender

API_VERSION: Final = "2026-10-28.endive"

INTENT_EVENTS: Final = {
    "requires_capture": "payment_intent.amount_capturable_updated",
    "succeeded": "payment_intent.succeeded",
    "canceled": "payment_intent.canceled",
    "requires_action": "payment_intent.requires_action",
    "processing": "payment_intent.processing",
    "requires_payment_method": "payment_intent.payment_failed",
}
WATCHED: Final = ("status", "amount_received", "amount_capturable")


class Events:
    """Sends the changes of objects to `url`, if it is set. The same state of an object is not sent twice in a row."""

    def __init__(self) -> None:
        self.url: str | None = None
        self.sender = WebhookSender(sign=self._signed)
        self._secret = ""
        self._known: dict[str, tuple[Any, ...]] = {}

    def configure(self, given: Mapping[str, Any]) -> None:
        """Set the address, the secret and the manners. Raises TypeError or ValueError if they are not valid."""
        manners = dict(given)
        self.url = manners.pop("url", self.url)
        self._secret = manners.pop("secret", self._secret)
        self.sender.behave(manners)

    def forget(self) -> None:
        """Forget which states were sent."""
        self._known.clear()

    def note(self, stored: Mapping[str, Any]) -> str | None:
        """Record the object's state as sent; return the type of its event, or None if there is no event to send."""
        seen = tuple(stored.get(name) for name in WATCHED)
        before, self._known[stored["id"]] = self._known.get(stored["id"]), seen
        return None if before == seen else _type_of(stored, is_new=before is None)

    def send(self, changed: Mapping[str, Any], key: str | None) -> None:
        """Send the event of a change, if it has one, in the background."""
        type_ = self.note(changed)
        if type_ is None or self.url is None:
            return
        body = self._body(type_, changed, key)
        self.sender.send(Outgoing(self.url, body.encode(), {"content-type": "application/json"}))

    def _signed(self, outgoing: Outgoing) -> Outgoing:
        body, now = outgoing.body.decode(), int(time.time())
        header = stripe.WebhookSignature.generate_signature_header(body, self._secret, timestamp=now)
        return outgoing._replace(headers={**outgoing.headers, "stripe-signature": header})

    def _body(self, type_: str, changed: Mapping[str, Any], key: str | None) -> str:
        amounts = [name for name in ("amount", "amount_received", "amount_capturable") if changed.get(name)]
        off_by = self.sender.manners.amount_off_by
        shown = {**changed, **{name: changed[name] + off_by for name in amounts}}
        event = {
            "id": f"evt_{token_hex(12)}",
            "object": "event",
            "api_version": API_VERSION,
            "created": int(time.time()),
            "livemode": False,
            "pending_webhooks": 1,
            "request": {"id": None, "idempotency_key": key},
            "type": type_,
            "data": {"object": shown},
        }
        return json.dumps(event, separators=(",", ":"))


def _type_of(stored: Mapping[str, Any], *, is_new: bool) -> str | None:
    match stored["object"]:
        case "payment_intent" if stored["status"] == "requires_payment_method" and not stored["last_payment_error"]:
            return None
        case "payment_intent":
            return INTENT_EVENTS.get(stored["status"])
        case "refund" if is_new:
            return "refund.created"
        case "refund":
            return "refund.failed" if stored["status"] == "failed" else "refund.updated"
        case "dispute":
            return "charge.dispute.created" if is_new else "charge.dispute.closed"
        case _:
            return None
