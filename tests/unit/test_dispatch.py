"""The dispatcher keeps its limit, and however a gateway call ends, no operation is lost."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime, timedelta

import pytest
from prometheus_client import REGISTRY
from structlog.testing import capture_logs

from domain.errors import GatewayContractBroken, GatewayUnreachable, OutcomeUnknown
from domain.operations import GatewayRequest, NotExecuted, OperationState, Outcome, Succeeded, Unknown, Unreachable
from domain.ports import HeldLease
from handlers import metrics
from handlers.breaker import FAILURES_MAX, LAPSE_SECONDS, TRIAL_INTERVAL_SECONDS, Breaker
from handlers.leases import Leases
from tests.support.dispatching import LEASE, NOW, Bench, NoStore, ScriptedGateway, request
from tests.support.provider import BookkeepingGateway


def raising(error: BaseException) -> Callable[[GatewayRequest], Awaitable[Outcome]]:
    async def behave(_: GatewayRequest) -> Outcome:
        raise error

    return behave


@pytest.mark.parametrize("limit", [1, 3])
async def test_a_request_submitted_as_a_full_lane_becomes_free_is_sent(limit: int) -> None:
    """Both happen in one turn of the event loop. No other worker takes the request while this one holds its lease."""
    done = asyncio.Event()

    async def wait(_: GatewayRequest) -> Outcome:
        await done.wait()
        return Succeeded("x")

    bench = Bench(ScriptedGateway(wait), limit=limit)
    bench.dispatcher.submit([request() for _ in range(limit)])
    await asyncio.sleep(0.01)

    async def submit_then() -> None:
        await done.wait()
        bench.dispatcher.submit([request()])

    late = asyncio.create_task(submit_then())
    await asyncio.sleep(0.01)
    done.set()
    await late
    async with asyncio.timeout(5):
        while len(bench.answers) <= limit:
            await asyncio.sleep(0.001)


@pytest.mark.parametrize(
    ("state", "expires_at", "is_sent"),
    [
        (OperationState.DISPATCHED, NOW, False),
        (OperationState.DISPATCHED, NOW + timedelta(seconds=1), True),
        (OperationState.INDETERMINATE, NOW, True),
    ],
)
async def test_an_expired_operation_is_sent_only_if_it_may_have_been_sent_before(
    state: OperationState, expires_at: datetime, *, is_sent: bool
) -> None:
    gateway = BookkeepingGateway()
    [outcome] = await Bench(gateway).outcomes(request(state=state, expires_at=expires_at))
    assert isinstance(outcome, Succeeded if is_sent else NotExecuted)
    assert gateway.calls.total() == is_sent


async def test_at_most_so_many_calls_run_at_once_and_all_are_answered() -> None:
    async def behave(_: GatewayRequest) -> Outcome:
        await asyncio.sleep(0)
        return Succeeded("x")

    gateway = ScriptedGateway(behave)
    bench = Bench(gateway, limit=3)
    outcomes = await bench.outcomes(*(request() for _ in range(50)))
    assert outcomes == [Succeeded("x")] * 50
    assert gateway.most == 3
    assert bench.dispatcher.waiting == 0


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (GatewayUnreachable("books", "not connected"), Unreachable),
        (OutcomeUnknown("books", "timeout"), Unknown),
        (GatewayContractBroken("books", "not JSON"), Unknown),
        (ZeroDivisionError("a defect"), Unknown),
        (asyncio.CancelledError("leaked by a library"), Unknown),
        (TimeoutError("a bare one"), Unknown),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
async def test_an_exception_of_a_gateway_is_unknown_unless_it_is_proof(
    error: BaseException, expected: type[Outcome]
) -> None:
    bench = Bench(ScriptedGateway(raising(error)), limit=1)
    outcomes = await bench.outcomes(request(), request())
    assert [type(outcome) for outcome in outcomes] == [expected, expected]
    assert bench.dispatcher.waiting == 0


async def test_a_call_that_hangs_longer_than_a_lease_is_unknown_and_frees_its_place() -> None:
    async def behave(request: GatewayRequest) -> Outcome:
        await asyncio.Event().wait()
        raise AssertionError("never")

    bench = Bench(ScriptedGateway(behave), limit=1, lease=timedelta(milliseconds=300))
    before = metrics.TIMEOUTS.labels("books")._value.get()
    with capture_logs() as logs:
        for _ in range(2):
            bench.answers.clear()
            assert [type(outcome) for outcome in await bench.outcomes(request())] == [Unknown]
    assert metrics.TIMEOUTS.labels("books")._value.get() == before + 2
    assert {each["log_level"] for each in logs} == {"warning"}, "it is no defect of the adapter"


async def test_an_answer_that_cannot_be_read_is_told_also_where_nothing_was_sent_for_it() -> None:
    async def behave(_: GatewayRequest) -> Outcome:
        try:
            raise GatewayContractBroken("books", "an answer without a valid signature")
        except OutcomeUnknown as error:
            raise GatewayUnreachable("books", "no refund was sent") from error

    with capture_logs() as logs:
        outcomes = await Bench(ScriptedGateway(behave)).outcomes(request())
    assert outcomes == [Unreachable("no refund was sent")]
    assert [each["event"] for each in logs if each["log_level"] == "error"] == ["gateway answer not understood"]


async def test_a_request_that_waited_past_its_lease_is_not_sent() -> None:
    """It may have ended and been requested again since. VNPay knows no keys, so it would make the refund twice."""

    async def behave(_: GatewayRequest) -> Outcome:
        await asyncio.sleep(0.4)
        return Succeeded("x")

    gateway = ScriptedGateway(behave)
    first, second = request(), request()
    outcomes = await Bench(gateway, limit=1, lease=timedelta(milliseconds=300)).outcomes(first, second)
    assert [type(each) for each in outcomes] == [Unknown, Unreachable]
    assert gateway.calls[second.provider_key] == 0


async def test_a_lease_that_was_renewed_is_held_and_one_that_was_taken_over_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mine, lost, clock = request(), request(), [0.0]
    monkeypatch.setattr("handlers.leases._seconds", lambda: clock[0])

    class Store(NoStore):
        async def renew(self, held: Sequence[HeldLease], *, lease: timedelta) -> list[HeldLease]:
            return [each for each in held if each.payment_id == mine.payment_id]

    leases = Leases(store=Store(), lease=LEASE)  # type: ignore[arg-type]
    leases.hold([mine, lost])
    clock[0] = 40.0
    await leases.renew()
    assert (leases.is_held(mine), leases.is_held(lost)) == (True, False)
    clock[0] = 99.0
    assert leases.is_held(mine)
    clock[0] = 101.0
    assert not leases.is_held(mine)


async def test_a_request_for_a_gateway_that_is_gone_is_unreachable_and_stops_no_other() -> None:
    bench = Bench(BookkeepingGateway())
    gone, here = request("removed"), request()
    await bench.outcomes(gone, here)
    by_payment = {answer.payment_id: answer.outcome for answer in bench.answers}
    assert isinstance(by_payment[gone.payment_id], Unreachable)
    assert isinstance(by_payment[here.payment_id], Succeeded)


async def test_a_gateway_is_never_called_inside_a_transaction() -> None:
    bench = Bench(BookkeepingGateway())
    bench.store.is_open = True
    with pytest.raises(AssertionError, match="inside a transaction"):
        await bench.dispatcher._outcome(BookkeepingGateway().charge, request())


@pytest.mark.parametrize("state", [OperationState.PENDING, OperationState.REQUIRES_ACTION])
async def test_an_operation_known_to_the_provider_is_queried_and_not_sent_again(state: OperationState) -> None:
    gateway = ScriptedGateway(raising(AssertionError("sent again")))
    await Bench(gateway).outcomes(request(state=state, attempts=3))
    assert (gateway.asked, sum(gateway.calls.values())) == (1, 0)


async def test_an_operation_in_review_with_a_provider_reference_is_only_queried() -> None:
    reviewed = request(state=OperationState.NEEDS_REVIEW, attempts=3)
    gateway = ScriptedGateway(raising(AssertionError("sent again")))
    await Bench(gateway).outcomes(reviewed._replace(reference="ref"))
    assert (gateway.asked, sum(gateway.calls.values())) == (1, 0)
    await Bench(gateway).outcomes(reviewed)
    assert (gateway.asked, sum(gateway.calls.values())) == (1, 1)


@pytest.mark.parametrize("attempts", [1, 2], ids=["a first attempt that slept", "a repeated attempt"])
async def test_after_the_provider_may_have_forgotten_the_key_it_is_only_asked(attempts: int) -> None:
    gateway = ScriptedGateway(raising(AssertionError("sent again")))
    long_ago = NOW - gateway.capabilities.idempotency_retention
    await Bench(gateway).outcomes(request(attempts=attempts, first_dispatched_at=long_ago))
    assert (gateway.asked, sum(gateway.calls.values())) == (1, 0)


async def test_a_provider_that_leaves_everything_unknown_is_left_alone_and_still_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    is_back = False

    async def behave(_: GatewayRequest) -> Outcome:
        return Succeeded("ref") if is_back else Unknown("lost")

    gateway = ScriptedGateway(behave)
    bench = Bench(gateway, limit=1)
    outcomes = await bench.outcomes(*(request() for _ in range(FAILURES_MAX + 3)))
    assert [type(each) for each in outcomes] == [Unknown] * FAILURES_MAX + [Unreachable] * 3
    assert sum(gateway.calls.values()) == FAILURES_MAX
    assert REGISTRY.get_sample_value("payments_gateway_circuit_open", {"gateway": "books"}) == 1

    bench.answers.clear()
    await bench.outcomes(request()._replace(state=OperationState.PENDING))
    assert gateway.asked == 1

    is_back = True
    monkeypatch.setattr("handlers.breaker.TRIAL_INTERVAL_SECONDS", 0)
    bench.answers.clear()
    assert [type(each) for each in await bench.outcomes(request(), request())] == [Succeeded, Succeeded]
    assert REGISTRY.get_sample_value("payments_gateway_circuit_open", {"gateway": "books"}) == 0


async def test_a_success_between_them_keeps_the_circuit_closed() -> None:
    changes: list[bool] = []
    breaker = Breaker(lambda: 0.0, changes.append)
    for _ in range(3):
        for _ in range(FAILURES_MAX - 1):
            breaker.note(Unknown())
        breaker.note(Succeeded("ref"))
    assert breaker.may_send()
    assert changes == []


async def test_a_call_that_did_not_reach_the_provider_tells_nothing_of_how_it_answers() -> None:
    now, changes = 100.0, list[bool]()
    breaker = Breaker(lambda: now, changes.append)
    for _ in range(FAILURES_MAX):
        breaker.note(Unknown())
        breaker.note(Unreachable())
    assert changes == [True]
    now += TRIAL_INTERVAL_SECONDS
    assert breaker.may_send()
    breaker.note(Unreachable())
    assert changes == [True], "a trial that was refused a connection is no sign that it answers again"


async def test_a_provider_that_cannot_be_reached_is_told_in_the_log_with_its_reason_and_once_a_minute() -> None:
    async def refuse(_: GatewayRequest) -> Outcome:
        raise GatewayUnreachable("books", "401: the key was revoked")

    bench = Bench(ScriptedGateway(refuse), limit=1)
    with capture_logs() as told:
        await bench.outcomes(*(request() for _ in range(5)))
    (line,) = [each for each in told if each["event"] == "a call got no word from the provider"]
    assert line["gateway"] == "books"
    assert "401: the key was revoked" in line["answer"]


async def test_a_circuit_is_not_told_as_open_for_ever_where_nothing_is_left_to_try() -> None:
    """Another process may have settled everything that waited. Then no call shows whether the provider is back."""
    now = 100.0
    breaker = Breaker(lambda: now, lambda is_open: None)
    for _ in range(FAILURES_MAX):
        breaker.note(Unknown())
    now += LAPSE_SECONDS - 1
    assert breaker.may_send()
    breaker.note(Unknown())
    now += LAPSE_SECONDS - 1
    assert breaker.is_open, "what waits was tried meanwhile"
    now += 1
    assert not breaker.is_open
    assert [breaker.may_send(), breaker.may_send()] == [True, False], "one at a time until one is answered"
    assert breaker.is_open
    now += TRIAL_INTERVAL_SECONDS
    assert breaker.may_send()
    breaker.note(Succeeded("ref"))
    assert breaker.may_send()
    assert not breaker.is_open
