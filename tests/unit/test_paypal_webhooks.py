"""PayPal's webhooks: the published signature scheme with a known answer, what is refused, and what each event says.

The test vector was made with its own key and confirmed by `openssl dgst -sha256 -verify`.
"""

import asyncio
import base64
import json
import zlib
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from types import SimpleNamespace
from typing import Any
from uuid import UUID

import httpx
import pytest
from pydantic import SecretStr

from domain.commands import OperationKind
from domain.notices import (
    BODY_BYTES_MAX,
    Dispute,
    DisputeStage,
    External,
    Notice,
    Verdict,
    WebhookRefused,
    WebhookRequest,
)
from domain.operations import Declined, DeclineReason, Expired, Outcome, Pending, Succeeded
from infra.gateways import paypal_signatures
from infra.gateways.paypal import PayPalConfig
from infra.gateways.paypal_http import SANDBOX, Json
from infra.gateways.paypal_signatures import CERTIFICATE_BYTES_MAX, WAITING_MAX, PayPalSignatures
from infra.gateways.paypal_webhooks import (
    PayPalWebhooks,
    _nameless_refund,
    _refund_of,
    _unplaced_refund,
    read_event,
)

WEBHOOK_ID = "1JE4291016473214C"
BODY = (
    b'{"id":"WH-KAV-1","event_version":"1.0","create_time":"2026-11-22T20:00:00.000Z","resource_type":"capture",'
    b'"resource_version":"2.0","event_type":"PAYMENT.CAPTURE.COMPLETED","summary":"Payment completed for $ 10.99 USD",'
    b'"resource":{"id":"3C679366HH908993F","status":"COMPLETED","amount":{"currency_code":"USD","value":"10.99"},'
    b'"final_capture":true,"custom_id":"order-42","supplementary_data":{"related_ids":{"order_id":"5O190127TN364715T",'
    b'"authorization_id":"0AW2184448108334S"}}}}'
)
SIGNATURE = (
    "HN5V9iIemQkteM0boa6Qq4PkfHQKzr6kM4qbbE+8TmUxZ32kvss+l4F3DQWdQJGIpO+ZlI4/THcyDmEkBTPTinilvRjqon3UPqPFO++WxjCMvJnfo"
    "/TjMAtrjrZLWye6j97SCGxymZ6SMw0YrJDTetYRyDzMhwjkXSHc+vBHapw0VL5mzcRdn3bO1MMlzGIUd7yNDbBMTFV9Kyl8IHSzRzfCiTXt2QCjBV"
    "StOUmUbshA+2eS+K7nJLpXsh1w8xYQM0QhyZ4PmuNHWfJG53IxQmqSpt5EjIQ4HwjZ8qm73Bu/rOe86LdTyFE+fWYjPGZdEAI2r4nUJitMp/gNeK21jA=="
)
CERTIFICATE = b"""-----BEGIN CERTIFICATE-----
MIICvTCCAaWgAwIBAgIBATANBgkqhkiG9w0BAQsFADAiMSAwHgYDVQQDDBdwYXlw
YWwtd2ViaG9vay1rYXYudGVzdDAeFw0yNjAxMDEwMDAwMDBaFw00NjAxMDEwMDAw
MDBaMCIxIDAeBgNVBAMMF3BheXBhbC13ZWJob29rLWthdi50ZXN0MIIBIjANBgkq
hkiG9w0BAQEFAAOCAQ8AMIIBCgKCAQEAiP5BrQgcWRJzCR4PxLVo9oQ12nzt3kft
NGA5eQgxLN4yrqqGW0ky3ly8ILYaq8lxNp0GMHFzseVirNPe2XEh1i+k1TXkMTJL
2SfWe7IvZvQIV3YLq0wro9XULJd6u/HbbAijrt/3ojbai+kLm6SL4c4Onvkw2V/l
ZSHenzjcbYClwJKtOiTSY/C92ynH41BawKH4sOp4DZut3sPyY/QHZUNmWmrWHXfR
GHfC/06OdYeI1aGIhHCNwIBiOLDp7D1D/u9CxFWZv++Hvjbtf+egKDTK+nzrO3eN
mZnKBPgLtMAQNBAuDqOJZ1ql2BRe+esInrDSvxDHGwf3xnJ2U3SQcQIDAQABMA0G
CSqGSIb3DQEBCwUAA4IBAQA/K/qMsVNjbhX3BvX5ZAH1nmXkmBZoEi60/gMerdJ/
VnSFEkVUFHMVX2RkulB7h3ljhj1dNOvCbtv68aAXI1KZjn04tJ8zeHtmAxTeeSJ0
22A5CEIb3fwvpQdQIzI9T1ZL4CyYnFBj5n3ZzOy1RimU96jvYsCz9QPk2s4FMpzJ
UA08+XiM6C1vJUEPLR8AwwfSteQh+PqijH/4Kjy6x2+KNxNPlCF9KlJK4e09fJv0
e8PnJjJxWlozwRodLc8poXGCSAuhOD/S7ZhzEQk2xlDE6Ye32Kr59D6cedMq360u
hvg8kdBnh5sthNVHaPrGCu2CvXBhxGAgrAOgIgrUHJSU
-----END CERTIFICATE-----
"""
CERTIFICATE_PATH = "/v1/notifications/certs/CERT-KAV"
RECEIVED_AT = datetime(2026, 11, 22, 20, 0, 5, tzinfo=UTC)


class CertificateServer(ThreadingHTTPServer):
    """Serves one certificate, or whatever `answer` is set to, and counts how often it is asked."""

    answer: tuple[int, bytes] = (200, CERTIFICATE)
    asked = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        assert isinstance(self.server, CertificateServer)
        self.server.asked += 1
        status, body = self.server.answer
        self.send_response(status)
        self.send_header("Location", CERTIFICATE_PATH)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Tests are quiet."""


@contextmanager
def certificate_server() -> Iterator[CertificateServer]:
    with CertificateServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def server() -> Iterator[CertificateServer]:
    with certificate_server() as server:
        yield server


def config(**settings: Any) -> PayPalConfig:
    given = {"client_id": "id", "client_secret": SecretStr("s"), "webhook_id": WEBHOOK_ID, **settings}
    return PayPalConfig(**given)


@pytest.fixture
async def webhooks(server: CertificateServer) -> AsyncIterator[PayPalWebhooks]:
    reader = PayPalWebhooks(config(api_base=server.url))
    yield reader
    await reader.close()


def a_request(server: CertificateServer | None = None, *, body: bytes = BODY, **changed: Any) -> WebhookRequest:
    headers = {
        "paypal-transmission-id": "69cd13f0-d67a-11e5-baa3-778b53f4ae55",
        "paypal-transmission-time": "2026-11-22T20:00:01Z",
        "paypal-transmission-sig": SIGNATURE,
        "paypal-cert-url": f"{server.url if server else SANDBOX}{CERTIFICATE_PATH}",
        "paypal-auth-algo": "SHA256withRSA",
    }
    headers.update(changed.pop("headers", {}))
    given: dict[str, Any] = {"method": "POST", "query": "", "received_at": RECEIVED_AT, **changed}
    return WebhookRequest(headers={name: value for name, value in headers.items() if value}, body=body, **given)


async def verdict(webhooks: PayPalWebhooks, request: WebhookRequest) -> Verdict:
    with pytest.raises(WebhookRefused) as refused:
        await webhooks.read(request)
    return refused.value.verdict


# --- the signature --------------------------------------------------------------------------------------------------


def test_the_checksum_is_unsigned_and_decimal() -> None:
    assert zlib.crc32(b"123456789") == 3421780262
    assert zlib.crc32(BODY) == 529072747


async def test_the_known_answer_is_accepted(webhooks: PayPalWebhooks, server: CertificateServer) -> None:
    notice = await webhooks.read(a_request(server))

    assert notice == Notice("paypal", "WH-KAV-1", "PAYMENT.CAPTURE.COMPLETED", gateway_payment_id="5O190127TN364715T")


def flipped(text: str, position: int) -> str:
    other = "A" if text[position] != "A" else "B"
    return text[:position] + other + text[position + 1 :]


@pytest.mark.parametrize("position", [0, 9, 240, len(BODY) - 1])
async def test_a_changed_byte_of_the_body_is_forged(
    webhooks: PayPalWebhooks, server: CertificateServer, position: int
) -> None:
    body = BODY[:position] + bytes([BODY[position] ^ 1]) + BODY[position + 1 :]

    assert await verdict(webhooks, a_request(server, body=body)) is Verdict.FORGED


@pytest.mark.parametrize("name", ["paypal-transmission-id", "paypal-transmission-time", "paypal-transmission-sig"])
@pytest.mark.parametrize("position", [0, 7])
async def test_a_changed_byte_of_a_header_is_forged(
    webhooks: PayPalWebhooks, server: CertificateServer, name: str, position: int
) -> None:
    genuine = a_request(server)
    changed = {**genuine.headers, name: flipped(genuine.headers[name], position)}

    assert await verdict(webhooks, genuine._replace(headers=changed)) is Verdict.FORGED


async def test_another_webhook_id_is_forged(server: CertificateServer) -> None:
    webhooks = PayPalWebhooks(config(api_base=server.url, webhook_id=flipped(WEBHOOK_ID, 3)))

    assert await verdict(webhooks, a_request(server)) is Verdict.FORGED
    await webhooks.close()


async def test_a_body_written_anew_is_forged(webhooks: PayPalWebhooks, server: CertificateServer) -> None:
    body = json.dumps(json.loads(BODY)).encode()

    assert await verdict(webhooks, a_request(server, body=body)) is Verdict.FORGED


@pytest.mark.parametrize(
    "headers",
    [
        *({name: ""} for name in a_request().headers),
        {"paypal-auth-algo": "SHA1withRSA"},
        {"paypal-transmission-sig": "not base64!"},
        {"paypal-transmission-sig": "\u00e9"},
        {"paypal-transmission-sig": base64.b64encode(b"short").decode()},
        {"paypal-transmission-id": "\ud800"},
    ],
)
async def test_headers_that_are_missing_or_not_of_their_form_are_forged(
    webhooks: PayPalWebhooks, server: CertificateServer, headers: dict[str, str]
) -> None:
    assert await verdict(webhooks, a_request(server, headers=headers)) is Verdict.FORGED


async def test_a_body_without_end_is_refused_unread(webhooks: PayPalWebhooks, server: CertificateServer) -> None:
    assert await verdict(webhooks, a_request(server, body=b"x" * (BODY_BYTES_MAX + 1))) is Verdict.TOO_LARGE
    assert server.asked == 0


async def test_an_old_message_is_read_since_paypal_repeats_for_days(
    webhooks: PayPalWebhooks, server: CertificateServer
) -> None:
    later = a_request(server, received_at=RECEIVED_AT + timedelta(days=6))

    assert (await webhooks.read(later)).event_id == "WH-KAV-1"


async def test_a_message_that_is_older_than_any_repetition_is_stale(
    webhooks: PayPalWebhooks, server: CertificateServer
) -> None:
    """Only a checksum of the body is signed: for a year, headers seen once would verify any body made to match them."""
    later = a_request(server, received_at=RECEIVED_AT + timedelta(days=8))

    assert await verdict(webhooks, later) is Verdict.STALE


# --- the certificate ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        "http://api-m.sandbox.paypal.com/v1/notifications/certs/CERT-1",
        "https://api-m.paypal.com/v1/notifications/certs/CERT-1",
        "https://api-m.sandbox.paypal.com.evil.example/v1/notifications/certs/CERT-1",
        "https://evil.example/v1/notifications/certs/CERT-1",
        "https://evil.example#api-m.sandbox.paypal.com/v1/notifications/certs/CERT-1",
        "https://api-m.sandbox.paypal.com@evil.example/v1/notifications/certs/CERT-1",
        "https://user@api-m.sandbox.paypal.com/v1/notifications/certs/CERT-1",
        "https://api-m.sandbox.paypal.com:8443/v1/notifications/certs/CERT-1",
        "https://api-m.sandbox.paypal.com/v1/notifications/certs/../../other",
        "https://api-m.sandbox.paypal.com/v1/notifications/certs/%2e%2e%2fother",
        "https://api-m.sandbox.paypal.com/v1/notifications/certs/CERT-1?x=1",
        "https://api-m.sandbox.paypal.com/v1/notifications/certs/CERT-1\n",
        "https://api-m.sandbox.paypal.com/v1/notifications/certs/",
        "https://api-mXsandbox.paypal.com/v1/notifications/certs/CERT-1",
        "file:///v1/notifications/certs/CERT-1",
        "http://127.0.0.1:80/v1/notifications/certs/CERT-1",
    ],
)
async def test_a_certificate_from_anywhere_else_is_forged_and_not_fetched(url: str) -> None:
    webhooks = PayPalWebhooks(config())

    assert await verdict(webhooks, a_request(headers={"paypal-cert-url": url})) is Verdict.FORGED
    await webhooks.close()


@pytest.mark.parametrize(
    ("settings", "hosts"),
    [
        ({}, ["api-m.sandbox.paypal.com", "api.sandbox.paypal.com"]),
        ({"api_base": "https://api-m.paypal.com"}, ["api-m.paypal.com", "api.paypal.com"]),
        ({"cert_hosts": frozenset({"certs.example"})}, ["certs.example"]),
        ({"api_base": "http://localhost:1", "cert_hosts": frozenset({"certs.example"})}, ["certs.example"]),
    ],
)
def test_certificates_come_from_the_hosts_of_the_same_environment(settings: dict[str, Any], hosts: list[str]) -> None:
    trusted = PayPalSignatures(config(**settings))._trusted

    for host in hosts:
        assert trusted.fullmatch(f"https://{host}/v1/notifications/certs/CERT-360caa42-fca2a594-1d93a270")
    assert trusted.pattern.count("|") == len(hosts) - 1


async def test_a_certificate_is_fetched_once_also_for_parallel_messages(
    webhooks: PayPalWebhooks, server: CertificateServer
) -> None:
    await asyncio.gather(*(webhooks.read(a_request(server)) for _ in range(5)))

    assert server.asked == 1


@pytest.mark.parametrize(
    "answer",
    [
        (404, b""),
        (302, b""),
        (200, b"no certificate"),
        (200, b""),
        (200, CERTIFICATE + b" " * CERTIFICATE_BYTES_MAX),
    ],
)
async def test_a_missing_certificate_is_not_requested_again_for_a_minute(
    webhooks: PayPalWebhooks, server: CertificateServer, answer: tuple[int, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1_000.0
    monkeypatch.setattr(paypal_signatures, "time", SimpleNamespace(monotonic=lambda: now))
    server.answer = answer
    assert await verdict(webhooks, a_request(server)) is Verdict.FORGED

    server.answer, now = (200, CERTIFICATE), now + 59
    assert await verdict(webhooks, a_request(server)) is Verdict.FORGED
    assert server.asked == 1

    now += 1
    assert (await webhooks.read(a_request(server))).event_id == "WH-KAV-1"


async def test_of_addresses_without_a_certificate_only_the_latest_are_remembered(
    webhooks: PayPalWebhooks, server: CertificateServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paypal_signatures, "REFUSED_MAX", 2)
    server.answer = (404, b"")
    first, second, third = (
        a_request(headers={"paypal-cert-url": f"{server.url}/v1/notifications/certs/{each}"}) for each in range(3)
    )

    for each in (first, second, third, third, second):
        assert await verdict(webhooks, each) is Verdict.FORGED
    assert server.asked == 3
    assert await verdict(webhooks, first) is Verdict.FORGED
    assert server.asked == 4


@pytest.mark.parametrize("status", [500, 429])
async def test_a_webhook_whose_certificate_is_unavailable_should_be_sent_again(
    webhooks: PayPalWebhooks, server: CertificateServer, status: int
) -> None:
    server.answer = (status, b"")
    assert await verdict(webhooks, a_request(server)) is Verdict.UNAVAILABLE

    server.answer = (200, CERTIFICATE)
    assert (await webhooks.read(a_request(server))).event_id == "WH-KAV-1"


async def test_few_messages_wait_for_a_certificate_and_what_needs_none_is_read_meanwhile(
    webhooks: PayPalWebhooks, server: CertificateServer
) -> None:
    await webhooks.read(a_request(server))
    is_asked, goes_on = asyncio.Event(), asyncio.Event()

    async def hang(_: httpx.Request) -> httpx.Response:
        is_asked.set()
        await goes_on.wait()
        return httpx.Response(404)

    await webhooks._signatures._http.aclose()
    webhooks._signatures._http = httpx.AsyncClient(transport=httpx.MockTransport(hang))
    *some, another = (
        a_request(headers={"paypal-cert-url": f"{server.url}/v1/notifications/certs/{each}"})
        for each in range(WAITING_MAX + 1)
    )
    waiting = [asyncio.create_task(verdict(webhooks, each)) for each in some]
    await is_asked.wait()

    async with asyncio.timeout(5):
        assert await verdict(webhooks, another) is Verdict.UNAVAILABLE
        assert (await webhooks.read(a_request(server))).event_id == "WH-KAV-1"
    goes_on.set()
    assert set(await asyncio.gather(*waiting)) == {Verdict.FORGED}
    assert await verdict(webhooks, another) is Verdict.FORGED, "there is room again"


async def test_without_a_connection_the_message_should_come_again(webhooks: PayPalWebhooks) -> None:
    with certificate_server() as gone:
        reader = PayPalWebhooks(config(api_base=gone.url))

    assert await verdict(reader, a_request(gone)) is Verdict.UNAVAILABLE
    await reader.close()


@pytest.mark.parametrize("at", [datetime(2025, 12, 31, tzinfo=UTC), datetime(2046, 1, 2, tzinfo=UTC)])
async def test_a_certificate_out_of_its_time_proves_nothing(
    webhooks: PayPalWebhooks, server: CertificateServer, at: datetime
) -> None:
    assert await verdict(webhooks, a_request(server, received_at=at)) is Verdict.FORGED


def test_without_a_webhook_id_nothing_can_be_verified() -> None:
    with pytest.raises(ValueError, match="webhook_id"):
        PayPalWebhooks(config(webhook_id=""))


# --- what events say ------------------------------------------------------------------------------------------------

PAYMENT_ID = UUID("0192f0c1-2d5e-7cc0-8a11-5f1de2f6a001")
TEN = {"currency_code": "USD", "value": "10.00"}
RELATED = {"supplementary_data": {"related_ids": {"order_id": "O1"}}}


def event(name: str, resource: Json) -> Json:
    return {"id": "WH-1", "event_type": name, "resource": resource}


def resource(status: str, kind: OperationKind, *, number: int = 2, **fields: Any) -> Json:
    marks = {"custom_id": f"{PAYMENT_ID}.1", "invoice_id": f"{PAYMENT_ID}.{number}.{kind}"}
    return {"id": "P1", "status": status, "amount": TEN, **marks, **RELATED, **fields}


@pytest.mark.parametrize(
    ("name", "given", "outcome"),
    [
        ("PAYMENT.CAPTURE.COMPLETED", resource("COMPLETED", OperationKind.CAPTURE), Succeeded("P1", 1000)),
        ("PAYMENT.CAPTURE.COMPLETED", resource("COMPLETED", OperationKind.CHARGE), Succeeded("O1", 1000)),
        ("PAYMENT.CAPTURE.PENDING", resource("PENDING", OperationKind.CAPTURE), Pending("P1")),
        ("PAYMENT.CAPTURE.PENDING", resource("PENDING", OperationKind.CHARGE), Pending("O1")),
        (
            "PAYMENT.CAPTURE.DECLINED",
            resource("DECLINED", OperationKind.CAPTURE),
            Declined(DeclineReason.REFUSED_BY_ISSUER, "DECLINED", "P1"),
        ),
        (
            "PAYMENT.CAPTURE.DENIED",
            resource("DECLINED", OperationKind.CHARGE),
            Declined(DeclineReason.REFUSED_BY_ISSUER, "DECLINED", "O1"),
        ),
        ("PAYMENT.CAPTURE.DENIED", resource("A_STATUS_OF_TOMORROW", OperationKind.CAPTURE), Pending("P1")),
        ("PAYMENT.CAPTURE.REFUNDED", resource("COMPLETED", OperationKind.REFUND), Succeeded("P1", 1000)),
        ("PAYMENT.REFUND.PENDING", resource("PENDING", OperationKind.REFUND), Pending("P1")),
        (
            "PAYMENT.REFUND.FAILED",
            resource("FAILED", OperationKind.REFUND),
            Declined(DeclineReason.REFUND_FAILED, "FAILED", "P1"),
        ),
        (
            "PAYMENT.AUTHORIZATION.CREATED",
            resource("CREATED", OperationKind.AUTHORIZE, expiration_time="2026-11-22T20:00:00Z"),
            Succeeded("O1", 1000, datetime(2026, 11, 22, 20, tzinfo=UTC)),
        ),
    ],
)
def test_an_event_is_evidence_about_the_operation_that_its_invoice_id_names(
    name: str, given: Json, outcome: Outcome
) -> None:
    notice = read_event(event(name, given))

    assert notice == Notice("paypal", "WH-1", name, PAYMENT_ID, 2, "O1", outcome, "USD")


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("PAYMENT.AUTHORIZATION.VOIDED", resource("COMPLETED", OperationKind.CAPTURE)),
        ("PAYMENT.CAPTURE.OF_TOMORROW", resource("COMPLETED", OperationKind.CHARGE)),
    ],
)
def test_a_mark_that_another_object_carried_over_names_the_payment_only(name: str, given: Json) -> None:
    notice = read_event(event(name, given))

    assert (notice.payment_id, notice.operation_number, notice.outcome) == (PAYMENT_ID, None, None)
    assert notice.external is None


BEGAN = datetime(2026, 11, 22, 20, tzinfo=UTC)
UNMARKED: Json = {"custom_id": None, "invoice_id": None}


@pytest.mark.parametrize(
    ("name", "given", "kind", "outcome"),
    [
        ("PAYMENT.CAPTURE.REFUNDED", resource("COMPLETED", OperationKind.CAPTURE), "refund", Succeeded("P1", 1000)),
        ("PAYMENT.CAPTURE.REFUNDED", resource("COMPLETED", OperationKind.CHARGE), "refund", Succeeded("P1", 1000)),
        (
            "PAYMENT.CAPTURE.REFUNDED",
            resource("COMPLETED", OperationKind.REFUND, invoice_id=None),
            "refund",
            Succeeded("P1", 1000),
        ),
        (
            "PAYMENT.REFUND.FAILED",
            resource("FAILED", OperationKind.CHARGE),
            "refund",
            Declined(DeclineReason.REFUND_FAILED, "FAILED", "P1"),
        ),
        (
            "PAYMENT.CAPTURE.COMPLETED",
            resource("COMPLETED", OperationKind.CAPTURE, invoice_id=None),
            "capture",
            Succeeded("P1", 1000),
        ),
        ("PAYMENT.CAPTURE.COMPLETED", resource("COMPLETED", OperationKind.AUTHORIZE), "capture", Succeeded("P1", 1000)),
    ],
)
def test_a_movement_made_in_paypals_portal_is_read_as_external(
    name: str, given: Json, kind: str, outcome: Outcome
) -> None:
    notice = read_event(event(name, given | {"create_time": "2026-11-22T20:00:00Z"}))

    external = External(OperationKind(kind), 1000, BEGAN)
    expected = Notice("paypal", "WH-1", name, PAYMENT_ID, None, "O1", outcome, "USD", external=external)
    assert notice == expected


@pytest.mark.parametrize("is_final", [True, False])
def test_a_capture_at_paypals_pages_says_whether_it_was_the_last_one(*, is_final: bool) -> None:
    given = resource("COMPLETED", OperationKind.AUTHORIZE, final_capture=is_final)
    notice = read_event(event("PAYMENT.CAPTURE.COMPLETED", given))

    assert notice.external == External(OperationKind.CAPTURE, 1000, is_final=is_final)


def test_a_refund_without_any_mark_is_of_the_order_that_it_names_and_a_capture_without_one_of_somebody_elses() -> None:
    refund = read_event(event("PAYMENT.CAPTURE.REFUNDED", resource("COMPLETED", OperationKind.REFUND, **UNMARKED)))
    assert (refund.payment_id, refund.gateway_payment_id) == (None, "O1")
    assert refund.external == External(OperationKind.REFUND, 1000)
    capture = read_event(event("PAYMENT.CAPTURE.COMPLETED", resource("COMPLETED", OperationKind.CAPTURE, **UNMARKED)))
    assert capture.is_about_nothing


UP = [{"rel": "up", "href": "https://api.paypal.com/v2/payments/captures/C1", "method": "GET"}]
BARE: Json = {"supplementary_data": None, "links": UP}


@pytest.mark.parametrize(
    ("given", "capture"),
    [
        (resource("COMPLETED", OperationKind.REFUND, **UNMARKED, **BARE), "C1"),
        (resource("COMPLETED", OperationKind.CAPTURE, **BARE), "C1"),
        (resource("COMPLETED", OperationKind.REFUND, **BARE), None),
        (resource("COMPLETED", OperationKind.CAPTURE, links=UP), None),
        (resource("COMPLETED", OperationKind.REFUND, **UNMARKED, **BARE | {"links": None}), None),
        (resource("COMPLETED", OperationKind.REFUND, **UNMARKED, **BARE | {"links": [UP[0] | {"rel": "self"}]}), None),
    ],
    ids=["no mark", "its capture's mark", "our own", "an order's id", "no links", "no link up"],
)
def test_only_a_refund_that_is_not_ours_and_names_no_order_is_asked_about(given: Json, capture: str | None) -> None:
    for name in ("PAYMENT.CAPTURE.REFUNDED", "PAYMENT.REFUND.FAILED"):
        assert _unplaced_refund(event(name, given)) == capture
    assert _unplaced_refund(event("PAYMENT.CAPTURE.COMPLETED", given)) is None


@pytest.mark.parametrize(
    ("given", "refund"),
    [
        (UNMARKED | BARE | {"links": None}, "P1"),
        (UNMARKED | BARE, None),
        (UNMARKED, None),
        (BARE | {"invoice_id": None, "links": None}, None),
        (BARE | {"custom_id": None, "links": None}, None),
        (UNMARKED | BARE | {"links": None, "custom_id": "theirs", "invoice_id": "order-7"}, "P1"),
    ],
)
def test_a_refund_is_asked_about_itself_only_where_it_names_nothing(given: Json, refund: str | None) -> None:
    for name in ("PAYMENT.CAPTURE.REFUNDED", "PAYMENT.REFUND.FAILED", "PAYMENT.CAPTURE.REVERSED"):
        assert _nameless_refund(event(name, resource("COMPLETED", OperationKind.REFUND, **given))) == refund
    assert _nameless_refund(event("PAYMENT.CAPTURE.COMPLETED", resource("X", OperationKind.REFUND, **given))) is None


def test_a_refunds_capture_tells_its_order_and_payment_but_not_its_operation() -> None:
    refund = resource("COMPLETED", OperationKind.REFUND, **UNMARKED, **BARE) | {"custom_id": "theirs"}
    for capture in (resource("COMPLETED", OperationKind.REFUND), resource("COMPLETED", OperationKind.CAPTURE)):
        notice = read_event(event("PAYMENT.CAPTURE.REFUNDED", _refund_of(capture | {"id": "C1"}, refund)))
        assert (notice.payment_id, notice.operation_number, notice.gateway_payment_id) == (PAYMENT_ID, None, "O1")
        assert (notice.outcome, notice.external) == (Succeeded("P1", 1000), External(OperationKind.REFUND, 1000))
    told = _refund_of({"id": "C1", "custom_id": None}, resource("COMPLETED", OperationKind.CAPTURE, **BARE))
    notice = read_event(event("PAYMENT.CAPTURE.REFUNDED", told))
    assert (notice.payment_id, notice.gateway_payment_id) == (PAYMENT_ID, None)


@pytest.mark.parametrize(
    "given",
    [
        resource("COMPLETED", OperationKind.REFUND, invoice_id=None),
        resource("COMPLETED", OperationKind.REFUND),
        resource("PARTIALLY_REFUNDED", OperationKind.CAPTURE),
        resource("REFUNDED", OperationKind.CHARGE),
    ],
)
def test_a_reversal_is_paypals_doing_whatever_it_is_told_as_and_whoevers_marks_it_carries(given: Json) -> None:
    notice = read_event(event("PAYMENT.CAPTURE.REVERSED", given | {"create_time": "2026-11-22T20:00:00Z"}))

    assert (notice.payment_id, notice.operation_number, notice.gateway_payment_id) == (PAYMENT_ID, None, "O1")
    assert not notice.is_about_nothing
    assert notice.external == External(OperationKind.REFUND, 1000, BEGAN, is_reversal=True)
    assert notice.currency == "USD"


def test_the_capture_of_a_reversal_is_looked_up_as_for_a_refund() -> None:
    """PayPal's sample of this event has no marks and two links."""
    sample = resource("COMPLETED", OperationKind.REFUND, **UNMARKED, **BARE)
    assert _unplaced_refund(event("PAYMENT.CAPTURE.REVERSED", sample)) == "C1"
    placed = _refund_of(resource("COMPLETED", OperationKind.CAPTURE) | {"id": "C1"}, sample)
    notice = read_event(event("PAYMENT.CAPTURE.REVERSED", placed))
    assert (notice.payment_id, notice.gateway_payment_id) == (PAYMENT_ID, "O1")


def test_a_hold_that_was_released_has_ended_whoever_released_it() -> None:
    given = resource("VOIDED", OperationKind.AUTHORIZE, number=1)
    notice = read_event(event("PAYMENT.AUTHORIZATION.VOIDED", given))

    assert (notice.payment_id, notice.operation_number, notice.outcome) == (PAYMENT_ID, 1, Expired("O1", "VOIDED"))


def test_an_opening_without_its_orders_id_says_nothing() -> None:
    given = resource("COMPLETED", OperationKind.CHARGE, supplementary_data=None)
    up = [{"rel": "up", "href": "https://x/v2/checkout/orders/O7"}]

    assert read_event(event("PAYMENT.CAPTURE.COMPLETED", given)).outcome is None
    assert read_event(event("PAYMENT.CAPTURE.COMPLETED", given | {"links": up})).outcome == Succeeded("O7", 1000)


def test_an_approved_order_is_ripe_and_no_outcome() -> None:
    order = {"id": "O1", "status": "APPROVED", "purchase_units": [{"custom_id": f"{PAYMENT_ID}.1"}]}

    approved = read_event(event("CHECKOUT.ORDER.APPROVED", order))
    completed = read_event(event("CHECKOUT.ORDER.COMPLETED", order))

    assert approved == Notice("paypal", "WH-1", "CHECKOUT.ORDER.APPROVED", PAYMENT_ID, 1, "O1", is_ripe=True)
    assert (completed.is_ripe, completed.outcome) == (False, None)


@pytest.mark.parametrize(
    ("status", "code", "stage"),
    [
        ("OPEN", None, DisputeStage.OPENED),
        ("UNDER_REVIEW", "RESOLVED_BUYER_FAVOUR", DisputeStage.OPENED),
        ("RESOLVED", "RESOLVED_SELLER_FAVOUR", DisputeStage.WON),
        ("RESOLVED", "CANCELED_BY_BUYER", DisputeStage.WON),
        ("RESOLVED", "RESOLVED_BUYER_FAVOUR", DisputeStage.LOST),
        ("RESOLVED", "ACCEPTED", DisputeStage.LOST),
        ("RESOLVED", "RESOLVED_WITH_PAYOUT", DisputeStage.OPENED),
        ("RESOLVED", "AN_OUTCOME_OF_TOMORROW", DisputeStage.OPENED),
        ("RESOLVED", None, DisputeStage.OPENED),
    ],
)
def test_a_dispute_is_won_or_lost_only_on_paypals_explicit_word(
    status: str, code: str | None, stage: DisputeStage
) -> None:
    given = {
        "dispute_id": "PP-D-1",
        "status": status,
        "reason": "UNAUTHORISED",
        "dispute_amount": TEN,
        "disputed_transactions": [{"seller_transaction_id": "P1", "custom": f"{PAYMENT_ID}.1"}],
        "dispute_outcome": {"outcome_code": code} if code else None,
    }

    notice = read_event(event("CUSTOMER.DISPUTE.UPDATED", given))

    assert notice.payment_id == PAYMENT_ID
    assert notice.dispute == Dispute("PP-D-1", stage, 1000, "USD", "UNAUTHORISED")
    assert notice.outcome is None


@pytest.mark.parametrize(
    ("code", "expected"), [("RESOLVED_BUYER_FAVOUR", (DisputeStage.LOST, 400)), ("DENIED", (DisputeStage.WON, 1000))]
)
def test_a_dispute_that_was_lost_in_part_took_what_the_payer_got_back(
    code: str, expected: tuple[DisputeStage, int]
) -> None:
    returned = {"currency_code": "USD", "value": "4.00"}
    given = {
        "dispute_id": "PP-D-1",
        "status": "RESOLVED",
        "dispute_amount": TEN,
        "disputed_transactions": [{"seller_transaction_id": "P1"}],
        "dispute_outcome": {"outcome_code": code, "amount_refunded": returned},
    }

    dispute = read_event(event("CUSTOMER.DISPUTE.RESOLVED", given)).dispute

    assert dispute is not None
    assert (dispute.stage, dispute.amount_minor) == expected


def test_a_dispute_without_our_mark_names_paypals_transaction() -> None:
    given = {"dispute_id": "D", "dispute_amount": TEN, "disputed_transactions": [{"seller_transaction_id": "P1"}]}

    notice = read_event(event("CUSTOMER.DISPUTE.CREATED", given))

    assert (notice.payment_id, notice.gateway_payment_id) == (None, "P1")


@pytest.mark.parametrize("name", ["VAULT.PAYMENT-TOKEN.CREATED", "AN.EVENT.OF.TOMORROW", "CHECKOUT.ORDER.SAVED"])
def test_an_event_about_nothing_of_ours_is_a_notice_without_outcome(name: str) -> None:
    notice = read_event(event(name, {"id": "X"}))

    assert (notice.event_id, notice.type, notice.outcome, notice.dispute) == ("WH-1", name, None, None)


@pytest.mark.parametrize(
    "body",
    [b"", b"[]", b"null", b"\xff", b"{}", b'{"id":"x","event_type":"PAYMENT.CAPTURE.COMPLETED","resource":[]}'],
)
async def test_a_signed_body_that_makes_no_sense_is_malformed(body: bytes) -> None:
    from infra.sandbox.paypal_signing import Signer

    signer = Signer()
    with certificate_server() as server:
        server.answer = (200, signer.pem())
        signed = signer.headers(body, transmission_id="t", webhook_id=WEBHOOK_ID, base_url=server.url)
        webhooks = PayPalWebhooks(config(api_base=server.url))
        request = WebhookRequest("POST", "", {k.lower(): v for k, v in signed.items()}, body, datetime.now(UTC))

        assert await verdict(webhooks, request) is Verdict.MALFORMED
        await webhooks.close()


async def test_every_verdict_has_an_answer_and_only_what_was_stored_is_a_success(webhooks: PayPalWebhooks) -> None:
    answers = {each: webhooks.answer(each, WebhookRequest("POST", "", {}, b"", BEGAN)).status for each in Verdict}

    stored = {Verdict.STORED, Verdict.DUPLICATE, Verdict.ALREADY_FINAL, Verdict.AMOUNT_DIFFERS}
    assert {each for each, status in answers.items() if status == 200} == stored
    assert answers[Verdict.UNAVAILABLE] == 503
    assert all(400 <= status < 500 for each, status in answers.items() if each not in {*stored, Verdict.UNAVAILABLE})
