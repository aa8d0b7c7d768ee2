"""A state machine of deliveries, answers, crashes and clocks around a provider with its own books.

It drives a shell: `decide` in memory, or the write path on Postgres. The provider honours idempotency keys, its answers
get lost, requests that nobody waits for any more still arrive, and workers that were given up for dead still answer.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, NamedTuple, Protocol
from uuid import UUID

from hypothesis import assume
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from domain.commands import OperationKind
from domain.decision import Answer, Delivery, Input, Notified
from domain.ledger import Account, Transfer
from domain.notices import Notice
from domain.operations import (
    Declined,
    DeclineReason,
    GatewayRequest,
    NotExecuted,
    Operation,
    OperationState,
    Outcome,
    Pending,
    RequiresAction,
    Succeeded,
    Unknown,
    Unreachable,
)
from domain.payment import Payment
from handlers.dispatch import WITH_THE_PROVIDER
from tests.support.memory import START, Told
from tests.support.service import delivery

PAYMENTS = (UUID(int=1 << 64), UUID(int=2 << 64))
KEYS = tuple(f"key-{number}" for number in range(60))
WITHOUT_EFFECT = (OperationState.REJECTED, OperationState.DECLINED, OperationState.NOT_EXECUTED)


class Shell(Protocol):
    """What keeps the payments."""

    def apply(self, inputs: list[Input]) -> list[GatewayRequest]: ...
    def claim(self, payment_id: UUID, number: int) -> list[GatewayRequest]: ...
    def pass_time(self, duration: timedelta) -> None: ...
    def operations(self) -> list[Operation]: ...
    def told(self) -> list[Told]: ...
    def transfers(self) -> list[Transfer]: ...
    def found_payments(self) -> dict[UUID, Payment]: ...


class Provider:
    """Executes each key at most once. It refuses to move what it does not have: asking for that fails the test."""

    def __init__(self) -> None:
        self.known: dict[str, Outcome] = {}
        self.moved: dict[str, tuple[OperationKind, UUID, int]] = {}
        self.said: list[tuple[GatewayRequest, Outcome]] = []
        """All that it has ever told, as webhooks repeat it: at any time, in any order, any number of times."""
        self._asked: dict[str, GatewayRequest] = {}

    def receive(self, request: GatewayRequest, verdict: str) -> Outcome:
        """A call arrives. Repeated keys get the first answer, whatever the verdict."""
        key = request.provider_key
        if request.state in WITH_THE_PROVIDER:
            return self.known.get(key, Unknown("no trace of it"))
        self._must_be_the_same(request)
        if key not in self.known:
            self._know(request, self._decide(request, verdict))
        return self.known[key]

    def _know(self, request: GatewayRequest, outcome: Outcome) -> None:
        self.known[request.provider_key] = outcome
        if isinstance(outcome, Succeeded | Declined | RequiresAction | Pending):
            self.said.append((request, outcome))

    def resolve(self, key: str, *, is_success: bool) -> None:
        """What was pending, or was answered with a wrong amount, has its end."""
        request, reference = self._asked[key], f"ref-{key}"
        if is_success or key in self.moved:
            self._know(request, self._execute(request) if key not in self.moved else self._success(request))
        else:
            self._know(request, Declined(DeclineReason.OTHER, reference=reference))

    @property
    def unresolved(self) -> list[str]:
        """Keys whose answer is not yet the last word."""
        return [key for key, outcome in self.known.items() if not self._is_last_word(key, outcome)]

    def total(self, payment_id: UUID, *kinds: OperationKind) -> int:
        """What operations of these kinds really moved."""
        return sum(amount for kind, of, amount in self.moved.values() if of == payment_id and kind in kinds)

    def _is_last_word(self, key: str, outcome: Outcome) -> bool:
        if isinstance(outcome, Succeeded):
            return outcome.amount_minor == self._asked[key].amount.minor
        return isinstance(outcome, Declined | NotExecuted)

    def _must_be_the_same(self, request: GatewayRequest) -> None:
        """A repeated key with other parameters is an error at every provider."""
        plain = request._replace(state=OperationState.DISPATCHED, attempts=1, lease_token=1, reference=None)
        plain = plain._replace(first_dispatched_at=None)
        assert self._asked.setdefault(request.provider_key, plain) == plain, "same key, other request"

    def _decide(self, request: GatewayRequest, verdict: str) -> Outcome:
        reference, amount = f"ref-{request.provider_key}", request.amount.minor
        is_opening = request.kind in (OperationKind.AUTHORIZE, OperationKind.CHARGE)
        match verdict:
            case "decline":
                return Declined(DeclineReason.REFUSED_BY_ISSUER, "do_not_honor", reference)
            case "refuse":
                return NotExecuted("a parameter was refused")
            case "action" if is_opening:
                return RequiresAction(reference, "redirect_to_url", "https://bank.example")
            case "pending" | "action":
                return Pending(reference)
            case _:
                outcome = self._execute(request)
                is_lie = verdict == "other amount" and isinstance(outcome, Succeeded)
                return Succeeded(reference, amount + 1) if is_lie else outcome

    def _execute(self, request: GatewayRequest) -> Outcome:
        """Do it, once. A void of what waits for its payer ends that, and there is nothing to release."""
        held = self.total(request.payment_id, OperationKind.AUTHORIZE, OperationKind.CHARGE)
        if request.kind is OperationKind.VOID and not held:
            self._cancel_opening(request.payment_id)
            self.moved[request.provider_key] = (request.kind, request.payment_id, 0)
        elif request.kind is OperationKind.VOID and self.total(request.payment_id, OperationKind.CHARGE):
            return NotExecuted("it is paid")
        else:
            self._move(request)
        return self._success(request)

    def _success(self, request: GatewayRequest) -> Outcome:
        return Succeeded(f"ref-{request.provider_key}", request.amount.minor)

    def _cancel_opening(self, payment_id: UUID) -> None:
        for key, request in self._asked.items():
            if request.payment_id == payment_id and _is_opening(request.kind) and key not in self.moved:
                self._know(request, Declined(DeclineReason.CANCELED, reference=f"ref-{key}"))

    def _move(self, request: GatewayRequest) -> None:
        self.moved[request.provider_key] = (request.kind, request.payment_id, request.amount.minor)
        held = self.total(request.payment_id, OperationKind.AUTHORIZE, OperationKind.CHARGE)
        taken = self.total(request.payment_id, OperationKind.CAPTURE, OperationKind.CHARGE)
        assert held >= taken + self.total(request.payment_id, OperationKind.VOID), "captured more than was held"
        assert taken >= self.total(request.payment_id, OperationKind.REFUND), "refunded more than was captured"
        openings = [kind for kind, of, _ in self.moved.values() if of == request.payment_id and _is_opening(kind)]
        assert len(openings) <= 1, "charged twice"


def _is_opening(kind: OperationKind) -> bool:
    return kind in (OperationKind.AUTHORIZE, OperationKind.CHARGE)


@dataclass
class Flight:
    """A gateway call of a worker; `answer` is on its way back once the provider has executed the call."""

    request: GatewayRequest
    answer: Outcome | None = field(default=None)


class Ask(NamedTuple):
    """What a command asks for."""

    kind: str
    payment_id: UUID
    key: str
    fields: dict[str, Any]


amounts = st.sampled_from([1, 20, 40, 60, 100])
verdicts = st.sampled_from([*["success"] * 6, "decline", "refuse", "pending", "action", "other amount"])
payment_ids = st.sampled_from((*PAYMENTS[:1] * 3, *PAYMENTS[1:]))
keys = st.sampled_from(KEYS)
somewhere = st.integers(0, 1000)
openings = st.builds(
    lambda kind, payment, key, amount, currency, expiry: Ask(
        kind, payment, key, {"amount_minor": amount, "currency": currency} | expiry
    ),
    st.sampled_from(["authorize", "charge"]),
    payment_ids,
    keys,
    amounts,
    st.sampled_from(["USD", "USD", "USD", "EUR"]),
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
    """Subclasses say, as the method `new_shell`, which shell keeps the payments."""

    new_shell: Callable[..., Shell]

    def __init__(self) -> None:
        super().__init__()
        self.shell = self.new_shell()
        self.provider = Provider()
        self.flights: list[Flight] = []
        self.ghosts: list[GatewayRequest] = []
        self.deliveries: Counter[str] = Counter()
        self.sent: list[Delivery] = []

    # --- commands ---------------------------------------------------------------------------------------------------

    @initialize(ask=openings, verdict=st.one_of(st.none(), st.just("success")))
    def a_payment_is_opened(self, ask: Ask, verdict: str | None) -> None:
        """Most of what may go wrong needs a payment, and often one that has money."""
        self.commands_arrive([ask])
        if verdict and self.flights:
            self.a_call_is_answered(0, verdict)

    @rule(asks=st.lists(commands, min_size=1, max_size=4))
    def commands_arrive(self, asks: list[Ask]) -> None:
        self._deliver([delivery(ask.kind, ask.payment_id, ask.key, **ask.fields) for ask in asks])

    @precondition(lambda self: self.sent)
    @rule(which=somewhere, times=st.integers(1, 3))
    def a_command_arrives_again(self, which: int, times: int) -> None:
        self._deliver([self.sent[which % len(self.sent)]] * times)

    def _deliver(self, deliveries: list[Delivery]) -> None:
        self.sent += deliveries
        self.deliveries.update(each.command.idempotency_key for each in deliveries if each.command.idempotency_key)
        self._take_off(self.shell.apply(list(deliveries)))

    def _take_off(self, requests: list[GatewayRequest]) -> None:
        self.flights += [Flight(request) for request in requests]

    # --- gateway calls ----------------------------------------------------------------------------------------------

    @precondition(lambda self: self.flights)
    @rule(which=somewhere, verdict=verdicts)
    def the_provider_executes_a_call(self, which: int, verdict: str) -> None:
        flight = self._flight(which)
        flight.answer = self.provider.receive(flight.request, verdict)

    @precondition(lambda self: self.flights)
    @rule(which=somewhere, verdict=verdicts)
    def a_call_is_answered(self, which: int, verdict: str) -> None:
        flight = self._flight(which)
        self._land(flight, flight.answer or self.provider.receive(flight.request, verdict))

    @precondition(lambda self: self.provider.said)
    @rule(which=somewhere, times=st.integers(1, 3), is_ripe=st.booleans())
    def a_webhook_arrives(self, which: int, times: int, is_ripe: bool) -> None:
        """Before or after the answer, late, again, or long outdated."""
        request, outcome = self.provider.said[which % len(self.provider.said)]
        ripe = is_ripe and isinstance(outcome, RequiresAction)
        told = None if ripe else outcome
        notice = Notice("books", "", "", request.payment_id, request.operation_number, outcome=told, is_ripe=ripe)
        self._take_off(self.shell.apply([Notified(None, request.payment_id, notice)] * times))

    @rule(asks=st.lists(continuations, min_size=1, max_size=3))
    def commands_get_through(self, asks: list[Ask]) -> None:
        """What goes well brings a payment to where more may go wrong."""
        self.commands_arrive(asks)
        for _ in range(6):
            if self.flights:
                self.a_call_is_answered(0, "success")

    @precondition(lambda self: self.flights)
    @rule(which=somewhere)
    def an_answer_gets_lost(self, which: int) -> None:
        flight = self._flight(which)
        if flight.answer is None:
            self.ghosts.append(flight.request)
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
        if was_sent and flight.answer is None:
            self.ghosts.append(flight.request)

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
        """Also while the old worker is alive: it only seemed to be dead, and will answer late."""
        due = [each for each in self.shell.operations() if each.is_under_way]
        assume(due)
        chosen = due[which % len(due)]
        self._take_off(self.shell.claim(chosen.payment_id, chosen.number))

    @rule(minutes=st.sampled_from([1, 20, 90]))
    def time_passes(self, minutes: int) -> None:
        self.shell.pass_time(timedelta(minutes=minutes))

    def _flight(self, which: int) -> Flight:
        return self.flights[which % len(self.flights)]

    def _land(self, flight: Flight, outcome: Outcome) -> None:
        self.flights.remove(flight)
        request = flight.request
        given = Answer(request.payment_id, request.operation_number, request.lease_token, outcome)
        held = {(each.payment_id, each.number, each.lease_token) for each in self.shell.operations() if each.is_open}
        is_late = (request.payment_id, request.operation_number, request.lease_token) not in held
        before = (self.shell.told(), self.shell.operations()) if is_late else None
        self._take_off(self.shell.apply([given]))
        assert before in (None, (self.shell.told(), self.shell.operations())), "a late answer changed something"

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
            assert first[operation.payment_id, operation.number] == (not operation.is_open)
            if operation.is_open:
                open_keys.add(operation.idempotency_key)
        for key, count in self.deliveries.items():
            if key not in open_keys:
                assert answers[key] == count

    @invariant()
    def no_end_contradicts_the_provider(self) -> None:
        for operation in self.shell.operations():
            has_moved = operation.provider_key in self.provider.moved
            if operation.state is OperationState.SUCCEEDED:
                assert has_moved, "a success without an effect"
            if operation.state in WITHOUT_EFFECT and has_moved:
                # A hold that came about while it was being cancelled, and was released by that, moved nothing in sum.
                is_released = operation.kind is OperationKind.AUTHORIZE and self._is_released(operation.payment_id)
                assert is_released, f"{operation.state}, but money has moved"

    def _is_released(self, payment_id: UUID) -> bool:
        held = self.provider.total(payment_id, OperationKind.AUTHORIZE)
        return held == self.provider.total(payment_id, OperationKind.VOID)

    def teardown(self) -> None:
        """In the end everything gets through, and the books agree."""
        for request in self.ghosts:
            self.provider.receive(request, "success")
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
        self.amounts_are_within_bounds_and_equal_to_the_ledger()
        self.events_are_gap_free()
        self.every_command_that_ended_has_one_result_and_each_delivery_its_answer()
        self.no_end_contradicts_the_provider()
        for payment_id, payment in self.shell.found_payments().items():
            taken = self.provider.total(payment_id, OperationKind.CHARGE, OperationKind.CAPTURE)
            assert payment.captured_minor == taken
            assert payment.refunded_minor == self.provider.total(payment_id, OperationKind.REFUND)
            is_told = bool(payment.authorized_minor) or not self._is_released(payment_id)
            assert not is_told or payment.released_minor == self.provider.total(payment_id, OperationKind.VOID)


def _is_first_result(told: Told) -> bool:
    return told.is_final and not told.replayed and told.operation_number is not None
