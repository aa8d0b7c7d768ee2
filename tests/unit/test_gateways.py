"""The documented matrix of gateways is the code's, and no gateway is created without the settings it needs."""

import asyncio
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import pytest
from pydantic import SecretStr
from structlog.testing import capture_logs

from app.gateways import known_capabilities, rows
from app.settings import Settings
from app.webhooks import WebhookService
from app.wiring import GATEWAYS, create_gateways, create_rules, create_webhook_readers
from domain.capabilities import AmountLimits, Listing
from domain.ports import Movements, Statements
from handlers.messages.command_models import ChargePayment
from infra.gateways.stripe_objects import LAST_CAPTURE, METADATA_KEYS_MAX

DOCUMENT = Path(__file__).parents[2] / "docs" / "gateways.md"


def test_the_documented_matrix_is_what_the_code_decides_by() -> None:
    known = known_capabilities(Settings())
    table = [line for line in DOCUMENT.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    expected = [["", *known], *rows(known)]
    assert [[cell.strip() for cell in line.strip("|").split("|")] for line in table[: len(expected) + 1]] == [
        expected[0],
        ["---"] * (len(known) + 1),
        *expected[1:],
    ]


def test_a_sender_is_told_what_stripe_leaves_out_of_their_metadata() -> None:
    own = ("payment_id", "operation_number", "order_id", LAST_CAPTURE)
    for told in (ChargePayment.model_fields["metadata"].description, DOCUMENT.read_text(encoding="utf-8")):
        assert told is not None
        assert f"at most {METADATA_KEYS_MAX - len(own)}" in told
        assert ", ".join(f"`{name}`" for name in own) in told


def test_every_gateway_but_the_one_for_benchmarks_receives_webhooks() -> None:
    assert [name for name, each in GATEWAYS.items() if each.webhooks is None] == ["instant"]


async def test_a_gateway_lists_what_it_declares_to_list() -> None:
    ways = {Listing.NONE: (), Listing.PAYMENTS: (Statements,), Listing.MOVEMENTS: (Movements,)}
    for each in GATEWAYS.values():
        gateway = each.create(Settings(), lambda: datetime.now(UTC))
        fits = tuple(way for way in (Statements, Movements) if isinstance(gateway, way))
        assert fits == ways[gateway.capabilities.listing]
        await gateway.close()


SHOP = "https://shop.invalid/return"
NEEDED = {
    "stripe": {"stripe_api_key": "sk_test_key", "stripe_return_url": SHOP},
    "paypal": {
        "paypal_client_id": "client",
        "paypal_client_secret": "secret",
        "paypal_return_url": SHOP,
        "paypal_cancel_url": SHOP,
    },
    "vnpay": {"vnpay_tmn_code": "TEST1234", "vnpay_hash_secret": "secret", "vnpay_return_url": SHOP},
    "momo": {
        "momo_partner_code": "MOMO",
        "momo_access_key": "access",
        "momo_secret_key": "secret",
        "momo_redirect_url": SHOP,
        "momo_ipn_url": SHOP,
    },
}


@pytest.mark.parametrize("gateway", NEEDED)
async def test_a_gateway_is_not_used_without_its_credentials_and_where_it_sends_payers(gateway: str) -> None:
    own = NEEDED[gateway]
    for missing in own:
        lacking = {name: value for name, value in own.items() if name != missing}
        settings = Settings(gateways=[gateway], default_gateway=gateway, **lacking)  # type: ignore[arg-type]
        for create in (create_gateways, create_webhook_readers):
            if create is create_webhook_readers and missing == "stripe_api_key":
                continue  # Needed for calls only, not to read webhooks.
            with pytest.raises(ValueError, match=f"PAYMENTS_{missing.upper()}"):
                create(settings)
    more = {"paypal_webhook_id": "1JE4291016473214C"} if gateway == "paypal" else {}
    settings = Settings(gateways=[gateway], default_gateway=gateway, **own, **more)  # type: ignore[arg-type]
    for created in (create_gateways(settings), create_webhook_readers(settings)):
        assert set(created) == {gateway}
        await created[gateway].close()


@pytest.mark.parametrize(
    ("own", "limits"),
    [
        ({"maximum_minor": 100_000}, AmountLimits(5_000, 100_000)),
        ({"minimum_minor": 20_000}, AmountLimits(20_000, 999_999_999)),
        ({"minimum_minor": 1, "maximum_minor": 10**10}, AmountLimits(1, 10**10)),
    ],
)
async def test_a_bound_that_an_installation_does_not_set_is_the_providers_own(
    own: dict[str, int], limits: AmountLimits
) -> None:
    needed, bounds = NEEDED["vnpay"], {"vnpay": {"VND": own}}
    settings = Settings(gateways=["vnpay"], default_gateway="vnpay", amount_limits=bounds, **needed)  # type: ignore[arg-type]
    gateways = create_gateways(settings)
    assert create_rules(settings, gateways).limits == {("vnpay", "VND"): limits}
    await gateways["vnpay"].close()


@pytest.mark.parametrize(
    ("own", "told"),
    [
        ({}, {"paypal": "PAYMENTS_PAYPAL_WEBHOOK_ID", "stripe": "PAYMENTS_STRIPE_WEBHOOK_SECRETS"}),
        ({"paypal_webhook_id": "1JE4291016473214C"}, {"stripe": "PAYMENTS_STRIPE_WEBHOOK_SECRETS"}),
        ({"stripe_webhook_secrets": [SecretStr("")]}, {"stripe": "PAYMENTS_STRIPE_WEBHOOK_SECRETS", "paypal": ANY}),
        ({"stripe_webhook_secrets": [SecretStr("whsec_1")], "paypal_webhook_id": "1JE4291016473214C"}, {}),
    ],
)
async def test_an_operator_is_told_which_setting_webhooks_are_refused_without(
    own: dict[str, Any], told: dict[str, str]
) -> None:
    names = ["momo", "paypal", "stripe", "vnpay"]
    given: dict[str, Any] = {key: value for name in names for key, value in NEEDED[name].items()} | own
    with capture_logs() as logs:
        service = WebhookService(Settings(gateways=names, default_gateway="stripe", **given))
    assert {each["gateway"]: each["set"] for each in logs if each["log_level"] == "warning"} == told
    await asyncio.gather(*(each.close() for each in service._readers.values()))


def test_the_gateway_that_moves_no_money_is_not_used_beside_others() -> None:
    settings = Settings(gateways=["stripe", "instant"], default_gateway="stripe", **NEEDED["stripe"])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="instant reports every payment as paid"):
        create_gateways(settings)


@pytest.mark.parametrize("is_granted", [False, True])
def test_stripe_captures_several_times_where_the_installation_says_that_it_may(*, is_granted: bool) -> None:
    assert known_capabilities(Settings(stripe_multi_capture=is_granted))["stripe"].multi_capture is is_granted
