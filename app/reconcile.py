"""`payments reconcile`: what the providers say of everything that is open, now.

That is: operations that nobody is working on, and holds past their end. A dry run only asks. Otherwise this process
does once what workers do all along: it takes over what is not being worked on, asks or repeats under the same key, and
saves the answers through the write path.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Container, Coroutine, Mapping, Set
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import starmap
from typing import Any, Final, NamedTuple
from uuid import UUID

from app import wiring
from app.console import new_console, print_json, safe_text
from app.settings import Settings
from app.signals import stop_on_signals
from domain.commands import OperationKind
from domain.decision import Answer
from domain.money import Money
from domain.operations import GatewayRequest, Outcome, Unknown, Unreachable, describe
from domain.ports import Gateway
from handlers.dispatch import GIVEN_BACK
from handlers.messages.events import write_time
from handlers.reconcile import UNKNOWN_HERE, Asker, HoldAnswer, Reconciler, ask_about_holds, in_vain
from handlers.sweep import CLAIMED_MAX, Sweep
from handlers.write_path import WritePath
from infra.postgres.store import PostgresStore

ASKED_MAX: Final = 1_000
"""Operations of one dry run: the soonest due; workers ask about all of them anyway."""
PAST_ITS_END: Final = "hold_past_its_end"
"""What a hold is found in, where an operation is found in its state."""
AT_ONCE: Final = 8
CONNECTIONS: Final = 2
"""To Postgres."""
DRAIN_SECONDS: Final = 25.0
"""Told to end, how long calls under way may take, as in a worker."""


@dataclass(frozen=True, slots=True)
class Found:
    """One open operation or hold past its end, and the provider's word on it."""

    payment_id: UUID
    kind: OperationKind
    number: int
    gateway: str
    state: str
    amount: Money
    since: datetime | None
    """When it was first sent, or when the hold's time was over; None of what was never sent."""
    outcome: Outcome | None
    why_not: str = ""
    """Why there is no outcome, where there is none."""

    @property
    def answer(self) -> str:
        return self.why_not if self.outcome is None else describe(self.outcome)

    @property
    def is_answered(self) -> bool:
        """Whether the answer is the provider's word."""
        return not isinstance(self.outcome, Unknown | Unreachable | None)


class Report(NamedTuple):
    """What was found, and in words what was left out."""

    found: list[Found]
    left_out: list[str]


def reconcile(settings: Settings, payment_id: UUID | None, *, dry_run: bool, as_json: bool) -> int:
    """Ask about what is open, print it, and unless it is a dry run apply it; the exit code, 0 if all was answered."""
    told = asyncio.run(_ask(settings, payment_id) if dry_run else _apply(settings, payment_id))
    if as_json:
        print_json(list(map(_facts, told.found)))
    elif told.found or not told.left_out:
        _print(told.found, dry_run=dry_run)
    for line in told.left_out:
        new_console(to_stderr=True).print(line, soft_wrap=True)
    return int(bool(told.left_out) or not all(_answered(told.found)))


def _answered(found: list[Found]) -> Collection[bool]:
    """Of each operation and hold, whether it was answered when it was last asked about."""
    return {(each.payment_id, each.number): each.is_answered for each in found}.values()


def _facts(found: Found) -> dict[str, Any]:
    """For programs; the operation's names are those of `payments show --json`."""
    return {
        "payment_id": str(found.payment_id),
        "number": found.number,
        "kind": found.kind,
        "gateway": found.gateway,
        "state": found.state,
        "amount_minor": found.amount.minor,
        "currency": found.amount.currency,
        "since": found.since and write_time(found.since),
        "answer": found.answer,
        "is_answered": found.is_answered,
    }


def _print(found: list[Found], *, dry_run: bool) -> None:
    console = new_console()
    if not found:
        console.print("Nothing is open that is not being worked on.")
        return
    for each in found:
        state = "a hold past its end" if each.state == PAST_ITS_END else each.state
        age = f" for {_age(each.since)}" if each.since else ""
        told = f"{each.payment_id}  {each.kind} {each.number} at {each.gateway}, {each.amount}, {state}{age}"
        for line in (told, f"    the provider says: {each.answer}"):
            console.print(safe_text(line), soft_wrap=True)
    console.print(f"\n{_summary(_answered(found), dry_run=dry_run)}", soft_wrap=True)


def _summary(answered: Collection[bool], *, dry_run: bool) -> str:
    told = f"{sum(answered):,} of {len(answered):,} answered"
    if dry_run:
        return f"{told}. Nothing was changed."
    told += ", and that is applied." if any(answered) else ": nothing is applied."
    if not all(answered):
        told += " The rest stays open: workers ask about it again."
    return f"{told} `payments show PAYMENT_ID` tells what became of one."


# --- a dry run --------------------------------------------------------------------------------------------------------


async def _ask(settings: Settings, payment_id: UUID | None) -> Report:
    """What is said of open operations and of holds past their end."""
    async with wiring.connected(settings, connections=CONNECTIONS) as (gateways, _, store):
        there_are = await store.count_under_way(payment_id)
        open_operations = await store.find_under_way(payment_id, limit=ASKED_MAX)
        asker = Asker(gateways, wiring.create_paces(settings, gateways))
        found = [_found_by(each) for each in await asyncio.gather(*starmap(asker.ask, open_operations))]
        asker.begin_round()
        async for answers in ask_about_holds(store, asker, payment_id):
            found += map(_hold, answers)
    left_out = (
        f"These are the first {ASKED_MAX:,} of {there_are:,} open operations, those that are due soonest; "
        "the others were not asked about."
    )
    return Report(found, [left_out] if there_are > ASKED_MAX else [])


# --- for real ---------------------------------------------------------------------------------------------------------


async def _apply(settings: Settings, payment_id: UUID | None) -> Report:
    """What was said and applied; what a provider that rests, or a signal to end, left is due still."""
    stop = stop_on_signals(first=_tell_that_it_ends)
    async with wiring.connected(settings, connections=CONNECTIONS) as (gateways, _, store):
        found: list[Found] = []
        async with working(settings, store, gateways, found.append) as parts:
            await store.make_due(payment_id)
            await _sweep(parts, stop, payment_id)
            await _unless(stop, parts.reconciler.reconcile_holds_now(payment_id))
        left = await _left(store, parts, payment_id)
    return Report(
        [each for each in found if payment_id in (None, each.payment_id)],
        _in_words(left, gateways, ended_early=stop.is_set()),
    )


def _tell_that_it_ends() -> None:
    told = f"Ending: calls under way are waited for, {DRAIN_SECONDS:g} s at most. Once more ends at once."
    new_console(to_stderr=True).print(told, soft_wrap=True)


async def _sweep(parts: "Parts", stop: asyncio.Event, payment_id: UUID | None) -> None:
    """Have all that is due, of one payment or of all, asked about once, unless told to stop.

    A claim is never cut short: it would leave leases.
    """
    asked_before = -1
    while len(parts.asked) > asked_before and not stop.is_set():
        asked_before = len(parts.asked)
        await parts.sweep.sweep_once(payment_id)
        await _unless(stop, parts.wait_until_idle())


async def _unless(stop: asyncio.Event, work: Coroutine[Any, Any, object]) -> None:
    """Have it done, or leave it once told to stop."""
    doing, stopping = asyncio.create_task(work), asyncio.create_task(stop.wait())
    try:
        await asyncio.wait([doing, stopping], return_when=asyncio.FIRST_COMPLETED)
        if doing.done():
            await doing
    finally:
        doing.cancel()
        stopping.cancel()
        await asyncio.gather(doing, stopping, return_exceptions=True)


def _in_words(left: Mapping[str, int], here: Container[str], *, ended_early: bool) -> list[str]:
    why = "told to end" if ended_early else "the provider wants to rest, or they became due meanwhile"
    lines = [
        f"{number:,} left at {name}: {why}. Workers ask about them in time."
        if name in here
        else f"{number:,} left at {name}: {UNKNOWN_HERE}. Workers that have it ask about them."
        for name, number in left.items()
    ]
    return lines or (["Told to end before all holds were asked about."] if ended_early else [])


async def _left(store: PostgresStore, parts: "Parts", payment_id: UUID | None) -> dict[str, int]:
    """What is due and was not asked about, by gateway."""
    left = Counter(await store.count_due_but(parts.asked, payment_id))
    left.update(parts.asked[each].gateway for each in parts.unsent if payment_id in (None, each[0]))
    return left


class Parts(NamedTuple):
    """A worker's parts without Kafka."""

    write_path: WritePath
    submit: Callable[[list[GatewayRequest]], None]
    sweep: Sweep
    reconciler: Reconciler
    wait_until_idle: Callable[[], Coroutine[Any, Any, None]]
    """Returns when nothing is in hand. What a provider that rests for long keeps from being sent is given back."""
    asked: Mapping[tuple[UUID, int], GatewayRequest]
    """The operations that were taken over, by payment and number."""
    unsent: Set[tuple[UUID, int]]
    """Those of them that were given back."""


@asynccontextmanager
async def working(
    settings: Settings, store: PostgresStore, gateways: dict[str, Gateway], note: Callable[[Found], None]
) -> AsyncIterator[Parts]:
    """Have the parts at work in the block; every answer is noted, too."""
    rules, redis = wiring.create_rules(settings, gateways), wiring.connect_redis(settings)
    limits = {name: min(AT_ONCE, settings.concurrency_of(name)) for name in gateways}
    write_path = wiring.create_write_path(store, rules, redis)
    paces = wiring.create_paces(settings, gateways)
    dispatcher, settler, leases = wiring.create_calling(store, write_path, rules, gateways, limits, paces=paces)
    asked: dict[tuple[UUID, int], GatewayRequest] = {}
    unsent: set[tuple[UUID, int]] = set()

    def resubmit(requests: list[GatewayRequest]) -> None:
        asked.update({(each.payment_id, each.operation_number): each for each in requests})
        dispatcher.resubmit(requests)

    def on_answer(answer: Answer) -> None:
        place = answer.payment_id, answer.operation_number
        (unsent.add if answer.outcome in GIVEN_BACK else unsent.discard)(place)
        if (request := asked.get(place)) is not None:
            note(_found(request, answer.outcome))
        settler.add(answer)

    def on_refused(answer: Answer, error: str) -> None:
        if (request := asked.get((answer.payment_id, answer.operation_number))) is not None:
            note(_found(request, None, in_vain(answer.outcome, error)))

    async def wait_until_idle() -> None:
        # Either hands work to the other, and signals none. A short rest is waited for: then there is room again.
        while dispatcher.waiting + settler.waiting or any(each.rests_briefly for each in paces.values()):
            dispatcher.give_back_resting()
            await asyncio.sleep(0.05)

    dispatcher.on_answer, settler.on_refused = on_answer, on_refused
    sweep = wiring.create_sweep(settings, store, dispatcher, submit=resubmit, room=lambda: CLAIMED_MAX)
    reconciler = wiring.create_reconciler(
        settings, store, write_path, Asker(gateways, paces), on_answer=lambda answer: note(_hold(answer))
    )
    loops = [asyncio.create_task(settler.run()), asyncio.create_task(leases.run())]
    try:
        yield Parts(write_path, dispatcher.submit, sweep, reconciler, wait_until_idle, asked, unsent)
    finally:
        try:
            # As a worker stops: what was not sent is given back, what was is waited for and saved.
            await dispatcher.drain(DRAIN_SECONDS, may_more_come=lambda: settler.waiting > 0)
            for loop in loops:
                loop.cancel()
            await asyncio.gather(*loops, return_exceptions=True)
            await settler.drain(DRAIN_SECONDS)
        finally:
            await redis.aclose()


# --- in words ---------------------------------------------------------------------------------------------------------


def _found(request: GatewayRequest, outcome: Outcome | None, why_not: str = "") -> Found:
    return Found(
        request.payment_id,
        request.kind,
        request.operation_number,
        request.gateway,
        request.state.value,
        request.amount,
        request.first_dispatched_at,
        outcome,
        why_not,
    )


def _found_by(answer: HoldAnswer) -> Found:
    """As `_found`, of what may not be readable as a request."""
    payment, operation, outcome, why_not = answer
    return Found(
        payment.payment_id,
        operation.kind,
        operation.number,
        operation.gateway or "",
        operation.state.value,
        Money(operation.amount_minor or 0, payment.currency or ""),
        operation.dispatched_at,
        outcome,
        why_not,
    )


def _hold(answer: HoldAnswer) -> Found:
    return replace(_found_by(answer), state=PAST_ITS_END, since=answer.payment.authorization_expires_at)


def _age(since: datetime) -> str:
    minutes = int((datetime.now(UTC) - since).total_seconds() // 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h"
