"""The books of the PayPal simulator: orders, authorizations, captures, refunds, disputes, and what conserves money.

Objects are stored in the JSON form of PayPal's answers, amounts as its decimal strings. No request can capture more
than the hold or refund more than a capture. Sources:
https://developer.paypal.com/docs/api/orders/v2/, https://developer.paypal.com/docs/api/payments/v2/.

The name of a payer's wallet, given as `vault_id` or when an order is approved, decides what happens:

`declined-<ISSUE>`   422 with that issue, such as `declined-INSTRUMENT_DECLINED`
`refused`            a 201 whose payment is DECLINED or DENIED
`pending`            the payment is PENDING until it is settled
`pending-refund`     pays, but its refunds are PENDING until they are settled
`asks`               vaulted, but needs the payer's consent nevertheless
`unknown`            a vault id that cannot be used (any more)
anything else        pays; those in `faults.FIRST_ATTEMPT` first fail once, each in its way
"""

from collections import Counter, defaultdict
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from decimal import Decimal, InvalidOperation
from secrets import choice
from typing import Any, Final, NamedTuple

from domain.money import MINOR_UNITS

PayPalObject = dict[str, Any]

HOLD: Final = timedelta(days=29)
CURRENCIES: Final = frozenset(
    "AUD BRL CAD CHF CNY CZK DKK EUR GBP HKD HUF ILS JPY MXN MYR NOK NZD PHP PLN SEK SGD THB TWD USD".split()  # noqa: SIM905
)
WHOLE: Final = frozenset(("HUF", "JPY", "TWD"))
DEAD: Final = frozenset(("DECLINED", "FAILED", "DENIED", "CANCELLED"))
KINDS: Final = ("orders", "authorizations", "captures", "refunds", "disputes")
_ALPHABET: Final = "ABCDEFGHJKLMNPRSTUVWXY0123456789"


MESSAGES: Final = {
    "RESULTSET_TOO_LARGE": (
        "Result set size is greater than the maximum limit. Change the filter criteria and try again."
    ),
    "INVALID_REQUEST": "Request is not well-formed, syntactically incorrect, or violates schema.",
    "AUTHENTICATION_FAILURE": (
        "Authentication failed due to missing authorization header, or invalid authentication credentials."
    ),
    "RESOURCE_NOT_FOUND": "The specified resource does not exist.",
    "RESOURCE_CONFLICT": "The server has detected a conflict while processing this request.",
    "UNPROCESSABLE_ENTITY": (
        "The requested action could not be performed, semantically incorrect, or failed business validation."
    ),
    "RATE_LIMIT_REACHED": "Too many requests. Blocked due to rate limiting.",
    "INTERNAL_SERVER_ERROR": "An internal server error occurred.",
    "SERVICE_UNAVAILABLE": "Service Unavailable.",
}
"""PayPal's message for each kind of error."""


class Refusal(Exception):
    """An error answer in PayPal's form. `is_remembered` is True if it is the result of an execution."""

    def __init__(self, status: int, name: str, issue: str | None = None, *, is_remembered: bool = False) -> None:
        super().__init__(issue or name)
        self.status = status
        self.is_remembered = is_remembered
        self.body: PayPalObject = {
            "name": name,
            "message": MESSAGES[name],
            "debug_id": new_id(13).lower(),
            "details": [{"issue": issue, "description": f"See {issue}."}] if issue else [],
            "links": [],
        }


def unprocessable(issue: str) -> Refusal:
    """The request is semantically wrong, or not possible in this state."""
    return Refusal(422, "UNPROCESSABLE_ENTITY", issue)


def invalid(issue: str) -> Refusal:
    """The request is malformed."""
    return Refusal(400, "INVALID_REQUEST", issue)


def missing() -> Refusal:
    return Refusal(404, "RESOURCE_NOT_FOUND", "INVALID_RESOURCE_ID")


class Event(NamedTuple):
    """A change that PayPal reports by webhook."""

    type: str
    resource_type: str
    resource: PayPalObject


class PayPalBooks:
    """All objects of the simulator. `touched` collects changed objects, `events` the events to send."""

    def __init__(self) -> None:
        self.tables: dict[str, dict[str, PayPalObject]] = {kind: {} for kind in KINDS}
        self.touched: dict[str, PayPalObject] = {}
        self.events: list[Event] = []
        self._orders_of: dict[str, list[str]] = defaultdict(list)
        self._parts_of: dict[tuple[str, str], list[str]] = defaultdict(list)
        self._invoices: set[str] = set()

    def keep(self, kind: str, stored: PayPalObject) -> PayPalObject:
        """Record a new or changed object. Names that begin with `_` are our own; they are not shown."""
        if stored["id"] not in self.tables[kind]:
            self._index(kind, stored)
        self.tables[kind][stored["id"]] = stored
        self.touched[stored["id"]] = {"_kind": kind, **stored}
        return stored

    def _index(self, kind: str, stored: PayPalObject) -> None:
        if kind == "orders":
            self._orders_of[_payment_id(stored)].append(stored["id"])
        else:
            self._parts_of[stored["_order"], kind].append(stored["id"])
        if kind != "orders" and stored.get("invoice_id") and stored.get("status") not in DEAD:
            self._invoices.add(stored["invoice_id"])

    def find(self, kind: str, reference: str) -> PayPalObject:
        """The object. Raises Refusal if it does not exist."""
        stored = self.tables[kind].get(reference)
        if stored is None or stored.get("_is_gone"):
            raise missing()
        return stored

    def parts(self, order_id: str, kind: str) -> list[PayPalObject]:
        """The parts of an order, oldest first."""
        return [self.tables[kind][each] for each in self._parts_of[order_id, kind]]

    def shown(self, kind: str, stored: PayPalObject, base_url: str) -> PayPalObject:
        """The object as PayPal shows it, with its links under `base_url`."""
        shown = {name: value for name, value in stored.items() if not name.startswith("_") and value is not None}
        if kind == "orders":
            shown["purchase_units"] = [self._unit(stored, base_url)]
            shown["links"] = _order_links(stored, base_url)
        elif kind != "disputes":
            shown["links"] = _part_links(kind, stored, base_url)
        return shown

    def shown_alone(self, kind: str, stored: PayPalObject, base_url: str) -> PayPalObject:
        """The object as a webhook or its own GET shows it: with the ids of its order and hold.

        A refund has only its link `up` for that: PayPal's schema `refund` has no `supplementary_data`.
        """
        shown = self.shown(kind, stored, base_url)
        if kind in ("authorizations", "captures"):
            related = {"order_id": stored["_order"], "authorization_id": stored.get("_hold")}
            shown["supplementary_data"] = {"related_ids": {key: value for key, value in related.items() if value}}
        return shown

    def _unit(self, order: PayPalObject, base_url: str) -> PayPalObject:
        listed = {
            kind: [each for each in self.parts(order["id"], kind) if not each.get("_is_unlisted")]
            for kind in ("authorizations", "captures", "refunds")
        }
        payments = {
            kind: [self.shown(kind, each, base_url) for each in parts] for kind, parts in listed.items() if parts
        }
        return {**order["purchase_units"][0], **({"payments": payments} if payments else {})}

    # --- orders -----------------------------------------------------------------------------------------------------

    def create(self, given: PayPalObject) -> PayPalObject:
        """Create an order; with a vaulted wallet it is executed at once."""
        order = _new_order(given)
        wallet = order["payment_source"]["paypal"].get("vault_id")
        order["_wallet"] = wallet
        if wallet == "unknown":
            raise unprocessable("TOKEN_EXPIRED")
        if wallet is None or wallet == "asks":
            return self.keep("orders", order)
        if wallet.startswith("declined-"):
            raise _declined(wallet)
        self.keep("orders", order)
        return self._execute(order)

    def approve(self, reference: str, wallet: str | None) -> PayPalObject:
        """The payer approves on PayPal's page, paying with this wallet."""
        order = self.find("orders", reference)
        if order["status"] != "PAYER_ACTION_REQUIRED":
            raise unprocessable("ORDER_ALREADY_APPROVED")
        order.update(status="APPROVED", _wallet=wallet)
        self._note_event("CHECKOUT.ORDER.APPROVED", "checkout-order", "orders", order)
        return self.keep("orders", order)

    def deny(self, reference: str) -> PayPalObject:
        """The payer refuses. Here that ends the order; at PayPal the order stays until it expires."""
        order = self.find("orders", reference)
        if order["status"] not in ("PAYER_ACTION_REQUIRED", "APPROVED"):
            raise unprocessable("ORDER_COMPLETED_OR_VOIDED")
        order["status"] = "VOIDED"
        return self.keep("orders", order)

    def expire(self, reference: str) -> PayPalObject:
        """The payer's time is over: PayPal no longer shows an order without payments."""
        order = self.find("orders", reference)
        if order["status"] not in ("PAYER_ACTION_REQUIRED", "APPROVED"):
            raise unprocessable("ORDER_COMPLETED_OR_VOIDED")
        order["_is_gone"] = True
        return self.keep("orders", order)

    def execute(self, reference: str, step: str) -> PayPalObject:
        """Do `/authorize` or `/capture` of an order that the payer approved."""
        order = self.find("orders", reference)
        if step != order["intent"].lower():
            raise unprocessable("ACTION_DOES_NOT_MATCH_INTENT")
        if order["status"] == "COMPLETED":
            raise unprocessable("ORDER_ALREADY_AUTHORIZED" if step == "authorize" else "ORDER_ALREADY_CAPTURED")
        if order["status"] == "VOIDED":
            raise unprocessable("ORDER_COMPLETED_OR_VOIDED")
        if order["status"] != "APPROVED":
            raise unprocessable("ORDER_NOT_APPROVED")
        if str(order["_wallet"]).startswith("declined-"):
            raise _declined(order["_wallet"])
        return self._execute(order)

    def _execute(self, order: PayPalObject) -> PayPalObject:
        unit, wallet = order["purchase_units"][0], order["_wallet"]
        self._check_invoice(unit.get("invoice_id"))
        order.update(status="COMPLETED", update_time=_now())
        self.keep("orders", order)
        if order["intent"] == "AUTHORIZE":
            status = {"refused": "DENIED", "pending": "PENDING"}.get(wallet, "CREATED")
            self._new_part("authorizations", order, unit["amount"], status, expiration_time=_now(HOLD))
        else:
            status = {"refused": "DECLINED", "pending": "PENDING"}.get(wallet, "COMPLETED")
            self._new_part("captures", order, unit["amount"], status, final_capture=True)
        return order

    def _new_part(
        self, kind: str, order: PayPalObject, amount: PayPalObject, status: str, **fields: Any
    ) -> PayPalObject:
        unit = order["purchase_units"][0]
        part: PayPalObject = {
            "id": new_id(17),
            "status": status,
            "amount": dict(amount),
            "custom_id": unit.get("custom_id"),
            "invoice_id": unit.get("invoice_id"),
            "create_time": _now(),
            "_order": order["id"],
            **fields,
        }
        if status == "PENDING":
            part["status_details"] = {"reason": "ECHECK" if kind == "refunds" else "PENDING_REVIEW"}
        if status in ("DECLINED", "DENIED"):
            part["processor_response"] = {"response_code": "5120"}
        self.keep(kind, part)
        self._note_event_of(kind, part)
        return part

    # --- authorizations and captures --------------------------------------------------------------------------------

    def capture(self, reference: str, given: PayPalObject) -> PayPalObject:
        """Capture a part of a hold, or the rest if no amount is given."""
        hold = self.find("authorizations", reference)
        if hold["status"] not in ("CREATED", "PARTIALLY_CAPTURED"):
            raise unprocessable(_why_not_open(hold["status"]))
        left = value_of(hold["amount"]) - self._captured(hold)
        amount = _amount(given.get("amount")) if "amount" in given else _as_amount(left, hold["amount"])
        if amount["currency_code"] != hold["amount"]["currency_code"]:
            raise unprocessable("AUTH_CAPTURE_CURRENCY_MISMATCH")
        if value_of(amount) > left:
            raise unprocessable("MAX_CAPTURE_AMOUNT_EXCEEDED")
        self._check_invoice(given.get("invoice_id"))
        is_final = given.get("final_capture", False)
        hold["status"] = "CAPTURED" if is_final or value_of(amount) == left else "PARTIALLY_CAPTURED"
        self.keep("authorizations", hold)
        fields = {"final_capture": is_final, "_hold": hold["id"]}
        if "invoice_id" in given:
            fields["invoice_id"] = given["invoice_id"]
        return self._new_part("captures", self.tables["orders"][hold["_order"]], amount, "COMPLETED", **fields)

    def void(self, reference: str) -> PayPalObject:
        hold = self.find("authorizations", reference)
        if hold["status"] not in ("CREATED", "PARTIALLY_CAPTURED", "PENDING"):
            raise unprocessable("PREVIOUSLY_VOIDED" if hold["status"] == "VOIDED" else "PREVIOUSLY_CAPTURED")
        hold["status"] = "VOIDED"
        self.keep("authorizations", hold)
        self._note_event_of("authorizations", hold)
        return hold

    def settle(self, kind: str, reference: str, status: str) -> PayPalObject:
        """Give a pending payment or refund its final status."""
        part = self.find(kind, reference)
        if part["status"] != "PENDING":
            raise unprocessable("NOT_PENDING")
        part["status"] = status
        self.keep(kind, part)
        if kind == "refunds":
            self._note_refunded(self.tables["captures"][part["_capture"]])
        self._note_event_of(kind, part)
        return part

    def _captured(self, hold: PayPalObject) -> Decimal:
        parts = self.parts(hold["_order"], "captures")
        return _sum(each for each in parts if each.get("_hold") == hold["id"] and each["status"] not in DEAD)

    # --- refunds and disputes ---------------------------------------------------------------------------------------

    def refund(self, reference: str, given: PayPalObject) -> PayPalObject:
        """Refund a part of a capture, or the rest if no amount is given."""
        capture = self.find("captures", reference)
        left = self._refundable(capture)
        if left <= 0:
            raise unprocessable("CAPTURE_FULLY_REFUNDED")
        amount = _amount(given.get("amount")) if "amount" in given else _as_amount(left, capture["amount"])
        if amount["currency_code"] != capture["amount"]["currency_code"]:
            raise unprocessable("REFUND_CAPTURE_CURRENCY_MISMATCH")
        if value_of(amount) > left:
            raise unprocessable("REFUND_AMOUNT_EXCEEDED")
        self._check_invoice(given.get("invoice_id"))
        order = self.tables["orders"][capture["_order"]]
        status = "PENDING" if order["_wallet"] == "pending-refund" else "COMPLETED"
        # It is unconfirmed where a refund in PayPal's pages inherits its capture's marks. Here only Transaction Search
        # shows them, because a webhook without marks is the hardest to assign.
        marks = {name: given.get(name) for name in ("custom_id", "invoice_id")}
        searched = {f"_{name}": capture.get(name) for name in marks}
        refund = self._new_part("refunds", order, amount, status, _capture=capture["id"], **marks, **searched)
        self._note_refunded(capture)
        return refund

    def reverse(self, reference: str, given: PayPalObject) -> PayPalObject:
        """PayPal returns a part of a capture, or all of it, to its payer: a refund that no order lists."""
        capture = self.find("captures", reference)
        amount = _amount(given["amount"]) if "amount" in given else capture["amount"]
        order = self.tables["orders"][capture["_order"]]
        marks = {"custom_id": None, "invoice_id": None, "note_to_payer": "Payment reversed"}
        own = {"_capture": reference, "_is_unlisted": True, "_is_reversal": True}
        reversal = self._new_part("refunds", order, amount, "COMPLETED", **marks, **own)
        self._note_refunded(capture)
        return reversal

    def unlist(self, reference: str) -> PayPalObject:
        """Stop listing a refund in its order: that orders list refunds is documented only in passing."""
        return self.keep("refunds", {**self.find("refunds", reference), "_is_unlisted": True})

    def _refundable(self, capture: PayPalObject) -> Decimal:
        if capture["status"] == "PENDING":
            raise unprocessable("PENDING_CAPTURE")
        if capture["status"] in DEAD:
            raise unprocessable("REFUND_NOT_ALLOWED")
        if any(each["status"] != "RESOLVED" for each in self._disputes_of(capture)):
            raise unprocessable("TRANSACTION_DISPUTED")
        return value_of(capture["amount"]) - self._refunded(capture) - self._lost(capture)

    def _note_refunded(self, capture: PayPalObject) -> None:
        refunded = self._refunded(capture)
        is_all = refunded == value_of(capture["amount"])
        capture["status"] = "REFUNDED" if is_all else "PARTIALLY_REFUNDED" if refunded else "COMPLETED"
        self.keep("captures", capture)

    def _refunded(self, capture: PayPalObject) -> Decimal:
        refunds = self.parts(capture["_order"], "refunds")
        return _sum(each for each in refunds if each["_capture"] == capture["id"] and each["status"] not in DEAD)

    def dispute(self, capture_id: str) -> PayPalObject:
        """The payer disputes what is left of a capture."""
        capture = self.find("captures", capture_id)
        amount = _as_amount(self._refundable(capture), capture["amount"])
        disputed = {"seller_transaction_id": capture_id, "custom": capture["custom_id"]}
        dispute = {
            "id": f"PP-D-{new_id(6)}",
            "status": "OPEN",
            "reason": "MERCHANDISE_OR_SERVICE_NOT_RECEIVED",
            "dispute_amount": amount,
            "disputed_transactions": [{**disputed, "invoice_number": capture["invoice_id"]}],
            "create_time": _now(),
            "_order": capture["_order"],
            "_capture": capture_id,
        }
        dispute["dispute_id"] = dispute["id"]
        self.keep("disputes", dispute)
        self._note_event("CUSTOMER.DISPUTE.CREATED", "dispute", "disputes", dispute)
        return dispute

    def resolve(self, reference: str, *, is_won: bool) -> PayPalObject:
        dispute = self.find("disputes", reference)
        code = "RESOLVED_SELLER_FAVOUR" if is_won else "RESOLVED_BUYER_FAVOUR"
        dispute.update(status="RESOLVED", dispute_outcome={"outcome_code": code}, _is_lost=not is_won)
        self.keep("disputes", dispute)
        self._note_event("CUSTOMER.DISPUTE.RESOLVED", "dispute", "disputes", dispute)
        return dispute

    def _disputes_of(self, capture: PayPalObject) -> list[PayPalObject]:
        return [each for each in self.parts(capture["_order"], "disputes") if each["_capture"] == capture["id"]]

    def _lost(self, capture: PayPalObject) -> Decimal:
        return sum((value_of(d["dispute_amount"]) for d in self._disputes_of(capture) if d.get("_is_lost")), Decimal(0))

    def _check_invoice(self, invoice_id: str | None) -> None:
        if invoice_id in self._invoices:
            raise unprocessable("DUPLICATE_INVOICE_ID")

    # --- Transaction Search -----------------------------------------------------------------------------------------

    def transactions(self, since: datetime, until: datetime) -> list[PayPalObject]:
        """The captures and refunds in this time, both ends included, as Transaction Search shows them; oldest first."""
        found = [
            _transaction(kind, each)
            for kind in ("captures", "refunds")
            for each in self.tables[kind].values()
            if each["status"] not in DEAD and since <= datetime.fromisoformat(each["create_time"]) <= until
        ]
        return sorted(found, key=lambda each: (each["transaction_initiation_date"], each["transaction_id"]))

    # --- events -----------------------------------------------------------------------------------------------------

    def _note_event_of(self, kind: str, part: PayPalObject) -> None:
        name = "PAYMENT.CAPTURE.REVERSED" if part.get("_is_reversal") else _EVENTS.get((kind, part["status"]))
        if name is not None:
            self._note_event(name, kind[:-1], kind, part)

    def _note_event(self, name: str, resource_type: str, kind: str, stored: PayPalObject) -> None:
        """Record an event with the object as it is now: the webhook may be sent later."""
        self.events.append(Event(name, resource_type, self.shown_alone(kind, stored, "")))

    # --- sums, in our minor units -----------------------------------------------------------------------------------

    def effects(self, payment_id: str) -> dict[str, int]:
        """The totals of all orders with this payment id in their `custom_id`, in minor units of ISO 4217.

        `executed` counts the holds and direct captures that succeeded: more than one is a double charge.
        """
        sums: Counter[str] = Counter(held=0, captured=0, refunded=0, lost=0, executed=0, orders=0)
        for order_id in self._orders_of.get(payment_id, ()):
            sums.update(self._effect(order_id))
        return dict(sums)

    def _effect(self, order_id: str) -> dict[str, int]:
        holds, captures = self.parts(order_id, "authorizations"), self.parts(order_id, "captures")
        currency = self.tables["orders"][order_id]["purchase_units"][0]["amount"]["currency_code"]
        live = [each for each in captures if each["status"] not in (*DEAD, "PENDING")]
        amounts = {
            "held": sum((value_of(h["amount"]) - self._captured(h) for h in holds if _is_open(h)), Decimal(0)),
            "captured": _sum(live),
            "refunded": sum((self._refunded(each) for each in captures), Decimal(0)),
            "lost": sum((self._lost(each) for each in captures), Decimal(0)),
        }
        direct = [each for each in live if "_hold" not in each]
        executed = len(direct) + sum(each["status"] not in (*DEAD, "PENDING") for each in holds)
        return {**{name: to_minor(v, currency) for name, v in amounts.items()}, "executed": executed, "orders": 1}

    def totals(self) -> dict[str, dict[str, int]]:
        """Per currency in lower case, in minor units of ISO 4217: amounts captured, refunded, held and lost; counts.

        `payment_intents` counts the orders, so that the totals of all simulators have the same names.
        """
        sums: dict[str, Counter[str]] = defaultdict(Counter)
        for order in self.tables["orders"].values():
            effect, currency = self._effect(order["id"]), order["purchase_units"][0]["amount"]["currency_code"]
            of = sums[currency.lower()]
            of.update({"payment_intents": 1, f"count_{order['status'].lower()}": 1})
            of.update({name: effect[name] for name in ("captured", "refunded", "lost")})
            of["authorized_open"] += effect["held"]
            of["count_refunds"] += sum(r["status"] not in DEAD for r in self.parts(order["id"], "refunds"))
        empty = {"payment_intents": 0, "captured": 0, "authorized_open": 0, "refunded": 0, "count_refunds": 0}
        return {currency: {**empty, **counts} for currency, counts in sorted(sums.items())}

    def payment_ids(self) -> list[str]:
        return [payment_id for payment_id in self._orders_of if payment_id]


_EVENTS: Final = {
    ("authorizations", "CREATED"): "PAYMENT.AUTHORIZATION.CREATED",
    ("authorizations", "VOIDED"): "PAYMENT.AUTHORIZATION.VOIDED",
    ("captures", "COMPLETED"): "PAYMENT.CAPTURE.COMPLETED",
    ("captures", "PENDING"): "PAYMENT.CAPTURE.PENDING",
    ("captures", "DECLINED"): "PAYMENT.CAPTURE.DECLINED",
    ("refunds", "COMPLETED"): "PAYMENT.CAPTURE.REFUNDED",
    ("refunds", "PENDING"): "PAYMENT.REFUND.PENDING",
    ("refunds", "FAILED"): "PAYMENT.REFUND.FAILED",
}


TRANSACTION_STATUSES: Final = {"COMPLETED": "S", "PARTIALLY_REFUNDED": "S", "REFUNDED": "V"}
"""Statuses in Transaction Search of what has moved money; any other is pending there."""


def new_id(length: int) -> str:
    return "".join(choice(_ALPHABET) for _ in range(length))


def value_of(amount: PayPalObject) -> Decimal:
    return Decimal(amount["value"])


def to_minor(value: Decimal, currency: str) -> int:
    return int(value.scaleb(MINOR_UNITS[currency]))


def _sum(parts: Iterable[PayPalObject]) -> Decimal:
    return sum((value_of(each["amount"]) for each in parts), Decimal(0))


def _is_open(hold: PayPalObject) -> bool:
    return hold["status"] in ("CREATED", "PARTIALLY_CAPTURED")


def _why_not_open(status: str) -> str:
    reasons = {"VOIDED": "AUTHORIZATION_VOIDED", "CAPTURED": "AUTHORIZATION_ALREADY_CAPTURED"}
    return reasons.get(status, "AUTHORIZATION_DENIED" if status == "DENIED" else "PENDING_AUTHORIZATION")


def _declined(wallet: str) -> Refusal:
    return Refusal(422, "UNPROCESSABLE_ENTITY", wallet.removeprefix("declined-"), is_remembered=True)


def _as_amount(value: Decimal, like: PayPalObject) -> PayPalObject:
    currency = like["currency_code"]
    return {"currency_code": currency, "value": f"{value:.{0 if currency in WHOLE else 2}f}"}


def _amount(given: Any) -> PayPalObject:
    """The amount as given, if it is valid."""
    if not isinstance(given, dict) or not isinstance(given.get("value"), str):
        raise invalid("MISSING_REQUIRED_PARAMETER")
    currency = given.get("currency_code")
    if currency not in CURRENCIES:
        raise unprocessable("INVALID_CURRENCY_CODE")
    try:
        value = Decimal(given["value"])
    except InvalidOperation as error:
        raise invalid("INVALID_PARAMETER_SYNTAX") from error
    if not value.is_finite() or value <= 0:
        raise unprocessable("CANNOT_BE_ZERO_OR_NEGATIVE")
    _check_scale(given["value"], currency)
    return {"currency_code": currency, "value": given["value"]}


def _check_scale(value: str, currency: str) -> None:
    decimals = len(value.partition(".")[2])
    if currency in WHOLE and "." in value:
        raise unprocessable("DECIMALS_NOT_SUPPORTED")
    if decimals > 2:
        raise unprocessable("DECIMAL_PRECISION")


def _new_order(given: PayPalObject) -> PayPalObject:
    units, intent = given.get("purchase_units"), given.get("intent")
    source = (given.get("payment_source") or {}).get("paypal")
    if intent not in ("AUTHORIZE", "CAPTURE") or not isinstance(source, dict):
        raise invalid("INVALID_PARAMETER_VALUE")
    if not isinstance(units, list) or len(units) != 1:
        raise invalid("MISSING_REQUIRED_PARAMETER")
    unit = {**units[0], "amount": _amount(units[0].get("amount"))}
    if any(len(str(unit.get(name) or "")) > 127 for name in ("custom_id", "invoice_id")):
        raise invalid("INVALID_STRING_LENGTH")
    return {
        "id": new_id(17),
        "intent": intent,
        "status": "PAYER_ACTION_REQUIRED",
        "purchase_units": [{"reference_id": "default", **unit}],
        "payment_source": {"paypal": source},
        "create_time": _now(),
    }


def _payment_id(order: PayPalObject) -> str:
    return str(order["purchase_units"][0].get("custom_id") or "").partition(".")[0]


def _order_links(order: PayPalObject, base_url: str) -> list[PayPalObject]:
    links = [{"href": f"{base_url}/v2/checkout/orders/{order['id']}", "rel": "self", "method": "GET"}]
    if order["status"] == "PAYER_ACTION_REQUIRED":
        page = f"{base_url}/_sandbox/paypal/checkoutnow?token={order['id']}"
        links.append({"href": page, "rel": "payer-action", "method": "GET"})
    return links


def _part_links(kind: str, part: PayPalObject, base_url: str) -> list[PayPalObject]:
    up = f"/v2/checkout/orders/{part['_order']}"
    if "_hold" in part:
        up = f"/v2/payments/authorizations/{part['_hold']}"
    if "_capture" in part:
        up = f"/v2/payments/captures/{part['_capture']}"
    return [
        {"href": f"{base_url}/v2/payments/{kind}/{part['id']}", "rel": "self", "method": "GET"},
        {"href": f"{base_url}{up}", "rel": "up", "method": "GET"},
    ]


def _transaction(kind: str, part: PayPalObject) -> PayPalObject:
    """A capture or refund as Transaction Search lists it: outgoing money is negative."""
    amount, is_refund = part["amount"], kind == "refunds"
    related = part.get("_capture") or part.get("_hold")
    listed = {
        "transaction_id": part["id"],
        "paypal_reference_id": related or part["_order"],
        "paypal_reference_id_type": "TXN" if related else "ODR",
        "transaction_event_code": "T1106" if part.get("_is_reversal") else "T1107" if is_refund else "T0006",
        "transaction_initiation_date": part["create_time"],
        "transaction_updated_date": part["create_time"],
        "transaction_amount": {**amount, "value": f"-{amount['value']}"} if is_refund else amount,
        "transaction_status": TRANSACTION_STATUSES.get(part["status"], "P"),
        "instrument_type": "PAYPAL",
    }
    invoice_id, custom_id = (part.get(name) or part.get(f"_{name}") for name in ("invoice_id", "custom_id"))
    marks = {"invoice_id": invoice_id, "custom_field": custom_id}
    return listed | {name: mark for name, mark in marks.items() if mark is not None}


def _now(later: timedelta = timedelta(0)) -> str:
    return (datetime.now(UTC) + later).strftime("%Y-%m-%dT%H:%M:%SZ")
