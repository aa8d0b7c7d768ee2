"""For every gateway, every operation that it offers and every fault of its provider, the end is right, the provider's
books agree with it, and nothing happens twice. Calls go through the dispatcher, as in production, over real HTTP."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any
from uuid import UUID

import httpx
import pytest
from prometheus_client import REGISTRY

from app.wiring import GATEWAYS
from domain.commands import OperationKind
from domain.decision import Answer
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
from handlers.dispatch import Dispatcher
from handlers.leases import Leases
from handlers.pace import Pace
from infra.local.server import free_port
from infra.sandbox.faults import Action
from tests.contract.gateway_requests import a_request, in_doubt, run
from tests.contract.providers import PROVIDERS, Effect, Provider
from tests.support.dispatching import FAST
from tests.support.sandbox import running_sandbox

AUTHORIZE, CHARGE, CAPTURE, VOID, REFUND = OperationKind
OPENING = (AUTHORIZE, CHARGE)
BEFORE = ("cut_before", "429", "503", "409", "500_before")
AFTER = ("cut_after", "truncated", "garbage", "500_after")
TOO_LATE = ("slow", "hang")
LATER = tuple(kind for kind in OperationKind if kind not in OPENING)
"""The operations on a payment that its provider has already: their trace is found without a reference of their own."""

as_documented = pytest.mark.usefixtures("as_documented")
"""What is said to PayPal and by it is also checked against PayPal's own documents."""

IMPATIENCE_SECONDS = 0.7
"""The timeout of a gateway that gives up before a late answer comes."""


@pytest.fixture(scope="module")
def sandbox() -> Iterator[httpx.Client]:
    with running_sandbox() as url, httpx.Client(base_url=url, timeout=10) as http:
        yield http


class NoStore:
    """The one thing for which the dispatcher asks a store."""

    def in_transaction(self) -> bool:
        return False


@dataclass
class Till:
    """One provider, its gateway behind a dispatcher, and the answers that are awaited."""

    provider: Provider
    gateway: Gateway
    _asked: dict[UUID, asyncio.Future[Outcome]] = field(default_factory=dict)
    _paid: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        store: Any = NoStore()
        leases = Leases(store=store, lease=timedelta(seconds=60))
        self._dispatcher = Dispatcher(
            gateways={self.gateway.name: self.gateway},
            limits={self.gateway.name: 8},
            store=store,
            clock=lambda: datetime.now(UTC),
            leases=leases,
            paces={self.gateway.name: Pace(time.monotonic, self.gateway, FAST)},
        )
        self._dispatcher.on_answer = self._hear

    def _hear(self, answer: Answer) -> None:
        self._asked.pop(answer.payment_id).set_result(answer.outcome)

    async def send(self, request: GatewayRequest) -> Outcome:
        """The outcome of this request after the dispatcher's call."""
        answered: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        self._asked[request.payment_id] = answered
        self._dispatcher.submit([request._replace(gateway=self.gateway.name)])
        return await answered

    async def finish(self, request: GatewayRequest, *, patience_seconds: float = 0) -> Outcome:
        """Retry as the service does, with a payer who consents, until a final outcome or a limit of tries.

        With `patience_seconds`, a second passes between two tries.
        """
        outcome, tries = await self.send(request), 0
        while tries < max(4, patience_seconds):
            match outcome:
                case RequiresAction(reference):
                    self._pay_once(outcome)
                    request = request._replace(state=OperationState.REQUIRES_ACTION, reference=reference)
                case Pending(reference):
                    request = request._replace(state=OperationState.PENDING, reference=reference)
                case Unknown():
                    if request.state is OperationState.DISPATCHED:
                        request = request._replace(state=OperationState.INDETERMINATE)
                case Unreachable():
                    pass
                case _:
                    return outcome
            await asyncio.sleep(1 if patience_seconds else 0)
            tries += 1
            request = request._replace(attempts=request.attempts + 1)
            outcome = await self.send(request)
        return outcome

    def _pay_once(self, action: RequiresAction) -> None:
        """Pay once: a repeated key may still get the answer from before the payment."""
        if action.reference not in self._paid:
            self._paid.add(action.reference)
            self.provider.pay(action)

    def a(self, kind: OperationKind, **more: Any) -> GatewayRequest:
        """A request with the provider's usual amount and payment method."""
        given: dict[str, Any] = {"amount": self.provider.amount, "payment_method": self.provider.payment_method} | more
        return a_request(kind, **given)

    async def prepared(self, kind: OperationKind) -> GatewayRequest:
        """A request of this kind that can succeed, after what must come before it."""
        if kind in OPENING:
            return self.a(kind)
        opened = self.a(CHARGE if kind is REFUND else AUTHORIZE)
        outcome = await self.finish(opened)
        assert isinstance(outcome, Succeeded), outcome
        return self.follow_up(opened, outcome.reference, kind)

    def follow_up(self, opened: GatewayRequest, reference: str, kind: OperationKind, **more: Any) -> GatewayRequest:
        given: dict[str, Any] = {"payment_id": opened.payment_id, "number": 2, "gateway_payment_id": reference}
        given["captured_minor"] = opened.amount.minor if opened.kind is CHARGE else 0
        return self.a(kind, **(given | more))

    def effect(self, request: GatewayRequest) -> Effect:
        return self.provider.effect(request.payment_id)

    def expected(self, kind: OperationKind) -> Effect:
        """The provider's books after this kind of operation was executed once."""
        whole = self.provider.amount.minor
        return {
            AUTHORIZE: (whole, 0, 0),
            CHARGE: (0, whole, 0),
            CAPTURE: (0, whole, 0),
            VOID: (0, 0, 0),
            REFUND: (0, whole, whole),
        }[kind]

    @property
    def knows_keys(self) -> bool:
        return bool(self.gateway.capabilities.idempotency_retention)

    def offers(self, kind: OperationKind) -> None:
        """Skip the test if the gateway does not offer this: `decide` rejects it before any gateway is called."""
        if kind not in self.gateway.capabilities.operations:
            pytest.skip("not offered: refused up front")

    def offers_and_sends(self, kind: OperationKind) -> bool:
        return kind in self.gateway.capabilities.operations and self.provider.fails(kind) is not None

    def request_of(self, kind: OperationKind) -> str:
        """The name, in fault rules, of this operation's request; skips the test if there is none."""
        call = self.provider.fails(kind)
        if call is None:
            pytest.skip("nothing is sent for it")
        return call


@pytest.fixture(params=PROVIDERS)
async def till(request: pytest.FixtureRequest, sandbox: httpx.Client) -> AsyncIterator[Till]:
    provider = PROVIDERS[request.param](str(sandbox.base_url), sandbox)
    gateway = provider.gateway()
    yield Till(provider, gateway)
    provider.heal()
    await gateway.close()


@pytest.fixture
async def impatient(till: Till) -> AsyncIterator[Till]:
    """The same provider behind a gateway with a short timeout."""
    gateway = till.provider.gateway(timeout_seconds=IMPATIENCE_SECONDS)
    yield Till(till.provider, gateway)
    await gateway.close()


def test_every_gateway_and_every_fault_is_here() -> None:
    tried = {*BEFORE, *AFTER, *TOO_LATE, Action.DECLINE, Action.LAG}
    assert tried | {Action.WEBHOOK_FIRST} == set(Action)  # WEBHOOK_FIRST is tested in test_every_webhook.py
    assert {each.name for each in PROVIDERS.values()} == set(GATEWAYS) - {"instant"}


async def test_connections_and_time_outs_of_every_gateway_are_told(till: Till, impatient: Till) -> None:
    opened = till.a(CHARGE)
    outcome = await till.finish(opened)
    assert isinstance(outcome, Succeeded), outcome
    question = opened._replace(state=OperationState.PENDING, reference=outcome.reference, attempts=1)
    assert await impatient.send(question) == outcome
    before = told("timeouts_total", impatient)
    assert told("connections", impatient, state="idle") == 1
    assert told("connections_limit", impatient) == 64
    assert told("in_flight_limit", impatient) == 8

    impatient.provider.fault("hang", "read", opened.payment_id)
    asking = asyncio.create_task(impatient.send(question))
    async with asyncio.timeout(IMPATIENCE_SECONDS):
        while told("connections", impatient, state="in_use") != 1:
            await asyncio.sleep(0.01)
    assert isinstance(await asking, Unknown)
    assert told("timeouts_total", impatient) == before + 1
    assert told("connections", impatient, state="in_use") == 0


def told(name: str, till: Till, **labels: str) -> float:
    """The metric's value for this gateway; 0 if it was never counted."""
    return REGISTRY.get_sample_value(f"payments_gateway_{name}", {"gateway": till.gateway.name, **labels}) or 0.0


@as_documented
@pytest.mark.parametrize("kind", OperationKind)
async def test_each_operation_has_its_effect_once_however_often_it_is_sent(till: Till, kind: OperationKind) -> None:
    till.offers(kind)
    request = await till.prepared(kind)
    first = await till.finish(request)
    assert isinstance(first, Succeeded)
    assert first.amount_minor in (None, till.provider.amount.minor)
    assert till.effect(request) == till.expected(kind)
    assert await till.finish(in_doubt(request)) == first
    assert till.effect(request) == till.expected(kind)


@as_documented
@pytest.mark.parametrize("kind", OperationKind)
async def test_parallel_attempts_with_one_key_have_one_effect(till: Till, kind: OperationKind) -> None:
    till.offers(kind)
    call, request = till.request_of(kind), await till.prepared(kind)
    if not till.knows_keys:
        pytest.skip("it is never sent a second time")
    till.provider.fault("slow", call, request.payment_id, seconds=0.2)
    outcomes = await asyncio.gather(*(run(till.gateway, in_doubt(request)) for _ in range(5)))
    assert {type(each) for each in outcomes} <= {Succeeded, Unknown, RequiresAction}
    assert any(isinstance(each, Succeeded | RequiresAction) for each in outcomes)
    assert isinstance(await till.finish(in_doubt(request)), Succeeded)
    assert till.effect(request) == till.expected(kind)


@pytest.mark.parametrize("kind", OperationKind)
async def test_a_provider_that_is_away_is_unreachable(till: Till, sandbox: httpx.Client, kind: OperationKind) -> None:
    till.offers(kind)
    till.request_of(kind)
    request, away = await till.prepared(kind), type(till.provider)(f"http://127.0.0.1:{free_port()}", sandbox).gateway()
    assert isinstance(await run(away, request), Unreachable)
    await away.close()


async def test_cancelling_a_call_is_passed_on(till: Till) -> None:
    kind = next(each for each in OperationKind if till.offers_and_sends(each))
    request = await till.prepared(kind)
    # Executed all the same, but soon: any later, its webhook would come in the middle of another test.
    till.provider.fault("slow", till.request_of(kind), request.payment_id, seconds=0.3)
    calling = asyncio.create_task(run(till.gateway, request))
    await asyncio.sleep(0.05)
    calling.cancel()
    with pytest.raises(asyncio.CancelledError):
        await calling


@as_documented
@pytest.mark.parametrize("kind", OperationKind)
async def test_a_status_without_a_trace_is_unknown_and_causes_nothing(till: Till, kind: OperationKind) -> None:
    till.offers(kind)
    till.request_of(kind)
    request = await till.prepared(kind)
    before = till.effect(request)
    assert isinstance(await till.gateway.status(in_doubt(request)), Unknown)
    assert till.effect(request) == before


@as_documented
@pytest.mark.parametrize("kind", LATER)
async def test_a_status_finds_what_was_executed_without_a_reference(till: Till, kind: OperationKind) -> None:
    till.offers(kind)
    call, request = till.request_of(kind), await till.prepared(kind)
    till.provider.fault("cut_after", call, request.payment_id)
    await till.send(request)
    assert isinstance(await till.gateway.status(in_doubt(request)), Succeeded)
    assert till.effect(request) == till.expected(kind)


@as_documented
@pytest.mark.parametrize("fault", AFTER)
@pytest.mark.parametrize("kind", OperationKind)
async def test_an_answer_lost_after_execution_ends_with_one_effect(till: Till, kind: OperationKind, fault: str) -> None:
    till.offers(kind)
    call, request = till.request_of(kind), await till.prepared(kind)
    till.provider.fault(fault, call, request.payment_id)
    first = await till.send(request)
    assert isinstance(first, Unknown)
    assert isinstance(await till.finish(request._replace(state=OperationState.INDETERMINATE, attempts=2)), Succeeded)
    assert till.effect(request) == till.expected(kind)


@as_documented
@pytest.mark.parametrize("fault", BEFORE)
@pytest.mark.parametrize("kind", OperationKind)
async def test_a_request_lost_before_execution_moves_nothing_and_is_made_good_only_where_that_is_safe(
    till: Till, kind: OperationKind, fault: str
) -> None:
    till.offers(kind)
    call, request = till.request_of(kind), await till.prepared(kind)
    before = till.effect(request)
    till.provider.fault(fault, call, request.payment_id)
    first = await till.send(request)
    is_proof = fault == "429" and till.provider.limits_before_execution
    assert isinstance(first, Unreachable if is_proof else Unknown)
    assert till.effect(request) == before
    state = OperationState.DISPATCHED if is_proof else OperationState.INDETERMINATE
    end = await till.finish(request._replace(state=state, attempts=2))
    is_stuck = fault == Action.ERROR_BEFORE and till.provider.remembers_errors
    if is_proof or (till.knows_keys and not is_stuck):
        assert isinstance(end, Succeeded)
        assert till.effect(request) == till.expected(kind)
    else:
        # A provider without keys is never sent the request again; one that remembers its 500 repeats it for ever.
        assert isinstance(end, Unknown)
        assert till.effect(request) == before


@pytest.mark.parametrize("till", [name for name, each in PROVIDERS.items() if each.second_call], indirect=True)
@pytest.mark.parametrize("fault", [*BEFORE, *AFTER])
@pytest.mark.parametrize("kind", OPENING)
async def test_the_call_after_the_payers_consent_has_its_effect_once(
    till: Till, kind: OperationKind, fault: str
) -> None:
    request = till.a(kind)
    outcome = await till.send(request)
    assert isinstance(outcome, RequiresAction)
    till.provider.fault(fault, till.provider.second_call, request.payment_id)
    till.provider.pay(outcome)
    waiting = request._replace(state=OperationState.REQUIRES_ACTION, reference=outcome.reference, attempts=2)
    end = await till.finish(waiting)
    is_stuck = fault == Action.ERROR_BEFORE and till.provider.remembers_errors
    assert isinstance(end, Pending if is_stuck else Succeeded)
    assert till.effect(request) == ((0, 0, 0) if is_stuck else till.expected(kind))


@pytest.mark.parametrize("fault", TOO_LATE)
async def test_an_answer_that_comes_too_late_or_never_ends_with_one_effect(
    till: Till, impatient: Till, fault: str
) -> None:
    """All kinds run at once, since each has to wait."""
    kinds = [each for each in till.gateway.capabilities.operations if till.provider.fails(each)]
    requests = [await till.prepared(kind) for kind in kinds]
    for request in requests:
        seconds = 2 * IMPATIENCE_SECONDS
        till.provider.fault(fault, till.request_of(request.kind), request.payment_id, seconds=seconds)
    for first in await asyncio.gather(*map(impatient.send, requests)):
        assert isinstance(first, Unknown)
    in_doubt = [each._replace(state=OperationState.INDETERMINATE, attempts=2) for each in requests]
    for end in await asyncio.gather(*(till.finish(each, patience_seconds=5) for each in in_doubt)):
        assert isinstance(end, Succeeded)
    assert [till.effect(each) for each in requests] == [till.expected(each.kind) for each in requests]


async def test_an_answer_that_is_slow_is_waited_for(till: Till) -> None:
    kinds = [each for each in till.gateway.capabilities.operations if till.provider.fails(each)]
    requests = [await till.prepared(kind) for kind in kinds]
    for request in requests:
        till.provider.fault("slow", till.request_of(request.kind), request.payment_id, seconds=0.2)
    for end in await asyncio.gather(*map(till.send, requests)):
        assert isinstance(end, Succeeded | RequiresAction)
    assert all([isinstance(await till.finish(each), Succeeded) for each in requests if each.kind in OPENING])
    assert [till.effect(each) for each in requests] == [till.expected(each.kind) for each in requests]


@pytest.mark.parametrize("kind", OperationKind)
async def test_a_declined_operation_moves_nothing_at_any_attempt(till: Till, kind: OperationKind) -> None:
    till.offers(kind)
    step = till.provider.declined_at.get(kind)
    if step is None:
        pytest.skip("nobody can decline it there")
    request = await till.prepared(kind)
    before = till.effect(request)
    till.provider.fault("decline", step, request.payment_id)
    # A capture, void or refund may be refused in another form: an error that says that it was not executed.
    assert isinstance(await till.finish(request), Declined if kind in OPENING else Declined | NotExecuted)
    assert till.effect(request) == before
    again = await till.finish(request._replace(state=OperationState.INDETERMINATE, attempts=2))
    assert not isinstance(again, Succeeded)
    assert till.effect(request) == before


@pytest.mark.parametrize("kind", OperationKind)
async def test_a_status_that_lags_ends_nothing_and_doubles_nothing(till: Till, kind: OperationKind) -> None:
    till.offers(kind)
    request = await till.prepared(kind)
    call = till.provider.fails(kind)
    till.provider.fault("lag", "read", request.payment_id, times=None, seconds=60)
    if call is not None:
        till.provider.fault("cut_after", call, request.payment_id)
    assert isinstance(await till.send(request), Unknown if call is not None else RequiresAction)
    in_doubt = request._replace(state=OperationState.INDETERMINATE, attempts=2)
    for state in (OperationState.INDETERMINATE, OperationState.PENDING):
        said = await till.finish(in_doubt._replace(state=state))
        assert not isinstance(said, Declined | Expired | NotExecuted), "it was only not shown yet"
    till.provider.heal()
    assert isinstance(await till.finish(in_doubt), Succeeded)
    assert till.effect(request) == till.expected(kind)


@pytest.mark.parametrize("kind", OPENING)
async def test_a_status_that_lags_behind_the_payer_is_waited_for(till: Till, kind: OperationKind) -> None:
    till.offers(kind)
    request = till.a(kind)
    outcome = await till.send(request)
    if not isinstance(outcome, RequiresAction):
        pytest.skip("no payer has to act")
    till.provider.fault("lag", "read", request.payment_id, times=None, seconds=60)
    till.provider.pay(outcome)
    waiting = request._replace(state=OperationState.REQUIRES_ACTION, reference=outcome.reference, attempts=2)
    for _ in range(2):
        assert isinstance(await till.send(waiting), RequiresAction)
    till.provider.heal()
    assert isinstance(await till.send(waiting), Succeeded)
    assert till.effect(request) == till.expected(kind)


@pytest.mark.parametrize("kind", OPENING)
async def test_a_payer_who_refuses_is_not_charged(till: Till, kind: OperationKind) -> None:
    till.offers(kind)
    request = till.a(kind)
    outcome = await till.send(request)
    if not isinstance(outcome, RequiresAction):
        pytest.skip("no payer has to act")
    till.provider.refuse(outcome)
    waiting = request._replace(state=OperationState.REQUIRES_ACTION, reference=outcome.reference, attempts=2)
    assert isinstance(await till.send(waiting), Declined | Expired)
    assert till.effect(request) == (0, 0, 0)


@pytest.mark.parametrize("kind", OPENING)
async def test_a_payer_who_has_not_come_is_waited_for(till: Till, kind: OperationKind) -> None:
    till.offers(kind)
    request = till.a(kind)
    outcome = await till.send(request)
    if not isinstance(outcome, RequiresAction):
        pytest.skip("no payer has to act")
    waiting = request._replace(state=OperationState.REQUIRES_ACTION, reference=outcome.reference, attempts=2)
    if not isinstance(await till.send(waiting), RequiresAction):
        # If VNPay's page has not been opened yet, VNPay has no trace of the payment, which is not a refusal either.
        raise AssertionError("the payer may still come")
    assert till.effect(request) == (0, 0, 0)


@pytest.mark.parametrize("kind", OPENING)
async def test_an_abandoned_payment_is_expired_at_every_query(till: Till, kind: OperationKind) -> None:
    till.offers(kind)
    request = till.a(kind)._replace(first_dispatched_at=datetime.now(UTC) - till.provider.window)
    outcome = await till.send(request)
    if not isinstance(outcome, RequiresAction):
        pytest.skip("no payer has to act")
    till.provider.abandon(outcome)
    waiting = request._replace(state=OperationState.REQUIRES_ACTION, reference=outcome.reference, attempts=2)
    for _ in range(2):
        assert isinstance(await till.send(waiting), Expired)
    assert till.effect(request) == (0, 0, 0)


@pytest.mark.parametrize("kind", OPENING)
async def test_a_payment_waiting_for_its_payer_can_be_cancelled_where_that_is_declared(
    till: Till, kind: OperationKind
) -> None:
    till.offers(kind)
    request = till.a(kind)
    outcome = await till.send(request)
    if not isinstance(outcome, RequiresAction) or not till.gateway.capabilities.cancel_waiting:
        pytest.skip("nothing waits, or it cannot be cancelled")
    void = till.follow_up(request, outcome.reference, VOID, captured_minor=0)
    assert isinstance(await till.finish(void), Succeeded)
    assert isinstance(await till.finish(void._replace(state=OperationState.INDETERMINATE, attempts=2)), Succeeded)
    assert till.effect(request) == (0, 0, 0)


async def test_a_means_that_is_declined_is_declined_at_every_attempt(till: Till) -> None:
    if till.provider.declined_method is None:
        pytest.skip("nothing is declined before the payer comes")
    request = till.a(CHARGE, payment_method=till.provider.declined_method)
    assert isinstance(await till.send(request), Declined)
    assert isinstance(await till.send(request._replace(state=OperationState.INDETERMINATE, attempts=2)), Declined)
    assert till.effect(request) == (0, 0, 0)


async def test_parts_are_captured_and_refunded_as_declared(till: Till) -> None:
    capabilities, whole = till.gateway.capabilities, till.provider.amount
    part = Money(whole.minor * 2 // 5, whole.currency)
    if capabilities.multi_capture:
        opened = till.a(AUTHORIZE)
        hold = await till.finish(opened)
        assert isinstance(hold, Succeeded)
        for number, (amount, is_final) in enumerate(
            ((part, False), (Money(whole.minor - part.minor, whole.currency), True))
        ):
            capture = till.follow_up(
                opened, hold.reference, CAPTURE, number=2 + number, amount=amount, is_final=is_final,
                captured_minor=0 if number == 0 else part.minor,
            )  # fmt: skip
            assert isinstance(await till.finish(capture), Succeeded)
        assert till.effect(opened) == (0, whole.minor, 0)
    elif capabilities.partial_capture:
        capture = await till.prepared(CAPTURE)
        assert isinstance(await till.finish(capture._replace(amount=part, is_final=False)), Succeeded)
        assert till.effect(capture) == (0, part.minor, 0)
    if capabilities.partial_refund:
        refund = await till.prepared(REFUND)
        assert isinstance(await till.finish(refund._replace(amount=part)), Succeeded)
        assert till.effect(refund) == (0, whole.minor, part.minor)


async def test_more_than_was_paid_is_not_refunded(till: Till) -> None:
    refund = await till.prepared(REFUND)
    more = Money(till.provider.amount.minor * 2, till.provider.amount.currency)
    assert isinstance(await till.finish(refund._replace(amount=more)), NotExecuted | Unknown)
    assert till.effect(refund) == (0, till.provider.amount.minor, 0)


@pytest.mark.parametrize("fault", [*BEFORE, *AFTER])
async def test_a_question_without_an_answer_ends_nothing(till: Till, fault: str) -> None:
    request = till.a(CHARGE)
    outcome = await till.finish(request)
    assert isinstance(outcome, Succeeded)
    asked = request._replace(state=OperationState.PENDING, reference=outcome.reference, attempts=3)
    till.provider.fault(fault, "read", request.payment_id)
    assert isinstance(await till.send(asked), Unknown | Unreachable)
    assert isinstance(await till.send(asked), Succeeded)


@pytest.mark.parametrize("till", ["vnpay"], indirect=True)
async def test_vnpay_asked_again_too_soon_says_nothing(till: Till) -> None:
    request = till.a(CHARGE)
    outcome = await till.finish(request)
    assert isinstance(outcome, Succeeded)
    asked = request._replace(state=OperationState.PENDING, reference=outcome.reference, attempts=3)
    configure = partial(till.provider.http.post, f"{till.provider.own}/configure")
    try:
        configure(json={"question_interval_seconds": 300}).raise_for_status()
        assert isinstance(await till.send(asked), Succeeded)
        assert isinstance(await till.send(asked), Unknown)
    finally:
        configure(json={}).raise_for_status()
    assert isinstance(await till.send(asked), Succeeded)


@pytest.mark.parametrize("till", ["vnpay"], indirect=True)
@pytest.mark.parametrize("number", [2, 3])
async def test_a_refund_before_ours_at_vnpay_is_not_taken_for_ours_that_was_lost(till: Till, number: int) -> None:
    """The earlier refund is one made in VNPay's portal before our first, or our own first before our second."""
    request = await till.prepared(REFUND)
    whole, part = till.provider.amount.minor, Money(till.provider.amount.minor * 2 // 5, "VND")
    if number == 3:
        assert isinstance(await till.finish(request._replace(amount=part)), Succeeded)
    else:
        reference = str(request.gateway_payment_id).partition("@")[0]
        portal = f"{till.provider.own}/payments/{reference}/refund"
        till.provider.http.post(portal, params={"amount": part.minor}).raise_for_status()
    later = datetime.now(UTC) + timedelta(seconds=5)  # VNPay's times, of refunds and of its clock, are in whole seconds
    ours = request._replace(operation_number=number, amount=part, first_dispatched_at=later)
    till.provider.fault("cut_before", "refund", request.payment_id)
    assert isinstance(await till.send(ours), Unknown)
    assert isinstance(await till.finish(ours._replace(state=OperationState.INDETERMINATE, attempts=2)), Unknown)
    assert till.effect(ours) == (0, whole, part.minor)
