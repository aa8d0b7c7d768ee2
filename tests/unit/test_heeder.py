"""The loop over the inbox, without an inbox."""

import asyncio
from unittest.mock import create_autospec

import pytest

from domain.ports import Inbox
from handlers.heed import Heeder
from handlers.write_path import WritePath


@pytest.mark.parametrize("turns", range(4))
async def test_it_ends_when_it_is_cancelled_though_a_webhook_arrives_in_that_moment(turns: int) -> None:
    inbox = create_autospec(Inbox, instance=True)
    inbox.claim.return_value = []
    heeder = Heeder(inbox=inbox, write_path=create_autospec(WritePath, instance=True), submit=lambda requests: None)
    running = asyncio.create_task(heeder.run())
    await asyncio.sleep(0.01)
    heeder.arrived.set()
    for _ in range(turns):
        await asyncio.sleep(0)
    running.cancel()
    await asyncio.wait({running}, timeout=0.5)
    assert running.cancelled()
