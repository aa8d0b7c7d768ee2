"""A day's books against the provider's own list: equal where all went well; each difference is found, in both ways."""

import asyncio
import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import httpx
import pytest

from app.daily_report import ListUnreadable, NoList, report_day
from app.settings import Settings
from domain.commands import OperationKind
from domain.decision import Notified
from domain.notices import External, Notice
from domain.operations import Declined, DeclineReason, Outcome, Succeeded
from tests.contract.paypal import PAYS, PayPalSandbox, paypal_gateway
from tests.contract.providers import Stripe
from tests.support.provider import BookkeepingGateway
from tests.support.sandbox import running_sandbox
from tests.support.service import delivery, new_payment_id, running_worker, value

AUTHORIZATION = {"authorization": "Bearer sk_test_somebody"}


@pytest.fixture
def sandbox_url() -> Iterator[str]:
    with running_sandbox() as url:
        yield url


async def test_every_difference_is_found_and_nothing_else(
    postgres_url: str, sandbox_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = Settings(postgres_url=postgres_url, stripe_api_base=sandbox_url, stripe_api_key="sk_test_report")

    async def differences() -> list[tuple[str, str]]:
        today = datetime.now(UTC).date()
        code = await asyncio.to_thread(report_day, settings, today, None, as_json=True)
        told = json.loads(capsys.readouterr().out)
        assert code == bool(told["differences"])
        return sorted((each["what"], each["theirs"]) for each in told["differences"])

    with httpx.Client(base_url=sandbox_url) as http:
        gateway = Stripe(sandbox_url, http).gateway()
        payments = [new_payment_id() for _ in range(4)]
        async with running_worker(postgres_url, gateway) as worker:
            for each in payments:
                await worker.accept(delivery("charge", each, f"charge-{each}"))
            await worker.idle()
            await worker.accept(delivery("refund", payments[0], "refund", amount_minor=2_500))
            await worker.idle()
        await gateway.close()
        assert await differences() == []

        behind_our_back = {"amount": "7700", "currency": "usd", "payment_method": "pm_card_visa", "confirm": "true"}
        await asyncio.to_thread(post, http, "payment_intents", behind_our_back)
        reference = await value(
            postgres_url, "SELECT gateway_payment_id FROM payments WHERE payment_id = $1", payments[1]
        )
        await asyncio.to_thread(post, http, "refunds", {"payment_intent": reference, "amount": "1000"})
        await value(
            postgres_url,
            """WITH attempt AS (UPDATE operations SET reference = 'pi_gone' WHERE payment_id = $1)
               UPDATE payments SET gateway_payment_id = 'pi_gone' WHERE payment_id = $1 RETURNING 1""",
            payments[2],
        )
        assert await differences() == [
            ("not at the provider", ""),
            ("not in our books", "USD 100.00"),
            ("not in our books", "USD 77.00"),
            ("refunded", "USD 10.00"),
        ]


def post(http: httpx.Client, path: str, form: dict[str, Any]) -> str:
    """Do something at the provider with our account, but not through our service; returns the new object's id."""
    answer = http.post(f"/v1/{path}", data=form, headers=AUTHORIZATION).raise_for_status()
    return str(answer.json()["id"])


class NotReallyStripe(BookkeepingGateway):
    """A gateway by the name of Stripe, for payments that the test made at the provider beforehand."""

    name = "stripe"


async def test_a_payment_that_was_paid_by_two_attempts_is_compared_attempt_by_attempt(
    postgres_url: str, sandbox_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = Settings(postgres_url=postgres_url, stripe_api_base=sandbox_url, stripe_api_key="sk_test_report")
    paid = {"amount": "10000", "currency": "usd", "payment_method": "pm_card_visa", "confirm": "true"}
    payment_id, gateway, today = new_payment_id(), NotReallyStripe(), datetime.now(UTC).date()
    with httpx.Client(base_url=sandbox_url) as http:
        first, second = [await asyncio.to_thread(post, http, "payment_intents", paid) for _ in range(2)]
        outcomes: dict[int, Outcome] = {1: Declined(DeclineReason.OTHER, None, first), 2: Succeeded(second, 10_000)}
        gateway.outcome = lambda request: outcomes.get(request.operation_number)
        async with running_worker(postgres_url, gateway) as worker:
            for key in ("first", "second"):
                await worker.accept(delivery("charge", payment_id, key))
                await worker.idle()
            late = Notice("stripe", "", "", payment_id, 1, outcome=Succeeded(first, 10_000))
            await worker.write_path.apply([Notified(None, payment_id, late)])
        assert await value(postgres_url, "SELECT (captured_minor, owed_captured_minor)::text FROM payments") == (
            "(20000,10000)"
        )
        assert await asyncio.to_thread(report_day, settings, today, None, as_json=False) == 0
        assert "not over yet" in capsys.readouterr().out
        await asyncio.to_thread(post, http, "refunds", {"payment_intent": first})
        assert await asyncio.to_thread(report_day, settings, today, None, as_json=True) == 1
        found = json.loads(capsys.readouterr().out)["differences"]
        assert [(each["provider_reference"], each["what"]) for each in found] == [(first, "refunded")]
        async with running_worker(postgres_url, gateway) as worker:
            outcome, returned = Succeeded("re_1", 10_000), External(OperationKind.REFUND, 10_000)
            told = Notice("stripe", "", "", payment_id, None, first, outcome, "USD", external=returned)
            await worker.write_path.apply([Notified(None, payment_id, told)])
        assert await asyncio.to_thread(report_day, settings, today, None, as_json=True) == 0


# --- PayPal: movement by movement -------------------------------------------------------------------------------------


class NotReallyPayPal(BookkeepingGateway):
    """Payments through this gateway are in our books alone."""

    name = "paypal"


def report_of_today(settings: Settings, capsys: pytest.CaptureFixture[str]) -> tuple[int, list[dict[str, str]]]:
    """How many movements PayPal lists today, and where our books differ."""
    code = report_day(settings, datetime.now(UTC).date(), None, as_json=True)
    told = json.loads(capsys.readouterr().out)
    assert code == bool(told["differences"])
    return told["listed"], told["differences"]


async def test_each_capture_and_refund_is_held_against_paypals_list(
    postgres_url: str, sandbox_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = Settings(
        postgres_url=postgres_url,
        gateways=["paypal"],
        default_gateway="paypal",
        paypal_client_id="report",
        paypal_client_secret="secret",
        paypal_api_base=sandbox_url,
    )
    paid, held, lost, changed, ours_alone = (new_payment_id() for _ in range(5))

    async def differences() -> tuple[int, list[dict[str, str]]]:
        return await asyncio.to_thread(report_of_today, settings, capsys)

    with httpx.Client(base_url=sandbox_url) as http:
        paypal = PayPalSandbox(sandbox_url, http)
        gateway = paypal_gateway(sandbox_url)
        async with running_worker(postgres_url, gateway) as worker:

            async def does(kind: str, payment_id: UUID, key: str, **fields: Any) -> None:
                method = {"payment_method": PAYS} if kind in ("charge", "authorize") else {}
                await worker.accept(delivery(kind, payment_id, f"{payment_id}-{key}", **method | fields))
                await worker.idle()

            await does("charge", paid, "refused", payment_method="vault:refused")
            for each in (paid, lost, changed):
                if each is lost:
                    paypal.fault("cut_after", operation="create", payment_id=str(lost), times=1)
                await does("charge", each, "charge")
            await does("refund", paid, "part", amount_minor=2_500)
            await does("authorize", held, "hold")
            await does("capture", held, "part", amount_minor=4_000)
            await does("capture", held, "rest")
            await does("refund", held, "refund", amount_minor=6_000)

            listed, [found] = await differences()
            assert (listed, found["payment_id"], found["what"]) == (7, str(lost), "captured")
            assert (found["ours"], found["theirs"]) == ("indeterminate", "USD 100.00")
            assert "still open" in found["likely_cause"]

            await value(postgres_url, "UPDATE operations SET due_at = now() WHERE state = 'indeterminate' RETURNING 1")
            await worker.sweep.sweep_once()
            await worker.idle()
        await gateway.close()
        assert await differences() == (7, [])

        async with running_worker(postgres_url, NotReallyPayPal()) as worker:
            await worker.accept(delivery("charge", ours_alone, "ours"))
            await worker.idle()
        paypal.charge("somebody else's").raise_for_status()
        reference = await value(postgres_url, "SELECT gateway_payment_id FROM payments WHERE payment_id = $1", paid)
        [capture] = paypal.order(reference)["purchase_units"][0]["payments"]["captures"]
        refund_in_the_portal(paypal, capture["id"])
        await value(
            postgres_url, "UPDATE operations SET amount_minor = 9_900 WHERE payment_id = $1 RETURNING 1", changed
        )
        listed, found_now = await differences()
    told = sorted((each["what"], str(each["payment_id"]), each["ours"], each["theirs"]) for each in found_now)
    assert listed == 9
    assert told == sorted([
        ("captured", str(changed), "USD 99.00", "USD 100.00"),
        ("not at the provider", str(ours_alone), "captured USD 100.00", ""),
        ("not in our books", "None", "", "USD 10.00"),
        ("not in our books", str(paid), "", "USD 5.00"),
    ])  # fmt: skip
    causes = {each["theirs"]: each["likely_cause"] for each in found_now}
    assert causes["USD 10.00"] == "not made by this service"
    assert causes["USD 5.00"].startswith("a refund made in the provider's dashboard")


async def test_a_movement_known_to_us_but_not_listed_by_paypal_is_reported(
    postgres_url: str, sandbox_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    own = {"paypal_client_id": "x", "paypal_client_secret": "x", "paypal_api_base": sandbox_url}
    settings = Settings(postgres_url=postgres_url, gateways=["paypal"], default_gateway="paypal", **own)  # type: ignore[arg-type]
    payment_id = new_payment_id()
    async with running_worker(postgres_url, NotReallyPayPal()) as worker:
        await worker.accept(delivery("charge", payment_id, "ours"))
        await worker.idle()
        outcome, returned = Succeeded("refund-of-nobody", 500), External(OperationKind.REFUND, 500)
        told = Notice("paypal", "", "", payment_id, None, outcome=outcome, currency="USD", external=returned)
        await worker.write_path.apply([Notified(None, payment_id, told)])
    _, found = await asyncio.to_thread(report_of_today, settings, capsys)
    assert sorted((each["what"], each["ours"]) for each in found) == [
        ("not at the provider", "captured USD 100.00"),
        ("not at the provider", "refunded USD 5.00"),
    ]


def refund_in_the_portal(paypal: PayPalSandbox, capture_id: str) -> None:
    """Refund without marks of its own: PayPal copies the capture's marks to it."""
    answer = paypal.http.post(
        f"/v2/payments/captures/{capture_id}/refund",
        json={"amount": {"currency_code": "USD", "value": "5.00"}},
        headers={"Authorization": f"Bearer {paypal.token()}", "PayPal-Request-Id": "portal"},
    )
    answer.raise_for_status()


async def test_a_list_that_cannot_be_read_is_said_so_and_nothing_is_called_missing(
    postgres_url: str, sandbox_url: str
) -> None:
    own = {"paypal_client_id": "x", "paypal_client_secret": "x", "paypal_api_base": sandbox_url}
    settings = Settings(postgres_url=postgres_url, gateways=["paypal"], default_gateway="paypal", **own)  # type: ignore[arg-type]
    with httpx.Client(base_url=sandbox_url) as http:
        PayPalSandbox(sandbox_url, http).fault("503", operation="search", times=1)
        with pytest.raises(ListUnreadable, match="nothing was compared"):
            await asyncio.to_thread(report_day, settings, datetime.now(UTC).date(), None, as_json=True)


@pytest.mark.parametrize("gateway", ["vnpay", "momo"])
def test_a_provider_without_a_list_is_said_so(gateway: str, capsys: pytest.CaptureFixture[str]) -> None:
    settings, today = Settings(gateways=[gateway], default_gateway=gateway), datetime.now(UTC).date()
    with pytest.raises(NoList, match=f"{gateway} offers no list") as refused:
        report_day(settings, today, None, as_json=False)
    assert refused.value.gateway == gateway
    assert report_day(settings, today, None, as_json=True) == 1
    told = json.loads(capsys.readouterr().out)
    assert (told["gateway"], told["error"]) == (gateway, "no_list")


@pytest.mark.parametrize("as_json", [True, False])
def test_a_day_that_has_not_begun_is_refused(as_json: bool, capsys: pytest.CaptureFixture[str]) -> None:
    tomorrow = datetime.now(UTC).date() + timedelta(days=1)
    assert report_day(Settings(), tomorrow, None, as_json=as_json) == 1
    told = capsys.readouterr()
    assert "has not begun" in (told.out if as_json else told.err)


def test_a_gateway_that_is_not_used_here_has_no_books_to_compare() -> None:
    with pytest.raises(ValueError, match="gateway paypal is not used here; PAYMENTS_GATEWAYS has: stripe"):
        report_day(Settings(), datetime.now(UTC).date(), "paypal", as_json=True)
