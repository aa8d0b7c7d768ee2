"""`payments reconcile`: ask the providers now about everything that is open.

That is: operations that nobody is working on, and holds past their end. A dry run only asks. Otherwise this process
does once what workers do all the time: it takes over open operations, asks or repeats under the same key, and saves the
answers through the write path.
"""

import asyncio
from collections import Counter
from collections.abc import Collection, Container, Coroutine, Mapping
from datetime import UTC, datetime
from itertools import starmap
from typing import Any, Final, NamedTuple
from uuid import UUID

from app import wiring
from app.console import new_console, print_json, safe_text
from app.found import PAST_ITS_END, Found, found_by_answer, hold_past_its_end
from app.one_shot import CONNECTIONS, DRAIN_SECONDS, OneShotWorker, one_shot_worker
from app.settings import Settings
from app.signals import stop_on_signals
from handlers.messages.events import write_time
from handlers.reconcile import UNKNOWN_HERE, Asker, ask_about_holds
from infra.postgres.store import PostgresStore

ASKED_MAX: Final = 1_000
"""Most operations in one dry run, those due soonest; workers ask about all of them anyway."""


class Report(NamedTuple):
    """What was found, and a line of text for everything that was left out."""

    found: list[Found]
    left_out: list[str]


def reconcile(settings: Settings, payment_id: UUID | None, *, dry_run: bool, as_json: bool) -> int:
    """Ask about what is open, print the answers, and apply them unless `dry_run`. Returns 0 if all was answered."""
    report = asyncio.run(_ask(settings, payment_id) if dry_run else _apply(settings, payment_id))
    if as_json:
        print_json(list(map(_facts, report.found)))
    elif report.found or not report.left_out:
        _print(report.found, dry_run=dry_run)
    for line in report.left_out:
        new_console(to_stderr=True).print(line, soft_wrap=True)
    return int(bool(report.left_out) or not all(_answered(report.found)))


def _answered(found: list[Found]) -> Collection[bool]:
    """For each operation and hold, whether its last question was answered."""
    return {(each.payment_id, each.number): each.is_answered for each in found}.values()


def _facts(found: Found) -> dict[str, Any]:
    """For programs, with the field names of `payments show --json`."""
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
        place = f"{each.payment_id}  {each.kind} {each.number} at {each.gateway}, {each.amount}, {state}{age}"
        for line in (place, f"    the provider says: {each.answer}"):
            console.print(safe_text(line), soft_wrap=True)
    console.print(f"\n{_summary(_answered(found), dry_run=dry_run)}", soft_wrap=True)


def _summary(answered: Collection[bool], *, dry_run: bool) -> str:
    summary = f"{sum(answered):,} of {len(answered):,} answered"
    if dry_run:
        return f"{summary}. Nothing was changed."
    summary += ", and that is applied." if any(answered) else ": nothing is applied."
    if not all(answered):
        summary += " The rest stays open: workers ask about it again."
    return f"{summary} `payments show PAYMENT_ID` shows what became of one."


# --- a dry run --------------------------------------------------------------------------------------------------------


async def _ask(settings: Settings, payment_id: UUID | None) -> Report:
    """The answers about open operations and holds past their end."""
    async with wiring.connected(settings, connections=CONNECTIONS) as (gateways, _, store):
        there_are = await store.count_under_way(payment_id)
        open_operations = await store.find_under_way(payment_id, limit=ASKED_MAX)
        asker = Asker(gateways, wiring.create_paces(settings, gateways))
        found = [found_by_answer(each) for each in await asyncio.gather(*starmap(asker.ask, open_operations))]
        asker.begin_round()
        async for answers in ask_about_holds(store, asker, payment_id):
            found += map(hold_past_its_end, answers)
    left_out = (
        f"These are the first {ASKED_MAX:,} of {there_are:,} open operations, those that are due soonest; "
        "the others were not asked about."
    )
    return Report(found, [left_out] if there_are > ASKED_MAX else [])


# --- for real ---------------------------------------------------------------------------------------------------------


async def _apply(settings: Settings, payment_id: UUID | None) -> Report:
    """Ask and apply. What a resting provider or a signal left over is still due, and in the report."""
    stop = stop_on_signals(first=_tell_that_it_ends)
    async with wiring.connected(settings, connections=CONNECTIONS) as (gateways, _, store):
        found: list[Found] = []
        async with one_shot_worker(settings, store, gateways, found.append) as worker:
            await store.make_due(payment_id)
            await _sweep(worker, stop, payment_id)
            await _unless(stop, worker.reconciler.reconcile_holds_now(payment_id))
        left = await _left(store, worker, payment_id)
    return Report(
        [each for each in found if payment_id in (None, each.payment_id)],
        _in_words(left, gateways, ended_early=stop.is_set()),
    )


def _tell_that_it_ends() -> None:
    notice = f"Ending: calls under way are waited for, {DRAIN_SECONDS:g} s at most. Another signal ends at once."
    new_console(to_stderr=True).print(notice, soft_wrap=True)


async def _sweep(worker: OneShotWorker, stop: asyncio.Event, payment_id: UUID | None) -> None:
    """Ask once about everything that is due, of one payment or of all, unless told to stop.

    A claim is never interrupted: it would leave leases behind.
    """
    asked_before = -1
    while len(worker.asked) > asked_before and not stop.is_set():
        asked_before = len(worker.asked)
        await worker.sweep.sweep_once(payment_id)
        await _unless(stop, worker.wait_until_idle())


async def _unless(stop: asyncio.Event, work: Coroutine[Any, Any, object]) -> None:
    """Wait for `work`, or cancel it once `stop` is set."""
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


async def _left(store: PostgresStore, worker: OneShotWorker, payment_id: UUID | None) -> dict[str, int]:
    """How many due operations and holds were not asked about, by gateway."""
    left = Counter(await store.count_due_but(worker.asked, payment_id))
    left.update(worker.asked[each].gateway for each in worker.unsent if payment_id in (None, each[0]))
    return left


def _age(since: datetime) -> str:
    minutes = int((datetime.now(UTC) - since).total_seconds() // 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h"
