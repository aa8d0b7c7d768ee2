"""Decodes the part of pgoutput (protocol version 1) that an insert-only publication of the outbox produces.

Source: https://www.postgresql.org/docs/17/protocol-logicalrep-message-formats.html
"""

from collections.abc import Callable
from operator import itemgetter
from struct import Struct
from typing import NamedTuple

INSERT, BEGIN, COMMIT, RELATION = b"IBCR"

_BEGIN = Struct(">xqq")
_COMMIT = Struct(">xBqqq")
_LENGTH = Struct(">i")
_RELATION_HEAD = Struct(">xI")
_INSERT_HEAD = Struct(">xIcH")
_TEXT = ord("t")

OUTBOX_COLUMNS = (
    "id", "aggregateid", "type", "payload", "payment_seq", "source", "specversion", "occurred_at", "traceparent",
)  # fmt: skip


class OutboxEvent(NamedTuple):
    """One row of the outbox as the log has it: text in UTF-8, None where the column is NULL."""

    id: bytes
    aggregateid: bytes
    type: bytes
    payload: bytes
    payment_seq: bytes
    source: bytes
    specversion: bytes
    occurred_at: bytes
    traceparent: bytes | None


def read_begin(message: bytes) -> int:
    """When the transaction of a Begin message was committed, in µs since 2000-01-01 UTC."""
    _, committed_at_us = _BEGIN.unpack_from(message)
    assert isinstance(committed_at_us, int)
    return committed_at_us


def read_commit(message: bytes) -> int:
    """The position after the transaction that a Commit message ends: where to resume."""
    _, _, end_lsn, _ = _COMMIT.unpack_from(message)
    assert isinstance(end_lsn, int)
    return end_lsn


class RowReader:
    """Reads inserts, by the column order that the server announced last for each table."""

    def __init__(self) -> None:
        self._picks: dict[int, Callable[[list[bytes | None]], tuple[bytes | None, ...]]] = {}

    def learn(self, message: bytes) -> None:
        """Take in a Relation message.

        Raises:
            ValueError: a column that events need is not there.
        """
        names = _column_names(message)
        self._picks[_RELATION_HEAD.unpack_from(message)[0]] = itemgetter(*map(names.index, OUTBOX_COLUMNS))

    def read(self, message: bytes) -> OutboxEvent:
        """An Insert message."""
        relation, _, count = _INSERT_HEAD.unpack_from(message)
        values: list[bytes | None] = []
        append, length_at = values.append, _LENGTH.unpack_from
        position = _INSERT_HEAD.size
        for _ in range(count):
            # Text follows, or it is NULL: an insert has no unchanged TOAST, and binary was not asked for.
            if message[position] == _TEXT:
                start = position + 5
                position = start + length_at(message, position + 1)[0]
                append(message[start:position])
            else:
                append(None)
                position += 1
        return tuple.__new__(OutboxEvent, self._picks[relation](values))


def _column_names(message: bytes) -> list[str]:
    """R, id (4), namespace and table (both end in NUL), replica identity (1), count (2), then the columns."""
    position = message.index(0, 5) + 1
    position = message.index(0, position) + 2
    count = int.from_bytes(message[position : position + 2], "big")
    position += 2
    names = []
    for _ in range(count):
        end = message.index(0, position + 1)
        names.append(message[position + 1 : end].decode())
        # After the name: type (4) and type modifier (4).
        position = end + 9
    return names
