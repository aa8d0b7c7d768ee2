"""Looks at processes while they are measured: their largest memory, and how fast a worker calls its gateway."""

import asyncio
import contextlib
import re
import time
from collections.abc import AsyncIterator
from typing import Final

import httpx

from benchmarks.machine import Machine

EVERY_SECONDS: Final = 0.1
SERIES: Final = re.compile(
    r'^(payments_gateway_in_flight|payments_gateway_calls_total)\{gateway="instant".*\} (\S+)$', re.M
)


class Memory:
    """The largest resident memory of each process that was looked at."""

    def __init__(self, machine: Machine) -> None:
        self.largest: dict[str, float] = {}
        self._machine = machine

    @contextlib.asynccontextmanager
    async def watch(self, *names: str) -> AsyncIterator[None]:
        """Look at these while the block runs."""
        looking = asyncio.create_task(self._look(names))
        yield
        looking.cancel()
        await asyncio.gather(looking, return_exceptions=True)

    async def _look(self, names: tuple[str, ...]) -> None:
        while True:
            for name in names:
                self.largest[name] = max(self.largest.get(name, 0.0), self._machine.rss_mb(name))
            await asyncio.sleep(EVERY_SECONDS)


class Calls:
    """Calls of the instant gateway by a worker, from its own metrics: begun is what has ended and what is under way."""

    def __init__(self, metrics_url: str) -> None:
        self.at_once = 0
        self._url = metrics_url
        self._begun: list[tuple[float, float]] = []

    @contextlib.asynccontextmanager
    async def watch(self) -> AsyncIterator[None]:
        """Look while the block runs."""
        looking = asyncio.create_task(self._look())
        yield
        looking.cancel()
        await asyncio.gather(looking, return_exceptions=True)

    @property
    def most_in_a_second(self) -> int:
        """The greatest number begun in any second, or per second in what was seen that is as long."""
        rates, first = [0.0], 0
        for moment, begun in self._begun:
            while self._begun[first + 1][0] <= moment - 1 if first + 1 < len(self._begun) else False:
                first += 1
            before, had = self._begun[first]
            if moment - before >= 1:
                rates.append((begun - had) / (moment - before))
        return round(max(rates))

    async def _look(self) -> None:
        async with httpx.AsyncClient(trust_env=False) as client:
            while True:
                text = (await client.get(self._url)).text
                seen = [(name, float(value)) for name, value in SERIES.findall(text)]
                under_way = sum(value for name, value in seen if name.endswith("in_flight"))
                self.at_once = max(self.at_once, int(under_way))
                self._begun.append((time.perf_counter(), sum(value for _, value in seen)))
                await asyncio.sleep(EVERY_SECONDS)
