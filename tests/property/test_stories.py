"""Random stories: in whatever order things happen, our books match the provider's in the end, and nothing moves twice.

The provider executes each key once. Answers get lost before or after execution, and its webhooks come in any order and
more than once. Payers act or do not, attempts that were reported as declined are paid after all, and holds end by
themselves.
"""

import os
import random
from dataclasses import dataclass, field, replace
from datetime import timedelta

import pytest

from domain.commands import OperationKind
from domain.decision import Answer
from domain.operations import (
    Declined,
    DeclineReason,
    Expired,
    GatewayRequest,
    Operation,
    OperationState,
    Outcome,
    RequiresAction,
    Succeeded,
    Unknown,
    Unreachable,
)
from tests.support.provider import CAPABILITIES
from tests.support.service import QUICK_RETRY, rules
from tests.support.story import Story

STORIES = int(os.environ.get("PAYMENTS_TEST_STORIES", "4000"))
STEPS = 60
CANCELED = DeclineReason.CANCELED


@dataclass
class Attempt:
    """The provider's record of an authorization or charge; `state` is waiting, paid, declined, expired or canceled."""

    number: int
    kind: OperationKind
    amount: int
    state: str
    held: int = 0
    captured: int = 0
    refunded: int = 0

    @property
    def reference(self) -> str:
        return f"ref_{self.number}"

    def pay(self) -> None:
        self.state = "paid"
        if self.kind is OperationKind.AUTHORIZE:
            self.held = self.amount
        else:
            self.captured = self.amount

    @property
    def outcome(self) -> Outcome:
        """The provider's answer to a query about the attempt."""
        match self.state:
            case "waiting":
                return RequiresAction(self.reference, "redirect")
            case "paid":
                return Succeeded(self.reference, self.amount)
            case "expired":
                return Expired(self.reference)
            case "canceled":
                return Declined(CANCELED, None, self.reference)
            case _:
                return Declined(DeclineReason.OTHER, None, self.reference)


@dataclass
class Provider:
    """The provider's books, and the webhooks that have not been taken yet."""

    chance: random.Random
    multi_capture: bool
    attempts: dict[str, Attempt] = field(default_factory=dict)
    done: dict[str, Outcome] = field(default_factory=dict)
    messages: list[tuple[int, Outcome]] = field(default_factory=list)
    asked: dict[str, tuple[object, ...]] = field(default_factory=dict)
    refunds: list[tuple[GatewayRequest, Attempt]] = field(default_factory=list)

    def execute(self, request: GatewayRequest) -> Outcome:
        """Execute a request, once per key."""
        wanted = (request.kind, request.amount, request.gateway_payment_id)
        assert self.asked.setdefault(request.provider_key, wanted) == wanted, "asked again for something else"
        if request.kind in (OperationKind.AUTHORIZE, OperationKind.CHARGE):
            return self._open(request).outcome
        if request.provider_key not in self.done:
            outcome = self.done[request.provider_key] = self._act(
                request, self.attempts[request.gateway_payment_id or ""]
            )
            self.tell(request.operation_number, outcome)
        return self.done[request.provider_key]

    def _open(self, request: GatewayRequest) -> Attempt:
        reference = f"ref_{request.operation_number}"
        if reference not in self.attempts:
            state = self.chance.choice(["paid", "waiting", "waiting", "declined"])
            attempt = Attempt(request.operation_number, request.kind, request.amount.minor, state)
            self.attempts[reference] = attempt
            if state == "paid":
                attempt.pay()
            if state != "waiting":
                self.tell(attempt.number, attempt.outcome)
        return self.attempts[reference]

    def _act(self, request: GatewayRequest, attempt: Attempt) -> Outcome:
        amount, own = request.amount.minor, f"ref_{request.operation_number}"
        match request.kind:
            case OperationKind.CAPTURE if attempt.held >= amount:
                attempt.held -= amount
                attempt.captured += amount
                if request.is_final or not self.multi_capture:
                    attempt.held = 0
                return Succeeded(own, amount)
            case OperationKind.REFUND if attempt.captured - attempt.refunded >= amount:
                attempt.refunded += amount
                self.refunds.append((request, attempt))
                return Succeeded(own, amount)
            case OperationKind.VOID if attempt.held or not attempt.captured:
                self._cancel(attempt)
                return Succeeded(attempt.reference)
            case _:
                return Declined(DeclineReason.OTHER, None, own)

    def _cancel(self, attempt: Attempt) -> None:
        """Cancel for good: the attempt cannot be paid any more, whatever its state was."""
        attempt.state, attempt.held = "canceled", 0
        self.tell(attempt.number, attempt.outcome)

    def tell(self, number: int, outcome: Outcome) -> None:
        self.messages += [(number, outcome)] * self.chance.choice([1, 1, 2])

    def fail_refund(self) -> None:
        """Let a refund that was reported as done fail, for good."""
        if self.refunds:
            request, attempt = self.refunds.pop()
            attempt.refunded -= request.amount.minor
            failed = Declined(DeclineReason.REFUND_FAILED, None, f"ref_{request.operation_number}")
            self.done[request.provider_key] = failed
            self.tell(request.operation_number, failed)

    def goes_on(self, attempt: Attempt) -> None:
        """Let the payer act, or time pass."""
        if attempt.state == "waiting":
            attempt.state = self.chance.choice(["paid", "declined", "expired"])
        elif self._may_be_paid_late(attempt) and self.chance.random() < 0.3:
            attempt.state = "paid"
        elif attempt.held and self.chance.random() < 0.3:
            attempt.state, attempt.held = "expired", 0
        else:
            return
        if attempt.state == "paid":
            attempt.pay()
        self.tell(attempt.number, attempt.outcome)

    def _may_be_paid_late(self, attempt: Attempt) -> bool:
        # An expired authorization holds nothing: a success that is heard later happened before it expired.
        return attempt.state == "declined" or (attempt.state == "expired" and attempt.kind is OperationKind.CHARGE)


class Chance:
    """One story, chosen by a random number generator."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        capabilities = replace(CAPABILITIES, multi_capture=bool(seed % 2))
        retry = replace(QUICK_RETRY, review_after=timedelta(days=9), give_up_after=timedelta(days=9))
        self.told = Story(rules(retry, gateways={"books": capabilities}))
        self.provider = Provider(self.chance, capabilities.multi_capture)
        self.begun = 0
        self.calls: list[GatewayRequest] = []
        self.sent: list[tuple[str, str, dict[str, int]]] = []

    def tell(self) -> None:
        steps = [self._send, self._answer, self._answer, self._claim, self._hear, self._hear, self._happen]
        for _ in range(STEPS):
            self.chance.choice(steps)()
        self._come_to_rest()

    def _send(self) -> None:
        """Send a new command, or one of the last ones again."""
        if not self.sent or self.chance.random() < 0.8:
            kind = self.chance.choice(["charge", "authorize", "authorize", "capture", "void", "refund"])
            amount = (
                {"amount_minor": self.chance.choice([3_000, 7_000, 10_000])} if kind in {"capture", "refund"} else {}
            )
            self.sent.append((kind, f"key-{len(self.sent)}", amount))
        kind, key, amount = self.chance.choice(self.sent[-3:])
        self.told.send(kind, key, **amount)

    def _claim(self) -> None:
        """Let the sweep take over a due operation, even from a worker whose call outlasts its lease."""
        if any(each.is_under_way and each.due_at is not None for each in self._operations):
            self.told.claim()

    def _answer(self, *, is_sure: bool = False) -> None:
        """End one of the workers' calls, not always the oldest."""
        self.calls += self.told.requests[self.begun :]
        self.begun = len(self.told.requests)
        if not self.calls:
            return
        request = self.calls.pop(self.chance.randrange(len(self.calls)))
        luck = 1.0 if is_sure else self.chance.random()
        if luck < 0.15:
            outcome: Outcome = Unreachable()
        else:
            outcome = self.provider.execute(request) if luck > 0.25 else Unknown()
            outcome = Unknown() if luck < 0.4 else outcome
        self.told.give(Answer(self.told.payment_id, request.operation_number, request.lease_token, outcome))

    @property
    def _operations(self) -> tuple[Operation, ...]:
        return self.told.payment.operations if self.told.payment else ()

    def _hear(self) -> None:
        messages = self.provider.messages
        if messages:
            number, outcome = messages.pop(self.chance.randrange(len(messages)))
            if self.told.hear(outcome, number).is_postponed:
                messages.append((number, outcome))

    def _happen(self) -> None:
        if self.chance.random() < 0.1:
            self.provider.fail_refund()
        elif self.provider.attempts:
            self.provider.goes_on(self.chance.choice(list(self.provider.attempts.values())))

    def _come_to_rest(self) -> None:
        """Let every payer finish, every webhook arrive and every query be answered."""
        for _ in range(1000):
            for attempt in self.provider.attempts.values():
                if attempt.state == "waiting":
                    self.provider.goes_on(attempt)
            if self.provider.messages:
                self._hear()
            elif self.calls or self.begun < len(self.told.requests):
                self._answer(is_sure=True)
            elif any(each.is_under_way for each in self._operations):
                self._claim()
            elif not self._ask_about_holds():
                return
        raise AssertionError("it comes to no rest")

    def _ask_about_holds(self) -> bool:
        """Query all holds; return whether any answer was news."""
        count = len(self.told.events)
        for number, operation in sorted(self.told.operations.items()):
            if operation.kind is OperationKind.AUTHORIZE and operation.state is OperationState.SUCCEEDED:
                self.told.learn(self.provider.attempts[f"ref_{number}"].outcome, number)
        return len(self.told.events) > count

    def check(self) -> None:
        attempts = self.provider.attempts.values()
        authorized, captured, released, refunded = self.told.amounts()
        ours = {"held": authorized - captured - released, "captured": captured, "refunded": refunded}
        theirs = {name: sum(getattr(each, name) for each in attempts) for name in ours}
        assert ours == theirs
        assert not any(each.is_open for each in self.told.operations.values())


@pytest.mark.parametrize("part", range(4))
def test_whatever_happens_in_the_end_our_books_are_the_providers(part: int) -> None:
    for seed in range(part, STORIES, 4):
        story = Chance(seed)
        try:
            story.tell()
            if story.told.payment is not None:
                story.check()
        except Exception as error:
            raise AssertionError(f"story {seed}: {story.told.kinds}") from error
