"""The benchmarks' gateway counts its load as a provider would see it."""

import asyncio

from infra.gateways.instant import InstantGateway
from tests.support.dispatching import request


async def test_it_tells_how_many_calls_were_under_way_and_how_many_began_in_one_second() -> None:
    now = 100.0
    gateway = InstantGateway(latency_seconds=0.001, clock=lambda: now)
    for moment, calls in ((100.0, 3), (100.9, 4), (101.0, 2), (103.0, 5)):
        now = moment
        await asyncio.gather(*(gateway.status(request()) for _ in range(calls)))
    assert gateway.most_at_once == 5
    assert gateway.most_in_a_second == 7
