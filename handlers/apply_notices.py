"""Applies the webhooks of the inbox through the write path, as soon as they are stored; several workers share them.

A webhook that cannot be applied stays in the inbox and comes back after its lease: none is ever lost, and none counts
twice.
"""

import asyncio
from collections.abc import Callable
from datetime import timedelta
from typing import Final

import structlog

from domain.decision import Notified
from domain.errors import PaymentsError
from domain.operations import GatewayRequest
from domain.ports import Inbox, StoredNotice
from handlers.messages.notices import read_notice
from handlers.write_path import SavedInPart, WritePath

log = structlog.get_logger(__name__)

CLAIMED_MAX: Final = 200
LEASE: Final = timedelta(seconds=30)
INTERVAL_SECONDS: Final = 1.0
"""How often it looks into the inbox without having been notified."""


class NoticeApplier:
    """Takes notices from the inbox. The listener for new notices sets `arrived`."""

    def __init__(self, *, inbox: Inbox, write_path: WritePath, submit: Callable[[list[GatewayRequest]], None]) -> None:
        self.arrived = asyncio.Event()
        self._inbox = inbox
        self._write_path = write_path
        self._submit = submit
        self._applying = asyncio.Lock()

    async def run(self) -> None:
        """Apply notices until cancelled; while Postgres is unavailable, retry at each turn."""
        while True:
            self.arrived.clear()
            try:
                while await self.apply_once():
                    pass
            except PaymentsError as error:
                log.warning("webhooks postponed", error=str(error))
            try:
                async with asyncio.timeout(INTERVAL_SECONDS):
                    await self.arrived.wait()
            except TimeoutError:
                continue

    async def apply_once(self) -> int:
        """Claim one portion and apply it. Returns how many notices there were."""
        async with self._applying:
            return await self._apply()

    async def close(self) -> None:
        """Apply nothing more. When this returns, the requests of applied notices have been passed on."""
        await self._applying.acquire()

    async def _apply(self) -> int:
        claimed = await self._inbox.claim(limit=CLAIMED_MAX, lease=LEASE)
        notices = [each for stored in claimed if (each := _notified(stored)) is not None]
        try:
            applied = await self._write_path.apply(notices)
        except SavedInPart as error:
            self._submit(error.requests)
            raise
        self._submit(applied.requests)
        for refused in applied.refused:
            assert isinstance(refused.given, Notified), "nothing else was given"
            notice = refused.given.notice
            log.error(
                "webhook not applied; it will be tried again",
                payment=str(refused.given.payment_id),
                gateway=notice.gateway,
                event_id=notice.event_id,
                type=notice.type,
                error=repr(refused.error),
                exc_info=refused.defect,
            )
        return len(claimed)


def _notified(stored: StoredNotice) -> Notified | None:
    """The input, or None if this release cannot read the notice: it stays in the inbox, and the others go on."""
    try:
        notice = read_notice(
            stored.content,
            gateway=stored.gateway,
            event_id=stored.event_id,
            type_=stored.type,
            operation_number=stored.operation_number,
        )
    except (ValueError, KeyError, TypeError):
        log.exception("webhook in the inbox cannot be read", notice_id=stored.notice_id)
        return None
    return Notified(stored.notice_id, stored.payment_id, notice)
