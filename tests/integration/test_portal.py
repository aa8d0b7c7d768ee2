"""Actions in a provider's dashboard, over real HTTP: signed webhooks bring each into the books, once."""

import asyncio
import json
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import httpx
import pytest
from prometheus_client import REGISTRY
from pydantic import SecretStr

from app.daily_report import report_day
from app.settings import Settings
from app.show import show_payment
from domain.decision import Notified
from domain.notices import Notice
from domain.operations import Declined, DeclineReason
from domain.ports import Gateway
from domain.rules import RetryPolicy
from infra.gateways.paypal import PayPalConfig, PayPalGateway
from infra.gateways.stripe import StripeConfig, StripeGateway
from tests.contract.paypal import PAYS, PayPalSandbox
from tests.support.sandbox import running_sandbox
from tests.support.service import QUICK_RETRY, InProcessWorker, delivery, new_payment_id, rules, running_worker, value
from tests.support.waiting import until
from tests.support.webhooks import SECRET, SHOP, applied, applying, kinds, serving

WEBHOOK_ID = "1PORTAL"


class Portal(ABC):
    """A provider's dashboard, and what our service needs to know about that provider."""

    name: str
    payment_method: str

    def __init__(self, url: str, http: httpx.Client) -> None:
        self.url = url
        self.http = http

    @abstractmethod
    def gateway(self) -> Gateway: ...

    @abstractmethod
    def settings(self) -> dict[str, Any]: ...

    @abstractmethod
    def send_webhooks_to(self, url: str) -> None: ...

    @abstractmethod
    def refund(self, reference: str, cents: int) -> str: ...

    @abstractmethod
    def capture(self, reference: str, cents: int) -> str: ...

    @abstractmethod
    def void(self, reference: str) -> None: ...

    def post(self, path: str, **given: Any) -> dict[str, Any]:
        return dict(self.http.post(path, **given).raise_for_status().json())


class Dashboard(Portal):
    name, payment_method = "stripe", "pm_card_visa"
    multi_capture = False

    def gateway(self) -> Gateway:
        secret = SecretStr("sk_test_portal")
        return StripeGateway(StripeConfig(api_key=secret, api_base=self.url, multi_capture=self.multi_capture))

    def settings(self) -> dict[str, Any]:
        return {
            "stripe_api_base": self.url,
            "stripe_api_key": "sk_test_portal",
            "stripe_webhook_secrets": [SECRET],
            "stripe_return_url": SHOP,
        }

    def send_webhooks_to(self, url: str) -> None:
        self.post("/_sandbox/webhooks", json={"url": url, "secret": SECRET})

    def refund(self, reference: str, cents: int) -> str:
        return str(self.post(f"/_sandbox/payment_intents/{reference}/refund?amount={cents}")["id"])

    def capture(self, reference: str, cents: int) -> str:
        return str(self.post(f"/_sandbox/payment_intents/{reference}/capture?amount={cents}")["latest_charge"])

    def void(self, reference: str) -> None:
        self.post(f"/_sandbox/payment_intents/{reference}/cancel")


class PayPalsPages(Portal):
    name, payment_method = "paypal", PAYS

    def gateway(self) -> Gateway:
        return PayPalGateway(PayPalConfig(client_id="portal", client_secret=SecretStr("secret"), api_base=self.url))

    def settings(self) -> dict[str, Any]:
        return {
            "gateways": ["paypal"],
            "default_gateway": "paypal",
            "paypal_client_id": "portal",
            "paypal_client_secret": "secret",
            "paypal_api_base": self.url,
            "paypal_webhook_id": WEBHOOK_ID,
            "paypal_return_url": SHOP,
            "paypal_cancel_url": SHOP,
        }

    def send_webhooks_to(self, url: str) -> None:
        self.post("/_sandbox/paypal/webhooks", json={"url": url, "webhook_id": WEBHOOK_ID})

    def refund(self, reference: str, cents: int) -> str:
        capture = self._part(reference, "captures")
        return str(self.post(f"/_sandbox/paypal/captures/{capture}/refund?amount={cents / 100:.2f}")["id"])

    def capture(self, reference: str, cents: int) -> str:
        hold = self._part(reference, "authorizations")
        return str(self.post(f"/_sandbox/paypal/authorizations/{hold}/capture?amount={cents / 100:.2f}")["id"])

    def void(self, reference: str) -> None:
        self.post(f"/_sandbox/paypal/authorizations/{self._part(reference, 'authorizations')}/void")

    def dispute(self, reference: str) -> None:
        self.post(f"/_sandbox/paypal/captures/{self._part(reference, 'captures')}/dispute")

    def reverse(self, reference: str, cents: int) -> None:
        self.post(f"/_sandbox/paypal/captures/{self._part(reference, 'captures')}/reverse?amount={cents / 100:.2f}")

    def pay(self, reference: str) -> None:
        """The payer approves an order that we had given up, and the order is captured all the same."""
        paypal = PayPalSandbox(self.url, self.http)
        paypal.approve(reference)
        headers = {"Authorization": f"Bearer {paypal.token()}", "PayPal-Request-Id": reference}
        self.post(f"/v2/checkout/orders/{reference}/capture", json={}, headers=headers)

    def _part(self, reference: str, kind: str) -> str:
        return str(PayPalSandbox(self.url, self.http).order(reference)["purchase_units"][0]["payments"][kind][-1]["id"])


@pytest.fixture(scope="module")
def sandbox() -> Iterator[tuple[str, httpx.Client]]:
    with running_sandbox() as url, httpx.Client(base_url=url) as http:
        yield url, http


@pytest.fixture(params=[Dashboard, PayPalsPages], ids=lambda each: each.name)
def portal(request: pytest.FixtureRequest, sandbox: tuple[str, httpx.Client]) -> Portal:
    made = request.param(*sandbox)
    assert isinstance(made, Portal)
    return made


@asynccontextmanager
async def told_by(
    portal: Portal, postgres_url: str, retry: RetryPolicy = QUICK_RETRY
) -> AsyncIterator[InProcessWorker]:
    """A worker that receives the provider's webhooks."""
    gateway = portal.gateway()
    given = rules(retry, gateways={portal.name: gateway.capabilities}, default_gateway=portal.name)
    async with (
        running_worker(postgres_url, gateway, given=given) as worker,
        serving(Settings(postgres_url=postgres_url, **portal.settings())) as url,
        applying(postgres_url, worker),
    ):
        await asyncio.to_thread(portal.send_webhooks_to, f"{url}/webhooks/{portal.name}")
        yield worker
    await gateway.close()


async def opened(worker: InProcessWorker, portal: Portal, postgres_url: str, kind: str) -> tuple[UUID, str]:
    """A payment of USD 100.00, and the provider's id of it."""
    payment_id = new_payment_id()
    await worker.accept(delivery(kind, payment_id, f"{payment_id}-open", payment_method=portal.payment_method))
    await worker.idle()
    found = "SELECT gateway_payment_id FROM payments WHERE payment_id = $1"
    return payment_id, str(await value(postgres_url, found, payment_id))


async def heard(postgres_url: str, payment_id: UUID, kind: str, times: int = 1) -> None:
    async def is_told() -> bool:
        return (await kinds(postgres_url, payment_id)).count(kind) == times

    await until(is_told)
    await until(lambda: applied(postgres_url))


async def differences(
    portal: Portal, postgres_url: str, payment_id: UUID, capsys: pytest.CaptureFixture[str]
) -> list[dict[str, Any]]:
    """How today's books and the provider's list differ for this payment; the list has other tests' payments, too."""
    settings = Settings(postgres_url=postgres_url, **portal.settings())
    today = datetime.now(UTC).date()
    capsys.readouterr()
    await asyncio.to_thread(report_day, settings, today, portal.name, as_json=True)
    found = json.loads(capsys.readouterr().out)["differences"]
    return [each for each in found if each["payment_id"] == str(payment_id)]


async def test_a_refund_is_in_the_books_beside_our_own_and_no_difference(
    postgres_url: str, portal: Portal, capsys: pytest.CaptureFixture[str]
) -> None:
    async with told_by(portal, postgres_url) as worker:
        payment_id, reference = await opened(worker, portal, postgres_url, "charge")
        refund = await asyncio.to_thread(portal.refund, reference, 4_000)
        await heard(postgres_url, payment_id, "refunded_externally")
        await worker.accept(delivery("refund", payment_id, "too much", amount_minor=6_001))
        await worker.accept(delivery("refund", payment_id, "the rest", amount_minor=6_000))
        await worker.idle()
        await heard(postgres_url, payment_id, "refunded")
        assert await differences(portal, postgres_url, payment_id, capsys) == []
    assert await kinds(postgres_url, payment_id) == [
        "captured", "refunded_externally", "command_rejected", "refunded",
    ]  # fmt: skip
    assert await value(postgres_url, "SELECT (status, refunded_minor)::text FROM payments") == "(refunded,10000)"
    booked = "SELECT sum(amount_minor)::bigint FROM ledger WHERE debit = 'customer_refunds'"
    assert await value(postgres_url, booked) == 10_000
    assert await value(postgres_url, "SELECT reference FROM operations WHERE idempotency_key IS NULL") == refund
    shown = Settings(postgres_url=postgres_url)
    assert await asyncio.to_thread(show_payment, shown, payment_id, as_json=False) == 0
    assert "dashboard)" in capsys.readouterr().out


async def test_a_capture_is_in_the_books_and_can_be_refunded(
    postgres_url: str, portal: Portal, capsys: pytest.CaptureFixture[str]
) -> None:
    async with told_by(portal, postgres_url) as worker:
        payment_id, reference = await opened(worker, portal, postgres_url, "authorize")
        capture = await asyncio.to_thread(portal.capture, reference, 10_000)
        await heard(postgres_url, payment_id, "captured_externally")
        await worker.accept(delivery("refund", payment_id, "refund", amount_minor=2_500))
        await worker.idle()
        await heard(postgres_url, payment_id, "refunded")
        assert await differences(portal, postgres_url, payment_id, capsys) == []
    assert await kinds(postgres_url, payment_id) == ["authorized", "captured_externally", "refunded"]
    assert await value(postgres_url, "SELECT (captured_minor, refunded_minor)::text FROM payments") == "(10000,2500)"
    assert await value(postgres_url, "SELECT reference FROM operations WHERE idempotency_key IS NULL") == capture


async def test_the_rest_of_a_hold_that_was_captured_beside_our_parts_is_in_the_books_and_no_difference(
    postgres_url: str, sandbox: tuple[str, httpx.Client], capsys: pytest.CaptureFixture[str]
) -> None:
    portal = Dashboard(*sandbox)
    portal.multi_capture = True
    async with told_by(portal, postgres_url) as worker:
        payment_id, reference = await opened(worker, portal, postgres_url, "authorize")
        for key, cents in (("first", 2_000), ("second", 3_000)):
            await worker.accept(delivery("capture", payment_id, key, amount_minor=cents))
            await worker.idle()
        await asyncio.to_thread(portal.capture, reference, 5_000)
        await heard(postgres_url, payment_id, "captured_externally")
        assert await differences(portal, postgres_url, payment_id, capsys) == []
    assert await kinds(postgres_url, payment_id) == ["authorized", "captured", "captured", "captured_externally"]
    assert await value(postgres_url, "SELECT (status, captured_minor)::text FROM payments") == "(captured,10000)"


async def test_a_hold_that_was_released_cannot_be_captured_any_more(postgres_url: str, portal: Portal) -> None:
    async with told_by(portal, postgres_url) as worker:
        payment_id, reference = await opened(worker, portal, postgres_url, "authorize")
        await asyncio.to_thread(portal.void, reference)
        await heard(postgres_url, payment_id, "authorization_expired")
        await worker.accept(delivery("capture", payment_id, "capture"))
    assert await kinds(postgres_url, payment_id) == ["authorized", "authorization_expired", "command_rejected"]
    assert await value(postgres_url, "SELECT (status, released_minor)::text FROM payments") == "(canceled,10000)"


async def test_a_void_does_not_release_what_was_just_captured_in_paypals_pages(
    postgres_url: str, sandbox: tuple[str, httpx.Client], capsys: pytest.CaptureFixture[str]
) -> None:
    """The webhook about the capture comes only after the void."""
    portal = PayPalsPages(*sandbox)
    async with told_by(portal, postgres_url) as worker:
        payment_id, reference = await opened(worker, portal, postgres_url, "authorize")
        await asyncio.to_thread(portal.post, "/_sandbox/paypal/manners", json={"delay_seconds": 2})
        await asyncio.to_thread(portal.capture, reference, 2_000)
        await worker.accept(delivery("void", payment_id, "too early"))
        await worker.idle()
        assert await kinds(postgres_url, payment_id) == ["authorized", "command_rejected"]
        await asyncio.to_thread(portal.post, "/_sandbox/paypal/manners", json={"delay_seconds": 0})
        await heard(postgres_url, payment_id, "captured_externally")
        await worker.accept(delivery("void", payment_id, "the rest"))
        await worker.idle()
        await heard(postgres_url, payment_id, "voided")
        assert await differences(portal, postgres_url, payment_id, capsys) == []
    amounts = "SELECT (status, captured_minor, released_minor)::text FROM payments"
    assert await value(postgres_url, amounts) == "(captured,2000,8000)"


async def test_a_refund_in_the_dashboard_that_came_back_is_taken_back(
    postgres_url: str, sandbox: tuple[str, httpx.Client]
) -> None:
    portal = Dashboard(*sandbox)
    async with told_by(portal, postgres_url) as worker:
        payment_id, reference = await opened(worker, portal, postgres_url, "charge")
        refund = await asyncio.to_thread(portal.refund, reference, 4_000)
        await heard(postgres_url, payment_id, "refunded_externally")
        await asyncio.to_thread(portal.post, f"/_sandbox/refunds/{refund}/settle?status=failed")
        await heard(postgres_url, payment_id, "refund_failed")
    assert await value(postgres_url, "SELECT (status, refunded_minor)::text FROM payments") == "(captured,0)"
    assert await value(postgres_url, "SELECT state FROM operations WHERE idempotency_key IS NULL") == "declined"


async def test_a_paypal_reversal_needs_a_person_unless_a_dispute_accounts_for_it(
    postgres_url: str, sandbox: tuple[str, httpx.Client], capsys: pytest.CaptureFixture[str]
) -> None:
    portal = PayPalsPages(*sandbox)

    def disagreeing() -> float:
        return REGISTRY.get_sample_value("payments_notices_disagreeing_total", {"gateway": "paypal"}) or 0.0

    at_once = replace(QUICK_RETRY, review_after=timedelta(0))
    async with told_by(portal, postgres_url, at_once) as worker:
        disputed, other = [await opened(worker, portal, postgres_url, "charge") for _ in range(2)]
        before = disagreeing()
        await asyncio.to_thread(portal.dispute, disputed[1])
        await heard(postgres_url, disputed[0], "dispute_opened")
        for _, reference in (disputed, other):
            await asyncio.to_thread(portal.reverse, reference, 4_000)

        async def is_told() -> bool:
            return bool(await value(postgres_url, "SELECT count(*) FROM inbox WHERE type LIKE '%REVERSED'") == 2)

        await until(is_told)
        await until(lambda: applied(postgres_url))
        assert disagreeing() == before + 1
        for payment_id, _ in (disputed, other):
            assert await differences(portal, postgres_url, payment_id, capsys) == []
    assert await value(postgres_url, "SELECT sum(refunded_minor)::bigint FROM payments") == 0


async def test_a_refund_in_paypals_portal_belongs_to_the_order_of_its_capture(
    postgres_url: str, sandbox: tuple[str, httpx.Client]
) -> None:
    portal = PayPalsPages(*sandbox)
    async with told_by(portal, postgres_url) as worker:
        payment_id = new_payment_id()
        await worker.accept(delivery("charge", payment_id, "given up", payment_method="paypal"))
        await worker.idle()
        first = str(await value(postgres_url, "SELECT reference FROM operations"))
        given_up = Notice("paypal", "", "", payment_id, 1, outcome=Declined(DeclineReason.OTHER, None, first))
        await worker.write_path.apply([Notified(None, payment_id, given_up)])
        await worker.accept(delivery("charge", payment_id, "paid", payment_method=PAYS))
        await worker.idle()
        await asyncio.to_thread(portal.pay, first)
        await heard(postgres_url, payment_id, "late_success")
        second = str(await value(postgres_url, "SELECT gateway_payment_id FROM payments"))
        await asyncio.to_thread(portal.refund, first, 4_000)
        await heard(postgres_url, payment_id, "refunded_externally")
        owed = "SELECT (owed_captured_minor - owed_returned_minor, refunded_minor)::text FROM payments"
        assert await value(postgres_url, owed) == "(6000,4000)"
        await asyncio.to_thread(portal.refund, second, 1_000)
        await heard(postgres_url, payment_id, "refunded_externally", 2)
        assert await value(postgres_url, owed) == "(6000,5000)"
