"""Kafka records are encoded the same in C and in Python, and the same as by aiokafka's own builder."""

import gc
import sys
from collections.abc import Callable, Sequence
from typing import Any

import psutil
import pytest
from aiokafka.record.default_records import DefaultRecordBatchBuilder
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.relay.compiled import IS_COMPILED
from infra.relay.event import Group, OutboxEvent
from infra.relay.publish.partitions import partition_of
from infra.relay.publish.records import RecordBatch, Records, headers_of, records_class

if IS_COMPILED:
    from infra.relay import native

CREATED_MS = 1_767_323_045_000
EVENT = OutboxEvent(b"id", b"pay", b"type", b"{}", b"7", b"/payments", b"1.0", b"now", b"00-trace")
# From 64 and from 8192 on, the varint of a length or of an event's place in its batch needs one byte more.
LIMITS = (0, 1, 63, 64, 8191, 8192)
LARGE = (65_535, 65_536, 70_001)

compiled = pytest.mark.skipif(not IS_COMPILED, reason="infra/relay/native.pyx is not compiled for this Python")
each_encoder = pytest.mark.parametrize(
    "is_native", [False, pytest.param(True, marks=compiled)], ids=["plain", "native"]
)


def texts(*sizes: int) -> st.SearchStrategy[bytes]:
    letters = st.binary(min_size=1, max_size=4).map(lambda some: some.replace(b"\0", b"t"))
    repeated = st.builds(lambda some, size: (some * size)[:size], letters, st.sampled_from(sizes))
    return st.binary(max_size=8).map(lambda some: some.replace(b"\0", b"t")) | repeated


SMALL = texts(*LIMITS[:4])
EVENTS = st.builds(
    OutboxEvent, SMALL, SMALL, SMALL, texts(*LIMITS, *LARGE), SMALL, SMALL, SMALL, SMALL, st.none() | texts(*LIMITS)
)


def encoded(
    events: Sequence[tuple[OutboxEvent, Group]], bytes_max: int, *, is_native: bool
) -> list[tuple[Records, list[tuple[OutboxEvent, Group]]]]:
    """Encode in as many batches as it takes; return each with its events."""
    new_records = records_class(is_native=is_native)
    batches = [(new_records(bytes_max), list(events[:0]))]
    for event, group in events:
        if not batches[-1][0].append(event, group):
            batches.append((new_records(bytes_max), []))
            assert batches[-1][0].append(event, group), "the first one always fits"
        batches[-1][1].append((event, group))
    return batches


def built(records: Records) -> bytes:
    batch = RecordBatch(records)
    batch._created_ms = CREATED_MS
    return bytes(batch._build())


def built_by_aiokafka(events: Sequence[OutboxEvent]) -> bytes:
    builder = DefaultRecordBatchBuilder(2, 0, 0, -1, -1, -1, 2**30)
    for place, event in enumerate(events):
        assert builder.append(place, CREATED_MS, event.aggregateid, event.payload, headers_of(event)) is not None
    return bytes(builder.build())


def assert_encoded_as_by_aiokafka(
    events: Sequence[tuple[OutboxEvent, Group]], bytes_max: int, *, is_native: bool
) -> list[int]:
    """Return the number of events in each batch."""
    counts = []
    for records, content in encoded(events, bytes_max, is_native=is_native):
        of_content = [event for event, _ in content]
        assert records.count == len(content) == sum(records.counts)
        assert records.payload_bytes == sum(len(event.payload) for event in of_content)
        assert built(records) == built_by_aiokafka(of_content)
        assert len(content) == 1 or len(records.buffer) <= bytes_max
        unpacked = RecordBatch(records).unpack()
        assert [event for event, _ in unpacked] == of_content
        assert all(found is group for (_, found), (_, group) in zip(unpacked, content, strict=True))
        counts.append(len(content))
    return counts


@compiled
@given(
    st.lists(st.tuples(EVENTS, st.integers(0, 2)), min_size=1, max_size=12),
    st.sampled_from([0, 1, 61, 300, 1_000, 9_000, 100_000, 2**20]) | st.integers(0, 3_000),
)
@settings(deadline=None)
def test_both_encoders_fill_the_same_batches_with_the_bytes_that_aiokafka_writes(
    given_events: list[tuple[OutboxEvent, int]], bytes_max: int
) -> None:
    groups = [Group() for _ in range(3)]
    events = [(event, groups[number]) for event, number in given_events]
    counts = assert_encoded_as_by_aiokafka(events, bytes_max, is_native=False)
    assert assert_encoded_as_by_aiokafka(events, bytes_max, is_native=True) == counts


@each_encoder
def test_places_in_a_batch_of_many_events_are_written_as_aiokafka_does(*, is_native: bool) -> None:
    groups = [Group() for _ in range(5)]
    events = [(EVENT._replace(payload=b"%d" % number), groups[number // 2000]) for number in range(8_300)]
    assert assert_encoded_as_by_aiokafka(events, 2**22, is_native=is_native) == [8_300]


@each_encoder
@pytest.mark.parametrize("spare", [0, -1])
def test_an_event_that_fills_a_batch_to_the_last_byte_fits_and_one_byte_more_does_not(
    spare: int, *, is_native: bool
) -> None:
    both = len(built_by_aiokafka([EVENT, EVENT]))
    records = records_class(is_native=is_native)(both + spare)
    assert records.append(EVENT, Group())
    assert records.append(EVENT, Group()) is (spare == 0)


@each_encoder
def test_nothing_is_added_to_a_sealed_batch(*, is_native: bool) -> None:
    for before in (0, 1):
        records = records_class(is_native=is_native)(10_000)
        for _ in range(before):
            assert records.append(EVENT, Group())
        size = len(records.seal())
        assert not records.append(EVENT, Group())
        assert (records.count, len(records.seal()), len(records.groups)) == (before, size, before)


@each_encoder
def test_nothing_is_added_to_a_batch_that_holds_an_event(*, is_native: bool) -> None:
    group = Group()
    batch = RecordBatch(records_class(is_native=is_native)(10_000))
    batch.hold(EVENT, group)
    assert not batch.records.append(EVENT, Group())
    assert batch.unpack() == [(EVENT, group)]
    assert (batch.record_count(), batch.records.count) == (1, 0)


@each_encoder
def test_an_acknowledged_batch_is_taken_off_each_of_its_groups(*, is_native: bool) -> None:
    first, second = Group(), Group()
    first.missing, second.missing = 5, 5
    records = records_class(is_native=is_native)(10_000)
    for group in (first, first, second, first):
        records.append(EVENT, group)
    RecordBatch(records).settle()
    assert (first.missing, second.missing) == (2, 4)
    assert records.groups == [first, second, first]
    assert records.counts == [2, 1, 1]


# --- the compiled encoder only ----------------------------------------------------------------------------------------


def assert_nothing_is_kept(work: Callable[[], None], *held: object) -> None:
    """Check that repeating the work leaks neither references to `held` nor memory."""
    work()
    gc.collect()
    references, resident = [sys.getrefcount(each) for each in held], psutil.Process().memory_info().rss
    work()
    work()
    gc.collect()
    assert all(abs(sys.getrefcount(each) - before) < 1000 for each, before in zip(held, references, strict=True))
    assert psutil.Process().memory_info().rss < resident + 4 * 2**20


class Opened:
    """Records for this many partitions, each opened when its first event comes."""

    def __init__(self, partitions: int = 1, bytes_max: int = 100_000) -> None:
        self.open: list[Records | None] = [None] * partitions
        self.renewed: list[int] = []
        self._bytes_max = bytes_max

    def renew(self, number: int) -> Records:
        self.renewed.append(number)
        self.open[number] = records = records_class(is_native=True)(self._bytes_max)
        return records


@compiled
@given(st.binary(max_size=40), st.integers(1, 50))
def test_the_compiled_encoder_chooses_the_partition_that_the_others_do(key: bytes, partitions: int) -> None:
    to = Opened(partitions)
    event = EVENT._replace(aggregateid=key)
    assert native.encode([event], Group(), 10, to.open, to.renew) == (1, len(event.payload))
    assert to.renewed == [partition_of(key, partitions)]


@compiled
def test_the_compiled_encoder_stops_before_an_event_that_is_too_large_and_its_group_counts_the_others() -> None:
    to, group = Opened(1), Group()
    events = [EVENT._replace(payload=b"x" * size) for size in (3, 10, 11, 3)]
    assert native.encode(events, group, 10, to.open, to.renew) == (2, 13)
    assert group.missing == 2
    assert to.open[0] is not None
    assert to.open[0].count == 2


@compiled
def test_the_compiled_encoder_goes_on_with_what_renew_gives_when_a_batch_is_full_or_sealed() -> None:
    to = Opened(1, bytes_max=len(built_by_aiokafka([EVENT, EVENT])))
    native.encode([EVENT] * 5, Group(), 10, to.open, to.renew)
    assert to.renewed == [0, 0, 0]
    assert to.open[0] is not None
    to.open[0].seal()
    native.encode([EVENT], Group(), 10, to.open, to.renew)
    assert len(to.renewed) == 4


@compiled
@pytest.mark.parametrize("wrong", [EVENT[:-1], [*EVENT], (*EVENT[:-1], "text"), (*EVENT[:-1], 7)])
def test_the_compiled_encoder_refuses_what_is_no_event(wrong: Any) -> None:
    records = records_class(is_native=True)(10_000)
    with pytest.raises(TypeError):
        records.append(wrong, Group())
    assert (records.count, records.groups) == (0, [])


@compiled
def test_the_compiled_encoder_keeps_nothing_of_what_it_has_encoded() -> None:
    """Encodes 200,000 events; a leak from a tenth of them would show."""
    group, event = Group(), EVENT._replace(payload=b"x" * 100, traceparent=None)

    def encode() -> None:
        to = Opened(4, bytes_max=50_000)
        for _ in range(100):
            native.encode([event] * 1000, group, 1000, to.open, to.renew)

    assert_nothing_is_kept(encode, group, event, event.payload, None)
