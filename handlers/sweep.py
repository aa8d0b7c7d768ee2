"""Takes over operations that are due: leases that ran out after a crash, retries, and polls of pending operations.

Time alone ends nothing here. A due operation is asked about again, and the provider's answer decides.
"""

import asyncio
import random
from collections.abc import Callable, Mapping
from datetime import timedelta
from uuid import UUID

import structlog

from domain.errors import PaymentsError
from domain.operations import GatewayRequest, Operation
from domain.payment import Payment
from domain.ports import PaymentStore
from domain.requests import gateway_request
from handlers import metrics
from handlers.messages.commands import command_from_content

log = structlog.get_logger(__name__)

CLAIMED_MAX = 500


class Sweep:
    """Claims due operations every `interval_seconds`, with jitter, while there is room, here and at their gateways."""

    def __init__(
        self,
        *,
        store: PaymentStore,
        submit: Callable[[list[GatewayRequest]], None],
        room: Callable[[], int],
        lease: timedelta,
        interval_seconds: float,
        rooms: Callable[[], Mapping[str, int]],
    ) -> None:
        self._store = store
        self._submit = submit
        self._room = room
        self._rooms = rooms
        self._lease = lease
        self._interval_seconds = interval_seconds
        self._claiming = asyncio.Lock()

    async def run(self) -> None:
        """Sweep until cancelled; an unavailable Postgres is tried again at the next turn."""
        while True:
            try:
                while await self.sweep_once() >= CLAIMED_MAX:
                    pass
            except PaymentsError as error:
                log.warning("sweep postponed", error=str(error))
            await asyncio.sleep(self._interval_seconds * random.uniform(0.75, 1.25))  # noqa: S311 - spreads load

    async def sweep_once(self, payment_id: UUID | None = None) -> int:
        """Claim one portion of each gateway's, of one payment or of all, and pass it on. Returns their number."""
        async with self._claiming:
            limit = min(CLAIMED_MAX, self._room())
            if limit <= 0:
                return 0
            claimed = await self._store.claim_due(
                limit=limit, lease=self._lease, rooms=self._rooms(), payment_id=payment_id
            )
            metrics.CLAIMED.inc(len(claimed))
            self._submit([request for each in claimed if (request := _request(*each))])
            return len(claimed)

    async def close(self) -> None:
        """Claim nothing more. When this returns, everything claimed has been passed on."""
        await self._claiming.acquire()


def _request(payment: Payment, operation: Operation) -> GatewayRequest | None:
    """The request, or None if this release cannot read the operation: it stays due, and the others go on."""
    try:
        command = command_from_content(operation.content, operation.traceparent)
        return gateway_request(payment, operation, command)
    except (ValueError, AssertionError):
        log.exception("claimed operation cannot be read", key=operation.provider_key)
        return None
