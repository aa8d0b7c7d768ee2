"""Drives `decide` through the story of one payment: does what the write path does, without a database."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from domain.commands import OperationKind
from domain.decide import decide
from domain.decision import Answer, Decision, Delivery, Input, Notified, Ruling
from domain.events import Event, Replay
from domain.holds import is_end_of_hold
from domain.ledger import Transfer
from domain.notices import External, Notice
from domain.operations import GatewayRequest, NotExecuted, Operation, OperationState, Outcome, Succeeded
from domain.payment import Payment
from domain.requests import gateway_request
from domain.rules import Rules
from domain.settle import ENDINGS
from handlers.messages.commands import command_from_content
from tests.support.service import delivery, rules

PAYMENT_ID = UUID("0190b3a1-7a3c-7e11-9c53-1f0a3a8b9c00")
START = datetime(2030, 1, 1, tzinfo=UTC)


class Story:
    """Keeps what `decide` returns, as the store does, and checks at every step what must always hold."""

    def __init__(self, given: Rules | None = None, payment_id: UUID = PAYMENT_ID) -> None:
        self.rules = given or rules()
        self.payment_id = payment_id
        self.now = START
        self.payment: Payment | None = None
        self.operations: dict[int, Operation] = {}
        self.events: list[Event] = []
        self.replays: list[Replay] = []
        self.requests: list[GatewayRequest] = []
        self.transfers: list[Transfer] = []
        self.heard: list[Notice] = []

    def send(self, kind: str, key: str | None = None, **fields: Any) -> Decision:
        """Deliver a command."""
        return self.give(delivery(kind, self.payment_id, key or kind, **fields))

    def deliver(self, given: Delivery) -> Decision:
        """Deliver this command, with the operation that is stored under its key."""
        return self.give(given)

    def answer(self, outcome: Outcome | None = None, *, token: int | None = None) -> Decision:
        """Answer the operation under way; without an outcome it succeeds."""
        request = self.requests[-1]
        outcome = outcome or Succeeded(f"ref_{request.operation_number}", request.amount.minor)
        return self.give(Answer(self.payment_id, request.operation_number, token or request.lease_token, outcome))

    def hear(
        self, outcome: Outcome | None = None, number: int = 1, *, known: Sequence[Operation] = (), **facts: Any
    ) -> Decision:
        """Apply a webhook about an operation."""
        notice = Notice("books", f"event-{len(self.heard)}", "some.type", self.payment_id, number, outcome=outcome)
        self.heard.append(notice._replace(**facts))
        stored = self._stored(number)
        known = known or self._voids(stored, outcome)
        return self.give(Notified(len(self.heard), self.payment_id, self.heard[-1], stored, known))

    def hear_external(
        self, outcome: Outcome, amount: int = 10_000, kind: OperationKind = OperationKind.REFUND, **facts: Any
    ) -> Decision:
        """Apply a webhook about money that moved without our mark."""
        payment_at_gateway = self.payment.gateway_payment_id if self.payment else None
        notice = Notice("books", f"event-{len(self.heard)}", "some.type", self.payment_id, None, payment_at_gateway)
        told = {"outcome": outcome, "external": External(kind, amount)} | facts
        self.heard.append(notice._replace(**told))
        known = tuple(each for each in self.operations.values() if each.kind is kind)
        return self.give(Notified(len(self.heard), self.payment_id, self.heard[-1], known=known))

    def learn(self, outcome: Outcome, number: int = 1) -> Decision:
        """Apply the answer to a status query about an operation that has ended."""
        notice = Notice("books", "", "status", self.payment_id, number, outcome=outcome)
        stored = self._stored(number)
        return self.give(Notified(None, self.payment_id, notice, stored, self._voids(stored, outcome)))

    def rule(self, outcome: Succeeded | NotExecuted, number: int = 1, evidence: str = "seen in the portal") -> Decision:
        """Apply a person's ruling."""
        return self.give(Ruling(self.payment_id, number, outcome, evidence))

    def _voids(self, operation: Operation | None, outcome: Outcome | None) -> tuple[Operation, ...]:
        """The voids that the write path loads for the end of a hold."""
        if operation is None or not is_end_of_hold(operation, outcome):
            return ()
        return tuple(each for each in self.operations.values() if each.kind is OperationKind.VOID)

    def _stored(self, number: int) -> Operation | None:
        stored = self.operations.get(number)
        return None if stored is None else replace(stored, command=command_from_content(stored.content))

    def does(self, kind: str, key: str | None = None, **fields: Any) -> Decision:
        """Deliver a command that the provider executes."""
        self.send(kind, key, **fields)
        return self.answer()

    def wait(self, **time: float) -> None:
        self.now += timedelta(**time)

    def claim(self) -> GatewayRequest:
        """Claim the operation under way once it is due, as the sweep does (CLAIM_DUE)."""
        assert self.payment is not None
        operation = next(each for each in self.payment.operations if each.is_under_way and each.due_at is not None)
        assert operation.due_at is not None
        self.now = max(self.now, operation.due_at)
        claimed = operation.copy()
        if claimed.is_leased and claimed.state is OperationState.DISPATCHED:
            claimed.state = OperationState.INDETERMINATE
        claimed.lease_token += 1
        claimed.attempts += 1
        claimed.is_leased = True
        claimed.due_at = self.now + self.rules.retry.lease
        self.operations[claimed.number] = claimed
        self.payment = self.payment.copy()
        self.payment.operations = tuple(
            claimed if each.number == claimed.number else each for each in self.payment.operations
        )
        alone = replace(self.payment, operations=())  # The sweep does not load the others.
        self.requests.append(gateway_request(alone, claimed, command_from_content(claimed.content)))
        return self.requests[-1]

    def give(self, given: Input) -> Decision:
        """Apply one input and run the checks."""
        if isinstance(given, Delivery):
            key = given.command.idempotency_key
            stored = [each for each in self.operations.values() if key is not None and each.idempotency_key == key]
            given = Delivery(given.command, *stored)
        before = self.payment.copy() if self.payment else None
        decision = decide(self.payment, given, now=self.now, rules=self.rules)
        assert self.payment == before, "decide changed its argument"
        self._check_sequence(decision)
        self._keep(decision)
        self._check_amounts(decision.payment)
        return decision

    def _check_sequence(self, decision: Decision) -> None:
        first = self.payment.last_seq + 1 if self.payment else 1
        sequence = [event.payment_seq for event in decision.events if isinstance(event, Event)]
        assert sequence == list(range(first, first + len(sequence))), "payment_seq has a gap"
        assert decision.payment.last_seq == first + len(sequence) - 1

    def _keep(self, decision: Decision) -> None:
        if decision.is_stale or decision.is_postponed:
            assert not any((decision.events, decision.operations, decision.requests, decision.transfers))
            return
        results = {event.operation_number: event for event in decision.events if isinstance(event, Event)}
        for event in decision.events:
            if isinstance(event, Event):
                assert not event.is_final or (event.command and event.kind in ENDINGS[event.command])
                self.events.append(event)
            else:
                self.replays.append(event)
        for operation in decision.operations:
            final = results.get(operation.number)
            if final is not None and final.is_result:
                assert operation.result is None or operation.is_external, "a command has one final result"
                operation.result = final.kind.value
                self.replays += [Replay(self.payment_id, final.kind.value)] * final.replays_due
            self.operations[operation.number] = operation
        self.payment = decision.payment
        self.requests += decision.requests
        self.transfers += decision.transfers

    def _check_amounts(self, payment: Payment) -> None:
        # A dispute may take more than what was left: then less than nothing can be refunded.
        assert min(payment.capturable_minor, payment.refundable_minor + payment.disputed_minor) >= 0
        assert min(payment.reserved_capture_minor, payment.reserved_refund_minor) >= 0
        booked = Counter[str]()
        for transfer in self.transfers:
            booked[transfer.debit] += transfer.amount_minor
            booked[transfer.credit] -= transfer.amount_minor
        assert -booked["customer_sales"] == payment.captured_minor, "the ledger differs from the payment"
        assert booked["customer_refunds"] == payment.refunded_minor, "the ledger differs from the payment"
        assert booked["customer_disputes"] == payment.disputed_minor, "the ledger differs from the payment"
        owed = payment.captured_minor - payment.refunded_minor - payment.disputed_minor
        assert booked["gateway_clearing"] == owed, "the ledger differs from the payment"
        assert sum(operation.is_under_way for operation in payment.operations) <= 1 + payment.is_cancelling
        open_operations = tuple(each for _, each in sorted(self.operations.items()) if each.is_open)
        assert payment.operations == open_operations

    # --- read by tests ----------------------------------------------------------------------------------------------

    @property
    def kinds(self) -> Sequence[str]:
        return [event.kind.value for event in self.events]

    @property
    def last(self) -> Event:
        return self.events[-1]

    def amounts(self) -> tuple[int, int, int, int]:
        """Authorized, captured, released, refunded."""
        assert self.payment is not None
        payment = self.payment
        return payment.authorized_minor, payment.captured_minor, payment.released_minor, payment.refunded_minor

    def state(self, number: int) -> str:
        return self.operations[number].state.value
