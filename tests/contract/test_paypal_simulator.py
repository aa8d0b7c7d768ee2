"""The PayPal gateway against the PayPal simulator, over HTTP: the payer's consent, refunds, tokens, webhooks.

What holds at every provider, under every fault, is in test_every_gateway.py.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from uuid import UUID

import pytest
from pydantic import SecretStr

from domain.commands import OperationKind
from domain.errors import GatewayUnreachable
from domain.money import Money
from domain.notices import Dispute, DisputeStage, Notice, Verdict, WebhookRefused, WebhookRequest
from domain.operations import (
    Declined,
    DeclineReason,
    Expired,
    GatewayRequest,
    NotExecuted,
    OperationState,
    Outcome,
    Pending,
    RequiresAction,
    Succeeded,
    Unknown,
    Unreachable,
)
from domain.ports import Gateway
from infra.gateways.paypal import PayPalConfig, PayPalGateway
from infra.gateways.paypal_webhooks import PayPalWebhooks, read_event
from infra.sandbox.paypal import PayPalSimulator
from infra.sandbox.stripe import ROUTES as STRIPE_ROUTES
from tests.contract.gateway_requests import a_request, follow_up, in_doubt, opened, run
from tests.contract.paypal import DECLINES, PAYS, PayPalSandbox, paypal_gateway, running_paypal
from tests.contract.paypal_schemas import OF_TOMORROW, Exchange, as_answer, violations

pytestmark = pytest.mark.usefixtures("as_documented")

OPENINGS = [OperationKind.AUTHORIZE, OperationKind.CHARGE]
EFFECTS = {OperationKind.AUTHORIZE: (1250, 0, 0), OperationKind.CHARGE: (0, 1250, 0)}
AFTER = ["cut_after", "truncated", "garbage", "500_after"]


@pytest.fixture(scope="module")
def server() -> Iterator[PayPalSandbox]:
    with running_paypal() as sandbox:
        yield sandbox


@pytest.fixture
def paypal(server: PayPalSandbox) -> PayPalSandbox:
    server.post("reset")
    return server


@pytest.fixture
async def connect(paypal: PayPalSandbox) -> AsyncIterator[Callable[..., Gateway]]:
    built: list[Gateway] = []

    def connect_to(url: str = paypal.url, **settings: Any) -> Gateway:
        built.append(paypal_gateway(url, **settings))
        return built[-1]

    yield connect_to
    for gateway in built:
        await gateway.close()


@pytest.fixture
def gateway(connect: Callable[..., Gateway]) -> Gateway:
    return connect()


async def asked(gateway: Gateway, kind: OperationKind) -> tuple[GatewayRequest, RequiresAction]:
    """An opening that waits for the payer: the request with which the dispatcher resumes it, and the answer."""
    request = a_request(kind, payment_method=None)
    outcome = await run(gateway, request)
    assert isinstance(outcome, RequiresAction), outcome
    return request._replace(state=OperationState.REQUIRES_ACTION, reference=outcome.reference), outcome


@pytest.mark.parametrize("wallet", ["pm_sandbox_lost_answer", "pm_sandbox_lost_request", "pm_sandbox_500"])
async def test_a_demo_needs_no_rules_for_a_wallet_that_fails_once(
    gateway: Gateway, paypal: PayPalSandbox, wallet: str
) -> None:
    request = a_request(payment_method=f"vault:{wallet}")

    assert [type(await run(gateway, each)) for each in (request, in_doubt(request))] == [Unknown, Succeeded]
    assert paypal.executed_charges(request.payment_id) == 1


# --- the payer ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", OPENINGS)
async def test_a_payer_is_asked_and_an_approval_is_executed_once(
    gateway: Gateway, paypal: PayPalSandbox, kind: OperationKind
) -> None:
    request, action = await asked(gateway, kind)
    assert action.action_type == "redirect"
    assert action.url is not None
    assert action.url.startswith(paypal.url)
    assert action.expires_at is not None
    assert await gateway.status(request) == action
    assert await gateway.resume(request) == action

    paypal.approve(action.reference)
    assert isinstance(await gateway.status(request), Pending)
    assert paypal.effect(request.payment_id) == (0, 0, 0)
    outcomes = [await gateway.resume(request) for _ in range(3)]

    assert outcomes[0] == Succeeded(action.reference, 1250, getattr(outcomes[0], "expires_at", None))
    assert outcomes[1:] == outcomes[:1] * 2
    assert paypal.effect(request.payment_id) == EFFECTS[kind]
    assert paypal.executed_charges(request.payment_id) == 1


@pytest.mark.parametrize("kind", OPENINGS)
@pytest.mark.parametrize("fault", [*AFTER, "500_before", "cut_before", "409"])
async def test_an_execution_whose_answer_is_lost_is_pending_and_found_by_resuming(
    gateway: Gateway, paypal: PayPalSandbox, kind: OperationKind, fault: str
) -> None:
    request, action = await asked(gateway, kind)
    paypal.approve(action.reference)
    paypal.fault(fault, operation="confirm", times=1)

    assert await gateway.resume(request) == Pending(action.reference)
    again = await gateway.resume(request._replace(state=OperationState.PENDING))

    assert isinstance(again, Pending if fault == "500_before" else Succeeded)
    assert paypal.effect(request.payment_id) == ((0, 0, 0) if fault == "500_before" else EFFECTS[kind])


@pytest.mark.parametrize("kind", OPENINGS)
async def test_parallel_resumes_execute_once(gateway: Gateway, paypal: PayPalSandbox, kind: OperationKind) -> None:
    request, action = await asked(gateway, kind)
    paypal.approve(action.reference)
    paypal.fault("slow", operation="confirm", times=1, seconds=0.2)

    outcomes = await asyncio.gather(*(gateway.resume(request) for _ in range(5)))

    assert all(isinstance(each, Succeeded | Pending) for each in outcomes)
    assert any(isinstance(each, Succeeded) for each in outcomes)
    assert paypal.executed_charges(request.payment_id) == 1


async def test_an_execution_that_was_turned_away_leaves_the_consent_for_later(
    gateway: Gateway, paypal: PayPalSandbox
) -> None:
    request, action = await asked(gateway, OperationKind.CHARGE)
    paypal.approve(action.reference)
    paypal.fault("429", operation="confirm", times=1)

    with pytest.raises(GatewayUnreachable):
        await gateway.resume(request)

    assert isinstance(await gateway.resume(request), Succeeded)


async def test_a_refusal_to_execute_is_no_proof_that_nothing_was_executed_before(
    gateway: Gateway, paypal: PayPalSandbox
) -> None:
    request, action = await asked(gateway, OperationKind.AUTHORIZE)
    paypal.approve(action.reference)
    paypal.fault("decline", operation="confirm", code="ACTION_DOES_NOT_MATCH_INTENT")

    assert await gateway.resume(request._replace(state=OperationState.DISPATCHED)) == Pending(action.reference)


@pytest.mark.parametrize("issue", ["PAYER_ACTION_REQUIRED", "ORDER_EXPIRED"])
async def test_paypals_word_on_the_order_itself_is_believed(
    gateway: Gateway, paypal: PayPalSandbox, issue: str
) -> None:
    request, action = await asked(gateway, OperationKind.AUTHORIZE)
    paypal.approve(action.reference)
    paypal.fault("decline", operation="confirm", code=issue)

    outcome = await gateway.resume(request)

    assert outcome == (Expired(action.reference, issue) if issue == "ORDER_EXPIRED" else Pending(action.reference))


async def test_an_order_that_another_key_executed_is_read_and_not_executed_again(
    gateway: Gateway, paypal: PayPalSandbox
) -> None:
    """A new key is as good as an old one that PayPal no longer remembers."""
    request, action = await asked(gateway, OperationKind.CHARGE)
    paypal.approve(action.reference)
    await gateway.resume(request)

    assert isinstance(await gateway.resume(request._replace(provider_key="another")), Succeeded)
    assert paypal.executed_charges(request.payment_id) == 1


@pytest.mark.parametrize("wallet", ["declined-TRANSACTION_REFUSED", "refused"])
@pytest.mark.parametrize("kind", OPENINGS)
async def test_a_wallet_that_is_refused_after_the_approval_is_a_decline(
    gateway: Gateway, paypal: PayPalSandbox, kind: OperationKind, wallet: str
) -> None:
    request, action = await asked(gateway, kind)
    paypal.approve(action.reference, wallet)

    outcomes = [await gateway.resume(request) for _ in range(2)]

    assert isinstance(outcomes[0], Declined)
    assert outcomes[0] == outcomes[1]
    assert outcomes[0].reference == action.reference
    assert paypal.effect(request.payment_id) == (0, 0, 0)


async def test_an_order_that_the_payer_denied_is_declined(gateway: Gateway, paypal: PayPalSandbox) -> None:
    request, action = await asked(gateway, OperationKind.CHARGE)
    paypal.deny(action.reference)

    assert await gateway.resume(request) == Declined(DeclineReason.CANCELED, "VOIDED", action.reference)


async def test_an_order_that_is_gone_has_expired_only_in_its_time_and_while_nothing_is_in_doubt(
    gateway: Gateway, paypal: PayPalSandbox
) -> None:
    created, action = await asked(gateway, OperationKind.CHARGE)
    paypal.expire(action.reference)
    request = created._replace(first_dispatched_at=datetime.now(UTC) - timedelta(hours=4))
    long_ago = datetime.now(UTC) - timedelta(days=4)

    assert isinstance(await gateway.resume(created), Unknown)
    assert await gateway.resume(request) == Expired(action.reference, "RESOURCE_NOT_FOUND")
    assert isinstance(await gateway.resume(request._replace(state=OperationState.PENDING)), Unknown)
    assert isinstance(await gateway.resume(request._replace(first_dispatched_at=long_ago)), Unknown)
    assert isinstance(await gateway.status(in_doubt(request)), Unknown)


async def test_a_lost_creation_is_found_by_the_same_key_and_the_payer_is_asked(
    gateway: Gateway, paypal: PayPalSandbox
) -> None:
    request = a_request(payment_method=None)
    paypal.fault("cut_after", operation="create", times=1)

    lost, found = await run(gateway, request), await run(gateway, in_doubt(request))

    assert isinstance(lost, Unknown)
    assert isinstance(found, RequiresAction)
    assert paypal.payment(request.payment_id)["orders"] == 1


async def test_an_opening_in_doubt_whose_order_is_known_goes_on_with_that_order(
    gateway: Gateway, paypal: PayPalSandbox
) -> None:
    request, action = await asked(gateway, OperationKind.CHARGE)
    paypal.approve(action.reference)

    assert isinstance(await run(gateway, in_doubt(request)), Succeeded)
    assert paypal.payment(request.payment_id)["orders"] == 1


async def test_voiding_an_order_that_waits_for_the_payer_sends_nothing(gateway: Gateway, paypal: PayPalSandbox) -> None:
    request, action = await asked(gateway, OperationKind.AUTHORIZE)
    void = follow_up(request, action.reference, OperationKind.VOID, state=OperationState.DISPATCHED)

    assert await run(gateway, void) == Succeeded(action.reference)
    assert await gateway.status(in_doubt(void)) == Succeeded(action.reference)
    assert paypal.effect(request.payment_id) == (0, 0, 0)


async def test_a_vaulted_wallet_that_needs_consent_asks_the_payer(gateway: Gateway, paypal: PayPalSandbox) -> None:
    assert isinstance(await run(gateway, a_request(payment_method="vault:asks")), RequiresAction)


# --- declines and refusals ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("payment_method", "reason"), sorted(DECLINES.items()))
@pytest.mark.parametrize("kind", OPENINGS)
async def test_a_refusal_is_a_value_and_repeating_it_charges_nothing(
    gateway: Gateway, paypal: PayPalSandbox, kind: OperationKind, payment_method: str, reason: str
) -> None:
    request = a_request(kind, payment_method=payment_method)

    first, second = await run(gateway, request), await run(gateway, in_doubt(request))

    assert isinstance(first, Declined)
    assert first == second
    assert first.reason == reason
    assert first.code
    assert paypal.executed_charges(request.payment_id) == 0


@pytest.mark.parametrize("kind", OPENINGS)
@pytest.mark.parametrize("status", ["COMPLETED", "DECLINED", OF_TOMORROW])
async def test_a_pending_payment_ends_as_paypal_says(
    gateway: Gateway, paypal: PayPalSandbox, kind: OperationKind, status: str
) -> None:
    request = a_request(kind, payment_method="vault:pending")
    pending = await run(gateway, request)
    assert isinstance(pending, Pending)
    [payment] = next(iter(paypal.order(str(pending.reference))["purchase_units"][0]["payments"].values()))
    names = {"COMPLETED": "CREATED", "DECLINED": "DENIED"} if kind is OperationKind.AUTHORIZE else {}
    table = "authorizations" if kind is OperationKind.AUTHORIZE else "captures"
    paypal.post(f"{table}/{payment['id']}/settle?status={names.get(status, status)}")

    ended = await gateway.resume(request._replace(state=OperationState.PENDING, reference=pending.reference))

    expected = {"COMPLETED": Succeeded, "DECLINED": Declined}.get(status, Pending)
    assert isinstance(ended, expected)


async def test_a_refused_parameter_is_proof_on_the_first_attempt_only(gateway: Gateway, paypal: PayPalSandbox) -> None:
    request = follow_up(*await opened(gateway, payment_method=PAYS), OperationKind.CAPTURE)
    too_much = request._replace(amount=Money(1251, "USD"))

    assert isinstance(await run(gateway, too_much), NotExecuted)
    assert isinstance(await run(gateway, in_doubt(too_much)), Unknown)
    assert paypal.effect(request.payment_id) == (1250, 0, 0)


@pytest.mark.parametrize("money", [Money(150, "HUF"), Money(150, "TWD"), Money(1000, "VND")])
@pytest.mark.parametrize("kind", OPENINGS)
async def test_an_amount_that_paypal_cannot_take_is_refused_before_anything_is_sent(
    gateway: Gateway, paypal: PayPalSandbox, kind: OperationKind, money: Money
) -> None:
    request = a_request(kind, amount=money, payment_method=PAYS)

    assert isinstance(await run(gateway, request), NotExecuted)
    assert paypal.books()["payments"] == {}


@pytest.mark.parametrize("money", [Money(120_000, "HUF"), Money(1200, "JPY"), Money(99, "EUR")])
async def test_amounts_keep_their_value_in_paypals_scale(gateway: Gateway, paypal: PayPalSandbox, money: Money) -> None:
    request, reference = await opened(gateway, OperationKind.CHARGE, amount=money, payment_method=PAYS)
    refund = await run(gateway, follow_up(request, reference, OperationKind.REFUND))

    assert isinstance(refund, Succeeded)
    assert refund.amount_minor == money.minor
    assert paypal.effect(request.payment_id) == (0, money.minor, money.minor)
    assert paypal.books()["currencies"][money.currency.lower()]["captured"] == money.minor


# --- captures, voids and refunds ------------------------------------------------------------------------------------


async def test_captures_of_one_hold_are_told_apart(gateway: Gateway, paypal: PayPalSandbox) -> None:
    hold = await opened(gateway, payment_method=PAYS)
    first = follow_up(*hold, OperationKind.CAPTURE, amount=Money(400, "USD"), is_final=False)
    last = follow_up(*hold, OperationKind.CAPTURE, number=3, amount=Money(850, "USD"))

    assert isinstance(await run(gateway, first), Succeeded)
    assert isinstance(await gateway.status(in_doubt(last)), Unknown)
    paypal.fault("cut_after", operation="capture", times=1)
    assert isinstance(await run(gateway, last), Unknown)

    assert isinstance(await gateway.status(in_doubt(last)), Succeeded)
    assert await run(gateway, in_doubt(first)) == await gateway.status(first)
    assert paypal.effect(last.payment_id) == (0, 1250, 0)


async def test_a_final_partial_capture_releases_the_rest(gateway: Gateway, paypal: PayPalSandbox) -> None:
    hold = await opened(gateway, payment_method=PAYS)

    await run(gateway, follow_up(*hold, OperationKind.CAPTURE, amount=Money(400, "USD"), is_final=False))
    assert paypal.effect(hold[0].payment_id) == (850, 400, 0)
    await run(gateway, follow_up(*hold, OperationKind.CAPTURE, number=3, amount=Money(300, "USD"), is_final=True))

    assert paypal.effect(hold[0].payment_id) == (0, 700, 0)


@pytest.mark.parametrize("fault", [None, *AFTER])
async def test_the_rest_of_a_hold_can_be_released_after_a_partial_capture(
    gateway: Gateway, paypal: PayPalSandbox, fault: str | None
) -> None:
    hold = await opened(gateway, payment_method=PAYS)
    await run(gateway, follow_up(*hold, OperationKind.CAPTURE, amount=Money(400, "USD"), is_final=False))
    request = follow_up(*hold, OperationKind.VOID, number=3, amount=Money(850, "USD"))
    if fault is not None:
        paypal.fault(fault, operation="cancel", times=1)

    outcomes = [await run(gateway, request), await run(gateway, in_doubt(request))]

    assert isinstance(outcomes[-1], Succeeded)
    assert isinstance(outcomes[0], Unknown if fault else Succeeded)
    assert paypal.effect(request.payment_id) == (0, 400, 0)


async def test_a_hold_that_expired_cannot_be_captured_and_counts_as_released(
    gateway: Gateway, paypal: PayPalSandbox
) -> None:
    hold = await opened(gateway, payment_method=PAYS)
    [authorization] = paypal.order(hold[1])["purchase_units"][0]["payments"]["authorizations"]
    paypal.post(f"authorizations/{authorization['id']}/expire")

    assert isinstance(await run(gateway, follow_up(*hold, OperationKind.CAPTURE)), NotExecuted)
    assert isinstance(await run(gateway, in_doubt(follow_up(*hold, OperationKind.CAPTURE, number=3))), NotExecuted)
    assert isinstance(await run(gateway, follow_up(*hold, OperationKind.VOID, number=4)), Succeeded)


async def captured_in_parts(gateway: Gateway, *parts: int) -> tuple[GatewayRequest, str]:
    hold = await opened(gateway, payment_method=PAYS)
    for number, minor in enumerate(parts, start=2):
        request = follow_up(
            *hold, OperationKind.CAPTURE, number=number, amount=Money(minor, "USD"), is_final=number > len(parts)
        )
        assert isinstance(await run(gateway, request), Succeeded)
    return hold


async def test_a_refund_goes_to_the_smallest_capture_that_can_bear_it(gateway: Gateway, paypal: PayPalSandbox) -> None:
    hold = await captured_in_parts(gateway, 750, 400, 100)
    refund = follow_up(*hold, OperationKind.REFUND, number=5, amount=Money(300, "USD"))

    assert isinstance(await run(gateway, refund), Succeeded)

    captures = paypal.order(hold[1])["purchase_units"][0]["payments"]["captures"]
    assert [each["status"] for each in captures] == ["COMPLETED", "PARTIALLY_REFUNDED", "COMPLETED"]


async def test_earlier_refunds_count_when_the_capture_to_refund_is_chosen(
    gateway: Gateway, paypal: PayPalSandbox
) -> None:
    hold = await captured_in_parts(gateway, 750, 500)
    refunds = [follow_up(*hold, OperationKind.REFUND, number=number, amount=Money(400, "USD")) for number in (4, 5)]

    assert [type(await run(gateway, each)) for each in refunds] == [Succeeded, Succeeded]

    captures = paypal.order(hold[1])["purchase_units"][0]["payments"]["captures"]
    assert [each["status"] for each in captures] == ["PARTIALLY_REFUNDED", "PARTIALLY_REFUNDED"]


async def test_a_refund_that_no_single_capture_can_bear_is_not_executed(
    gateway: Gateway, paypal: PayPalSandbox
) -> None:
    hold = await captured_in_parts(gateway, 750, 500)
    refund = follow_up(*hold, OperationKind.REFUND, number=4, amount=Money(751, "USD"))

    outcome = await run(gateway, refund)

    assert isinstance(outcome, NotExecuted)
    assert await run(gateway, in_doubt(refund)) == outcome
    assert "no single capture" in outcome.message
    assert paypal.effect(refund.payment_id) == (0, 1250, 0)


@pytest.mark.parametrize("fault", AFTER)
async def test_a_lost_refund_is_found_although_its_own_effect_makes_another_capture_fit_better(
    gateway: Gateway, paypal: PayPalSandbox, fault: str
) -> None:
    hold = await captured_in_parts(gateway, 750, 500)
    refund = follow_up(*hold, OperationKind.REFUND, number=4, amount=Money(400, "USD"))
    paypal.fault(fault, operation="refund", times=1)

    lost, found = await run(gateway, refund), await run(gateway, in_doubt(refund))

    assert isinstance(lost, Unknown)
    assert isinstance(found, Succeeded)
    assert paypal.effect(refund.payment_id) == (0, 1250, 400)


async def test_several_refunds_add_up_and_no_more_than_was_captured_goes_back(
    gateway: Gateway, paypal: PayPalSandbox
) -> None:
    charge = await opened(gateway, OperationKind.CHARGE, payment_method=PAYS)
    requests = [
        follow_up(*charge, OperationKind.REFUND, number=number, amount=Money(amount, "USD"))
        for number, amount in ((2, 300), (3, 950), (4, 1))
    ]

    outcomes = [await run(gateway, request) for request in requests]

    assert [type(each) for each in outcomes] == [Succeeded, Succeeded, NotExecuted]
    assert isinstance(await run(gateway, in_doubt(requests[2])), Unknown)
    assert paypal.effect(charge[0].payment_id) == (0, 1250, 1250)


@pytest.mark.parametrize(
    ("status", "expected"), [("COMPLETED", Succeeded), ("FAILED", Declined), (OF_TOMORROW, Pending)]
)
async def test_a_pending_refund_ends_as_paypal_says(
    gateway: Gateway, paypal: PayPalSandbox, status: str, expected: type[Outcome]
) -> None:
    charged = await opened(gateway, OperationKind.CHARGE, payment_method="vault:pending-refund")
    request = follow_up(*charged, OperationKind.REFUND)
    pending = await run(gateway, request)
    assert isinstance(pending, Pending)
    paypal.post(f"refunds/{pending.reference}/settle?status={status}")

    known = request._replace(state=OperationState.PENDING, reference=pending.reference)
    assert isinstance(await gateway.resume(known), expected)


async def test_a_refund_that_the_order_does_not_list_is_found_by_its_id(
    gateway: Gateway, paypal: PayPalSandbox
) -> None:
    charged = await opened(gateway, OperationKind.CHARGE, payment_method="vault:pending-refund")
    request = follow_up(*charged, OperationKind.REFUND)
    pending = await run(gateway, request)
    assert isinstance(pending, Pending)
    paypal.post(f"refunds/{pending.reference}/unlist")
    paypal.post(f"refunds/{pending.reference}/settle")

    assert isinstance(await gateway.status(request), Unknown)
    assert isinstance(await gateway.status(request._replace(reference=pending.reference)), Succeeded)


async def test_a_refund_of_a_pending_capture_may_be_tried_later(gateway: Gateway, paypal: PayPalSandbox) -> None:
    pending = await run(gateway, charge := a_request(payment_method="vault:pending"))
    assert isinstance(pending, Pending)

    refund = follow_up(charge, str(pending.reference), OperationKind.REFUND)

    assert isinstance(await run(gateway, refund), Unreachable)


async def test_a_disputed_capture_cannot_be_refunded_and_a_lost_one_is_gone(
    gateway: Gateway, paypal: PayPalSandbox
) -> None:
    charge = await opened(gateway, OperationKind.CHARGE, payment_method=PAYS)
    [capture] = paypal.order(charge[1])["purchase_units"][0]["payments"]["captures"]
    dispute = paypal.post(f"captures/{capture['id']}/dispute")

    assert isinstance(await run(gateway, follow_up(*charge, OperationKind.REFUND)), NotExecuted)
    paypal.post(f"disputes/{dispute['dispute_id']}/lost")

    assert isinstance(await run(gateway, follow_up(*charge, OperationKind.REFUND, number=3)), NotExecuted)
    assert paypal.payment(charge[0].payment_id)["lost"] == 1250


# --- tokens ---------------------------------------------------------------------------------------------------------


async def test_one_token_serves_all_calls_and_parallel_first_calls_share_it(
    gateway: Gateway, paypal: PayPalSandbox
) -> None:
    before = paypal.books()["tokens_issued"]

    await asyncio.gather(*(run(gateway, a_request(payment_method=PAYS)) for _ in range(5)))
    await run(gateway, a_request(payment_method=PAYS))

    assert paypal.books()["tokens_issued"] == before + 1


async def test_a_token_that_paypal_forgot_is_replaced_once_and_the_request_repeated(
    gateway: Gateway, paypal: PayPalSandbox
) -> None:
    await run(gateway, a_request(payment_method=PAYS))
    before = paypal.books()["tokens_issued"]
    paypal.http.delete("/_sandbox/paypal/tokens").raise_for_status()

    outcome = await run(gateway, a_request(payment_method=PAYS))

    assert isinstance(outcome, Succeeded)
    assert paypal.books()["tokens_issued"] == before + 1


@pytest.mark.parametrize("fault", ["429", "503", "cut_before", "cut_after", "truncated", "garbage"])
async def test_without_a_token_nothing_was_sent(gateway: Gateway, paypal: PayPalSandbox, fault: str) -> None:
    paypal.fault(fault, operation="token", times=1)
    request = a_request(payment_method=PAYS)

    assert isinstance(await run(gateway, request), Unreachable)
    assert isinstance(await run(gateway, request), Succeeded)


async def test_credentials_that_are_refused_are_unreachable_and_not_in_the_message(
    connect: Callable[..., Gateway], paypal: PayPalSandbox
) -> None:
    config = PayPalConfig(client_id="bad", client_secret=SecretStr("very-secret"), api_base=paypal.url)
    gateway = PayPalGateway(config)

    outcome = await run(gateway, a_request(payment_method=PAYS))
    await gateway.close()

    assert isinstance(outcome, Unreachable)
    assert "very-secret" not in f"{outcome!r} {config!r}"


# --- webhooks -------------------------------------------------------------------------------------------------------


class Inbox(ThreadingHTTPServer):
    """Receives webhooks; the first `refusals` of them are answered with a 503."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), InboxHandler)
        self.requests: list[WebhookRequest] = []
        self.refusals = 0

    async def wait_for(self, count: int) -> list[WebhookRequest]:
        async with asyncio.timeout(15):
            while len(self.requests) < count:
                await asyncio.sleep(0.02)
        return self.requests

    async def wait_for_refund_of(self, capture_id: str) -> WebhookRequest:
        """The webhook of this capture's refund, among others."""
        name, link = b'"PAYMENT.CAPTURE.REFUNDED"', f"/captures/{capture_id}".encode()
        async with asyncio.timeout(15):
            while True:
                for each in self.requests:
                    if name in each.body and link in each.body:
                        return each
                await asyncio.sleep(0.02)


class InboxHandler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        assert isinstance(self.server, Inbox)
        body = self.rfile.read(int(self.headers["Content-Length"]))
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.server.requests.append(WebhookRequest("POST", "", headers, body, datetime.now(UTC)))
        is_refused = len(self.server.requests) <= self.server.refusals
        self.send_response(503 if is_refused else 200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Tests are quiet."""


@pytest.fixture
def inbox(paypal: PayPalSandbox) -> Iterator[Inbox]:
    with Inbox() as server:
        thread = Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        paypal.post("webhooks", url=f"http://127.0.0.1:{server.server_port}/webhooks/paypal", webhook_id="1CONTRACT2")
        yield server
        paypal.post("webhooks", url=None)
        server.shutdown()
        thread.join()


@pytest.fixture
async def webhooks(paypal: PayPalSandbox) -> AsyncIterator[PayPalWebhooks]:
    secret = SecretStr("s")
    reader = PayPalWebhooks(
        PayPalConfig(client_id="contract", client_secret=secret, api_base=paypal.url, webhook_id="1CONTRACT2")
    )
    yield reader
    await reader.close()


RESOURCES = {
    "checkout-order": "/v2/checkout/orders",
    "authorization": "/v2/payments/authorizations",
    "capture": "/v2/payments/captures",
    "refund": "/v2/payments/refunds",
}
"""Where the object of a webhook can be read. (Disputes belong to another API.)"""


async def notices(webhooks: PayPalWebhooks, inbox: Inbox, count: int) -> dict[str, Notice]:
    """The notices by type. Checks that each event, and the object in it, match PayPal's documents."""
    requests = await inbox.wait_for(count)
    for event in (json.loads(each.body) for each in requests):
        path = RESOURCES.get(event["resource_type"])
        resource = [as_answer(f"{path}/ID", event["resource"])] if path else []
        for each in (as_answer("/v1/notifications/webhooks-events/ID", event), *resource):
            assert violations(each) == []
    return {each.type: each for each in [await webhooks.read(each) for each in requests]}


@pytest.mark.parametrize("kind", OPENINGS)
async def test_webhooks_say_what_the_gateway_says(
    gateway: Gateway, paypal: PayPalSandbox, inbox: Inbox, webhooks: PayPalWebhooks, kind: OperationKind
) -> None:
    request, action = await asked(gateway, kind)
    paypal.approve(action.reference)
    outcome = await gateway.resume(request)

    found = await notices(webhooks, inbox, 2)

    approved = found.pop("CHECKOUT.ORDER.APPROVED")
    assert (approved.is_ripe, approved.payment_id, approved.operation_number) == (True, request.payment_id, 1)
    [paid] = found.values()
    assert (paid.payment_id, paid.operation_number, paid.currency) == (request.payment_id, 1, "USD")
    assert paid.outcome == outcome
    assert paid.gateway_payment_id == action.reference


async def test_webhooks_tell_the_operations_of_one_payment_apart(
    gateway: Gateway, paypal: PayPalSandbox, inbox: Inbox, webhooks: PayPalWebhooks
) -> None:
    hold = await opened(gateway, payment_method=PAYS)
    captured = await run(gateway, follow_up(*hold, OperationKind.CAPTURE))
    refunded = await run(gateway, follow_up(*hold, OperationKind.REFUND, number=3, amount=Money(500, "USD")))

    found = await notices(webhooks, inbox, 3)

    numbers = {name: (each.operation_number, each.outcome) for name, each in found.items()}
    assert numbers["PAYMENT.CAPTURE.COMPLETED"] == (2, captured)
    assert numbers["PAYMENT.CAPTURE.REFUNDED"] == (3, refunded)
    assert numbers["PAYMENT.AUTHORIZATION.CREATED"][0] == 1


async def refunded_at_paypals_pages(
    gateway: Gateway, paypal: PayPalSandbox, inbox: Inbox, kind: OperationKind
) -> tuple[UUID, str, WebhookRequest]:
    """Our payment, its order, and PayPal's webhook of a refund that somebody made in its dashboard."""
    request, order_id = await opened(gateway, kind, payment_method=PAYS)
    if kind is OperationKind.AUTHORIZE:
        await run(gateway, follow_up(request, order_id, OperationKind.CAPTURE))
    [capture] = paypal.order(order_id)["purchase_units"][0]["payments"]["captures"]
    paypal.post(f"captures/{capture['id']}/refund?amount=2.00")
    return request.payment_id, order_id, await inbox.wait_for_refund_of(capture["id"])


@pytest.mark.parametrize("kind", OPENINGS)
async def test_a_refund_that_names_nothing_but_its_capture_is_of_the_payment_that_was_captured(
    gateway: Gateway, paypal: PayPalSandbox, inbox: Inbox, webhooks: PayPalWebhooks, kind: OperationKind
) -> None:
    payment_id, order_id, sent = await refunded_at_paypals_pages(gateway, paypal, inbox, kind)
    assert not json.loads(sent.body)["resource"].keys() & {"custom_id", "invoice_id", "supplementary_data"}

    notice = await webhooks.read(sent)

    assert (notice.payment_id, notice.operation_number, notice.gateway_payment_id) == (payment_id, None, order_id)
    assert notice.external is not None
    assert (notice.external.kind, notice.external.amount_minor) == (OperationKind.REFUND, 200)


async def test_a_refund_that_names_nothing_at_all_is_found_by_its_own_id(
    gateway: Gateway, paypal: PayPalSandbox, inbox: Inbox, webhooks: PayPalWebhooks
) -> None:
    payment_id, order_id, sent = await refunded_at_paypals_pages(gateway, paypal, inbox, OperationKind.CHARGE)
    event = json.loads(sent.body)
    del event["resource"]["links"]

    notice = read_event(await webhooks._placed(event))

    assert (notice.payment_id, notice.gateway_payment_id) == (payment_id, order_id)
    paypal.fault("503", operation="read", path="/v2/payments/refunds/", times=1)
    with pytest.raises(WebhookRefused) as refused:
        await webhooks._placed(event)
    assert refused.value.verdict is Verdict.UNAVAILABLE
    event["resource"]["id"] = "ANOTHERACCOUNTS1"
    assert await webhooks._placed(event) == event


@pytest.mark.parametrize("action", ["503", "429", "500_before", "cut_before", "garbage"])
async def test_a_refund_that_cannot_be_asked_about_should_come_again(
    gateway: Gateway, paypal: PayPalSandbox, inbox: Inbox, webhooks: PayPalWebhooks, action: str
) -> None:
    payment_id, _, sent = await refunded_at_paypals_pages(gateway, paypal, inbox, OperationKind.CHARGE)
    paypal.fault(action, operation="read", path="/v2/payments/captures/", times=1)

    with pytest.raises(WebhookRefused) as refused:
        await webhooks.read(sent)

    assert refused.value.verdict is Verdict.UNAVAILABLE
    assert (await webhooks.read(sent)).payment_id == payment_id


async def test_webhooks_tell_of_disputes(
    gateway: Gateway, paypal: PayPalSandbox, inbox: Inbox, webhooks: PayPalWebhooks
) -> None:
    request, reference = await opened(gateway, OperationKind.CHARGE, payment_method=PAYS)
    [capture] = paypal.order(reference)["purchase_units"][0]["payments"]["captures"]
    dispute = paypal.post(f"captures/{capture['id']}/dispute")["dispute_id"]
    paypal.post(f"disputes/{dispute}/lost")

    found = await notices(webhooks, inbox, 3)

    opened_, resolved = found["CUSTOMER.DISPUTE.CREATED"], found["CUSTOMER.DISPUTE.RESOLVED"]
    assert opened_.payment_id == resolved.payment_id == request.payment_id
    assert opened_.dispute == Dispute(dispute, DisputeStage.OPENED, 1250, "USD", "MERCHANDISE_OR_SERVICE_NOT_RECEIVED")
    assert resolved.dispute is not None
    assert resolved.dispute.stage is DisputeStage.LOST


async def test_a_webhook_is_repeated_until_it_is_accepted_and_stays_the_same_event(
    gateway: Gateway, paypal: PayPalSandbox, inbox: Inbox, webhooks: PayPalWebhooks
) -> None:
    inbox.refusals = 2
    await run(gateway, a_request(payment_method=PAYS))

    read = [await webhooks.read(each) for each in await inbox.wait_for(3)]

    assert len({each.event_id for each in read}) == 1


async def test_paypal_itself_confirms_its_webhooks_and_no_others(
    gateway: Gateway, paypal: PayPalSandbox, inbox: Inbox
) -> None:
    await run(gateway, a_request(payment_method=PAYS))
    [sent] = await inbox.wait_for(1)
    names = ("auth_algo", "cert_url", "transmission_id", "transmission_sig", "transmission_time")
    given: dict[str, Any] = {name: sent.headers["paypal-" + name.replace("_", "-")] for name in names}
    given |= {"webhook_id": "1CONTRACT2", "webhook_event": json.loads(sent.body)}

    headers = {"Authorization": f"Bearer {paypal.token()}"}

    answers = [
        paypal.http.post("/v1/notifications/verify-webhook-signature", json=each, headers=headers)
        for each in (given, given | {"webhook_id": "other"})
    ]

    assert [each.json()["verification_status"] for each in answers] == ["SUCCESS", "FAILURE"]
    assert [told for each in answers for told in violations(Exchange(each.request, each))] == []


# --- the simulator itself -------------------------------------------------------------------------------------------


def test_the_books_add_up_and_a_request_id_is_executed_once(paypal: PayPalSandbox) -> None:
    first, second, without = paypal.charge("k1"), paypal.charge("k1"), paypal.charge(None)

    assert (first.status_code, second.status_code) == (201, 200)
    assert first.json() == second.json()
    assert set(first.json()) == {"id", "status", "links"}
    assert without.json()["details"][0]["issue"] == "PAYPAL_REQUEST_ID_REQUIRED"
    usd = paypal.books()["currencies"]["usd"]
    assert (usd["captured"], usd["payment_intents"], usd["count_completed"]) == (1000, 1, 1)


@pytest.mark.parametrize(
    ("amount", "issue"),
    [
        ({"currency_code": "JPY", "value": "100.00"}, "DECIMALS_NOT_SUPPORTED"),
        ({"currency_code": "USD", "value": "1.001"}, "DECIMAL_PRECISION"),
        ({"currency_code": "VND", "value": "1000"}, "INVALID_CURRENCY_CODE"),
        ({"currency_code": "USD", "value": "0.00"}, "CANNOT_BE_ZERO_OR_NEGATIVE"),
        ({"currency_code": "USD", "value": "ten"}, "INVALID_PARAMETER_SYNTAX"),
        ({"currency_code": "USD", "value": 10}, "MISSING_REQUIRED_PARAMETER"),
    ],
)
def test_a_wrong_amount_is_refused_and_leaves_nothing(
    paypal: PayPalSandbox, amount: dict[str, Any], issue: str
) -> None:
    body = {"intent": "CAPTURE", "purchase_units": [{"amount": amount}], "payment_source": {"paypal": {}}}

    answer = paypal.http.post("/v2/checkout/orders", json=body, headers={"Authorization": f"Bearer {paypal.token()}"})

    assert answer.json()["details"][0]["issue"] == issue
    assert paypal.books()["currencies"] == {}


def test_it_can_be_served_beside_the_stripe_simulator() -> None:
    paths = [(route.path, method) for route in PayPalSimulator().routes() for method in route.methods or ()]

    assert len(paths) == len(set(paths))
    assert not set(paths) & {(route.path, method) for route in STRIPE_ROUTES for method in route.methods or ()}


def test_an_invoice_id_is_taken_once(paypal: PayPalSandbox) -> None:
    answers = [paypal.charge(key, invoice_id="i1") for key in ("k1", "k2")]

    assert [each.status_code for each in answers] == [201, 422]
    assert answers[1].json()["details"][0]["issue"] == "DUPLICATE_INVOICE_ID"


def test_the_payers_page_leads_back_to_the_shop(paypal: PayPalSandbox) -> None:
    context = {"return_url": "https://shop.invalid/back", "cancel_url": "https://shop.invalid/cancel"}
    body = {
        "intent": "CAPTURE",
        "purchase_units": [{"custom_id": "p1.1", "amount": {"currency_code": "USD", "value": "12.50"}}],
        "payment_source": {"paypal": {"experience_context": context}},
    }
    headers = {"Authorization": f"Bearer {paypal.token()}", "Prefer": "return=representation"}
    order = paypal.http.post("/v2/checkout/orders", json=body, headers=headers)
    [link] = [each["href"] for each in order.json()["links"] if each["rel"] == "payer-action"]

    page = paypal.http.get(link)
    back = paypal.http.post(f"/_sandbox/paypal/orders/{order.json()['id']}/approve?redirect=true")

    assert order.status_code == 200
    assert "12.50 USD" in page.text
    assert back.headers["location"].startswith(f"https://shop.invalid/back?token={order.json()['id']}&PayerID=")
