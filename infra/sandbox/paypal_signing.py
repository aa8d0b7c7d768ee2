"""Signs the PayPal simulator's webhooks, with its own key and a certificate for it, created when first needed.

Source: https://developer.paypal.com/api/rest/webhooks/rest/#verification-of-webhook-notification.
"""

import base64
import zlib
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from uuid import uuid4

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.x509.oid import NameOID

CERTIFICATES = "/v1/notifications/certs/"


@dataclass(slots=True)
class Signer:
    """Signs with one certificate, whose id changes with every start of the simulator."""

    cert_id: str = field(default_factory=lambda: f"CERT-{uuid4().hex[:24]}")
    _key: rsa.RSAPrivateKey | None = None
    _pem: bytes = b""

    def headers(self, body: bytes, *, transmission_id: str, webhook_id: str, base_url: str) -> dict[str, str]:
        """The headers of one attempt to send `body`."""
        sent_at = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        message = _message(transmission_id, sent_at, webhook_id, body)
        signature = self._private().sign(message, padding.PKCS1v15(), hashes.SHA256())
        return {
            "PAYPAL-TRANSMISSION-ID": transmission_id,
            "PAYPAL-TRANSMISSION-TIME": sent_at,
            "PAYPAL-TRANSMISSION-SIG": base64.b64encode(signature).decode(),
            "PAYPAL-CERT-URL": f"{base_url}{CERTIFICATES}{self.cert_id}",
            "PAYPAL-AUTH-ALGO": "SHA256withRSA",
            "Content-Type": "application/json",
        }

    def is_signed(self, *, transmission_id: str, sent_at: str, webhook_id: str, body: bytes, signature: str) -> bool:
        """Whether PayPal's own verification accepts the signature."""
        message = _message(transmission_id, sent_at, webhook_id, body)
        try:
            key = self._private().public_key()
            key.verify(base64.b64decode(signature), message, padding.PKCS1v15(), hashes.SHA256())
        except (InvalidSignature, ValueError):
            return False
        return True

    def pem(self) -> bytes:
        """The certificate, as PEM."""
        self._private()
        return self._pem

    def _private(self) -> rsa.RSAPrivateKey:
        if self._key is None:
            self._key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
            self._pem = _certificate(self._key)
        return self._key


def _message(transmission_id: str, sent_at: str, webhook_id: str, body: bytes) -> bytes:
    return "|".join((transmission_id, sent_at, webhook_id, str(zlib.crc32(body)))).encode()


def _certificate(key: rsa.RSAPrivateKey) -> bytes:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "paypal-sandbox.invalid")])
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    builder = builder.serial_number(x509.random_serial_number())
    builder = builder.not_valid_before(now - timedelta(days=1)).not_valid_after(now + timedelta(days=3650))
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
