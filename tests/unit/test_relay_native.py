"""The compiled inner loop does what the Python does, and leaves alone what it does not know."""

import struct
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.relay import plain
from infra.relay.compiled import IS_COMPILED
from infra.relay.pgoutput import OutboxEvent
from infra.relay.prefix import Group, Prefix
from infra.relay.records import RecordBatch, Records

if IS_COMPILED:
    from infra.relay import native

pytestmark = pytest.mark.skipif(not IS_COMPILED, reason="there is no C compiler")

BATCH_BYTES_MAX = 3000
VALUES: list[bytes | None] = [b"id", b"pay", b"type", b"{}", b"7", b"/payments", b"1.0", b"now", b"00-trace"]
PAYLOAD = 3
BEGIN = struct.pack(">cqqI", b"B", 9, 100, 7)
COMMIT = struct.pack(">cBqqq", b"C", 0, 8, 9, 100)


def insert(values: list[bytes | None]) -> bytes:
    parts = [b"n" if value is None else b"t" + struct.pack(">i", len(value)) + value for value in values]
    return struct.pack(">cIcH", b"I", 5, b"N", len(values)) + b"".join(parts)


ROW = insert(VALUES)


class Log:
    """Messages, read by the compiled reader into the records of one partition."""

    def __init__(self, *messages: bytes) -> None:
        self.messages: Iterator[bytes] = iter(messages)
        self.open: list[Records | None] = [None]
        self.prefix = Prefix()
        self.reader = native.LogReader(self.get, lambda: None, lambda _: None, self.prefix.begin, [])
        self.reader.learn(5, len(VALUES), range(len(VALUES)))
        self.reader.group, self.reader.committed_at_us = Group(end_lsn=0), 0

    def get(self, _: int) -> tuple[int, memoryview]:
        message = next(self.messages, None)
        data = b"" if message is None else struct.pack(">cqqq", b"w", 0, 0, 0) + message
        return len(data), memoryview(data)

    def renew(self, number: int) -> Records:
        self.open[number] = records = native.Records(BATCH_BYTES_MAX)
        return records

    def read(self, events_max: int = 100) -> tuple[int, int, bool, bytes | None]:
        return self.reader.read(events_max, 1000, 1000, self.open, self.renew)


fields = st.one_of(st.binary(max_size=20), st.sampled_from([b"x" * 63, b"x" * 64, b"x" * 8191, b"x" * 8192]))
events = st.builds(OutboxEvent, *[fields] * 8, st.one_of(st.none(), fields))


@given(st.lists(st.tuples(events, st.integers(0, 2)), min_size=1))
def test_both_write_the_same_bytes(given: list[tuple[OutboxEvent, int]]) -> None:
    groups = [Group() for _ in range(3)]
    ours, theirs = plain.Records(BATCH_BYTES_MAX), native.Records(BATCH_BYTES_MAX)
    taken = [(event, groups[number]) for event, number in given if ours.append(event, groups[number])]
    assert taken == [(event, groups[number]) for event, number in given if theirs.append(event, groups[number])]
    assert (ours.counts, ours.payload_bytes) == (theirs.counts, theirs.payload_bytes)
    assert ours.seal()[plain.HEAD_SIZE :] == theirs.seal()[plain.HEAD_SIZE :]
    assert RecordBatch(theirs).unpack() == taken


def test_a_row_is_counted_in_its_transaction() -> None:
    log = Log(BEGIN, ROW, ROW, COMMIT)
    assert log.read() == (2, 4, True, None)
    assert (log.reader.group.missing, log.reader.group.end_lsn, log.reader.has_commit) == (2, 9, True)


def test_a_transaction_ends_though_the_group_of_its_events_was_forgotten() -> None:
    log = Log(BEGIN, ROW, COMMIT, BEGIN, ROW, COMMIT.replace(struct.pack(">q", 9), struct.pack(">q", 19)))
    assert log.read(events_max=2) == (2, 4, False, None)
    log.reader.group.missing -= 2
    assert log.prefix.advance(0) == 9
    assert log.read() == (0, 0, True, None)
    assert log.prefix.advance(0) == 19


@pytest.mark.parametrize("size", range(1, len(ROW)))
def test_of_a_row_that_is_cut_off_nothing_is_taken(size: int) -> None:
    log = Log(BEGIN, ROW[:size])
    assert log.read() == (0, 0, False, ROW[:size])
    assert (log.reader.group.missing, log.open) == (0, [None])


@pytest.mark.parametrize("length", [b"\x00\x00\x10\x00", b"\x7f\xff\xff\xff", b"\xff\xff\xff\xff"])
def test_a_length_beyond_the_message_is_not_followed(length: bytes) -> None:
    row = ROW.replace(b"t\0\0\0\2id", b"t" + length + b"id")
    assert Log(BEGIN, row).read() == (0, 0, False, row)


@pytest.mark.parametrize("message", [BEGIN[:-1], COMMIT[:-1]])
def test_an_end_of_a_transaction_that_is_cut_off_is_left_to_who_complains(message: bytes) -> None:
    log = Log(message)
    assert log.read() == (0, 0, False, message)
    assert not log.reader.has_commit


def test_a_row_without_a_payload_is_not_half_taken() -> None:
    row = insert([*VALUES[:PAYLOAD], None, *VALUES[PAYLOAD + 1 :]])
    log = Log(BEGIN, row)
    assert log.read() == (0, 0, False, row)
    assert log.open == [None]
