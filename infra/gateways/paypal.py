"""All that we know about PayPal: configuration, capabilities, requests, the status tables, the error table.

`paypal_webhooks.py` has its webhooks.

Promise: a success or a refusal is reported only on PayPal's explicit word for this very operation; an order that is
COMPLETED is not paid, the payments inside it tell. Whatever we cannot read is `Pending` or an `OutcomeUnknown`. Every
POST carries a `PayPal-Request-Id` made of `request.provider_key` and the step. Every payment carries our marks:
`custom_id` is `payment_id.operation_number` of the operation that opened the order (captures of a hold inherit it), and
`invoice_id`, which PayPal takes once per account, is `payment_id.operation_number.kind` of the operation itself.

Plain httpx and not PayPal's SDK: `paypal-server-sdk` 2.4.0 blocks its thread, knows no webhooks, and its base address
is an enum that no simulator fits.

Sources: https://developer.paypal.com/docs/api/orders/v2/, https://developer.paypal.com/docs/api/payments/v2/,
https://developer.paypal.com/reference/guidelines/idempotency/,
https://developer.paypal.com/docs/checkout/advanced/authorization-honor/. What they do not say is called unconfirmed
here and fails safe.
"""

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from functools import partial
from typing import Any, Final, NamedTuple, ParamSpec, Self, TypeVar, assert_never
from urllib.parse import quote, urlencode, urlsplit
from uuid import UUID

import httpx
from pydantic import BaseModel, ConfigDict, SecretStr, field_validator, model_validator

from domain.capabilities import AmountLimits, Capabilities, Listing
from domain.commands import OperationKind
from domain.errors import GatewayContractBroken, GatewayError, GatewayUnreachable, OutcomeUnknown
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
from domain.ports import Clock, Connections, Movement
from infra.gateways.transport import ProviderHttp

NAME: Final = "paypal"
SANDBOX: Final = "https://api-m.sandbox.paypal.com"
LIVE: Final = "https://api-m.paypal.com"

WHOLE: Final = frozenset({"HUF", "JPY", "TWD"})
"""Currencies that PayPal takes without decimals. Source: https://developer.paypal.com/reference/currency-codes/."""

CURRENCIES: Final = frozenset(
    "AUD CAD CHF CZK DKK EUR GBP HKD HUF ILS JPY MXN NOK NZD PHP PLN SEK SGD THB TWD USD".split()  # noqa: SIM905
)
IN_COUNTRY_CURRENCIES: Final = frozenset({"BRL", "CNY", "INR", "MYR"})
"""Only for accounts of that country, so they are not on by default. Source: as above."""

VAULT: Final = "vault:"
"""A payment method `vault:<id>` is a PayPal wallet that the payer left with us; any other one means a redirect."""

APPROVAL_WINDOW: Final = timedelta(hours=6)
"""How long a payer may take to approve an order. Unconfirmed; it is told to the payer's side, nothing is concluded."""

EXPIRY_SHOWS_AFTER: Final = timedelta(hours=3)
"""The shortest time that PayPal is said to leave a payer. An order that is gone sooner is no order that expired."""

EXPIRY_SHOWS_WITHIN: Final = timedelta(days=3)
"""The longest approval window that PayPal grants to anybody. An order that is gone later has another story."""

TOKEN_MARGIN_SECONDS: Final = 300.0

CAPTURES: Final = (OperationKind.CAPTURE, OperationKind.CHARGE)
"""What makes a capture."""

Json = dict[str, Any]
P = ParamSpec("P")
T = TypeVar("T")


class PayPalConfig(BaseModel):
    """How to reach PayPal. `api_base` decides between live and sandbox, or is a simulator's address.

    `webhook_id` is ours from PayPal's developer pages; without it no webhook can be verified. `cert_hosts` are those
    that may serve PayPal's signing certificates; None means those of the environment that `api_base` names.
    """

    model_config = ConfigDict(frozen=True)

    client_id: str
    client_secret: SecretStr
    api_base: str = SANDBOX
    webhook_id: str = ""
    return_url: str = "https://example.invalid/return"
    cancel_url: str = "https://example.invalid/cancel"
    timeout_seconds: float = 12.0
    """For one answer, from the first byte sent to the last byte read, waiting for a connection included. An operation
    may need four of them (a token, the order, the request itself, a look for evidence): keep that below the lease."""
    connect_timeout_seconds: float = 5.0
    max_connections: int = 64
    cert_hosts: frozenset[str] | None = None
    allows_plain_http: bool = False
    """For a simulator that is not on a loopback address but, say, in the same Docker network."""
    currencies: frozenset[str] = CURRENCIES

    @field_validator("api_base")
    @classmethod
    def _is_bare(cls, value: str) -> str:
        return value.rstrip("/")

    @model_validator(mode="after")
    def _keeps_secrets(self) -> Self:
        if not self.api_base.startswith("https://") and not self.is_simulated:
            raise ValueError("api_base must be https; only a simulator may be http, on a loopback address")
        return self

    @property
    def is_simulated(self) -> bool:
        """Whether this is plain http, to the machine itself unless that is allowed elsewhere."""
        parts = urlsplit(self.api_base)
        is_near = self.allows_plain_http or parts.hostname in ("127.0.0.1", "localhost", "::1")
        return parts.scheme == "http" and is_near

    @field_validator("currencies")
    @classmethod
    def _are_known(cls, value: frozenset[str]) -> frozenset[str]:
        unknown = value - CURRENCIES - IN_COUNTRY_CURRENCIES
        if unknown:
            raise ValueError(f"not currencies of PayPal: {sorted(unknown)}")
        return value


# --- amounts and marks ----------------------------------------------------------------------------------------------


class AmountNotRepresentable(ValueError):
    """PayPal has no form for this amount."""


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


def from_paypal_amount(amount: Mapping[str, Any], currency: str) -> int:
    """Our minor units of an amount that PayPal tells.

    Raises:
        GatewayContractBroken: another currency, or nothing that this currency can be.
    """
    if amount["currency_code"] != currency:
        raise GatewayContractBroken(NAME, f"an amount is in {code_of(amount['currency_code'])} and not in {currency}")
    return minor_of(amount)


def minor_of(amount: Mapping[str, Any]) -> int:
    """An amount in our minor units, whatever its currency.

    Raises:
        GatewayContractBroken: it cannot be read.
    """
    text, currency = str(amount["value"]), str(amount["currency_code"])
    if not re.fullmatch(r"[0-9]{1,16}(\.[0-9]{1,3})?", text) or currency not in MINOR_UNITS:
        raise GatewayContractBroken(NAME, "an amount cannot be read")
    minor = Decimal(text).scaleb(MINOR_UNITS[currency])
    if minor != minor.to_integral_value():
        raise GatewayContractBroken(NAME, f"an amount is not one of {currency}")
    return int(minor)


class Marks(NamedTuple):
    """What names our operation at PayPal; `kind` is None where the mark is an order's `custom_id`."""

    payment_id: UUID
    operation_number: int
    kind: OperationKind | None


def mark_of(request: GatewayRequest) -> str:
    """The `custom_id` of what this operation opens or refunds."""
    return f"{request.payment_id}.{request.operation_number}"


def invoice_of(request: GatewayRequest) -> str:
    """The `invoice_id` of the payment or refund that this operation makes: PayPal takes each one once."""
    return f"{mark_of(request)}.{request.kind}"


_MARK: Final = re.compile(r"([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})\.([1-9][0-9]{0,8})(?:\.([a-z]{1,16}))?")


def read_mark(text: object) -> Marks | None:
    """The marks in a `custom_id` or `invoice_id`; None where they are not ours."""
    found = _MARK.fullmatch(text) if isinstance(text, str) else None
    if found is None or found[3] not in (None, *OperationKind):
        return None
    return Marks(UUID(found[1]), int(found[2]), OperationKind(found[3]) if found[3] else None)


# --- the status tables: what PayPal's objects say about an operation ------------------------------------------------


def read_opening(order: Json, request: GatewayRequest) -> Outcome:
    """What an order says about the authorization or charge that it was created for. Its payments tell, if it has any.

    A refused payment does not hide a later one that succeeded: the payer may have tried another card.

    Raises:
        GatewayContractBroken: another operation's order, money captured although only a hold was asked for, or more
            than one payment.
    """
    _check_ours(order, request)
    payments = _payments(order)
    if request.kind is OperationKind.AUTHORIZE:
        found = [read_authorization(each, order, request) for each in payments["authorizations"]]
        if payments["captures"] and not found:
            raise GatewayContractBroken(NAME, f"order {order['id']} is captured although only a hold was asked for")
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
    """An order without payments. APPROVED holds no money: our own second call is missing."""
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
    """What a hold says about the operation that opened its order."""
    reference = order["id"]
    match authorization["status"]:
        case "CREATED" | "PARTIALLY_CAPTURED" | "CAPTURED":
            amount = from_paypal_amount(authorization["amount"], request.amount.currency)
            return Succeeded(reference, amount, time_of(authorization.get("expiration_time")))
        case "DENIED":
            return _declined_payment(authorization, reference)
        case "VOIDED" if not _payments(order)["captures"] or request.state is OperationState.SUCCEEDED:
            # Of a hold that is asked about after some of it was captured: what was left has lapsed.
            return Expired(reference, "VOIDED")
        case _:
            return Pending(reference)


def read_capture(capture: Json, request: GatewayRequest) -> Outcome:
    """What a capture says about itself. That it was refunded later takes nothing from its success."""
    reference = capture["id"]
    match capture["status"]:
        case "COMPLETED" | "PARTIALLY_REFUNDED" | "REFUNDED":
            return Succeeded(reference, from_paypal_amount(capture["amount"], request.amount.currency))
        case "DECLINED" | "FAILED":
            return _declined_payment(capture, reference)
        case _:
            return Pending(reference)


def read_captures(order: Json, request: GatewayRequest) -> Outcome:
    """What an order says about one of the captures of its hold, known by our invoice id.

    A hold that is VOIDED, which is final, with nothing ever captured is proof that this operation captured nothing.
    """
    own = _only(_payments(order)["captures"], request, ("invoice_id", invoice_of(request)))
    if own is not None:
        return read_capture(own, request)
    holds = _payments(order)["authorizations"]
    if holds and not _taken(order) and all(each["status"] in ("VOIDED", "DENIED") for each in holds):
        message = f"the hold of order {order['id']} was released before the capture"
        return NotExecuted(message, "AUTHORIZATION_VOIDED", is_hold_gone=True)
    return Unknown(f"order {order['id']} shows no trace of operation {request.operation_number}")


def read_refunds(order: Json, request: GatewayRequest) -> Outcome:
    """What an order says about one of its refunds, known by our marks."""
    marks = ("invoice_id", invoice_of(request)), ("custom_id", mark_of(request))
    own = _only(_payments(order)["refunds"], request, *marks)
    if own is not None:
        return read_refund(own, request)
    return Unknown(f"order {order['id']} shows no trace of operation {request.operation_number}")


def read_void(authorization: Json, order: Json, request: GatewayRequest) -> Outcome:
    """What an authorization says about releasing it.

    Releasing is the same whoever does it, so the state is the evidence: VOIDED (also by the end of its 29 days), or
    closed by captures that leave exactly the amount to be released.
    """
    captured = sum(from_paypal_amount(each["amount"], request.amount.currency) for each in _taken(order))
    held = from_paypal_amount(authorization["amount"], request.amount.currency)
    match authorization["status"]:
        case "VOIDED":
            return Succeeded(authorization["id"])
        case "CAPTURED" if captured and held - captured == request.amount.minor:
            return Succeeded(authorization["id"])
        case _:
            return Unknown(f"authorization {authorization['id']} shows no release of the hold")


def read_release(reference: str, answer: Json, request: GatewayRequest) -> Outcome:
    """What the answer to a release says: nothing but that it was done (204), or the authorization as it is now."""
    status = answer["status"] if answer else "VOIDED"
    return Succeeded(reference) if status == "VOIDED" else Unknown(f"authorization {reference} is {code_of(status)}")


def read_refund(refund: Json, request: GatewayRequest) -> Outcome:
    """What a refund says."""
    reference = refund["id"]
    match refund["status"]:
        case "COMPLETED":
            return Succeeded(reference, from_paypal_amount(refund["amount"], request.amount.currency))
        case "FAILED" | "CANCELLED":
            return Declined(DeclineReason.REFUND_FAILED, refund["status"], reference)
        case _:
            return Pending(reference)


def as_opening(outcome: Outcome, order: Json) -> Outcome:
    """The same, referring to the order: that is what the payment is called in all later requests."""
    match outcome:
        case Succeeded(amount_minor=amount):
            return Succeeded(order["id"], amount)
        case Declined(reason, code):
            return Declined(reason, code, order["id"])
        case _:
            return Pending(order["id"])


def _declined_payment(payment: Json, reference: str) -> Declined:
    """A refusal inside a 2xx answer. Source: `processor_response` of the Orders v2 reference."""
    processor = payment.get("processor_response") or {}
    details = payment.get("status_details") or {}
    code = processor.get("response_code") or details.get("reason") or payment["status"]
    return Declined(PROCESSOR_REASONS.get(code, DeclineReason.REFUSED_BY_ISSUER), code, reference)


def _payments(order: Json) -> dict[str, list[Json]]:
    """The payments inside of an order, by kind; each list in PayPal's order, empty where there are none."""
    units = order.get("purchase_units") or [{}]
    inside = units[0].get("payments") or {}
    return {kind: list(inside.get(kind) or ()) for kind in ("authorizations", "captures", "refunds")}


def _taken(order: Json) -> list[Json]:
    return [each for each in _payments(order)["captures"] if each["status"] not in ("DECLINED", "FAILED")]


def _payer_url(order: Json) -> str | None:
    """Where the payer consents: PayPal names the link by what the order was created with."""
    links = {link.get("rel"): link.get("href") for link in order.get("links") or ()}
    url = links.get("payer-action") or links.get("approve")
    return url if isinstance(url, str) else None


def _window_end(order: Json, request: GatewayRequest) -> datetime | None:
    began = time_of(order.get("create_time")) or request.first_dispatched_at
    return began + APPROVAL_WINDOW if began else None


def time_of(text: object) -> datetime | None:
    """A time as PayPal writes it, UTC where it names no zone; None for what is none."""
    if not isinstance(text, str):
        return None
    try:
        read = datetime.fromisoformat(text)
    except ValueError:
        return None
    return read if read.tzinfo else read.replace(tzinfo=UTC)


PROCESSOR_REASONS: Final[Mapping[str, DeclineReason]] = {
    "5120": DeclineReason.INSUFFICIENT_FUNDS,
    "5400": DeclineReason.CARD_EXPIRED,
    "5180": DeclineReason.INVALID_CARD_DATA,
    "5110": DeclineReason.INVALID_CARD_DATA,
    "9500": DeclineReason.SUSPECTED_FRAUD,
    "9520": DeclineReason.SUSPECTED_FRAUD,
    "DECLINED_BY_RISK_FRAUD_FILTERS": DeclineReason.SUSPECTED_FRAUD,
}
"""Codes of a refused payment that say more than "no". Unconfirmed and not complete: any other is REFUSED_BY_ISSUER."""


# --- the error table: what a refusal says about an operation --------------------------------------------------------

_DECLINES: Final[Mapping[DeclineReason, str]] = {
    DeclineReason.REFUSED_BY_ISSUER: (
        "INSTRUMENT_DECLINED TRANSACTION_REFUSED AUTHORIZATION_DENIED PAYMENT_SOURCE_DECLINED_BY_PROCESSOR"
        " DECLINED_DUE_TO_RELATED_TXN"
    ),
    DeclineReason.CARD_EXPIRED: "CARD_EXPIRED REFERENCED_CARD_EXPIRED",
    DeclineReason.INVALID_CARD_DATA: "PAYMENT_SOURCE_INFO_CANNOT_BE_VERIFIED TOKEN_EXPIRED TOKEN_ID_NOT_FOUND",
    DeclineReason.AUTHENTICATION_REQUIRED: "CONSENT_NEEDED",
    DeclineReason.SUSPECTED_FRAUD: "COMPLIANCE_VIOLATION",
    DeclineReason.LIMIT_EXCEEDED: (
        "TRANSACTION_LIMIT_EXCEEDED TRANSACTION_RECEIVING_LIMIT_EXCEEDED MAX_NUMBER_OF_PAYMENT_ATTEMPTS_EXCEEDED"
    ),
    DeclineReason.METHOD_NOT_SUPPORTED: (
        "PAYMENT_SOURCE_CANNOT_BE_USED CARD_BRAND_NOT_SUPPORTED DOMESTIC_TRANSACTION_REQUIRED"
    ),
    DeclineReason.CANCELED: "AGREEMENT_ALREADY_CANCELLED BILLING_AGREEMENT_NOT_FOUND",
    DeclineReason.OTHER: (
        "PAYER_CANNOT_PAY TRANSACTION_BLOCKED_BY_PAYEE PAYEE_BLOCKED_TRANSACTION PAYER_ACCOUNT_LOCKED_OR_CLOSED"
        " PAYER_ACCOUNT_RESTRICTED"
    ),
}
DECLINE_REASONS: Final[Mapping[str, DeclineReason]] = {
    issue: reason for reason, issues in _DECLINES.items() for issue in issues.split()
}

NEEDS_PAYER: Final = frozenset({"PAYER_ACTION_REQUIRED", "ORDER_NOT_APPROVED", "REDIRECT_PAYER_FOR_ALTERNATE_FUNDING"})
"""The payer has to consent again, to the same order."""

STATE_CONFLICTS: Final = frozenset(
    {
        "ORDER_ALREADY_CAPTURED",
        "ORDER_ALREADY_AUTHORIZED",
        "AUTHORIZATION_ALREADY_CAPTURED",
        "PREVIOUSLY_CAPTURED",
        "PREVIOUSLY_VOIDED",
        "AUTHORIZATION_VOIDED",
        "CAPTURE_FULLY_REFUNDED",
        "ORDER_COMPLETED_OR_VOIDED",
        "DUPLICATE_INVOICE_ID",
    }
)
"""The object is not in the state that the call needs: perhaps because this very operation was executed before."""

IN_PROGRESS: Final = frozenset({"PREVIOUS_REQUEST_IN_PROGRESS", "ORDER_COMPLETION_IN_PROGRESS"})
"""The same request is being executed right now: the opposite of proof."""

LATER: Final = frozenset({"PENDING_CAPTURE", "REFUND_FAILED_INSUFFICIENT_FUNDS"})
"""Not executed, and may be tried again: once the capture is through, once our account has funds."""

ENDED: Final = frozenset({"AUTHORIZATION_EXPIRED", "ORDER_EXPIRED", "REFUND_TIME_LIMIT_EXCEEDED"})

REFUSED_AT_THE_DOOR: Final = frozenset({401, 403, 429})
"""Authentication, permissions and limits come before execution: proof for this attempt only."""


class PayPalRefused(Exception):
    """A 4xx in PayPal's own form. Its text is made of ids and codes only, never of PayPal's sentences or our body."""

    def __init__(self, status: int, body: Mapping[str, Any]) -> None:
        details = body.get("details") or ()
        self.status = status
        self.name = code_of(body.get("name"))
        self.issues = tuple(
            code_of(each.get("issue")) for each in details if isinstance(each, dict) and each.get("issue")
        )
        self.debug_id = code_of(body.get("debug_id"))
        super().__init__(f"status {status}, {self.name}, {'/'.join(self.issues) or 'no issue'}, debug {self.debug_id}")

    @property
    def code(self) -> str:
        """The most telling word: the first issue, else the name."""
        return self.issues[0] if self.issues else self.name

    def names(self, issues: frozenset[str] | Mapping[str, Any]) -> str | None:
        """The first of these issues that the refusal names."""
        return next((each for each in (*self.issues, self.name) if each in issues), None)


def code_of(value: object) -> str:
    """A code as far as it looks like one: nothing else of a body is repeated in our logs."""
    text = str(value)
    return text if re.fullmatch(r"[A-Za-z0-9_.\-]{1,64}", text) else "unreadable"


@dataclass(frozen=True, slots=True)
class Look:
    """The refusal alone does not tell: look for evidence, and without any take `otherwise`."""

    otherwise: Outcome | GatewayError


def verdict_of(refused: PayPalRefused, request: GatewayRequest) -> Outcome | GatewayError | Look:
    """What a refusal of a POST says about `request`.

    A refusal is proof of non-execution only on an operation of which no attempt is unaccounted for; otherwise the lost
    attempt may have caused the very state that is complained about. Declines and expiries are PayPal's word on the
    payment itself, so they are believed at any attempt: a repeated request id returns an earlier success instead.
    """
    if refused.names(IN_PROGRESS) or refused.status == 409:
        return OutcomeUnknown(NAME, f"being executed by another attempt: {refused}")
    if refused.names(NEEDS_PAYER):
        return _needs_payer(refused, request)
    if issue := refused.names(DECLINE_REASONS):
        is_refund = request.kind is OperationKind.REFUND
        reason = DeclineReason.REFUND_FAILED if is_refund else DECLINE_REASONS[issue]
        return Declined(reason, issue, request.reference)
    if refused.status in REFUSED_AT_THE_DOOR or refused.names(LATER):
        return GatewayUnreachable(NAME, str(refused))
    if refused.names(frozenset({"ORDER_EXPIRED"})) and request.reference is not None:
        return Expired(request.reference, "ORDER_EXPIRED")
    return _not_accepted(refused, request)


def _needs_payer(refused: PayPalRefused, request: GatewayRequest) -> Outcome | Look:
    """The order tells where the payer has to go; without an order there is nowhere to send anybody."""
    if request.reference is None:
        return Declined(DeclineReason.AUTHENTICATION_REQUIRED, refused.code)
    return Look(Pending(request.reference))


def _not_accepted(refused: PayPalRefused, request: GatewayRequest) -> Outcome | GatewayError | Look:
    if request.state is not OperationState.DISPATCHED:
        return Look(OutcomeUnknown(NAME, f"refused on a repeated attempt: {refused}"))
    proof = NotExecuted(f"refused by PayPal: {refused.code}", refused.code)
    return Look(proof) if refused.names(STATE_CONFLICTS | ENDED) else proof


# --- the connection -------------------------------------------------------------------------------------------------


class _Token(NamedTuple):
    value: SecretStr
    refresh_at: float
    """By the monotonic clock."""


class PayPalHttp:
    """PayPal's REST API as JSON in and out: bounded connections, one access token for all calls.

    A token is fetched once for everybody who waits, some minutes before the old one ends; many of them are a documented
    cause of rate limits. Nobody waits for longer than that one attempt: if it fails, it fails for all of them.
    https://developer.paypal.com/api/rest/authentication/
    """

    def __init__(self, config: PayPalConfig) -> None:
        self._config = config
        self._token: _Token | None = None
        self._fetching: asyncio.Task[_Token] | None = None
        self._http = ProviderHttp(
            NAME,
            max_connections=config.max_connections,
            timeout_seconds=config.timeout_seconds,
            connect_timeout_seconds=config.connect_timeout_seconds,
            base_url=config.api_base,
        )

    async def get(self, path: str) -> Json | None:
        """The answer to a question, None where PayPal says that there is no such thing.

        Raises:
            GatewayUnreachable: the question did not arrive, or was not admitted.
            OutcomeUnknown: there was no readable answer to it.
        """
        try:
            return await self._call("GET", path)
        except PayPalRefused as refused:
            if refused.status == 404:
                return None
            raise _unanswered(refused) from refused

    async def search(self, since: datetime, until: datetime, page: int) -> Json | None:
        """A page of what PayPal executed in this time, None where that is more than it tells at once.

        Raises:
            GatewayUnreachable, OutcomeUnknown: as for `get`.
        """
        query = {
            "start_date": since.strftime(SEARCH_TIME),
            "end_date": until.strftime(SEARCH_TIME),
            "page_size": str(SEARCH_PAGE),
            "page": str(page),
        }
        try:
            return await self._call("GET", f"/v1/reporting/transactions?{urlencode(query)}")
        except PayPalRefused as refused:
            if refused.names(frozenset({"RESULTSET_TOO_LARGE"})):
                return None
            raise _unanswered(refused) from refused

    async def post(self, path: str, body: Json | None, *, request_id: str) -> Json:
        """The answer to a request that is executed at most once per `request_id`; an empty answer is an empty object.

        Raises:
            PayPalRefused: PayPal said no.
            GatewayUnreachable: proof that this attempt was not executed.
            OutcomeUnknown: no readable answer.
        """
        assert len(request_id) <= 108, "PayPal takes no longer request ids"
        return await self._call("POST", path, body, {"PayPal-Request-Id": request_id})

    def rests_seconds(self) -> float:
        return self._http.rest.seconds()

    def connections(self) -> Connections:
        return self._http.connections()

    async def close(self) -> None:
        await self._http.close()

    async def _call(
        self, method: str, path: str, body: Json | None = None, headers: Mapping[str, str] | None = None
    ) -> Json:
        """A token that is refused is dropped, and the same request goes once more with a new one."""
        token = await self._access_token()
        response = await self._send(method, path, body, headers, token)
        if response.status_code == 401:
            self._drop(token)
            response = await self._send(method, path, body, headers, await self._access_token())
        return _read(response)

    async def _send(
        self, method: str, path: str, body: Json | None, headers: Mapping[str, str] | None, token: _Token
    ) -> httpx.Response:
        sent = {
            "Authorization": f"Bearer {token.value.get_secret_value()}",
            "Content-Type": "application/json",
            "Prefer": "return=representation",
            **(headers or {}),
        }
        content = None if body is None else json.dumps(body, separators=(",", ":")).encode()
        return await self._http.request(method, path, content=content, headers=sent)

    async def _access_token(self) -> _Token:
        """Raises GatewayUnreachable: the attempt to fetch one failed, whoever of those who wait began it."""
        if self._token is not None and time.monotonic() < self._token.refresh_at:
            return self._token
        if self._fetching is None or self._fetching.done():
            self._fetching = asyncio.create_task(self._renew())
            # If all who wait are cancelled, nobody else asks how it ended, and asyncio would log that.
            self._fetching.add_done_callback(lambda task: task.cancelled() or task.exception())
        # Whoever is cancelled takes it from nobody else.
        return await asyncio.shield(self._fetching)

    async def _renew(self) -> _Token:
        self._token = await self._fetch_token()
        return self._token

    def _drop(self, token: _Token) -> None:
        """Unless somebody else has replaced it already."""
        if self._token is token:
            self._token = None

    async def _fetch_token(self) -> _Token:
        """Raises GatewayUnreachable whatever goes wrong: without a token the request itself was not sent."""
        auth = httpx.BasicAuth(self._config.client_id, self._config.client_secret.get_secret_value())
        form = {"grant_type": "client_credentials"}
        try:
            answer = _read(await self._http.request("POST", "/v1/oauth2/token", data=form, auth=auth))
            value, seconds = SecretStr(answer["access_token"]), float(answer["expires_in"])
        except (GatewayError, PayPalRefused) as error:
            raise GatewayUnreachable(NAME, f"no access token: {error}") from error
        except (KeyError, TypeError, ValueError) as error:
            raise GatewayUnreachable(NAME, "the access token cannot be read") from error
        return _Token(value, time.monotonic() + max(seconds - TOKEN_MARGIN_SECONDS, seconds / 2))


def _unanswered(refused: PayPalRefused) -> GatewayError:
    failure = GatewayUnreachable if refused.status in REFUSED_AT_THE_DOOR else OutcomeUnknown
    return failure(NAME, f"no answer to a question: {refused}")


def _read(response: httpx.Response) -> Json:
    """Raises PayPalRefused for a 4xx in PayPal's form, OutcomeUnknown for a 5xx, GatewayContractBroken for the rest."""
    status, body = response.status_code, _json(response.content)
    if response.is_success and (body is not None or not response.content):
        return body or {}
    if status >= 500:
        raise OutcomeUnknown(NAME, f"status {status}, debug {code_of(response.headers.get('paypal-debug-id'))}")
    if response.is_client_error and (status in REFUSED_AT_THE_DOOR or (body and "name" in body)):
        raise PayPalRefused(status, body or {})
    raise GatewayContractBroken(NAME, f"an answer of status {status} cannot be read")


def _json(content: bytes) -> Json | None:
    try:
        read = json.loads(content)
    except (ValueError, RecursionError):
        return None
    return read if isinstance(read, dict) else None


# --- the gateway ----------------------------------------------------------------------------------------------------


class PayPalGateway:
    """PayPal's orders and the payments in them. Create it inside the event loop that uses it.

    The provider's payment (`gateway_payment_id`) is the order, in which the ids of its holds and captures are found.
    A message of an exception never contains a secret or a body.
    """

    name = NAME

    def __init__(self, config: PayPalConfig, clock: Clock = lambda: datetime.now(UTC)) -> None:
        self._config = config
        self._clock = clock
        self._api = PayPalHttp(config)
        self.capabilities = Capabilities(
            operations=frozenset(OperationKind),
            currencies=config.currencies,
            partial_capture=True,
            multi_capture=True,
            partial_refund=True,
            off_session=False,  # a stored wallet (`vault:`) never asks for the payer
            cancel_waiting=True,
            idempotency_retention=timedelta(hours=5),  # PayPal promises 6 for orders, 45 days for what follows them
            listing=Listing.MOVEMENTS,
            limits={code: AmountLimits(minimum_minor=10 ** MINOR_UNITS[code]) for code in WHOLE & config.currencies},
        )

    async def authorize(self, request: GatewayRequest) -> Outcome:
        """Hold `request.amount` for a later capture, or tell where the payer has to consent to that first."""
        return await self._open(request)

    async def charge(self, request: GatewayRequest) -> Outcome:
        """Take `request.amount` at once, or tell where the payer has to consent to that first."""
        return await self._open(request)

    async def capture(self, request: GatewayRequest) -> Outcome:
        """Take `request.amount` of the hold; `request.is_final` releases what is left of it.

        Source: https://developer.paypal.com/docs/api/payments/v2/#authorizations_capture
        """
        try:
            amount = _amount_json(request.amount)
        except AmountNotRepresentable as error:
            return NotExecuted(str(error))
        order = await self._order_before(request)
        found = _understood(read_captures, order, request)
        if not isinstance(found, Unknown):
            return found
        authorization = _understood(_open_hold, order)
        if authorization is None:
            return _without_effect(request, f"order {order['id']} has no hold to capture from", "NO_AUTHORIZATION")
        body = {"amount": amount, "final_capture": request.is_final, "invoice_id": invoice_of(request)}
        path = f"/v2/payments/authorizations/{quoted(authorization['id'])}/capture"
        return await self._post(request, path, body, "capture", read_capture)

    async def void(self, request: GatewayRequest) -> Outcome:
        """Release what is left of the hold, or end an order that the payer has not paid yet.

        For the latter nothing is sent: an order is executed by our own call only, which is never made after this.

        Source: https://developer.paypal.com/docs/api/payments/v2/#authorizations_void
        """
        order = await self._order_before(request)
        found = _understood(_read_release, order, request)
        authorization = _hold(order)
        if authorization is None or isinstance(found, Succeeded):
            return found
        path = f"/v2/payments/authorizations/{quoted(authorization['id'])}/void"

        return await self._post(request, path, None, "void", partial(read_release, authorization["id"]))

    async def refund(self, request: GatewayRequest) -> Outcome:
        """Return `request.amount` of one capture, the smallest that can bear it; PayPal may need days (`Pending`).

        A repeated attempt looks for its own refund first. Should somebody have refunded at PayPal's pages between two
        attempts, so that another capture is chosen, then the request id and the invoice id are still the first one's.

        Source: https://developer.paypal.com/docs/api/payments/v2/#captures_refund
        """
        try:
            amount = _amount_json(request.amount)
        except AmountNotRepresentable as error:
            return NotExecuted(str(error))
        order = await self._order_before(request)
        found = _understood(read_refunds, order, request)
        if not isinstance(found, Unknown):
            return found
        capture = _understood(_refundable, order, request)
        if not isinstance(capture, dict):
            return capture
        body = {"amount": amount, "custom_id": mark_of(request), "invoice_id": invoice_of(request)}
        return await self._post(
            request, f"/v2/payments/captures/{quoted(capture['id'])}/refund", body, "refund", read_refund
        )

    async def resume(self, request: GatewayRequest) -> Outcome:
        """Go on with an order that the payer may have approved: executes it once, however often this is called.

        Of a capture, void or refund it is `status`: PayPal goes on with these by itself.
        """
        if request.kind not in (OperationKind.AUTHORIZE, OperationKind.CHARGE) or request.reference is None:
            return await self.status(request)
        order = await self._order(request.reference)
        return self._gone(request) if order is None else await self._proceed(order, request)

    async def status(self, request: GatewayRequest) -> Outcome:
        """What PayPal shows of this operation. Causes nothing.

        PayPal cannot be searched by our marks, so an order whose id we never learnt is `Unknown`. Nothing of such a one
        moves unless its payment method is vaulted; then the same request id within its time is the way to find it.

        Raises:
            GatewayUnreachable: the question did not arrive.
            OutcomeUnknown: there was no readable answer to it.
        """
        reference = request.gateway_payment_id or request.reference
        if reference is None:
            return Unknown("PayPal shows no order without its id")
        order = await self._order(reference)
        if order is None:
            return self._gone(request)
        match request.kind:
            case OperationKind.AUTHORIZE | OperationKind.CHARGE:
                return _understood(read_opening, order, request)
            case OperationKind.CAPTURE:
                return _understood(read_captures, order, request)
            case OperationKind.VOID:
                return _understood(_read_release, order, request)
            case OperationKind.REFUND:
                return await self._refund_status(order, request)
            case _:
                assert_never(request.kind)

    async def movements(self, since: datetime, until: datetime) -> AsyncIterator[Movement]:
        """Every capture and refund of this time, as Transaction Search tells them: up to three hours late.

        The app at PayPal needs the permission for it.

        Raises:
            GatewayError: the list could not be read to its end.

        Source: https://developer.paypal.com/docs/api/transaction-search/v1/
        """
        seen: set[str] = set()
        begin, end = (each.astimezone(UTC).replace(microsecond=0) for each in (since, until))
        while begin < end:
            stop = min(begin + SEARCH_RANGE, end)
            async for told in self._transactions(begin, stop):
                movement = _understood(_movement, told)
                # A transaction may stand on two pages, if others come while they are read.
                if movement is not None and movement.reference not in seen and begin <= movement.moved_at < stop:
                    seen.add(movement.reference)
                    yield movement
            begin = stop

    def rests_seconds(self) -> float:
        return self._api.rests_seconds()

    def connections(self) -> Connections:
        return self._api.connections()

    async def close(self) -> None:
        """Close the connections."""
        await self._api.close()

    # --- opening ----------------------------------------------------------------------------------------------------

    async def _open(self, request: GatewayRequest) -> Outcome:
        """Create the order, or go on with the one that an earlier attempt created."""
        if request.reference is not None:
            return await self.resume(request)
        try:
            body = self._order_body(request)
        except AmountNotRepresentable as error:
            return NotExecuted(str(error))
        try:
            order = await self._api.post("/v2/checkout/orders", body, request_id=f"{request.provider_key}:order")
        except PayPalRefused as refused:
            return await self._conclude(refused, request)
        return await self._proceed(order, request)

    def _order_body(self, request: GatewayRequest) -> Json:
        unit = {
            "custom_id": mark_of(request),
            "invoice_id": invoice_of(request),
            "amount": _amount_json(request.amount),
        }
        return {
            "intent": "AUTHORIZE" if request.kind is OperationKind.AUTHORIZE else "CAPTURE",
            "purchase_units": [unit],
            "payment_source": {"paypal": self._wallet(request.payment_method)},
        }

    def _wallet(self, payment_method: str | None) -> Json:
        if payment_method is not None and payment_method.startswith(VAULT):
            stored = {
                "payment_initiator": "MERCHANT",
                "usage": "SUBSEQUENT",
                "usage_pattern": "UNSCHEDULED_POSTPAID",
            }
            return {"vault_id": payment_method.removeprefix(VAULT), "stored_credential": stored}
        experience = {
            "return_url": self._config.return_url,
            "cancel_url": self._config.cancel_url,
            "user_action": "PAY_NOW",
            "shipping_preference": "NO_SHIPPING",
        }
        return {"experience_context": experience}

    async def _proceed(self, order: Json, request: GatewayRequest) -> Outcome:
        """Execute an order that is approved; otherwise read what is there."""
        found = _understood(read_opening, order, request)
        if not isinstance(found, Pending) or order["status"] != "APPROVED" or any(_payments(order).values()):
            return found
        try:
            return await self._execute(order["id"], request._replace(reference=order["id"]))
        except GatewayContractBroken:
            raise
        except OutcomeUnknown:
            return Pending(order["id"])

    async def _execute(self, order_id: str, request: GatewayRequest) -> Outcome:
        """Turn the payer's consent into the payment.

        An answer that is lost makes it `Pending`: PayPal has the order, and is asked for it again. A request id that
        PayPal has forgotten does no harm: an order is authorized or captured once.
        """
        step = "authorize" if request.kind is OperationKind.AUTHORIZE else "capture"
        path = f"/v2/checkout/orders/{quoted(order_id)}/{step}"
        try:
            order = await self._api.post(path, {}, request_id=f"{request.provider_key}:{step}")
            return _understood(read_opening, order, request)
        except PayPalRefused as refused:
            # It proves nothing of an earlier call to execute the same order, which may have been lost.
            return await self._conclude(refused, request._replace(state=OperationState.PENDING))

    async def _refund_status(self, order: Json, request: GatewayRequest) -> Outcome:
        """From the order, or by the refund's own id where an earlier answer told it and the order does not list it."""
        found = _understood(read_refunds, order, request)
        if request.reference is None or not isinstance(found, Unknown):
            return found
        refund = await self._api.get(f"/v2/payments/refunds/{quoted(request.reference)}")
        return _understood(read_refund, refund, request) if refund is not None else found

    def _gone(self, request: GatewayRequest) -> Outcome:
        """PayPal denies that the order exists. That it expired is believed while an execution is not in doubt.

        Not before its time can be over: an order that was created a moment ago may not show everywhere at PayPal yet.
        PayPal keeps an order that was paid; for how long is unconfirmed, so an order that is gone after days, when
        nobody looked, is a question for a person.
        """
        began = request.first_dispatched_at
        is_its_time = began is not None and EXPIRY_SHOWS_AFTER <= self._clock() - began < EXPIRY_SHOWS_WITHIN
        if request.state is OperationState.REQUIRES_ACTION and request.reference is not None and is_its_time:
            return Expired(request.reference, "RESOURCE_NOT_FOUND")
        return Unknown("PayPal shows no such order")

    # --- lists ------------------------------------------------------------------------------------------------------

    async def _transactions(self, since: datetime, until: datetime) -> AsyncIterator[Json]:
        """What PayPal tells of this time, which is halved until it is no more than PayPal tells at once."""
        page, pages = 1, 1
        while page <= pages:
            answer = await self._api.search(since, until, page)
            if answer is None and page == 1:
                async for told in self._halves(since, until):
                    yield told
                return
            if answer is None:
                raise OutcomeUnknown(NAME, "the list grew too long while it was read")
            for told in _understood(_told, answer):
                yield told
            page, pages = page + 1, _understood(_pages, answer)

    async def _halves(self, since: datetime, until: datetime) -> AsyncIterator[Json]:
        middle = (since + (until - since) / 2).replace(microsecond=0)
        if middle <= since:
            raise GatewayContractBroken(NAME, "there is more in a second than PayPal tells at once")
        for begin, end in ((since, middle), (middle, until)):
            async for told in self._transactions(begin, end):
                yield told

    # --- shared steps -----------------------------------------------------------------------------------------------

    async def _order(self, reference: str) -> Json | None:
        return await self._api.get(f"/v2/checkout/orders/{quoted(reference)}")

    async def _order_before(self, request: GatewayRequest) -> Json:
        """The order that a capture, void or refund acts on; without it nothing of this attempt was executed.

        Raises:
            GatewayUnreachable: PayPal could not be asked for the order, or does not show it.
        """
        assert request.gateway_payment_id is not None, "a capture, void or refund acts on a payment known to PayPal"
        try:
            order = await self._order(request.gateway_payment_id)
        except GatewayError as error:
            raise GatewayUnreachable(NAME, f"nothing was executed: {error.message}") from error
        if order is None:
            raise GatewayUnreachable(NAME, "nothing was executed: PayPal shows no such order")
        return order

    async def _post(
        self,
        request: GatewayRequest,
        path: str,
        body: Json | None,
        step: str,
        read: Callable[[Json, GatewayRequest], Outcome],
    ) -> Outcome:
        """Send with the operation's key and read the answer, or say what is known without one."""
        try:
            answer = await self._api.post(path, body, request_id=f"{request.provider_key}:{step}")
        except PayPalRefused as refused:
            return await self._conclude(refused, request)
        return _understood(read, answer, request)

    async def _conclude(self, refused: PayPalRefused, request: GatewayRequest) -> Outcome:
        verdict = verdict_of(refused, request)
        if isinstance(verdict, Look):
            return await self._look(request, verdict.otherwise, refused)
        if isinstance(verdict, GatewayError):
            raise verdict from refused
        return verdict

    async def _look(
        self, request: GatewayRequest, otherwise: Outcome | GatewayError, refused: PayPalRefused
    ) -> Outcome:
        """Evidence of this operation at PayPal, else `otherwise`. Not being able to look is no proof of anything."""
        try:
            found = await self.status(request)
        except GatewayError as failure:
            raise OutcomeUnknown(NAME, f"{refused}; no evidence: {failure.message}") from failure
        if not isinstance(found, Unknown):
            return found
        if isinstance(otherwise, GatewayError):
            raise otherwise from refused
        return otherwise


def _amount_json(money: Money) -> Json:
    return {"currency_code": money.currency, "value": to_paypal_value(money)}


def quoted(reference: str) -> str:
    return quote(reference, safe="")


def _understood(read: Callable[P, T], *answer: P.args, **options: P.kwargs) -> T:
    """The answer as read.

    Raises:
        GatewayContractBroken: the answer lacks what it must have.
    """
    try:
        return read(*answer, **options)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise GatewayContractBroken(NAME, f"the answer has an unexpected shape ({type(error).__name__})") from error


def _without_effect(request: GatewayRequest, message: str, code: str | None = None) -> Outcome:
    """Nothing was sent. That proves it for the operation only if no earlier attempt is unaccounted for."""
    if request.state is OperationState.DISPATCHED:
        return NotExecuted(message, code)
    return Unknown(f"on a repeated attempt: {message}")


def _read_waiting(order: Json, request: GatewayRequest) -> Outcome:
    """An order without a hold, of which a void asks: while it waits for our own second call, nothing moves."""
    if any(_payments(order).values()):
        return _without_effect(request, f"order {order['id']} has no hold to release", "NO_AUTHORIZATION")
    if order["status"] in ("CREATED", "SAVED", "PAYER_ACTION_REQUIRED", "APPROVED", "VOIDED"):
        return Succeeded(order["id"])
    return Unknown(f"order {order['id']} is {code_of(order['status'])} and shows no payment")


def _read_release(order: Json, request: GatewayRequest) -> Outcome:
    hold = _hold(order)
    return read_void(hold, order, request) if hold is not None else _read_waiting(order, request)


def _hold(order: Json) -> Json | None:
    """The authorization that counts: one that is open, else the last that PayPal lists."""
    holds = _payments(order)["authorizations"]
    return _open_hold(order) or (holds[-1] if holds else None)


def _open_hold(order: Json) -> Json | None:
    """The authorization to act on. Only one whose status rules it out for good is passed over."""
    holds = [each for each in _payments(order)["authorizations"] if each["status"] not in ("VOIDED", "DENIED")]
    return holds[-1] if holds else None


def _only(objects: list[Json], request: GatewayRequest, *marks: tuple[str, str]) -> Json | None:
    """The one that carries one of these marks or is what an earlier answer named.

    Raises:
        GatewayContractBroken: several do, so that one operation was executed more than once.
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


def _refundable(order: Json, request: GatewayRequest) -> Json | Outcome:
    """The capture that is to bear the refund: of those that can, the one with the least left, then the lowest id.

    Where no capture was ever large enough, no earlier attempt can have been executed either.
    """
    wanted, currency = request.amount.minor, request.amount.currency
    left = sorted((_left_of(each, order, request), each["id"], each) for each in _taken(order))
    able = [capture for rest, _, capture in left if rest >= wanted]
    if able:
        return able[0]
    message = f"no single capture of order {order['id']} has {request.amount} left to refund; ask for smaller refunds"
    if left and all(from_paypal_amount(each["amount"], currency) < wanted for _, _, each in left):
        return NotExecuted(message, "REFUND_AMOUNT_EXCEEDED")
    return _without_effect(request, message, "REFUND_AMOUNT_EXCEEDED")


def _left_of(capture: Json, order: Json, request: GatewayRequest) -> int:
    currency = request.amount.currency
    gone = [
        from_paypal_amount(each["amount"], currency)
        for each in _payments(order)["refunds"]
        if each["status"] not in ("FAILED", "CANCELLED") and linked_id(each, "/captures/") == capture["id"]
    ]
    return from_paypal_amount(capture["amount"], currency) - sum(gone)


def linked_id(stored: Json, path: str) -> str | None:
    """The id of what this is a part of, from its link `up`."""
    for link in stored.get("links") or ():
        if link.get("rel") == "up" and path in str(link.get("href")):
            return str(link["href"]).rsplit("/", 1)[-1]
    return None


# --- lists ----------------------------------------------------------------------------------------------------------

SEARCH_TIME: Final = "%Y-%m-%dT%H:%M:%SZ"
SEARCH_PAGE: Final = 500
SEARCH_RANGE: Final = timedelta(days=31)
"""The longest time of one question, and the largest page."""

RECEIVED: Final = "T00"
REFUNDED: Final = "T1107"
"""Event codes: a payment from account to account, of which we see both directions, and a refund by the merchant.

Others are fees, disputes, reversals by PayPal, holds. Source:
https://developer.paypal.com/docs/transaction-search/transaction-event-codes/.
"""
EXECUTED: Final = frozenset({"S", "V"})
"""Transaction statuses: successful, and successful but refunded in full since. Pending and denied moved nothing."""


def _told(answer: Json) -> list[Json]:
    return [each["transaction_info"] for each in answer.get("transaction_details") or ()]


def _pages(answer: Json) -> int:
    return int(answer.get("total_pages") or 0)


def _movement(told: Json) -> Movement | None:
    """A capture or refund, None for what is neither, or has not been executed.

    What is reported of a refund may be the marks of its capture, so the kind in the mark has to agree; the movement is
    then known by its id, which is also the refund's.
    """
    code, amount = str(told["transaction_event_code"]), told["transaction_amount"]
    is_refund, is_negative = code == REFUNDED, str(amount["value"]).startswith("-")
    if told["transaction_status"] not in EXECUTED or not (is_refund or code.startswith(RECEIVED)):
        return None
    if is_refund != is_negative:
        return None  # Money that we sent, or a refund that came back to us.
    own, inherited = read_mark(told.get("invoice_id")), read_mark(told.get("custom_field"))
    marks, kinds = own or inherited, (OperationKind.REFUND,) if is_refund else CAPTURES
    moved_at = time_of(told["transaction_initiation_date"])
    if moved_at is None:
        raise GatewayContractBroken(NAME, "a transaction without a time")
    return Movement(
        reference=str(told["transaction_id"]),
        moved_at=moved_at,
        is_refund=is_refund,
        currency=str(amount["currency_code"]),
        amount_minor=minor_of({**amount, "value": str(amount["value"]).removeprefix("-")}),
        payment_id=marks.payment_id if marks else None,
        operation_number=own.operation_number if own is not None and own.kind in kinds else None,
    )
