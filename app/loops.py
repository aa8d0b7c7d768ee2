"""The loops of a worker: they run side by side, and end in an order that loses no answer and leaves no lease."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Final

import structlog

from app.wiring import Calling
from handlers.apply_notices import NoticeApplier
from handlers.consumer import CommandConsumer
from handlers.sweep import Sweep

log = structlog.get_logger(__name__)

LEAVES_WITHIN: Final = 5.0
"""Seconds that leaving Kafka may take; answers are saved either way."""
DRAIN_SECONDS = 25.0
"""When a worker ends, how long running gateway calls may take to end, and then saving their answers. Operations that
are left are taken over after their leases."""


class Loops:
    """What takes operations in (commands, notices, the sweep), what calls gateways, and what saves the answers."""

    def __init__(self, calling: Calling, *, sweep: Sweep, applier: NoticeApplier, consumer: CommandConsumer) -> None:
        self._calling = calling
        self._intakes = (sweep, applier, consumer)
        self._saving: list[asyncio.Task[None]] = []
        self._others: list[asyncio.Task[None]] = []

    @property
    def tasks(self) -> list[asyncio.Task[None]]:
        """All that run; none of them returns by itself."""
        return [*self._saving, *self._others]

    @property
    def waiting(self) -> int:
        """Operations that are not called yet, or whose answers are not saved yet."""
        return self._calling.waiting

    def begin(self, *others: Coroutine[Any, Any, None]) -> None:
        """Run the loops that save answers and keep leases, and these others beside them."""
        self._saving = [asyncio.create_task(each) for each in (self._calling.settler.run(), self._calling.leases.run())]
        self._others = [asyncio.create_task(each) for each in others]

    def add(self, other: Coroutine[Any, Any, None]) -> None:
        """Run another loop."""
        self._others.append(asyncio.create_task(other))

    async def end(self, leave_kafka: Callable[[], Awaitable[object]]) -> None:
        """Take nothing new, commit offsets and leave Kafka; then let running calls end, and save their answers."""
        dispatcher, settler, _ = self._calling
        # All that they claimed or saved is then with the dispatcher, which sends it or gives it back: no lease is left.
        await _within(LEAVES_WITHIN, asyncio.gather(*(each.close() for each in self._intakes)))
        for task in self._others:
            task.cancel()
        await _within(LEAVES_WITHIN, leave_kafka())
        await dispatcher.drain(DRAIN_SECONDS, may_more_come=lambda: settler.waiting > 0)
        saving = asyncio.create_task(self._save_what_is_left())
        try:
            async with asyncio.timeout(DRAIN_SECONDS):
                await asyncio.shield(saving)  # A server that does not answer would hold up its cancellation, too.
        except TimeoutError:
            # As with a call that has not ended, nothing can be done about it: it is not an error of the shutdown.
            log.warning("answers left unsaved; their leases run out", answers=settler.waiting)
            saving.cancel()

    async def _save_what_is_left(self) -> None:
        for task in self._saving:
            task.cancel()
        # An interrupted save gives its answers back; only then can they be drained.
        await asyncio.gather(*self._saving, return_exceptions=True)
        await self._calling.settler.drain(DRAIN_SECONDS)


async def _within(seconds: float, work: Awaitable[object]) -> None:
    """Wait for `work` at most this long, and then go on stopping."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await work
