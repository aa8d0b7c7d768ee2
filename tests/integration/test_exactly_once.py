"""Exactly once, on a real Postgres: many deliveries, several workers, lost answers, taken-over leases, poison."""

import asyncio
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial

import pytest
from structlog.testing import capture_logs

from domain.commands import OperationKind
from domain.decision import Answer, Delivery, Notified
from domain.errors import ConcurrentUpdate, GatewayError, GatewayUnreachable, OutcomeUnknown
from domain.notices import Notice
from domain.operations import Declined, DeclineReason, GatewayRequest, NotExecuted, Outcome, RequiresAction, Succeeded
from domain.ports import Changes
from domain.rules import RetryPolicy
from infra.postgres.pool import create_pool
from infra.postgres.store import PostgresStore
from tests.support.provider import BookkeepingGateway
from tests.support.service import (
    QUICK_RETRY,
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


@pytest.mark.parametrize("hint", [NoHint(), WrongHint()], ids=["valkey away", "valkey wrong"])
@pytest.mark.parametrize("count", [10, 100])
async def test_concurrent_deliveries_of_one_key_over_two_workers_charge_once_and_are_all_answered(
    postgres_url: str, count: int, hint: object
) -> None:
    gateway, payment_id = BookkeepingGateway(), new_payment_id()
    same = delivery("charge", payment_id, "one-key")
    async with (
        running_worker(postgres_url, gateway, hint=hint) as first,
        running_worker(postgres_url, gateway, hint=hint) as second,
    ):
        workers = [first, second]
        await asyncio.gather(*(workers[number % 2].accept(same) for number in range(count)))
        await asyncio.gather(first.idle(), second.idle())
    assert gateway.moved == {OperationKind.CHARGE: 1}
    assert sum(gateway.calls.values()) == 1
    assert await value(postgres_url, "SELECT count(*) FROM operations") == 1
    events = await events_of(postgres_url, payment_id)
    assert [event["type"] for event in events] == ["payment.captured.v1"] * count
    assert sorted(event["replayed"] for event in events) == [False] + [True] * (count - 1)
    assert len({event["event_id"] for event in events}) == count


async def test_of_a_hundred_concurrent_refunds_of_60_of_100_dollars_one_succeeds(postgres_url: str) -> None:
    gateway, payment_id = BookkeepingGateway(), new_payment_id()
    async with running_worker(postgres_url, gateway) as first, running_worker(postgres_url, gateway) as second:
        await first.accept(delivery("charge", payment_id, "charge"))
        await first.idle()
        workers = [first, second]
        refunds = [delivery("refund", payment_id, f"refund-{number}", amount_minor=6_000) for number in range(100)]
        await asyncio.gather(*(workers[number % 2].accept(refund) for number, refund in enumerate(refunds)))
        await asyncio.gather(first.idle(), second.idle())
        await until_settled(postgres_url)
    assert gateway.moved_minor[OperationKind.REFUND] == 6_000
    results = [
        event for event in await events_of(postgres_url, payment_id) if event["command_type"] == "payment.refund.v1"
    ]
    assert [event["type"] for event in results].count("payment.refunded.v1") == 1
    rejected = [event for event in results if event["type"] == "payment.command_rejected.v1"]
    assert [event["reason"] for event in rejected] == ["amount_exceeds_refundable"] * 99
    assert await value(postgres_url, "SELECT refunded_minor FROM payments") == 6_000


async def test_authorize_capture_and_refund_in_one_batch_all_succeed_in_order(postgres_url: str) -> None:
    gateway, payment_id = BookkeepingGateway(), new_payment_id()
    async with running_worker(postgres_url, gateway) as worker:
        await worker.accept(
            delivery("authorize", payment_id, "a"),
            delivery("capture", payment_id, "b", amount_minor=4_000),
            delivery("capture", payment_id, "c"),
            delivery("refund", payment_id, "d", amount_minor=1_000),
        )
        await worker.idle()
    events = await events_of(postgres_url, payment_id)
    kinds = ["authorized", "captured", "captured", "refunded"]
    assert [event["type"] for event in events] == [f"payment.{kind}.v1" for kind in kinds]
    assert [event["payment_seq"] for event in events] == [1, 2, 3, 4]
    assert [event["amount_minor"] for event in events] == [10_000, 4_000, 6_000, 1_000]
    fold = "SELECT sum(amount_minor) FILTER (WHERE account = 'gateway_clearing') FROM ledger_postings"
    assert await value(postgres_url, fold) == 9_000


async def test_a_lost_answer_is_pending_and_then_resolved_with_the_same_provider_key(postgres_url: str) -> None:
    gateway, payment_id = BookkeepingGateway(), new_payment_id()
    gateway.lose_answer = lambda request: request.attempts == 1
    async with running_worker(postgres_url, gateway, sweeping=True) as worker:
        await worker.accept(delivery("charge", payment_id, "lost"))
        await until_settled(postgres_url)
    assert gateway.moved == {OperationKind.CHARGE: 1}
    assert gateway.calls == {f"{payment_id}:1": 2}
    events = await events_of(postgres_url, payment_id)
    assert [event["type"] for event in events] == ["payment.pending.v1", "payment.captured.v1"]
    assert events[0]["cause"] == "outcome_unknown"


async def test_doubt_past_its_deadline_becomes_needs_review_and_never_failed(postgres_url: str) -> None:
    gateway, payment_id = BookkeepingGateway(), new_payment_id()
    gateway.lose_answer = lambda request: True
    retry = replace(
        QUICK_RETRY, review_after=timedelta(milliseconds=200), review_poll_interval=timedelta(milliseconds=50)
    )
    given = rules(retry)
    async with running_worker(postgres_url, gateway, sweeping=True, given=given) as worker:
        await worker.accept(delivery("charge", payment_id, "doubt"))
        async with asyncio.timeout(20):
            while await value(postgres_url, "SELECT state FROM operations") != "needs_review":
                await asyncio.sleep(0.02)
        gateway.lose_answer = lambda request: False
        await until_settled(postgres_url)
    kinds = [event["type"] for event in await events_of(postgres_url, payment_id)]
    assert kinds == ["payment.pending.v1", "payment.needs_review.v1", "payment.captured.v1"]
    assert gateway.moved == {OperationKind.CHARGE: 1}


async def test_the_late_answer_of_a_worker_whose_lease_was_taken_over_changes_nothing_unless_money_moved(
    postgres_url: str,
) -> None:
    gateway, payment_id = BookkeepingGateway(), new_payment_id()
    async with running_worker(postgres_url, gateway) as worker:
        applied = await worker.write_path.apply([delivery("charge", payment_id, "late")])
        (request,) = applied.requests
        # The first worker freezes here. Its lease expires, and another worker takes over.
        pool = await create_pool(postgres_url, size=1)
        await pool.execute("UPDATE operations SET due_at = now() - interval '1 second'")
        ((_, operation),) = await PostgresStore(pool).claim_due(
            limit=10, lease=timedelta(seconds=60), rooms={"books": 10}
        )
        await pool.close()
        assert (operation.state, operation.lease_token) == ("indeterminate", request.lease_token + 1)
        late = partial(Answer, payment_id, request.operation_number, request.lease_token)
        await worker.write_path.apply([late(Declined(DeclineReason.OTHER))])
        assert await value(postgres_url, "SELECT status FROM payments") == "processing"
        assert await events_of(postgres_url, payment_id) == []
        # But a report that money moved counts, whoever holds the lease now.
        await worker.write_path.apply([late(Succeeded("late"))])
        await worker.write_path.apply([late(Declined(DeclineReason.OTHER))._replace(lease_token=operation.lease_token)])
    assert await value(postgres_url, "SELECT captured_minor FROM payments") == 10_000
    assert [each["type"] for each in await events_of(postgres_url, payment_id)] == ["payment.captured.v1"]


async def test_a_success_that_comes_after_its_operation_has_ended_without_is_late_and_counts_once(
    postgres_url: str,
) -> None:
    """A person or a provider's list said that it was not executed; the worker that slept meanwhile knows better."""
    gateway, payment_id = BookkeepingGateway(), new_payment_id()
    async with running_worker(postgres_url, gateway) as worker:
        await worker.accept(delivery("charge", payment_id, "charge"))
        await worker.idle()
        (request,) = (await worker.write_path.apply([delivery("refund", payment_id, "refund")])).requests
        answer = partial(Answer, payment_id, request.operation_number, request.lease_token)
        await worker.write_path.apply([answer(NotExecuted("not there"))])
        assert await value(postgres_url, "SELECT refunded_minor FROM payments") == 0
        for _ in range(2):
            await worker.write_path.apply([answer(Succeeded("done"))])
        with capture_logs() as logs:
            await worker.write_path.apply([answer(Succeeded("done again"))])
        assert [each["event"] for each in logs] == ["provider's answer contradicts what is booked"], "it was done twice"
    assert await value(postgres_url, "SELECT refunded_minor FROM payments") == 10_000
    kinds = [each["type"] for each in await events_of(postgres_url, payment_id)]
    assert kinds == ["payment.captured.v1", "payment.command_rejected.v1", "payment.late_success.v1"]


@pytest.mark.parametrize("lost", [GatewayUnreachable, OutcomeUnknown])
async def test_a_void_that_is_sent_again_is_of_the_attempt_that_waits_and_not_of_the_paid_one(
    postgres_url: str, lost: type[GatewayError]
) -> None:
    gateway, payment_id = _FirstVoidIsLost(lost), new_payment_id()
    async with running_worker(postgres_url, gateway, sweeping=True) as worker:
        for key in ("declined", "waits"):
            await worker.accept(delivery("authorize", payment_id, key))
            await worker.idle()
        paid = Notice("books", "", "late", payment_id, 1, outcome=Succeeded("ref_1", 10_000))
        assert not (await worker.write_path.apply([Notified(None, payment_id, paid)])).refused
        await worker.accept(delivery("void", payment_id, "void"))
        await until_settled(postgres_url)
    assert gateway.voided == ["ref_2", "ref_2"]
    assert (await events_of(postgres_url, payment_id))[-1]["type"] == "payment.voided.v1"
    assert await value(postgres_url, "SELECT authorized_minor - released_minor FROM payments") == 10_000


class _FirstVoidIsLost(BookkeepingGateway):
    """Declines the first attempt, leaves the second one waiting for the payer, and answers only the second void."""

    def __init__(self, lost: type[GatewayError]) -> None:
        super().__init__()
        self._lost = lost
        self.voided: list[str | None] = []
        answers: dict[int, Outcome] = {
            1: Declined(DeclineReason.OTHER, None, "ref_1"),
            2: RequiresAction("ref_2", "redirect", "https://bank.invalid"),
        }
        self.outcome = lambda request: answers.get(request.operation_number)

    async def void(self, request: GatewayRequest) -> Outcome:
        self.voided.append(request.gateway_payment_id)
        if len(self.voided) == 1:
            raise self._lost("books", "no answer")
        return await super().void(request)


@pytest.mark.parametrize("is_at_hand", [True, False])
async def test_a_lease_that_is_taken_between_reading_and_writing_matches_no_row(
    postgres_url: str, is_at_hand: bool
) -> None:
    gateway, payment_id = BookkeepingGateway(), new_payment_id()
    pool = await create_pool(postgres_url, size=2)
    store = PostgresStore(pool)
    async with running_worker(postgres_url, gateway) as worker:
        await worker.write_path.apply([delivery("charge", payment_id, "race")])
        if not is_at_hand:
            worker.write_path._at_hand.note([payment_id], [])
        await pool.execute("UPDATE operations SET due_at = now() - interval '1 second'")
        transaction_store = _ClaimedBeforeSave(store)
        worker.write_path._store = transaction_store  # type: ignore[assignment]
        await worker.write_path.apply([Answer(payment_id, 1, 1, Declined(DeclineReason.OTHER))])
        assert transaction_store.lost == 1
    await pool.close()
    assert await value(postgres_url, "SELECT state FROM operations") == "indeterminate"


async def test_how_old_a_call_is_that_is_taken_over_is_told_by_postgres(postgres_url: str) -> None:
    """After a stopped machine resumes, its clock is late: by that clock, the provider would still know the key."""
    pool = await create_pool(postgres_url, size=1)
    store = PostgresStore(pool)
    store.now._told -= timedelta(hours=2)
    await store.claim_due(limit=1, lease=timedelta(seconds=60), rooms={"books": 1})
    assert abs(await pool.fetchval("SELECT clock_timestamp()") - store.now()) < timedelta(seconds=5)
    await pool.close()


class _ClaimedBeforeSave:
    """A store in which another worker once claims the operation between the read and the write."""

    def __init__(self, store: PostgresStore) -> None:
        self._store = store
        self.lost = 0

    def begin(self) -> "_ClaimingBlock":
        return _ClaimingBlock(self, self._store)

    async def save(self, changes: Changes) -> None:
        await self._store.claim_due(limit=10, lease=timedelta(seconds=60), rooms={"books": 10})
        try:
            await self._store.save(changes)
        except ConcurrentUpdate:
            self.lost += 1
            raise


class _ClaimingBlock:
    def __init__(self, owner: _ClaimedBeforeSave, store: PostgresStore) -> None:
        self._owner, self._store, self._block = owner, store, store.begin()

    async def __aenter__(self) -> "_ClaimingBlock":
        self._transaction = await self._block.__aenter__()
        self.lock_payments = self._transaction.lock_payments
        self.find_operations = self._transaction.find_operations
        self.operations_at = self._transaction.operations_at
        self.operations_of_kind = self._transaction.operations_of_kind
        return self

    async def save(self, changes: Changes) -> None:
        if not self._owner.lost:
            await self._store.claim_due(limit=10, lease=timedelta(seconds=60), rooms={"books": 10})
        try:
            await self._transaction.save(changes)
        except ConcurrentUpdate:
            self._owner.lost += 1
            raise

    async def __aexit__(self, *exception: object) -> bool | None:
        return await self._block.__aexit__(*exception)  # type: ignore[arg-type]


async def test_one_poison_input_among_500_stands_alone_and_499_are_saved(postgres_url: str) -> None:
    gateway = BookkeepingGateway()
    inputs = [delivery("charge", new_payment_id(), f"key-{number}") for number in range(500)]
    command = inputs[250].command
    # Postgres refuses NUL in text. The message reader would have refused it before.
    inputs[250] = Delivery(command._replace(order_id="a\x00b"))  # type: ignore[union-attr]
    async with running_worker(postgres_url, gateway, given=rules(RetryPolicy())) as worker:
        applied = await worker.accept(*inputs)
        await worker.idle()
    assert [refused.given for refused in applied.refused] == [inputs[250]]
    assert await value(postgres_url, "SELECT count(*) FROM payments WHERE status = 'captured'") == 499
    assert gateway.moved == {OperationKind.CHARGE: 499}


async def test_the_same_key_with_other_content_is_a_conflict_and_moves_nothing(postgres_url: str) -> None:
    gateway, payment_id, other = BookkeepingGateway(), new_payment_id(), new_payment_id()
    async with running_worker(postgres_url, gateway) as worker:
        await worker.accept(delivery("charge", payment_id, "key"))
        await worker.idle()
        await worker.accept(delivery("charge", payment_id, "key", amount_minor=1), delivery("charge", other, "key"))
        await worker.idle()
    for each in (payment_id, other):
        last = (await events_of(postgres_url, each))[-1]
        assert (last["type"], last["reason"]) == ("payment.command_rejected.v1", "idempotency_conflict")
    assert gateway.moved == {OperationKind.CHARGE: 1}


async def test_a_delivery_while_the_first_is_under_way_is_answered_once_there_is_a_result(postgres_url: str) -> None:
    gateway, payment_id = BookkeepingGateway(), new_payment_id()
    gateway.gate.clear()
    async with running_worker(postgres_url, gateway) as worker:
        await worker.accept(delivery("charge", payment_id, "key"))
        await worker.accept(delivery("charge", payment_id, "key"))
        assert await events_of(postgres_url, payment_id) == []
        gateway.gate.set()
        await worker.idle()
    assert [event["replayed"] for event in await events_of(postgres_url, payment_id)] == [False, True]
    assert sum(gateway.calls.values()) == 1


class BusyUntil(BookkeepingGateway):
    """Refuses every request until `moment`, before anything is executed."""

    def __init__(self, moment: datetime) -> None:
        super().__init__()
        self._moment = moment

    async def _execute(self, request: GatewayRequest) -> Outcome:
        if datetime.now(UTC) < self._moment:
            raise GatewayUnreachable(self.name, "busy")
        return await super()._execute(request)


async def test_a_charge_that_the_provider_never_accepted_is_not_executed_after_its_expiry(postgres_url: str) -> None:
    expires_at = datetime.now(UTC) + timedelta(seconds=1)
    payment_id, gateway = new_payment_id(), BusyUntil(expires_at)
    async with running_worker(postgres_url, gateway, sweeping=True) as worker:
        await worker.accept(delivery("charge", payment_id, "key", expires_at=expires_at.isoformat()))
        await until_settled(postgres_url)
    assert not gateway.moved
    [rejected] = await events_of(postgres_url, payment_id)
    assert (rejected["type"], rejected["reason"]) == ("payment.command_rejected.v1", "command_expired")
