"""PayPal's signature over a webhook, verified offline against the certificate that PayPal signs with.

A certificate counts as PayPal's because it is fetched over TLS from an exact host. Whether it also chains to a public
authority, and under which subject, is unconfirmed and not required.

Source: https://developer.paypal.com/api/rest/webhooks/rest/#verification-of-webhook-notification.
"""

import asyncio
import base64
import binascii
import re
import time
import zlib
from collections.abc import Mapping
from datetime import timedelta
from typing import Final, NamedTuple, TypeVar
from urllib.parse import urlsplit

import httpx
from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa

from domain.notices import BODY_BYTES_MAX, Verdict, WebhookRefused, WebhookRequest
from infra.gateways.paypal_http import PayPalConfig
from infra.gateways.paypal_objects import time_of

T = TypeVar("T")

AGE_MAX: Final = timedelta(days=7)
"""Twice as long as PayPal retries, and no longer: an attacker who saw the headers of one message could forge others."""
CERTIFICATE_BYTES_MAX: Final = 65_536
CERTIFICATES_MAX: Final = 16
WAITING_MAX: Final = 20
"""How many messages may wait for a certificate, each with its body: until it is fetched, anybody may have sent them."""
REFUSED_SECONDS: Final = 60.0
REFUSED_MAX: Final = 1_000
"""For how long, and for how many addresses, we remember that PayPal serves no certificate there."""
CERTIFICATE_PATH: Final = r"/v1/notifications/certs/[A-Za-z0-9_\-]{1,128}"
ALGORITHM: Final = "SHA256withRSA"


class _Signature(NamedTuple):
    """What the headers of a webhook claim; unproven until the signature is verified."""

    transmission_id: str
    transmission_time: str
    cert_url: str
    signature: bytes

    def message(self, webhook_id: str, body: bytes) -> bytes:
        """The text that is signed. It has the CRC-32 of the raw body, as an unsigned decimal number."""
        return f"{self.transmission_id}|{self.transmission_time}|{webhook_id}|{zlib.crc32(body)}".encode()


class PayPalSignatures:
    """Verifies webhooks; remembers the certificates, and the addresses that have none.

    PayPal retries for three days, and whether a retry carries a new time is unconfirmed, so a webhook is refused as too
    old only after `AGE_MAX`. Every message is evidence of a state, so repeating an old one changes nothing. But PayPal
    signs only a CRC-32 of the body, and other bodies can be made with the same one.

    Anybody can send an address at PayPal that has no certificate. So only a few messages may wait for a certificate,
    the others are answered with 503, and an address that PayPal refused is not tried again for `REFUSED_SECONDS`.
    """

    def __init__(self, config: PayPalConfig) -> None:
        if not config.webhook_id:
            raise ValueError("PayPal's webhooks cannot be verified without webhook_id")
        self._config = config
        self._trusted = _trusted_urls(config)
        self._certificates: dict[str, x509.Certificate] = {}
        self._refused: dict[str, float] = {}
        """Until when each address is refused without a request, by the monotonic clock; the oldest first."""
        self._fetching = asyncio.Lock()
        self._waiting = 0
        self._http = httpx.AsyncClient(
            timeout=config.connect_timeout_seconds,
            limits=httpx.Limits(max_connections=2, max_keepalive_connections=1),
            follow_redirects=False,
            trust_env=False,
        )

    async def verify(self, request: WebhookRequest) -> None:
        """Return only if PayPal signed this very body, not too long ago.

        Raises:
            WebhookRefused: TOO_LARGE, FORGED or STALE; or UNAVAILABLE if the certificate could not be fetched.
        """
        if len(request.body) > BODY_BYTES_MAX:
            raise WebhookRefused(Verdict.TOO_LARGE, f"{len(request.body)} bytes")
        signature = _signature(request.headers)
        if not self._trusted.fullmatch(signature.cert_url):
            raise WebhookRefused(Verdict.FORGED, "the certificate's address is not one of PayPal's")
        certificate = await self._certificate(signature.cert_url)
        _verify(certificate, signature, self._config.webhook_id, request)
        _check_age(signature, request)

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def _certificate(self, url: str) -> x509.Certificate:
        """The certificate at a trusted address, from memory if possible; fetches run one at a time."""
        if (known := self._remembered(url)) is not None:
            return known
        if self._waiting >= WAITING_MAX:
            raise WebhookRefused(Verdict.UNAVAILABLE, "too many webhooks wait for a certificate")
        self._waiting += 1
        try:
            async with self._fetching:
                return self._remembered(url) or await self._fetched(url)
        finally:
            self._waiting -= 1

    def _remembered(self, url: str) -> x509.Certificate | None:
        """Raises WebhookRefused(FORGED) if PayPal had no certificate there a moment ago."""
        certificate = self._certificates.get(url)
        if certificate is None and time.monotonic() < self._refused.get(url, 0.0):
            raise WebhookRefused(Verdict.FORGED, "there was no such certificate a moment ago")
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
    """Store as the newest; if full, the oldest is dropped."""
    memory.pop(url, None)
    if len(memory) >= at_most:
        del memory[next(iter(memory))]
    memory[url] = value


def _trusted_urls(config: PayPalConfig) -> re.Pattern[str]:
    """The exact addresses that a signing certificate may come from: anybody can write the header that names one."""
    if config.is_simulated and config.cert_hosts is None:
        return re.compile(re.escape(config.api_base) + CERTIFICATE_PATH)
    own = urlsplit(config.api_base).hostname or ""
    hosts = config.cert_hosts or frozenset({own, own.replace("api-m.", "api.", 1)})
    names = "|".join(re.escape(host) for host in sorted(hosts))
    return re.compile(f"https://(?:{names}){CERTIFICATE_PATH}")


def _signature(headers: Mapping[str, str]) -> _Signature:
    """Raises WebhookRefused(FORGED) if a header is missing or malformed."""
    try:
        if headers["paypal-auth-algo"] != ALGORITHM:
            raise WebhookRefused(Verdict.FORGED, "another signature algorithm")
        given = base64.b64decode(headers["paypal-transmission-sig"], validate=True)
        sent_id, sent_at = headers["paypal-transmission-id"], headers["paypal-transmission-time"]
        return _Signature(sent_id, sent_at, headers["paypal-cert-url"], given)
    except (KeyError, binascii.Error, ValueError) as error:
        raise WebhookRefused(Verdict.FORGED, f"a signature header is missing or unreadable: {error!r:.80}") from error


def _check_age(signature: _Signature, request: WebhookRequest) -> None:
    """Raises WebhookRefused(STALE) if it was sent longer than `AGE_MAX` ago, or its time cannot be read."""
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
    """The first certificate in the file; any others would be its chain."""
    try:
        return x509.load_pem_x509_certificates(pem)[0]
    except (ValueError, IndexError) as error:
        raise WebhookRefused(Verdict.FORGED, "the certificate cannot be read") from error


def _verify(certificate: x509.Certificate, signature: _Signature, webhook_id: str, request: WebhookRequest) -> None:
    """Raises WebhookRefused(FORGED) unless a certificate that is valid now signed exactly this message."""
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
