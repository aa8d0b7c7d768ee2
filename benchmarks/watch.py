"""Records the largest memory of processes while they are measured."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Final

from benchmarks.machine import Machine

EVERY_SECONDS: Final = 0.1


class Memory:
    """The largest resident memory (MiB) of each watched process."""

    def __init__(self, machine: Machine) -> None:
        self.largest: dict[str, float] = {}
        self._machine = machine

    @contextlib.asynccontextmanager
    async def watch(self, *names: str) -> AsyncIterator[None]:
        """Watch these processes while the block runs."""
        looking = asyncio.create_task(self._look(names))
        yield
        looking.cancel()
        await asyncio.gather(looking, return_exceptions=True)

    async def _look(self, names: tuple[str, ...]) -> None:
        while True:
            for name in names:
                self.largest[name] = max(self.largest.get(name, 0.0), self._machine.rss_mb(name))
            await asyncio.sleep(EVERY_SECONDS)
