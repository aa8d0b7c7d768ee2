"""Reading the log in C, in Python and alternating: what is sent to Kafka, and how far the slot may move.

The log arrives in pieces of any size; Kafka answers in any order and sometimes refuses a batch. Whatever happens, no
event is lost or repeated, and the position never passes a transaction with an event that is not acknowledged.
"""

import asyncio
import copy
import struct
from collections import Counter, defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, NamedTuple

import psycopg
import pytest
from aiokafka.errors import MessageSizeTooLargeError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from infra.kafka.access import KafkaAccess
from infra.relay.compiled import IS_COMPILED
from infra.relay.config import RelayConfig
from infra.relay.errors import PostgresAway
from infra.relay.event import OUTBOX_COLUMNS, Group, OutboxEvent
from infra.relay.publish import producers
from infra.relay.publish.partitions import partition_of
from infra.relay.publish.producer import OneCluster
from infra.relay.publish.publisher import Diverted, Publisher
from infra.relay.publish.records import RecordBatch
from infra.relay.source import Room
from infra.relay.wal.gulps import Gulps
from infra.relay.wal.pgoutput import RowReader
from infra.relay.wal.prefix import Prefix
from infra.relay.wal.source import WalSource
from infra.relay.wal.stream import ReplicationStream
from tests.support.publishing import flush
from tests.unit.test_pgoutput import insert, relation
from tests.unit.test_records import EVENT, Opened, assert_nothing_is_kept, compiled, each_encoder

if IS_COMPILED:
    from infra.relay.native import LogReader

PARTITIONS = 3
KEYS = [b"pay_%d" % number for number in range(6)]
PAYLOAD_MAX = 700
LARGEST = PAYLOAD_MAX + 1
OUTBOX, OTHER = 5, 6
LAYOUTS = (
    [*OUTBOX_COLUMNS],
    [*reversed(OUTBOX_COLUMNS)],
    ["added", *OUTBOX_COLUMNS, "removed"],
    # As many columns as the compiled reader has room for, and more.
    [*(f"column_{number}" for number in range(23)), *OUTBOX_COLUMNS],
    [*(f"column_{number}" for number in range(30)), *OUTBOX_COLUMNS],
)
NOBODY = b"nobody"


# --- the log ----------------------------------------------------------------------------------------------------------


def log_data(message: bytes) -> bytes:
    return struct.pack(">cqqq", b"w", 0, 0, 0) + message


def keepalive(wal_end: int, *, is_reply_wanted: bool = False) -> bytes:
    return struct.pack(">cqqB", b"k", wal_end, 0, is_reply_wanted)


def begin(commit_lsn: int, xid: int) -> bytes:
    return struct.pack(">cqqI", b"B", commit_lsn, xid * 1000, xid)


def commit(commit_lsn: int, end_lsn: int) -> bytes:
    return struct.pack(">cBqqq", b"C", 0, commit_lsn, end_lsn, 0)


def row_of(event: OutboxEvent, layout: list[str]) -> bytes:
    return insert(OUTBOX, [event._asdict().get(name) for name in layout])


class Transaction(NamedTuple):
    """A transaction of the log; `begins_at` is the index of its first message."""

    begins_at: int
    commit_lsn: int
    end_lsn: int
    events: list[OutboxEvent]


class Log:
    """The messages of a log, and the transactions to which they belong."""

    def __init__(self) -> None:
        self.messages: list[bytes] = []
        self.transactions: list[Transaction] = []
        self.events: list[OutboxEvent] = []
        self._layout = LAYOUTS[0]

    def add(self, content: list["Item"]) -> None:
        number = len(self.transactions) + 1
        of_it = Transaction(len(self.messages), number * 100, number * 100 + 10, [])
        self.transactions.append(of_it)
        self.messages.append(log_data(begin(of_it.commit_lsn, number)))
        for item in content:
            item.write(self, of_it)
        self.messages.append(log_data(commit(of_it.commit_lsn, of_it.end_lsn)))

    def last_end(self, taken: int) -> int | None:
        """The end of the last transaction in the first `taken` messages; None if they stop within one."""
        begun = [each for each in self.transactions if each.begins_at < taken]
        if not begun:
            return 0
        behind = self.transactions[len(begun) : len(begun) + 1]
        is_whole = taken == (behind[0].begins_at if behind else len(self.messages))
        return begun[-1].end_lsn if is_whole else None

    def write_event(self, of_it: Transaction, key: bytes, payload_bytes: int, trace: bytes | None) -> None:
        number = len(self.events)
        payload = (b"%d " % number).ljust(payload_bytes, b"x")[:payload_bytes]
        event = EVENT._replace(
            id=b"%d" % number, aggregateid=key, payload=payload, payment_seq=b"%d" % number, traceparent=trace
        )
        self.events.append(event)
        of_it.events.append(event)
        self.messages.append(log_data(row_of(event, self._layout)))

    def write_layout(self, layout: list[str]) -> None:
        self._layout = layout
        self.messages.append(log_data(relation(OUTBOX, layout)))


@dataclass(frozen=True)
class Rows:
    count: int
    key: bytes
    payload_bytes: int
    trace: bytes | None

    def write(self, log: Log, of_it: Transaction) -> None:
        for _ in range(self.count):
            log.write_event(of_it, self.key, self.payload_bytes, self.trace)


@dataclass(frozen=True)
class OtherTable:
    """A row of another table that looks like a row of ours."""

    def write(self, log: Log, of_it: Transaction) -> None:
        log.messages.append(log_data(insert(OTHER, [*EVENT])))


@dataclass(frozen=True)
class Layout:
    columns: list[str]

    def write(self, log: Log, of_it: Transaction) -> None:
        log.write_layout(self.columns)


@dataclass(frozen=True)
class Keepalive:
    """The server reports how far it has read: within a transaction, at most up to its commit."""

    is_reply_wanted: bool

    def write(self, log: Log, of_it: Transaction) -> None:
        log.messages.append(keepalive(of_it.commit_lsn, is_reply_wanted=self.is_reply_wanted))


Item = Rows | OtherTable | Layout | Keepalive

SIZES = st.sampled_from([0, 5, 20, 20, 20, 64, 200, PAYLOAD_MAX, LARGEST])
ROWS = st.builds(Rows, st.integers(1, 4), st.sampled_from(KEYS), SIZES, st.sampled_from([None, b"", b"00-trace"]))
ITEMS: st.SearchStrategy[Item] = st.one_of(
    ROWS,
    ROWS,
    ROWS,
    ROWS,
    st.builds(OtherTable),
    st.builds(Layout, st.sampled_from(LAYOUTS)),
    st.builds(Keepalive, st.booleans()),
)
TRANSACTIONS = st.lists(st.lists(ITEMS, max_size=8), min_size=3, max_size=12)


class Connection:
    """Stands in for libpq: messages arrive in pieces, and reading past the end of the stream fails as in libpq."""

    host = b"127.0.0.1"

    def __init__(self, messages: list[bytes], pieces: list[int]) -> None:
        self.to_come = deque(messages)
        self._come: deque[bytes] = deque()
        self._pieces = deque(pieces)
        self.has_ended = self._is_end_told = False
        self.taken = 0
        self._given: list[memoryview] = []

    @property
    def is_read(self) -> bool:
        return not self.to_come and not self._come

    def get_copy_data(self, _: int) -> tuple[int, memoryview]:
        if self._come:
            message = memoryview(bytearray(self._come.popleft()))
            self._given.append(message)
            self.taken += 1
            return len(message), message
        if not self.has_ended:
            return 0, memoryview(b"")
        if self._is_end_told:
            raise psycopg.OperationalError("receiving copy data failed: no COPY in progress")
        self._is_end_told = True
        return -1, memoryview(b"")

    def consume_input(self) -> None:
        for _ in range(self._pieces.popleft() if self._pieces else 3):
            if self.to_come:
                self._come.append(self.to_come.popleft())

    def is_busy(self) -> int:
        return 0

    def get_result(self) -> Any:
        return SimpleNamespace(get_error_message=lambda: "terminating connection due to administrator command")

    def let_go(self) -> None:
        """Release all views that were handed out; that fails if anything still uses one."""
        for message in self._given:
            message.release()
        self._given.clear()


# --- Kafka ------------------------------------------------------------------------------------------------------------


class Sent(NamedTuple):
    partition: int
    events: list[OutboxEvent]
    answer: asyncio.Future[Any]


class Producer:
    """Keeps batches until the test answers; an acknowledged batch is on the topic."""

    def __init__(self) -> None:
        self.sent: list[Sent] = []
        self.publisher: Publisher
        self.topic: dict[int, list[OutboxEvent]] = defaultdict(list)

    async def send_batch(self, batch: RecordBatch, _: str, *, partition: int) -> asyncio.Future[Any]:
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        assert all(each.partition != partition for each in self.sent), "one batch of a partition at a time"
        self.sent.append(Sent(partition, [event for event, _ in batch.unpack()], answer))
        assert not self.publisher.blocked & {event.aggregateid for event in self.sent[-1].events}, "in quarantine"
        return answer

    async def acknowledge(self, number: int) -> None:
        sent = self.sent.pop(number % len(self.sent))
        sent.answer.set_result(SimpleNamespace(offset=len(self.topic[sent.partition])))
        self.topic[sent.partition] += sent.events
        await asyncio.sleep(0)

    async def refuse(self, number: int) -> None:
        sent = self.sent.pop(number % len(self.sent))
        sent.answer.set_exception(MessageSizeTooLargeError())
        await asyncio.sleep(0)


# --- the relay between them -------------------------------------------------------------------------------------------


class NotedPrefix(Prefix):
    """Remembers every group that was ever begun."""

    def __init__(self) -> None:
        super().__init__()
        self.all: list[Group] = []

    def begin(self, committed_at_us: int) -> Group:
        self.all.append(super().begin(committed_at_us))
        return self.all[-1]

    def position(self, wal_end: int) -> int:
        """The position to which the slot could move now; changes nothing."""
        other = Prefix()
        other._groups, other._lsn = copy.copy(self._groups), self._lsn
        return other.advance(wal_end)


class Bench:
    """The real source and publisher between a fake server and a fake Kafka; create it within an event loop."""

    def __init__(self, log: Log, pieces: list[int], *, is_native: bool, room: Room) -> None:
        config = RelayConfig(
            postgres_url="", kafka=KafkaAccess(""), topic="events", is_native=is_native, message_bytes_max=PAYLOAD_MAX,
            unacknowledged_max=room.events, unacknowledged_bytes_max=room.size,
        )  # fmt: skip
        self.log = log
        self.server = Connection(log.messages, pieces)
        self.producer = Producer()
        self.publisher = self.producer.publisher = Publisher(
            config, self.producer, OneCluster(), PARTITIONS, lambda: None
        )
        self.prefix = NotedPrefix()
        connection: Any = SimpleNamespace(pgconn=self.server)
        leader: Any = None
        self.stream = ReplicationStream(connection)
        self.source = WalSource(config, leader)
        self.source._rows = RowReader(OUTBOX)
        self.source._stream, self.source._prefix, self.source._gulps = self.stream, self.prefix, Gulps(is_taken=False)
        if is_native:
            self.source._reader = self.stream.log_reader(self.prefix.begin, self.source._unproven)
        for message in (relation(OUTBOX, LAYOUTS[0]), relation(OTHER, LAYOUTS[0]).replace(b"outbox", b"others")):
            self.source._follow(message)
        self.to_quarantine: list[Diverted] = []
        self.quarantined: list[OutboxEvent] = []

    async def start_producer(self, *_: Any) -> Any:
        return self.producer, PARTITIONS

    async def read(self, _: int = 0) -> None:
        if not self.publisher.is_full:
            await self.source.read(self.publisher)
            events, size = self.publisher.room
            assert events >= 0, "it has read more than there was room for"
            assert size > -LARGEST, "it has read on when there was no room"

    async def flush(self, _: int = 0) -> None:
        await flush(self.publisher)
        self.to_quarantine += self.publisher.take_diverted()

    async def acknowledge(self, number: int = 0) -> None:
        if self.producer.sent:
            await self.producer.acknowledge(number)

    async def refuse(self, number: int = 0) -> None:
        if self.producer.sent:
            await self.producer.refuse(number)

    async def quarantine(self, _: int = 0) -> None:
        self.publisher.acknowledge_diverted(self.to_quarantine)
        self.quarantined += [each.event for each in self.to_quarantine]
        self.to_quarantine.clear()

    async def save(self, _: int = 0) -> None:
        self.prefix.advance(self.stream.wal_end)

    async def block(self, _: int = 0) -> None:
        """Read in Python from here on: a key is blocked that no event has."""
        self.publisher.blocked.add(NOBODY)

    async def release(self, _: int = 0) -> None:
        """Read with the compiled code again, if there is any."""
        self.publisher.blocked.clear()

    async def go_round(self, _: int = 0) -> None:
        """One full round, like a relay with which Kafka keeps up."""
        await self.read()
        await self.flush()
        while self.producer.sent:
            await self.acknowledge()
        await self.quarantine()
        await self.save()

    async def drain(self) -> None:
        """Go on until the whole log is read and acknowledged; fails if that never happens."""
        for _ in range(10 * len(self.log.messages) + 1000):
            await self.read()
            await self.flush()
            await self.quarantine()
            await self.acknowledge()
            self.check()
            if self.server.is_read and not self.publisher.unacknowledged:
                return
        raise AssertionError("it does not end")

    @property
    def settled(self) -> list[OutboxEvent]:
        return [*self.quarantined, *(event for events in self.producer.topic.values() for event in events)]

    def check(self) -> None:
        """Check what holds at any time."""
        settled = {event.id for event in self.settled}
        position = self.prefix.position(self.stream.wal_end)
        for each in self.log.transactions:
            if any(event.id not in settled for event in each.events):
                # From a position up to here, the server sends the whole transaction again.
                assert position <= each.commit_lsn, "an event would be lost"
                break
        if not self.publisher.unacknowledged and (end := self.log.last_end(self.server.taken)) is not None:
            assert position == end, "an event would be repeated"
        assert all(group.missing >= 0 for group in self.prefix.all)
        assert sum(group.missing for group in self.prefix.all) == self.publisher.unacknowledged
        assert self.publisher.unacknowledged_bytes >= 0
        self.server.let_go()

    def check_end(self) -> None:
        """Check what holds once everything is acknowledged."""
        assert Counter(self.settled) == Counter(self.log.events), "each event once"
        refused = {event.id for event in self.quarantined}
        for partition in range(PARTITIONS):
            own = [event for event in self.log.events if partition_of(event.aggregateid, PARTITIONS) == partition]
            assert self.producer.topic[partition] == [event for event in own if event.id not in refused]
        for key in KEYS:
            numbers = [int(event.payment_seq) for event in self.quarantined if event.aggregateid == key]
            assert numbers == sorted(numbers)
        assert all(not group.missing for group in self.prefix.all)
        assert (self.publisher.unacknowledged, self.publisher.unacknowledged_bytes) == (0, 0)
        assert self.source._unproven == list(range(1, len(self.log.transactions) + 1))
        assert self.prefix.advance(self.stream.wal_end) == self.log.transactions[-1].end_lsn
        assert self.prefix.is_empty


STEPS: dict[str, Callable[[Bench, int], Any]] = {
    "go round": Bench.go_round,
    "read": Bench.read,
    "flush": Bench.flush,
    "acknowledge": Bench.acknowledge,
    "refuse": Bench.refuse,
    "quarantine": Bench.quarantine,
    "save": Bench.save,
    "block": Bench.block,
    "release": Bench.release,
}
OFTEN = ["go round", "read", "flush", "acknowledge", "save"]
SCRIPTS = st.lists(
    st.tuples(st.sampled_from([*OFTEN, *OFTEN, *OFTEN, *STEPS]), st.integers(0, 3)), min_size=15, max_size=60
)
PIECES = st.lists(st.sampled_from([0, 0, 0, 1, 1, 2, 3, 5, 9, 50]), min_size=15, max_size=60)
"""How many messages arrive at a time; a read goes on until none arrives."""
ROOMS = st.builds(Room, st.sampled_from([1, 2, 3, 7, 20_000]), st.sampled_from([1, 100, 1_000, 2**26]))


@dataclass
class Story:
    """A log, the pieces in which it arrives, and the steps taken meanwhile."""

    transactions: list[list[Item]]
    pieces: list[int] = field(default_factory=list)
    script: list[tuple[str, int]] = field(default_factory=list)
    room: Room = field(default_factory=lambda: Room(20_000, 2**26))

    async def told(self, *, is_native: bool) -> Bench:
        log = Log()
        for content in self.transactions:
            log.add(content)
        bench = Bench(log, self.pieces, is_native=is_native, room=self.room)
        with pytest.MonkeyPatch.context() as patch:
            # After a refusal a partition starts another producer; here it gets the same one.
            patch.setattr(producers, "start_producer", bench.start_producer)
            for name, number in self.script:
                await STEPS[name](bench, number)
                bench.check()
            await bench.drain()
        bench.check_end()
        return bench


STORIES = st.builds(Story, TRANSACTIONS, PIECES, SCRIPTS, ROOMS)


@each_encoder
@given(story=STORIES)
@settings(deadline=None, max_examples=500, suppress_health_check=[HealthCheck.too_slow])
async def test_nothing_is_lost_or_repeated_and_the_position_stays_before_what_is_not_acknowledged(
    story: Story, *, is_native: bool
) -> None:
    await story.told(is_native=is_native)


@compiled
@given(TRANSACTIONS, PIECES, ROOMS)
@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow])
async def test_compiled_or_not_or_by_turns_the_same_is_published(
    transactions: list[list[Item]], pieces: list[int], room: Room
) -> None:
    by_turns = [("read", 0), ("block", 0), ("read", 0), ("release", 0)] * 10
    native = await Story(transactions, pieces, [], room).told(is_native=True)
    for story, is_native in (
        (Story(transactions, pieces, [], room), False),
        (Story(transactions, [2], by_turns), True),
    ):
        other = await story.told(is_native=is_native)
        assert Counter(other.quarantined) == Counter(native.quarantined)
        assert other.producer.topic == native.producer.topic


@each_encoder
async def test_a_position_behind_a_transaction_whose_commit_comes_last_is_reached_though_its_events_were_settled_before(
    *, is_native: bool
) -> None:
    """Otherwise the next relay would publish it again, even after an orderly stop."""
    rows = Rows(1, KEYS[0], 5, None)
    to_the_last_commit = 3 + 2
    bench = await Story(
        [[rows], [rows]],
        pieces=[to_the_last_commit, 0, 1],
        script=[("read", 0), ("flush", 0), ("acknowledge", 0), ("save", 0), ("read", 0)],
    ).told(is_native=is_native)
    assert bench.prefix.advance(0) == 210


@each_encoder
async def test_the_end_of_the_stream_ends_the_session_as_one_to_postgres(*, is_native: bool) -> None:
    log = Log()
    log.add([Rows(2, KEYS[0], 5, None)])
    log.messages = log.messages[:-1]
    bench = Bench(log, [50], is_native=is_native, room=Room(20_000, 2**26))
    bench.server.has_ended = True
    bench.server.consume_input()
    with pytest.raises(PostgresAway, match="due to administrator command"):
        await bench.read()
    assert bench.prefix.position(0) == 0


@each_encoder
async def test_a_connection_that_breaks_ends_the_session_as_one_to_postgres(
    monkeypatch: pytest.MonkeyPatch, *, is_native: bool
) -> None:
    def consume_input() -> None:
        raise psycopg.OperationalError("server closed the connection unexpectedly")

    log = Log()
    bench = Bench(log, [50], is_native=is_native, room=Room(20_000, 2**26))
    monkeypatch.setattr(bench.server, "consume_input", consume_input)
    with pytest.raises(PostgresAway, match="unexpectedly"):
        await bench.read()


@each_encoder
async def test_keepalives_tell_how_far_the_server_is_and_whether_it_wants_an_answer(*, is_native: bool) -> None:
    log = Log()
    log.messages += [keepalive(300), keepalive(200, is_reply_wanted=True), keepalive(250)]
    bench = Bench(log, [50], is_native=is_native, room=Room(20_000, 2**26))
    await bench.read()
    assert (bench.stream.wal_end, bench.stream.is_reply_wanted) == (300, True)


# --- the compiled reader only -----------------------------------------------------------------------------------------


@compiled
async def test_most_of_a_log_does_not_come_to_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python gets only the table's layout, a row of another table, and a row that is too large."""
    monkeypatch.setattr(WalSource, "_read_in_python", None)
    taken: list[bytes] = []
    handle = WalSource._handle

    def noted(source: WalSource, message: bytes, intake: Any) -> None:
        taken.append(message)
        handle(source, message, intake)

    monkeypatch.setattr(WalSource, "_handle", noted)
    ours, large = Rows(50, KEYS[0], 20, None), Rows(1, KEYS[1], LARGEST, None)
    story = Story([[ours, Layout(LAYOUTS[1]), ours], [OtherTable(), ours], [large]])
    log = Log()
    for content in story.transactions:
        log.add(content)
    bench = Bench(log, [500], is_native=True, room=story.room)
    while not bench.server.is_read:
        await bench.read()
    assert [chr(message[0]) for message in taken] == ["R", "I", "I"]


@compiled
def test_transactions_of_one_read_share_a_group_and_those_of_the_next_have_another() -> None:
    log, prefix = Log(), NotedPrefix()
    for _ in range(6):
        log.add([Rows(2, KEYS[0], 5, None)])
    reader, server = reader_of(log.messages, prefix)
    server.consume_input()
    to = Opened()
    # Two transactions and half of the third.
    assert reader.read(5, 2**26, PAYLOAD_MAX, to.open, to.renew) == (5, 25, False, None)
    assert [(group.missing, group.end_lsn) for group in prefix.all] == [(5, 210)]
    assert reader.read(100, 2**26, PAYLOAD_MAX, to.open, to.renew) == (7, 35, True, None)
    assert [(group.missing, group.end_lsn) for group in prefix.all] == [(5, 210), (7, 610)]
    assert [group.committed_at_us for group in prefix.all] == [1000, 3000]


@compiled
def test_the_compiled_reader_keeps_nothing_of_what_it_has_read() -> None:
    """Reads 200,000 events; a leak from a tenth of them would show. No message is still referenced afterwards."""
    group = Group()
    message = bytearray(log_data(row_of(EVENT._replace(payload=b"x" * 100, traceparent=None), LAYOUTS[0])))
    events = begin(1, 7), commit(1, 2)
    left = 0

    def get(_: int) -> tuple[int, memoryview]:
        nonlocal left
        left -= 1
        place = left % 1000
        chosen = message if place > 1 else log_data(events[place])
        return len(chosen), memoryview(chosen)

    taken: list[int] = []
    reader = LogReader(get, lambda: None, lambda _: None, lambda _: group, taken)
    reader.group = group
    reader.learn(OUTBOX, len(LAYOUTS[0]), range(len(LAYOUTS[0])))

    def read() -> None:
        to = Opened()
        for _ in range(100):
            assert reader.read(1000, 2**26, PAYLOAD_MAX, to.open, to.renew)[0] == 1000
        taken.clear()

    assert_nothing_is_kept(read, group, message, None)
    message.clear()  # Raises if anything still holds a view of it.


def reader_of(messages: list[bytes], prefix: Prefix) -> "tuple[LogReader, Connection]":
    server = Connection(messages, [len(messages)])
    reader = LogReader(server.get_copy_data, server.consume_input, lambda _: None, prefix.begin, [])
    reader.group = Group(end_lsn=0)
    reader.learn(OUTBOX, len(LAYOUTS[0]), range(len(LAYOUTS[0])))
    return reader, server
