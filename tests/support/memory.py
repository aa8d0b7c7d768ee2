"""Runs `decide` over dictionaries: does what the write path does, one input at a time and without Postgres."""

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import NamedTuple
from uuid import UUID

from domain.decide import decide
from domain.decision import Delivery, Input, Notified
from domain.events import Event, Replay
from domain.ledger import Transfer
from domain.operations import GatewayRequest, Operation, OperationState
from domain.payment import Payment
from domain.requests import gateway_request
from domain.rules import RetryPolicy, Rules
from handlers.batch import kin_of
from handlers.messages.commands import command_from_content
from tests.support.service import rules

START = datetime(2030, 1, 1, tzinfo=UTC)


class Told(NamedTuple):
    """One message to subscribers, with the fields that the tests look at."""

    payment_id: UUID
    payment_seq: int
    kind: str
    idempotency_key: str | None
    operation_number: int | None
    replayed: bool
    is_final: bool
    reason: str | None = None
    """The reason of a rejection."""


class MemoryShell:
    """Payments, operations, events and ledger in memory. Checks at every input that `decide` does not change it."""

    def __init__(self, given: Rules | None = None) -> None:
        self.rules = given or rules(RetryPolicy())
        self.now = START
        self.payments: dict[UUID, Payment] = {}
        self.all_operations: dict[tuple[UUID, int], Operation] = {}
        self.events: list[Event | Replay] = []
        self.all_told: list[Told] = []
        self.booked: list[Transfer] = []
        self.disagreeing: list[Notified] = []
        self._by_key: dict[str, tuple[UUID, int]] = {}

    # --- used by the state machine ----------------------------------------------------------------------------------

    def apply(self, inputs: list[Input]) -> list[GatewayRequest]:
        """Apply the inputs in order; returns the requests to the gateways."""
        return [request for given in inputs for request in self._apply(given)]

    def claim(self, payment_id: UUID, number: int) -> list[GatewayRequest]:
        """Claim an operation that is due, as a sweep does; returns its request."""
        payment, operation = self.payments[payment_id], self.all_operations[payment_id, number].copy()
        if operation.is_leased and operation.state is OperationState.DISPATCHED:
            operation.state = OperationState.INDETERMINATE
        operation.lease_token += 1
        operation.attempts += 1
        operation.is_leased = True
        self._keep(operation)
        payment.operations = tuple(operation if each.number == number else each for each in payment.operations)
        return [gateway_request(payment, operation, command_from_content(operation.content))]

    def pass_time(self, duration: timedelta) -> None:
        """Advance the clock."""
        self.now += duration

    def operations(self) -> list[Operation]:
        """All operations, open and ended."""
        return list(self.all_operations.values())

    def told(self) -> list[Told]:
        """All messages to subscribers, in order."""
        return list(self.all_told)

    def transfers(self) -> list[Transfer]:
        """The ledger."""
        return self.booked

    def found_payments(self) -> dict[UUID, Payment]:
        """All payments with their open operations."""
        return self.payments

    # --- internal ---------------------------------------------------------------------------------------------------

    def _apply(self, given: Input) -> list[GatewayRequest]:
        payment_id = given.command.payment_id if isinstance(given, Delivery) else given.payment_id
        payment = self.payments.get(payment_id)
        if isinstance(given, Delivery):
            place = self._by_key.get(given.command.idempotency_key or "")
            given = Delivery(given.command, self.all_operations[place] if place else None)
        elif isinstance(given, Notified):
            given = given._replace(operation=self._named(given), known=self._known(given))
        before = _copies(payment, given)
        decision = decide(payment, given, now=self.now, rules=self.rules)
        assert _copies(payment, given) == before, "decide changed what it was given"
        if decision.is_stale or decision.is_postponed:
            assert not any((decision.events, decision.operations, decision.requests, decision.transfers))
            return []
        if decision.disagrees and isinstance(given, Notified):
            self.disagreeing.append(given)
        self.payments[payment_id] = replace(decision.payment, version=1)
        results = {}
        for event in decision.events:
            number, result = self._tell(event)
            results[number] = result
        for operation in decision.operations:
            operation.result = results.get(operation.number) or operation.result
            self._keep(operation)
        self.booked += decision.transfers
        return list(decision.requests)

    def _named(self, given: Notified) -> Operation | None:
        """The operation that the notice names, as the write path loads it: the payment's own copy, with its command."""
        stored = self.all_operations.get((given.payment_id, given.notice.operation_number or 0))
        if stored is not None and stored.command is None:
            stored.command = command_from_content(stored.content)
        return stored

    def _known(self, given: Notified) -> list[Operation]:
        """The operations that the write path loads beside the one that a notice names."""
        kin = kin_of(given, self.all_operations)
        return [each for (of, _), each in self.all_operations.items() if (of, each.kind) == kin]

    def _tell(self, event: Event | Replay) -> tuple[int | None, str | None]:
        self.events.append(event)
        if isinstance(event, Replay):
            self._replay(event.payment_id, event.result)
            return None, None
        told = Told(
            event.payment_id,
            event.payment_seq,
            str(event.kind),
            event.idempotency_key,
            event.operation_number,
            replayed=False,
            is_final=event.is_final,
            reason=event.rejection.reason if event.rejection else None,
        )
        self.all_told.append(told)
        if not event.is_result:
            return None, None
        result = json.dumps(told[1:])
        for _ in range(event.replays_due):
            self._replay(event.payment_id, result)
        return event.operation_number, result

    def _replay(self, payment_id: UUID, result: str) -> None:
        self.all_told.append(Told(payment_id, *json.loads(result))._replace(replayed=True))

    def _keep(self, operation: Operation) -> None:
        place = (operation.payment_id, operation.number)
        self.all_operations[place] = operation
        if operation.idempotency_key is not None:
            self._by_key[operation.idempotency_key] = place


def _copies(payment: Payment | None, given: Input) -> tuple[object, ...]:
    stored = given.stored if isinstance(given, Delivery) else None
    operations = payment.operations if payment else ()
    return payment and payment.copy(), [each.copy() for each in operations], stored and stored.copy()
