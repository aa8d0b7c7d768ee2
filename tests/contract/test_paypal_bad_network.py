"""Whole payments at PayPal over a network that loses half of all messages, driven as the service drives them.

Whatever is lost, the gateway's final outcome agrees with PayPal's books, and nothing happens twice.
"""

import random
from collections.abc import AsyncIterator, Iterator

import pytest

from domain.commands import OperationKind
from domain.errors import GatewayUnreachable, OutcomeUnknown
from domain.money import Money
from domain.operations import (
    Declined,
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
from handlers.dispatch import WITH_THE_PROVIDER
from tests.contract.gateway_requests import a_request, follow_up
from tests.contract.paypal import PayPalSandbox, paypal_gateway, running_paypal

pytestmark = pytest.mark.usefixtures("as_documented")

FAULTS = ("cut_before", "cut_after", "429", "503", "500_after", "truncated", "garbage", "409")
FINAL = (Succeeded, Declined, NotExecuted, Expired)
ATTEMPTS_MAX = 200


@pytest.fixture(scope="module")
def server() -> Iterator[PayPalSandbox]:
    with running_paypal() as sandbox:
        yield sandbox


@pytest.fixture
def paypal(server: PayPalSandbox) -> PayPalSandbox:
    server.post("reset")
    for fault in FAULTS:
        server.fault(fault, rate=0.08)
    return server


@pytest.fixture
async def gateway(paypal: PayPalSandbox) -> AsyncIterator[Gateway]:
    gateway = paypal_gateway(paypal.url)
    yield gateway
    await gateway.close()


async def dispatched(gateway: Gateway, request: GatewayRequest) -> Outcome:
    """Make one attempt as the dispatcher does."""
    method = gateway.resume if request.state in WITH_THE_PROVIDER else getattr(gateway, request.kind.value)
    try:
        outcome: Outcome = await method(request)
    except GatewayUnreachable as error:
        return Unreachable(error.message)
    except OutcomeUnknown as error:
        return Unknown(error.message)
    return outcome


def settled(request: GatewayRequest, outcome: Outcome) -> GatewayRequest:
    """The request of the next attempt after an outcome that is not final, as `decide` would make it."""
    match outcome:
        case RequiresAction(reference):
            return request._replace(state=OperationState.REQUIRES_ACTION, reference=reference)
        case Pending(reference):
            return request._replace(state=OperationState.PENDING, reference=reference)
        case Unknown() if request.state not in WITH_THE_PROVIDER:
            return request._replace(state=OperationState.INDETERMINATE)
        case _:
            return request


async def driven(gateway: Gateway, paypal: PayPalSandbox, request: GatewayRequest, chance: random.Random) -> Outcome:
    """Repeat attempts until a final outcome. The payer, if asked, approves at some time or lets the order expire."""
    is_willing, is_answered = chance.random() < 0.8, False
    for _ in range(ATTEMPTS_MAX):
        outcome = await dispatched(gateway, request)
        if isinstance(outcome, FINAL):
            return outcome
        if isinstance(outcome, Unreachable) and request.state is OperationState.DISPATCHED and chance.random() < 0.3:
            return NotExecuted("given up: nothing was ever executed")
        if isinstance(outcome, RequiresAction) and not is_answered and chance.random() < 0.5:
            is_answered = True
            (paypal.approve if is_willing else paypal.expire)(outcome.reference)
        request = settled(request, outcome)
    raise AssertionError(f"no end after {ATTEMPTS_MAX} attempts: {request.state}")


@pytest.mark.parametrize("seed", range(60))
async def test_outcomes_agree_with_paypals_books_on_a_bad_network(
    gateway: Gateway, paypal: PayPalSandbox, seed: int
) -> None:
    chance = random.Random(seed)
    payment_method = chance.choice([None, "vault:good", "vault:refused", "vault:declined-INSTRUMENT_DECLINED"])
    opening = a_request(chance.choice([OperationKind.AUTHORIZE, OperationKind.CHARGE]), payment_method=payment_method)
    held, captured, refunded = 0, 0, 0

    outcome = await driven(gateway, paypal, opening, chance)
    if isinstance(outcome, Succeeded):
        held, captured = (1250, 0) if opening.kind is OperationKind.AUTHORIZE else (0, 1250)
    assert paypal.effect(opening.payment_id) == (held, captured, refunded)
    if not isinstance(outcome, Succeeded):
        return
    for number in range(2, 7):
        kind = chance.choice([OperationKind.CAPTURE, OperationKind.VOID] if held else [OperationKind.REFUND])
        most = captured - refunded if kind is OperationKind.REFUND else held
        if not most:
            return
        minor = most if kind is OperationKind.VOID else chance.randint(1, most)
        is_final = kind is OperationKind.CAPTURE and minor >= held
        request = follow_up(
            opening, outcome.reference, kind, number=number, amount=Money(minor, "USD"), is_final=is_final
        )
        done = await driven(gateway, paypal, request, chance)
        if isinstance(done, Succeeded):
            held -= minor if kind is not OperationKind.REFUND else 0
            captured += minor if kind is OperationKind.CAPTURE else 0
            refunded += minor if kind is OperationKind.REFUND else 0
        assert paypal.effect(opening.payment_id) == (held, captured, refunded), (kind, done)
        assert paypal.executed_charges(opening.payment_id) == 1
