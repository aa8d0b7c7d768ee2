"""Our requests against Stripe's own mock, which validates them with Stripe's OpenAPI document.

The mock keeps no state and answers with fixtures, so only the requests are tested here, not the outcomes.
Source: https://github.com/stripe/stripe-mock.
"""

import os
import shutil
import subprocess
from collections.abc import AsyncIterator, Iterator

import httpx
import pytest

from domain.commands import OperationKind
from domain.operations import NotExecuted
from infra.gateways.stripe import StripeGateway
from infra.local.server import free_port
from tests.contract.conftest import stripe_gateway
from tests.contract.gateway_requests import a_request, in_doubt, run
from tests.support.sandbox import CHECKOUT, wait_until_open

BINARIES = CHECKOUT / ".cache" / "bin"


def built_mock() -> str:
    """The path of stripe-mock, built once; skips with the reason where it cannot be had."""
    binary = BINARIES / "stripe-mock"
    if not binary.exists():
        go = shutil.which("go")
        if go is None:
            pytest.skip("Go is not installed, so stripe-mock cannot be built")
        built = subprocess.run(
            [go, "install", "github.com/stripe/stripe-mock@latest"],
            env={**os.environ, "GOBIN": str(BINARIES)},
            capture_output=True,
            text=True,
            timeout=150,
            check=False,
        )
        if built.returncode:
            pytest.skip(f"stripe-mock could not be built: {built.stderr[-200:]}")
    return str(binary)


@pytest.fixture(scope="module")
def mock_url() -> Iterator[str]:
    port = free_port()
    process = subprocess.Popen(
        [built_mock(), "-http-addr", f"127.0.0.1:{port}", "-https-addr", "127.0.0.1:0"], stdout=subprocess.DEVNULL
    )
    wait_until_open(port, process)
    yield f"http://127.0.0.1:{port}"
    process.terminate()
    process.wait(10)


@pytest.fixture(params=[True, False], ids=["multi-capture", "single capture"])
async def gateway(request: pytest.FixtureRequest, mock_url: str) -> AsyncIterator[StripeGateway]:
    built = stripe_gateway(mock_url, multi_capture=request.param)
    yield built
    await built.close()


@pytest.mark.parametrize("kind", list(OperationKind))
async def test_every_operation_is_a_valid_request(gateway: StripeGateway, kind: OperationKind) -> None:
    given = a_request(kind, metadata={"note": "x"}, customer_id="cus_1", off_session=True, is_final=False)
    is_opening = kind in (OperationKind.AUTHORIZE, OperationKind.CHARGE)

    outcome = await run(gateway, given if is_opening else given._replace(gateway_payment_id="pi_1"))

    assert not isinstance(outcome, NotExecuted), outcome


@pytest.mark.parametrize("kind", list(OperationKind))
@pytest.mark.parametrize("reference", ["x_1", None])
async def test_every_question_is_a_valid_request(
    gateway: StripeGateway, kind: OperationKind, reference: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    statuses = watched(gateway, monkeypatch)

    await gateway.status(in_doubt(a_request(kind, gateway_payment_id="pi_1", reference=reference)))

    assert statuses
    assert set(statuses) == {200}


async def test_the_cancellation_of_what_was_abandoned_is_a_valid_request(
    gateway: StripeGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    statuses = watched(gateway, monkeypatch)

    await gateway._abandon(a_request(reference="pi_1"))

    assert statuses == [200]


async def test_the_mock_refuses_what_is_not_in_the_document(mock_url: str) -> None:
    """Without this the tests above would prove nothing."""
    async with httpx.AsyncClient(base_url=mock_url, headers={"Authorization": "Bearer sk_test_x"}) as http:
        answer = await http.post("/v1/payment_intents", data={"amount": "1", "currency": "usd", "amout": "1"})

    assert answer.status_code == 400


def watched(gateway: StripeGateway, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The HTTP statuses of all requests that this gateway makes from now on."""
    statuses: list[int] = []
    send = gateway._http.request_async

    async def request_async(*args: object, **kwargs: object) -> object:
        answer = await send(*args, **kwargs)  # type: ignore[arg-type]
        statuses.append(answer[1])
        return answer

    monkeypatch.setattr(gateway._http, "request_async", request_async)
    return statuses
