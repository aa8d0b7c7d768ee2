"""An in-process gateway that approves everything, for benchmarks of everything around the gateway.

It moves no money and remembers only how many calls it had, as a provider would see them. Never register it where real
payments run.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable
from datetime import timedelta
from typing import Final

from prometheus_client import Gauge

from domain.capabilities import Capabilities
from domain.commands import OperationKind
from domain.money import MINOR_UNITS
from domain.operations import GatewayRequest, Outcome, Succeeded

MOST_AT_ONCE: Final = Gauge("payments_instant_gateway_most_at_once", "Most calls at once of the gateway for benchmarks")
MOST_IN_A_SECOND: Final = Gauge("payments_instant_gateway_most_in_a_second", "Most calls of it begun within one second")

_CAPABILITIES: Final = Capabilities(
    operations=frozenset(OperationKind),
    currencies=frozenset(MINOR_UNITS),
    partial_capture=True,
    multi_capture=True,
    partial_refund=True,
    off_session=True,
    cancel_waiting=True,
    idempotency_retention=timedelta(days=3650),
)


class InstantGateway:
    """Succeeds after `latency_seconds`; at 0 without yielding to another task. The same key gets the same answer."""

    name = "instant"
    capabilities = _CAPABILITIES

    def __init__(self, latency_seconds: float = 0.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._latency_seconds = latency_seconds
        self._clock = clock
        self._begun: deque[float] = deque()
        self._under_way = 0
        MOST_AT_ONCE.set_function(lambda: self.most_at_once)
        MOST_IN_A_SECOND.set_function(lambda: self.most_in_a_second)
        self.most_at_once = 0
        self.most_in_a_second = 0

    async def authorize(self, request: GatewayRequest) -> Outcome:
        return await self._succeed(request)

    async def charge(self, request: GatewayRequest) -> Outcome:
        return await self._succeed(request)

    async def capture(self, request: GatewayRequest) -> Outcome:
        return await self._succeed(request)

    async def void(self, request: GatewayRequest) -> Outcome:
        return await self._succeed(request)

    async def refund(self, request: GatewayRequest) -> Outcome:
        return await self._succeed(request)

    async def resume(self, request: GatewayRequest) -> Outcome:
        return await self._succeed(request)

    async def status(self, request: GatewayRequest) -> Outcome:
        """Success, for every operation."""
        return await self._succeed(request)

    async def close(self) -> None:
        """Nothing to close."""

    async def _succeed(self, request: GatewayRequest) -> Outcome:
        self._note()
        if self._latency_seconds:
            await asyncio.sleep(self._latency_seconds)
        self._under_way -= 1
        return Succeeded(f"instant_{request.provider_key}", request.amount.minor)

    def _note(self) -> None:
        now = self._clock()
        self._begun.append(now)
        while self._begun[0] <= now - 1:
            self._begun.popleft()
        self._under_way += 1
        self.most_at_once = max(self.most_at_once, self._under_way)
        self.most_in_a_second = max(self.most_in_a_second, len(self._begun))
