"""A provider for tests, at the gateway's boundary: it keeps its own books and honours provider keys as Stripe does."""

import asyncio
from collections import Counter
from collections.abc import Callable
from datetime import timedelta

from domain.capabilities import Capabilities
from domain.commands import OperationKind
from domain.errors import OutcomeUnknown
from domain.money import MINOR_UNITS
from domain.operations import GatewayRequest, Outcome, Succeeded, Unknown

CAPABILITIES = Capabilities(
    operations=frozenset(OperationKind),
    currencies=frozenset(MINOR_UNITS),
    partial_capture=True,
    multi_capture=True,
    partial_refund=True,
    off_session=True,
    cancel_waiting=True,
    idempotency_retention=timedelta(hours=24),
)


class BookkeepingGateway:
    """Executes each provider key once. `calls` counts the attempts by key, `moved` the executed operations by kind."""

    name = "books"
    capabilities = CAPABILITIES

    def __init__(self) -> None:
        self.answers: dict[str, Outcome] = {}
        self.calls: Counter[str] = Counter()
        self.moved: Counter[OperationKind] = Counter()
        self.moved_minor: Counter[OperationKind] = Counter()
        self.lose_answer: Callable[[GatewayRequest], bool] = lambda request: False
        self.outcome: Callable[[GatewayRequest], Outcome | None] = lambda request: None
        self.gate = asyncio.Event()
        self.gate.set()

    async def authorize(self, request: GatewayRequest) -> Outcome:
        return await self._execute(request)

    async def charge(self, request: GatewayRequest) -> Outcome:
        return await self._execute(request)

    async def capture(self, request: GatewayRequest) -> Outcome:
        return await self._execute(request)

    async def void(self, request: GatewayRequest) -> Outcome:
        return await self._execute(request)

    async def refund(self, request: GatewayRequest) -> Outcome:
        return await self._execute(request)

    async def resume(self, request: GatewayRequest) -> Outcome:
        return await self.status(request)

    async def status(self, request: GatewayRequest) -> Outcome:
        return self.answers.get(request.provider_key, Unknown("no trace of it"))

    async def close(self) -> None:
        return

    async def _execute(self, request: GatewayRequest) -> Outcome:
        self.calls[request.provider_key] += 1
        await self.gate.wait()
        if request.provider_key not in self.answers:
            self.answers[request.provider_key] = self._decide(request)
        if self.lose_answer(request):
            raise OutcomeUnknown(self.name, "the answer was lost")
        return self.answers[request.provider_key]

    def _decide(self, request: GatewayRequest) -> Outcome:
        outcome = self.outcome(request) or Succeeded(f"ref_{request.provider_key}", request.amount.minor)
        if isinstance(outcome, Succeeded):
            self.moved[request.kind] += 1
            self.moved_minor[request.kind] += request.amount.minor
        return outcome
