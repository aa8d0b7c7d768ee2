"""Counts the messages sent and the events read, and checks the promises on them. Uses no server and no screen."""

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from math import inf
from uuid import UUID

from app.client import EventBody, Heard, is_final
from app.demo.orders import DELAYED, Planned, Sending


@dataclass(slots=True)
class Answer:
    """What is known of one command."""

    planned: Planned
    sent_at: list[float] = field(default_factory=list)
    results: list[EventBody] = field(default_factory=list)
    """Final events that are not replays. There must be exactly one, except where the command left no operation."""
    replays: int = 0
    answered_at: float | None = None

    @property
    def answers(self) -> int:
        return len(self.results) + self.replays

    @property
    def is_complete(self) -> bool:
        return self.answers >= self.planned.deliveries

    @property
    def seconds(self) -> float:
        assert self.answered_at is not None, "asked of answered commands only"
        return self.answered_at - self.sent_at[0]


MOVING = ("captured", "refunded")
"""The results that move money."""


@dataclass(frozen=True, slots=True)
class Check:
    """A promise, whether it held, and the finding that shows it."""

    promise: str
    held: bool
    found: str


class DemoTally:
    """One run's commands and results."""

    def __init__(self, sendings: Iterable[Sending]) -> None:
        planned = {sending.planned for sending in sendings if sending.planned is not None}
        self.answers = {each.command_id: Answer(each) for each in planned}
        self._payments = {str(each.payment_id) for each in planned}
        self.deliveries = sum(each.deliveries for each in planned)
        self.sent = 0
        self.answered = 0
        self.results: Counter[str] = Counter()
        self.sequences: dict[str, list[int]] = defaultdict(list)
        self.told: Counter[tuple[str, str]] = Counter()
        """Minor units that the results report, by currency and `captured` or `refunded`."""
        self.states: dict[str, tuple[int, EventBody]] = {}
        """By payment: the highest `payment_seq`, and the payment's state in that event."""
        self.crash: tuple[float, float] | None = None
        """When the worker was killed, and when the backlog was processed (`inf` until then)."""
        self._usual = 0
        self._seen: set[str] = set()

    @property
    def missing(self) -> list[Answer]:
        """Commands that are still owed an answer."""
        return [each for each in self.answers.values() if not each.is_complete]

    @property
    def in_flight(self) -> int:
        """Commands that were sent and have no result yet."""
        return sum(1 for each in self.answers.values() if each.sent_at and each.answered_at is None)

    def note_sent(self, sending: Sending, at: float) -> None:
        if sending.planned is not None:
            self.answers[sending.planned.command_id].sent_at.append(at)
        self.sent += 1

    def note_heard(self, heard: Heard) -> None:
        """Count an event once, even if Kafka delivers it again (same id). Events of other payments are ignored."""
        event = heard.event
        if event["payment_id"] not in self._payments or event["event_id"] in self._seen:
            return
        self._seen.add(event["event_id"])
        if not event["replayed"]:
            self.sequences[event["payment_id"]].append(event["payment_seq"])
            self._note_money(event)
        # Unsolicited events, such as a dispute, answer no command.
        answer = self.answers.get(UUID(event["command_id"])) if event["command_id"] else None
        if answer is not None and is_final(event):
            self._note_final(answer, event, heard.at)

    def _note_money(self, event: EventBody) -> None:
        if (word := _word(event)) in MOVING:
            self.told[event["currency"], word] += event["amount_minor"]
        seq, _ = self.states.get(event["payment_id"], (0, event))
        if event["payment_seq"] > seq:
            self.states[event["payment_id"]] = event["payment_seq"], event["payment"]

    def told_in(self, currency: str, word: str) -> tuple[int, int]:
        """The sum of the amounts in the results, and the sum over the payments' last states."""
        states = [state for _, state in self.states.values() if state["currency"] == currency]
        return self.told[currency, word], sum(state[f"{word}_minor"] for state in states)

    @property
    def is_recovering(self) -> bool:
        """From the crash until no more commands are in flight than at the crash."""
        return self.crash is not None and self.crash[1] == inf

    def note_crash(self, at: float) -> None:
        self.crash, self._usual = (at, inf), max(self.in_flight, 1)

    def has_recovered(self, at: float) -> bool:
        """Whether the backlog from the crash has been processed just now; true once."""
        if self.crash is None or not self.is_recovering or self.in_flight > self._usual:
            return False
        self.crash = (self.crash[0], at)
        return True

    def _note_final(self, answer: Answer, event: EventBody, at: float) -> None:
        self.answered += answer.answers < answer.planned.deliveries
        if event["replayed"]:
            answer.replays += 1
        else:
            answer.results.append(event)
            self.results[_word(event)] += 1
        if answer.answered_at is None:
            answer.answered_at = at

    # --- summaries and checks ---------------------------------------------------------------------------------------

    def by_kind(self) -> dict[str, Counter[str]]:
        """Results by the command's type."""
        table: dict[str, Counter[str]] = {}
        for answer in self.answers.values():
            word = _word(answer.results[0]) if answer.results else "missing"
            table.setdefault(str(answer.planned.kind), Counter())[word] += 1
        return table

    def by_story(self) -> dict[str, Counter[str]]:
        """Results by the order's story."""
        table: dict[str, Counter[str]] = defaultdict(Counter)
        for answer in self.answers.values():
            table[answer.planned.story]["commands"] += 1
            table[answer.planned.story]["again"] += answer.planned.deliveries - 1
            table[answer.planned.story][_word(answer.results[0]) if answer.results else "missing"] += 1
        return table

    def seconds(self, *, undisturbed: bool) -> list[float]:
        """Sorted seconds from command to result. `undisturbed` leaves out `DELAYED` stories and the crash."""
        answered = [each for each in self.answers.values() if each.answered_at is not None]
        return sorted(each.seconds for each in answered if not undisturbed or not self._is_disturbed(each))

    def _is_disturbed(self, answer: Answer) -> bool:
        if answer.planned.story in DELAYED:
            return True
        if self.crash is None:
            return False
        start, end = self.crash
        assert answer.answered_at is not None, "asked of answered commands only"
        return answer.sent_at[0] <= end and answer.answered_at >= start

    def checks(self) -> list[Check]:
        """The promises that the events alone can prove."""
        return [self._check_one_result(), self._check_answers(), self._check_expected(), self._check_sequences()]

    def _check_one_result(self) -> Check:
        accepted = [each for each in self.answers.values() if any(map(_is_accepted, each.results))]
        wrong = [each for each in accepted if len(each.results) != 1]
        found = (
            f"{len(accepted):,} accepted, {len(wrong)} with more than one" if wrong else f"{len(accepted):,} accepted"
        )
        return Check("every accepted command has exactly one final result", not wrong and not self.missing, found)

    def _check_answers(self) -> Check:
        answers = sum(each.answers for each in self.answers.values())
        again = f", {answers - self.deliveries} to repeated Kafka deliveries" if answers > self.deliveries else ""
        found = f"{self.deliveries:,} deliveries, {answers:,} answers{again}"
        return Check("every delivery of a command is answered", not self.missing, found)

    def _check_expected(self) -> Check:
        wrong = [each for each in self.answers.values() if {_word(r) for r in each.results} != {each.planned.expected}]
        found = "as planned for each order" if not wrong else f"{len(wrong)} differ, such as {_difference(wrong[0])}"
        return Check("every command has the expected result", not wrong, found)

    def _check_sequences(self) -> Check:
        wrong = [payment for payment, numbers in self.sequences.items() if numbers != list(range(1, len(numbers) + 1))]
        events = sum(map(len, self.sequences.values()))
        found = f"{events:,} events of {len(self.sequences):,} payments"
        return Check("each payment's events are in order without a gap", not wrong, found if not wrong else wrong[0])


def percentile(ordered: list[float], share: float) -> float:
    """The value below which `share` of the sorted values lie; 0 where there are none."""
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))] if ordered else 0.0


def _word(event: EventBody) -> str:
    """`captured` of `payment.captured.v1`."""
    word: str = event["type"].split(".")[1]
    return word


def _is_accepted(event: EventBody) -> bool:
    """Whether the command left an operation. An idempotency conflict leaves none: every delivery is rejected again."""
    return event["operation_number"] is not None


def _difference(answer: Answer) -> str:
    got = ", ".join(map(_word, answer.results)) or "nothing"
    planned = answer.planned
    return f"{planned.story}: {planned.kind} of payment {planned.payment_id}: {got} instead of {planned.expected}"
