"""A worker without Kafka, for a command that works at the providers once and then ends."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Final
from uuid import UUID

from redis.asyncio import Redis

from app import wiring
from app.found import Found, found_by_request, hold_past_its_end
from app.settings import Settings
from domain.decision import Answer
from domain.operations import GatewayRequest
from domain.ports import Gateway
from handlers.dispatch import GIVEN_BACK
from handlers.reconcile import Asker, in_vain
from handlers.sweep import CLAIMED_MAX
from infra.postgres.store import PostgresStore

AT_ONCE: Final = 8
CONNECTIONS: Final = 2
"""Connections to Postgres."""
DRAIN_SECONDS: Final = 25.0
"""How long calls under way may take once told to end, as in a worker."""


class OneShotWorker:
    """The parts of a worker; every answer is also passed to `note`."""

    def __init__(
        self,
        settings: Settings,
        store: PostgresStore,
        gateways: dict[str, Gateway],
        redis: Redis,
        note: Callable[[Found], None],
    ) -> None:
        self.asked: dict[tuple[UUID, int], GatewayRequest] = {}
        """The operations that were taken over, by payment and number."""
        self.unsent: set[tuple[UUID, int]] = set()
        """The operations that were given back without being sent."""
        self._note = note
        rules = wiring.create_rules(settings, gateways)
        limits = {name: min(AT_ONCE, settings.concurrency_of(name)) for name in gateways}
        self._paces = wiring.create_paces(settings, gateways)
        self.write_path = wiring.create_write_path(store, rules, redis)
        self._dispatcher, self._settler, self._leases = wiring.create_calling(
            store, self.write_path, rules, gateways, limits, paces=self._paces
        )
        self._dispatcher.on_answer, self._settler.on_refused = self._on_answer, self._on_refused
        self.submit = self._dispatcher.submit
        self.sweep = wiring.create_sweep(
            settings, store, self._dispatcher, submit=self._resubmit, room=lambda: CLAIMED_MAX
        )
        asker = Asker(gateways, self._paces)
        self.reconciler = wiring.create_reconciler(
            settings, store, self.write_path, asker, on_answer=lambda answer: note(hold_past_its_end(answer))
        )

    def _resubmit(self, requests: list[GatewayRequest]) -> None:
        self.asked.update({(each.payment_id, each.operation_number): each for each in requests})
        self._dispatcher.resubmit(requests)

    def _on_answer(self, answer: Answer) -> None:
        place = answer.payment_id, answer.operation_number
        (self.unsent.add if answer.outcome in GIVEN_BACK else self.unsent.discard)(place)
        if (request := self.asked.get(place)) is not None:
            self._note(found_by_request(request, answer.outcome))
        self._settler.add(answer)

    def _on_refused(self, answer: Answer, error: str) -> None:
        if (request := self.asked.get((answer.payment_id, answer.operation_number))) is not None:
            self._note(found_by_request(request, None, in_vain(answer.outcome, error)))

    async def wait_until_idle(self) -> None:
        """Wait until nothing is in hand. Requests that a provider's long rest holds back are given back."""
        # Each passes work to the other without a signal. A short rest is waited for: then there is room again.
        while self._dispatcher.waiting + self._settler.waiting or any(x.rests_briefly for x in self._paces.values()):
            self._dispatcher.give_back_resting()
            await asyncio.sleep(0.05)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Run the parts during the block, and shut down as a worker does."""
        loops = [asyncio.create_task(self._settler.run()), asyncio.create_task(self._leases.run())]
        try:
            yield
        finally:
            # Unsent requests are given back; answers to sent ones are waited for and saved.
            await self._dispatcher.drain(DRAIN_SECONDS, may_more_come=lambda: self._settler.waiting > 0)
            for loop in loops:
                loop.cancel()
            await asyncio.gather(*loops, return_exceptions=True)
            await self._settler.drain(DRAIN_SECONDS)


@asynccontextmanager
async def one_shot_worker(
    settings: Settings, store: PostgresStore, gateways: dict[str, Gateway], note: Callable[[Found], None]
) -> AsyncIterator[OneShotWorker]:
    """A `OneShotWorker` that runs during the block."""
    redis = wiring.connect_redis(settings)
    try:
        worker = OneShotWorker(settings, store, gateways, redis, note)
        async with worker.running():
            yield worker
    finally:
        await redis.aclose()
