"""Gathers gateway answers for a moment and saves them together; while Postgres is away they wait in memory.

Losing that memory loses no money: each operation's lease runs out, and the sweep sends it again with the same key, or
asks about it if the provider has no keys. An answer that money moved is saved even if a sweep has taken over meanwhile.
"""

import asyncio
from collections.abc import Callable

import structlog

from domain.decision import Answer, Input
from domain.errors import StoreUnavailable
from domain.operations import GatewayRequest, describe
from handlers import metrics
from handlers.leases import Leases
from handlers.retry import until_store_answers
from handlers.write_path import Applied, SavedInPart, WritePath

log = structlog.get_logger(__name__)

BATCH_MAX = 500
GATHER_SECONDS = 0.002


class Settler:
    """Saves answers through the write path, in order of arrival, and submits the requests that result from them."""

    def __init__(
        self, *, write_path: WritePath, submit: Callable[[list[GatewayRequest]], None], leases: Leases
    ) -> None:
        self._write_path = write_path
        self._submit = submit
        self._leases = leases
        self.on_refused: Callable[[Answer, str], None] = lambda answer, error: None
        """Called with each answer that cannot be saved, and why. Its operation stays open."""
        self._pending: list[Answer] = []
        self._arrived = asyncio.Event()
        self._saving = 0

    @property
    def waiting(self) -> int:
        """Answers not yet saved."""
        return len(self._pending) + self._saving

    def add(self, answer: Answer) -> None:
        """Queue an answer. Does not block."""
        self._pending.append(answer)
        self._arrived.set()

    async def run(self) -> None:
        """Save answers until cancelled."""
        while True:
            await self._arrived.wait()
            if len(self._pending) < BATCH_MAX:
                await asyncio.sleep(GATHER_SECONDS)
            await self.settle_some()

    async def drain(self, timeout_seconds: float) -> None:
        """Save everything that has arrived, after `run` has ended.

        Raises:
            TimeoutError: Postgres stayed away; the operations are taken over once their leases run out.
        """
        async with asyncio.timeout(timeout_seconds):
            while self._pending:
                await self.settle_some()

    async def settle_some(self) -> None:
        """Save at most one batch of what has arrived."""
        batch, self._pending = self._pending[:BATCH_MAX], self._pending[BATCH_MAX:]
        if not self._pending:
            self._arrived.clear()
        self._saving = len(batch)
        try:
            applied = await until_store_answers(self._try, batch)
        except asyncio.CancelledError:
            self._pending = batch + self._pending
            raise
        finally:
            self._saving = 0
        self._leases.release(batch)
        self._submit(applied.requests)
        for refused in applied.refused:
            self._report(refused.given, str(refused.error), refused.defect)
        for given in applied.not_tried:
            self._report(given, "an earlier answer of its payment could not be saved")

    async def _try(self, batch: list[Answer]) -> Applied:
        try:
            with metrics.BATCH_SECONDS.labels("answer").time():
                return await self._write_path.apply(batch)
        except StoreUnavailable as error:
            metrics.POSTPONED.labels("answer", "postgres").inc()
            payments = {str(each.payment_id) for each in batch}
            log.warning("answers postponed", answers=len(batch), payments=sorted(payments)[:3], error=str(error))
            if isinstance(error, SavedInPart):
                self._submit(error.requests)
            raise

    def _report(self, given: Input, error: str, defect: Exception | None = None) -> None:
        """Report an unsaved answer. Its operation stays open: after the lease the provider is asked again."""
        metrics.REFUSED_ANSWERS.inc()
        assert isinstance(given, Answer), "nothing else was given"
        log.error(
            "gateway answer not saved; the sweep will ask again",
            payment=str(given.payment_id),
            operation=given.operation_number,
            answer=describe(given.outcome),
            error=error,
            exc_info=defect,
        )
        self.on_refused(given, error)
