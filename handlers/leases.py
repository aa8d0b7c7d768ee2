"""Renews the leases of the operations that this worker holds, so a long queue or slow provider is not a crash."""

import asyncio
import time
from collections.abc import Iterable
from datetime import timedelta
from typing import Final

import structlog

from domain.decision import Answer
from domain.errors import PaymentsError
from domain.operations import GatewayRequest
from domain.ports import HeldLease, PaymentStore

log = structlog.get_logger(__name__)

RENEWED_MAX = 500
_RUNNING: Final = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
"""A clock that keeps running while the machine sleeps, as in infra/postgres/clock.py."""


class Leases:
    """The operations between their dispatch and their saved answer, and since when each lease runs."""

    def __init__(self, *, store: PaymentStore, lease: timedelta) -> None:
        self._store = store
        self.lease = lease
        self._held: dict[HeldLease, float] = {}

    def hold(self, requests: Iterable[GatewayRequest]) -> None:
        """Note operations just leased to this worker; in Postgres that was up to one slow statement earlier."""
        now = _seconds()
        for request in requests:
            self._held[_lease_of(request)] = now

    def is_held(self, request: GatewayRequest) -> bool:
        """Whether the lease still runs. After that, others may have taken the operation over and ended it."""
        since = self._held.get(_lease_of(request))
        return since is not None and _seconds() - since < self.lease.total_seconds()

    def release(self, answers: Iterable[Answer]) -> None:
        """Stop holding the operations of these answers, which are saved or given up."""
        for answer in answers:
            self._held.pop(HeldLease(answer.payment_id, answer.operation_number, answer.lease_token), None)

    async def run(self) -> None:
        """Renew leases that have run for a third of their time, until cancelled."""
        while True:
            await asyncio.sleep(self.lease.total_seconds() / 6)
            try:
                await self.renew()
            except PaymentsError as error:
                log.warning("leases not renewed", held=len(self._held), error=str(error))

    async def renew(self) -> None:
        """Renew old leases. A lease that was taken over stays lost: its answer is stale, unless money moved."""
        now = _seconds()
        oldest = now - self.lease.total_seconds() / 3
        due = {held: since for held, since in self._held.items() if since < oldest}
        for start in range(0, len(due), RENEWED_MAX):
            part = list(due)[start : start + RENEWED_MAX]
            renewed = set(await self._store.renew(part, lease=self.lease))
            for held in part:
                if self._held.get(held) != due[held]:
                    continue  # Released meanwhile.
                if held in renewed:
                    self._held[held] = now
                else:
                    del self._held[held]


def _lease_of(request: GatewayRequest) -> HeldLease:
    return HeldLease(request.payment_id, request.operation_number, request.lease_token)


def _seconds() -> float:
    return time.clock_gettime(_RUNNING)
