"""When Kafka refuses an event permanently, only that payment waits in quarantine, in order."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from aiokafka import AIOKafkaConsumer

from infra.kafka.topics import ensure_topics
from infra.local import EmbeddedKafka
from infra.local.postgres import drop_database
from infra.relay import Relay, RelayConfig, metrics, session
from infra.relay.event import OutboxEvent
from infra.relay.lag import Lag
from infra.relay.leadership import LEADERSHIP, lock_key
from infra.relay.poll.source import PollSource
from infra.relay.progress.repairs import request_repair
from infra.relay.publish import producer
from infra.relay.publish.partitions import partition_of
from infra.relay.publish.publisher import Publisher
from infra.relay.publish.quarantine import MARK_DUE, Quarantine, QuarantineDesk
from infra.relay.publish.replay import EventReplay, Selection
from infra.relay.publish.retries import Retries
from infra.relay.session import Session
from infra.relay.wal.source import WalSource
from tests.conftest import PARTITIONS
from tests.support.outbox import Row, assert_first_deliveries_in_order, commit, fetch_value, ids, insert, rows_of
from tests.support.relay_source import also_plain
from tests.support.relays import (
    HUGE,
    frozen,
    is_all_proven,
    poisoned_payment,
    published,
    running,
    set_topic_limit,
    wal_only,
    without_leader,
)
from tests.support.waiting import until


@pytest.fixture
async def desk(config: RelayConfig) -> AsyncIterator[QuarantineDesk]:
    async with await psycopg.AsyncConnection.connect(config.postgres_url, autocommit=True) as connection:
        yield QuarantineDesk(connection, config.slot)


async def entries(desk: QuarantineDesk) -> list[tuple[str, int, str]]:
    return [(payment, seq, state) for _, payment, seq, _, state, *_ in await desk.entries(with_dropped=True, limit=99)]


def counted(monkeypatch: pytest.MonkeyPatch, owner: type, name: str) -> list[float]:
    """The times at which this method returns, from now on."""
    method, ends = getattr(owner, name), list[float]()

    async def call(*arguments: Any) -> None:
        await method(*arguments)
        ends.append(time.monotonic())

    monkeypatch.setattr(owner, name, call)
    return ends


async def holds(desk: QuarantineDesk, *expected: tuple[str, int, str]) -> None:
    """Wait until quarantine holds exactly these entries."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(20):
            while await entries(desk) != list(expected):
                await asyncio.sleep(0.05)
    assert await entries(desk) == list(expected)


@also_plain
async def test_only_the_payment_of_a_refused_event_waits(config: RelayConfig, desk: QuarantineDesk) -> None:
    poisoned, others = poisoned_payment(), rows_of("pay_0002", 50)
    same_partition = rows_of("pay_0041", 50)
    async with running(config) as relay:
        refused = metrics.REFUSED._value.get()
        await commit(config.postgres_url, poisoned, *([row] for row in others + same_partition))
        records = await published(config, poisoned[0], *others, *same_partition)
        await holds(desk, ("pay_0001", 2, "refused"), ("pay_0001", 3, "waiting"))
        assert not {row.id for row in poisoned[1:]} & set(ids(records))
        assert metrics.REFUSED._value.get() == refused + 1
        await until(lambda: metrics.QUARANTINED._value.get() == 2)
        assert relay.trouble is None
        (event,) = await desk.show(str(poisoned[1].id))
        assert event["payload"] == HUGE
        assert "MessageSizeTooLarge" in event["reason"]


async def test_a_topic_that_kafka_refuses_for_good_moves_nothing_but_quarantine(
    config: RelayConfig, desk: QuarantineDesk
) -> None:
    """An internal topic of Kafka, which joining a consumer group creates."""
    consumer = AIOKafkaConsumer(config.topic, bootstrap_servers=config.kafka.bootstrap, group_id=config.slot)
    await consumer.start()
    await consumer.stop()
    async with running(replace(config, topic="__consumer_offsets")):
        await commit(config.postgres_url, rows_of("pay_0001", 2), rows_of("pay_0002", 1))
        held = {("pay_0001", 1, "refused"), ("pay_0001", 2, "waiting"), ("pay_0002", 1, "refused")}

        async def are_held() -> bool:
            return set(await entries(desk)) == held

        await until(are_held)
        assert "InvalidTopic" in (await desk.entries(with_dropped=False, limit=9))[0][5]


@also_plain
async def test_after_a_retry_the_payment_goes_on_in_order(config: RelayConfig, desk: QuarantineDesk) -> None:
    poisoned = poisoned_payment()
    more = rows_of("pay_0001", 200, first=4)
    async with running(config):
        await commit(config.postgres_url, poisoned)
        await holds(desk, ("pay_0001", 2, "refused"), ("pay_0001", 3, "waiting"))
        await desk.retry([str(poisoned[1].id)])
        await until(lambda: metrics.QUARANTINED._value.get() == 2)
        await holds(desk, ("pay_0001", 2, "refused"), ("pay_0001", 3, "waiting"))
        await set_topic_limit(config, 5_000_000)
        writing = asyncio.create_task(commit(config.postgres_url, *([row] for row in more)))
        assert len(await desk.retry(["pay_0001"])) >= 2
        await writing
        await asyncio.sleep(1)
        await desk.retry([], everything=True)
        records = await published(config, *poisoned, *more)
        await holds(desk)
    assert_first_deliveries_in_order(records, poisoned + more)


@also_plain
async def test_quarantine_outlives_the_relay(config: RelayConfig, desk: QuarantineDesk) -> None:
    poisoned, later = poisoned_payment(), rows_of("pay_0001", 5, first=4)
    async with running(config):
        await commit(config.postgres_url, poisoned)
        await holds(desk, ("pay_0001", 2, "refused"), ("pay_0001", 3, "waiting"))
    async with running(config):
        await commit(config.postgres_url, later)
        waiting = [("pay_0001", row.seq, "waiting") for row in [poisoned[2], *later]]
        await holds(desk, ("pay_0001", 2, "refused"), *waiting)
    await set_topic_limit(config, 5_000_000)
    await desk.retry([], everything=True)
    async with running(config):
        records = await published(config, *poisoned, *later)
        await holds(desk)
    assert_first_deliveries_in_order(records, poisoned + later)


async def test_a_dropped_event_stays_with_its_reason_and_frees_what_waits(
    config: RelayConfig, desk: QuarantineDesk
) -> None:
    poisoned = poisoned_payment()
    async with running(config):
        await commit(config.postgres_url, poisoned)
        await holds(desk, ("pay_0001", 2, "refused"), ("pay_0001", 3, "waiting"))
        assert await desk.drop([str(poisoned[1].id)], why="agreed with the shop") == (1, 0)
        records = await published(config, poisoned[0], poisoned[2])
        await holds(desk, ("pay_0001", 2, "dropped"))
        assert (await desk.show("pay_0001"))[0]["dropped_because"] == "agreed with the shop"
        assert ids(records) == [poisoned[0].id, poisoned[2].id]


@also_plain
async def test_our_own_limit_sends_to_quarantine_too(config: RelayConfig, desk: QuarantineDesk) -> None:
    config = replace(config, message_bytes_max=1000)
    async with running(config):
        await commit(config.postgres_url, poisoned_payment())
        await holds(desk, ("pay_0001", 2, "refused"), ("pay_0001", 3, "waiting"))
        reason: Any = (await desk.show("pay_0001"))[0]["reason"]
    assert "above our own limit of 1000 bytes" in reason


async def test_three_hundred_payments_with_one_refused_event_each(config: RelayConfig, desk: QuarantineDesk) -> None:
    """No attempt leaks a connection, and neither an event nor the order is lost on the way."""
    config = replace(config, message_bytes_max=1000)
    rows = [Row(row.id, f"pay_{number}", row.seq, row.payload) for number in range(300) for row in rows_of("x", 3)]
    rows = [row._replace(payload=f'"{"x" * 1001}"') if row.seq == 2 else row for row in rows]
    async with running(config):
        await commit(config.postgres_url, *(rows[at : at + 30] for at in range(0, len(rows), 30)))
        await published(config, *(row for row in rows if row.seq == 1))
        await until(lambda: metrics.QUARANTINED._value.get() == 600)
    config = replace(config, message_bytes_max=4_000_000)
    await desk.retry([], everything=True)
    async with running(config):
        records = await published(config, *rows)
    assert_first_deliveries_in_order(records, rows)


async def test_a_retry_asked_for_again_and_again_deletes_nothing(config: RelayConfig, desk: QuarantineDesk) -> None:
    """An event refused during its retry, and requested again meanwhile, must not count as published."""
    async with running(replace(config, message_bytes_max=1_000)):
        await commit(config.postgres_url, poisoned_payment())
        await holds(desk, ("pay_0001", 2, "refused"), ("pay_0001", 3, "waiting"))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(5):
                while len(await entries(desk)) == 2:
                    await desk.retry([], everything=True)
        await holds(desk, ("pay_0001", 2, "refused"), ("pay_0001", 3, "waiting"))


async def test_after_a_drop_with_nothing_behind_it_the_payment_goes_on(
    config: RelayConfig, desk: QuarantineDesk
) -> None:
    first, refused, *later = rows_of("pay_0001", 4)
    refused = refused._replace(payload=HUGE)
    async with running(config):
        await commit(config.postgres_url, [first, refused])
        await holds(desk, ("pay_0001", 2, "refused"))
        await desk.drop([str(refused.id)], why="agreed")
        await commit(config.postgres_url, later)
        await published(config, first, *later)
        await holds(desk, ("pay_0001", 2, "dropped"))


async def test_an_event_dropped_just_before_its_retry_is_not_published(
    config: RelayConfig, desk: QuarantineDesk, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, refused, given_up = rows_of("pay_0001", 3)
    refused = refused._replace(payload=HUGE)
    find_due = Quarantine.due

    async def due_and_dropped(quarantine: Quarantine, besides: Iterable[bytes]) -> list[OutboxEvent]:
        found = await find_due(quarantine, besides)
        await desk.drop([event.id.decode() for event in found], why="agreed")
        return found

    async def not_yet(_: Retries) -> None:
        """So that the next event arrives before the relay notices that nothing of its payment is left in quarantine."""

    monkeypatch.setattr(Retries, "unblock", not_yet)
    monkeypatch.setattr(Quarantine, "due", due_and_dropped)
    async with running(config):
        await commit(config.postgres_url, [first, refused])
        await holds(desk, ("pay_0001", 2, "refused"))
        await desk.drop([str(refused.id)], why="agreed")
        await commit(config.postgres_url, [given_up])
        await holds(desk, ("pay_0001", 2, "dropped"), ("pay_0001", 3, "dropped"))
        others = rows_of("pay_0002", 1)
        await commit(config.postgres_url, others)
        assert given_up.id not in ids(await published(config, first, *others))


async def test_an_event_that_a_relay_is_retrying_cannot_be_dropped(config: RelayConfig, desk: QuarantineDesk) -> None:
    """The event may be on the topic already."""
    async with running(config):
        await commit(config.postgres_url, poisoned_payment())
        await holds(desk, ("pay_0001", 2, "refused"), ("pay_0001", 3, "waiting"))
    await desk.retry(["pay_0001"])
    poisoned = str((await desk.entries(with_dropped=False, limit=1))[0][0])
    async with await psycopg.AsyncConnection.connect(config.postgres_url) as leader:
        await leader.execute("SELECT pg_advisory_lock(%s, %s)", lock_key(LEADERSHIP, config.slot))
        assert await desk.drop([poisoned], why="agreed") == (0, 1)
        await desk._connection.execute("UPDATE relay_quarantine SET state = 'refused'")
        await leader.execute(MARK_DUE, [config.slot, ["pay_0001"]])
        dropping = asyncio.create_task(desk.drop([poisoned], why="agreed"))
        await until(lambda: fetch_value(config.postgres_url, "SELECT count(*) > 0 FROM pg_locks WHERE NOT granted"))
        await leader.commit()
        assert await dropping == (0, 1), "begun just before"
        await leader.execute("SELECT pg_advisory_unlock_all()")  # Postgres may end this session later than this block.
    assert await desk.drop([poisoned], why="agreed") == (1, 0)


async def test_a_redelivered_event_keeps_its_quarantine_state_and_reason(
    config: RelayConfig, desk: QuarantineDesk
) -> None:
    async with running(config):
        await commit(config.postgres_url, poisoned_payment())
        await holds(desk, ("pay_0001", 2, "refused"), ("pay_0001", 3, "waiting"))
    async with await psycopg.AsyncConnection.connect(config.postgres_url, autocommit=True) as connection:
        await request_repair(connection, config.slot, "everything")
    async with running(config):
        # The first event now waits behind the others, so all three were delivered again.
        await holds(desk, ("pay_0001", 2, "refused"), ("pay_0001", 3, "waiting"), ("pay_0001", 1, "waiting"))
        await until(lambda: is_all_proven(config))
        assert (await entries(desk))[:2] == [("pay_0001", 2, "refused"), ("pay_0001", 3, "waiting")]
        (event,) = await desk.show(str((await desk.entries(with_dropped=True, limit=1))[0][0]))
        assert "MessageSizeTooLarge" in event["reason"]


async def test_a_replay_leaves_out_what_is_in_quarantine(config: RelayConfig, desk: QuarantineDesk) -> None:
    """The first delivery of quarantined events is still to come."""
    poisoned = poisoned_payment()
    async with running(config):
        await commit(config.postgres_url, poisoned)
        await holds(desk, ("pay_0001", 2, "refused"), ("pay_0001", 3, "waiting"))
        await commit(config.postgres_url, rows_of("pay_0002", 1))
        replay = EventReplay(config, Selection(payment="pay_0001"), topic=config.topic, rate=100)
        async with asyncio.timeout(10):
            while await replay.count() != 1:
                await asyncio.sleep(0.1)


@pytest.fixture
async def slow(postgres_url: str, own_kafka: EmbeddedKafka) -> AsyncIterator[RelayConfig]:
    """A relay to a Kafka that a test may freeze; the topic would by now accept the events in quarantine."""
    config = RelayConfig(
        postgres_url=postgres_url,
        kafka=own_kafka.access,
        topic="slow.events",
        slot=f"test_{uuid4().hex[:12]}",
        feedback_seconds=0.1,
    )
    await ensure_topics(own_kafka.access, {config.topic: 8})
    async with await psycopg.AsyncConnection.connect(postgres_url, autocommit=True) as connection, running(config):
        await commit(postgres_url, poisoned_payment())
        await holds(QuarantineDesk(connection, config.slot), ("pay_0001", 2, "refused"), ("pay_0001", 3, "waiting"))
    await set_topic_limit(config, 5_000_000)
    yield config
    drop_database(postgres_url)


@contextlib.asynccontextmanager
async def retrying(config: RelayConfig, kafka_pid: int) -> AsyncIterator[tuple[asyncio.Event, asyncio.Task[None]]]:
    """A running relay, stopped by the event, whose retry waits for a frozen Kafka."""
    relay, stop = Relay(config), asyncio.Event()
    task = asyncio.create_task(relay.run(stop))
    await until(lambda: relay.health.detail == "active")
    with frozen(kafka_pid):
        async with await psycopg.AsyncConnection.connect(config.postgres_url, autocommit=True) as connection:
            await QuarantineDesk(connection, config.slot).retry([], everything=True)
        await until(lambda: metrics.UNACKNOWLEDGED._value.get() == 2)
        yield stop, task
    await task


async def quarantined(config: RelayConfig) -> int:
    async with await psycopg.AsyncConnection.connect(config.postgres_url, autocommit=True) as connection:
        return await Quarantine(connection, config.slot).count()


@also_plain
@pytest.mark.parametrize("count", [2, 3], ids=["alone", "with one behind it"])
@pytest.mark.parametrize("is_dropped_later", [False, True])
async def test_a_dropped_event_stays_so_where_a_session_begins_before_it(
    config: RelayConfig, desk: QuarantineDesk, monkeypatch: pytest.MonkeyPatch, *, is_dropped_later: bool, count: int
) -> None:
    """The new session reads the dropped event again, and would publish it behind later events of its payment."""
    rows, later = poisoned_payment()[:count], rows_of("pay_0001", 2, first=count + 1)
    async with killed(config):
        await commit(config.postgres_url, rows)
        await until(lambda: _is_here(desk, count - 1))
    await set_topic_limit(config, 5_000_000)
    await desk.drop([str(rows[1].id)], why="agreed")
    if is_dropped_later:
        drop_when_it_has_looked(monkeypatch)
    async with running(config):
        await commit(config.postgres_url, later)
        await published(config, *rows[:1], *rows[2:], *later)
        await holds(desk, ("pay_0001", 2, "dropped"))
    records = await published(config, *rows[:1], *rows[2:], *later)
    assert rows[1].id not in ids(records)


@also_plain
async def test_a_repair_of_everything_tries_again_what_was_dropped(config: RelayConfig, desk: QuarantineDesk) -> None:
    """The operator asked for everything retained. An event that is proven comes again for no other reason."""
    rows = poisoned_payment()
    async with running(config):
        await commit(config.postgres_url, rows)
        await holds(desk, ("pay_0001", 2, "refused"), ("pay_0001", 3, "waiting"))
        await desk.drop([str(rows[1].id)], why="agreed")
        await published(config, rows[0], rows[2])
        await until(lambda: is_all_proven(config))
    await set_topic_limit(config, 5_000_000)
    async with await psycopg.AsyncConnection.connect(config.postgres_url, autocommit=True) as connection:
        assert await request_repair(connection, config.slot, "everything")
    async with running(config):
        assert rows[1].id in ids(await published(config, *rows))


async def _is_here(desk: QuarantineDesk, count: int) -> bool:
    return len(await entries(desk)) == count


def drop_when_it_has_looked(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the session had looked at quarantine before the drop, and read nothing until it looked again."""
    is_first, looked_again = iter([True]), asyncio.Event()
    find, retry = Quarantine.given_up, Session._retry_quarantined

    async def find_late(quarantine: Quarantine) -> set[bytes]:
        return set() if next(is_first, False) else await find(quarantine)

    async def block(quarantine: Quarantine) -> set[bytes]:
        monkeypatch.setattr(Quarantine, "keys", keys)
        return {b"pay_0001"}

    async def retry_first(session: Session) -> None:
        await retry(session)
        looked_again.set()

    def read_later(read: Callable[..., Awaitable[bool]]) -> Callable[..., Awaitable[bool]]:
        async def reading(*arguments: Any) -> bool:
            return looked_again.is_set() and await read(*arguments)

        return reading

    keys = Quarantine.keys
    monkeypatch.setattr(Quarantine, "given_up", find_late)
    monkeypatch.setattr(Quarantine, "keys", block)
    monkeypatch.setattr(Session, "_retry_quarantined", retry_first)
    for each in (WalSource, PollSource):
        monkeypatch.setattr(each, "read", read_later(each.read))


@contextlib.asynccontextmanager
async def killed(config: RelayConfig) -> AsyncIterator[None]:
    """A relay that saves no progress, and is gone at the end of the block."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "FIRST_SAVE_SECONDS", 3600)
        relay = Relay(config)
        running = asyncio.create_task(relay.run(asyncio.Event()))
        await until(lambda: relay.health.detail == "active")
        yield
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


@also_plain
async def test_a_retry_into_a_partition_without_a_leader_holds_up_no_other(
    config: RelayConfig, desk: QuarantineDesk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The operator who requests a retry does not know which partitions have a leader."""
    monkeypatch.setattr(producer, "REQUEST_SECONDS", 0.5)
    stuck, retried = poisoned_payment(), [row._replace(id=uuid4(), key="pay_0005") for row in poisoned_payment()]
    others, later = rows_of("pay_0005", 2, first=4), rows_of("pay_0001", 2, first=4)
    assert partition_of(b"pay_0001", PARTITIONS) != partition_of(b"pay_0005", PARTITIONS)
    async with running(config):
        await commit(config.postgres_url, stuck)
        await holds(desk, ("pay_0001", 2, "refused"), ("pay_0001", 3, "waiting"))
        await commit(config.postgres_url, retried)
        waits = [("pay_0005", 2, "refused"), ("pay_0005", 3, "waiting")]
        await holds(desk, ("pay_0001", 2, "refused"), ("pay_0001", 3, "waiting"), *waits)
        await set_topic_limit(config, 5_000_000)
        with without_leader(config.topic, partition_of(b"pay_0001", PARTITIONS)):
            await until(lambda: metrics.UNACKNOWLEDGED._value.get() == 0)
            await desk.retry(["pay_0001"])
            await until(lambda: metrics.UNACKNOWLEDGED._value.get() == 2)
            await desk.retry(["pay_0005"])
            await commit(config.postgres_url, others, later)
            await published(config, *retried, *others)
            await holds(desk, ("pay_0001", 2, "retry"), ("pay_0001", 3, "retry"))
        records = await published(config, *stuck, *retried, *others, *later)
        assert_first_deliveries_in_order(records, [*stuck, *retried, *others, *later])
        await holds(desk)


async def test_a_stop_does_not_wait_for_a_retry_that_waits_for_kafka(
    slow: RelayConfig, own_kafka: EmbeddedKafka, monkeypatch: pytest.MonkeyPatch
) -> None:
    saves = counted(monkeypatch, WalSource, "save")
    async with retrying(replace(slow, stop_seconds=0.5), own_kafka.pid) as (stop, task):
        await commit(slow.postgres_url, rows_of("pay_0002", 1))
        saves.clear()
        await asyncio.sleep(1)
        assert len(saves) < 30, "what comes meanwhile makes it turn round and round"
        stop.set()
        done, _ = await asyncio.wait({task}, timeout=10)
        assert done
    assert await quarantined(slow) == 2


async def test_retried_events_that_kafka_accepts_during_a_stop_leave_quarantine(
    slow: RelayConfig, own_kafka: EmbeddedKafka
) -> None:
    """Otherwise the next relay would publish them again."""
    async with retrying(replace(slow, stop_seconds=20), own_kafka.pid) as (stop, _):
        stop.set()
        await asyncio.sleep(0.5)
    assert await quarantined(slow) == 0


async def test_a_payments_tenth_event_leaves_quarantine_after_its_ninth(
    config: RelayConfig, desk: QuarantineDesk
) -> None:
    rows = rows_of("pay_0001", 12)
    rows[1] = rows[1]._replace(payload=HUGE)
    async with running(config):
        await commit(config.postgres_url, rows)
        await holds(desk, ("pay_0001", 2, "refused"), *(("pay_0001", seq, "waiting") for seq in range(3, 13)))
        await set_topic_limit(config, 5_000_000)

        async def are_all_retried() -> bool:
            """Until the broker has learned its new limit, it refuses the second event again."""
            await desk.retry(["pay_0001"])
            return not await entries(desk)

        await until(are_all_retried)
        assert_first_deliveries_in_order(await published(config, *rows), rows)


@pytest.mark.parametrize("source", ["wal"], indirect=True)
async def test_once_all_of_a_payment_is_dropped_the_fast_path_is_taken_again(
    config: RelayConfig, desk: QuarantineDesk, monkeypatch: pytest.MonkeyPatch
) -> None:
    publishers: list[Publisher] = []
    connect = Publisher.connect

    async def connected(config: RelayConfig, wake: Callable[[], None]) -> Publisher:
        publishers.append(await connect(config, wake))
        return publishers[-1]

    monkeypatch.setattr(Publisher, "connect", connected)
    first, refused, *_ = poisoned_payment()
    async with running(config):
        await commit(config.postgres_url, [first, refused])
        await holds(desk, ("pay_0001", 2, "refused"))
        assert publishers[-1].blocked
        await desk.drop([str(refused.id)], why="agreed")
        await until(lambda: not publishers[-1].blocked)


@wal_only
async def test_a_quarantined_event_survives_a_failed_query_on_the_same_connection(
    config: RelayConfig, desk: QuarantineDesk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both use one connection: in a shared transaction, a failed look would silently undo the quarantining."""
    monkeypatch.setattr(session, "WATCH_SECONDS", 0)
    saved = counted(monkeypatch, WalSource, "save")
    put, looks = counted(monkeypatch, Quarantine, "put"), counted(monkeypatch, Lag, "look_for_unread")
    waiting = "SELECT count(*) > 0 FROM pg_locks WHERE mode = 'AccessExclusiveLock' AND NOT granted"
    async with (
        await psycopg.AsyncConnection.connect(config.postgres_url) as writer,
        await psycopg.AsyncConnection.connect(config.postgres_url) as locker,
        running(replace(config, feedback_seconds=30)),
    ):
        await until(lambda: len(saved) >= 2)  # The first two saves come soon; a third one would wait for the lock.
        await insert(writer, poisoned_payment())
        locking = asyncio.create_task(locker.execute("LOCK TABLE outbox IN ACCESS EXCLUSIVE MODE"))
        await until(lambda: fetch_value(config.postgres_url, waiting))
        await writer.commit()
        await locking
        await until(lambda: put)
        looks.clear()
        await until(lambda: len(looks) >= 3)
        await locker.rollback()
        await holds(desk, ("pay_0001", 2, "refused"), ("pay_0001", 3, "waiting"))


async def test_a_look_at_the_outbox_that_waits_for_its_lock_does_not_end_what_is_being_saved(
    config: RelayConfig,
) -> None:
    """Both use the leader's connection, and a failed statement fails its whole transaction."""
    connect = partial(psycopg.AsyncConnection.connect, config.postgres_url, autocommit=True)
    async with await connect() as leader, await connect() as other, other.transaction():
        await other.execute("LOCK TABLE outbox")
        async with leader.transaction():
            await Lag(leader, config).look_for_unread()
            await leader.execute("SELECT 1")
