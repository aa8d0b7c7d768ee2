"""Stuck operations are queried at a pace. A provider that asked for a rest gets no query that can wait."""

import asyncio
import math
from collections import Counter
from collections.abc import Sequence

import pytest

from domain.operations import GatewayRequest, OperationState, Outcome, Succeeded, Unreachable
from handlers.pace import Pace
from tests.support.dispatching import FAST, Bench, request
from tests.support.provider import BookkeepingGateway


class RestingGateway(BookkeepingGateway):
    """Executes and answers everything, and records the order; `rest` is the time for which its provider asked."""

    def __init__(self) -> None:
        super().__init__()
        self.rest = 0.0
        self.order: list[str] = []

    def rests_seconds(self) -> float:
        return self.rest

    async def status(self, request: GatewayRequest) -> Outcome:
        self.order.append("question")
        return Succeeded("ref", request.amount.minor)

    async def resume(self, request: GatewayRequest) -> Outcome:
        return await self.status(request)

    async def _execute(self, request: GatewayRequest) -> Outcome:
        self.order.append("payer" if request.attempts == 1 else "retry")
        return await super()._execute(request)


class SilentGateway(RestingGateway):
    """Accepts every call and never answers."""

    async def _execute(self, request: GatewayRequest) -> Outcome:
        await super()._execute(request)
        return await asyncio.Future()


def turns(per_second: float, checks: Sequence[float]) -> list[float]:
    """The times at which turns are taken if a caller checks at these times and takes every turn that is due."""
    now, taken = 0.0, []
    pace = Pace(lambda: now, BookkeepingGateway(), per_second)
    for now in checks:
        while pace.wait_seconds() <= 0:
            pace.take()
            taken.append(now)
    return taken


@pytest.mark.parametrize("per_second", [1, 7, 50, 300, 2000])
@pytest.mark.parametrize("late", [0.0005, 0.013, 0.06, 0.7])
def test_no_second_has_more_turns_than_allowed_however_late_one_comes(per_second: int, late: float) -> None:
    taken = turns(per_second, [number * late for number in range(int(10 / late))])
    most = max(sum(each <= other < each + 1 for other in taken) for each in taken[:: max(1, len(taken) // 500)])
    assert most <= math.ceil(0.95 * per_second)


@pytest.mark.parametrize("per_second", [20, 300, 2000])
def test_a_caller_that_asks_every_2_ms_gets_nearly_all_turns(per_second: int) -> None:
    assert len(turns(per_second, [number * 0.002 for number in range(5_000)])) >= 10 * per_second * 0.86


def paced(gateway: BookkeepingGateway, per_second: float = FAST, *, limit: int = 50) -> Bench:
    loop = asyncio.get_running_loop()
    return Bench(gateway, limit=limit, paces={"books": Pace(loop.time, gateway, per_second)})


def stuck() -> GatewayRequest:
    return request(state=OperationState.PENDING, attempts=3)


async def until(gateway: RestingGateway, count: int) -> None:
    async with asyncio.timeout(10):
        while len(gateway.order) < count:
            await asyncio.sleep(0.001)


async def test_while_a_provider_rests_only_payers_are_served_and_then_what_is_stuck() -> None:
    gateway = RestingGateway()
    gateway.rest = 0.05
    bench = paced(gateway)
    bench.dispatcher.resubmit([stuck(), request(attempts=2)])
    bench.dispatcher.submit([request(), request()])
    await until(gateway, 2)
    await asyncio.sleep(0.1)
    assert gateway.order == ["payer", "payer"]
    assert bench.dispatcher.rooms == {"books": 0}
    gateway.rest = 0.0
    await until(gateway, 4)
    assert gateway.order[2:] == ["question", "retry"]
    assert bench.dispatcher.rooms["books"] > 0


async def test_stuck_operations_are_paced_and_payers_do_not_wait_for_them() -> None:
    gateway, loop = RestingGateway(), asyncio.get_running_loop()
    bench, started = paced(gateway, 40, limit=1), loop.time()
    bench.dispatcher.resubmit([stuck() for _ in range(10)])
    bench.dispatcher.submit([request() for _ in range(10)])
    await until(gateway, 11)
    assert loop.time() - started < 0.15
    await until(gateway, 20)
    assert Counter(gateway.order) == {"question": 10, "payer": 10}
    assert loop.time() - started >= 0.2


async def test_payers_and_what_is_stuck_are_served_by_turns() -> None:
    gateway = RestingGateway()
    bench = paced(gateway, limit=1)
    bench.dispatcher.submit([request() for _ in range(5)])
    bench.dispatcher.resubmit([stuck() for _ in range(5)])
    await until(gateway, 10)
    assert gateway.order[:6] in (["payer", "question"] * 3, ["question", "payer"] * 3)


async def test_only_so_much_of_what_is_stuck_is_taken_as_can_be_asked_about_soon() -> None:
    bench = paced(RestingGateway(), 10)
    assert bench.dispatcher.rooms == {"books": 20}
    bench.dispatcher.resubmit([stuck() for _ in range(15)])
    assert bench.dispatcher.rooms == {"books": 5}


async def test_a_worker_that_stops_gives_back_what_it_has_not_asked_about() -> None:
    gateway = RestingGateway()
    gateway.rest = 100.0
    bench = paced(gateway)
    bench.dispatcher.resubmit([stuck() for _ in range(3)])
    await bench.dispatcher.drain(5)
    assert gateway.order == []
    assert [type(each.outcome) for each in bench.answers] == [Unreachable] * 3
    assert bench.dispatcher.waiting == 0


async def test_a_worker_that_stops_gives_back_what_payers_wait_for_and_it_could_not_send() -> None:
    gateway = SilentGateway()
    bench = paced(gateway, limit=1)
    bench.dispatcher.submit([request() for _ in range(3)])
    await bench.dispatcher.drain(0.05)
    assert gateway.order == ["payer"]
    assert [type(each.outcome) for each in bench.answers] == [Unreachable] * 2
    assert bench.dispatcher.waiting == 1


async def test_those_who_wait_for_a_turn_wait_for_the_rest_and_the_pace() -> None:
    gateway, loop = RestingGateway(), asyncio.get_running_loop()
    gateway.rest = 0.03
    loop.call_later(0.1, setattr, gateway, "rest", 0.0)
    pace, started = Pace(loop.time, gateway, 100), loop.time()
    for _ in range(5):
        await pace.turn()
    assert loop.time() - started >= 0.1


async def test_a_long_rest_is_not_waited_for_even_by_those_whose_turn_was_near_when_it_began() -> None:
    gateway, loop = RestingGateway(), asyncio.get_running_loop()
    pace, started = Pace(loop.time, gateway, 10), loop.time()
    waiting = [asyncio.create_task(pace.turn()) for _ in range(3)]
    await asyncio.sleep(0)
    gateway.rest = 100.0
    assert await asyncio.gather(*waiting) == [True, False, False]
    assert loop.time() - started < 1
