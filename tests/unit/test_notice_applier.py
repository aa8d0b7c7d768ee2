"""The loop that applies notices from the inbox, with a fake inbox."""

import asyncio
from unittest.mock import create_autospec, sentinel

import pytest

from domain.ports import Inbox
from handlers.apply_notices import NoticeApplier
from handlers.write_path import Applied, WritePath


@pytest.mark.parametrize("turns", range(4))
async def test_it_ends_when_it_is_cancelled_though_a_webhook_arrives_in_that_moment(turns: int) -> None:
    inbox = create_autospec(Inbox, instance=True)
    inbox.claim.return_value = []
    applier = NoticeApplier(
        inbox=inbox, write_path=create_autospec(WritePath, instance=True), submit=lambda requests: None
    )
    running = asyncio.create_task(applier.run())
    await asyncio.sleep(0.01)
    applier.arrived.set()
    for _ in range(turns):
        await asyncio.sleep(0)
    running.cancel()
    await asyncio.wait({running}, timeout=0.5)
    assert running.cancelled()


async def test_closing_a_notice_applier_waits_until_its_requests_are_submitted() -> None:
    inbox, write_path = create_autospec(Inbox, instance=True), create_autospec(WritePath, instance=True)
    inbox.claim.return_value = []

    async def apply(notices: list[object]) -> Applied:
        await asyncio.sleep(0.05)
        return Applied(requests=[sentinel.request])

    write_path.apply.side_effect = apply
    passed_on: list[object] = []
    applier = NoticeApplier(inbox=inbox, write_path=write_path, submit=passed_on.extend)
    running = asyncio.create_task(applier.run())
    await asyncio.sleep(0.01)
    await applier.close()
    running.cancel()
    assert passed_on == [sentinel.request]
