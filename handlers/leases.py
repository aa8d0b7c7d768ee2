"""Keeps the leases of the operations that this worker holds: a long queue or a slow provider is no crash."""

import asyncio
import time
from collections.abc import Iterable
from datetime import timedelta

import structlog

from domain.decision import Answer
from domain.errors import PaymentsError
from domain.operations import GatewayRequest
from domain.ports import HeldLease, PaymentStore

log = structlog.get_logger(__name__)

RENEWED_MAX = 500


class Leases:
    """The operations between their dispatch and their saved answer, and since when each lease runs."""

    def __init__(self, *, store: PaymentStore, lease: timedelta) -> None:
        self._store = store
        self.lease = lease
        self._held: dict[HeldLease, float] = {}

    def hold(self, requests: Iterable[GatewayRequest]) -> None:
        """These were just leased to this worker."""
        now = time.monotonic()
        for request in requests:
            self._held[HeldLease(request.payment_id, request.operation_number, request.lease_token)] = now

    def release(self, answers: Iterable[Answer]) -> None:
        """The answers are saved, or given up: nothing is held any more."""
        for answer in answers:
            self._held.pop(HeldLease(answer.payment_id, answer.operation_number, answer.lease_token), None)

    async def run(self) -> None:
        """Renew what has run for a third of its time, until cancelled."""
        while True:
            await asyncio.sleep(self.lease.total_seconds() / 6)
            try:
                await self.renew()
            except PaymentsError as error:
                log.warning("leases not renewed", held=len(self._held), error=str(error))

    async def renew(self) -> None:
        """Renew old leases. One that was taken over meanwhile stays lost: its answer is stale, unless money moved."""
        now = time.monotonic()
        oldest = now - self.lease.total_seconds() / 3
        due = [held for held, since in self._held.items() if since < oldest]
        for start in range(0, len(due), RENEWED_MAX):
            part = due[start : start + RENEWED_MAX]
            await self._store.renew(part, lease=self.lease)
            self._held.update((held, now) for held in part if held in self._held)
