"""The one write path: every input, whatever its source, is deduplicated, decided and saved here, a batch at a time.

Before the commit nothing happened; after it the state, the events and the intent to call the gateway are on disk
together. Gateway requests are returned to be sent after the commit, never inside it.
"""

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from uuid import UUID

import structlog

from domain.decision import Answer, Delivery, Input, Notified
from domain.errors import ConcurrentUpdate, InputRefusedByStore, StoreUnavailable
from domain.notices import OWN_ANSWER, Notice
from domain.operations import GatewayRequest, describe
from domain.payment import Payment
from domain.ports import Clock, PaymentStore, RecentKeys, WriteTransaction
from domain.rules import Rules
from handlers import metrics
from handlers.at_hand import AtHand
from handlers.batch import Batch, Known, kin_of, place_of, read_waiting

log = structlog.get_logger(__name__)

ATTEMPTS_MAX = 20
"""Lost races in a row before a batch is given back as if Postgres were away: it will be delivered again."""


@dataclass(frozen=True, slots=True)
class Refused:
    """An input that could not be applied, isolated from its neighbours, and the error that it caused."""

    given: Input
    error: Exception

    @property
    def may_heal(self) -> bool:
        """Whether trying again may help: a constraint that refused an input will refuse it always."""
        return not isinstance(self.error, InputRefusedByStore)

    @property
    def defect(self) -> Exception | None:
        """The error if the input did not cause it; its traceback shows what did."""
        return self.error if self.may_heal else None


class SavedInPart(StoreUnavailable):
    """Postgres went away while a batch was being split. Part of it is saved, and its `requests` must be sent."""

    def __init__(self, requests: Sequence[GatewayRequest], error: StoreUnavailable) -> None:
        super().__init__(str(error))
        later: Sequence[GatewayRequest] = error.requests if isinstance(error, SavedInPart) else ()
        self.requests: list[GatewayRequest] = [*requests, *later]


@dataclass(slots=True)
class Applied:
    """The result of a batch: requests for the gateways, the inputs that failed in isolation, and those not tried.

    Inputs that follow a failed one of the same payment are not tried if that one may yet succeed: order is kept.
    """

    requests: list[GatewayRequest] = field(default_factory=list)
    refused: list[Refused] = field(default_factory=list)
    not_tried: list[Input] = field(default_factory=list)

    @property
    def may_heal(self) -> bool:
        """Whether trying again may help any of the inputs."""
        return bool(self.not_tried) or any(each.may_heal for each in self.refused)

    def then(self, later: "Applied") -> "Applied":
        """Both results, in order."""
        return Applied(self.requests + later.requests, self.refused + later.refused, self.not_tried + later.not_tried)


class WritePath:
    """Applies inputs to payments, exactly once each, in the order given."""

    def __init__(
        self, *, store: PaymentStore, rules: Rules, clock: Clock, new_id: Callable[[], UUID], recent: RecentKeys
    ) -> None:
        self._store = store
        self._rules = rules
        self._clock = clock
        self._new_id = new_id
        self._recent = recent
        self._at_hand = AtHand()

    async def apply(self, inputs: Sequence[Input]) -> Applied:
        """Apply all inputs; one that cannot be applied is found by bisection and does not stop its neighbours.

        Raises:
            StoreUnavailable: nothing is known to be saved; apply the same inputs again later.
            SavedInPart: the same, but some inputs are saved; send its requests now.
        """
        if not inputs:
            return Applied()
        try:
            return Applied(requests=await self._apply_whole(inputs))
        except (StoreUnavailable, asyncio.CancelledError):
            raise
        except Exception as error:
            if len(inputs) == 1:
                return Applied(refused=[Refused(inputs[0], error)])
        middle = len(inputs) // 2
        first = await self.apply(inputs[:middle])
        held_up = {each.given.payment_id for each in first.refused if each.may_heal}
        held_up |= {each.payment_id for each in first.not_tried}
        try:
            second = await self.apply([each for each in inputs[middle:] if each.payment_id not in held_up])
        except StoreUnavailable as error:
            raise SavedInPart(first.requests, error) from error
        first.not_tried += [each for each in inputs[middle:] if each.payment_id in held_up]
        return first.then(second)

    async def apply_again(self, inputs: Sequence[Input], earlier: Applied) -> Applied:
        """Retry the inputs that may yet succeed, in the order of `inputs`; the others stay refused.

        Raises:
            StoreUnavailable: as `apply`.
        """
        due = {id(each.given) for each in earlier.refused if each.may_heal} | {id(each) for each in earlier.not_tried}
        lasting = Applied(refused=[each for each in earlier.refused if not each.may_heal])
        return lasting.then(await self.apply([each for each in inputs if id(each) in due]))

    async def _apply_whole(self, inputs: Sequence[Input]) -> list[GatewayRequest]:
        keys = [each.command.idempotency_key for each in inputs if isinstance(each, Delivery)]
        known = [key for key in keys if key is not None]
        suspects = await self._suspects(known)
        assumed = None if suspects else self._at_hand.assume(inputs)
        for attempt in range(ATTEMPTS_MAX):
            try:
                batch = await self._apply_once(inputs, suspects, assumed)
            except ConcurrentUpdate:
                assumed = None
                metrics.CONCURRENT_UPDATES.inc()
                # The hint was wrong or another worker was first: look up every key, and let the others finish.
                suspects = known
                await asyncio.sleep(random.uniform(0, 0.005 * (attempt + 1)))  # noqa: S311 - spreads load, no secret
            else:
                self._at_hand.note({each.payment_id for each in inputs}, batch.committed())
                batch.report()
                return batch.requests + await self._apply_late(batch)
        raise StoreUnavailable(f"lost {ATTEMPTS_MAX} races in a row")

    async def _apply_late(self, batch: Batch) -> list[GatewayRequest]:
        """Apply a success that arrived after its operation's end like a webhook: it may never be reported again.

        Changes nothing if the operation had ended with that success.
        """
        words = [_as_notice(each) for each in batch.late_successes]
        try:
            applied = await self.apply(words)
        except StoreUnavailable as error:
            raise SavedInPart(batch.requests, error) from error
        for refused in applied.refused:
            _report_late(refused.given, str(refused.error), refused.defect)
        for given in applied.not_tried:
            _report_late(given, "an earlier answer of its payment could not be saved")
        return applied.requests

    async def _suspects(self, keys: list[str]) -> Sequence[str]:
        """The keys that must be looked up in Postgres first; its unique key catches any other."""
        return [] if not keys or await self._recent.are_new(keys) else keys

    async def _apply_once(
        self, inputs: Sequence[Input], suspects: Sequence[str], assumed: dict[UUID, Payment] | None
    ) -> Batch:
        if assumed is not None:
            batch = self._decide(inputs, Known(assumed))
            await self._store.save(batch.changes())
            return batch
        async with self._store.begin() as transaction:
            batch = self._decide(inputs, await self._load(transaction, inputs, suspects))
            await transaction.save(batch.changes())
        return batch

    def _decide(self, inputs: Sequence[Input], known: Known) -> Batch:
        batch = Batch(self._rules, self._clock, self._new_id, known)
        for given in inputs:
            batch.apply(given)
        return batch

    async def _load(self, transaction: WriteTransaction, inputs: Sequence[Input], suspects: Sequence[str]) -> Known:
        # Lock first, read afterwards: what is read about a payment then stays true until the commit.
        payments = await transaction.lock_payments({each.payment_id for each in inputs})
        stored = await transaction.find_operations(suspects)
        for payment in payments.values():
            read_waiting(payment)
        named = await transaction.operations_at({place for each in inputs if (place := place_of(each)) is not None})
        kins = {kin for each in inputs if (kin := kin_of(each, named)) is not None}
        of_kind = await transaction.operations_of_kind(kins)
        return Known(payments, stored, named, of_kind)


def _report_late(given: Input, error: str, defect: Exception | None = None) -> None:
    metrics.REFUSED_ANSWERS.inc()
    assert isinstance(given, Notified), "nothing else was given"
    assert given.notice.outcome is not None, "a success is what came late"
    log.error(
        "late success not saved; nobody asks about it again",
        payment=str(given.payment_id),
        operation=given.notice.operation_number,
        answer=describe(given.notice.outcome),
        error=error,
        exc_info=defect,
    )


def _as_notice(late: Answer) -> Notified:
    notice = Notice("", "", OWN_ANSWER, late.payment_id, late.operation_number, outcome=late.outcome)
    return Notified(None, late.payment_id, notice)
