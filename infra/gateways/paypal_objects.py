"""How PayPal's objects are read: amounts, our marks on them, the status tables, and the objects that a request acts on.

Promise: an outcome is a success or a refusal only if PayPal's object says so explicitly, for this very operation. An
order that is COMPLETED need not be paid; only the payments inside it show that. An object that says neither is
`Pending` or `Unknown`, and one that contradicts the request is a broken contract. Nothing here sends a request.

Sources: https://developer.paypal.com/docs/api/orders/v2/, https://developer.paypal.com/docs/api/payments/v2/. What they
leave open is called unconfirmed here and fails safe.
"""

import re
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any, Final, NamedTuple
from uuid import UUID

from domain.commands import OperationKind
from domain.errors import GatewayContractBroken
from domain.money import MINOR_UNITS, Money
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
from infra.gateways.paypal_http import CURRENCIES, IN_COUNTRY_CURRENCIES, NAME, WHOLE, Json, code_of

APPROVAL_WINDOW: Final = timedelta(hours=6)
"""How long a payer may take to approve an order. Unconfirmed: it is published, but no outcome depends on it."""

CAPTURES: Final = (OperationKind.CAPTURE, OperationKind.CHARGE)
"""The kinds of operations that create a capture at PayPal."""


# --- amounts and marks ----------------------------------------------------------------------------------------------


class AmountNotRepresentable(ValueError):
    """PayPal cannot represent this amount."""


def to_paypal_value(money: Money) -> str:
    """The amount as PayPal's decimal string, such as "10.99", or "1250" for a currency without decimals there.

    Raises:
        AmountNotRepresentable: not a currency of PayPal, or a fraction where PayPal takes none.
    """
    if money.currency not in CURRENCIES | IN_COUNTRY_CURRENCIES:
        raise AmountNotRepresentable(f"{money.currency} is not a currency of PayPal")
    value = Decimal(money.minor).scaleb(-MINOR_UNITS[money.currency])
    if money.currency not in WHOLE:
        return f"{value:.2f}"
    if value != value.to_integral_value():
        raise AmountNotRepresentable(f"PayPal takes {money.currency} without decimals, not {value}")
    return f"{value:.0f}"


def amount_json(money: Money) -> Json:
    return {"currency_code": money.currency, "value": to_paypal_value(money)}


def from_paypal_amount(amount: Mapping[str, Any], currency: str) -> int:
    """Our minor units, from an amount of PayPal's that must be in `currency`.

    Raises:
        GatewayContractBroken: another currency, or not a valid amount in this one.
    """
    if amount["currency_code"] != currency:
        raise GatewayContractBroken(NAME, f"an amount is in {code_of(amount['currency_code'])} and not in {currency}")
    return minor_of(amount)


def minor_of(amount: Mapping[str, Any]) -> int:
    """Our minor units, from an amount of PayPal's in any currency.

    Raises:
        GatewayContractBroken: it cannot be read.
    """
    text, currency = str(amount["value"]), str(amount["currency_code"])
    if not re.fullmatch(r"[0-9]{1,16}(\.[0-9]{1,3})?", text) or currency not in MINOR_UNITS:
        raise GatewayContractBroken(NAME, "an amount cannot be read")
    minor = Decimal(text).scaleb(MINOR_UNITS[currency])
    if minor != minor.to_integral_value():
        raise GatewayContractBroken(NAME, f"an amount has more decimals than {currency}")
    return int(minor)


class Marks(NamedTuple):
    """Our names for an operation at PayPal; `kind` is None if they come from a `custom_id`."""

    payment_id: UUID
    operation_number: int
    kind: OperationKind | None


def mark_of(request: GatewayRequest) -> str:
    """The `custom_id` of the order or refund that this operation creates."""
    return f"{request.payment_id}.{request.operation_number}"


def invoice_of(request: GatewayRequest) -> str:
    """The `invoice_id` of the payment or refund that this operation creates: PayPal accepts each one once."""
    return f"{mark_of(request)}.{request.kind}"


_MARK: Final = re.compile(r"([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})\.([1-9][0-9]{0,8})(?:\.([a-z]{1,16}))?")


def read_mark(text: object) -> Marks | None:
    """The marks in a `custom_id` or `invoice_id`; None if it is not ours."""
    found = _MARK.fullmatch(text) if isinstance(text, str) else None
    if found is None or found[3] not in (None, *OperationKind):
        return None
    return Marks(UUID(found[1]), int(found[2]), OperationKind(found[3]) if found[3] else None)


# --- the status tables: what PayPal's objects prove about an operation ----------------------------------------------


def read_opening(order: Json, request: GatewayRequest) -> Outcome:
    """The outcome of the authorization or charge that an order was created for, from its payments if it has any.

    A declined payment does not hide a later one that succeeded: the payer may have tried another card.

    Raises:
        GatewayContractBroken: another operation's order, money captured although only a hold was requested, or more
            than one successful payment.
    """
    _check_ours(order, request)
    payments = payments_of(order)
    if request.kind is OperationKind.AUTHORIZE:
        found = [read_authorization(each, order, request) for each in payments["authorizations"]]
        if payments["captures"] and not found:
            raise GatewayContractBroken(NAME, f"order {order['id']} is captured although only a hold was requested")
    else:
        found = [as_opening(read_capture(each, request), order) for each in payments["captures"]]
    return _best(found, order) if found else _read_unpaid(order, request)


def _best(found: list[Outcome], order: Json) -> Outcome:
    succeeded = [each for each in found if isinstance(each, Succeeded)]
    if len(succeeded) > 1:
        raise GatewayContractBroken(NAME, f"order {order['id']} was paid {len(succeeded)} times")
    pending = [each for each in found if isinstance(each, Pending)]
    return (succeeded or pending or found[-1:])[0]


def _check_ours(order: Json, request: GatewayRequest) -> None:
    mark = order["purchase_units"][0].get("custom_id") if order.get("purchase_units") else None
    if mark not in (None, mark_of(request)):
        raise GatewayContractBroken(NAME, f"order {order['id']} is not that of {mark_of(request)}")


def _read_unpaid(order: Json, request: GatewayRequest) -> Outcome:
    """The outcome of an order without payments. APPROVED holds no money: our call to execute it is still missing."""
    reference = order["id"]
    url = _payer_url(order)
    match order["status"]:
        case "CREATED" | "SAVED" | "PAYER_ACTION_REQUIRED" if url is not None:
            return RequiresAction(reference, "redirect", url, _window_end(order, request))
        case "VOIDED":
            return Declined(DeclineReason.CANCELED, "VOIDED", reference)
        case _:
            return Pending(reference)


def read_authorization(authorization: Json, order: Json, request: GatewayRequest) -> Outcome:
    """The outcome of the operation that created a hold's order."""
    reference = order["id"]
    match authorization["status"]:
        case "CREATED" | "PARTIALLY_CAPTURED" | "CAPTURED":
            amount = from_paypal_amount(authorization["amount"], request.amount.currency)
            return Succeeded(reference, amount, time_of(authorization.get("expiration_time")))
        case "DENIED":
            return _declined_payment(authorization, reference)
        case "VOIDED" if not payments_of(order)["captures"] or request.state is OperationState.SUCCEEDED:
            # If a hold is queried after a part was captured: the rest has lapsed.
            return Expired(reference, "VOIDED")
        case _:
            return Pending(reference)


def read_capture(capture: Json, request: GatewayRequest) -> Outcome:
    """The outcome of a capture. It succeeded even if it was refunded later."""
    reference = capture["id"]
    match capture["status"]:
        case "COMPLETED" | "PARTIALLY_REFUNDED" | "REFUNDED":
            return Succeeded(reference, from_paypal_amount(capture["amount"], request.amount.currency))
        case "DECLINED" | "FAILED":
            return _declined_payment(capture, reference)
        case _:
            return Pending(reference)


def read_captures(order: Json, request: GatewayRequest) -> Outcome:
    """The outcome of one capture of an order's hold, found by our invoice id.

    If every hold is VOIDED (which is final) or DENIED, and nothing was ever captured, this operation captured nothing.
    """
    own = _only(payments_of(order)["captures"], request, ("invoice_id", invoice_of(request)))
    if own is not None:
        return read_capture(own, request)
    holds = payments_of(order)["authorizations"]
    if holds and not _taken(order) and all(each["status"] in ("VOIDED", "DENIED") for each in holds):
        message = f"the hold of order {order['id']} was released before the capture"
        return NotExecuted(message, "AUTHORIZATION_VOIDED", is_hold_gone=True)
    return Unknown(f"order {order['id']} shows no trace of operation {request.operation_number}")


def read_refunds(order: Json, request: GatewayRequest) -> Outcome:
    """The outcome of one of an order's refunds, found by our marks."""
    marks = ("invoice_id", invoice_of(request)), ("custom_id", mark_of(request))
    own = _only(payments_of(order)["refunds"], request, *marks)
    if own is not None:
        return read_refund(own, request)
    return Unknown(f"order {order['id']} shows no trace of operation {request.operation_number}")


def read_void_of(order: Json, request: GatewayRequest) -> Outcome:
    """The outcome of a void: of the order's hold or, if it has none, of the order itself."""
    hold = hold_of(order)
    return read_void(hold, order, request) if hold is not None else _read_waiting(order, request)


def read_void(authorization: Json, order: Json, request: GatewayRequest) -> Outcome:
    """The outcome of releasing an authorization.

    It does not matter who released it, so the state is the evidence: VOIDED (also at the end of its 29 days), or closed
    by captures that leave exactly the amount to be released. If less is left, somebody captured in PayPal's pages: as
    much as requested is not, and will never be, released.
    """
    left = left_of_hold(authorization, order, request)
    if left < request.amount.minor:
        message = "part of what was to be released is captured in PayPal's pages: void again once that is reported"
        return without_effect(request, message, "CAPTURED_ELSEWHERE")
    match authorization["status"]:
        case "VOIDED":
            return Succeeded(authorization["id"])
        case "CAPTURED" if _taken(order) and left == request.amount.minor:
            return Succeeded(authorization["id"])
        case _:
            return Unknown(f"authorization {authorization['id']} shows no release of the hold")


def left_of_hold(authorization: Json, order: Json, request: GatewayRequest) -> int:
    """What was held and is not captured, by whomever, in minor units; also once that is released."""
    captured = sum(from_paypal_amount(each["amount"], request.amount.currency) for each in _taken(order))
    return from_paypal_amount(authorization["amount"], request.amount.currency) - captured


def _read_waiting(order: Json, request: GatewayRequest) -> Outcome:
    """The outcome of voiding an order without a hold: until our own call executes it, no money moves."""
    if any(payments_of(order).values()):
        return without_effect(request, f"order {order['id']} has no hold to release", "NO_AUTHORIZATION")
    if order["status"] in ("CREATED", "SAVED", "PAYER_ACTION_REQUIRED", "APPROVED", "VOIDED"):
        return Succeeded(order["id"])
    return Unknown(f"order {order['id']} is {code_of(order['status'])} and shows no payment")


def read_release(reference: str, answer: Json, request: GatewayRequest) -> Outcome:
    """The outcome in the answer to a release: an empty one (204) confirms it, another shows the authorization."""
    status = answer["status"] if answer else "VOIDED"
    return Succeeded(reference) if status == "VOIDED" else Unknown(f"authorization {reference} is {code_of(status)}")


def read_refund(refund: Json, request: GatewayRequest) -> Outcome:
    """The outcome of a refund."""
    reference = refund["id"]
    match refund["status"]:
        case "COMPLETED":
            return Succeeded(reference, from_paypal_amount(refund["amount"], request.amount.currency))
        case "FAILED" | "CANCELLED":
            return Declined(DeclineReason.REFUND_FAILED, refund["status"], reference)
        case _:
            return Pending(reference)


def as_opening(outcome: Outcome, order: Json) -> Outcome:
    """The same outcome, referring to the order: all later requests identify the payment by it."""
    match outcome:
        case Succeeded(amount_minor=amount):
            return Succeeded(order["id"], amount)
        case Declined(reason, code):
            return Declined(reason, code, order["id"])
        case _:
            return Pending(order["id"])


def _declined_payment(payment: Json, reference: str) -> Declined:
    """A decline inside a 2xx answer. Source: `processor_response` of the Orders v2 reference."""
    processor = payment.get("processor_response") or {}
    details = payment.get("status_details") or {}
    code = processor.get("response_code") or details.get("reason") or payment["status"]
    return Declined(PROCESSOR_REASONS.get(code, DeclineReason.REFUSED_BY_ISSUER), code, reference)


PROCESSOR_REASONS: Final[Mapping[str, DeclineReason]] = {
    "5120": DeclineReason.INSUFFICIENT_FUNDS,
    "5400": DeclineReason.CARD_EXPIRED,
    "5180": DeclineReason.INVALID_CARD_DATA,
    "5110": DeclineReason.INVALID_CARD_DATA,
    "9500": DeclineReason.SUSPECTED_FRAUD,
    "9520": DeclineReason.SUSPECTED_FRAUD,
    "DECLINED_BY_RISK_FRAUD_FILTERS": DeclineReason.SUSPECTED_FRAUD,
}
"""Codes of a declined payment that state a reason. Unconfirmed and incomplete: any other is REFUSED_BY_ISSUER."""


def _taken(order: Json) -> list[Json]:
    return [each for each in payments_of(order)["captures"] if each["status"] not in ("DECLINED", "FAILED")]


def _payer_url(order: Json) -> str | None:
    """Where the payer consents. The name of the link depends on how the order was created."""
    links = {link.get("rel"): link.get("href") for link in order.get("links") or ()}
    url = links.get("payer-action") or links.get("approve")
    return url if isinstance(url, str) else None


def _window_end(order: Json, request: GatewayRequest) -> datetime | None:
    began = time_of(order.get("create_time")) or request.first_dispatched_at
    return began + APPROVAL_WINDOW if began else None


def time_of(text: object) -> datetime | None:
    """A time as PayPal writes it, in UTC if it names no zone; None if it cannot be read."""
    if not isinstance(text, str):
        return None
    try:
        read = datetime.fromisoformat(text)
    except ValueError:
        return None
    return read if read.tzinfo else read.replace(tzinfo=UTC)


# --- what a request acts on -----------------------------------------------------------------------------------------


def payments_of(order: Json) -> dict[str, list[Json]]:
    """The payments inside an order, by kind; each list in PayPal's order, empty if there are none."""
    units = order.get("purchase_units") or [{}]
    inside = units[0].get("payments") or {}
    return {kind: list(inside.get(kind) or ()) for kind in ("authorizations", "captures", "refunds")}


def hold_of(order: Json) -> Json | None:
    """The open authorization; if none is open, the last that PayPal lists."""
    holds = payments_of(order)["authorizations"]
    return open_hold(order) or (holds[-1] if holds else None)


def open_hold(order: Json) -> Json | None:
    """The authorization to act on: the last whose status does not rule it out for good."""
    holds = [each for each in payments_of(order)["authorizations"] if each["status"] not in ("VOIDED", "DENIED")]
    return holds[-1] if holds else None


def refundable(order: Json, request: GatewayRequest) -> Json | Outcome:
    """The capture to refund: of those with enough left, the one with the least left, then the lowest id.

    If no capture was ever large enough, no earlier attempt can have been executed either.
    """
    wanted, currency = request.amount.minor, request.amount.currency
    left = sorted((_left_of(each, order, request), each["id"], each) for each in _taken(order))
    able = [capture for rest, _, capture in left if rest >= wanted]
    if able:
        return able[0]
    message = f"no single capture of order {order['id']} has {request.amount} left to refund; send smaller refunds"
    if left and all(from_paypal_amount(each["amount"], currency) < wanted for _, _, each in left):
        return NotExecuted(message, "REFUND_AMOUNT_EXCEEDED")
    return without_effect(request, message, "REFUND_AMOUNT_EXCEEDED")


def _left_of(capture: Json, order: Json, request: GatewayRequest) -> int:
    currency = request.amount.currency
    gone = [
        from_paypal_amount(each["amount"], currency)
        for each in payments_of(order)["refunds"]
        if each["status"] not in ("FAILED", "CANCELLED") and linked_id(each, "/captures/") == capture["id"]
    ]
    return from_paypal_amount(capture["amount"], currency) - sum(gone)


def _only(objects: list[Json], request: GatewayRequest, *marks: tuple[str, str]) -> Json | None:
    """The object that carries one of these marks, or has the id from an earlier answer; or None.

    Raises:
        GatewayContractBroken: several do: the operation was executed more than once.
    """
    found = [
        each
        for each in objects
        if any(each.get(name) == mark for name, mark in marks) or each["id"] == request.reference
    ]
    live = [each for each in found if each["status"] not in ("DECLINED", "FAILED", "CANCELLED")] or found[-1:]
    if len(live) > 1:
        raise GatewayContractBroken(NAME, f"several objects for {invoice_of(request)}: {[each['id'] for each in live]}")
    return live[0] if live else None


def without_effect(request: GatewayRequest, message: str, code: str | None = None) -> Outcome:
    """The outcome if nothing was sent: proof for the operation only if every earlier attempt is accounted for."""
    if request.state is OperationState.DISPATCHED:
        return NotExecuted(message, code)
    return Unknown(f"on a repeated attempt: {message}")


def linked_id(stored: Json, path: str) -> str | None:
    """The id of the object that this one belongs to, from its link `up`."""
    for link in stored.get("links") or ():
        if link.get("rel") == "up" and path in str(link.get("href")):
            return str(link["href"]).rsplit("/", 1)[-1]
    return None
