"""The relay's parts without servers: health, headers, partitions, partition queues."""

import asyncio
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psycopg
import pytest
from aiokafka.errors import KafkaConnectionError, LeaderNotAvailableError, MessageSizeTooLargeError
from aiokafka.partitioner import murmur2 as aiokafka_murmur2
from hypothesis import given
from hypothesis import strategies as st

from infra.kafka.access import KafkaAccess
from infra.relay import health, metrics
from infra.relay.config import RelayConfig
from infra.relay.errors import EventsLost, KafkaAway, PostgresAway
from infra.relay.event import Group, OutboxEvent
from infra.relay.health import State, Status
from infra.relay.progress.snapshot import Snapshot
from infra.relay.publish import producers, publisher
from infra.relay.publish.partitions import murmur2, partition_of
from infra.relay.publish.producer import OneCluster
from infra.relay.publish.publisher import Publisher
from infra.relay.publish.records import RecordBatch, headers_of
from infra.relay.session import Session
from infra.relay.wal import source as wal_source
from infra.relay.wal.source import WalSource
from infra.relay.wal.stream import ReplicationStream
from tests.support.publishing import flush
from tests.support.waiting import until

ROOT = Path(__file__).resolve().parents[2]
EVENT = OutboxEvent(
    id=b"0197a3c0-0000-7000-8000-000000000001",
    aggregateid="pay_Đ4".encode(),
    type="thanh_toán.tạo".encode(),
    payload=b'{"u":"\\u0111"}',
    payment_seq=b"12",
    source=b"/payments",
    specversion=b"1.0",
    occurred_at=b"2026-01-02T03:04:05.000006Z",
    traceparent=None,
)


class TestStatus:
    @pytest.mark.parametrize("state", [State.ACTIVE, State.STANDBY])
    def test_a_session_that_stalls_is_not_ready(self, state: State, monkeypatch: pytest.MonkeyPatch) -> None:
        now = 1000.0
        monkeypatch.setattr("infra.relay.health.time.monotonic", lambda: now)
        status = Status(stalled_seconds=15)
        status.enter(state)
        now += 10
        status.beat()
        now += 14
        assert status.health.ready
        now += 2
        assert not status.health.ready
        assert "stood still for 16 s" in status.health.detail

    def test_a_gap_lasts_until_the_relay_is_active_or_another_leads(self) -> None:
        status = Status(stalled_seconds=15)
        told = []
        for state in (State.GAP, State.CATCHING_UP, State.RECONNECTING, State.CATCHING_UP, State.ACTIVE):
            status.enter(state)
            told.append((status.state.value, metrics.GAP._value.get()))
        assert told == [("gap", 1), ("gap", 1), ("reconnecting", 1), ("catching_up", 1), ("active", 0)]


@pytest.mark.parametrize(
    ("key", "partition"),
    [("pay_0001", 5), ("pay_0002", 1), ("pay_0005", 8), ("pay_0006", 3), ("pay_0013", 11), ("pay_Đ4", 10)],
)
def test_partitions_among_twelve_are_those_of_javas_algorithm(key: str, partition: int) -> None:
    """Twelve is not a power of two, so the sign bit and the remainder matter."""
    assert partition_of(key.encode(), 12) == partition


def test_headers_stand_in_the_order_of_the_contract_with_null_where_the_column_is() -> None:
    assert headers_of(EVENT) == [
        ("id", b"0197a3c0-0000-7000-8000-000000000001"),
        ("ce_id", b"0197a3c0-0000-7000-8000-000000000001"),
        ("ce_type", bytes.fromhex("7468616e685f746fc3a16e2e74e1baa16f")),
        ("ce_source", b"/payments"),
        ("ce_time", b"2026-01-02T03:04:05.000006Z"),
        ("ce_specversion", b"1.0"),
        ("payment_seq", b"12"),
        ("traceparent", None),
    ]


@pytest.mark.parametrize("package", ["app", "handlers", "infra", "migrations"])
def test_no_slot_is_read_by_sql(package: str) -> None:
    """`pg_logical_slot_peek_changes` and the like decode the log from the slot's position again at each call."""
    files = [each for each in (ROOT / package).rglob("*") if each.suffix in {".py", ".pyx", ".sql"}]
    assert files
    assert not [each.name for each in files if "pg_logical_slot_" in each.read_text(encoding="utf-8")]


def test_a_session_that_stands_still_is_not_ready_whatever_it_waits_for(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("infra.relay.health.time.monotonic", lambda: now)
    status = health.Status(stalled_seconds=15)
    status.enter(health.State.ACTIVE)
    assert status.health.ready
    now += 16
    assert not status.health.ready
    assert "16 s" in status.health.detail
    status.beat()
    assert status.health.ready


class FakeProducer:
    """Records what was sent, as lists of payloads; the test answers."""

    def __init__(self) -> None:
        self.sent: list[tuple[int, list[bytes], asyncio.Future[Any]]] = []
        self.end = 0
        """The topic's end, if all of it is in one partition."""

    async def send_batch(self, batch: RecordBatch, topic: str, *, partition: int) -> asyncio.Future[Any]:
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.sent.append((partition, [event.payload for event, _ in batch.unpack()], answer))
        return answer

    @property
    def values(self) -> list[list[bytes]]:
        return [values for _, values, _ in self.sent]


class TestPublisher:
    """One partition, so that every event waits for those before it."""

    def setup_method(self) -> None:
        self.producer = FakeProducer()
        config = RelayConfig(postgres_url="", kafka=KafkaAccess(""), topic="events")
        self.publisher = Publisher(config, self.producer, OneCluster(), 1, lambda: None)
        self.groups: list[Group] = []

    async def publish(self, *values: bytes) -> None:
        for value in values:
            self.groups.append(Group())
            self.publisher.publish([EVENT._replace(payload=value)], self.groups[-1])
        await flush(self.publisher)

    async def answer(self, number: int, error: Exception | None = None, *, offset: int | None = None) -> None:
        """Acknowledge this batch, at the end of its partition or at `offset`; or refuse it."""
        answer = self.producer.sent[number][2]
        if error is None:
            answer.set_result(SimpleNamespace(offset=self.producer.end if offset is None else offset))
            self.producer.end += len(self.producer.sent[number][1])
        else:
            answer.set_exception(error)
        await asyncio.sleep(0)

    @property
    def missing(self) -> list[int]:
        return [group.missing for group in self.groups]

    async def test_a_partition_has_one_batch_in_flight_and_only_that_is_acknowledged(self) -> None:
        await self.publish(b"1")
        await self.publish(b"2")
        await self.publish(b"3")
        assert self.producer.values == [[b"1"]]
        await self.answer(0)
        assert self.missing == [0, 1, 1]
        await flush(self.publisher)
        assert self.producer.values == [[b"1"], [b"2", b"3"]]
        await self.answer(1)
        assert self.missing == [0, 0, 0]
        assert self.publisher.unacknowledged == self.publisher.unacknowledged_bytes == 0

    async def test_lanes_wait_in_turn_while_enough_is_on_its_way(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Everything sent to a broker at once is one request, which takes several times its size in memory."""
        monkeypatch.setattr(publisher, "IN_FLIGHT_BYTES_MAX", 20)
        config = RelayConfig(postgres_url="", kafka=KafkaAccess(""), topic="events")
        self.publisher = Publisher(config, self.producer, OneCluster(), 8, lambda: None)
        keys = {partition_of(key, 8): key for key in (b"pay_%d" % number for number in range(100))}
        every = [EVENT._replace(aggregateid=keys[number], payload=b"0123456789") for number in range(8)]
        self.publisher.publish(every, Group())
        for turn in range(4):
            await flush(self.publisher)
            self.publisher.publish(every[:2], Group())
            for number in (2 * turn, 2 * turn + 1):
                await self.answer(number)
        assert [partition for partition, *_ in self.producer.sent] == [*range(8)]

    async def test_nothing_is_sent_after_a_batch_that_failed(self) -> None:
        await self.publish(b"1")
        await self.publish(b"2")
        await self.answer(0, KafkaConnectionError())
        with pytest.raises(KafkaAway):
            await self.publish(b"3")
        assert self.producer.values == [[b"1"]]
        assert self.missing == [1, 1, 1]

    async def test_after_a_refused_event_batches_are_as_large_as_before(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Batches were made smaller only to find the refused event."""

        async def start_producer(*_: Any) -> tuple[FakeProducer, int]:
            return self.producer, 1

        monkeypatch.setattr(producers, "start_producer", start_producer)
        await self.publish(b"1")
        await self.publish(b"2")
        await self.publish(b"33")
        await self.answer(0)
        for sent in (1, 2):
            await flush(self.publisher)
            await self.answer(sent, MessageSizeTooLargeError())
        self.publisher.blocked.clear()
        self.publisher.publish([EVENT._replace(payload=value) for value in (b"4", b"5")], Group())
        await flush(self.publisher)
        assert self.producer.values == [[b"1"], [b"2", b"33"], [b"2"], [b"4", b"5"]]

    async def test_a_producer_that_cannot_be_made_ends_the_session_whatever_the_reason(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Otherwise the partition would retry for ever, and nothing would report it."""

        async def start_producer(*_: Any) -> tuple[FakeProducer, int]:
            raise ValueError("no such mechanism")

        monkeypatch.setattr(producers, "start_producer", start_producer)
        await self.publish(b"1")
        await self.answer(0, LeaderNotAvailableError())
        with pytest.raises(KafkaAway, match="no such mechanism"):
            await flush(self.publisher)

    async def test_a_producer_that_is_not_made_in_time_ends_the_session_with_the_reason(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async def start_producer(*_: Any) -> tuple[FakeProducer, int]:
            await asyncio.Event().wait()
            return self.producer, 1

        monkeypatch.setattr(producers, "start_producer", start_producer)
        monkeypatch.setattr(producers, "RENEWAL_SECONDS", 0.01)
        await self.publish(b"1")
        await self.answer(0, LeaderNotAvailableError())
        with pytest.raises(KafkaAway, match=r"partition 0 got no other producer within 0\.01 s"):
            await flush(self.publisher)

    async def test_a_producer_that_takes_for_ever_is_told(self, monkeypatch: pytest.MonkeyPatch) -> None:
        now = 100.0

        async def start_producer(*_: Any) -> tuple[FakeProducer, int]:
            await asyncio.Event().wait()
            return self.producer, 1

        monkeypatch.setattr(producers, "start_producer", start_producer)
        monkeypatch.setattr("infra.relay.publish.publisher.time.monotonic", lambda: now)
        await self.publish(b"1")
        await self.publish(b"2")
        await self.publish(b"3")
        await self.answer(0)
        await self.publisher.flush()
        await self.answer(1, MessageSizeTooLargeError())
        await self.publisher.flush()
        now += 60
        assert self.publisher.trouble == "Kafka acknowledges nothing; what waits is in partition 0"
        (renewal,) = self.publisher._producers.renewals
        renewal.cancel()

    async def test_an_offset_that_is_not_above_the_last_acknowledged_one_means_that_events_are_lost(self) -> None:
        for value in (b"1", b"2", b"3", b"4"):
            await self.publish(value)
        await self.answer(0)
        await flush(self.publisher)
        await self.answer(1)
        assert self.publisher.acknowledged_offsets == [3]
        await self.publish(b"5")
        await self.answer(2, offset=3)
        assert self.missing == [0] * 5
        with pytest.raises(EventsLost, match="partition 0 of events goes on at offset 3, although 3 was acknowledged"):
            await self.publisher.flush()

    async def test_an_error_in_another_partition_does_not_hide_that_events_are_lost(self) -> None:
        """The next session would go on above the lost offsets, and notice nothing."""
        config = RelayConfig(postgres_url="", kafka=KafkaAccess(""), topic="events")
        self.publisher = Publisher(config, self.producer, OneCluster(), 2, lambda: None)
        self.publisher.exceed([4, 4])
        keys = {partition_of(key, 2): key for key in (b"pay_1", b"pay_2", b"pay_3", b"pay_4")}
        self.publisher.publish([EVENT._replace(aggregateid=keys[number]) for number in (0, 1)], Group())
        await flush(self.publisher)
        await self.answer(0, offset=0)
        await self.answer(1, KafkaConnectionError())
        with pytest.raises(EventsLost):
            await self.publisher.flush()

    async def test_a_batch_that_the_broker_had_already_says_nothing_about_offsets(self) -> None:
        self.publisher.exceed([7, 8])
        await self.publish(b"1")
        await self.answer(0, offset=-1)
        await self.publisher.flush()
        assert self.publisher.acknowledged_offsets == [7]
        await self.publish(b"2")
        await self.answer(1, offset=8)
        await self.publisher.flush()
        assert self.publisher.acknowledged_offsets == [8]

    async def test_a_partition_that_acknowledges_nothing_is_named_though_others_go_on(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        now = 100.0
        monkeypatch.setattr("infra.relay.publish.publisher.time.monotonic", lambda: now)
        config = RelayConfig(postgres_url="", kafka=KafkaAccess(""), topic="events", stalled_seconds=15)
        self.publisher = Publisher(config, self.producer, OneCluster(), 2, lambda: None)
        keys = {partition_of(key, 2): key for key in (b"pay_1", b"pay_2", b"pay_3", b"pay_4")}
        self.publisher.publish([EVENT._replace(aggregateid=keys[0])], Group())
        await flush(self.publisher)
        now += 10
        self.publisher.publish([EVENT._replace(aggregateid=keys[1])], Group())
        await flush(self.publisher)
        await self.answer(1)
        assert self.publisher.trouble is None
        now += 10
        assert self.publisher.trouble == "Kafka acknowledges nothing in partition 0"
        await self.answer(0)
        assert self.publisher.trouble is None

    async def test_a_partition_that_is_gone_ends_the_session_and_not_the_process(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async def send_batch(*_: Any, **__: Any) -> None:
            raise AssertionError("Unrecognized partition")

        monkeypatch.setattr(self.producer, "send_batch", send_batch)
        with pytest.raises(KafkaAway, match="topic events has no partition 0 any more"):
            await self.publish(b"1")

    async def test_a_batch_that_the_producer_gave_up_is_not_forgotten(self) -> None:
        await self.publish(b"1")
        self.producer.sent[0][2].cancel()
        await asyncio.sleep(0)
        with pytest.raises(KafkaAway):
            await flush(self.publisher)
        assert self.missing == [1]


@pytest.mark.parametrize(
    ("key", "partition"),
    [
        ("pay_0001", 1),
        ("pay_0002", 5),
        ("pay_0005", 4),
        ("pay_0006", 3),
        ("pay_0007", 2),
        ("pay_0008", 0),
        ("pay_0013", 7),
        ("pay_Đ4", 2),
    ],
)
def test_partitions_are_those_that_debezium_chose(key: str, partition: int) -> None:
    assert partition_of(key.encode(), 8) == partition


@given(st.binary(max_size=100))
def test_murmur2_is_the_one_of_aiokafkas_producers(key: bytes) -> None:
    assert murmur2(key) == aiokafka_murmur2(key)


def test_murmur2_is_that_of_javas_client() -> None:
    # org.apache.kafka.common.utils.UtilsTest.testMurmur2
    vectors = {
        "21": -973932308,
        "foobar": -790332482,
        "a-little-bit-long-string": -985981536,
        "a-little-bit-longer-string": -1486304829,
        "lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8": -58897971,
        "abc": 479470107,
    }
    assert {text: murmur2(text.encode()) for text in vectors} == {
        text: value % 2**32 for text, value in vectors.items()
    }


class _LostConnection:
    """libpq after the connection broke: it no longer gives its socket."""

    def __init__(self, number: int) -> None:
        self.number: int | None = number

    @property
    def socket(self) -> int:
        if self.number is None:
            raise psycopg.OperationalError("the connection is lost")
        return self.number


async def test_a_lost_connection_is_no_longer_watched() -> None:
    """Otherwise the next socket with the same number, perhaps Kafka's, would never be read."""
    ours, theirs = socket.socketpair()
    connection: Any = SimpleNamespace(pgconn=_LostConnection(ours.fileno()))
    stream = ReplicationStream(connection)
    stream.watch(lambda: None)
    connection.pgconn.number = None
    stream.unwatch()
    assert not asyncio.get_running_loop().remove_reader(ours.fileno())
    ours.close()
    theirs.close()


class _EndedConnection:
    """libpq after the server ended the stream: it reports the end once, and then that there is no stream."""

    socket, is_told = 0, False

    def get_copy_data(self, _: int) -> tuple[int, memoryview]:
        if self.is_told:
            raise psycopg.OperationalError("no COPY in progress")
        self.is_told = True
        return -1, memoryview(b"")

    def is_busy(self) -> int:
        return 0

    def get_result(self) -> Any:
        return SimpleNamespace(get_error_message=lambda: "why it ended")


@pytest.mark.parametrize("is_native", [True, False])
async def test_a_stream_that_ended_says_why(is_native: bool) -> None:
    config = RelayConfig(postgres_url="", kafka=KafkaAccess(""), topic="events", is_native=is_native)
    connection: Any = SimpleNamespace(pgconn=_EndedConnection())
    source = WalSource(config, connection)
    source._stream = stream = ReplicationStream(connection)
    source._reader = stream.log_reader(source._prefix.begin, []) if is_native else None
    with pytest.raises(PostgresAway, match="why it ended"):
        await source.read(Publisher(config, FakeProducer(), OneCluster(), 1, lambda: None))


class Writes:
    """A leader's connection that remembers what is saved."""

    def __init__(self) -> None:
        self.published: list[str] = []

    async def execute(self, _: bytes, values: dict[str, Any]) -> Any:
        self.published.append(values["published"])
        return SimpleNamespace(rowcount=1)


async def test_progress_is_written_down_soon_after_the_start_though_it_is_seldom_later() -> None:
    config = RelayConfig(postgres_url="", kafka=KafkaAccess(""), topic="t", feedback_seconds=600)
    session = Session(config, Status(stalled_seconds=15), asyncio.Event())
    session._is_save_due = False
    ticking = asyncio.create_task(session._tick())
    await until(lambda: session._is_save_due)
    ticking.cancel()


async def test_a_snapshot_is_proven_only_once_the_log_is_acknowledged_beyond_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def ended_by_now(_: object) -> tuple[int, Snapshot]:
        return 250, Snapshot(7, 9, frozenset({8}))

    async def flushed_by_now(_: object) -> int:
        return 300

    monkeypatch.setattr(wal_source, "ended_by_now", ended_by_now)
    monkeypatch.setattr(wal_source, "flushed_by_now", flushed_by_now)
    writes: Any = Writes()
    source = WalSource(RelayConfig(postgres_url="", kafka=KafkaAccess(""), topic="t"), writes)
    source._has_news = True
    for acknowledged in (100, 249, 250):
        await source._save(acknowledged)
    assert writes.published == ["1:1:", "1:1:", "7:9:8"]
