"""What a worker says of itself before it works; how it works is in integration/test_consumer.py."""

import asyncio
from contextlib import AsyncExitStack
from unittest.mock import AsyncMock, create_autospec

import pytest

from app.health import troubles
from app.loops import Loops
from app.settings import Settings
from app.worker import Worker


async def test_a_worker_that_has_not_started_says_so_of_each_of_its_parts() -> None:
    checks = Worker(Settings()).checks()
    assert await troubles(checks) == dict.fromkeys(checks, "starting")


async def test_a_worker_whose_start_fails_waits_for_what_its_loops_have_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has begun to sweep before it reads: its calls would be cut off at every start."""

    loops = create_autospec(Loops, instance=True)

    async def fail(worker: Worker, _: AsyncExitStack) -> None:
        worker._loops, worker._broker = loops, AsyncMock()
        raise ConnectionError("no coordinator")

    monkeypatch.setattr(Worker, "_start", fail)
    with pytest.raises(ConnectionError):
        await Worker(Settings()).run(asyncio.Event())
    loops.end.assert_awaited_once()
