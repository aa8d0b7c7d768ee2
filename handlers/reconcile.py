"""Asks providers about holds that should have ended, which no operation of ours waits for.

Everything else that is stuck (a lease that ran out, doubt, what is pending or waits for the payer) is an open operation
and the sweep's to ask about. Time alone changes nothing here either: the provider's word is applied, or nothing is.
"""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Mapping
from datetime import timedelta
from typing import Final

import structlog

from domain.decision import Notified
from domain.errors import GatewayError, PaymentsError
from domain.notices import Notice
from domain.operations import Operation, Outcome
from domain.payment import Payment
from domain.ports import Gateway, PaymentStore, Place
from domain.requests import gateway_request
from handlers import metrics
from handlers.messages.commands import command_from_content
from handlers.write_path import WritePath

log = structlog.get_logger(__name__)

PAGE: Final = 200
WATCH_SECONDS: Final = 15.0
AT_ONCE: Final = 8
"""Questions at a time: this is the least urgent of all that is asked of a provider."""


class Reconciler:
    """Looks through lapsed holds every `interval`, with jitter. Several workers may; they ask twice, at worst."""

    def __init__(
        self, *, store: PaymentStore, gateways: Mapping[str, Gateway], write_path: WritePath, interval: timedelta
    ) -> None:
        self._store = store
        self._gateways = gateways
        self._write_path = write_path
        self._interval = interval

    async def run(self) -> None:
        """Look until cancelled; an unavailable Postgres is tried again at the next turn."""
        while True:
            await asyncio.sleep(self._interval.total_seconds() * random.uniform(0.75, 1.25))  # noqa: S311 - spreads
            try:
                await self.reconcile_holds()
            except PaymentsError as error:
                log.warning("reconciliation postponed", error=str(error))

    async def watch(self) -> None:
        """Keep the metrics of what is in doubt, until cancelled."""
        while True:
            with contextlib.suppress(PaymentsError):
                count, seconds = await self._store.in_doubt()
                metrics.IN_DOUBT.set(count)
                metrics.OLDEST_DOUBT.set(seconds)
            await asyncio.sleep(WATCH_SECONDS)

    async def reconcile_holds(self) -> int:
        """Ask about every hold past its end; how many there were."""
        found = 0
        async for page in self._pages():
            limit = asyncio.Semaphore(AT_ONCE)
            answers = await asyncio.gather(*(self._ask(*each, limit) for each in page))
            await self._write_path.apply([each for each in answers if each is not None])
            found += len(page)
        return found

    async def _pages(self) -> AsyncIterator[list[tuple[Payment, Operation]]]:
        after: Place | None = None
        while page := await self._store.find_lapsed_holds(after=after, limit=PAGE):
            yield page
            payment = page[-1][0]
            assert payment.authorization_expires_at is not None, "it was found by this"
            after = payment.authorization_expires_at, payment.payment_id

    async def _ask(self, payment: Payment, operation: Operation, limit: asyncio.Semaphore) -> Notified | None:
        gateway = self._gateways.get(operation.gateway or "")
        if gateway is None:
            return None
        async with limit:
            outcome = await _word_of(gateway, payment, operation)
        metrics.RECONCILED.labels(gateway.name, type(outcome).__name__ if outcome else "no_answer").inc()
        if outcome is None:
            return None
        notice = Notice(gateway.name, "", "status", payment.payment_id, operation.number, outcome=outcome)
        return Notified(None, payment.payment_id, notice, operation)


async def _word_of(gateway: Gateway, payment: Payment, operation: Operation) -> Outcome | None:
    """What the provider says of the authorization; None where it cannot be asked now."""
    request = gateway_request(payment, operation, command_from_content(operation.content, operation.traceparent))
    try:
        return await gateway.status(request)
    except GatewayError as error:
        log.info("hold not asked about", payment=str(payment.payment_id), error=str(error))
        return None
