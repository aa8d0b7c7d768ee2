"""Stripe's simulator, in a process of its own on a free loopback port, and the gateways that talk to it."""

from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import httpx
import pytest
from pydantic import SecretStr

from domain.ports import Gateway
from infra.gateways.stripe import StripeConfig, StripeGateway
from tests.contract.paypal_schemas import recorded, violations
from tests.support.sandbox import running_sandbox


@dataclass
class Simulator:
    """A running simulator of Stripe: its address, its books, and how to make it misbehave."""

    url: str
    http: httpx.Client

    def fault(self, action: str, **rule: Any) -> None:
        self.http.post("/_sandbox/faults", json={"action": action, **rule}).raise_for_status()

    def books(self) -> dict[str, Any]:
        return dict(self.http.get("/_sandbox/books").raise_for_status().json())

    def intents_of(self, payment_id: object) -> list[dict[str, Any]]:
        answer = self.http.get("/_sandbox/payment_intents", params={"metadata[payment_id]": str(payment_id)})
        return list(answer.raise_for_status().json()["data"])

    def executed_charges(self, payment_id: object) -> int:
        return int(self.books()["executed_charges"].get(str(payment_id), 0))

    def post(self, path: str) -> dict[str, Any]:
        return dict(self.http.post(f"/_sandbox/{path}").raise_for_status().json())


@pytest.fixture(scope="session")
def stripe_url() -> Iterator[str]:
    with running_sandbox() as url:
        yield url


@pytest.fixture
def simulator(stripe_url: str) -> Iterator[Simulator]:
    with httpx.Client(base_url=stripe_url) as http:
        http.post("/_sandbox/reset").raise_for_status()
        yield Simulator(stripe_url, http)


def stripe_gateway(url: str, **settings: Any) -> StripeGateway:
    given = {"timeout_seconds": 10, "multi_capture": True} | settings
    clock = given.pop("clock", lambda: datetime.now(UTC))
    return StripeGateway(StripeConfig(api_key=SecretStr("sk_test_contract"), api_base=url, **given), clock)


@pytest.fixture
async def connect(simulator: Simulator) -> AsyncIterator[Callable[..., Gateway]]:
    """A function that builds Stripe gateways with other settings; all are closed afterwards."""
    built: list[Gateway] = []

    def connect_to(url: str = simulator.url, **settings: Any) -> Gateway:
        built.append(stripe_gateway(url, **settings))
        return built[-1]

    yield connect_to
    for gateway in built:
        await gateway.close()


@pytest.fixture
def gateway(connect: Callable[..., Gateway]) -> Gateway:
    return connect()


@pytest.fixture
def as_documented(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Check that all requests and answers between gateway and PayPal during the test match PayPal's own documents."""
    with recorded(monkeypatch) as exchanges:
        yield
    assert [told for each in exchanges for told in violations(each)] == []
