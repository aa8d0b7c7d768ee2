"""Failures that must not stop a worker, and failures that must not be taken for a poison message."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextvars import Context
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import asyncpg
import pytest
from aiokafka import AIOKafkaProducer
from uuid_utils.compat import uuid7

from app.settings import Settings
from domain.errors import ConcurrentUpdate, StoreUnavailable
from domain.ports import Changes, HeldLease
from handlers.consumer import CommandConsumer
from handlers.leases import Leases
from handlers.write_path import WritePath
from infra.postgres import pool as pool_module
from infra.postgres.pool import close_pool, create_pool
from infra.postgres.store import PostgresStore
from tests.support.provider import BookkeepingGateway
from tests.support.relays import frozen
from tests.support.service import NoHint, delivery, events_of, new_payment_id, rules, running_worker, value
from tests.support.topic import read_until, send
from tests.support.waiting import until
from tests.support.workers import charges, committed, running, until_captured


@pytest.fixture
def settings(settings: Settings) -> Settings:
    first_delay = Settings.model_fields["retry_first_delay_seconds"].default
    return settings.model_copy(update={"sweep_interval_seconds": 0.1, "retry_first_delay_seconds": first_delay})


@pytest.fixture
async def pool(postgres_url: str) -> AsyncIterator[Any]:
    pool = await create_pool(postgres_url, size=3)
    yield pool
    pool.terminate()


def write_path(store: PostgresStore) -> WritePath:
    return WritePath(store=store, rules=rules(), clock=lambda: datetime.now(UTC), new_id=uuid7, recent=NoHint())


@pytest.mark.parametrize(
    "trouble",
    [
        "ALTER TABLE operations RENAME TO operations_of_another_release",
        "ALTER TYPE payment_row ADD ATTRIBUTE added_by_another_release text",
        "ALTER TABLE payments DROP COLUMN disputed_minor",
    ],
)
async def test_a_schema_that_does_not_fit_is_no_fault_of_the_commands(
    postgres_url: str, pool: Any, trouble: str
) -> None:
    path = write_path(PostgresStore(pool))
    (request,) = (await path.apply([delivery("charge", new_payment_id(), "before")])).requests
    assert request.operation_number == 1
    await value(postgres_url, trouble)
    with pytest.raises(StoreUnavailable):
        await path.apply([delivery("charge", new_payment_id(), f"key-{number}") for number in range(4)])


async def test_a_missing_schema_leaves_the_commands_in_kafka(settings: Settings) -> None:
    payments = [uuid4() for _ in range(20)]
    await value(settings.postgres_url, "ALTER TABLE payments RENAME TO not_yet_migrated")
    await send(settings.kafka_bootstrap, settings.commands_topic, *charges(payments))
    postponed = asyncio.Event()
    original = CommandConsumer._postpone

    async def postpone(self: CommandConsumer, message: Any, cause: str) -> None:
        postponed.set()
        await original(self, message, cause)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CommandConsumer, "_postpone", postpone)
        async with running(settings):
            await asyncio.wait_for(postponed.wait(), 20)
            assert await committed(settings) == 0
            await value(settings.postgres_url, "ALTER TABLE not_yet_migrated RENAME TO payments")
            await until_captured(settings, 20)
    assert await committed(settings) == 20


async def test_a_defect_in_the_consumer_postpones_its_batch_and_loses_none_of_it(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, failures = WritePath.apply, [ZeroDivisionError("a defect")] * 2

    async def apply(self: WritePath, inputs: Sequence[Any]) -> Any:
        if inputs and failures:
            raise failures.pop()
        return await original(self, inputs)

    monkeypatch.setattr(WritePath, "apply", apply)
    payments = [uuid4() for _ in range(20)]
    async with running(settings):
        await send(settings.kafka_bootstrap, settings.commands_topic, *charges(payments[:10]))

        async def has_failed() -> bool:
            return len(failures) < 2

        await until(has_failed)
        await send(settings.kafka_bootstrap, settings.commands_topic, *charges(payments[10:]))
        await until_captured(settings, 20)
    assert await committed(settings) == 20


async def test_a_message_too_large_to_be_parked_whole_blocks_nobody(settings: Settings) -> None:
    large = b"x" * 1_048_500
    payments = [uuid4() for _ in range(5)]
    async with AIOKafkaProducer(
        bootstrap_servers=settings.kafka_bootstrap, max_request_size=4_000_000, compression_type=None
    ) as producer:
        sent = await producer.send_and_wait(settings.commands_topic, large, key=b"k", partition=0)
    await send(settings.kafka_bootstrap, settings.commands_topic, *charges(payments))
    async with running(settings):
        (letter,) = await read_until(settings.kafka_bootstrap, settings.dead_letter_topic, bool, timeout_seconds=20)
        await until_captured(settings, 5)
    facts = dict(letter.headers)
    assert letter.key == b"k"
    assert facts["dlq_offset"] == str(sent.offset).encode()
    assert letter.value == large or facts["dlq_value_left_out"] == str(len(large)).encode()
    assert await committed(settings) == 6


async def test_an_operation_whose_content_cannot_be_read_stops_no_other_that_is_due(postgres_url: str) -> None:
    gateway = BookkeepingGateway()
    async with running_worker(postgres_url, gateway) as worker:
        payments = [new_payment_id() for _ in range(5)]
        await worker.write_path.apply([delivery("charge", each, f"key-{each}") for each in payments])
        unreadable = (
            'UPDATE operations SET content = \'{"type": "payment.charge.v9"}\' WHERE payment_id = $1 RETURNING 1'
        )
        await value(postgres_url, unreadable, payments[2])
        await value(postgres_url, "UPDATE operations SET due_at = now() RETURNING 1")
        assert await worker.sweep.sweep_once() == 5
        await worker.idle()
    assert await value(postgres_url, "SELECT count(*) FROM payments WHERE status = 'captured'") == 4


async def test_an_operation_of_a_gateway_that_is_gone_stops_no_other_that_is_due(postgres_url: str) -> None:
    gateway = BookkeepingGateway()
    async with running_worker(postgres_url, gateway) as worker:
        payments = [new_payment_id() for _ in range(5)]
        await worker.write_path.apply([delivery("charge", each, f"key-{each}") for each in payments])
        gone = "UPDATE operations SET gateway = 'removed' WHERE payment_id = $1 RETURNING 1"
        await value(postgres_url, gone, payments[2])
        await value(postgres_url, "UPDATE operations SET due_at = now() - interval '1 day' RETURNING 1")
        assert await worker.sweep.sweep_once() == 5
        await worker.idle()
    assert await value(postgres_url, "SELECT count(*) FROM payments WHERE status = 'captured'") == 4
    assert await value(postgres_url, "SELECT state FROM operations WHERE gateway = 'removed'") == "indeterminate"


async def test_a_lost_race_does_not_end_the_renewal_of_leases() -> None:
    renewed = asyncio.Event()

    class Store:
        calls = 0

        async def renew(self, held: Sequence[HeldLease], *, lease: timedelta) -> list[HeldLease]:
            self.calls += 1
            if self.calls == 1:
                raise ConcurrentUpdate("deadlock detected")
            renewed.set()
            return list(held)

    store: Any = Store()
    leases = Leases(store=store, lease=timedelta(milliseconds=60))
    request: Any = type("Request", (), {"payment_id": uuid4(), "operation_number": 1, "lease_token": 1})()
    leases.hold([request])
    loop = asyncio.create_task(leases.run())
    await asyncio.wait_for(renewed.wait(), 5)
    loop.cancel()


async def test_a_process_stopped_in_its_transaction_does_not_keep_its_payments_for_ever(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_module, "IDLE_IN_TRANSACTION_MS", 300)
    payment_id, gateway = new_payment_id(), BookkeepingGateway()
    async with running_worker(postgres_url, gateway) as worker:
        await worker.accept(delivery("charge", payment_id, "charge"))
        await worker.idle()
        stopped = await create_pool(postgres_url, size=1)
        with pytest.raises(StoreUnavailable):  # noqa: PT012 - the block is the transaction that is ended
            async with PostgresStore(stopped).begin() as transaction:
                await transaction.lock_payments([payment_id])
                # This worker freezes here, as after SIGSTOP; meanwhile:
                async with asyncio.timeout(10):
                    refund = worker.accept(delivery("refund", payment_id, "refund"))
                    await asyncio.create_task(refund, context=Context())
                await transaction.lock_payments([payment_id])
        stopped.terminate()
        await worker.idle()
    kinds = [event["type"] for event in await events_of(postgres_url, payment_id)]
    assert kinds == ["payment.captured.v1", "payment.refunded.v1"]


async def test_renewals_and_saves_of_the_same_operations_do_not_wait_for_each_other_in_a_circle(pool: Any) -> None:
    """After a long delay, answers arrive in a different order than the calls were sent."""
    store = PostgresStore(pool)
    payments = [new_payment_id() for _ in range(200)]
    await write_path(store).apply([delivery("charge", each, f"key-{each}") for each in payments])
    async with store.begin() as transaction:
        operations = list((await transaction.operations_at([(each, 1) for each in payments])).values())
    held = [HeldLease(each.payment_id, each.number, each.lease_token) for each in operations]
    for _ in range(5):
        backwards = Changes([], [], [], operations[::-1], [], [], datetime.now(UTC))
        await asyncio.gather(
            store.save(backwards),
            store.renew(held, lease=timedelta(seconds=60)),
            store.renew(held[100:] + held[:100], lease=timedelta(seconds=60)),
        )


async def test_a_renewal_that_waits_in_a_circle_with_somebody_else_goes_on(postgres_url: str, pool: Any) -> None:
    """Postgres detects the deadlock and aborts one of the two; if that is the renewal, the renewal must go on."""
    store = PostgresStore(pool)
    path = write_path(store)
    payments = sorted(new_payment_id() for _ in range(2))
    applied = await path.apply([delivery("charge", each, f"key-{each}") for each in payments])
    first, second = (HeldLease(each.payment_id, each.operation_number, each.lease_token) for each in applied.requests)
    other = await asyncpg.connect(postgres_url)
    transaction = other.transaction()
    await transaction.start()
    lock = "SELECT 1 FROM operations WHERE payment_id = $1 FOR UPDATE"
    await other.execute(lock, second.payment_id)
    renewal = asyncio.create_task(store.renew([first, second], lease=timedelta(seconds=60)))
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE '%due_at%'"

    async def is_waiting() -> bool:
        return bool(await value(postgres_url, waiting))

    await until(is_waiting)
    results = await asyncio.gather(other.execute(lock, first.payment_id), renewal, return_exceptions=True)
    assert any(isinstance(each, ConcurrentUpdate | asyncpg.DeadlockDetectedError) for each in results)
    await other.close()
    held = "SELECT count(*) FROM operations WHERE is_leased"
    assert await value(postgres_url, held) == 2


async def test_a_pool_is_closed_though_its_server_is_frozen(postgres_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a worker that is told to stop would wait for Postgres, and exit with an error."""
    monkeypatch.setattr(pool_module, "CLOSES_WITHIN", 0.2)
    pool = await create_pool(postgres_url, size=1)
    with frozen(await pool.fetchval("SELECT pg_backend_pid()")):
        async with asyncio.timeout(3):
            await close_pool(pool)
