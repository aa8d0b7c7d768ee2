"""A day's books against the provider's own list: equal where all went well; each difference is found, both ways."""

import asyncio
import json
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import httpx
import pytest

from app.daily_report import report_day
from app.settings import Settings
from tests.contract.providers import Stripe
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
            postgres_url, "UPDATE payments SET gateway_payment_id = 'pi_gone' WHERE payment_id = $1 RETURNING 1",
            payments[2],
        )  # fmt: skip
        assert await differences() == [
            ("not at the provider", ""),
            ("not in our books", "USD 100.00"),
            ("not in our books", "USD 77.00"),
            ("refunded", "USD 10.00"),
        ]


def post(http: httpx.Client, path: str, form: dict[str, Any]) -> None:
    """What somebody else does at the provider, with our account."""
    http.post(f"/v1/{path}", data=form, headers=AUTHORIZATION).raise_for_status()


async def test_a_provider_without_a_list_is_said_so() -> None:
    settings = Settings(gateways=["momo"], default_gateway="momo")
    with pytest.raises(ValueError, match="offers no list"):
        await asyncio.to_thread(report_day, settings, datetime.now(UTC).date(), None, as_json=True)
