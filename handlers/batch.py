"""The decisions of one batch of inputs, gathered into one set of changes, and what must be known to make them.

Pure, except for the id generator and clock passed in: the write path (write_path.py) reads, saves and retries.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple
from uuid import UUID

from domain.apply_notice import ENDED_WITHOUT_EFFECT
from domain.commands import OperationKind
from domain.decide import decide
from domain.decision import Answer, Decision, Delivery, Input, Notified
from domain.events import Event, Replay
from domain.holds import is_end_of_hold
from domain.ledger import Transfer
from domain.operations import GatewayRequest, Operation, OperationState, Succeeded
from domain.payment import Payment
from domain.ports import Changes, Clock, OutboxRow
from domain.rules import Rules
from handlers.messages.commands import command_from_content
from handlers.messages.events import event_type, write_event, write_replay, write_time
from handlers.tally import BatchCounts


def place_of(given: Input) -> tuple[UUID, int] | None:
    """The operation that a notice names; None for any other input."""
    if not isinstance(given, Notified) or given.notice.operation_number is None:
        return None
    return given.payment_id, given.notice.operation_number


def kin_of(given: Input, named: Mapping[tuple[UUID, int], Operation]) -> tuple[UUID, OperationKind] | None:
    """The payment and kind whose operations must be read to decide whether a notice is new; None if none.

    For the end of a hold these are its voids, one of which may have caused it.
    """
    if not isinstance(given, Notified):
        return None
    if given.notice.external is not None:
        return given.payment_id, given.notice.external.kind
    operation = named.get(place_of(given) or (given.payment_id, 0))
    if operation is None:
        return None
    if is_end_of_hold(operation, given.notice.outcome):
        return given.payment_id, OperationKind.VOID
    is_late_success = operation.state in ENDED_WITHOUT_EFFECT and isinstance(given.notice.outcome, Succeeded)
    return (given.payment_id, operation.kind) if is_late_success else None


WAITING: Final = (OperationState.RECEIVED, OperationState.REQUIRES_ACTION)


def read_waiting(payment: Payment) -> None:
    """Load the commands of waiting operations, because their turn may come in this batch."""
    for operation in payment.operations:
        if operation.state in WAITING:
            operation.command = command_from_content(operation.content, operation.traceparent)


NOTHING: Final[Mapping[Any, Any]] = {}


class Known(NamedTuple):
    """What is known about a batch's payments: operations `stored` under its idempotency keys, `named` by its notices,
    and `of_kind` for notices that name none."""

    payments: dict[UUID, Payment]
    stored: Mapping[str, Operation] = NOTHING
    named: Mapping[tuple[UUID, int], Operation] = NOTHING
    of_kind: Mapping[tuple[UUID, OperationKind], Sequence[Operation]] = NOTHING


class Batch:
    """The decisions of one batch, gathered into one set of changes."""

    def __init__(
        self,
        rules: Rules,
        clock: Clock,
        new_id: Callable[[], UUID],
        known: Known,
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
        self._counts = BatchCounts()

    def apply(self, given: Input) -> None:
        """Decide one input on the state that the inputs before it left behind."""
        payment_id = given.payment_id
        payment = self._payments.get(payment_id)
        if isinstance(given, Delivery):
            given = self._with_stored(given, payment)
        elif isinstance(given, Notified):
            given = self._with_known(self._with_named(given, payment), payment)
        decision = decide(payment, given, now=self._now, rules=self._rules)
        self._counts.note(given, decision, payment)
        if decision.is_postponed:
            return
        if isinstance(given, Notified) and given.notice_id is not None:
            self._notices.append(given.notice_id)
        if decision.is_stale:
            self._keep_late_success(given, payment)
        else:
            self._gather(payment_id, decision, payment)

    def _keep_late_success(self, given: Input, payment: Payment | None) -> None:
        if isinstance(given, Answer) and isinstance(given.outcome, Succeeded) and payment is not None:
            has_ended = all(each.number != given.operation_number for each in payment.operations)
            self.late_successes += [given] if has_ended else []

    def _with_stored(self, delivery: Delivery, payment: Payment | None) -> Delivery:
        stored = self._stored.get(delivery.command.idempotency_key or "")
        if stored is None:
            return delivery
        self._counts.duplicates += 1
        if stored.is_open and payment is not None:
            # Later decisions see the payment's own copy.
            own = (each for each in payment.operations if each.number == stored.number)
            if stored.payment_id == payment.payment_id:
                stored = next(own, stored)
        return Delivery(delivery.command, stored)

    def _with_named(self, given: Notified, payment: Payment | None) -> Notified:
        """The notice with the operation that it names, in the state that earlier inputs left it."""
        place = place_of(given)
        if place is None or payment is None:
            return given
        own = next((each for each in payment.operations if each.number == place[1]), None)
        return given._replace(operation=own or self._operations.get(place) or self._named.get(place))

    def _with_known(self, given: Notified, payment: Payment | None) -> Notified:
        """A notice that names no operation, with all that it may be about, in the state that earlier inputs left."""
        kin = kin_of(given, self._named)
        if kin is None or payment is None:
            return given
        latest = {each.number: each for each in self._of_kind.get(kin, ())}
        latest |= {number: each for (of, number), each in self._operations.items() if (of, each.kind) == kin}
        latest |= {each.number: each for each in payment.operations if each.kind is kin[1]}
        return given._replace(known=tuple(latest.values()))

    def _gather(self, payment_id: UUID, decision: Decision, before: Payment | None) -> None:
        published = [(event, self._publish(event)) for event in decision.events]
        if decision.payment is not before and (decision.operations or published):
            self._payments[payment_id] = decision.payment
            self._touched[payment_id] = None
        for operation in decision.operations:
            operation.result = _result_of(operation, published)
            self._keep(operation)
        self.requests += decision.requests
        self._transfers += decision.transfers

    def _keep(self, operation: Operation) -> None:
        self._operations[operation.payment_id, operation.number] = operation
        if operation.idempotency_key is not None:
            self._stored[operation.idempotency_key] = operation

    def _publish(self, event: Event | Replay) -> str:
        """Put the event, and the replays that are due with it, into the outbox. Returns the event's text."""
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
        """The payments as they are now stored. Call once, after the batch was committed."""
        touched = [self._payments[payment_id] for payment_id in self._touched]
        for payment in touched:
            payment.version += 1
        return touched

    def _is_new(self, operation: Operation) -> bool:
        loaded = self._loaded.get(operation.payment_id)
        return loaded is None or operation.number > loaded.last_operation

    def report(self) -> None:
        """Count what was saved. Never raises."""
        self._counts.report(
            notices=self._notices, events=self._events, operations=self._operations.values(), decided_at=self._now
        )


def _result_of(operation: Operation, published: Sequence[tuple[Event | Replay, str]]) -> str | None:
    """The result to keep with the operation, for later replays, after these events."""
    result = operation.result
    for event, text in published:
        if isinstance(event, Event) and event.operation_number == operation.number:
            if event.is_result:
                result = text
            elif event.amends_result:
                result = f"{result}\n{text}"
    return result


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
