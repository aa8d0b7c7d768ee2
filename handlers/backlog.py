"""Bounds the work that this worker has accepted: above the bound its partitions pause, and Kafka keeps the rest."""

import asyncio
from collections.abc import Callable
from typing import Any

from handlers import metrics

CHECK_SECONDS = 0.02


class Backlog:
    """Counts unfinished operations. The consumer pauses at `capacity`, and resumes at half of it."""

    def __init__(self, *, capacity: int, waiting: Callable[[], int]) -> None:
        self._capacity = capacity
        self._waiting = waiting
        self._paused: Any = None

    @property
    def room(self) -> int:
        """How many more operations fit."""
        return max(0, self._capacity - self._waiting())

    def pause_if_full(self, consumer: Any) -> None:
        """Stop fetching from all assigned partitions while there is no room; heartbeats go on."""
        if self._paused is None and self.room == 0:
            consumer.pause(*consumer.assignment())
            self._paused = consumer
            metrics.PAUSED.set(1)

    def forget_pause(self) -> None:
        """Resume after a rebalance; the next batch pauses again if there is still no room."""
        self._resume()

    async def run(self) -> None:
        """Resume the consumer when half of the backlog is done; runs until cancelled."""
        while True:
            await asyncio.sleep(CHECK_SECONDS)
            metrics.BACKLOG.set(self._waiting())
            if self._paused is not None and self._waiting() <= self._capacity // 2:
                self._resume()

    def _resume(self) -> None:
        if self._paused is not None:
            self._paused.resume(*self._paused.assignment())
            self._paused = None
            metrics.PAUSED.set(0)
