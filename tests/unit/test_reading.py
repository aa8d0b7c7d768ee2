"""Reading a batch of commands does not block the event loop, which also sends Kafka's heartbeats."""

import asyncio
from types import SimpleNamespace

import pytest

from handlers.consumer import _read


async def test_others_have_their_turn_while_a_batch_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("handlers.consumer.READS_ON_SECONDS", -1.0)
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    task = asyncio.create_task(other())
    records = [
        SimpleNamespace(value=b"?", key=None, headers=(), topic="t", partition=0, offset=place) for place in range(10)
    ]
    deliveries, letters = await _read(records)
    task.cancel()
    assert (len(deliveries), len(letters)) == (0, 10)
    assert turns >= 9
