"""The one write path: every input, from wherever it comes, is deduplicated, decided and saved here, a batch at a time.

Before the commit nothing happened; after it the state, the events and the intent to call the gateway are on disk
together. Gateway requests are returned to be sent after the commit, never inside it.
"""

import asyncio
import random
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple
from uuid import UUID

import structlog

from domain.commands import OperationKind
from domain.decide import decide
from domain.decision import Answer, Decision, Delivery, Input, Notified
from domain.errors import ConcurrentUpdate, InputRefusedByStore, StoreUnavailable
from domain.events import Event, Replay
from domain.heed import ENDED_WITHOUT_EFFECT, is_end_of_hold
from domain.ledger import Transfer
from domain.notices import OWN_ANSWER, Notice
from domain.operations import IN_DOUBT, UNDER_WAY, GatewayRequest, Operation, OperationState, Succeeded
from domain.payment import Payment
from domain.ports import Changes, Clock, OutboxRow, PaymentStore, RecentKeys, WriteTransaction
from domain.rules import Rules
from handlers import metrics
from handlers.at_hand import AtHand
from handlers.messages.commands import command_from_content
from handlers.messages.events import event_type, write_event, write_replay, write_time

log = structlog.get_logger(__name__)

ATTEMPTS_MAX = 20
"""Lost races in a row before a batch is handed back as if Postgres were away: it will be delivered again."""


@dataclass(frozen=True, slots=True)
class Refused:
    """An input that could not be applied, alone among its neighbours, and the error that it caused."""

    given: Input
    error: Exception

    @property
    def may_heal(self) -> bool:
        """Whether trying again may help: what a constraint refuses once it refuses for ever."""
        return not isinstance(self.error, InputRefusedByStore)


class SavedInPart(StoreUnavailable):
    """Postgres went away while a batch was taken apart. What was saved has begun: its `requests` are to be sent."""

    def __init__(self, requests: Sequence[GatewayRequest], error: StoreUnavailable) -> None:
        super().__init__(str(error))
        later: Sequence[GatewayRequest] = error.requests if isinstance(error, SavedInPart) else ()
        self.requests: list[GatewayRequest] = [*requests, *later]


@dataclass(slots=True)
class Applied:
    """What a batch led to: requests for the gateways, the inputs that stood alone in failing, and those not tried.

    Not tried is what comes after one that failed, on the same payment, if that one may yet succeed: order is kept.
    """

    requests: list[GatewayRequest] = field(default_factory=list)
    refused: list[Refused] = field(default_factory=list)
    not_tried: list[Input] = field(default_factory=list)

    @property
    def may_heal(self) -> bool:
        """Whether trying again may help with any of it."""
        return bool(self.not_tried) or any(each.may_heal for each in self.refused)

    def then(self, later: "Applied") -> "Applied":
        """Both, one after the other."""
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
            SavedInPart: as well, but some are saved; it has their requests, to be sent now.
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
        """Try once more what may heal, in the order of `inputs`; what cannot heal stays refused.

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
                # The hint was wrong or another worker was first: look at every key, and let the others finish.
                suspects = known
                await asyncio.sleep(random.uniform(0, 0.005 * (attempt + 1)))  # noqa: S311 - spreads load, no secret
            else:
                self._at_hand.note({each.payment_id for each in inputs}, batch.committed())
                batch.report()
                return batch.requests + await self._heed_late(batch)
        raise StoreUnavailable(f"lost {ATTEMPTS_MAX} races in a row")

    async def _heed_late(self, batch: "_Batch") -> list[GatewayRequest]:
        """Have a success that came after its operation's end heard like a webhook's: nobody may ever tell it again.

        It is no news where the operation ended with just that.
        """
        words = [_as_notice(each) for each in batch.late_successes]
        try:
            applied = await self.apply(words)
        except StoreUnavailable as error:
            raise SavedInPart(batch.requests, error) from error
        for refused in applied.refused:
            log.error("late answer not saved", payment=str(refused.given.payment_id), error=str(refused.error))
        for given in applied.not_tried:
            log.error("late answer not saved", payment=str(given.payment_id), error="an earlier one could not be")
        return applied.requests

    async def _suspects(self, keys: list[str]) -> Sequence[str]:
        """The keys that Postgres must be asked about beforehand; the others are caught by its unique key."""
        return [] if not keys or await self._recent.are_new(keys) else keys

    async def _apply_once(
        self, inputs: Sequence[Input], suspects: Sequence[str], assumed: dict[UUID, Payment] | None
    ) -> "_Batch":
        if assumed is not None:
            batch = self._decide(inputs, _Known(assumed))
            await self._store.save(batch.changes())
            return batch
        async with self._store.begin() as transaction:
            batch = self._decide(inputs, await self._load(transaction, inputs, suspects))
            await transaction.save(batch.changes())
        return batch

    def _decide(self, inputs: Sequence[Input], known: "_Known") -> "_Batch":
        batch = _Batch(self._rules, self._clock, self._new_id, known)
        for given in inputs:
            batch.apply(given)
        return batch

    async def _load(self, transaction: WriteTransaction, inputs: Sequence[Input], suspects: Sequence[str]) -> "_Known":
        # Locked first, read afterwards: what is read about a payment is then true until the commit.
        payments = await transaction.lock_payments({each.payment_id for each in inputs})
        stored = await transaction.find_operations(suspects)
        for payment in payments.values():
            _read_waiting(payment)
        named = await transaction.operations_at({place for each in inputs if (place := _place(each)) is not None})
        kins = {kin for each in inputs if (kin := _kin(each, named)) is not None}
        of_kind = await transaction.operations_of_kind(kins)
        return _Known(payments, stored, named, of_kind)


def _as_notice(late: Answer) -> Notified:
    notice = Notice("", "", OWN_ANSWER, late.payment_id, late.operation_number, outcome=late.outcome)
    return Notified(None, late.payment_id, notice)


def _place(given: Input) -> tuple[UUID, int] | None:
    """Which operation a notice names."""
    if not isinstance(given, Notified) or given.notice.operation_number is None:
        return None
    return given.payment_id, given.notice.operation_number


def _kin(given: Input, named: Mapping[tuple[UUID, int], Operation]) -> tuple[UUID, OperationKind] | None:
    """Among which operations a notice without a mark may be known, or one with a mark may have been, before it came.

    What tells the end of a hold may tell what one of our voids has done.
    """
    if not isinstance(given, Notified):
        return None
    if given.notice.external is not None:
        return given.payment_id, given.notice.external.kind
    operation = named.get(_place(given) or (given.payment_id, 0))
    if operation is None:
        return None
    if is_end_of_hold(operation, given.notice.outcome):
        return given.payment_id, OperationKind.VOID
    is_late_success = operation.state in ENDED_WITHOUT_EFFECT and isinstance(given.notice.outcome, Succeeded)
    return (given.payment_id, operation.kind) if is_late_success else None


WAITING: Final = (OperationState.RECEIVED, OperationState.REQUIRES_ACTION)


def _read_waiting(payment: Payment) -> None:
    """Put the commands of waiting operations at hand, for their turn may come."""
    for operation in payment.operations:
        if operation.state in WAITING:
            operation.command = command_from_content(operation.content, operation.traceparent)


NOTHING: Final[Mapping[Any, Any]] = {}


class _Known(NamedTuple):
    """What is known about the payments of a batch: `stored` by idempotency key, `named` by notices, `of_kind` for those
    that name none."""

    payments: dict[UUID, Payment]
    stored: Mapping[str, Operation] = NOTHING
    named: Mapping[tuple[UUID, int], Operation] = NOTHING
    of_kind: Mapping[tuple[UUID, OperationKind], Sequence[Operation]] = NOTHING


class _Batch:
    """The decisions of one batch, gathered into one set of changes."""

    def __init__(
        self,
        rules: Rules,
        clock: Clock,
        new_id: Callable[[], UUID],
        known: _Known,
    ) -> None:
        self.requests: list[GatewayRequest] = []
        self.late_successes: list[Answer] = []
        self._rules = rules
        self._now = clock()
        self._new_id = new_id
        self._loaded = known.payments
        self._payments = dict(known.payments)
        self._stored = dict(known.stored)
        self._named = known.named
        self._of_kind = known.of_kind
        self._operations: dict[tuple[UUID, int], Operation] = {}
        self._touched: dict[UUID, None] = {}
        self._transfers: list[Transfer] = []
        self._outbox: list[OutboxRow] = []
        self._events: list[Event] = []
        self._notices: list[int] = []
        self._duplicates = 0
        self._stale = 0
        self._postponed = 0
        self._disagreeing: list[Notified] = []
        self._contradicted: list[Operation] = []
        self._healed: list[tuple[Operation, str]] = []

    def apply(self, given: Input) -> None:
        """Decide one input on the state that the inputs before it left behind."""
        payment_id = given.payment_id
        payment = self._payments.get(payment_id)
        if isinstance(given, Delivery):
            given = self._with_stored(given, payment)
        elif isinstance(given, Notified):
            given = self._with_known(self._with_named(given, payment), payment)
        decision = decide(payment, given, now=self._now, rules=self._rules)
        if decision.is_postponed:
            self._note_postponed(given)
            return
        if isinstance(given, Notified) and given.notice_id is not None:
            self._notices.append(given.notice_id)
            if decision.disagrees:
                self._disagreeing.append(given)
        if decision.is_stale:
            self._note_stale(given, payment)
            return
        self._gather(payment_id, decision, payment)
        self._note_reconciled(given, decision, payment)

    def _note_postponed(self, given: Input) -> None:
        self._postponed += 1
        if isinstance(given, Notified) and given.notice_id is None and given.operation is not None:
            self._contradicted.append(given.operation)  # It does not wait in the inbox, so a person is to look.

    def _note_stale(self, given: Input, payment: Payment | None) -> None:
        self._stale += 1
        if isinstance(given, Answer) and isinstance(given.outcome, Succeeded) and payment is not None:
            has_ended = all(each.number != given.operation_number for each in payment.operations)
            self.late_successes += [given] if has_ended else []

    def _note_reconciled(self, given: Input, decision: Decision, before: Payment | None) -> None:
        """What was stuck and ended by this, and what the provider tells otherwise than it is booked."""
        was_stuck = isinstance(given, Answer) and given.was_stuck
        if was_stuck or (before is not None and before.has_indeterminate):
            ended = [each for each in decision.operations if not each.is_open and _was_under_way(before, each)]
            self._healed += [(each, each.state.value) for each in ended if was_stuck or _was_in_doubt(before, each)]
        if isinstance(given, Answer) and isinstance(given.outcome, Succeeded):
            self._contradicted += [each for each in decision.operations if each.state is OperationState.NEEDS_REVIEW]
        if isinstance(given, Notified) and given.notice_id is None and given.operation is not None:
            word = "hold_released" if is_end_of_hold(given.operation, given.notice.outcome) else "late_success"
            self._healed += [(given.operation, word)] if decision.events else []
            self._contradicted += [given.operation] if decision.disagrees else []

    def _with_stored(self, delivery: Delivery, payment: Payment | None) -> Delivery:
        stored = self._stored.get(delivery.command.idempotency_key or "")
        if stored is None:
            return delivery
        self._duplicates += 1
        if stored.is_open and payment is not None:
            # The payment's own copy is the one that later decisions see.
            own = (each for each in payment.operations if each.number == stored.number)
            if stored.payment_id == payment.payment_id:
                stored = next(own, stored)
        return Delivery(delivery.command, stored)

    def _with_named(self, given: Notified, payment: Payment | None) -> Notified:
        """The notice with the operation that it names as the inputs before it left it."""
        place = _place(given)
        if place is None or payment is None:
            return given
        own = next((each for each in payment.operations if each.number == place[1]), None)
        return given._replace(operation=own or self._operations.get(place) or self._named.get(place))

    def _with_known(self, given: Notified, payment: Payment | None) -> Notified:
        """The notice with all that it may be about where it names nothing, as the inputs before it left that."""
        kin = _kin(given, self._named)
        if kin is None or payment is None:
            return given
        latest = {each.number: each for each in self._of_kind.get(kin, ())}
        latest |= {number: each for (of, number), each in self._operations.items() if (of, each.kind) == kin}
        latest |= {each.number: each for each in payment.operations if each.kind is kin[1]}
        return given._replace(known=tuple(latest.values()))

    def _gather(self, payment_id: UUID, decision: Decision, before: Payment | None) -> None:
        told = [(event, self._publish(event)) for event in decision.events]
        if decision.payment is not before and (decision.operations or told):
            self._payments[payment_id] = decision.payment
            self._touched[payment_id] = None
        for operation in decision.operations:
            operation.result = _result_of(operation, told)
            self._keep(operation)
        self.requests += decision.requests
        self._transfers += decision.transfers

    def _keep(self, operation: Operation) -> None:
        self._operations[operation.payment_id, operation.number] = operation
        if operation.idempotency_key is not None:
            self._stored[operation.idempotency_key] = operation

    def _publish(self, event: Event | Replay) -> str:
        """Put the event into the outbox, and what it is owed to; its text."""
        if isinstance(event, Replay):
            for text in event.result.split("\n"):
                self._replay(event.payment_id, text, event.traceparent)
            return event.result
        row = _outbox_row(event, self._new_id())
        self._events.append(event)
        self._outbox.append(row)
        if event.is_result:
            for _ in range(event.replays_due):
                self._replay(event.payment_id, row.payload, event.traceparent)
        return row.payload

    def _replay(self, payment_id: UUID, result: str, traceparent: str | None) -> None:
        event_id = self._new_id()
        replay = write_replay(result, event_id)
        self._outbox.append(
            OutboxRow(
                id=event_id,
                payment_id=payment_id,
                type=replay.type,
                payload=replay.text,
                payment_seq=replay.payment_seq,
                occurred_at=replay.occurred_at,
                traceparent=traceparent,
            )
        )

    def changes(self) -> Changes:
        """All that the decisions changed, each row once, in its final form."""
        touched = [self._payments[payment_id] for payment_id in self._touched]
        operations = self._operations.values()
        return Changes(
            new_payments=[each for each in touched if each.version == 0],
            payments=[each for each in touched if each.version > 0],
            new_operations=[each for each in operations if self._is_new(each)],
            operations=[each for each in operations if not self._is_new(each)],
            transfers=self._transfers,
            outbox=self._outbox,
            decided_at=self._now,
            notices=self._notices,
        )

    def committed(self) -> list[Payment]:
        """The payments as they are stored now; to be called once, when the batch is committed."""
        touched = [self._payments[payment_id] for payment_id in self._touched]
        for payment in touched:
            payment.version += 1
        return touched

    def _is_new(self, operation: Operation) -> bool:
        loaded = self._loaded.get(operation.payment_id)
        return loaded is None or operation.number > loaded.last_operation

    def report(self) -> None:
        """Count what was saved, and never fail: after the commit an error would make it look refused."""
        try:
            self._count()
        except Exception:
            log.exception("a saved batch was not counted")

    def _count(self) -> None:
        metrics.DUPLICATES.inc(self._duplicates)
        metrics.STALE_ANSWERS.inc(self._stale)
        metrics.NOTICES_APPLIED.inc(len(self._notices))
        metrics.NOTICES_POSTPONED.inc(self._postponed)
        for operation, state in self._healed:
            metrics.HEALED.labels(operation.gateway or "", state).inc()
        for operation in self._contradicted:
            metrics.DISAGREEING.labels(operation.gateway or "").inc()
            log.error("provider's answer contradicts what is booked", key=operation.provider_key)
        for given in self._disagreeing:
            metrics.NOTICES_DISAGREEING.labels(given.notice.gateway).inc()
            log.error(
                "webhook contradicts what is known", payment=str(given.payment_id), event_id=given.notice.event_id
            )
        for event in self._events:
            metrics.results(event.command, event.kind).inc()
        for operation in self._operations.values():
            if operation.result is not None and operation.dispatched_at is not None and not operation.is_external:
                seconds = (self._now - operation.dispatched_at).total_seconds()
                metrics.result_seconds(operation.kind).observe(seconds)


def _result_of(operation: Operation, told: Sequence[tuple[Event | Replay, str]]) -> str | None:
    """What is kept with the operation, to be published again, once this has been told."""
    result = operation.result
    for event, text in told:
        if isinstance(event, Event) and event.operation_number == operation.number:
            if event.is_result:
                result = text
            elif event.amends_result:
                result = f"{result}\n{text}"
    return result


def _was_under_way(payment: Payment | None, operation: Operation) -> bool:
    return _was_in(UNDER_WAY, payment, operation)


def _was_in_doubt(payment: Payment | None, operation: Operation) -> bool:
    return _was_in(IN_DOUBT, payment, operation)


def _was_in(states: Set[OperationState], payment: Payment | None, operation: Operation) -> bool:
    before = payment.operations if payment else ()
    return any(each.number == operation.number and each.state in states for each in before)


def _outbox_row(event: Event, event_id: UUID) -> OutboxRow:
    return OutboxRow(
        id=event_id,
        payment_id=event.payment_id,
        type=event_type(event.kind),
        payload=write_event(event, event_id),
        payment_seq=event.payment_seq,
        occurred_at=write_time(event.occurred_at),
        traceparent=event.traceparent,
    )
