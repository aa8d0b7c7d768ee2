"""A state machine of deliveries, answers, crashes and clocks around a provider with its own books.

It drives a shell: `decide` in memory, or the write path on Postgres. The provider executes each idempotency key once.
Answers get lost, requests that nobody waits for any more still arrive, and workers presumed dead still answer.

There is one machine for each gateway of this release, with the capabilities that the gateway declares. A command beyond
them must be refused before any call: the provider fails the test if it is asked for something that it cannot do.
"""

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, ClassVar, Final, NamedTuple, Protocol
from uuid import UUID

from hypothesis import HealthCheck, Phase, assume, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from app.gateways import known_capabilities
from app.settings import Settings
from domain.capabilities import AmountLimits, Capabilities
from domain.commands import AnyCommand, Command, OperationKind, RejectionReason
from domain.decision import Answer, Delivery, Input, Notified
from domain.ledger import Account, Transfer
from domain.money import MINOR_UNITS
from domain.notices import External, Notice
from domain.operations import (
    GatewayRequest,
    Operation,
    OperationState,
    Outcome,
    RequiresAction,
    Succeeded,
    Unknown,
    Unreachable,
)
from domain.payment import Payment
from domain.rules import RetryPolicy, Rules
from handlers.dispatch import WITH_THE_PROVIDER
from tests.property.provider import Movement, Provider
from tests.support.memory import START, Told
from tests.support.service import delivery, rules

GATEWAYS: Final = known_capabilities(Settings())
"""The capabilities that each gateway of this release declares."""

PAYMENTS = (UUID(int=1 << 64), UUID(int=2 << 64))
KEYS = tuple(f"key-{number}" for number in range(60))
MOVEMENTS = (OperationKind.CAPTURE, OperationKind.REFUND)
WITHOUT_EFFECT = (OperationState.REJECTED, OperationState.DECLINED, OperationState.NOT_EXECUTED)
UNSUPPORTED = RejectionReason.UNSUPPORTED_BY_GATEWAY
EARLIER_REASONS = (
    RejectionReason.COMMAND_EXPIRED,
    RejectionReason.PAYMENT_ALREADY_EXISTS,
    RejectionReason.PAYMENT_NOT_FOUND,
    RejectionReason.CURRENCY_MISMATCH,
)
"""The reasons for a rejection that are checked before whether the gateway could do it."""


class Shell(Protocol):
    """The part under test, which keeps the payments."""

    now: datetime

    def apply(self, inputs: list[Input]) -> list[GatewayRequest]: ...
    def claim(self, payment_id: UUID, number: int) -> list[GatewayRequest]: ...
    def pass_time(self, duration: timedelta) -> None: ...
    def operations(self) -> list[Operation]: ...
    def told(self) -> list[Told]: ...
    def transfers(self) -> list[Transfer]: ...
    def found_payments(self) -> dict[UUID, Payment]: ...


@dataclass
class Flight:
    """A worker's call of the gateway; `answer` is set once the provider has executed the call."""

    request: GatewayRequest
    answer: Outcome | None = field(default=None)


class Ask(NamedTuple):
    """What a command asks for, independent of the gateway: amounts are multiples of the gateway's minimum."""

    kind: str
    payment_id: UUID
    key: str
    fields: dict[str, Any]


class Tender(NamedTuple):
    """The currencies used with a gateway (its main one, another one, one that it refuses) and its minimum amount."""

    own: str
    other: str
    foreign: str
    unit_minor: int

    @classmethod
    def of(cls, capabilities: Capabilities) -> "Tender":
        """Choose USD and EUR first if the gateway takes them."""
        taken = sorted(capabilities.currencies, key=lambda code: (code != "USD", code != "EUR", code))
        limits = capabilities.limits.get(taken[0], AmountLimits())
        foreign = min(_never_taken(capabilities), default=taken[0])
        return cls(taken[0], [*taken, foreign][1], foreign, limits.minimum_minor)

    def fields(self, ask: Ask) -> dict[str, Any]:
        """The command's fields, with currency and amount put in."""
        fields = dict(ask.fields)
        if "currency" in fields:
            fields["currency"] = getattr(self, fields["currency"])
        if "amount_minor" in fields:
            fields["amount_minor"] *= self.unit_minor
        return fields


amounts = st.sampled_from([1, 20, 40, 60, 100])
verdicts = st.sampled_from([*["success"] * 6, "decline", "refuse", "pending", "action", "other amount"])
payment_ids = st.sampled_from((*PAYMENTS[:1] * 3, *PAYMENTS[1:]))
keys = st.sampled_from(KEYS)
somewhere = st.integers(0, 1000)
percents = st.sampled_from([1, 50, 100])
openings = st.builds(
    lambda kind, payment, key, amount, currency, expiry: Ask(
        kind, payment, key, {"amount_minor": amount, "currency": currency} | expiry
    ),
    st.sampled_from(["authorize", "charge"]),
    payment_ids,
    keys,
    amounts,
    st.sampled_from([*["own"] * 6, "other", "foreign"]),
    st.sampled_from([{}, {}, {}, {"expires_at": (START + timedelta(minutes=30)).isoformat()}]),
)
continuations = st.builds(
    lambda kind, payment, key, amount: Ask(
        kind, payment, key, {} if amount is None or kind == "void" else {"amount_minor": amount}
    ),
    st.sampled_from(["capture", "capture", "void", "refund", "refund"]),
    payment_ids,
    keys,
    st.one_of(st.none(), amounts),
)
invalid = st.builds(
    lambda payment, key: Ask("charge", payment, key, {"amount_minor": -1}), payment_ids, st.sampled_from([*KEYS, ""])
)
commands = st.one_of(continuations, continuations, continuations, continuations, openings, invalid)


class PaymentMachine(RuleBasedStateMachine):
    """Subclasses provide the shell by the method `new_shell`; `machine_of` sets the gateway."""

    new_shell: Callable[..., Shell]
    gateway: ClassVar[str]
    reasons: ClassVar[Counter[str]]
    """How often commands were refused for each reason, over all schedules."""

    def __init__(self) -> None:
        super().__init__()
        self.capabilities = GATEWAYS[self.gateway]
        self.tender = Tender.of(self.capabilities)
        self.shell = self.new_shell(_rules(self.gateway))
        self.provider = Provider(self.capabilities)
        self.flights: list[Flight] = []
        self.ghosts: list[GatewayRequest] = []
        self.deliveries: Counter[str] = Counter()
        self.sent: list[Delivery] = []
        self.asked: dict[str | None, AnyCommand] = {}

    # --- commands ---------------------------------------------------------------------------------------------------

    @initialize(ask=openings, verdict=st.one_of(st.none(), st.just("success")))
    def a_payment_is_opened(self, ask: Ask, verdict: str | None) -> None:
        """Most faults can show only on a payment, and many only on one with money."""
        self.commands_arrive([ask])
        if verdict and self.flights:
            self.a_call_is_answered(0, verdict)

    @rule(asks=st.lists(commands, min_size=1, max_size=4))
    def commands_arrive(self, asks: list[Ask]) -> None:
        self._deliver([delivery(ask.kind, ask.payment_id, ask.key, **self.tender.fields(ask)) for ask in asks])

    @precondition(lambda self: self.sent)
    @rule(which=somewhere, times=st.integers(1, 3))
    def a_command_arrives_again(self, which: int, times: int) -> None:
        self._deliver([self.sent[which % len(self.sent)]] * times)

    def _deliver(self, deliveries: list[Delivery]) -> None:
        self.sent += deliveries
        for each in deliveries:
            self.asked.setdefault(each.command.idempotency_key, each.command)
        self.deliveries.update(each.command.idempotency_key for each in deliveries if each.command.idempotency_key)
        self._take_off(self.shell.apply(list(deliveries)))

    def _take_off(self, requests: list[GatewayRequest]) -> None:
        self.flights += [Flight(request) for request in requests]

    # --- gateway calls ----------------------------------------------------------------------------------------------

    @precondition(lambda self: self.flights)
    @rule(which=somewhere, verdict=verdicts)
    def the_provider_executes_a_call(self, which: int, verdict: str) -> None:
        flight = self._flight(which)
        assume(flight.answer is None or self.capabilities.idempotency_retention)
        flight.answer = self._call(flight, verdict)

    @precondition(lambda self: self.flights)
    @rule(which=somewhere, verdict=verdicts)
    def a_call_is_answered(self, which: int, verdict: str) -> None:
        flight = self._flight(which)
        self._land(flight, flight.answer or self._call(flight, verdict))

    @precondition(lambda self: self.provider.said)
    @rule(which=somewhere, times=st.integers(1, 3), is_ripe=st.booleans())
    def a_webhook_arrives(self, which: int, times: int, is_ripe: bool) -> None:
        """The webhook may come before or after the answer, late, repeatedly, or long outdated."""
        request, outcome = self.provider.said[which % len(self.provider.said)]
        ripe = is_ripe and isinstance(outcome, RequiresAction)
        told = None if ripe else outcome
        notice = Notice(self.gateway, "", "", request.payment_id, request.operation_number, outcome=told, is_ripe=ripe)
        self._take_off(self.shell.apply([Notified(None, request.payment_id, notice)] * times))

    @precondition(lambda self: self.provider.movable)
    @rule(which=somewhere, percent=percents, key=st.one_of(st.none(), keys))
    def somebody_acts_in_the_providers_pages(self, which: int, percent: int, key: str | None) -> None:
        """With a key, a command of ours comes at the same time. The webhook comes at once, and perhaps again later."""
        payment_id, kind = self.provider.movable[which % len(self.provider.movable)]
        if key is not None:
            self._deliver([delivery(str(kind), payment_id, key)])
        self.provider.move_externally(payment_id, kind, percent)
        self.a_webhook_without_a_mark_arrives(len(self.provider.external) - 1, 1)

    @precondition(lambda self: self.provider.movable)
    @rule(which=somewhere, key=keys, percent=percents, times=st.integers(1, 3))
    def our_own_is_told_without_its_mark_before_it_is_answered(
        self, which: int, key: str, percent: int, times: int
    ) -> None:
        payment_id, kind = self.provider.movable[which % len(self.provider.movable)]
        amount = max(1, self.provider.left(payment_id, kind) * percent // 100)
        self._deliver([delivery(str(kind), payment_id, key, amount_minor=amount)])
        for flight in [each for each in self.flights if each.request.kind in MOVEMENTS and each.answer is None]:
            flight.answer = self._call(flight, "success")
            if isinstance(flight.answer, Succeeded):
                self._hear_unmarked(flight.request, flight.answer, times)

    @precondition(lambda self: self.provider.external)
    @rule(which=somewhere, times=st.integers(1, 3))
    def a_webhook_without_a_mark_arrives(self, which: int, times: int) -> None:
        moved = self.provider.external[which % len(self.provider.external)]
        self._hear_unmarked(moved, Succeeded(moved.reference, moved.amount_minor), times)

    @precondition(lambda self: self.provider.executed(*MOVEMENTS))
    @rule(which=somewhere, times=st.integers(1, 3))
    def our_own_is_told_without_its_mark(self, which: int, times: int) -> None:
        executed = self.provider.executed(*MOVEMENTS)
        self._hear_unmarked(*executed[which % len(executed)], times)

    def _hear_unmarked(self, moved: Movement | GatewayRequest, outcome: Succeeded, times: int) -> None:
        payment_id = moved.payment_id
        told = Notice(self.gateway, "", "", payment_id, outcome=outcome)
        external = External(moved.kind, outcome.amount_minor or 0, self.shell.now)
        told = told._replace(gateway_payment_id=self.provider.opened(payment_id), external=external)
        self._take_off(self.shell.apply([Notified(None, payment_id, told)] * times))

    @rule(asks=st.lists(continuations, min_size=1, max_size=3))
    def commands_get_through(self, asks: list[Ask]) -> None:
        """Successful commands bring a payment into states in which more can go wrong."""
        self.commands_arrive(asks)
        self._get_through()

    @rule(which=somewhere, key=keys, percent=st.sampled_from([1, 50, 99]))
    def a_part_of_a_hold_is_taken(self, which: int, key: str, percent: int) -> None:
        held = [each for each in self.shell.found_payments().values() if each.capturable_minor > 1]
        assume(held)
        chosen = held[which % len(held)]
        amount = max(1, chosen.capturable_minor * percent // 100)
        self._deliver([delivery("capture", chosen.payment_id, key, amount_minor=amount)])
        self._get_through()

    @rule(which=somewhere, key=keys)
    def what_waits_for_its_payer_is_voided(self, which: int, key: str) -> None:
        waiting = [each for each in self.shell.found_payments().values() if each.waiting_for_payer]
        assume(waiting)
        self._deliver([delivery("void", waiting[which % len(waiting)].payment_id, key)])

    def _get_through(self) -> None:
        for _ in range(6):
            if self.flights:
                self.a_call_is_answered(0, "success")

    @precondition(lambda self: self.flights)
    @rule(which=somewhere)
    def an_answer_gets_lost(self, which: int) -> None:
        flight = self._flight(which)
        self._haunt(flight)
        self._land(flight, Unknown("timeout"))

    @precondition(lambda self: self.flights)
    @rule(which=somewhere)
    def the_provider_cannot_be_reached(self, which: int) -> None:
        flight = self._flight(which)
        assume(flight.answer is None)
        self._land(flight, Unreachable("connection refused"))

    @precondition(lambda self: self.flights)
    @rule(which=somewhere, was_sent=st.booleans())
    def a_worker_dies(self, which: int, was_sent: bool) -> None:
        flight = self._flight(which)
        self.flights.remove(flight)
        if was_sent:
            self._haunt(flight)

    @precondition(lambda self: self.ghosts)
    @rule(which=somewhere, verdict=verdicts)
    def a_call_that_nobody_waits_for_arrives(self, which: int, verdict: str) -> None:
        self.provider.receive(self.ghosts.pop(which % len(self.ghosts)), verdict)

    @precondition(lambda self: self.provider.unresolved)
    @rule(which=somewhere, is_success=st.booleans())
    def the_provider_makes_up_its_mind(self, which: int, is_success: bool) -> None:
        unresolved = self.provider.unresolved
        self.provider.resolve(unresolved[which % len(unresolved)], is_success=is_success)

    @rule(which=somewhere)
    def a_sweep_takes_over(self, which: int) -> None:
        """The old worker may be alive: it only seemed dead, and will answer late."""
        due = [each for each in self.shell.operations() if each.is_under_way]
        assume(due)
        chosen = due[which % len(due)]
        self._take_off(self.shell.claim(chosen.payment_id, chosen.number))

    @rule(minutes=st.sampled_from([1, 20, 90]))
    def time_passes(self, minutes: int) -> None:
        self.shell.pass_time(timedelta(minutes=minutes))

    def _flight(self, which: int) -> Flight:
        return self.flights[which % len(self.flights)]

    def _call(self, flight: Flight, verdict: str) -> Outcome:
        """Do as the dispatcher does: call, or only query where a call could move money again."""
        if self._is_question(flight.request):
            return self.provider.tell(flight.request)
        return self.provider.receive(flight.request, verdict)

    def _haunt(self, flight: Flight) -> None:
        """Let a call that was sent arrive later. A query leaves nothing behind."""
        if flight.answer is None and not self._is_question(flight.request):
            self.ghosts.append(flight.request)

    def _is_question(self, request: GatewayRequest) -> bool:
        retention, began = self.capabilities.idempotency_retention, request.first_dispatched_at
        assert began is not None, "a dispatched operation has a time"
        if request.state in WITH_THE_PROVIDER or (retention and self.shell.now - began > retention):
            return True
        if request.state is OperationState.NEEDS_REVIEW and request.reference is not None:
            return True
        return not retention and request.state is not OperationState.DISPATCHED

    def _land(self, flight: Flight, outcome: Outcome) -> None:
        self.flights.remove(flight)
        request = flight.request
        given = Answer(request.payment_id, request.operation_number, request.lease_token, outcome)
        held = {(each.payment_id, each.number): each.lease_token for each in self.shell.operations() if each.is_open}
        token = held.get((request.payment_id, request.operation_number))
        # A report that money moved counts whoever holds the lease; it is late only once the operation has ended.
        has_moved = isinstance(outcome, Succeeded) and request.kind is not OperationKind.VOID
        is_late = token is None if has_moved else token != request.lease_token
        before = (self.shell.told(), self.shell.operations()) if is_late else None
        self._take_off(self.shell.apply([given]))
        assert before in (None, (self.shell.told(), self.shell.operations())), "a late answer changed something"
        open_now = {(each.payment_id, each.number): each.state for each in self.shell.operations() if each.is_open}
        state = open_now.get((request.payment_id, request.operation_number))
        assert not has_moved or state in (None, OperationState.NEEDS_REVIEW), "the provider's word was lost"

    # --- what always holds ------------------------------------------------------------------------------------------

    @invariant()
    def amounts_are_within_bounds_and_equal_to_the_ledger(self) -> None:
        transfers = self.shell.transfers()
        for payment_id, payment in self.shell.found_payments().items():
            assert payment.capturable_minor >= 0
            assert payment.refundable_minor >= 0
            own = [each for each in transfers if each.payment_id == payment_id]
            taken = sum(each.amount_minor for each in own if each.debit == Account.GATEWAY_CLEARING)
            returned = sum(each.amount_minor for each in own if each.credit == Account.GATEWAY_CLEARING)
            assert (taken, returned) == (payment.captured_minor, payment.refunded_minor)

    @invariant()
    def one_operation_of_a_payment_is_under_way_and_none_waits_for_nothing(self) -> None:
        for payment in self.shell.found_payments().values():
            under_way = [each for each in payment.operations if each.is_under_way]
            assert [each.kind for each in under_way[1:]] in ([], [OperationKind.VOID]), "only a void may join another"
            assert under_way or not payment.operations
            numbers = [each.number for each in payment.operations]
            assert numbers == sorted(numbers)
            if under_way and under_way[0].kind is not OperationKind.VOID:
                assert under_way[0].number == numbers[0], "overtaken"

    @invariant()
    def events_are_gap_free(self) -> None:
        for payment_id, payment in self.shell.found_payments().items():
            own = [told for told in self.shell.told() if told.payment_id == payment_id and not told.replayed]
            assert [told.payment_seq for told in own] == list(range(1, payment.last_seq + 1))

    @invariant()
    def every_command_that_ended_has_one_result_and_each_delivery_its_answer(self) -> None:
        told = self.shell.told()
        first = Counter((each.payment_id, each.operation_number) for each in told if _is_first_result(each))
        answers = Counter(each.idempotency_key for each in told if each.is_final)
        open_keys = set()
        for operation in self.shell.operations():
            if operation.is_external:
                continue
            assert first[operation.payment_id, operation.number] == (not operation.is_open)
            if operation.is_open:
                open_keys.add(operation.idempotency_key)
        for key, count in self.deliveries.items():
            if key not in open_keys:
                assert answers[key] == count

    @invariant()
    def no_end_contradicts_the_provider(self) -> None:
        for operation in self.shell.operations():
            has_moved = (
                operation.reference if operation.is_external else operation.provider_key
            ) in self.provider.moved
            if operation.state is OperationState.SUCCEEDED:
                assert has_moved, "a success without an effect"
            if operation.state in WITHOUT_EFFECT and has_moved:
                # A hold that was made while it was being cancelled, and released by that, moved nothing in total.
                is_released = operation.kind is OperationKind.AUTHORIZE and self._is_released(operation.payment_id)
                assert is_released, f"{operation.state}, but money has moved"

    def _is_released(self, payment_id: UUID) -> bool:
        held = self.provider.total(payment_id, OperationKind.AUTHORIZE)
        return held == self.provider.total(payment_id, OperationKind.VOID)

    def what_the_gateway_cannot_do_was_refused_for_that_reason(self) -> None:
        payments = self.shell.found_payments()
        for told in self.shell.told():
            command = self.asked.get(told.idempotency_key)
            if told.operation_number is None or told.reason is None or not isinstance(command, Command):
                continue
            self.reasons[told.reason] += 1
            if self._is_impossible(command):
                assert told.reason in (UNSUPPORTED, *EARLIER_REASONS), f"{command.kind} was refused as {told.reason}"
            elif told.reason == UNSUPPORTED:
                assert self._is_impossible_part(command, payments[told.payment_id]), f"it can do {command}"

    def _is_impossible(self, command: Command) -> bool:
        is_foreign = command.currency is not None and command.currency not in self.capabilities.currencies
        return is_foreign or command.kind not in self.capabilities.operations

    def _is_impossible_part(self, command: Command, payment: Payment) -> bool:
        if command.kind is OperationKind.CAPTURE:
            whole, is_divisible = payment.authorized_minor, self.capabilities.partial_capture
        else:
            whole, is_divisible = payment.captured_minor, self.capabilities.partial_refund
        return not is_divisible and command.amount_minor is not None and command.amount_minor < whole

    def _everything_arrives(self) -> None:
        for request in self.ghosts:
            self.provider.receive(request, "success")
        for flight in self.flights:
            flight.answer = flight.answer or self._call(flight, "success")
        self.provider.is_sure = True

    def teardown(self) -> None:
        """Let everything get through in the end, and check that the books agree."""
        self._everything_arrives()
        for _ in range(200):
            for key in self.provider.unresolved:
                self.provider.resolve(key, is_success=True)
            while self.flights:
                self.a_call_is_answered(0, "success")
            under_way = [each for each in self.shell.operations() if each.is_under_way]
            if not under_way:
                break
            for operation in under_way:
                self._take_off(self.shell.claim(operation.payment_id, operation.number))
        assert not [each for each in self.shell.operations() if each.is_open], "an operation without an end"
        for number in 2 * list(range(len(self.provider.external))):  # Postponed webhooks are sent again.
            self.a_webhook_without_a_mark_arrives(number, 2)
        self.amounts_are_within_bounds_and_equal_to_the_ledger()
        self.events_are_gap_free()
        self.every_command_that_ended_has_one_result_and_each_delivery_its_answer()
        self.no_end_contradicts_the_provider()
        self.what_the_gateway_cannot_do_was_refused_for_that_reason()
        for payment_id, payment in self.shell.found_payments().items():
            taken = self.provider.total(payment_id, OperationKind.CHARGE, OperationKind.CAPTURE)
            assert payment.captured_minor == taken
            assert payment.refunded_minor == self.provider.total(payment_id, OperationKind.REFUND)
            is_told = bool(payment.authorized_minor) or not self._is_released(payment_id)
            assert not is_told or payment.released_minor == self.provider.released(payment_id)


def _is_first_result(told: Told) -> bool:
    return told.is_final and not told.replayed and told.operation_number is not None


def _never_taken(capabilities: Capabilities) -> set[str]:
    return set(MINOR_UNITS) - capabilities.currencies


def _lacks_something(capabilities: Capabilities) -> bool:
    is_divisible = capabilities.partial_capture and capabilities.partial_refund
    return not is_divisible or len(capabilities.operations) < len(OperationKind) or bool(_never_taken(capabilities))


def _rules(gateway: str) -> Rules:
    return rules(RetryPolicy(), gateways={gateway: GATEWAYS[gateway]}, default_gateway=gateway)


def machine_of(machine: type[PaymentMachine], gateway: str) -> type[PaymentMachine]:
    """A subclass of this machine for this gateway, with its own counts."""
    return type(f"{gateway}{machine.__name__}", (machine,), {"gateway": gateway, "reasons": Counter()})


def run_schedules(machine: type[PaymentMachine], *, schedules: int, steps: int) -> None:
    """Run random schedules. If the gateway lacks a capability, some command must have been refused for that reason."""
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=schedules,
            stateful_step_count=steps,
            deadline=None,
            phases=[Phase.explicit, Phase.generate],
            suppress_health_check=list(HealthCheck),
        ),
    )
    is_refused = machine.reasons[UNSUPPORTED] > 0
    assert is_refused == _lacks_something(GATEWAYS[machine.gateway]), dict(machine.reasons)


def schedules_asked_for(default: int) -> int:
    """The number of schedules for each gateway: PAYMENTS_TEST_SCHEDULES, or the default."""
    return int(os.environ.get("PAYMENTS_TEST_SCHEDULES", default))
