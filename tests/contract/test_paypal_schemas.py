"""A payment from its order to its last refund conforms to PayPal's OpenAPI documents.

The other PayPal tests check their traffic against the same documents (`as_documented`). This one shows that every kind
of request that the gateway makes is checked, and that a wrong one would be noticed.
"""

import json
import re
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest

from domain.commands import OperationKind
from domain.money import Money
from domain.operations import OperationState, Pending, RequiresAction, Succeeded
from domain.ports import Gateway, Movements
from tests.contract.gateway_requests import a_request, follow_up, in_doubt, opened, run
from tests.contract.paypal import PAYS, PayPalSandbox, paypal_gateway, running_paypal
from tests.contract.paypal_schemas import Exchange, recorded, violations

REQUESTS = {
    "POST /v2/checkout/orders",
    "GET /v2/checkout/orders/{id}",
    "POST /v2/checkout/orders/{id}/authorize",
    "POST /v2/checkout/orders/{id}/capture",
    "POST /v2/payments/authorizations/{id}/capture",
    "POST /v2/payments/authorizations/{id}/void",
    "POST /v2/payments/captures/{id}/refund",
    "GET /v2/payments/refunds/{id}",
    "GET /v1/reporting/transactions",
}
"""Every request that the gateway ever makes to PayPal, except for the access token."""


@pytest.fixture(scope="module")
def paypal() -> Iterator[PayPalSandbox]:
    with running_paypal() as sandbox:
        yield sandbox


@pytest.fixture
async def gateway(paypal: PayPalSandbox) -> AsyncIterator[Gateway]:
    gateway = paypal_gateway(paypal.url)
    yield gateway
    await gateway.close()


async def approved(gateway: Gateway, paypal: PayPalSandbox, kind: OperationKind) -> None:
    """Run an opening whose payer has to approve, and does."""
    request = a_request(kind, payment_method=None)
    action = await run(gateway, request)
    assert isinstance(action, RequiresAction)
    paypal.approve(action.reference)
    waiting = request._replace(state=OperationState.REQUIRES_ACTION, reference=action.reference)
    assert isinstance(await gateway.resume(waiting), Succeeded)


async def captured_in_parts_released_and_refunded(gateway: Gateway) -> None:
    hold = await opened(gateway, payment_method=PAYS)
    part = follow_up(*hold, OperationKind.CAPTURE, amount=Money(400, "USD"), is_final=False)
    requests = [part]
    for number, kind, minor in ((3, OperationKind.CAPTURE, 300), (4, OperationKind.VOID, 550)):
        requests.append(follow_up(*hold, kind, number=number, amount=Money(minor, "USD"), is_final=False))
    requests.append(follow_up(*hold, OperationKind.REFUND, number=5, amount=Money(100, "USD")))
    for request in requests:
        assert isinstance(await run(gateway, request), Succeeded)
        assert isinstance(await gateway.status(in_doubt(request)), Succeeded)


async def a_refund_that_the_order_does_not_list(gateway: Gateway, paypal: PayPalSandbox) -> None:
    charged = await opened(gateway, OperationKind.CHARGE, payment_method="vault:pending-refund")
    request = follow_up(*charged, OperationKind.REFUND)
    pending = await run(gateway, request)
    assert isinstance(pending, Pending)
    paypal.post(f"refunds/{pending.reference}/unlist")
    assert isinstance(await gateway.status(request._replace(reference=pending.reference)), Pending)


async def what_was_moved_is_listed(gateway: Gateway) -> None:
    assert isinstance(gateway, Movements)
    now = datetime.now(UTC)
    listed = [each async for each in gateway.movements(now - timedelta(hours=1), now + timedelta(hours=1))]
    assert {each.is_refund for each in listed} == {False, True}
    assert [each async for each in gateway.movements(now - timedelta(days=2), now - timedelta(days=1))] == []


async def test_everything_that_the_gateway_and_paypal_say_is_as_documented(
    gateway: Gateway, paypal: PayPalSandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    with recorded(monkeypatch) as exchanges:
        await approved(gateway, paypal, OperationKind.AUTHORIZE)
        await approved(gateway, paypal, OperationKind.CHARGE)
        await captured_in_parts_released_and_refunded(gateway)
        await a_refund_that_the_order_does_not_list(gateway, paypal)
        await what_was_moved_is_listed(gateway)
    assert [told for each in exchanges for told in violations(each)] == []
    said = {_place(each.request) for each in exchanges} - {"POST /v1/oauth2/token"}
    assert said == REQUESTS


def _place(request: httpx.Request) -> str:
    return re.sub(r"/[A-Z0-9]{17}", "/{id}", f"{request.method} {request.url.path}")


# --- violations that would be noticed ---------------------------------------------------------------------------------

ORDER: dict[str, Any] = {
    "intent": "CAPTURE",
    "purchase_units": [{"custom_id": "p1.1", "amount": {"currency_code": "USD", "value": "10.00"}}],
    "payment_source": {"paypal": {"vault_id": "good"}},
}
REFUND: dict[str, Any] = {"id": "R1", "status": "COMPLETED", "amount": {"currency_code": "USD", "value": "10.00"}}
REFUSAL: dict[str, Any] = {
    "name": "UNPROCESSABLE_ENTITY",
    "message": "The requested action could not be performed, semantically incorrect, or failed business validation.",
    "debug_id": "d1",
    "details": [{"issue": "REFUND_AMOUNT_EXCEEDED", "description": "in whatever words"}],
}


def said(path: str, body: Any, answer: Any = None, status: int = 201, **headers: str) -> list[str]:
    request = httpx.Request(
        "POST", f"http://paypal.invalid{path}", json=body, headers={"Authorization": "Bearer t"} | headers
    )
    return violations(Exchange(request, None if answer is None else httpx.Response(status, json=answer)))


def test_documented_messages_raise_no_complaint() -> None:
    assert said("/v2/checkout/orders", ORDER) == []
    assert said("/v2/payments/captures/C1/refund", {}, REFUND) == []
    assert said("/v2/payments/captures/C1/refund", {}, REFUSAL, 422) == []


@pytest.mark.parametrize(
    "unit",
    [
        {"amount": {"currency_code": "USD", "value": 10}},
        {"amount": {"value": "10.00"}},
        {"amount": {"currency_code": "USD", "value": "ten"}},
        {"amount": {"currency_code": "USD", "value": "10.00"}, "custom_id": "x" * 128},
        {"amount": {"currency_code": "USD", "value": "10.00"}, "customId": "p1.1"},
        {},
    ],
    ids=["a number", "no currency", "no amount", "too long", "misspelt", "nothing"],
)
def test_a_broken_request_is_noticed(unit: dict[str, Any]) -> None:
    assert said("/v2/checkout/orders", ORDER | {"purchase_units": [unit]})


@pytest.mark.parametrize(
    ("answer", "status"),
    [
        (REFUND | {"status": "DONE"}, 201),
        (REFUND | {"custom_id": "p1:1"}, 201),
        (REFUND | {"refund_status": "COMPLETED"}, 201),
        (REFUND | {"create_time": "yesterday"}, 201),
        (REFUSAL | {"details": [{"issue": "ORDER_EXPIRED", "description": ""}]}, 422),
        (REFUSAL | {"message": "no"}, 422),
        (REFUSAL, 404),
    ],
    ids=["status", "pattern", "field", "time", "another's issue", "message", "another's status"],
)
def test_a_broken_answer_is_noticed(answer: dict[str, Any], status: int) -> None:
    assert said("/v2/payments/captures/C1/refund", {}, answer, status)


def test_a_request_without_a_token_or_to_nowhere_is_noticed() -> None:
    assert said("/v2/checkout/orders", ORDER, Authorization="")
    assert said("/v2/checkout/ordres", ORDER)
    assert said("/v2/payments/captures/C1/refund", json.loads("[]"))
