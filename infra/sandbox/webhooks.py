"""Send the simulators' webhooks: signed at each attempt, retried, and on request delayed, doubled, reordered or lost.

`Manners` set these faults. With a journal, a simulator sends after its restart what was not yet delivered, so a webhook
that is missing then was lost by the service, not by the simulator.
"""

import asyncio
import contextlib
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import count
from typing import Any, NamedTuple

import httpx

from infra.sandbox.journal import Journal

ATTEMPTS_MAX = 8
FIRST_DELAY_SECONDS = 0.2
CONNECTIONS = 8
TIMEOUT_SECONDS = 10.0
HEAD_START_SECONDS = 0.3


class Outgoing(NamedTuple):
    """One webhook; `sign` turns it into the request that is sent."""

    url: str
    body: bytes = b""
    headers: Mapping[str, str] = {}
    method: str = "POST"


@dataclass(slots=True)
class Manners:
    """How webhooks are sent. Each share is a probability per webhook; `delay_seconds` precede the first attempt."""

    delay_seconds: float = 0.0
    lost: float = 0.0
    doubled: float = 0.0
    reordered: float = 0.0
    """Held back until the next webhook is sent, or for a second."""
    amount_off_by: int = 0
    """Added to the amounts in webhooks, in minor units: a provider's mistake, or a message about something else."""


def _is_2xx(answer: httpx.Response) -> bool:
    return answer.is_success


def _unchanged(outgoing: Outgoing) -> Outgoing:
    return outgoing


@dataclass(slots=True)
class WebhookSender:
    """Delivers webhooks in the background. `sent` and `accepted` are counters for the simulator's page.

    Each attempt sends what `sign` returns; `is_accepted` says whether the receiver's answer ends the retries.
    """

    sign: Callable[[Outgoing], Outgoing] = _unchanged
    is_accepted: Callable[[httpx.Response], bool] = _is_2xx
    journal: Journal = field(default_factory=lambda: Journal(None))
    manners: Manners = field(default_factory=Manners)
    sent: int = 0
    accepted: int = 0
    _numbers: Iterator[int] = field(default_factory=lambda: count(1))
    _http: httpx.AsyncClient | None = None
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)
    _next: asyncio.Event = field(default_factory=asyncio.Event)
    _free: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(CONNECTIONS))
    """Requests wait here for a connection: httpcore walks through all waiting requests whenever one is free."""

    def load(self) -> None:
        """Send the webhooks that an earlier run did not deliver."""
        left: dict[int, Outgoing] = {}
        for line in self.journal.read():
            if "outgoing" in line:
                left[line["number"]] = _outgoing_of(line["outgoing"])
            else:
                del left[line["number"]]
        self._numbers = count(max(left, default=0) + 1)
        self.journal.rewrite(_line_of(number, outgoing) for number, outgoing in left.items())
        for number, outgoing in left.items():
            self._begin(number, outgoing)

    def send(self, outgoing: Outgoing) -> None:
        """Deliver a webhook in the background, as the manners say."""
        if random.random() < self.manners.lost:  # noqa: S311 - an injected fault, not a secret
            return
        times = 2 if random.random() < self.manners.doubled else 1  # noqa: S311 - as above
        for _ in range(times):
            number = next(self._numbers)
            self.journal.append(_line_of(number, outgoing))
            self._begin(number, outgoing)

    def _begin(self, number: int, outgoing: Outgoing) -> None:
        task = asyncio.create_task(self._deliver(number, outgoing))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _deliver(self, number: int, outgoing: Outgoing) -> None:
        await asyncio.sleep(self.manners.delay_seconds)
        if random.random() < self.manners.reordered:  # noqa: S311 - as above
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1.0):
                    await self._next.wait()
        for attempt in range(ATTEMPTS_MAX):
            if await self._attempt(self.sign(outgoing)):
                break
            await asyncio.sleep(FIRST_DELAY_SECONDS * 2**attempt)
        self.journal.append({"number": number})

    async def _attempt(self, outgoing: Outgoing) -> bool:
        if self._http is None:
            # Few connections: httpcore checks all of them at every request.
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
        self.accepted += self.is_accepted(answer)
        return self.is_accepted(answer)

    @property
    def under_way(self) -> int:
        """How many webhooks are not delivered yet."""
        return len(self._tasks)

    async def until_heard(self, accepted_before: int, seconds: float) -> None:
        """Wait until more than `accepted_before` were accepted and could be acted on, but for at most `seconds`."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self.accepted <= accepted_before:
                    await self._next.wait()
                await asyncio.sleep(HEAD_START_SECONDS)

    def behave(self, given: Mapping[str, Any]) -> None:
        """Set the manners, from JSON. Raises TypeError or ValueError if they are not valid."""
        shares = {name: float(value) for name, value in given.items() if name != "amount_off_by"}
        self.manners = Manners(amount_off_by=int(given.get("amount_off_by", 0)), **shares)

    async def give_up(self) -> None:
        """Drop all webhooks that are not delivered yet."""
        await self._stop()
        self.journal.rewrite(iter(()))

    async def close(self) -> None:
        """Leave undelivered webhooks to the next start, and close the connections and the journal."""
        await self._stop()
        self.journal.close()
        if self._http is not None:
            await self._http.aclose()

    async def _stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


def _line_of(number: int, outgoing: Outgoing) -> dict[str, Any]:
    fields = outgoing._asdict() | {"body": outgoing.body.decode(), "headers": dict(outgoing.headers)}
    return {"number": number, "outgoing": fields}


def _outgoing_of(given: dict[str, Any]) -> Outgoing:
    return Outgoing(**{**given, "body": given["body"].encode()})
