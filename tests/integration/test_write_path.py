"""The write path's own guarantees against a real Postgres; test_exactly_once tests what they add up to."""

import asyncio
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import pytest
from uuid_utils.compat import uuid7

from domain.commands import OperationKind
from domain.decision import Answer
from domain.errors import ConcurrentUpdate, StoreUnavailable
from domain.operations import Declined, DeclineReason, Succeeded
from domain.ports import Changes
from handlers import metrics
from handlers.write_path import ATTEMPTS_MAX, WritePath
from infra.postgres.pool import create_pool
from infra.postgres.store import PostgresStore
from tests.support.outbox import set_database
from tests.support.provider import BookkeepingGateway
from tests.support.service import (
    NoHint,
    WrongHint,
    delivery,
    events_of,
    new_payment_id,
    rules,
    running_worker,
    until_settled,
    value,
)


class Hint:
    """Gives the answer that it was created with."""

    def __init__(self, are_new: bool) -> None:
        self._are_new = are_new

    async def are_new(self, idempotency_keys: Sequence[str]) -> bool:
        return self._are_new


async def test_a_refused_amount_is_told_in_the_commands_own_currency_and_repeated_as_it_was(postgres_url: str) -> None:
    payment_id, key = new_payment_id(), "in yen"
    refused = [
        delivery(kind, payment_id, f"{kind} in dollars", amount_minor=5_000, currency="USD")
        for kind in ("refund", "capture", "charge")
    ]
    async with running_worker(postgres_url, BookkeepingGateway()) as worker:
        await worker.accept(delivery("charge", payment_id, key, amount_minor=5_000, currency="JPY"))
        await worker.idle()
        await worker.accept(*refused)
        await worker.accept(*refused, delivery("refund", payment_id, "too much", amount_minor=5_001))
        await worker.idle()
    events = [each for each in await events_of(postgres_url, payment_id) if each["idempotency_key"] != key]
    told = [(each["reason"], each["currency"], each["payment"]["currency"]) for each in events]
    once = [("currency_mismatch", "USD", "JPY")] * 2 + [("payment_already_exists", "USD", "JPY")]
    assert sorted(told) == sorted([*once, *once, ("amount_exceeds_refundable", "JPY", "JPY")])
    originals = {each["event_id"]: each for each in events if not each["replayed"]}
    for replay in (each for each in events if each["replayed"]):
        marks = {name: replay[name] for name in ("event_id", "original_event_id", "replayed")}
        assert replay == originals[replay["original_event_id"]] | marks


@pytest.mark.parametrize("are_new", [True, False], ids=["old keys seem new", "new keys seem old"])
async def test_a_wrong_hint_changes_no_result(postgres_url: str, are_new: bool) -> None:
    gateway, payment_id, other = BookkeepingGateway(), new_payment_id(), new_payment_id()
    async with running_worker(postgres_url, gateway, hint=Hint(are_new)) as worker:
        for _ in range(2):
            await worker.accept(delivery("charge", payment_id, "key"), delivery("charge", other, "other"))
            await worker.idle()
        await worker.accept(delivery("charge", payment_id, "key", amount_minor=1))
        await worker.accept(delivery("refund", payment_id, "refund"), delivery("charge", other, "other"))
        await worker.idle()
    kinds = [(event["type"].split(".")[1], event["replayed"]) for event in await events_of(postgres_url, payment_id)]
    assert sorted(kinds) == [
        ("captured", False),
        ("captured", True),
        ("command_rejected", False),
        ("refunded", False),
    ]
    assert gateway.moved == {OperationKind.CHARGE: 2, OperationKind.REFUND: 1}
    assert len(await events_of(postgres_url, other)) == 3


async def test_one_key_used_by_two_payments_at_once_executes_one_and_rejects_the_other(postgres_url: str) -> None:
    gateway = BookkeepingGateway()
    pairs = [(new_payment_id(), new_payment_id()) for _ in range(20)]
    async with (
        running_worker(postgres_url, gateway, hint=WrongHint()) as first,
        running_worker(postgres_url, gateway, hint=NoHint()) as second,
    ):
        await asyncio.gather(
            *(first.accept(delivery("charge", mine, f"key-{number}")) for number, (mine, _) in enumerate(pairs)),
            *(second.accept(delivery("charge", yours, f"key-{number}")) for number, (_, yours) in enumerate(pairs)),
        )
        await asyncio.gather(first.idle(), second.idle())
    assert gateway.moved == {OperationKind.CHARGE: len(pairs)}
    for pair in pairs:
        results = [event for each in pair for event in await events_of(postgres_url, each)]
        assert sorted(event["type"] for event in results) == [
            "payment.captured.v1",
            "payment.command_rejected.v1",
        ]
        assert {event.get("reason") for event in results} == {None, "idempotency_conflict"}


async def test_a_gateway_called_inside_a_transaction_stops_before_any_money_moves(postgres_url: str) -> None:
    gateway = BookkeepingGateway()
    async with running_worker(postgres_url, gateway) as worker:
        applied = await worker.write_path.apply([delivery("charge", new_payment_id(), "key")])
        store = worker.dispatcher._store
        async with store.begin():
            with pytest.raises(AssertionError, match="never called inside a transaction"):
                await worker.dispatcher._outcome(gateway.charge, applied.requests[0])
    assert gateway.calls == {}


async def test_a_saved_command_is_not_refused_when_its_metric_fails(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise ValueError("no such label")

    monkeypatch.setattr(metrics, "results", broken)
    gateway, payment_id = BookkeepingGateway(), new_payment_id()
    async with running_worker(postgres_url, gateway) as worker:
        applied = await worker.accept(delivery("capture", payment_id, "key"), delivery("charge", payment_id, "charge"))
        await worker.idle()
    assert (applied.refused, len(applied.requests)) == ([], 1)
    told = [(event["type"], event["replayed"]) for event in await events_of(postgres_url, payment_id)]
    assert told == [("payment.command_rejected.v1", False), ("payment.captured.v1", False)]


async def test_transactions_do_not_nest(postgres_url: str) -> None:
    pool = await create_pool(postgres_url, size=2)
    store = PostgresStore(pool)
    async with store.begin():
        with pytest.raises(AssertionError, match="does not nest"):
            async with store.begin():
                pass
    assert not store.in_transaction()
    await pool.close()


async def test_a_poison_answer_among_good_ones_stands_alone_and_its_operation_stays_open(postgres_url: str) -> None:
    gateway = BookkeepingGateway()
    payments = [new_payment_id() for _ in range(50)]
    async with running_worker(postgres_url, gateway) as worker:
        applied = await worker.write_path.apply([delivery("charge", each, f"key-{each}") for each in payments])
        answers = [
            Answer(each.payment_id, each.operation_number, each.lease_token, Succeeded(each.provider_key, 10_000))
            for each in applied.requests
        ]
        answers[17] = answers[17]._replace(outcome=Succeeded("nul\x00", 10_000))
        settled = await worker.write_path.apply(answers)
        assert [refused.given for refused in settled.refused] == [answers[17]]
        assert await value(postgres_url, "SELECT count(*) FROM operations WHERE state = 'dispatched'") == 1
        assert await value(postgres_url, "SELECT sum(captured_minor) FROM payments") == 490_000
        await value(postgres_url, "UPDATE operations SET due_at = now() WHERE due_at IS NOT NULL RETURNING 1")
        assert await worker.sweep.sweep_once() == 1
        await worker.idle()
    assert await value(postgres_url, "SELECT sum(captured_minor) FROM payments") == 500_000


async def test_answers_and_commands_of_one_payment_at_the_same_time_lose_nothing(postgres_url: str) -> None:
    gateway, payment_id = BookkeepingGateway(), new_payment_id()
    gateway.outcome = lambda request: (
        Declined(DeclineReason.OTHER) if request.kind == "refund" and request.operation_number % 2 else None
    )
    async with running_worker(postgres_url, gateway) as first, running_worker(postgres_url, gateway) as second:
        workers = [first, second]
        await first.accept(delivery("charge", payment_id, "charge"))
        refunds = [delivery("refund", payment_id, f"r{number}", amount_minor=10) for number in range(60)]
        await asyncio.gather(*(workers[number % 2].accept(refund) for number, refund in enumerate(refunds)))
        await until_settled(postgres_url)
        await asyncio.gather(first.idle(), second.idle())
    events = await events_of(postgres_url, payment_id)
    assert [event["payment_seq"] for event in events] == list(range(1, 62))
    kinds = [event["type"].split(".")[1] for event in events]
    assert kinds[0] == "captured"
    assert sorted(kinds[1:]) == ["declined"] * 30 + ["refunded"] * 30
    assert await value(postgres_url, "SELECT refunded_minor FROM payments") == 300
    assert gateway.moved_minor[OperationKind.REFUND] == 300


class _AlwaysLosing:
    """A store whose transactions always lose to a concurrent update."""

    def __init__(self) -> None:
        self.attempts = 0

    def begin(self) -> Any:
        self.attempts += 1
        raise ConcurrentUpdate("somebody else won")

    async def save(self, changes: Changes) -> None:
        self.begin()


async def test_a_batch_that_always_loses_is_handed_back_as_if_postgres_were_away() -> None:
    store: Any = _AlwaysLosing()
    write_path = WritePath(
        store=store, rules=rules(), clock=lambda: datetime.now(UTC), new_id=uuid7, recent=WrongHint()
    )
    with pytest.raises(StoreUnavailable):
        await write_path.apply([delivery("charge", new_payment_id(), "key")])
    assert store.attempts == ATTEMPTS_MAX


async def test_postgres_away_is_raised_and_not_taken_for_a_poison_input(postgres_url: str) -> None:
    async with running_worker(postgres_url, BookkeepingGateway()) as worker:
        worker.write_path._store._pool.terminate()  # type: ignore[attr-defined]
        with pytest.raises(StoreUnavailable):
            await worker.write_path.apply([delivery("charge", new_payment_id(), f"key-{each}") for each in range(10)])


async def test_a_charge_and_its_answer_are_one_statement_each(postgres_url: str) -> None:
    async with running_worker(postgres_url, BookkeepingGateway(), hint=WrongHint()) as worker:
        worker.write_path._store.begin = None  # type: ignore[assignment,method-assign]
        await worker.accept(*(delivery("charge", new_payment_id(), f"key-{number}") for number in range(20)))
        await worker.idle()
    assert await value(postgres_url, "SELECT count(*) FROM payments WHERE status = 'captured'") == 20


async def test_a_batch_with_one_wrong_guess_is_undone_as_a_whole_and_decided_again(postgres_url: str) -> None:
    """The second charge of a payment was taken for its first one; nothing of that attempt may stay."""
    gateway, known = BookkeepingGateway(), new_payment_id()
    async with running_worker(postgres_url, gateway, hint=WrongHint()) as worker:
        await worker.accept(delivery("charge", known, "first"))
        await worker.idle()
        batch = [delivery("charge", new_payment_id(), f"key-{number}") for number in range(5)]
        await worker.accept(*batch, delivery("charge", known, "second"))
        await worker.idle()
    assert gateway.moved == {OperationKind.CHARGE: 6}
    events = await events_of(postgres_url, known)
    assert [event["type"] for event in events] == ["payment.captured.v1", "payment.command_rejected.v1"]
    assert await value(postgres_url, "SELECT count(*) FROM outbox") == 7


@pytest.mark.parametrize(("given", "found"), [("off", "on"), ("local", "local"), ("remote_apply", "remote_apply")])
async def test_connections_never_use_synchronous_commit_off(postgres_url: str, given: str, found: str) -> None:
    await set_database(postgres_url, f"synchronous_commit = {given}")
    async with await create_pool(postgres_url, size=1) as pool:
        assert await pool.fetchval("SHOW synchronous_commit") == found
        assert await pool.fetchval("SHOW synchronous_commit") == found
