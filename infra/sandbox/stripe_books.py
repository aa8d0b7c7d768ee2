"""The books of the Stripe simulator: PaymentIntents, charges and refunds, and the rules that conserve money.

Objects are stored in the JSON form of Stripe's answers. No request can capture more than the hold or refund more than
was captured. Sources: https://docs.stripe.com/payments/paymentintents/lifecycle,
https://docs.stripe.com/payments/multicapture, https://docs.stripe.com/refunds.
"""

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from secrets import token_hex
from typing import Any, Final

from infra.sandbox import stripe_cards, stripe_forms
from infra.sandbox.stripe_errors import StripeError, invalid, missing
from infra.sandbox.stripe_forms import Params

StripeObject = dict[str, Any]

_CREATE_PARAMS = (
    "amount currency capture_method confirm payment_method allowed_payment_method_types automatic_payment_methods"
    " return_url metadata customer description off_session payment_method_options error_on_requires_action"
    " receipt_email statement_descriptor_suffix setup_future_usage expand"
)
CREATE_PARAMS: Final = frozenset(_CREATE_PARAMS.split())
CONFIRM_PARAMS: Final = frozenset(("payment_method", "return_url", "off_session", "error_on_requires_action", "expand"))
CAPTURE_PARAMS: Final = frozenset(("amount_to_capture", "final_capture", "metadata", "expand"))
CANCEL_PARAMS: Final = frozenset(("cancellation_reason", "expand"))
REFUND_PARAMS: Final = frozenset(("payment_intent", "charge", "amount", "reason", "metadata", "expand"))

_CURRENCIES = (
    "aed aud bgn bhd bif brl cad chf clp cny czk djf dkk eur gbp gnf hkd huf idr ils inr isk jod jpy kmf krw kwd mga"
    " mxn myr nok nzd omr php pln pyg ron rwf sar sek sgd thb tnd try twd uah ugx usd vnd vuv xaf xof xpf zar"
)
CURRENCIES: Final = frozenset(_CURRENCIES.split())
MULTIPLES: Final = {**dict.fromkeys(("isk", "ugx"), 100), **dict.fromkeys(("bhd", "jod", "kwd", "omr", "tnd"), 10)}
MINIMUM: Final = {"usd": 50, "eur": 50, "gbp": 30, "jpy": 50, "huf": 17500, "czk": 1500, "sek": 300, "nok": 300}
CANCELABLE: Final = frozenset(
    ("requires_payment_method", "requires_capture", "requires_confirmation", "requires_action", "processing")
)
HOLD_SECONDS: Final = 7 * 24 * 3600
GONE: Final = frozenset(("failed", "canceled"))


class Books:
    """All objects of the simulator. `touched` collects changed objects for the journal."""

    def __init__(self) -> None:
        self.payment_intents: dict[str, StripeObject] = {}
        self.charges: dict[str, StripeObject] = {}
        self.refunds: dict[str, StripeObject] = {}
        self.disputes: dict[str, StripeObject] = {}
        self.touched: dict[str, StripeObject] = {}
        self.refund_settles_after_seconds = 3.0
        self._refunds_of: dict[str, dict[str, StripeObject]] = defaultdict(dict)
        self._intents_of: dict[str, dict[str, StripeObject]] = defaultdict(dict)

    def keep(self, stored: StripeObject) -> None:
        """Record a new or changed object."""
        self.table(stored["object"])[stored["id"]] = stored
        self._index(stored)
        self.touched[stored["id"]] = stored

    def table(self, kind: str) -> dict[str, StripeObject]:
        """All objects of one kind (the value of `object`), by id."""
        return {
            "payment_intent": self.payment_intents,
            "charge": self.charges,
            "refund": self.refunds,
            "dispute": self.disputes,
        }[kind]

    def _index(self, stored: StripeObject) -> None:
        if stored["object"] == "refund":
            self._refunds_of[stored["payment_intent"]][stored["id"]] = stored
        if stored["object"] == "payment_intent" and "payment_id" in stored["metadata"]:
            self._intents_of[stored["metadata"]["payment_id"]][stored["id"]] = stored

    # --- PaymentIntents -------------------------------------------------------------------------------------------

    def create(self, params: Params) -> StripeObject:
        intent = _new_intent(params)
        is_confirmed = stripe_forms.boolean(params, "confirm", default=False)
        if is_confirmed and intent["payment_method"] is None:
            raise invalid("You cannot confirm this PaymentIntent: it's missing a payment method.", param="confirm")
        self.keep(intent)
        return self._attempt(intent, params) if is_confirmed else intent

    def confirm(self, reference: str, params: Params) -> StripeObject:
        stripe_forms.allow(params, CONFIRM_PARAMS)
        intent = self.payment_intent(reference)
        if intent["status"] not in ("requires_payment_method", "requires_confirmation"):
            raise _unexpected_state(intent, "confirmed")
        intent["payment_method"] = _payment_method(params) or intent["payment_method"]
        if intent["payment_method"] is None:
            raise _unexpected_state(intent, "confirmed")
        return self._attempt(intent, params)

    def _attempt(self, intent: StripeObject, params: Params) -> StripeObject:
        card = _card_of(intent)
        intent["last_payment_error"] = None
        if not card.requires_action:
            return self._charge(intent)
        if stripe_forms.boolean(params, "off_session", default=False):
            return self._decline(intent, "authentication_required", "authentication_required")
        intent.update(status="requires_action", next_action=_next_action(intent, params.get("return_url")))
        self.keep(intent)
        return intent

    def authenticate(self, reference: str, *, is_successful: bool, declined_as: str | None = None) -> StripeObject:
        """Apply the result of 3-D Secure. A decline is recorded in the object, not raised."""
        intent = self.payment_intent(reference)
        if intent["status"] != "requires_action":
            raise _unexpected_state(intent, "authenticated")
        intent["next_action"] = None
        try:
            if is_successful and declined_as is not None:
                self._decline(intent, "card_declined", declined_as)
            if is_successful:
                return self._charge(intent)
            self._decline(intent, "payment_intent_authentication_failure", None)
        except StripeError:
            return intent
        return intent

    def _charge(self, intent: StripeObject) -> StripeObject:
        card = _card_of(intent)
        if card.declined_as is not None:
            return self._decline(intent, *card.declined_as)
        is_held = intent["capture_method"] == "manual"
        charge = _new_charge(intent, card, is_held=is_held)
        intent.update(
            status="requires_capture" if is_held else "succeeded",
            amount_capturable=intent["amount"] if is_held else 0,
            amount_received=0 if is_held else intent["amount"],
            latest_charge=charge["id"],
        )
        self.keep(charge)
        self.keep(intent)
        return intent

    def decline(self, params: Params, decline_code: str) -> StripeObject:
        """Create a PaymentIntent that the issuer declines, whatever the card."""
        intent = _new_intent(params)
        self.keep(intent)
        return self._decline(intent, "card_declined", decline_code)

    def _decline(self, intent: StripeObject, code: str, decline_code: str | None) -> StripeObject:
        charge = _new_charge(intent, stripe_cards.Card(), is_held=True)
        charge.update(status="failed", paid=False, failure_code=code)
        self.keep(charge)
        details = {"code": code, "decline_code": decline_code, "charge": charge["id"]}
        message = "Your card was declined."
        error = {"type": "card_error", "message": message, **{k: v for k, v in details.items() if v is not None}}
        intent.update(
            status="requires_payment_method",
            payment_method=None,
            latest_charge=charge["id"],
            last_payment_error=error,
            next_action=None,
        )
        self.keep(intent)
        raise StripeError(402, message, type="card_error", payment_intent=intent, **details)

    def capture(self, reference: str, params: Params) -> StripeObject:
        stripe_forms.allow(params, CAPTURE_PARAMS)
        intent = self.payment_intent(reference)
        marks = stripe_forms.metadata(params)
        is_final = stripe_forms.boolean(params, "final_capture", default=True) if "final_capture" in params else None
        amount = stripe_forms.integer(params, "amount_to_capture", minimum=0, default=intent["amount_capturable"])
        if intent["status"] != "requires_capture":
            raise _unexpected_state(intent, "captured")
        charge = self.charges[intent["latest_charge"]]
        _check_capture(intent, charge, amount, is_final)
        left = intent["amount_capturable"] - amount
        is_closed = is_final is not False or left == 0
        intent["metadata"].update(marks)
        intent["amount_received"] += amount
        intent.update(
            amount_capturable=0 if is_closed else left,
            status="succeeded" if is_closed else "requires_capture",
        )
        charge.update(amount_captured=intent["amount_received"], captured=is_closed)
        self.keep(charge)
        self.keep(intent)
        return intent

    def cancel(self, reference: str, params: Params) -> StripeObject:
        stripe_forms.allow(params, CANCEL_PARAMS)
        reasons = ("duplicate", "fraudulent", "requested_by_customer", "abandoned")
        reason = stripe_forms.choice(params, "cancellation_reason", reasons)
        intent = self.payment_intent(reference)
        if intent["status"] not in CANCELABLE or intent["amount_received"]:
            raise _unexpected_state(intent, "canceled")
        return self._release(intent, reason)

    def expire(self, reference: str) -> StripeObject:
        """Expire a hold: it is canceled, or closed if a part was captured."""
        intent = self.payment_intent(reference)
        if intent["status"] != "requires_capture":
            raise _unexpected_state(intent, "expired")
        return self._release(intent, "expired")

    def age(self, reference: str, seconds: int) -> StripeObject:
        """Move its creation back by `seconds`, so that its payer's time passes. Stripe itself takes no action then."""
        intent = self.payment_intent(reference)
        intent["created"] -= seconds
        self.keep(intent)
        return intent

    def _release(self, intent: StripeObject, reason: str | None) -> StripeObject:
        if intent["amount_received"]:
            intent.update(status="succeeded", amount_capturable=0)
        else:
            intent.update(status="canceled", amount_capturable=0, cancellation_reason=reason, canceled_at=_now())
            intent["next_action"] = None
        self.keep(intent)
        return intent

    def payment_intent(self, reference: str) -> StripeObject:
        intent = self.payment_intents.get(reference)
        if intent is None:
            raise missing("payment_intent", reference, param="intent")
        return intent

    def intents_of(self, payment_id: str) -> list[StripeObject]:
        """The PaymentIntents with this payment id in their metadata, oldest first."""
        return list(self._intents_of.get(payment_id, {}).values())

    # --- charges and refunds --------------------------------------------------------------------------------------

    def charge(self, reference: str) -> StripeObject:
        charge = self.charges.get(reference)
        if charge is None:
            raise missing("charge", reference, param="charge")
        return charge

    def refund(self, params: Params) -> StripeObject:
        stripe_forms.allow(params, REFUND_PARAMS)
        reason = stripe_forms.choice(params, "reason", ("duplicate", "fraudulent", "requested_by_customer"))
        marks = stripe_forms.metadata(params)
        intent = self._refunded_intent(params)
        left = intent["amount_received"] - self._refunded(intent["id"])
        if left <= 0:
            if intent["amount_received"] == 0:
                raise StripeError(400, "This PaymentIntent does not have a captured charge to refund.")
            raise StripeError(400, "Charge has already been refunded.", code="charge_already_refunded")
        amount = stripe_forms.integer(params, "amount", default=left)
        if amount > left:
            message = f"Refund amount ({amount}) is greater than unrefunded amount on charge ({left})"
            raise StripeError(400, message, param="amount")
        refund = self._new_refund(intent, amount, reason, marks)
        self.keep(refund)
        self._note_refunded(intent)
        return refund

    def find_refund(self, reference: str) -> StripeObject:
        refund = self.refunds.get(reference)
        if refund is None:
            raise missing("refund", reference, param="refund")
        self._settle_in_time(refund)
        return refund

    def refunds_of(self, payment_intent: str) -> list[StripeObject]:
        refunds = list(self._refunds_of.get(payment_intent, {}).values())
        for refund in refunds:
            self._settle_in_time(refund)
        return refunds

    def settle_refund(self, reference: str, status: str) -> StripeObject:
        """Give a refund its final status now."""
        refund = self.refunds.get(reference)
        if refund is None:
            raise missing("refund", reference, param="refund")
        refund["status"] = status
        if status == "failed":
            refund["failure_reason"] = "expired_or_canceled_card"
        self.keep(refund)
        self._note_refunded(self.payment_intents[refund["payment_intent"]])
        return refund

    def _settle_in_time(self, refund: StripeObject) -> None:
        ends_as = _card_of(self.payment_intents[refund["payment_intent"]]).refund_ends_as
        is_due = time.time() >= refund["created"] + self.refund_settles_after_seconds
        if is_due and ends_as not in (None, refund["status"]) and refund["status"] not in GONE:
            self.settle_refund(refund["id"], str(ends_as))

    def _refunded_intent(self, params: Params) -> StripeObject:
        reference = params.get("payment_intent")
        if reference is None and "charge" in params:
            reference = self.charge(params["charge"])["payment_intent"]
        if reference is None:
            raise invalid("One of the following params should be provided: payment_intent or charge.")
        if reference not in self.payment_intents:
            raise missing("payment_intent", reference, param="payment_intent")
        return self.payment_intents[reference]

    def _new_refund(self, intent: StripeObject, amount: int, reason: str | None, marks: dict[str, str]) -> StripeObject:
        return {
            "id": f"re_{token_hex(12)}",
            "object": "refund",
            "amount": amount,
            "balance_transaction": f"txn_{token_hex(12)}",
            "charge": intent["latest_charge"],
            "created": _now(),
            "currency": intent["currency"],
            "metadata": marks,
            "payment_intent": intent["id"],
            "reason": reason,
            "status": _card_of(intent).refund_starts_as,
        }

    def _refunded(self, intent_id: str) -> int:
        return sum(
            each["amount"] for each in self._refunds_of.get(intent_id, {}).values() if each["status"] not in GONE
        )

    def _note_refunded(self, intent: StripeObject) -> None:
        charge, refunded = self.charges[intent["latest_charge"]], self._refunded(intent["id"])
        charge.update(amount_refunded=refunded, refunded=charge["captured"] and refunded == intent["amount_received"])
        self.keep(charge)

    # --- disputes -------------------------------------------------------------------------------------------------

    def dispute(self, reference: str, amount: int | None) -> StripeObject:
        """The payer's bank takes back `amount`, or all that is not refunded."""
        intent = self.payment_intent(reference)
        dispute = {
            "id": f"dp_{token_hex(12)}",
            "object": "dispute",
            "amount": amount or intent["amount_received"] - self._refunded(reference),
            "charge": intent["latest_charge"],
            "created": _now(),
            "currency": intent["currency"],
            "metadata": {},
            "payment_intent": reference,
            "reason": "product_not_received",
            "status": "needs_response",
        }
        self.keep(dispute)
        return dispute

    def close_dispute(self, reference: str, status: str) -> StripeObject:
        """`won` returns the money to the merchant, `lost` does not."""
        dispute = self.disputes.get(reference)
        if dispute is None:
            raise missing("dispute", reference, param="dispute")
        dispute["status"] = status
        self.keep(dispute)
        return dispute

    # --- sums -----------------------------------------------------------------------------------------------------

    def totals(self) -> dict[str, dict[str, int]]:
        """Per currency, in Stripe's units: amounts captured, refunded, held and disputed, and counts."""
        sums: dict[str, Counter[str]] = defaultdict(Counter)
        for intent in self.payment_intents.values():
            of = sums[intent["currency"]]
            of["payment_intents"] += 1
            of["captured"] += intent["amount_received"]
            of["authorized_open"] += intent["amount_capturable"]
            of[f"count_{intent['status']}"] += 1
        for refund in self.refunds.values():
            if refund["status"] not in GONE:
                sums[refund["currency"]]["refunded"] += refund["amount"]
                sums[refund["currency"]]["count_refunds"] += 1
        for dispute in self.disputes.values():
            if dispute["status"] != "won":
                sums[dispute["currency"]]["disputed"] += dispute["amount"]
        names = ("payment_intents", "captured", "authorized_open", "refunded", "count_refunds", "disputed")
        empty = dict.fromkeys(names, 0)
        return {currency: {**empty, **counts} for currency, counts in sorted(sums.items())}

    def details(self, intents: Iterable[StripeObject]) -> list[dict[str, Any]]:
        """The details of each PaymentIntent, in the order given."""
        return [self._detail(intent) for intent in intents]

    def _detail(self, intent: StripeObject) -> dict[str, Any]:
        names = ("id", "status", "currency", "amount", "amount_capturable", "amount_received", "metadata")
        refunds = [{"id": r["id"], "amount": r["amount"], "status": r["status"]} for r in self.refunds_of(intent["id"])]
        return {
            **{name: intent[name] for name in names},
            "refunded": self._refunded(intent["id"]),
            "refunds": refunds,
        }

    def executed_charges(self) -> dict[str, int]:
        """How many authorizations and charges succeeded, per `metadata.payment_id`."""
        return dict(
            Counter(
                charge["metadata"]["payment_id"]
                for charge in self.charges.values()
                if charge["status"] == "succeeded" and "payment_id" in charge["metadata"]
            )
        )


def newest(objects: Iterable[StripeObject], is_wanted: Callable[[StripeObject], bool]) -> Iterable[StripeObject]:
    """The wanted objects, newest first, as Stripe lists them."""
    return (each for each in reversed(list(objects)) if is_wanted(each))


def _now() -> int:
    return int(time.time())


def _payment_method(params: Params) -> str | None:
    name = params.get("payment_method")
    if name is not None and stripe_cards.find(name) is None:
        raise missing("PaymentMethod", name, param="payment_method", status=400)
    return name


def _card_of(intent: StripeObject) -> stripe_cards.Card:
    return stripe_cards.find(intent["payment_method"] or "") or stripe_cards.Card()


def _new_intent(params: Params) -> StripeObject:
    if "payment_method_types" in params:  # gone since 2026-09-30.endive
        message = "payment_method_types is no longer supported; use allowed_payment_method_types."
        raise invalid(message, param="payment_method_types", code="payment_method_types_no_longer_supported")
    stripe_forms.allow(params, CREATE_PARAMS)
    currency, amount = _currency(params), stripe_forms.integer(params, "amount")
    _check_amount(amount, currency)
    method = stripe_forms.choice(
        params, "capture_method", ("automatic", "automatic_async", "manual"), default="automatic_async"
    )
    payment_method, reference = _payment_method(params), f"pi_{token_hex(12)}"
    return {
        "id": reference,
        "object": "payment_intent",
        "amount": amount,
        "amount_capturable": 0,
        "amount_received": 0,
        "canceled_at": None,
        "cancellation_reason": None,
        "capture_method": method,
        "client_secret": f"{reference}_secret_{token_hex(12)}",
        "confirmation_method": "automatic",
        "created": _now(),
        "currency": currency,
        "customer": params.get("customer"),
        "description": params.get("description"),
        "last_payment_error": None,
        "latest_charge": None,
        "livemode": False,
        "metadata": stripe_forms.metadata(params),
        "next_action": None,
        "payment_method": payment_method,
        "payment_method_options": params.get("payment_method_options", {}),
        "payment_method_types": ["card"],
        "status": "requires_confirmation" if payment_method else "requires_payment_method",
    }


def _currency(params: Params) -> str:
    currency = str(params.get("currency", "")).lower()
    if currency not in CURRENCIES:
        raise invalid(f"Invalid currency: {currency}.", param="currency")
    return currency


def _check_amount(amount: int, currency: str) -> None:
    if amount > 99_999_999_999:
        raise invalid("Amount must be no more than 99999999999", param="amount", code="amount_too_large")
    if amount < MINIMUM.get(currency, 1):
        raise invalid("Amount must convert to at least 50 cents.", param="amount", code="amount_too_small")
    if amount % MULTIPLES.get(currency, 1):
        raise invalid(f"Amounts in {currency} must be multiples of {MULTIPLES[currency]}", param="amount")


def _new_charge(intent: StripeObject, card: stripe_cards.Card, *, is_held: bool) -> StripeObject:
    options = intent["payment_method_options"].get("card", {})
    wants_several = isinstance(options, dict) and options.get("request_multicapture") == "if_available"
    details: StripeObject = {
        "brand": "visa",
        "last4": "4242",
        "multicapture": {"status": card.multicapture if wants_several else "unavailable"},
    }
    if is_held:
        details["capture_before"] = intent["created"] + HOLD_SECONDS
    return {
        "id": f"ch_{token_hex(12)}",
        "object": "charge",
        "amount": intent["amount"],
        "amount_captured": 0 if is_held else intent["amount"],
        "amount_refunded": 0,
        "captured": not is_held,
        "created": _now(),
        "currency": intent["currency"],
        "disputed": False,
        "failure_code": None,
        "livemode": False,
        "metadata": dict(intent["metadata"]),
        "paid": True,
        "payment_intent": intent["id"],
        "payment_method": intent["payment_method"],
        "payment_method_details": {"type": "card", "card": details},
        "refunded": False,
        "status": "succeeded",
    }


def _check_capture(intent: StripeObject, charge: StripeObject, amount: int, is_final: bool | None) -> None:
    if amount > intent["amount_capturable"]:
        message = "The payment could not be captured because the requested capture amount is greater than the hold."
        raise StripeError(400, message, code="amount_too_large", param="amount_to_capture", payment_intent=intent)
    if amount % MULTIPLES.get(intent["currency"], 1):
        raise invalid(f"Amounts in {intent['currency']} must be whole", param="amount_to_capture")
    if amount == 0 and not (is_final is not False and intent["amount_received"]):
        message = "This value must be greater than or equal to 1."
        raise StripeError(400, message, code="parameter_invalid_integer", param="amount", payment_intent=intent)
    has_several = charge["payment_method_details"]["card"]["multicapture"]["status"] == "available"
    if not has_several and is_final is not None:
        raise StripeError(400, "final_capture needs multicapture, which is not available.", param="final_capture")


def _next_action(intent: StripeObject, return_url: str | None) -> StripeObject:
    if return_url is None:
        return {"type": "use_stripe_sdk", "use_stripe_sdk": {}}
    url = f"/_sandbox/payment_intents/{intent['id']}/authenticate"
    return {"type": "redirect_to_url", "redirect_to_url": {"url": url, "return_url": return_url}}


def _unexpected_state(intent: StripeObject, verb: str) -> StripeError:
    message = f"This PaymentIntent could not be {verb} because it has a status of {intent['status']}."
    return StripeError(400, message, code="payment_intent_unexpected_state", payment_intent=intent)
