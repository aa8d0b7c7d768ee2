"""A dispatcher on its own, with a scripted gateway and without a store."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, datetime, timedelta
from uuid import uuid4

from domain.commands import OperationKind
from domain.decision import Answer
from domain.money import Money
from domain.operations import GatewayRequest, Outcome, Unknown
from handlers.dispatch import Dispatcher
from handlers.leases import Leases
from handlers.pace import Pace
from tests.support.provider import BookkeepingGateway

NOW = datetime(2030, 1, 1, tzinfo=UTC)
LEASE = timedelta(seconds=60)
FAST = 10_000.0
"""Calls per second: more than any test makes, for tests that are not about the pace."""


class NoStore:
    """The only part of a store that the dispatcher uses."""

    def __init__(self) -> None:
        self.is_open = False

    def in_transaction(self) -> bool:
        return self.is_open


class ScriptedGateway(BookkeepingGateway):
    """Each call runs `behave`; `most` is the greatest number of calls at once, `asked` counts status queries."""

    def __init__(self, behave: Callable[[GatewayRequest], Awaitable[Outcome]]) -> None:
        super().__init__()
        self._behave = behave
        self._running = 0
        self.most = 0
        self.asked = 0

    async def resume(self, request: GatewayRequest) -> Outcome:
        return await self.status(request)

    async def status(self, request: GatewayRequest) -> Outcome:
        self.asked += 1
        return Unknown("no trace of it")

    async def _execute(self, request: GatewayRequest) -> Outcome:
        self.calls[request.provider_key] += 1
        self._running += 1
        self.most = max(self.most, self._running)
        try:
            return await self._behave(request)
        finally:
            self._running -= 1


class Bench:
    """A dispatcher with one gateway; collects its answers."""

    def __init__(
        self,
        gateway: BookkeepingGateway,
        *,
        limit: int = 50,
        lease: timedelta = LEASE,
        paces: Mapping[str, Pace] | None = None,
    ) -> None:
        self.store = NoStore()
        self.answers: list[Answer] = []
        self.dispatcher = Dispatcher(
            gateways={"books": gateway},
            limits={"books": limit},
            store=self.store,  # type: ignore[arg-type]
            clock=lambda: NOW,
            leases=Leases(store=self.store, lease=lease),  # type: ignore[arg-type]
            paces=paces or {"books": Pace(time.monotonic, gateway, FAST)},
        )
        self.dispatcher.on_answer = self.answers.append

    async def outcomes(self, *requests: GatewayRequest) -> list[Outcome]:
        """Submit these requests and wait for as many answers."""
        self.dispatcher.submit(requests)
        async with asyncio.timeout(10):
            while len(self.answers) < len(requests):
                await asyncio.sleep(0.001)
        return [answer.outcome for answer in self.answers]


def request(gateway: str = "books", **more: object) -> GatewayRequest:
    payment_id = uuid4()
    plain = GatewayRequest(
        OperationKind.CHARGE, payment_id, 1, f"{payment_id}:1", gateway, Money(100, "USD"), first_dispatched_at=NOW
    )
    return plain._replace(**more)  # type: ignore[arg-type]
