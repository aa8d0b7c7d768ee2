"""Waits for a condition instead of a fixed time."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any


async def until(condition: Callable[[], Awaitable[Any]] | Callable[[], Any], *, timeout_seconds: float = 60) -> Any:
    """Wait until the condition returns something true, and return that."""
    async with asyncio.timeout(timeout_seconds):
        while True:
            result = condition()
            if isinstance(result, Awaitable):
                result = await result
            if result:
                return result
            await asyncio.sleep(0.01)


def wait_until(condition: Callable[[], bool], timeout_seconds: float = 60) -> None:
    """The same for code without an event loop."""
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not become true in time"
        time.sleep(0.05)
