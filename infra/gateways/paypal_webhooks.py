"""PayPal's webhooks: how they are verified, and what each of its events says.

Offline, against the certificate that PayPal signs with. What is not about money of ours brings no outcome; money that
moved without a mark of ours is told as such (docs/decisions/0012). Sources:
https://developer.paypal.com/api/rest/webhooks/rest/, https://developer.paypal.com/api/rest/webhooks/event-names/.
"""

import asyncio
import base64
import binascii
import json
import re
import time
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Final, NamedTuple, TypeVar
from urllib.parse import urlsplit
from uuid import UUID

import httpx
from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa

from domain.commands import OperationKind
from domain.errors import GatewayContractBroken, GatewayError
from domain.money import Money
from domain.notices import (
    BODY_BYTES_MAX,
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

T = TypeVar("T")

AGE_MAX: Final = timedelta(days=7)
"""Twice as long as PayPal repeats, and no longer: who has seen the headers of one message could sign others by it."""
CERTIFICATE_BYTES_MAX: Final = 65_536
CERTIFICATES_MAX: Final = 16
WAITING_MAX: Final = 20
"""How many messages may wait for a certificate, each with its body: until it is there, they are anybody's."""
REFUSED_SECONDS: Final = 60.0
REFUSED_MAX: Final = 1_000
"""For how long, and of how many addresses, it is remembered that PayPal has no certificate there."""
CERTIFICATE_PATH: Final = r"/v1/notifications/certs/[A-Za-z0-9_\-]{1,128}"
ALGORITHM: Final = "SHA256withRSA"
QUESTIONS_MAX: Final = 4
"""How many refunds at a time are asked about; those beyond wait, or are sent again by PayPal."""

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
"""PayPal sends again, for three days, what was answered with anything but a 2xx."""


class _Signature(NamedTuple):
    """What the headers of a webhook claim. All of it is the sender's word until the signature is verified."""

    transmission_id: str
    transmission_time: str
    cert_url: str
    signature: bytes

    def message(self, webhook_id: str, body: bytes) -> bytes:
        """What was signed: the checksum is that of the raw body, as an unsigned decimal number."""
        return f"{self.transmission_id}|{self.transmission_time}|{webhook_id}|{zlib.crc32(body)}".encode()


class PayPalWebhooks:
    """PayPal's webhooks: verified offline against the certificate that PayPal signs with, then read.

    PayPal repeats for three days, and whether a repetition carries a new time is unconfirmed, so that a webhook is
    refused for its age only after `AGE_MAX`. Every message is evidence of a state, and an old one that comes again
    changes nothing; but what PayPal signs is no more than a checksum of the body, for which others can be made.

    That the certificate is PayPal's follows from where it is fetched, over TLS from an exact host; whether it also
    chains to a public authority, and under which subject, is unconfirmed and not demanded.

    Anybody may name an address of PayPal's at which there is no certificate. So few may wait for one, the others are
    told to come again, and what PayPal refused is not asked for again soon.

    A refund that somebody made at PayPal's pages names no order, so PayPal is asked for its capture, which does.

    Source: https://developer.paypal.com/api/rest/webhooks/rest/#verification-of-webhook-notification.
    """

    gateway = NAME

    def __init__(self, config: PayPalConfig) -> None:
        if not config.webhook_id:
            raise ValueError("PayPal's webhooks cannot be verified without webhook_id")
        self._config = config
        self._trusted = _trusted_urls(config)
        self._certificates: dict[str, x509.Certificate] = {}
        self._refused: dict[str, float] = {}
        """Until when each is refused unasked, by the monotonic clock; the oldest first."""
        self._fetching = asyncio.Lock()
        self._waiting = 0
        self._api = PayPalHttp(config.model_copy(update={"max_connections": QUESTIONS_MAX}))
        self._http = httpx.AsyncClient(
            timeout=config.connect_timeout_seconds,
            limits=httpx.Limits(max_connections=2, max_keepalive_connections=1),
            follow_redirects=False,
            trust_env=False,
        )

    async def read(self, request: WebhookRequest) -> Notice:
        """Verify the signature over the raw body, then read it.

        Raises:
            WebhookRefused: TOO_LARGE, FORGED, STALE, MALFORMED, or UNAVAILABLE where the certificate could not be
                fetched, or PayPal could not be asked what a refund is of.
        """
        if len(request.body) > BODY_BYTES_MAX:
            raise WebhookRefused(Verdict.TOO_LARGE, f"{len(request.body)} bytes")
        signature = _signature(request.headers)
        if not self._trusted.fullmatch(signature.cert_url):
            raise WebhookRefused(Verdict.FORGED, "the certificate's address is not one of PayPal's")
        certificate = await self._certificate(signature.cert_url)
        _verify(certificate, signature, self._config.webhook_id, request)
        _check_age(signature, request)
        with _malformed_unless_read():
            return read_event(await self._placed(json.loads(request.body)))

    def answer(self, verdict: Verdict, request: WebhookRequest) -> WebhookAnswer:
        """The status alone; PayPal reads no more of an answer."""
        return WebhookAnswer(ANSWERS[verdict])

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()
        await self._api.close()

    async def _placed(self, event: Json) -> Json:
        """The event, with what only the capture tells of a refund. Without it, it is read as it came."""
        capture_id = _unplaced_refund(event) or await self._capture_of(_nameless_refund(event))
        capture = await self._told("captures", capture_id)
        return event if capture is None else {**event, "resource": _refund_of(capture, event["resource"])}

    async def _capture_of(self, refund_id: str | None) -> str | None:
        refund = await self._told("refunds", refund_id)
        return None if refund is None else linked_id(refund, "/captures/")

    async def _told(self, kind: str, reference: str | None) -> Json | None:
        """Not being able to ask is no answer: PayPal then sends the message again, and nothing is lost."""
        if reference is None:
            return None
        try:
            return await self._api.get(f"/v2/payments/{kind}/{quoted(reference)}")
        except GatewayError as error:
            raise WebhookRefused(Verdict.UNAVAILABLE, f"what was refunded: {error.message}") from error

    async def _certificate(self, url: str) -> x509.Certificate:
        """The certificate at a trusted address, from memory where possible; one at a time is fetched."""
        if (known := self._remembered(url)) is not None:
            return known
        if self._waiting >= WAITING_MAX:
            raise WebhookRefused(Verdict.UNAVAILABLE, "too many wait for a certificate")
        self._waiting += 1
        try:
            async with self._fetching:
                return self._remembered(url) or await self._fetched(url)
        finally:
            self._waiting -= 1

    def _remembered(self, url: str) -> x509.Certificate | None:
        """Raises WebhookRefused(FORGED) where there was none a moment ago."""
        certificate = self._certificates.get(url)
        if certificate is None and time.monotonic() < self._refused.get(url, 0.0):
            raise WebhookRefused(Verdict.FORGED, "no such certificate a moment ago")
        return certificate

    async def _fetched(self, url: str) -> x509.Certificate:
        try:
            certificate = await self._fetch(url)
        except WebhookRefused as refused:
            if refused.verdict is Verdict.FORGED:
                _put(self._refused, url, time.monotonic() + REFUSED_SECONDS, at_most=REFUSED_MAX)
            raise
        _put(self._certificates, url, certificate, at_most=CERTIFICATES_MAX)
        return certificate

    async def _fetch(self, url: str) -> x509.Certificate:
        try:
            async with asyncio.timeout(self._config.timeout_seconds), self._http.stream("GET", url) as answer:
                if answer.status_code >= 500 or answer.status_code == 429:
                    raise WebhookRefused(Verdict.UNAVAILABLE, f"the certificate: status {answer.status_code}")
                if answer.status_code != 200:
                    raise WebhookRefused(Verdict.FORGED, f"no such certificate: status {answer.status_code}")
                pem = await _limited(answer)
        except (httpx.HTTPError, TimeoutError) as error:
            raise WebhookRefused(Verdict.UNAVAILABLE, f"the certificate: {type(error).__name__}") from error
        return _certificate(pem)


def _put(memory: dict[str, T], url: str, value: T, *, at_most: int) -> None:
    """As the newest one; the oldest one gives way."""
    memory.pop(url, None)
    if len(memory) >= at_most:
        del memory[next(iter(memory))]
    memory[url] = value


def _trusted_urls(config: PayPalConfig) -> re.Pattern[str]:
    """Addresses that a signing certificate may come from, exactly: the header that names one is anybody's word."""
    if config.is_simulated and config.cert_hosts is None:
        return re.compile(re.escape(config.api_base) + CERTIFICATE_PATH)
    own = urlsplit(config.api_base).hostname or ""
    hosts = config.cert_hosts or frozenset({own, own.replace("api-m.", "api.", 1)})
    names = "|".join(re.escape(host) for host in sorted(hosts))
    return re.compile(f"https://(?:{names}){CERTIFICATE_PATH}")


def _signature(headers: Mapping[str, str]) -> _Signature:
    """Raises WebhookRefused(FORGED) where a header is missing or not of its form."""
    try:
        if headers["paypal-auth-algo"] != ALGORITHM:
            raise WebhookRefused(Verdict.FORGED, "another signature algorithm")
        given = base64.b64decode(headers["paypal-transmission-sig"], validate=True)
        sent_id, sent_at = headers["paypal-transmission-id"], headers["paypal-transmission-time"]
        return _Signature(sent_id, sent_at, headers["paypal-cert-url"], given)
    except (KeyError, binascii.Error, ValueError) as error:
        raise WebhookRefused(Verdict.FORGED, f"a signature header is missing or unreadable: {error!r:.80}") from error


def _check_age(signature: _Signature, request: WebhookRequest) -> None:
    """Raises WebhookRefused(STALE) for what was signed long ago, or at no time that can be read."""
    sent_at = time_of(signature.transmission_time)
    if sent_at is None or request.received_at - sent_at > AGE_MAX:
        raise WebhookRefused(Verdict.STALE, "signed too long ago")


async def _limited(answer: httpx.Response) -> bytes:
    read = b""
    async for chunk in answer.aiter_bytes():
        read += chunk
        if len(read) > CERTIFICATE_BYTES_MAX:
            raise WebhookRefused(Verdict.FORGED, "the certificate is too large")
    return read


def _certificate(pem: bytes) -> x509.Certificate:
    """The first one of what was served; any others would be its chain."""
    try:
        return x509.load_pem_x509_certificates(pem)[0]
    except (ValueError, IndexError) as error:
        raise WebhookRefused(Verdict.FORGED, "the certificate cannot be read") from error


def _verify(certificate: x509.Certificate, signature: _Signature, webhook_id: str, request: WebhookRequest) -> None:
    """Raises WebhookRefused(FORGED) unless the certificate's key signed exactly this, while it was valid."""
    if not certificate.not_valid_before_utc <= request.received_at <= certificate.not_valid_after_utc:
        raise WebhookRefused(Verdict.FORGED, "the certificate is not valid now")
    try:
        key = certificate.public_key()
        if not isinstance(key, rsa.RSAPublicKey):
            raise WebhookRefused(Verdict.FORGED, "the certificate has no RSA key")
        message = signature.message(webhook_id, request.body)
        key.verify(signature.signature, message, padding.PKCS1v15(), hashes.SHA256())
    except (InvalidSignature, UnsupportedAlgorithm, ValueError) as error:
        raise WebhookRefused(Verdict.FORGED, "the signature is wrong") from error


@contextmanager
def _malformed_unless_read() -> Iterator[None]:
    """Raises WebhookRefused(MALFORMED) for a body that is signed but makes no sense."""
    try:
        yield
    except (GatewayContractBroken, AttributeError, LookupError, TypeError, ValueError, RecursionError) as error:
        raise WebhookRefused(Verdict.MALFORMED, f"{type(error).__name__} while reading the event") from error


REFUND_EVENTS: Final = ("PAYMENT.CAPTURE.REFUNDED", "PAYMENT.REFUND.")
REVERSAL: Final = "PAYMENT.CAPTURE.REVERSED"
"""PayPal gave money back to the payer. The resource is a refund with a link to its capture, in PayPal's own sample of
it, which has no marks; whether it can be the capture itself is unconfirmed, and makes no difference here."""
MARKED: Final = ("custom_id", "invoice_id")
CAPTURE_EVENTS: Final = frozenset(f"PAYMENT.CAPTURE.{what}" for what in ("COMPLETED", "PENDING", "DECLINED", "DENIED"))
"""Those whose resource is the capture itself."""


def read_event(event: Json) -> Notice:
    """What an event says. Types that say nothing about money of ours, and unknown ones, bring no outcome.

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
    """The payer approved: nothing is held before our own second call, which is due now."""
    unit = (order.get("purchase_units") or [{}])[0]
    marks = read_mark(unit.get("custom_id"))
    return notice._replace(
        payment_id=marks.payment_id if marks else None,
        operation_number=marks.operation_number if marks else None,
        gateway_payment_id=str(order["id"]),
        is_ripe=notice.type == "CHECKOUT.ORDER.APPROVED",
    )


def _payment_notice(notice: Notice, resource: Json, kinds: tuple[OperationKind, ...]) -> Notice:
    """Evidence about the operation that the invoice id names, if it is one that makes such a resource.

    Somebody else's refund at PayPal's pages may carry over the invoice id of the capture, and captures carry over the
    `custom_id` of their hold, so the kind in the mark has to agree. `custom_id` alone only names the payment: then it
    is somebody else's, or ours of which PayPal did not repeat the invoice id.
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
    """A refund that our refunds have not marked, or a capture of a hold that our captures have not.

    Captures always carry over the mark of their order, so one without it is of somebody else's order.
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
    """What PayPal took back, whoever's marks it carries over."""
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
    """The capture that was refunded, where it has to be asked for: PayPal promises no order's id in a refund.

    Its mark as one of ours is enough. That the link `up` is there, and leads to the capture, PayPal's samples show, and
    no document promises; without it the refund is of the payment that `custom_id` names.
    """
    resource = event["resource"]
    if not str(event["event_type"]).startswith((*REFUND_EVENTS, REVERSAL)) or _order_of(resource) is not None:
        return None
    own = read_mark(resource.get("invoice_id"))
    return None if own is not None and own.kind is OperationKind.REFUND else linked_id(resource, "/captures/")


def _nameless_refund(event: Json) -> str | None:
    """A refund that leads to nothing, not even to its capture: PayPal's own answer about it has that link."""
    refund = event["resource"]
    if not str(event["event_type"]).startswith((*REFUND_EVENTS, REVERSAL)) or _order_of(refund) is not None:
        return None
    is_placed = linked_id(refund, "/captures/") or any(read_mark(refund.get(name)) for name in MARKED)
    return None if is_placed else str(refund["id"])


def _refund_of(capture: Json, refund: Json) -> Json:
    """The refund as if it told what its capture does: the order, and the mark that names our payment.

    Source: `capture-2` and `refund` of the Payments v2 reference; only the capture has `supplementary_data`.
    """
    marks = {"custom_id": capture["custom_id"]} if read_mark(capture.get("custom_id")) else {}
    return {**refund, **marks, "supplementary_data": {"related_ids": {"order_id": _order_of(capture)}}}


def _event_outcome(kind: OperationKind, resource: Json, order_id: str | None) -> Outcome | None:
    """As an answer would be read; an opening is referred to by its order, so without the order's id nothing is said."""
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
"""What the status tables need to know of a request, filled in from the resource itself."""


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
"""By `dispute_outcome.outcome_code`. Who paid for RESOLVED_WITH_PAYOUT the message does not say: it stays open.

ACCEPTED and DENIED are unconfirmed: read as our acceptance of the claim, and as PayPal's denial of it. Source:
https://developer.paypal.com/docs/api/customer-disputes/v1/.
"""


def _dispute_notice(notice: Notice, resource: Json) -> Notice:
    """Disputes name the transaction, not the order: our payment is known by the mark that the transaction carries.

    What was lost is what the payer got back, where PayPal tells it, which may be a part of what was disputed.
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
