"""The PayPal simulator in a process of its own, and the gateways that talk to it: what a contract suite needs."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
from pydantic import SecretStr

from infra.gateways.paypal import PayPalConfig, PayPalGateway
from tests.support.sandbox import running_sandbox

PAYS = "vault:good"
"""A payment method that succeeds at once; without `vault:` the payer is sent to PayPal."""

DECLINES = {
    "vault:declined-INSTRUMENT_DECLINED": "refused_by_issuer",
    "vault:declined-TRANSACTION_LIMIT_EXCEEDED": "limit_exceeded",
    "vault:declined-CARD_EXPIRED": "card_expired",
    "vault:declined-COMPLIANCE_VIOLATION": "suspected_fraud",
    "vault:refused": "insufficient_funds",
    "vault:unknown": "invalid_card_data",
}
"""Payment methods that are refused: `vault:refused` with a 201, the others with a 422."""

OPERATIONS = {"authorize": "create", "charge": "create", "capture": "capture", "void": "cancel", "refund": "refund"}
"""The name, in fault rules, of the request that executes each operation; `confirm` executes an approved order."""


@dataclass
class PayPalSandbox:
    """A running simulator: its address, its books, the payer, and how to make it misbehave."""

    url: str
    http: httpx.Client

    def fault(self, action: str, **rule: Any) -> None:
        self.http.post("/_sandbox/paypal/faults", json={"action": action, **rule}).raise_for_status()

    def effect(self, payment_id: object) -> tuple[int, int, int]:
        """What is held, captured and refunded for our payment, in our minor units."""
        found = self.payment(payment_id)
        return found["held"], found["captured"], found["refunded"]

    def executed_charges(self, payment_id: object) -> int:
        """How many holds and direct captures succeeded; more than one is a double charge."""
        return self.payment(payment_id)["executed"]

    def payment(self, payment_id: object) -> dict[str, int]:
        return dict(self.http.get(f"/_sandbox/paypal/payments/{payment_id}").raise_for_status().json())

    def approve(self, reference: str, wallet: str = "good") -> None:
        """Approve as the payer on PayPal's page, paying with this wallet."""
        self.post(f"orders/{reference}/approve?wallet={wallet}")

    def deny(self, reference: str) -> None:
        self.post(f"orders/{reference}/deny")

    def expire(self, reference: str) -> None:
        """End the payer's time to approve."""
        self.post(f"orders/{reference}/expire")

    def books(self) -> dict[str, Any]:
        return dict(self.http.get("/_sandbox/paypal/books").raise_for_status().json())

    def order(self, reference: str) -> dict[str, Any]:
        """The order as PayPal shows it to its merchant."""
        headers = {"Authorization": f"Bearer {self.token()}"}
        return dict(self.http.get(f"/v2/checkout/orders/{reference}", headers=headers).raise_for_status().json())

    def charge(self, request_id: str | None, **unit: Any) -> httpx.Response:
        """Take USD 10.00 from a vaulted wallet, as a merchant without our gateway would."""
        unit = {"custom_id": "p1.1", "amount": {"currency_code": "USD", "value": "10.00"}, **unit}
        body = {"intent": "CAPTURE", "purchase_units": [unit], "payment_source": {"paypal": {"vault_id": "good"}}}
        headers = {
            "Authorization": f"Bearer {self.token()}",
            **({"PayPal-Request-Id": request_id} if request_id else {}),
        }
        return self.http.post("/v2/checkout/orders", json=body, headers=headers)

    def token(self) -> str:
        form = {"grant_type": "client_credentials"}
        answer = self.http.post("/v1/oauth2/token", data=form, auth=("contract", "secret"))
        return str(answer.raise_for_status().json()["access_token"])

    def post(self, path: str, **json: Any) -> dict[str, Any]:
        return dict(self.http.post(f"/_sandbox/paypal/{path}", json=json).raise_for_status().json())


@contextmanager
def running_paypal() -> Iterator[PayPalSandbox]:
    """A simulator that runs until the block ends."""
    with running_sandbox() as url, httpx.Client(base_url=url) as http:
        yield PayPalSandbox(url, http)


def paypal_gateway(url: str, *, timeout_seconds: float = 10, **settings: Any) -> PayPalGateway:
    secret = SecretStr("EContractSecret")
    config = PayPalConfig(
        client_id="contract", client_secret=secret, api_base=url, timeout_seconds=timeout_seconds, **settings
    )
    return PayPalGateway(config)
