"""Reconciliation against a real Postgres: only the provider's word ends anything, and holds end when it says so."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any
from uuid import UUID

import asyncpg
import httpx
import pytest
from prometheus_client import REGISTRY

from app import wiring
from app.client import AmountUnusable
from app.reconcile import reconcile
from app.ruling import Finding, RulingRefused
from app.ruling import rule as rule_on
from app.settings import Settings
from domain.commands import OperationKind
from domain.decision import Notified
from domain.errors import GatewayUnreachable, OutcomeUnknown
from domain.notices import Notice
from domain.operations import (
    Declined,
    DeclineReason,
    Expired,
    GatewayRequest,
    Outcome,
    Pending,
    Succeeded,
    Unknown,
    Unreachable,
)
from domain.ports import Clock, Gateway
from handlers.pace import Pace
from handlers.reconcile import AT_ONCE, PAGE, RESTS, SILENT, SILENT_AFTER, Asker, HoldAnswer, Reconciler
from infra.postgres import statements
from infra.postgres.pool import PINNED_PLANS, create_pool
from infra.postgres.store import PostgresStore
from tests.support.dispatching import FAST
from tests.support.provider import BookkeepingGateway
from tests.support.sandbox import running_sandbox
from tests.support.service import InProcessWorker, delivery, events_of, new_payment_id, running_worker, value
from tests.support.waiting import until


class Instant(BookkeepingGateway):
    name = "instant"


def asker_of(*gateways: BookkeepingGateway) -> Asker:
    return Asker(
        {each.name: each for each in gateways}, {each.name: Pace(time.monotonic, each, FAST) for each in gateways}
    )


async def in_doubt(postgres_url: str, *payments: Any) -> None:
    """Charges whose answers were lost, and whose next attempt is an hour away."""
    gateway = Instant()
    gateway.outcome = lambda request: Unknown("lost")
    async with running_worker(postgres_url, gateway) as worker:
        await worker.accept(*(delivery("charge", each, f"key-{each}") for each in payments))
        await worker.idle()
    await value(postgres_url, "UPDATE operations SET due_at = now() + interval '1 hour' WHERE due_at IS NOT NULL")


async def run(
    settings: Settings, capsys: pytest.CaptureFixture[str], *, dry_run: bool, payment: Any = None, code: int = 0
) -> Any:
    assert await asyncio.to_thread(reconcile, settings, payment, dry_run=dry_run, as_json=True) == code
    return json.loads(capsys.readouterr().out)


async def test_a_dry_run_tells_and_changes_nothing_and_then_it_is_applied(
    postgres_url: str, redis_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    payments = [new_payment_id() for _ in range(3)]
    await in_doubt(postgres_url, *payments)
    settings = Settings(postgres_url=postgres_url, redis_url=redis_url, gateways=["instant"], default_gateway="instant")
    told = await run(settings, capsys, dry_run=True)
    assert {each["payment_id"] for each in told} == {str(each) for each in payments}
    assert {each["state"] for each in told} == {"indeterminate"}
    assert all(each["answer"].startswith("succeeded") for each in told)
    assert await value(postgres_url, "SELECT count(*) FROM operations WHERE state = 'indeterminate'") == 3

    await value(postgres_url, "UPDATE operations SET due_at = now() - interval '1 hour' WHERE due_at IS NOT NULL")
    told = await run(settings, capsys, dry_run=False, payment=payments[0])
    assert [each["payment_id"] for each in told] == [str(payments[0])]
    asked_again = "SELECT count(*) FROM operations WHERE lease_token > 1"
    assert await value(postgres_url, asked_again) == 1, "others are due for longer, and not what was asked for"
    assert await value(postgres_url, "SELECT count(*) FROM operations WHERE state = 'indeterminate'") == 2
    assert len(await run(settings, capsys, dry_run=False)) == 2
    assert await value(postgres_url, "SELECT count(*) FROM payments WHERE status = 'captured'") == 3
    assert await run(settings, capsys, dry_run=False) == []


@pytest.mark.parametrize("word", [Expired("ref", "automatic"), Succeeded("ref"), Unknown()], ids=str)
async def test_a_hold_past_its_end_is_released_on_the_providers_word_only(postgres_url: str, word: Outcome) -> None:
    gateway, payment_id = BookkeepingGateway(), new_payment_id()
    async with running_worker(postgres_url, gateway) as worker:
        await worker.accept(delivery("authorize", payment_id, "authorize"))
        await worker.idle()
        pool = await create_pool(postgres_url, size=1)
        reconciler = Reconciler(
            store=PostgresStore(pool),
            asker=asker_of(gateway),
            write_path=worker.write_path,
            interval=timedelta(seconds=60),
            cut_off=timedelta(hours=1),
        )
        assert await reconciler.reconcile_holds() == 0
        # The state if another attempt was paid before at another gateway: a hold is queried at its own gateway.
        another = "gateway = 'other', authorized_minor = 2 * authorized_minor, owed_held_minor = authorized_minor"
        await value(postgres_url, f"UPDATE payments SET authorization_expires_at = now(), {another} RETURNING 1")
        asked: list[GatewayRequest] = []

        async def status(request: GatewayRequest) -> Outcome:
            asked.append(request)
            return word

        gateway.status = status  # type: ignore[method-assign]
        assert await reconciler.reconcile_holds() == 1
        await reconciler.reconcile_holds_now()
        pool.terminate()
    assert asked[0].kind is OperationKind.AUTHORIZE
    assert asked[0].reference == f"ref_{payment_id}:1"
    kinds = [each["type"] for each in await events_of(postgres_url, payment_id)]
    released = ["payment.authorization_expired.v1"] if isinstance(word, Expired) else []
    assert kinds == ["payment.authorized.v1", *released]


@asynccontextmanager
async def reconcilers(
    postgres_url: str,
    worker: InProcessWorker,
    *gateways: BookkeepingGateway,
    count: int = 1,
    on_answer: Callable[[HoldAnswer], None] = lambda answer: None,
) -> AsyncIterator[list[Reconciler]]:
    """One reconciler per worker, each on its own connections; interval 5 minutes, cut-off one hour."""
    pools = [await create_pool(postgres_url, size=1) for _ in range(count)]
    yield [
        Reconciler(
            store=PostgresStore(pool),
            asker=asker_of(*gateways),
            write_path=worker.write_path,
            interval=timedelta(minutes=5),
            cut_off=timedelta(hours=1),
            on_answer=on_answer,
        )
        for pool in pools
    ]
    for pool in pools:
        pool.terminate()


class StillHeld(BookkeepingGateway):
    """Reports every hold as still there; `asked` counts the queries."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: Counter[UUID] = Counter()

    async def status(self, request: GatewayRequest) -> Outcome:
        self.asked[request.payment_id] += 1
        await asyncio.sleep(0)
        ended = self.answers.get(request.provider_key)
        return ended if isinstance(ended, Expired) else Succeeded(request.reference or "", request.amount.minor)


class Resting(StillHeld):
    """Asks for fewer requests for `rest` seconds."""

    rest = 0.0

    def rests_seconds(self) -> float:
        return self.rest


async def lapsed_holds(postgres_url: str, worker: InProcessWorker, count: int) -> list[UUID]:
    payments = [new_payment_id() for _ in range(count)]
    await worker.accept(*(delivery("authorize", each, f"key-{each}") for each in payments))
    await worker.idle()
    await value(postgres_url, "UPDATE payments SET authorization_expires_at = now() - interval '1 minute'")
    return payments


async def test_a_word_about_a_hold_that_postgres_refuses_is_told_as_such_and_costs_no_other(
    postgres_url: str, redis_url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway = Instant()
    monkeypatch.setattr(gateway, "status", lambda request: asyncio.sleep(0, Expired("gone")))
    installed(monkeypatch, gateway)
    async with running_worker(postgres_url, gateway) as worker:
        payments = await lapsed_holds(postgres_url, worker, 3)
    refusing = f"ALTER TABLE payments ADD CHECK (released_minor = 0 OR payment_id <> '{payments[1]}')"
    await value(postgres_url, refusing)
    before = REGISTRY.get_sample_value("payments_refused_answers_total") or 0.0
    settings = here(postgres_url, redis_url)
    assert await asyncio.to_thread(reconcile, settings, None, dry_run=False, as_json=False) == 1
    assert REGISTRY.get_sample_value("payments_refused_answers_total") == before + 1
    told = [line for line in capsys.readouterr().out.splitlines() if "the provider says: expired" in line]
    assert sorted("could not be saved" in line for line in told) == [False, False, True]
    assert await value(postgres_url, "SELECT count(*) FROM payments WHERE released_minor > 0") == 2


async def test_a_word_about_an_operation_that_postgres_refuses_is_not_told_as_applied(
    postgres_url: str, redis_url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway, payment = BookkeepingGateway(), new_payment_id()
    gateway.outcome = lambda request: Pending(request.provider_key)
    async with running_worker(postgres_url, gateway) as worker:
        await worker.accept(delivery("charge", payment, "key"))
        await worker.idle()
    await value(postgres_url, "ALTER TABLE payments ADD CHECK (captured_minor = 0)")
    gateway.answers = dict.fromkeys(gateway.answers, Succeeded("paid"))
    installed(monkeypatch, gateway)
    settings = here(postgres_url, redis_url)
    settings.gateways.append(gateway.name)
    assert await asyncio.to_thread(reconcile, settings, None, dry_run=False, as_json=False) == 1
    told = capsys.readouterr().out
    assert "the provider says: succeeded (reference paid), which could not be saved" in told
    assert "0 of 1 answered: nothing is applied." in told
    assert await value(postgres_url, "SELECT captured_minor FROM payments") == 0


async def test_workers_share_the_holds_past_their_end_and_none_is_asked_about_twice(postgres_url: str) -> None:
    gateway = StillHeld()
    async with running_worker(postgres_url, gateway) as worker:
        payments = await lapsed_holds(postgres_url, worker, 700)
        async with reconcilers(postgres_url, worker, gateway, count=3) as several:
            found = await asyncio.gather(*(each.reconcile_holds() for each in several))
            assert sum(found) == len(payments)
            assert min(found) > 0
            assert gateway.asked == Counter(payments)
            assert [await each.reconcile_holds() for each in several] == [0, 0, 0]


async def test_a_hold_that_is_still_there_is_asked_about_ever_later_and_within_the_cut_off(postgres_url: str) -> None:
    gateway, waits = StillHeld(), []
    async with running_worker(postgres_url, gateway) as worker:
        (payment,) = await lapsed_holds(postgres_url, worker, 1)
        async with reconcilers(postgres_url, worker, gateway) as (reconciler,):
            for questions in range(1, 31):
                assert await reconciler.reconcile_holds() == 1
                assert await reconciler.reconcile_holds() == 0
                assert gateway.asked[payment] == questions
                waits.append(await value(postgres_url, "SELECT hold_due_at - now() FROM payments"))
                await value(postgres_url, "UPDATE payments SET hold_due_at = now()")
    interval, rounds = timedelta(minutes=5), timedelta(minutes=5) * 1.25
    for waited, doubled in zip(waits[:4], (1, 2, 4, 8), strict=True):
        assert interval * doubled * 0.74 <= waited <= interval * doubled
    assert max(waits) + rounds <= timedelta(hours=1)
    assert min(waits[5:]) >= (timedelta(hours=1) - rounds) * 0.74
    assert len({round(each.total_seconds()) for each in waits[5:]}) > 10, "a herd would stay together"


async def test_a_question_that_got_no_answer_is_asked_again_later_by_whoever_is_there(postgres_url: str) -> None:
    gateway = StillHeld()

    async def away(request: GatewayRequest) -> Outcome:
        raise GatewayUnreachable("books", "not connected")

    async with running_worker(postgres_url, gateway) as worker:
        await lapsed_holds(postgres_url, worker, 1)
        async with reconcilers(postgres_url, worker, gateway, count=2) as (first, second):
            answered, gateway.status = gateway.status, away  # type: ignore[method-assign]
            assert await first.reconcile_holds() == 1
            gateway.status = answered  # type: ignore[method-assign]
            assert await second.reconcile_holds() == 0
            await value(postgres_url, "UPDATE payments SET hold_due_at = now()")
            assert await second.reconcile_holds() == 1


@pytest.mark.parametrize("error", [KeyError("a defect"), asyncio.CancelledError("a library's own")], ids=type)
async def test_a_hold_that_cannot_be_read_or_breaks_its_gateway_stops_no_other(
    postgres_url: str, redis_url: str, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    gateway = StillHeld()
    held = gateway.status

    async def breaking(request: GatewayRequest) -> Outcome:
        if request.payment_id == broken:
            raise error
        return await held(request)

    async with running_worker(postgres_url, gateway) as worker:
        unreadable, broken, sound = await lapsed_holds(postgres_url, worker, 3)
        await value(postgres_url, "UPDATE operations SET content = '{}' WHERE payment_id = $1 RETURNING 1", unreadable)
        gateway.status = breaking  # type: ignore[method-assign]
        answers: list[HoldAnswer] = []
        async with reconcilers(postgres_url, worker, gateway, on_answer=answers.append) as (reconciler,):
            assert await reconciler.reconcile_holds() == 3
    told = {each.payment.payment_id: each.outcome is not None for each in answers}
    assert told == {unreadable: False, broken: False, sound: True}
    installed(monkeypatch, gateway)
    settings = here(postgres_url, redis_url)
    settings.gateways.append(gateway.name)
    for dry_run in (True, False):
        assert await asyncio.to_thread(reconcile, settings, None, dry_run=dry_run, as_json=False) == 1


async def test_a_new_hold_is_asked_about_from_its_own_end_whatever_was_asked_about_an_earlier_one(
    postgres_url: str,
) -> None:
    gateway = StillHeld()
    async with running_worker(postgres_url, gateway) as worker:
        await lapsed_holds(postgres_url, worker, 1)
        async with reconcilers(postgres_url, worker, gateway) as (reconciler,):
            assert await reconciler.reconcile_holds() == 1
            later = "UPDATE payments SET authorization_expires_at = now() + interval '2 days', hold_due_at = now()"
            await value(postgres_url, later)
            assert await reconciler.reconcile_holds_now() == 0


@pytest.mark.parametrize(
    "also", [{"captured_minor": 5_000}, {"captured_minor": 5_000, "refunded_minor": 4_000}], ids=str
)
async def test_the_rest_of_a_hold_is_reconciled_under_every_status(postgres_url: str, also: dict[str, int]) -> None:
    gateway = StillHeld()
    status = "partially_refunded" if "refunded_minor" in also else "partially_captured"
    async with running_worker(postgres_url, gateway) as worker:
        await lapsed_holds(postgres_url, worker, 1)
        amounts = ", ".join(f"{name} = {amount}" for name, amount in also.items())
        await value(postgres_url, f"UPDATE payments SET status = '{status}', {amounts}")
        async with reconcilers(postgres_url, worker, gateway) as (reconciler,):
            assert await reconciler.reconcile_holds() == 1
            await value(postgres_url, "UPDATE payments SET hold_due_at = now(), released_minor = 5000")
            assert await reconciler.reconcile_holds() == 0


async def test_a_hold_that_came_late_beside_a_charge_is_asked_about_at_its_end_and_released(postgres_url: str) -> None:
    gateway, payment = BookkeepingGateway(), new_payment_id()
    gateway.outcome = lambda request: (
        Declined(DeclineReason.OTHER, None, "first") if request.operation_number == 1 else None
    )
    async with running_worker(postgres_url, gateway) as worker:
        for kind in ("authorize", "charge"):
            await worker.accept(delivery(kind, payment, kind))
            await worker.idle()
        ends = datetime.now(UTC) - timedelta(seconds=1)
        late = Notice("books", "event", "late", payment, 1, outcome=Succeeded("first", 10_000, ends))
        await worker.write_path.apply([Notified(1, payment, late)])
        gateway.answers[f"{payment}:1"] = Expired("first", "automatic")
        async with reconcilers(postgres_url, worker, gateway) as (reconciler,):
            assert await reconciler.reconcile_holds() == 1
            assert await reconciler.reconcile_holds_now() == 0
    kinds = [each["type"].split(".")[1] for each in await events_of(postgres_url, payment)]
    assert kinds == ["declined", "captured", "late_success", "authorization_expired"]
    assert await value(postgres_url, "SELECT owed_held_minor FROM payments") == 0


def sample(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0.0


async def test_stuck_operations_are_counted_as_checked_healed_and_disagreeing(postgres_url: str) -> None:
    gateway = BookkeepingGateway()
    gateway.outcome = lambda request: Pending(request.provider_key)
    payments = [new_payment_id() for _ in range(3)]
    names = {"gateway": "books"}

    def counts() -> list[float]:
        return [
            sample("payments_reconciled_total", **names, subject="operation", answer="Succeeded"),
            sample("payments_operations_healed_total", **names, state="succeeded"),
            sample("payments_reconciled_disagreeing_total", **names),
        ]

    async with running_worker(postgres_url, gateway) as worker:
        await worker.accept(*(delivery("charge", each, f"key-{each}") for each in payments))
        await worker.idle()
        await value(postgres_url, "UPDATE operations SET due_at = now()")
        gateway.answers |= {f"{each}:1": Succeeded(f"{each}:1", 10_000) for each in payments[:2]}
        gateway.answers[f"{payments[2]}:1"] = Succeeded(f"{payments[2]}:1", 9_999)
        before = counts()
        assert await worker.sweep.sweep_once() == 3
        await worker.idle()
    assert [after - then for after, then in zip(counts(), before, strict=True)] == [3, 2, 1]


async def test_a_hold_is_counted_as_checked_and_once_its_end_is_known_as_healed(postgres_url: str) -> None:
    gateway = BookkeepingGateway()

    def counts() -> list[float]:
        checked = sample("payments_reconciled_total", gateway="books", subject="hold", answer="Expired")
        return [checked, sample("payments_operations_healed_total", gateway="books", state="hold_released")]

    async with running_worker(postgres_url, gateway) as worker:
        (payment,) = await lapsed_holds(postgres_url, worker, 1)
        gateway.answers[f"{payment}:1"] = Expired("ref", "automatic")
        before = counts()
        async with reconcilers(postgres_url, worker, gateway) as (reconciler,):
            assert await reconciler.reconcile_holds() == 1
    assert [after - then for after, then in zip(counts(), before, strict=True)] == [1, 1]


async def test_a_hold_of_which_the_provider_tells_another_amount_is_counted_as_disagreeing(postgres_url: str) -> None:
    gateway = BookkeepingGateway()
    async with running_worker(postgres_url, gateway) as worker:
        (payment,) = await lapsed_holds(postgres_url, worker, 1)
        gateway.answers[f"{payment}:1"] = Succeeded(f"ref_{payment}:1", 9_999)
        before = sample("payments_reconciled_disagreeing_total", gateway="books")
        async with reconcilers(postgres_url, worker, gateway) as (reconciler,):
            assert await reconciler.reconcile_holds() == 1
        assert sample("payments_reconciled_disagreeing_total", gateway="books") == before + 1


async def test_holds_of_a_provider_that_rests_keep_no_others_answers_from_being_applied(postgres_url: str) -> None:
    resting, free = Resting(), StillHeld()
    resting.rest, free.name = 100.0, "free"
    async with running_worker(postgres_url, free) as worker:
        payments = await lapsed_holds(postgres_url, worker, 20)
        theirs = "UPDATE operations SET gateway = 'books' WHERE payment_id = ANY($1)"
        await value(postgres_url, theirs, payments[:19])
        free.answers[f"{payments[19]}:1"] = Expired("ref", "automatic")
        told: list[HoldAnswer] = []
        async with reconcilers(postgres_url, worker, resting, free, on_answer=told.append) as (reconciler,):
            async with asyncio.timeout(5):
                assert await reconciler.reconcile_holds() == 20
    assert (list(free.asked), list(resting.asked)) == ([payments[19]], [])
    assert [each.why_not for each in told if each.outcome is None] == [RESTS] * 19
    ends = [each["type"] for each in await events_of(postgres_url, payments[19])]
    assert ends == ["payment.authorized.v1", "payment.authorization_expired.v1"]


class Silent(StillHeld):
    """Leaves every query waiting until `gives_up`, and then raises that no answer came."""

    def __init__(self) -> None:
        super().__init__()
        self.gives_up = asyncio.Event()

    async def status(self, request: GatewayRequest) -> Outcome:
        self.asked[request.payment_id] += 1
        await self.gives_up.wait()
        raise OutcomeUnknown("books", "no answer in time")


async def test_a_provider_that_gives_no_answers_holds_up_no_others_releases_and_a_round_only_once(
    postgres_url: str,
) -> None:
    silent, free = Silent(), StillHeld()
    free.name = "free"
    async with running_worker(postgres_url, free) as worker:
        payments = await lapsed_holds(postgres_url, worker, PAGE + 50)
        theirs = payments[1:-1]
        await value(postgres_url, "UPDATE operations SET gateway = 'books' WHERE payment_id = ANY($1)", theirs)
        order = "UPDATE payments SET hold_due_at = now() - $2::interval WHERE payment_id = $1"
        for place, payment in enumerate(payments):  # `free` has the first of page one and the last of page two
            await value(postgres_url, order, payment, timedelta(seconds=50 - place / 10))
        free.answers |= {f"{each}:1": Expired("ref", "automatic") for each in (payments[0], payments[-1])}
        told: list[HoldAnswer] = []
        async with reconcilers(postgres_url, worker, silent, free, on_answer=told.append) as (reconciler,):
            round_ = asyncio.create_task(reconciler.reconcile_holds())
            await until(lambda: is_released(postgres_url, payments[0]))
            assert silent.asked.total() == AT_ONCE
            assert not round_.done()
            silent.gives_up.set()
            assert await round_ == len(payments)
            assert await is_released(postgres_url, payments[-1])
            assert silent.asked.total() == AT_ONCE
            assert Counter(each.why_not for each in told)[SILENT] == len(theirs) - AT_ONCE
            assert await value(postgres_url, "SELECT count(*) FROM payments WHERE hold_due_at <= now()") == 0

            await value(postgres_url, "UPDATE payments SET hold_due_at = now()")
            await reconciler.reconcile_holds()
            assert silent.asked.total() == 2 * AT_ONCE, "the next round asks anew"


async def is_released(postgres_url: str, payment: UUID) -> bool:
    return bool(await value(postgres_url, "SELECT released_minor > 0 FROM payments WHERE payment_id = $1", payment))


class Busy(StillHeld):
    """Refuses the first 2 * SILENT_AFTER queries, and asks for a short rest after each."""

    def __init__(self) -> None:
        super().__init__()
        self._refusals = 2 * SILENT_AFTER
        self._until = 0.0

    def rests_seconds(self) -> float:
        return max(0.0, self._until - time.monotonic())

    async def status(self, request: GatewayRequest) -> Outcome:
        if self._refusals:
            self._refusals -= 1
            self._until = time.monotonic() + 0.05
            raise GatewayUnreachable("books", "429")
        return await super().status(request)


async def test_a_provider_that_refuses_and_rests_briefly_is_not_taken_for_one_that_gives_no_answers(
    postgres_url: str,
) -> None:
    gateway = Busy()
    async with running_worker(postgres_url, gateway) as worker:
        await lapsed_holds(postgres_url, worker, 4 * SILENT_AFTER)
        async with reconcilers(postgres_url, worker, gateway) as (reconciler,):
            assert await reconciler.reconcile_holds() == 4 * SILENT_AFTER
    assert gateway.asked.total() == 2 * SILENT_AFTER


async def test_how_much_is_stuck_and_for_how_long_is_told_of_operations_and_holds(postgres_url: str) -> None:
    gateway = StillHeld()
    async with running_worker(postgres_url, gateway) as worker:
        await lapsed_holds(postgres_url, worker, 2)
        await in_doubt(postgres_url, new_payment_id(), new_payment_id(), new_payment_id())
    pool = await create_pool(postgres_url, size=1)
    store = PostgresStore(pool)
    stuck = await store.stuck()
    assert {subject: each.number for subject, each in stuck.items()} == {"operation": 3, "hold": 2, "webhook": 0}
    assert 60 <= stuck["hold"].oldest_seconds == stuck["hold"].overdue_seconds < 90
    assert stuck["operation"].overdue_seconds == 0 < stuck["operation"].oldest_seconds < 30
    ages = "UPDATE operations SET due_at = now() - interval '20 seconds', dispatched_at = now() - interval '2 hours'"
    await value(postgres_url, ages + " WHERE due_at IS NOT NULL")
    overdue = (await store.stuck())["operation"]
    assert 20 <= overdue.overdue_seconds < 30
    assert 7200 <= overdue.oldest_seconds < 7230
    pool.terminate()


async def test_a_gateway_without_room_keeps_no_other_from_being_looked_after(postgres_url: str) -> None:
    gateway = BookkeepingGateway()
    gateway.outcome = lambda request: Pending(request.provider_key)
    payments = [new_payment_id() for _ in range(40)]
    async with running_worker(postgres_url, gateway) as worker:
        await worker.accept(*(delivery("charge", each, f"key-{each}") for each in payments))
        await worker.idle()
    due = "UPDATE operations SET due_at = now() - interval '1 day', gateway = $1 WHERE payment_id = ANY($2)"
    for name, some in (("busy", payments[:20]), ("free", payments[20:30]), ("removed", payments[30:])):
        await value(postgres_url, due, name, some)
    await value(postgres_url, "UPDATE operations SET due_at = now() WHERE gateway = 'free'")
    pool = await create_pool(postgres_url, size=1)
    store, lease = PostgresStore(pool), timedelta(seconds=60)
    claimed = await store.claim_due(limit=8, lease=lease, rooms={"busy": 0, "free": 5})
    assert Counter(operation.gateway for _, operation in claimed) == {"free": 5, "removed": 8}
    claimed = await store.claim_due(limit=8, lease=lease, rooms={"busy": 3, "free": 100})
    assert Counter(operation.gateway for _, operation in claimed) == {"busy": 3, "free": 5, "removed": 2}
    pool.terminate()


async def test_operations_of_a_gateway_not_configured_here_are_left_to_other_workers_for_hours(
    postgres_url: str, redis_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    payment_id, gateway = new_payment_id(), BookkeepingGateway()
    gateway.outcome = lambda request: Unreachable("429")
    due = "UPDATE operations SET due_at = now() - $1::interval, dispatched_at = now() - interval '1 day'"
    async with running_worker(postgres_url, gateway) as new, running_worker(postgres_url, Instant()) as old:
        await new.accept(delivery("charge", payment_id, "charge"))
        await new.idle()
        await value(postgres_url, due, timedelta(hours=5))
        assert await old.sweep.sweep_once() == 0
        assert await run(here(postgres_url, redis_url), capsys, dry_run=False, code=1) == []
        await value(postgres_url, due, timedelta(hours=7))
        assert await old.sweep.sweep_once() == 1
        await old.idle()
    assert (await events_of(postgres_url, payment_id))[-1]["reason"] == "gateway_unavailable"


async def test_reconcile_reports_what_is_left_at_a_gateway_not_configured_here(
    postgres_url: str, redis_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    await under_way(postgres_url, BookkeepingGateway(), lambda request: Pending(request.provider_key), 3)
    settings = here(postgres_url, redis_url)
    assert await asyncio.to_thread(reconcile, settings, None, dry_run=False, as_json=False) == 1
    assert "3 left at books: this gateway is not configured here" in capsys.readouterr().err


async def test_while_a_provider_rests_what_is_stuck_there_stays_due_for_whoever_may_ask_first(
    postgres_url: str,
) -> None:
    gateway, payment, later = Resting(), new_payment_id(), new_payment_id()
    gateway.outcome = lambda request: Pending(request.provider_key) if request.payment_id == payment else None
    async with running_worker(postgres_url, gateway) as worker:
        await worker.accept(delivery("charge", payment, "first"))
        await worker.idle()
        await value(postgres_url, "UPDATE operations SET due_at = now()")
        gateway.rest = 100.0
        assert await worker.sweep.sweep_once() == 0
        await worker.accept(delivery("charge", later, "second"))
        await worker.idle()
        assert await value(postgres_url, "SELECT array_agg(status ORDER BY id) FROM payments") == [
            "processing",
            "captured",
        ]
        assert await value(postgres_url, "SELECT count(*) FROM operations WHERE is_leased") == 0
        gateway.rest = 0.0
        assert await worker.sweep.sweep_once() == 1
        await worker.idle()
    assert await value(postgres_url, "SELECT array_agg(status ORDER BY id) FROM payments") == ["captured", "captured"]


def hours_ago(time: str) -> float:
    return (datetime.now(UTC) - datetime.fromisoformat(time)).total_seconds() / 3600


def here(postgres_url: str, redis_url: str) -> Settings:
    return Settings(postgres_url=postgres_url, redis_url=redis_url, gateways=["instant"], default_gateway="instant")


async def test_a_dry_run_tells_of_what_crashed_and_not_of_what_is_being_worked_on(
    postgres_url: str, redis_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    crashed, at_work = new_payment_id(), new_payment_id()
    await in_doubt(postgres_url, crashed, at_work)
    leased = "UPDATE operations SET state = 'dispatched', is_leased = true, due_at = now() + $2 WHERE payment_id = $1"
    await value(postgres_url, leased, crashed, timedelta(seconds=-1))
    await value(postgres_url, leased, at_work, timedelta(minutes=1))
    told = await run(here(postgres_url, redis_url), capsys, dry_run=True)
    assert [(each["payment_id"], each["state"]) for each in told] == [(str(crashed), "dispatched")]


async def test_holds_past_their_end_are_asked_about_at_once_and_in_a_dry_run_too(
    postgres_url: str, redis_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    payments = [new_payment_id(), new_payment_id()]
    async with running_worker(postgres_url, Instant()) as worker:
        await worker.accept(*(delivery("authorize", each, f"key-{each}") for each in payments))
        await worker.idle()
    await value(postgres_url, "UPDATE payments SET authorization_expires_at = now() - interval '5 hours'")
    settings = here(postgres_url, redis_url)
    for dry_run in (True, False):
        told = await run(settings, capsys, dry_run=dry_run)
        assert {each["payment_id"] for each in told} == {str(each) for each in payments}
        facts = ("kind", "number", "state", "amount_minor", "currency")
        assert {tuple(each[name] for name in facts) for each in told} == {
            ("authorize", 1, "hold_past_its_end", 10_000, "USD")
        }
        assert all(5 <= hours_ago(each["since"]) < 5.1 and each["since"].endswith("Z") for each in told)
        (told,) = await run(settings, capsys, dry_run=dry_run, payment=payments[0])
        assert told["payment_id"] == str(payments[0])


async def test_a_dry_run_that_leaves_something_out_says_so(
    postgres_url: str, redis_url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.reconcile.ASKED_MAX", 2)
    await in_doubt(postgres_url, *(new_payment_id() for _ in range(3)))
    settings = here(postgres_url, redis_url)
    assert await asyncio.to_thread(reconcile, settings, None, dry_run=True, as_json=True) == 1
    told = capsys.readouterr()
    assert len(json.loads(told.out)) == 2
    assert "the first 2 of 3" in told.err


async def test_a_narrow_screen_does_not_break_the_providers_word(
    postgres_url: str, redis_url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    payment = new_payment_id()
    await in_doubt(postgres_url, payment)
    await asyncio.to_thread(reconcile, here(postgres_url, redis_url), None, dry_run=True, as_json=False)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{payment}  charge 1 at instant, USD 100.00, indeterminate")
    assert lines[1].startswith("    the provider says: succeeded (reference ")


rule = partial(rule_on, yes=True, as_json=True)


def ruling(postgres_url: str, redis_url: str, payment: UUID, *given: str, answer: str = "") -> Any:
    """The finished `payments reconcile --as`, with `answer` on its standard input."""
    command = [sys.executable, "-m", "app.cli", "reconcile", "--payment", str(payment), *given]
    instant = {"PAYMENTS_GATEWAYS": '["instant"]', "PAYMENTS_DEFAULT_GATEWAY": "instant"}
    servers = {"PAYMENTS_POSTGRES_URL": postgres_url, "PAYMENTS_REDIS_URL": redis_url}
    environment = os.environ | servers | instant
    return subprocess.run(command, env=environment, input=answer, capture_output=True, text=True, check=False)


async def in_review(postgres_url: str) -> Any:
    """A payment whose refund's answer was lost and whose outcome a person must decide."""
    gateway, payment = Instant(), new_payment_id()
    async with running_worker(postgres_url, gateway) as worker:
        await worker.accept(delivery("charge", payment, f"charge-{payment}"))
        await worker.idle()
        gateway.outcome = lambda request: Unknown("lost")
        given = delivery("refund", payment, f"refund-{payment}"), delivery("refund", payment, f"later-{payment}")
        await worker.accept(*given)
        await worker.idle()
    await value(postgres_url, "UPDATE operations SET state = 'needs_review' WHERE number = 2")
    return payment


async def is_gone(postgres_url: str) -> None:
    """The refund's gateway is no longer configured, so it gives no evidence."""
    await value(postgres_url, "UPDATE operations SET gateway = 'gone' WHERE number = 2")


@pytest.mark.parametrize(
    ("verdict", "ends"), [("succeeded", ["refunded", "command_rejected"]), ("not-executed", ["command_rejected"])]
)
async def test_a_person_ends_what_the_provider_gives_no_evidence_of(
    postgres_url: str, redis_url: str, verdict: str, ends: list[str]
) -> None:
    payment, evidence = await in_review(postgres_url), "VNPay portal, refund 14333333"
    await is_gone(postgres_url)
    given = ["--operation", "2", "--as", verdict, "--evidence", evidence, "--json", "--yes"]
    done = await asyncio.to_thread(ruling, postgres_url, redis_url, payment, *given)
    assert done.returncode == 0, done.stderr
    event = json.loads(done.stdout)
    assert (event["operation_number"], event["evidence"]) == (2, evidence)
    logged = [json.loads(line) for line in done.stderr.splitlines() if line.startswith("{")]
    (record,) = [each for each in logged if each["event"] == "a person decided an outcome"]
    assert (record["payment"], record["outcome"], record["evidence"]) == (str(payment), verdict, evidence)

    events = [each for each in await events_of(postgres_url, payment) if each["operation_number"] != 1]
    finals = [each["type"].split(".")[1] for each in events if each["type"] != "payment.pending.v1"]
    # The ruling decided the waiting refund: it is rejected if nothing is left, otherwise carried out.
    assert finals == (ends if verdict == "succeeded" else [*ends, "refunded"])
    assert [each.get("evidence") for each in events if each["payment_seq"] == event["payment_seq"]] == [evidence]
    kept = await value(postgres_url, "SELECT result::jsonb->>'evidence' FROM operations WHERE number = 2")
    assert kept == evidence
    assert await value(postgres_url, "SELECT refunded_minor FROM payments") == 10_000
    with pytest.raises(RulingRefused, match="a person decides only what is needs_review"):
        await asyncio.to_thread(rule, here(postgres_url, redis_url), Finding(payment, 2, verdict, evidence))


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"number": 1}, "operation 1 is succeeded"),
        ({"number": 9}, "has no operation 9"),
        ({"verdict": "declined"}, "--as is succeeded or not-executed"),
        ({"verdict": "not-executed", "amount": "1"}, "moved nothing"),
        ({"amount": "100.01"}, "leave no room"),
        ({"evidence": " "}, "how you know"),
        ({"evidence": "card 4111 1111 1111 1111"}, "card number"),
    ],
)
async def test_a_ruling_that_cannot_be_is_refused_and_changes_nothing(
    postgres_url: str, redis_url: str, given: dict[str, Any], why: str
) -> None:
    payment = await in_review(postgres_url)
    before = await events_of(postgres_url, payment)
    finding = Finding(payment, 2, "succeeded", "the portal")._replace(**given)
    with pytest.raises(RulingRefused, match=why):
        await asyncio.to_thread(rule, here(postgres_url, redis_url), finding)
    assert await events_of(postgres_url, payment) == before


async def test_a_ruling_with_another_amount_books_that_amount(postgres_url: str, redis_url: str) -> None:
    payment = await in_review(postgres_url)
    finding = Finding(payment, 2, "succeeded", "the portal", amount="40")
    assert await asyncio.to_thread(rule, here(postgres_url, redis_url), finding) == 0
    refunds = [each for each in await events_of(postgres_url, payment) if each["type"] == "payment.refunded.v1"]
    told = [(each["operation_number"], each["amount_minor"], each.get("evidence")) for each in refunds]
    assert told == [(2, 4_000, "the portal"), (3, 6_000, None)], "what waited was to return the rest"
    assert await value(postgres_url, "SELECT amount_minor FROM operations WHERE number = 2") == 4_000
    booked = "SELECT sum(amount_minor) FROM ledger WHERE debit = 'customer_refunds'"
    assert await value(postgres_url, booked) == 10_000


async def test_of_a_void_no_amount_is_said_to_be_booked(
    postgres_url: str, redis_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The authorization that the void was sent to cancel may not have held anything yet."""
    payment, gateway = new_payment_id(), Instant()
    async with running_worker(postgres_url, gateway) as worker:
        await worker.accept(delivery("authorize", payment, "authorize"))
        await worker.idle()
        gateway.outcome = lambda request: Unknown("lost")
        await worker.accept(delivery("void", payment, "void"))
        await worker.idle()
    await value(postgres_url, "UPDATE operations SET state = 'needs_review' WHERE number = 2")
    finding = Finding(payment, 2, "succeeded", "the portal")
    assert await asyncio.to_thread(rule, here(postgres_url, redis_url), finding) == 0
    assert "void 2 at instant: what it was sent to release or cancel counts as that" in capsys.readouterr().err


async def test_nobody_decides_what_a_worker_is_sending_again(postgres_url: str, redis_url: str) -> None:
    payment = await in_review(postgres_url)
    finding, settings = Finding(payment, 2, "not-executed", "the portal"), here(postgres_url, redis_url)
    lease = "UPDATE operations SET is_leased = true, due_at = now() + $1 WHERE number = 2"
    await value(postgres_url, lease, timedelta(minutes=1))
    with pytest.raises(RulingRefused, match="look again in a minute"):
        await asyncio.to_thread(rule, settings, finding)
    await value(postgres_url, lease, timedelta(seconds=-1))  # Its worker has died.
    await is_gone(postgres_url)
    assert await asyncio.to_thread(rule, settings, finding) == 0


async def test_a_person_does_not_end_as_not_executed_what_its_provider_shows_by_now(
    postgres_url: str, redis_url: str
) -> None:
    """While it waits for a person, it is sent again, perhaps after the person looked."""
    payment = await in_review(postgres_url)
    finding, settings = Finding(payment, 2, "not-executed", "the portal"), here(postgres_url, redis_url)
    with pytest.raises(RulingRefused, match="the provider shows it by now: succeeded"):
        await asyncio.to_thread(rule, settings, finding)
    assert await value(postgres_url, "SELECT state FROM operations WHERE number = 2") == "needs_review"


async def test_a_charge_that_is_found_done_needs_the_providers_id(postgres_url: str, redis_url: str) -> None:
    payment = new_payment_id()
    await in_doubt(postgres_url, payment)
    await value(postgres_url, "UPDATE operations SET state = 'needs_review'")
    finding, settings = Finding(payment, 1, "succeeded", "the portal"), here(postgres_url, redis_url)
    with pytest.raises(RulingRefused, match="--reference"):
        await asyncio.to_thread(rule, settings, finding)
    assert await asyncio.to_thread(rule, settings, finding._replace(reference="pay_77")) == 0
    assert await value(postgres_url, "SELECT gateway_payment_id FROM payments") == "pay_77"


async def test_a_charge_is_never_booked_with_more_than_was_asked_for(postgres_url: str, redis_url: str) -> None:
    payment = new_payment_id()
    await in_doubt(postgres_url, payment)
    await value(postgres_url, "UPDATE operations SET state = 'needs_review'")
    finding, settings = Finding(payment, 1, "succeeded", "the portal", "pay_77"), here(postgres_url, redis_url)
    with pytest.raises(RulingRefused, match=r"USD 100\.01, and USD 100\.00 was asked for"):
        await asyncio.to_thread(rule, settings, finding._replace(amount="100.01"))
    with pytest.raises(AmountUnusable, match="USD has 2 decimals"):
        await asyncio.to_thread(rule, settings, finding._replace(amount="99.995"))
    assert await value(postgres_url, "SELECT captured_minor FROM payments") == 0
    assert await asyncio.to_thread(rule, settings, finding._replace(amount="99.99")) == 0
    assert await value(postgres_url, "SELECT captured_minor FROM payments") == 9_999


async def test_a_ruling_shows_what_it_will_book_and_asks_first(postgres_url: str, redis_url: str) -> None:
    payment = await in_review(postgres_url)
    before = await events_of(postgres_url, payment)
    given = ["--operation", "2", "--as", "succeeded", "--evidence", "the portal", "--amount", "40"]
    for answer in ("n\n", ""):
        done = await asyncio.to_thread(ruling, postgres_url, redis_url, payment, *given, answer=answer)
        assert done.returncode == 1
        told = f"{payment}  refund 2 at instant: USD 40.00 will be booked, and USD 100.00 was asked for."
        assert done.stderr.startswith(told)
        assert ("nobody can answer here: use --yes" in done.stderr) is (answer == "")
        assert await events_of(postgres_url, payment) == before
    done = await asyncio.to_thread(ruling, postgres_url, redis_url, payment, *given, answer="y\n")
    assert done.returncode == 0
    assert f"{payment}  operation 2 is succeeded: payment.refunded.v1 is on its way.\n" in done.stdout
    assert await value(postgres_url, "SELECT amount_minor FROM operations WHERE number = 2") == 4_000


def _given(gateway: Gateway, settings: Settings, clock: Clock) -> Gateway:
    return gateway


def installed(monkeypatch: pytest.MonkeyPatch, *gateways: BookkeepingGateway) -> None:
    """Let the commands find these gateways under their names."""
    for each in gateways:
        monkeypatch.setitem(wiring.GATEWAYS, each.name, wiring.Registration(partial(_given, each)))


async def test_a_dry_run_does_not_wait_for_a_provider_that_rests_and_says_so(
    postgres_url: str, redis_url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    resting, free = Resting(), Instant()
    resting.rest = 100.0
    installed(monkeypatch, resting, free)
    payments = [new_payment_id() for _ in range(9)]
    await in_doubt(postgres_url, *payments)
    theirs = "UPDATE operations SET gateway = 'books' WHERE payment_id = ANY($1)"
    await value(postgres_url, theirs, payments[:8])
    settings = here(postgres_url, redis_url)
    settings.gateways.append("books")
    async with asyncio.timeout(10):
        told = await run(settings, capsys, dry_run=True, code=1)
    assert Counter((each["gateway"], each["answer"]) for each in told) == {
        ("books", RESTS): 8,
        ("instant", "unknown (message no trace of it)"): 1,
    }


class Limiting(Resting):
    """Refuses every request, and asks for a rest after it."""

    async def status(self, request: GatewayRequest) -> Outcome:
        self.asked[request.payment_id] += 1
        await asyncio.sleep(0.1)
        self.rest = 100.0
        raise GatewayUnreachable("books", "429")


async def under_way(
    postgres_url: str, gateway: BookkeepingGateway, outcome: Callable[[GatewayRequest], Outcome | None], count: int
) -> None:
    """Charges that are due in an hour."""
    gateway.outcome, payments = outcome, [new_payment_id() for _ in range(count)]
    async with running_worker(postgres_url, gateway) as worker:
        await worker.accept(*(delivery("charge", each, f"key-{each}") for each in payments))
        await worker.idle()
    await value(postgres_url, "UPDATE operations SET due_at = now() + interval '1 hour'")


async def test_reconcile_leaves_operations_of_a_resting_provider_to_workers_and_reports_them(
    postgres_url: str, redis_url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway = Limiting()
    installed(monkeypatch, gateway)
    await under_way(postgres_url, gateway, lambda request: Pending(request.provider_key), 150)
    settings = here(postgres_url, redis_url)
    settings.gateways.append("books")
    async with asyncio.timeout(20):
        assert await asyncio.to_thread(reconcile, settings, None, dry_run=False, as_json=False) == 1
    asked = len(gateway.asked)
    assert 1 <= asked <= 16
    assert f"{150 - asked} left at books: the provider wants to rest" in capsys.readouterr().err
    assert await value(postgres_url, "SELECT count(*) FROM operations WHERE is_leased") == 0
    assert await value(postgres_url, "SELECT count(*) FROM operations WHERE state = 'pending'") == 150
    # The operations for which the pace has no room within two seconds were not even claimed.
    assert await value(postgres_url, "SELECT count(*) FROM operations WHERE attempts = 1") == 50


async def test_how_many_were_answered_is_told_and_what_was_not_stays_open(
    postgres_url: str, redis_url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway, silent = BookkeepingGateway(), set[UUID]()
    installed(monkeypatch, gateway)
    gateway.lose_answer = lambda request: True
    await under_way(postgres_url, gateway, lambda request: None, 3)
    settings = here(postgres_url, redis_url)
    settings.gateways.append("books")

    async def told() -> tuple[int, str]:
        code = await asyncio.to_thread(reconcile, settings, None, dry_run=False, as_json=False)
        return code, capsys.readouterr().out.splitlines()[-1].split("`")[0]

    stays = "The rest stays open: workers ask about it again. "
    assert await told() == (1, f"0 of 3 answered: nothing is applied. {stays}")
    assert not any(each["is_answered"] for each in await run(settings, capsys, dry_run=False, code=1))
    silent.add(await value(postgres_url, "SELECT payment_id FROM operations LIMIT 1"))
    gateway.lose_answer = lambda request: request.payment_id in silent
    assert await told() == (1, f"2 of 3 answered, and that is applied. {stays}")
    assert await value(postgres_url, "SELECT count(*) FROM operations WHERE state = 'indeterminate'") == 1
    silent.clear()
    assert await told() == (0, "1 of 1 answered, and that is applied. ")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=str)
async def test_told_to_end_it_saves_what_is_under_way_and_gives_back_the_rest(
    postgres_url: str, redis_url: str, number: signal.Signals
) -> None:
    await under_way(postgres_url, Instant(), lambda request: Unreachable("not connected"), 40)
    given = {"PAYMENTS_GATEWAYS": '["instant"]', "PAYMENTS_DEFAULT_GATEWAY": "instant"}
    given |= {"PAYMENTS_POSTGRES_URL": postgres_url, "PAYMENTS_REDIS_URL": redis_url}
    given["PAYMENTS_INSTANT_GATEWAY_LATENCY_MS"] = "1500"
    command = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "app.cli", "reconcile", "--now", env=os.environ | given, stderr=subprocess.PIPE
    )
    async with asyncio.timeout(30):
        while not await value(postgres_url, "SELECT count(*) FROM operations WHERE is_leased"):
            await asyncio.sleep(0.02)
        command.send_signal(number)
        assert command.stderr is not None, "it is a pipe"
        while not (line := await command.stderr.readline()).startswith(b"Ending: calls under way are waited for"):
            assert line, "it ended without a word"
        assert await value(postgres_url, "SELECT count(*) FROM operations WHERE is_leased"), "it is told at once"
        _, told = await command.communicate()
    assert command.returncode == 1
    states = "SELECT array_agg(DISTINCT state ORDER BY state) FROM operations"
    assert await value(postgres_url, states) == ["dispatched", "succeeded"]
    assert await value(postgres_url, "SELECT count(*) FROM operations WHERE is_leased") == 0
    left = await value(postgres_url, "SELECT count(*) FROM operations WHERE state = 'dispatched'")
    assert f"{left} left at instant: told to end" in told.decode()


async def test_operations_that_never_reached_the_provider_are_claimed_beside_longer_due_ones(
    postgres_url: str,
) -> None:
    gateway = BookkeepingGateway()
    await under_way(postgres_url, gateway, lambda request: Pending(request.provider_key), 40)
    await under_way(postgres_url, gateway, lambda request: Unreachable("not connected"), 20)
    await value(postgres_url, "UPDATE operations SET due_at = now() - interval '2 hours'")
    await value(postgres_url, "UPDATE operations SET due_at = now() WHERE state = 'dispatched'")
    pool = await create_pool(postgres_url, size=1)

    async def claimed(room: int) -> Counter[str]:
        found = await PostgresStore(pool).claim_due(limit=500, lease=timedelta(minutes=1), rooms={"books": room})
        assert len({operation.payment_id for _, operation in found}) == len(found)
        return Counter(operation.state.value for _, operation in found)

    assert await claimed(2) == {"dispatched": 1, "pending": 1}
    assert await claimed(8) == {"dispatched": 4, "pending": 4}
    await value(postgres_url, "UPDATE operations SET due_at = now() + interval '1 hour' WHERE state = 'pending'")
    assert await claimed(8) == {"dispatched": 8}
    await value(postgres_url, "UPDATE operations SET due_at = now() WHERE state = 'pending'")
    assert await claimed(500) == {"dispatched": 7, "pending": 40}
    pool.terminate()


async def test_a_dry_run_cancels_nothing_that_was_abandoned_and_the_run_itself_does(
    postgres_url: str, redis_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    payment_id = new_payment_id()
    with running_sandbox() as url, httpx.Client(base_url=url) as http:
        own: dict[str, Any] = {
            "stripe_api_base": url,
            "stripe_api_key": "sk_test_x",
            "stripe_return_url": "https://a.b",
        }
        settings = Settings(postgres_url=postgres_url, redis_url=redis_url, stripe_action_window_seconds=3_600, **own)
        gateway = wiring.create_gateways(settings)["stripe"]
        async with running_worker(postgres_url, gateway) as worker:
            await worker.accept(delivery("charge", payment_id, "key", payment_method="pm_card_threeDSecure2Required"))
            await worker.idle()
        await gateway.close()
        reference = await value(postgres_url, "SELECT reference FROM operations")

        def aged_by(seconds: int) -> dict[str, Any]:
            answer = http.post(f"/_sandbox/payment_intents/{reference}/age?seconds={seconds}")
            return dict(answer.raise_for_status().json())

        ends_at = aged_by(3_600)["created"] + 2 * 3_600
        (told,) = await run(settings, capsys, dry_run=True)
        assert told["answer"].startswith("requires action (")
        assert aged_by(0)["status"] == "requires_action"
        (told,) = await run(settings, capsys, dry_run=False)
        assert told["answer"] == f"expired (reference {reference}, code abandoned)"
        assert aged_by(0)["status"] == "canceled"
    asked, ended = await events_of(postgres_url, payment_id)
    assert (asked["type"], ended["type"]) == ("payment.requires_action.v1", "payment.expired.v1")
    assert datetime.fromisoformat(asked["action"]["expires_at"]) == datetime.fromtimestamp(ends_at, UTC)


# The payment with the smaller id comes later in the index.
TWO_THAT_WAIT = """
    INSERT INTO operations (payment_id, number, kind, fingerprint, content, state, gateway, due_at)
    SELECT id, 1, 'charge', '', '{}', 'pending', 'stripe', now() + due FROM given
"""
TWO_LAPSED = """
    INSERT INTO payments (payment_id, status, currency, authorized_minor, authorization_expires_at, hold_due_at)
    SELECT id, 'authorized', 'EUR', 1, now() - interval '1 day', now() + due FROM given
"""
GIVEN = "WITH given (id, due) AS (VALUES ($1::uuid, interval '2 hours'), ($2, interval '1 hour'))"


@pytest.mark.parametrize(
    ("statement", "rows", "save"),
    [
        ("MAKE_DUE", TWO_THAT_WAIT, "UPDATE operations SET attempts = attempts + 1 WHERE payment_id = $1"),
        ("MAKE_HOLDS_DUE", TWO_LAPSED, "UPDATE payments SET version = version + 1 WHERE payment_id = $1"),
    ],
)
async def test_making_all_of_it_due_waits_for_a_batch_and_never_in_a_circle_with_it(
    postgres_url: str, statement: str, rows: str, save: str
) -> None:
    """A batch saves in order of payment id; half of it is saved when everything that waits is made due."""
    ids = [UUID(int=1), UUID(int=2)]
    batch = await asyncpg.connect(postgres_url)
    maker = await asyncpg.connect(postgres_url, server_settings=PINNED_PLANS)
    await batch.execute(f"{GIVEN} {rows}", *ids)
    async with asyncio.timeout(30):
        async with batch.transaction():
            await batch.execute(save, ids[0])
            making = asyncio.create_task(maker.execute(getattr(statements, statement), None))
            while not await batch.fetchval("SELECT EXISTS (SELECT FROM pg_locks WHERE NOT granted)"):
                await asyncio.sleep(0.01)
            await batch.execute(save, ids[1])
        assert await making == "UPDATE 2"
    await maker.close()
    await batch.close()
