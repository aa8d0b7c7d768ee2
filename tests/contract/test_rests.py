"""Every gateway notices that its provider asks for fewer requests, whatever outcome it reads from the answer.

The simulators of Stripe and PayPal ask with a time, in these providers' own format, and MoMo's with its own result
code. VNPay documents no way to ask, so it is tested with a plain 429.
"""

from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import httpx
import pytest

from domain.errors import GatewayError
from domain.operations import RequiresAction, Succeeded, Unknown
from domain.ports import Resting
from tests.contract.gateway_requests import a_request, in_doubt
from tests.contract.providers import PROVIDERS
from tests.support.sandbox import running_sandbox
from tests.support.waiting import until

SAY_SO = ("stripe", "paypal")


class Refusing(BaseHTTPRequestHandler):
    """Answers everything with a 429, except the request for an access token."""

    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("content-length", 0)))
        is_token = self.path.endswith("/oauth2/token")
        body = b'{"access_token": "token", "expires_in": 3600}' if is_token else b"{}"
        self.send_response(200 if is_token else 429)
        self.send_header("retry-after", "30")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET

    def log_message(self, *_: object) -> None:
        """Nothing is printed."""


@pytest.fixture
def refusing_url() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def sandbox() -> Iterator[httpx.Client]:
    with running_sandbox() as url, httpx.Client(base_url=url, timeout=10) as http:
        yield http


@pytest.mark.parametrize("refusal", ["429", "503"])
@pytest.mark.parametrize("name", SAY_SO)
async def test_a_gateway_rests_for_as_long_as_its_provider_says_and_then_is_answered(
    name: str, refusal: str, sandbox: httpx.Client
) -> None:
    provider = PROVIDERS[name](str(sandbox.base_url), sandbox)
    gateway = provider.gateway()
    assert isinstance(gateway, Resting)
    request = a_request(amount=provider.amount, payment_method=provider.payment_method)
    charged = await gateway.charge(request)
    assert isinstance(charged, Succeeded)
    question = in_doubt(request, reference=charged.reference)
    assert gateway.rests_seconds() == 0

    provider.fault(refusal, "read", request.payment_id, retry_after_seconds=2)
    with suppress(GatewayError):
        await gateway.status(question)
    assert 1.5 < gateway.rests_seconds() <= 2.5

    async def is_over() -> bool:
        return gateway.rests_seconds() == 0

    await until(is_over)
    assert await gateway.status(question) == charged
    assert gateway.rests_seconds() == 0
    await gateway.close()


async def test_momos_maintenance_has_the_gateway_rest_though_it_comes_with_a_200(sandbox: httpx.Client) -> None:
    provider = PROVIDERS["momo"](str(sandbox.base_url), sandbox)
    gateway = provider.gateway()
    assert isinstance(gateway, Resting)
    request = a_request(amount=provider.amount, payment_method=provider.payment_method)
    assert isinstance(await gateway.charge(request), RequiresAction)
    assert gateway.rests_seconds() == 0
    provider.fault("429", "read", request.payment_id)  # MoMo says it with a result code of its own
    assert isinstance(await gateway.status(in_doubt(request)), Unknown)
    assert 0 < gateway.rests_seconds() <= 1.25
    await gateway.close()


@pytest.mark.parametrize("name", sorted(PROVIDERS.keys() - SAY_SO))
async def test_a_429_to_a_question_has_the_gateway_rest_for_as_long_as_it_says(name: str, refusing_url: str) -> None:
    with httpx.Client(base_url=refusing_url) as http:
        provider = PROVIDERS[name](refusing_url, http)
    gateway = provider.gateway()
    assert isinstance(gateway, Resting)
    assert gateway.rests_seconds() == 0
    request = a_request(amount=provider.amount, payment_method=provider.payment_method)
    with suppress(GatewayError):
        outcome = await gateway.charge(request)
        # VNPay's charge is a URL, which needs no request.
        assert isinstance(outcome, RequiresAction)
        await gateway.status(in_doubt(request, reference=outcome.reference))
    await gateway.close()
    assert 29 < gateway.rests_seconds() <= 37.5
