"""A gateway inside the process that says yes to everything: for benchmarks of everything around the gateway.

It moves no money and remembers nothing. Never register it where real payments run.
"""

import asyncio
from datetime import timedelta
from typing import Final

from domain.capabilities import Capabilities
from domain.commands import OperationKind
from domain.money import MINOR_UNITS
from domain.operations import GatewayRequest, Outcome, Succeeded

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
    """Succeeds after `latency_seconds`; at 0 without ever giving way to another task. The same key, the same answer."""

    name = "instant"
    capabilities = _CAPABILITIES

    def __init__(self, latency_seconds: float = 0.0) -> None:
        self._latency_seconds = latency_seconds

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
        """Every operation that anybody asks about has succeeded here."""
        return await self._succeed(request)

    async def close(self) -> None:
        """Nothing is held open."""

    async def _succeed(self, request: GatewayRequest) -> Outcome:
        if self._latency_seconds:
            await asyncio.sleep(self._latency_seconds)
        return Succeeded(f"instant_{request.provider_key}", request.amount.minor)
