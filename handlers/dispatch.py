"""Sends committed operations to their gateways, concurrently up to a limit each; every call ends in an `Answer`.

No transaction is open here. An exception never loses an operation: any result that proves nothing is `Unknown`.
"""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from datetime import timedelta
from typing import Final, assert_never

import structlog

from domain.commands import OperationKind
from domain.decision import Answer
from domain.errors import GatewayContractBroken, GatewayUnreachable, OutcomeUnknown
from domain.operations import GatewayRequest, NotExecuted, OperationState, Outcome, Unknown, Unreachable
from domain.ports import Clock, Gateway, PaymentStore
from handlers import metrics
from handlers.lane import Lane, Queued
from handlers.leases import Leases
from handlers.pace import Pace

log = structlog.get_logger(__name__)

Call = Callable[[GatewayRequest], Awaitable[Outcome]]

WITH_THE_PROVIDER = frozenset({OperationState.PENDING, OperationState.REQUIRES_ACTION})
"""The provider has confirmed that it has these: sending them again is pointless."""
LOOK_SECONDS: Final = 0.01
"""How often a process that is ending checks for more work."""
PROVIDER_RESTS: Final = "not sent: its provider wants to rest"
EXPIRED: Final = "the command expired before it could be sent to its gateway"
PROCESS_ENDS: Final = "not sent: this process ends"
LEASE_RAN_OUT: Final = "not sent: the lease ran out while it waited to be sent"
GIVEN_BACK: Final = frozenset(map(Unreachable, (PROVIDER_RESTS, PROCESS_ENDS, LEASE_RAN_OUT)))
"""Answers about operations that this process took over but never sent."""


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
        paces: Mapping[str, Pace],
    ) -> None:
        self.on_answer: Callable[[Answer], None]
        self._lanes = {name: Lane(each, limits[name], paces[name], self._run) for name, each in gateways.items()}
        self._store = store
        self._clock = clock
        self._leases = leases
        self._has_ended = False

    @property
    def waiting(self) -> int:
        """Requests accepted and not yet answered."""
        return sum(lane.load for lane in self._lanes.values())

    @property
    def rooms(self) -> dict[str, int]:
        """How many more stuck operations each gateway can be asked about soon."""
        return {name: lane.room for name, lane in self._lanes.items()}

    def submit(self, requests: Sequence[GatewayRequest]) -> None:
        """Call the gateways for these, as soon as each one's limit allows."""
        self._add(requests, Lane.add)

    def resubmit(self, requests: Sequence[GatewayRequest]) -> None:
        """Ask the gateways about these stuck operations, or repeat them, at each gateway's pace."""
        self._add(requests, Lane.add_stuck)

    def _add(self, requests: Sequence[GatewayRequest], add: Callable[[Lane, GatewayRequest], None]) -> None:
        self._leases.hold(requests)
        if self._has_ended:
            for request in requests:
                self._answer(request, Unreachable(PROCESS_ENDS))
            return
        for request in requests:
            lane = self._lanes.get(request.gateway)
            if lane is None:
                self._refuse(request)
            else:
                add(lane, request)

    def _refuse(self, request: GatewayRequest) -> None:
        """Answer for a gateway that is no longer configured: nothing is sent, the others go on."""
        log.error(
            "gateway is not configured here: see docs/gateways.md, Removing",
            gateway=request.gateway,
            key=request.provider_key,
        )
        self._answer(request, Unreachable(f"gateway {request.gateway} is not configured here"))

    async def drain(self, timeout_seconds: float, *, may_more_come: Callable[[], bool] = lambda: False) -> None:
        """Wait until every started call is answered and no more may come, or the time is up; a sweep takes over the
        rest.

        Requests that were not sent are given back, so that no lease expires on them and nobody assumes that they were
        started: stuck ones at once, payers' operations when the time is up, and any that arrive later.
        """
        lanes, why = self._lanes.values(), Unreachable(PROCESS_ENDS)
        self._give_back(lanes, why)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_seconds):
                # Saving an answer may begin its payment's next operation.
                while (tasks := [task for lane in lanes for task in lane.tasks]) or may_more_come():
                    await (asyncio.wait(tasks) if tasks else asyncio.sleep(LOOK_SECONDS))
        self._has_ended = True
        for request in [each for lane in lanes for each in lane.give_back_new()]:
            self._answer(request, why)

    def give_back_resting(self) -> None:
        """Give back unsent stuck operations of providers that rest for long, for callers that do not wait that long."""
        self._give_back([lane for lane in self._lanes.values() if lane.rests_long], Unreachable(PROVIDER_RESTS))

    def _give_back(self, lanes: Iterable[Lane], why: Unreachable) -> None:
        for request in [each for lane in lanes for each in lane.give_back()]:
            self._answer(request, why)

    async def _run(self, lane: Lane, queued: Queued) -> None:
        outcome = await self._outcome_in(lane, queued.request)
        word = type(outcome).__name__
        metrics.calls(queued.request.gateway, queued.request.kind, word).inc()
        if queued.is_stuck:
            metrics.checked(queued.request.gateway, "operation", word).inc()
        self._answer(queued.request, outcome, was_stuck=queued.is_stuck)

    async def _outcome_in(self, lane: Lane, request: GatewayRequest) -> Outcome:
        if not self._leases.is_held(request):
            # This process slept, or Postgres was away. Another worker, or a person, may have ended the operation since;
            # a refund without a key at its provider would then be made in addition to its successor.
            return Unreachable(LEASE_RAN_OUT)
        question = self._question(lane.gateway, request)
        if question is not None:
            outcome = await self._outcome(question, request)
            lane.note_answer(outcome)
            return outcome
        if self._has_expired(request):
            return NotExecuted(EXPIRED, has_expired=True)
        if not lane.breaker.may_send():
            return Unreachable(f"not sent: gateway {request.gateway} has left too many outcomes unknown")
        outcome = await self._outcome(_call_of(lane.gateway, request.kind), request)
        lane.note_call(outcome)
        return outcome

    def _answer(self, request: GatewayRequest, outcome: Outcome, *, was_stuck: bool = False) -> None:
        token = request.lease_token
        self.on_answer(Answer(request.payment_id, request.operation_number, token, outcome, was_stuck))

    async def _outcome(self, call: Call, request: GatewayRequest) -> Outcome:
        assert not self._store.in_transaction(), "a gateway is never called inside a transaction"
        started = time.perf_counter()
        try:
            # Gateways have their own, shorter timeouts; one that hangs all the same must not hold its place forever.
            async with asyncio.timeout(self._leases.lease.total_seconds()):
                return await call(request)
        except (GatewayUnreachable, OutcomeUnknown) as error:
            return _read(error, request)
        except asyncio.CancelledError:
            if is_cancelled():
                raise
            log.error("gateway call cancelled itself", gateway=request.gateway, key=request.provider_key)
            return Unknown("the gateway adapter was cancelled")
        except TimeoutError:
            metrics.TIMEOUTS.labels(request.gateway).inc()
            return Unknown("no answer within the lease")
        except Exception:
            # A defect in an adapter: whether money moved is unknown, and must stay so.
            log.exception("gateway call failed unexpectedly", gateway=request.gateway, key=request.provider_key)
            return Unknown("the gateway adapter failed")
        finally:
            metrics.call_seconds(request.gateway).observe(time.perf_counter() - started)

    def _question(self, gateway: Gateway, request: GatewayRequest) -> Call | None:
        """The call that asks about an operation that must not be sent (again); None if it may be sent."""
        if request.state in WITH_THE_PROVIDER:
            return gateway.resume
        # An operation in review that the provider has named is not sent again: its stored answer would be old news.
        is_known = request.state is OperationState.NEEDS_REVIEW and request.reference is not None
        return gateway.status if is_known or self._is_key_forgotten(gateway, request) else None

    def _has_expired(self, request: GatewayRequest) -> bool:
        """Whether the command expired before it was begun. If another worker took it over, this answer is stale."""
        expires_at = request.expires_at
        is_begun = request.state is not OperationState.DISPATCHED
        return expires_at is not None and not is_begun and expires_at <= self._clock()

    def _is_key_forgotten(self, gateway: Gateway, request: GatewayRequest) -> bool:
        """Whether the provider may have dropped the key: repeating the call could then move money again.

        This applies to a first attempt, too: a worker that slept that long does not know what others did meanwhile.
        """
        retention = gateway.capabilities.idempotency_retention
        if not retention:
            return request.state is not OperationState.DISPATCHED
        sent = request.first_dispatched_at
        return sent is not None and self._clock() - sent > retention - timedelta(minutes=5)


def _read(error: GatewayUnreachable | OutcomeUnknown, request: GatewayRequest) -> Outcome:
    if error.is_caused_by(TimeoutError):
        metrics.TIMEOUTS.labels(request.gateway).inc()
    if error.is_caused_by(GatewayContractBroken):  # Also if it answered a question before anything was sent.
        log.error("gateway answer not understood", gateway=request.gateway, key=request.provider_key, error=str(error))
    return Unreachable(error.message) if isinstance(error, GatewayUnreachable) else Unknown(error.message)


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


def is_cancelled() -> bool:
    """Whether this task itself was cancelled; otherwise a library leaked a cancellation of its own."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
