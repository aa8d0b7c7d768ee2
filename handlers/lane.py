"""The calls of one gateway: how many at a time, which is next, and when the gateway is left alone."""

import asyncio
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Final, NamedTuple, cast

import structlog

from domain.operations import GatewayRequest, Outcome, Unknown, Unreachable, describe
from domain.ports import Gateway, Pooled
from handlers import metrics
from handlers.breaker import Breaker
from handlers.pace import Pace

log = structlog.get_logger(__name__)

ROOM_SECONDS: Final = 2.0
"""Stuck operations are claimed this far ahead: longer than a sweep's interval, so that the pace has no gaps."""
SILENCE_SECONDS: Final = 60.0
"""Least time between two warnings that a provider gave no answer."""


class Queued(NamedTuple):
    """A request, and whether its operation is stuck: nobody waits for it, so it keeps to the pace."""

    request: GatewayRequest
    is_stuck: bool


class Lane:
    """At most `limit` calls at a time, alternating between payers' operations and stuck ones.

    Each kind is called in order of arrival; stuck operations also wait for the pace.
    """

    def __init__(
        self, gateway: Gateway, limit: int, pace: Pace, run: Callable[["Lane", Queued], Awaitable[None]]
    ) -> None:
        self.tasks: set[asyncio.Task[None]] = set()
        self.gateway = gateway
        self.breaker = Breaker(time.monotonic, self._log_change)
        self._limit = limit
        self._pace = pace
        self._run = run
        self._new: deque[GatewayRequest] = deque()
        self._stuck: deque[GatewayRequest] = deque()
        self._by_turns = deque([self._take_new, self._take_stuck])
        self._timer: asyncio.TimerHandle | None = None
        self._silence_logged_at = -math.inf
        metrics.IN_FLIGHT.labels(gateway.name).set_function(lambda: len(self.tasks))
        metrics.IN_FLIGHT_LIMIT.labels(gateway.name).set(limit)
        if isinstance(gateway, Pooled):
            metrics.watch_connections(gateway.name, gateway.connections)
        metrics.CIRCUIT_OPEN.labels(gateway.name).set_function(lambda: self.breaker.is_open)
        metrics.RESTING.labels(gateway.name).set_function(lambda: self._pace.rests)

    @property
    def load(self) -> int:
        """Requests accepted and not yet answered."""
        return len(self._new) + len(self._stuck) + len(self.tasks)

    @property
    def rests_long(self) -> bool:
        """Whether the provider rests for longer than a command waits."""
        return self._pace.rests_long

    @property
    def room(self) -> int:
        """How many more stuck operations this lane can take soon; the rest is left for other workers."""
        if self._pace.rests:
            return 0
        return max(0, math.ceil(self._pace.per_second * ROOM_SECONDS) - len(self._stuck))

    def note_call(self, outcome: Outcome) -> None:
        """Note the outcome of a call that moves money."""
        self.breaker.note(outcome)
        if isinstance(outcome, Unreachable | Unknown):
            self._log_silence(outcome)

    def note_answer(self, outcome: Outcome) -> None:
        """Note the outcome of a question. That the provider has no trace of an operation is an answer, too."""
        if isinstance(outcome, Unreachable):
            self._log_silence(outcome)

    def _log_silence(self, outcome: Unreachable | Unknown) -> None:
        """Log the first, and then at most one a minute, for its reason; metrics count them all."""
        if time.monotonic() - self._silence_logged_at >= SILENCE_SECONDS:
            self._silence_logged_at = time.monotonic()
            log.warning("a call got no word from the provider", gateway=self.gateway.name, answer=describe(outcome))

    def add(self, request: GatewayRequest) -> None:
        """Call for an operation that a payer waits for."""
        self._new.append(request)
        self._start()

    def add_stuck(self, request: GatewayRequest) -> None:
        """Call for a stuck operation, at the pace."""
        self._stuck.append(request)
        self._start()

    def give_back(self) -> list[GatewayRequest]:
        """Take back the stuck requests that were not sent."""
        left, self._stuck = list(self._stuck), deque()
        return left

    def give_back_new(self) -> list[GatewayRequest]:
        """Take back the requests that payers wait for and that were not sent."""
        left, self._new = list(self._new), deque()
        return left

    def _start(self) -> None:
        if len(self.tasks) < self._limit:
            self.tasks.add(asyncio.create_task(self._work()))

    async def _work(self) -> None:
        """Call for one request after another until none is left; one task serves many."""
        try:
            while (queued := self._next()) is not None:
                await self._run(self, queued)
        finally:
            # Here, not in a callback: a request added before that would find the lane full, and no task to take it.
            self.tasks.remove(cast("asyncio.Task[None]", asyncio.current_task()))

    def _next(self) -> Queued | None:
        self._by_turns.rotate()
        return next((queued for take in self._by_turns if (queued := take()) is not None), None)

    def _take_new(self) -> Queued | None:
        return Queued(self._new.popleft(), is_stuck=False) if self._new else None

    def _take_stuck(self) -> Queued | None:
        if not self._stuck:
            return None
        queued, wait_seconds = None, self._pace.wait_seconds()
        if wait_seconds <= 0:
            self._pace.take()
            queued = Queued(self._stuck.popleft(), is_stuck=True)
        if self._stuck and self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._pace.wait_seconds(), self._wake)
        return queued

    def _wake(self) -> None:
        self._timer = None
        self._start()

    def _log_change(self, is_open: bool) -> None:
        what = "gateway is left alone: only status queries are sent to it" if is_open else "gateway answers again"
        log.warning(what, gateway=self.gateway.name)
