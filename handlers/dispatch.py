"""Sends committed operations to their gateways, in parallel up to a limit each, and turns every end into an answer.

No transaction is open here. An exception never loses an operation: what is not proof is `Unknown`.
"""

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import timedelta
from typing import assert_never

import structlog

from domain.commands import OperationKind
from domain.decision import Answer
from domain.errors import GatewayContractBroken, GatewayUnreachable, OutcomeUnknown
from domain.operations import GatewayRequest, OperationState, Outcome, Unknown, Unreachable
from domain.ports import Clock, Gateway, PaymentStore
from handlers import metrics
from handlers.breaker import Breaker
from handlers.leases import Leases

log = structlog.get_logger(__name__)

Call = Callable[[GatewayRequest], Awaitable[Outcome]]

WITH_THE_PROVIDER = frozenset({OperationState.PENDING, OperationState.REQUIRES_ACTION})
"""The provider has these and told us so: sending them again is pointless."""


class Dispatcher:
    """Runs gateway calls. `on_answer`, to be set before the first call, receives every answer."""

    def __init__(
        self,
        *,
        gateways: Mapping[str, Gateway],
        limits: Mapping[str, int],
        store: PaymentStore,
        clock: Clock,
        leases: Leases,
    ) -> None:
        self.on_answer: Callable[[Answer], None]
        self._lanes = {name: _Lane(gateway, limits[name], self._run) for name, gateway in gateways.items()}
        self._store = store
        self._clock = clock
        self._leases = leases

    @property
    def waiting(self) -> int:
        """Requests accepted and not yet answered."""
        return sum(lane.load for lane in self._lanes.values())

    def submit(self, requests: Sequence[GatewayRequest]) -> None:
        """Call the gateways for these, as soon as each one's limit allows."""
        self._leases.hold(requests)
        for request in requests:
            lane = self._lanes.get(request.gateway)
            if lane is None:
                self._refuse(request)
            else:
                lane.add(request)

    def _refuse(self, request: GatewayRequest) -> None:
        """An operation of a gateway that was configured once: nothing is sent, the others go on."""
        log.error("gateway is not configured", gateway=request.gateway, key=request.provider_key)
        self._answer(request, Unreachable(f"gateway {request.gateway} is not configured here"))

    async def drain(self, timeout_seconds: float) -> None:
        """Wait until all is answered, or the time is up; what is left is taken over by a sweep after its lease."""
        tasks = [task for lane in self._lanes.values() for task in lane.tasks]
        if tasks:
            await asyncio.wait(tasks, timeout=timeout_seconds)

    async def _run(self, lane: "_Lane", request: GatewayRequest) -> None:
        outcome: Outcome
        question = self._question(lane.gateway, request)
        if question is not None:
            outcome = await self._outcome(question, request)
        elif lane.breaker.may_send():
            outcome = await self._outcome(_call_of(lane.gateway, request.kind), request)
            lane.breaker.note(outcome)
        else:
            outcome = Unreachable(f"not sent: gateway {request.gateway} has left too many outcomes unknown")
        metrics.calls(request.gateway, request.kind, type(outcome).__name__).inc()
        self._answer(request, outcome)

    def _answer(self, request: GatewayRequest, outcome: Outcome) -> None:
        self.on_answer(Answer(request.payment_id, request.operation_number, request.lease_token, outcome))

    async def _outcome(self, call: Call, request: GatewayRequest) -> Outcome:
        assert not self._store.in_transaction(), "a gateway is never called inside a transaction"
        started = time.perf_counter()
        try:
            # A gateway has its own, shorter timeouts; one that hangs all the same must not hold its place for ever.
            async with asyncio.timeout(self._leases.lease.total_seconds()):
                return await call(request)
        except GatewayUnreachable as error:
            return Unreachable(error.message)
        except GatewayContractBroken as error:
            log.error(
                "gateway answer not understood", gateway=request.gateway, key=request.provider_key, error=str(error)
            )
            return Unknown(error.message)
        except OutcomeUnknown as error:
            return Unknown(error.message)
        except asyncio.CancelledError:
            if _is_cancelled():
                raise
            log.error("gateway call cancelled itself", gateway=request.gateway, key=request.provider_key)
            return Unknown("the gateway adapter was cancelled")
        except Exception:
            # A defect of an adapter: whether money moved is unknown, and must stay so.
            log.exception("gateway call failed unexpectedly", gateway=request.gateway, key=request.provider_key)
            return Unknown("the gateway adapter failed")
        finally:
            metrics.call_seconds(request.gateway).observe(time.perf_counter() - started)

    def _question(self, gateway: Gateway, request: GatewayRequest) -> Call | None:
        """How to ask about it, if it must not be sent (again)."""
        if request.state in WITH_THE_PROVIDER:
            return gateway.resume
        # What a person is to look at, and the provider has named, is not sent again: a stored answer would be old news.
        is_known = request.state is OperationState.NEEDS_REVIEW and request.reference is not None
        return gateway.status if is_known or self._is_key_forgotten(gateway, request) else None

    def _is_key_forgotten(self, gateway: Gateway, request: GatewayRequest) -> bool:
        """Whether the provider may have dropped the key: repeating the call could then move money again.

        This goes for a first attempt, too: a worker that slept for so long does not know what others did meanwhile.
        """
        retention = gateway.capabilities.idempotency_retention
        if not retention:
            return request.state is not OperationState.DISPATCHED
        sent = request.first_dispatched_at
        return sent is not None and self._clock() - sent > retention - timedelta(minutes=5)


def _call_of(gateway: Gateway, kind: OperationKind) -> Call:
    match kind:
        case OperationKind.AUTHORIZE:
            return gateway.authorize
        case OperationKind.CHARGE:
            return gateway.charge
        case OperationKind.CAPTURE:
            return gateway.capture
        case OperationKind.VOID:
            return gateway.void
        case OperationKind.REFUND:
            return gateway.refund
        case _:
            assert_never(kind)


def _is_cancelled() -> bool:
    """Whether somebody cancelled this very task; otherwise a library leaked a cancellation of its own."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


class _Lane:
    """The calls of one gateway: at most `limit` at a time, the others in order of arrival."""

    def __init__(self, gateway: Gateway, limit: int, run: Callable[["_Lane", GatewayRequest], Awaitable[None]]) -> None:
        self.tasks: set[asyncio.Task[None]] = set()
        self.gateway = gateway
        self.breaker = Breaker(time.monotonic, self._tell)
        self._limit = limit
        self._run = run
        self._queue: deque[GatewayRequest] = deque()
        metrics.IN_FLIGHT.labels(gateway.name).set_function(lambda: len(self.tasks))

    @property
    def load(self) -> int:
        return len(self._queue) + len(self.tasks)

    def add(self, request: GatewayRequest) -> None:
        self._queue.append(request)
        if len(self.tasks) < self._limit:
            task = asyncio.create_task(self._work())
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)

    async def _work(self) -> None:
        """Call for one request after the other until none is left; a task serves many."""
        while self._queue:
            await self._run(self, self._queue.popleft())

    def _tell(self, is_open: bool) -> None:
        metrics.CIRCUIT_OPEN.labels(self.gateway.name).set(is_open)
        log.warning("gateway is left alone" if is_open else "gateway answers again", gateway=self.gateway.name)
