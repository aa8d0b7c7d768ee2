"""The whole worker in this process, against a real Kafka, Postgres and Valkey, with the instant gateway."""

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic, RecordsToDelete
from confluent_kafka import Consumer, Producer
from prometheus_client import REGISTRY
from structlog.testing import capture_logs

from app import wiring
from app.health import troubles
from app.settings import Settings
from domain.errors import StoreUnavailable
from handlers import metrics
from infra.local import EmbeddedValkey
from infra.local.server import free_port
from infra.postgres import clock, store
from tests.conftest import PARTITIONS
from tests.support.provider import BookkeepingGateway
from tests.support.service import body, delivery, events_of, new_payment_id, running_worker, value
from tests.support.topic import read_until, send
from tests.support.waiting import until
from tests.support.workers import UNREADABLE, captured, charges, committed, running, until_captured


class SilentInstant(BookkeepingGateway):
    """The domain takes it for the `instant` gateway; nothing is ever sent to it."""

    name = "instant"


@contextmanager
def silent_member(settings: Settings) -> Iterator[None]:
    """A member of the worker's group that does not take part in a rebalance."""
    others: dict[str, Any] = {"group.id": settings.consumer_group, "partition.assignment.strategy": "roundrobin"}
    member = Consumer(others | {"bootstrap.servers": settings.kafka_bootstrap})
    member.subscribe([settings.commands_topic])
    while not member.assignment():
        member.poll(0.1)
    yield
    member.close()


@contextmanager
def worker_process(settings: Settings, **others: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A worker in a process of its own."""
    given = settings.model_copy(update=others | {"worker_port": free_port()}).model_dump(
        mode="json", exclude_unset=True
    )
    told = {
        f"PAYMENTS_{name.upper()}": each if isinstance(each, str) else json.dumps(each) for name, each in given.items()
    }
    process = subprocess.Popen([sys.executable, "-m", "app.cli", "worker"], env=os.environ | told)
    yield process
    process.kill()
    process.wait()


def counted(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0.0


async def test_one_unreadable_message_among_500_is_parked_whole_and_499_are_processed(settings: Settings) -> None:
    payments = [uuid4() for _ in range(499)]
    headers = [("traceparent", b"not one"), ("h", b"\x00\xff"), ("h", b"twice"), ("empty", b"")]
    await send(settings.kafka_bootstrap, settings.commands_topic, *charges(payments[:250]))
    async with AIOKafkaProducer(bootstrap_servers=settings.kafka_bootstrap) as producer:
        sent = await producer.send_and_wait(
            settings.commands_topic, UNREADABLE, key=b"\xfe\x00", headers=headers, partition=3
        )
    await send(settings.kafka_bootstrap, settings.commands_topic, *charges(payments[250:]))
    async with running(settings):
        await until_captured(settings, 499)
        (letter,) = await read_until(settings.kafka_bootstrap, settings.dead_letter_topic, bool)
    assert (letter.value, letter.key) == (UNREADABLE, b"\xfe\x00")
    assert list(letter.headers[:4]) == headers
    facts = dict(letter.headers[4:])
    assert facts["dlq_topic"].decode() == settings.commands_topic
    assert (facts["dlq_partition"], facts["dlq_offset"]) == (b"3", str(sent.offset).encode())
    assert facts["dlq_reason"]
    assert facts["dlq_detail"]
    assert await committed(settings) == 500
    assert await captured(settings) == 499


async def test_a_transaction_that_its_producer_aborts_moves_no_money(settings: Settings) -> None:
    """The order service has rolled back, and may order again under other ids."""
    given_up, meant = uuid4(), uuid4()
    async with AIOKafkaProducer(
        bootstrap_servers=settings.kafka_bootstrap, transactional_id=f"orders-{meant}"
    ) as producer:
        for payment in (given_up, meant):
            await producer.begin_transaction()
            await producer.send(settings.commands_topic, body("charge", payment, f"charge-{payment}"), partition=0)
            if payment == given_up:
                await producer.flush()
                await producer.abort_transaction()
            else:
                await producer.commit_transaction()
    async with running(settings):
        await until_captured(settings, 1)
    stored = await value(settings.postgres_url, "SELECT array_agg(payment_id::text) FROM payments")
    assert stored == [str(meant)]


async def test_when_it_called_is_told_by_postgres_whatever_its_own_clock_says(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A provider forgets a key after a day. A call recorded 2 hours late may be sent again after that, and charge."""
    ahead = datetime.now(UTC) + timedelta(hours=2)
    monkeypatch.setattr(wiring, "now", lambda: ahead)
    monkeypatch.setattr(clock, "datetime", SimpleNamespace(now=lambda zone: ahead))
    payment = uuid4()
    await send(settings.kafka_bootstrap, settings.commands_topic, *charges([payment]))
    async with running(settings):
        await until_captured(settings, 1)
    age = await value(settings.postgres_url, "SELECT now() - dispatched_at FROM operations")
    assert timedelta(0) < age < timedelta(minutes=1)


async def test_a_command_that_postgres_refuses_is_parked_alone(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    payments = [uuid4() for _ in range(20)]
    poisoned = payments[7]
    original = store._save

    async def save(connection: Any, changes: Any) -> None:
        for each in changes.new_payments:
            if each.payment_id == poisoned:
                each.order_id = "nul\x00"
        await original(connection, changes)

    monkeypatch.setattr(store, "_save", save)
    await send(settings.kafka_bootstrap, settings.commands_topic, *charges(payments))
    async with running(settings):
        await until_captured(settings, 19)
        (letter,) = await read_until(settings.kafka_bootstrap, settings.dead_letter_topic, bool)
    assert letter.value == body("charge", poisoned, f"charge-{poisoned}")
    assert dict(letter.headers)["dlq_reason"] == b"cannot_be_processed"
    assert await committed(settings) == 20


async def delete_all_before(settings: Settings, offset: int) -> None:
    """Delete the records of partition 0 before `offset`, as retention does."""
    admin = AIOKafkaAdminClient(bootstrap_servers=settings.kafka_bootstrap)
    await admin.start()
    await admin.delete_records({TopicPartition(settings.commands_topic, 0): RecordsToDelete(before_offset=offset)})
    await admin.close()


async def put_in_partition_0(settings: Settings, payments: list[UUID]) -> None:
    async with AIOKafkaProducer(bootstrap_servers=settings.kafka_bootstrap) as producer:
        for each in payments:
            await producer.send_and_wait(settings.commands_topic, body("charge", each, f"charge-{each}"), partition=0)


async def test_commands_that_kafka_deleted_before_they_were_read_are_counted_and_told(settings: Settings) -> None:
    before = counted("payments_commands_lost_total")
    await put_in_partition_0(settings, [uuid4() for _ in range(3)])
    await delete_all_before(settings, 1)
    async with running(settings):
        await until_captured(settings, 2)
    assert counted("payments_commands_lost_total") == before, "a new group has lost nothing"
    await put_in_partition_0(settings, [uuid4() for _ in range(7)])
    await delete_all_before(settings, 8)
    with capture_logs() as logs:
        async with running(settings):
            await until_captured(settings, 4)
    assert counted("payments_commands_lost_total") == before + 5
    (told,) = (each for each in logs if each["event"] == "commands were deleted before they were read")
    facts = {"topic": settings.commands_topic, "partition": 0, "from_offset": 3, "to_offset": 8}
    assert facts.items() <= told.items()


async def test_a_topic_that_ends_before_what_was_read_of_it_is_told_and_read_again(settings: Settings) -> None:
    before = counted("payments_commands_lost_total")
    await put_in_partition_0(settings, [uuid4() for _ in range(2)])
    async with AIOKafkaConsumer(
        bootstrap_servers=settings.kafka_bootstrap, group_id=settings.consumer_group, enable_auto_commit=False
    ) as reader:
        place = TopicPartition(settings.commands_topic, 0)
        reader.assign([place])
        await reader.commit({place: 100})
    with capture_logs() as logs:
        async with running(settings):
            await until_captured(settings, 2)
    assert any(each["event"].startswith("the topic ends before what was read of it") for each in logs)
    assert counted("payments_commands_lost_total") == before


async def test_deleting_only_a_transaction_marker_counts_no_lost_commands(settings: Settings) -> None:
    before, payment = counted("payments_commands_lost_total"), uuid4()
    async with AIOKafkaProducer(
        bootstrap_servers=settings.kafka_bootstrap, transactional_id=f"orders-{payment}"
    ) as producer:
        async with producer.transaction():
            await producer.send(settings.commands_topic, body("charge", payment, f"charge-{payment}"), partition=0)
        async with running(settings):
            await until_captured(settings, 1)
        await delete_all_before(settings, 2)
        async with running(settings):
            await put_in_partition_0(settings, [uuid4()])
            await until_captured(settings, 2)
    assert counted("payments_commands_lost_total") == before


async def test_offsets_are_committed_only_after_postgres_has_the_batch(settings: Settings) -> None:
    payments = [uuid4() for _ in range(30)]
    await send(settings.kafka_bootstrap, settings.commands_topic, *charges(payments))
    connection = await asyncpg.connect(settings.postgres_url)
    transaction = connection.transaction()
    await transaction.start()
    await connection.execute("LOCK TABLE payments IN ACCESS EXCLUSIVE MODE")
    try:
        async with running(settings):
            waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE '%payments%'"

            async def is_waiting() -> bool:
                return bool(await value(settings.postgres_url, waiting))

            await until(is_waiting)
            # One second is 20 commit intervals: offsets that were due would be committed by now.
            for _ in range(10):
                assert await committed(settings) == 0
                await asyncio.sleep(0.1)
            await transaction.rollback()
            await until_captured(settings, 30)

            async def is_committed() -> bool:
                return await committed(settings) == 30

            await until(is_committed)
    finally:
        await connection.close()


async def test_a_redelivery_is_answered_by_a_replay_and_charges_nothing(settings: Settings) -> None:
    payment_id = uuid4()
    await send(settings.kafka_bootstrap, settings.commands_topic, *charges([payment_id]))
    async with running(settings):
        await until_captured(settings, 1)
        await send(settings.kafka_bootstrap, settings.commands_topic, *charges([payment_id, payment_id]))

        async def is_answered() -> bool:
            return len(await events_of(settings.postgres_url, payment_id)) == 3

        await until(is_answered)
    events = await events_of(settings.postgres_url, payment_id)
    assert [(event["type"], event["replayed"]) for event in events] == [
        ("payment.captured.v1", False),
        ("payment.captured.v1", True),
        ("payment.captured.v1", True),
    ]
    assert await value(settings.postgres_url, "SELECT count(*) FROM ledger") == 1


async def test_a_second_worker_that_reads_it_all_again_changes_nothing(settings: Settings) -> None:
    payments = [uuid4() for _ in range(100)]
    await send(settings.kafka_bootstrap, settings.commands_topic, *charges(payments))
    async with running(settings):
        await until_captured(settings, 100)
    again = settings.model_copy(update={"consumer_group": settings.consumer_group + "-again"})
    async with running(again):

        async def is_answered() -> bool:
            return bool(await value(settings.postgres_url, "SELECT count(*) FROM outbox") >= 200)

        await until(is_answered)
    assert await value(settings.postgres_url, "SELECT count(*) FROM outbox") == 200
    assert await value(settings.postgres_url, "SELECT count(*) FROM ledger") == 100


@pytest.mark.parametrize("is_killed_midway", [False, True], ids=["never there", "killed midway"])
async def test_without_valkey_the_results_are_the_same_and_its_absence_is_counted(
    settings: Settings, own_valkey: EmbeddedValkey, is_killed_midway: bool
) -> None:
    away = settings.model_copy(update={"redis_url": own_valkey.url})
    if not is_killed_midway:
        await asyncio.to_thread(own_valkey.kill)
    name = "payments_recent_keys_unavailable_total"
    before = counted(name)
    payments = [uuid4() for _ in range(60)]
    async with running(away):
        await send(settings.kafka_bootstrap, settings.commands_topic, *charges(payments[:30]))
        await until_captured(settings, 30)
        if is_killed_midway:
            assert counted(name) == before
            await asyncio.to_thread(own_valkey.kill)
        await send(settings.kafka_bootstrap, settings.commands_topic, *charges(payments))

        async def is_answered() -> bool:
            return bool(await value(settings.postgres_url, "SELECT count(*) FROM outbox") >= 90)

        await until(is_answered)
    assert counted(name) > before
    assert await captured(settings) == 60
    assert await value(settings.postgres_url, "SELECT count(*) FROM operations") == 60
    replayed = "SELECT count(*) FROM outbox WHERE (payload::jsonb ->> 'replayed')::boolean"
    assert await value(settings.postgres_url, replayed) == 30


async def test_a_full_backlog_pauses_its_partitions_and_resumes_when_half_is_done(settings: Settings) -> None:
    bounded = settings.model_copy(
        update={"backlog_capacity": 40, "instant_gateway_latency_ms": 40.0, "gateway_concurrency_default": 4}
    )
    payments = [uuid4() for _ in range(700)]
    await send(settings.kafka_bootstrap, settings.commands_topic, *charges(payments))
    seen_paused: list[float] = []
    async with running(bounded):

        async def is_paused() -> bool:
            return counted("payments_consumer_paused") == 1

        await until(is_paused)
        accepted = await value(settings.postgres_url, "SELECT count(*) FROM payments")
        seen_paused.append(accepted)
        assert accepted < 700, "the rest stays in Kafka"
        await until_captured(settings, 700)

        async def is_resumed() -> bool:
            return counted("payments_consumer_paused") == 0

        await until(is_resumed)
    assert await committed(settings) == 700


async def test_a_clean_stop_saves_what_is_under_way_and_commits_its_offsets(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("handlers.offsets.COMMIT_INTERVAL_SECONDS", 3600)  # only the stop may commit
    slow = settings.model_copy(update={"instant_gateway_latency_ms": 500.0})
    payments = [uuid4() for _ in range(50)]
    await send(settings.kafka_bootstrap, settings.commands_topic, *charges(payments))
    async with running(slow):

        async def is_accepted() -> bool:
            return bool(await value(settings.postgres_url, "SELECT count(*) FROM operations"))

        await until(is_accepted)
        assert await captured(settings) == 0
    accepted = await value(settings.postgres_url, "SELECT count(*) FROM operations")
    assert accepted > 0
    assert await captured(settings) == accepted, "what was accepted has its outcome"
    assert await committed(settings) == accepted


@pytest.mark.parametrize("header", [b"\x00\xff", None], ids=["not utf-8", "null"])
async def test_a_header_that_is_no_text_costs_no_command_of_its_batch(settings: Settings, header: bytes | None) -> None:
    payments = [uuid4() for _ in range(30)]
    first, *rest = charges(payments)
    async with AIOKafkaProducer(bootstrap_servers=settings.kafka_bootstrap) as producer:
        key, text = first
        await producer.send_and_wait(settings.commands_topic, text, key=key, headers=[("trace", header)], partition=0)
        for key, text in rest[:20]:
            await producer.send_and_wait(settings.commands_topic, text, key=key, partition=0)
        async with running(settings):
            await asyncio.sleep(0)
            for key, text in rest[20:]:
                await producer.send_and_wait(settings.commands_topic, text, key=key, partition=0)
            await until_captured(settings, 30)
    assert await committed(settings) == 30


@pytest.mark.parametrize("codec", ["gzip", "lz4", "snappy", "zstd"])
async def test_a_producer_may_compress(settings: Settings, codec: str) -> None:
    payment = uuid4()
    async with AIOKafkaProducer(bootstrap_servers=settings.kafka_bootstrap, compression_type=codec) as producer:
        # Large enough that the client really compresses it.
        value = body("charge", payment, "key", metadata={f"k{number}": "x" * 400 for number in range(20)})
        await producer.send_and_wait(settings.commands_topic, value, key=str(payment).encode())
    async with running(settings):
        await until_captured(settings, 1)


async def test_a_huge_key_of_an_unreadable_message_holds_nobody_up(settings: Settings) -> None:
    payments = [uuid4() for _ in range(5)]
    key = b"k" * 1_048_400
    async with AIOKafkaProducer(bootstrap_servers=settings.kafka_bootstrap, max_request_size=2_000_000) as producer:
        await producer.send_and_wait(settings.commands_topic, UNREADABLE, key=key)
    await send(settings.kafka_bootstrap, settings.commands_topic, *charges(payments))
    async with running(settings):
        await until_captured(settings, 5)
        (letter,) = await read_until(settings.kafka_bootstrap, settings.dead_letter_topic, bool)
    assert (letter.key, letter.value) == (None, b"")
    assert dict(letter.headers)["dlq_key_left_out"] == str(len(key)).encode()
    assert await committed(settings) == 6


# Only the pure Python client writes such a header name, and only when forced to.
SEND_UNDECODABLE = """
import asyncio, sys
from aiokafka import AIOKafkaProducer
class Name(str):
    def encode(self, *_): return b"\\xff\\xfeh"
    def __len__(self): return 3
async def main():
    async with AIOKafkaProducer(bootstrap_servers=sys.argv[1]) as producer:
        await producer.send_and_wait(sys.argv[2], b"{}", partition=int(sys.argv[3]), headers=[(Name("abc"), b"v")])
asyncio.run(main())
"""


async def test_a_header_name_that_is_no_text_costs_no_neighbour(settings: Settings) -> None:
    before, after = [uuid4() for _ in range(40)], [uuid4() for _ in range(40)]
    await send(settings.kafka_bootstrap, settings.commands_topic, *charges(before))
    for partition in ("0", "3"):
        arguments = [
            sys.executable,
            "-c",
            SEND_UNDECODABLE,
            settings.kafka_bootstrap,
            settings.commands_topic,
            partition,
        ]
        environment = os.environ | {"AIOKAFKA_NO_EXTENSIONS": "1"}
        await asyncio.to_thread(subprocess.run, arguments, check=True, env=environment, timeout=60)
    await send(settings.kafka_bootstrap, settings.commands_topic, *charges(after))
    async with running(settings):
        await until_captured(settings, 80)
        letters = await read_until(settings.kafka_bootstrap, settings.dead_letter_topic, lambda found: len(found) >= 2)
    facts = [dict(letter.headers) for letter in letters]
    assert {each["dlq_reason"] for each in facts} == {b"record_undecodable"}
    assert {each["dlq_partition"] for each in facts} == {b"0", b"3"}


async def test_a_record_with_neither_key_nor_value_is_parked(settings: Settings) -> None:
    payment = uuid4()
    producer = Producer({"bootstrap.servers": settings.kafka_bootstrap})
    producer.produce(settings.commands_topic, None, None)
    await asyncio.to_thread(producer.flush)
    await send(settings.kafka_bootstrap, settings.commands_topic, *charges([payment]))
    async with running(settings):
        await until_captured(settings, 1)
        (letter,) = await read_until(settings.kafka_bootstrap, settings.dead_letter_topic, bool)
    assert dict(letter.headers)["dlq_reason"] == b"empty"


async def test_calls_begun_before_a_worker_joins_its_group_are_saved_when_it_ends(settings: Settings) -> None:
    """A worker sweeps at once, but may have to wait for the other members of its group before it may read commands."""
    async with running_worker(settings.postgres_url, SilentInstant()) as worker:
        await worker.write_path.apply([delivery("charge", new_payment_id(), "key")])
    await value(settings.postgres_url, "UPDATE operations SET due_at = now() RETURNING 1")
    with (
        silent_member(settings),
        worker_process(settings, instant_gateway_latency_ms=2_500, lease_seconds=30) as process,
    ):

        async def is_taken_over() -> bool:
            return bool(await value(settings.postgres_url, "SELECT max(lease_token) FROM operations") > 1)

        await until(is_taken_over)
        process.terminate()
        assert await asyncio.to_thread(process.wait, 30) == 0
    assert await captured(settings) == 1


async def test_operations_just_claimed_when_a_worker_ends_are_given_back(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the leases would expire, and operations that were never sent would be in doubt."""
    async with running_worker(settings.postgres_url, SilentInstant()) as worker:
        await worker.write_path.apply([delivery("charge", new_payment_id(), "key")])
    await value(settings.postgres_url, "UPDATE operations SET due_at = now(), is_leased = false RETURNING 1")
    is_claimed, with_payments = asyncio.Event(), store._with_payments

    async def slowly(*given: Any) -> Any:
        is_claimed.set()
        await asyncio.sleep(0.5)
        return await with_payments(*given)

    monkeypatch.setattr(store, "_with_payments", slowly)
    resting = settings.model_copy(update={"instant_gateway_latency_ms": 60_000, "lease_seconds": 300})
    monkeypatch.setattr("handlers.pace.Pace.wait_seconds", lambda pace: 60.0)
    async with running(resting):
        await is_claimed.wait()
    assert await value(settings.postgres_url, "SELECT state FROM operations WHERE NOT is_leased") == "dispatched"


async def test_a_worker_that_ends_while_postgres_is_away_leaves_its_group(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise its partitions would stand still until Kafka considers the worker dead."""
    is_postponed = asyncio.Event()

    async def away(*_: Any) -> None:
        is_postponed.set()
        raise StoreUnavailable("Postgres is away")

    monkeypatch.setattr("handlers.consumer.CommandConsumer._accept", away)
    monkeypatch.setattr("handlers.retry.Backoff.next_seconds", lambda backoff: 60.0)
    async with running(settings):
        await send(settings.kafka_bootstrap, settings.commands_topic, *charges([uuid4()]))
        await is_postponed.wait()
    async with admin_of(settings) as admin:
        (described,) = await admin.describe_consumer_groups([settings.consumer_group])
        assert [group[1:3] for group in described.groups] == [(settings.consumer_group, "Empty")]


async def test_counters_that_page_at_one_exist_at_zero_from_a_workers_start(settings: Settings) -> None:
    """Prometheus sees no increase in a series that begins at 1."""
    for counter in (metrics.DISAGREEING, metrics.NOTICES_DISAGREEING):
        counter.clear()
    async with running(settings):

        async def are_there() -> bool:
            names = "payments_reconciled_disagreeing_total", "payments_notices_disagreeing_total"
            return [REGISTRY.get_sample_value(name, {"gateway": "instant"}) for name in names] == [0, 0]

        await until(are_there, timeout_seconds=15)


async def test_a_worker_that_would_call_everything_paid_says_so_when_it_starts(settings: Settings) -> None:
    with capture_logs() as logs:
        async with running(settings):
            await until(lambda: asyncio.sleep(0, any("moves no money" in each["event"] for each in logs)))


async def test_a_topic_that_is_gone_is_told_until_its_commands_are_read_again(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.worker.TOPICS_SECONDS", 1.0)
    async with running(settings) as worker, admin_of(settings) as admin:

        async def is_reading() -> bool:
            return await worker.checks()["commands"]() is None

        async def is_told() -> bool:
            return "payments migrate" in (await worker.checks()["commands"]() or "")

        await until(is_reading)
        await admin.delete_topics([settings.commands_topic])
        await until(is_told)
        await admin.create_topics([NewTopic(settings.commands_topic, PARTITIONS, 1)])
        await send(settings.kafka_bootstrap, settings.commands_topic, *charges([uuid4()]))
        await until_captured(settings, 1)
        assert await is_reading()


async def test_a_worker_that_starts_before_its_topic_makes_none_of_its_own(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A topic created so would have one partition and one replica, and `payments migrate` does not change it."""
    monkeypatch.setattr("app.worker.TOPICS_SECONDS", 1.0)
    early = settings.model_copy(update={"commands_topic": f"{settings.commands_topic}.early"})
    async with running(early) as worker, admin_of(early) as admin:

        async def is_told() -> bool:
            return "payments migrate" in (await worker.checks()["commands"]() or "")

        await until(is_told)
        assert await worker.checks()["kafka"]() is None, "the broker answers"
        assert early.commands_topic not in await admin.list_topics()
        await admin.create_topics([NewTopic(early.commands_topic, PARTITIONS, 1)])
        try:
            await send(early.kafka_bootstrap, early.commands_topic, *charges([uuid4()]))
            await until_captured(early, 1)
        finally:
            await admin.delete_topics([early.commands_topic])


async def test_a_worker_without_a_partition_is_ready_where_others_have_them_all(settings: Settings) -> None:
    async with admin_of(settings) as admin:
        alone = settings.model_copy(update={"commands_topic": f"{settings.commands_topic}.alone"})
        await admin.create_topics([NewTopic(alone.commands_topic, 1, 1)])
        try:
            async with running(alone) as first, running(alone) as second:

                async def are_ready() -> bool:
                    return not await troubles(first.checks()) and not await troubles(second.checks())

                await until(are_ready)
                await send(alone.kafka_bootstrap, alone.commands_topic, *charges([uuid4()]))
                await until_captured(alone, 1)
                assert await are_ready()
        finally:
            await admin.delete_topics([alone.commands_topic])


@asynccontextmanager
async def admin_of(settings: Settings) -> AsyncIterator[AIOKafkaAdminClient]:
    admin = AIOKafkaAdminClient(bootstrap_servers=settings.kafka_bootstrap)
    await admin.start()
    try:
        yield admin
    finally:
        await admin.close()
