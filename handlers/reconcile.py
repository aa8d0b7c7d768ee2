"""Asks providers about holds that should have ended, which no open operation waits for.

Workers share the holds: each claim postpones a hold's next question, longer every time, so that a hold that the
provider still keeps is asked about rarely, but always within the cut-off. Everything else that can be stuck (an expired
lease, doubt, an operation that is pending or waits for the payer) is an open operation, which the sweep asks about.
Time alone changes nothing here either: only the provider's answer is applied.
"""

import asyncio
import random
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from datetime import timedelta
from typing import Final, NamedTuple
from uuid import UUID

import structlog

from domain.decision import Notified
from domain.errors import GatewayError, PaymentsError
from domain.notices import Notice
from domain.operations import IN_DOUBT, Operation, Outcome, describe
from domain.payment import Payment
from domain.ports import Gateway, LapsedHold, PaymentStore, Place
from domain.requests import gateway_request
from handlers import metrics
from handlers.dispatch import is_cancelled
from handlers.messages.commands import command_from_content
from handlers.pace import Pace
from handlers.write_path import WritePath

log = structlog.get_logger(__name__)

PAGE: Final = 200
LATEST: Final = 1.25
"""Longest time between two rounds, as a multiple of the interval: the jitter is a quarter."""
WATCH_SECONDS: Final = 15.0
AT_ONCE: Final = 8
"""Concurrent questions to each gateway: these are the least urgent requests that a provider receives."""
UNKNOWN_HERE: Final = "this gateway is not configured here"
RESTS: Final = "not asked: its provider wants to rest"
SILENT: Final = "not asked: its provider leaves questions unanswered"
SILENT_AFTER: Final = AT_ONCE
"""After this many questions in a row without an answer, a gateway is not asked again in a round: all concurrent ones
may have waited for their whole timeout, and no more should."""


class HoldAnswer(NamedTuple):
    """A hold past its end with its provider's answer, or None and the reason why there is no usable answer.

    (A dry run uses this for open operations, too.)
    """

    payment: Payment
    operation: Operation
    outcome: Outcome | None
    why_not: str = ""


class Asker:
    """Asks the providers what became of operations, mostly holds: a few at a time, each gateway at its pace.

    A gateway that rests for long, or gives no answers, is neither asked again nor waited for: pages are claimed one
    after another, and contain its holds together with those of others.
    """

    def __init__(self, gateways: Mapping[str, Gateway], paces: Mapping[str, Pace]) -> None:
        self._gateways = gateways
        self._paces = paces
        self._limits = {name: asyncio.Semaphore(AT_ONCE) for name in gateways}
        self._unanswered: Counter[str] = Counter()

    def begin_round(self) -> None:
        """Ask gateways again that gave no answers in the last round."""
        self._unanswered.clear()

    async def ask_all(self, holds: Iterable[LapsedHold]) -> list[HoldAnswer]:
        """The answer about each hold."""
        return list(await asyncio.gather(*(self.ask(each.payment, each.operation) for each in holds)))

    async def ask(self, payment: Payment, operation: Operation) -> HoldAnswer:
        """The provider's answer about one operation. Never raises because of a failed question."""
        gateway = self._gateways.get(operation.gateway or "")
        if gateway is None:
            return HoldAnswer(payment, operation, None, UNKNOWN_HERE)
        async with self._limits[gateway.name]:
            if self._unanswered[gateway.name] >= SILENT_AFTER:
                return HoldAnswer(payment, operation, None, SILENT)
            if not await self._paces[gateway.name].turn():
                return HoldAnswer(payment, operation, None, RESTS)
            answer = await _word_of(gateway, payment, operation)
            self._note(gateway.name, answer.outcome)
        word = type(answer.outcome).__name__ if answer.outcome else "no_answer"
        metrics.checked(gateway.name, "hold", word).inc()
        return answer

    def _note(self, name: str, outcome: Outcome | None) -> None:
        if outcome is not None:
            self._unanswered[name] = 0
        elif not self._paces[name].rests:  # a refusal with a time to wait is an answer; the pace respects it
            self._unanswered[name] += 1


async def ask_about_holds(
    store: PaymentStore, asker: Asker, payment_id: UUID | None = None
) -> AsyncIterator[list[HoldAnswer]]:
    """The answers about every hold past its end, of one payment or of all, page by page. Changes nothing."""
    after: Place | None = None
    while page := await store.find_lapsed_holds(payment_id, after=after, limit=PAGE):
        yield await asker.ask_all(page)
        after = page[-1].due_at, page[-1].payment.payment_id


class Reconciler:
    """Looks for lapsed holds every `interval`, with jitter; asks about each again within `cut_off`."""

    def __init__(
        self,
        *,
        store: PaymentStore,
        asker: Asker,
        write_path: WritePath,
        interval: timedelta,
        cut_off: timedelta,
        on_answer: Callable[[HoldAnswer], None] = lambda answer: None,
    ) -> None:
        self._store = store
        self._asker = asker
        self._write_path = write_path
        self._interval = interval
        # A hold that becomes due right after a round is found by the next one.
        self._delay_max = max(interval, cut_off - interval * LATEST)
        self._on_answer = on_answer

    async def run(self) -> None:
        """Ask until cancelled; while Postgres is unavailable, retry at each turn."""
        while True:
            await asyncio.sleep(self._interval.total_seconds() * random.uniform(0.75, 1.25))  # noqa: S311 - spreads
            try:
                await self.reconcile_holds()
            except PaymentsError as error:
                log.warning("reconciliation postponed", error=str(error))

    async def watch(self) -> None:
        """Update the metrics of operations in doubt and stuck ones, until cancelled."""
        while True:
            try:
                doubted = await self._store.in_doubt()
                for state in IN_DOUBT:
                    count, seconds = doubted.get(state, (0, 0.0))
                    metrics.IN_DOUBT.labels(state).set(count)
                    metrics.OLDEST_DOUBT.labels(state).set(seconds)
                for subject, stuck in (await self._store.stuck()).items():
                    metrics.STUCK.labels(subject).set(stuck.number)
                    metrics.STUCK_OLDEST.labels(subject).set(stuck.oldest_seconds)
                    metrics.STUCK_OVERDUE.labels(subject).set(stuck.overdue_seconds)
            except PaymentsError as error:
                log.warning(
                    "what is stuck or in doubt was not counted; the metrics keep their last values", error=str(error)
                )
            await asyncio.sleep(WATCH_SECONDS)

    async def reconcile_holds(self, payment_id: UUID | None = None) -> int:
        """Ask about due holds, of one payment or of all, and apply the answers. Returns how many holds there were."""
        found = 0
        self._asker.begin_round()
        while holds := await self._claim(payment_id):
            ends = await asyncio.gather(*map(self._reconcile, _by_gateway(holds)), return_exceptions=True)
            for failure in filter(None, ends):
                raise failure
            found += len(holds)
        return found

    async def _reconcile(self, holds: Iterable[LapsedHold]) -> None:
        """Ask about holds of one gateway; answers of other gateways are applied without waiting for it."""
        answers = await self._asker.ask_all(holds)
        words = [_notified(each) for each in answers]
        applied = await self._write_path.apply([word for word in words if word is not None])
        not_saved = {id(each.given): str(each.error) for each in applied.refused}
        not_saved |= dict.fromkeys(map(id, applied.not_tried), "an earlier answer of its payment could not be saved")
        for answer, word in zip(answers, words, strict=True):
            error = not_saved.get(id(word))
            self._on_answer(answer if error is None else _report(answer, error))

    async def reconcile_holds_now(self, payment_id: UUID | None = None) -> int:
        """Like `reconcile_holds`, for every hold past its end, however recently it was asked about."""
        await self._store.make_holds_due(payment_id)
        return await self.reconcile_holds(payment_id)

    async def _claim(self, payment_id: UUID | None) -> list[LapsedHold]:
        return await self._store.claim_holds(
            payment_id, limit=PAGE, first_delay=self._interval, delay_max=self._delay_max
        )


def _by_gateway(holds: Iterable[LapsedHold]) -> Iterable[list[LapsedHold]]:
    found: dict[str | None, list[LapsedHold]] = defaultdict(list)
    for each in holds:
        found[each.operation.gateway].append(each)
    return found.values()


async def _word_of(gateway: Gateway, payment: Payment, operation: Operation) -> HoldAnswer:
    """The provider's answer about one hold. A failure is part of the result, and stops no other hold."""
    try:
        request = gateway_request(payment, operation, command_from_content(operation.content, operation.traceparent))
        return HoldAnswer(payment, operation, await gateway.status(request))
    except GatewayError as error:
        log.info("hold not asked about", payment=str(payment.payment_id), error=str(error))
        return HoldAnswer(payment, operation, None, f"no answer: {error.message}")
    except Exception:
        log.exception("hold cannot be asked about", key=operation.provider_key)
    except asyncio.CancelledError:
        if is_cancelled():
            raise
        log.error("a library's own cancellation leaked", key=operation.provider_key)
    return HoldAnswer(payment, operation, None, "it cannot be asked about: the log says why")


def _report(answer: HoldAnswer, error: str) -> HoldAnswer:
    """Report an answer that was not saved. The hold stays, and is asked about at its next turn."""
    assert answer.outcome is not None, "only a word is given to be saved"
    metrics.REFUSED_ANSWERS.inc()
    log.error(
        "answer about a hold not saved; it will be asked about again",
        payment=str(answer.payment.payment_id),
        operation=answer.operation.number,
        answer=describe(answer.outcome),
        error=error,
    )
    return answer._replace(outcome=None, why_not=in_vain(answer.outcome, error))


def in_vain(outcome: Outcome, error: str) -> str:
    """Describe, for people, an answer that could not be saved."""
    return f"{describe(outcome)}, which could not be saved: {error}"


def _notified(answer: HoldAnswer) -> Notified | None:
    """The answer as an input of the write path, if there is one."""
    if answer.outcome is None:
        return None
    payment_id, operation = answer.payment.payment_id, answer.operation
    notice = Notice(operation.gateway or "", "", "status", payment_id, operation.number, outcome=answer.outcome)
    return Notified(None, payment_id, notice, operation)
