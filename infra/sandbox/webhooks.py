"""Sends the simulators' webhooks: signed at each attempt, retried, and on request delayed, doubled, reordered or lost.

`Manners` say how badly it behaves. What is on its way when the simulator ends is lost, as at a real provider it may be:
nothing may depend on a webhook alone.
"""

import asyncio
import contextlib
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import httpx

ATTEMPTS_MAX = 8
FIRST_DELAY_SECONDS = 0.2
CONNECTIONS = 8
TIMEOUT_SECONDS = 10.0
HEAD_START_SECONDS = 0.3


class Outgoing(NamedTuple):
    """One attempt, as it goes over the wire."""

    url: str
    body: bytes = b""
    headers: Mapping[str, str] = {}
    method: str = "POST"


@dataclass(slots=True)
class Manners:
    """Each share is a probability per webhook. `delay_seconds` is waited before the first attempt."""

    delay_seconds: float = 0.0
    lost: float = 0.0
    doubled: float = 0.0
    reordered: float = 0.0
    """Held back until the next one was sent, or for a second."""
    amount_off_by: int = 0
    """Added to the amounts that are told, in minor units: a provider's mistake, or a message about something else."""


@dataclass(slots=True)
class WebhookSender:
    """Sends what `send` is given in the background. `sent` and `accepted` count for the simulator's page."""

    manners: Manners = field(default_factory=Manners)
    sent: int = 0
    accepted: int = 0
    _http: httpx.AsyncClient | None = None
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)
    _next: asyncio.Event = field(default_factory=asyncio.Event)
    _free: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(CONNECTIONS))
    """httpcore goes through all that wait for a connection whenever one is free: they wait out here."""

    def send(
        self, make: Callable[[], Outgoing], *, is_accepted: Callable[[httpx.Response], bool] | None = None
    ) -> None:
        """Deliver what `make` builds, anew for each attempt, until it is accepted: by default with any 2xx."""
        if random.random() < self.manners.lost:  # noqa: S311 - a fault to be injected, no secret
            return
        times = 2 if random.random() < self.manners.doubled else 1  # noqa: S311 - as above
        for _ in range(times):
            task = asyncio.create_task(self._deliver(make, is_accepted or _is_2xx))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _deliver(self, make: Callable[[], Outgoing], is_accepted: Callable[[httpx.Response], bool]) -> None:
        await asyncio.sleep(self.manners.delay_seconds)
        if random.random() < self.manners.reordered:  # noqa: S311 - as above
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._next.wait(), 1.0)
        for attempt in range(ATTEMPTS_MAX):
            if await self._attempt(make(), is_accepted):
                return
            await asyncio.sleep(FIRST_DELAY_SECONDS * 2**attempt)

    async def _attempt(self, outgoing: Outgoing, is_accepted: Callable[[httpx.Response], bool]) -> bool:
        if self._http is None:
            # Few connections: httpcore walks through all of them at every request.
            self._http = httpx.AsyncClient(
                timeout=httpx.Timeout(TIMEOUT_SECONDS, pool=None),
                limits=httpx.Limits(max_connections=CONNECTIONS),
                trust_env=False,
            )
        self.sent += 1
        try:
            async with self._free:
                answer = await self._http.request(
                    outgoing.method, outgoing.url, content=outgoing.body or None, headers=dict(outgoing.headers)
                )
        except httpx.HTTPError:
            return False
        finally:
            self._next.set()
            self._next.clear()
        self.accepted += is_accepted(answer)
        return is_accepted(answer)

    @property
    def under_way(self) -> int:
        """How many are yet to be delivered."""
        return len(self._tasks)

    async def until_heard(self, accepted_before: int, seconds: float) -> None:
        """Until one more was accepted than these, and whoever did had a moment to act on it; or the time is up."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self.accepted <= accepted_before:
                    await self._next.wait()
                await asyncio.sleep(HEAD_START_SECONDS)

    def behave(self, given: Mapping[str, Any]) -> None:
        """New manners, from JSON. Raises TypeError or ValueError for what are none."""
        shares = {name: float(value) for name, value in given.items() if name != "amount_off_by"}
        self.manners = Manners(amount_off_by=int(given.get("amount_off_by", 0)), **shares)

    async def give_up(self) -> None:
        """Send nothing more of what is on its way."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def close(self) -> None:
        """Give up what is on its way, and close the connections."""
        await self.give_up()
        if self._http is not None:
            await self._http.aclose()


def _is_2xx(answer: httpx.Response) -> bool:
    return answer.is_success
