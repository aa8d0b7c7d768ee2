"""A provider's webhooks in any order, any number of times, before and after its API's answers, lead to the same end.

The webhooks are those that the provider's simulator sends, signed and over HTTP, when a story is played once in order.
Schedules then replay webhooks, answers and commands in other orders, except that an effect never precedes its cause,
and lose some of the answers.

The long run is `PAYMENTS_TEST_SCHEDULES=2000 pytest --timeout 4000 tests/property/test_provider_messages.py`, with that
many schedules for each story at each provider. `--hypothesis-seed` repeats a run, `-k momo` selects a provider.
"""

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from domain.commands import OperationKind
from domain.decision import Answer
from domain.notices import Notice
from domain.operations import GatewayRequest, Outcome, Unknown
from tests.contract.providers import PROVIDERS, Provider
from tests.property.machine import schedules_asked_for
from tests.property.messages import Post, Recording, end_of, heard, open_post, recorder_of
from tests.support.memory import MemoryShell
from tests.support.site import Site, running_site

STORIES = (
    ("charge", "refund"),
    ("charge refused",),
    ("charge abandoned",),
    ("charge", "dispute", "won"),
    ("charge", "dispute", "lost"),
    ("authorize", "capture", "refund"),
    ("authorize", "capture", "dispute", "lost"),
    ("authorize refused",),
    ("authorize abandoned",),
    ("authorize", "void"),
    ("authorize", "lapse"),
)
TIMES_MAX = 3
"""How often one webhook comes, at most."""
STEPS_MAX = 60
CLAIMS_MAX = 4
LOST_MAX = 2


@dataclass
class Flight:
    """A call or a query; `answer` is set once the provider has executed it."""

    request: GatewayRequest
    answer: Outcome | None = None


class Replay:
    """One order of a story's events: the next one is drawn at random until everything has happened."""

    def __init__(self, recording: Recording, order: Random) -> None:
        self.recording = recording
        self.order = order
        self.shell = MemoryShell(recording.rules)
        self.told: list[Notice] = []
        self.times: Counter[int] = Counter()
        self.flights: list[Flight] = []
        self.done: set[tuple[int, str]] = set()
        """What has happened at the provider: the index of the step, and the part of it."""
        self.sent = 0
        self.claims = 0
        self.lost = 0

    def run(self) -> MemoryShell:
        for _ in range(STEPS_MAX):
            if may := self._may_happen():
                self.order.choice(may)()
        self._all_arrives()
        return self.shell

    # --- what may happen ----------------------------------------------------------------------------------------------

    def _may_happen(self) -> list[Callable[[], None]]:
        may = [self._send] if self._may_send() else []
        may += [self._bind(self._execute, each) for each in self.flights if each.answer is None]
        may += [self._bind(self._land, each) for each in self.flights]
        if self.lost < LOST_MAX:
            may += [self._bind(self._lose, each) for each in self.flights if each.answer is not None]
        may += [self._bind(self._deliver, n) for n in range(len(self.told)) if self.times[n] < TIMES_MAX]
        may += [self._bind(self._happen, n) for n in range(len(self.recording.steps)) if self._may_occur(n)]
        if self.claims < CLAIMS_MAX:
            may += [self._bind(self._claim, number) for number in self._idle()]
        return may

    def _bind(self, what: Callable[..., None], *given: object) -> Callable[[], None]:
        return lambda: what(*given)

    def _may_send(self) -> bool:
        """Whether the next command may be sent. A void waits for open operations: otherwise it is another story."""
        while self.sent < len(self.recording.steps) and self.recording.steps[self.sent].command is None:
            self.sent += 1
        if self.sent == len(self.recording.steps):
            return False
        is_void = self.recording.steps[self.sent].name == OperationKind.VOID
        return not (is_void and any(each.is_open for each in self.shell.all_operations.values()))

    def _may_occur(self, index: int) -> bool:
        """Whether this may happen now: a payer acts once the link is known, an outside event after the step before."""
        step = self.recording.steps[index]
        if (index, "outside") in self.done:
            return False
        if step.command is None:
            return self._is_over(index - 1)
        is_known = any(each.number == index + 1 and each.reference for each in self.shell.all_operations.values())
        return step.payer is not None and is_known

    def _is_over(self, index: int) -> bool:
        """Whether the whole step has happened at the provider, including our second call if webhooks come of it."""
        step = self.recording.steps[index]
        is_executed_then = step.then is not None and step.then.told
        wanted = {
            "first": step.first,
            "outside": step.command is None or step.payer is not None,
            "then": is_executed_then,
        }
        return all((index, name) in self.done for name, needed in wanted.items() if needed)

    def _idle(self) -> list[int]:
        """Operations under way for which no call is running."""
        asked = {each.request.operation_number for each in self.flights}
        own = self.shell.all_operations.values()
        return [each.number for each in own if each.is_under_way and each.number not in asked]

    # --- what happens -------------------------------------------------------------------------------------------------

    def _take_off(self, requests: list[GatewayRequest]) -> None:
        self.flights += [Flight(each) for each in requests]

    def _send(self) -> None:
        command = self.recording.steps[self.sent].command
        assert command is not None, "as found"
        self.sent += 1
        self._take_off(self.shell.apply([command]))

    def _execute(self, flight: Flight) -> None:
        """Let the provider execute a call; the answer depends on whether its payer has acted by now."""
        index = flight.request.operation_number - 1
        step = self.recording.steps[index]
        name = "then" if (index, "outside") in self.done else "first"
        call = step.then if name == "then" else step.first
        assert call is not None, "as recorded"
        flight.answer = call.outcome
        if (index, name) not in self.done:
            self.done.add((index, name))
            self.told += call.told

    def _land(self, flight: Flight) -> None:
        if flight.answer is None:
            self._execute(flight)
        assert flight.answer is not None, "as executed"
        self.flights.remove(flight)
        request = flight.request
        answer = Answer(request.payment_id, request.operation_number, request.lease_token, flight.answer)
        self._take_off(self.shell.apply([answer]))

    def _lose(self, flight: Flight) -> None:
        """Lose the API's answer to a call that was executed."""
        self.lost += 1
        flight.answer = Unknown("the answer was lost")
        self._land(flight)

    def _happen(self, index: int) -> None:
        self.done.add((index, "outside"))
        self.told += self.recording.steps[index].payer or self.recording.steps[index].outside

    def _deliver(self, number: int) -> None:
        requests = heard(self.shell, self.recording.payment_id, self.told[number])
        if requests is not None:
            self.times[number] += 1
            self._take_off(requests)

    def _claim(self, number: int) -> None:
        self.claims += 1
        self._take_off(self.shell.claim(self.recording.payment_id, number))

    def _all_arrives(self) -> None:
        """Let everything happen that has not yet, and each webhook come at least once."""
        for _ in range(100):
            if self._may_send():
                self._send()
            while self.flights:
                self._land(self.flights[0])
            for index in range(len(self.recording.steps)):
                if self._may_occur(index):
                    self._happen(index)
            for number in range(len(self.told)):
                if not self.times[number]:
                    self._deliver(number)
            for number in self._idle():
                self._claim(number)


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with running_site() as site:
        yield site


@pytest.fixture(scope="module")
def post(site: Site) -> Iterator[Post]:
    with open_post(site.port) as post:
        yield post


@pytest.fixture(params=PROVIDERS)
def provider(request: pytest.FixtureRequest, site: Site) -> Provider:
    return PROVIDERS[request.param](str(site.http.base_url), site.http)


async def recorded(site: Site, provider: Provider, post: Post, story: tuple[str, ...]) -> Recording | None:
    """Record the story; None if it cannot happen at this provider, or no webhook would report it."""
    recorder = recorder_of(site.settings(provider.name), provider, post)
    known = {*map(str, recorder.gateway.capabilities.operations), *provider.outside}
    try:
        is_told = provider.tells_of_abandoned or not story[0].endswith(" abandoned")
        if not is_told or not known.issuperset(step.partition(" ")[0] for step in story):
            return None
        return await recorder.record(story)
    finally:
        await recorder.gateway.close()
        await recorder.reader.close()


@pytest.mark.parametrize("story", STORIES, ids=", ".join)
def test_a_providers_messages_end_the_same_in_any_order(
    site: Site, provider: Provider, post: Post, story: tuple[str, ...]
) -> None:
    recording = asyncio.run(recorded(site, provider, post, story))
    if recording is None:
        pytest.skip("not offered, or not told")

    @settings(
        max_examples=schedules_asked_for(40),
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.randoms(use_true_random=False))
    def replay(order: Random) -> None:
        shell = Replay(recording, order).run()
        assert end_of(shell) == recording.end
        ends = Counter(each.operation_number for each in shell.told() if each.is_final)
        assert ends == Counter(number for number, step in enumerate(recording.steps, start=1) if step.command)

    replay()
