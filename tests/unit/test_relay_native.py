"""The compiled inner loop leaves a message alone that is not what its lengths say."""

import struct
from collections.abc import Iterator

import pytest

from infra.relay.compiled import IS_COMPILED
from infra.relay.event import Group
from infra.relay.wal.prefix import Prefix
from tests.unit.test_pgoutput import insert
from tests.unit.test_records import Opened, compiled

if IS_COMPILED:
    from infra.relay import native

pytestmark = compiled

VALUES: list[bytes | None] = [b"id", b"pay", b"type", b"{}", b"7", b"/payments", b"1.0", b"now", b"00-trace"]
PAYLOAD = 3
BEGIN = struct.pack(">cqqI", b"B", 9, 100, 7)
COMMIT = struct.pack(">cBqqq", b"C", 0, 8, 9, 100)


ROW = insert(5, VALUES)


class Log:
    """Messages, read by the compiled reader into the records of one partition."""

    def __init__(self, *messages: bytes) -> None:
        self.messages: Iterator[bytes] = iter(messages)
        self.to = Opened()
        self.prefix = Prefix()
        self.reader = native.LogReader(self.get, lambda: None, lambda _: None, self.prefix.begin, [])
        self.reader.learn(5, len(VALUES), range(len(VALUES)))
        self.reader.group, self.reader.committed_at_us = Group(end_lsn=0), 0

    def get(self, _: int) -> tuple[int, memoryview]:
        message = next(self.messages, None)
        data = b"" if message is None else struct.pack(">cqqq", b"w", 0, 0, 0) + message
        return len(data), memoryview(data)

    def read(self, events_max: int = 100) -> tuple[int, int, bool, bytes | None]:
        return self.reader.read(events_max, 1000, 1000, self.to.open, self.to.renew)


@pytest.mark.parametrize("size", range(1, len(ROW)))
def test_of_a_row_that_is_cut_off_nothing_is_taken(size: int) -> None:
    log = Log(BEGIN, ROW[:size])
    assert log.read() == (0, 0, False, ROW[:size])
    assert (log.reader.group.missing, log.to.open) == (0, [None])


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
    row = insert(5, [*VALUES[:PAYLOAD], None, *VALUES[PAYLOAD + 1 :]])
    log = Log(BEGIN, row)
    assert log.read() == (0, 0, False, row)
    assert log.to.open == [None]
