"""Decodes the part of pgoutput (protocol version 1) that an insert-only publication of the outbox produces.

Source: https://www.postgresql.org/docs/17/protocol-logicalrep-message-formats.html
"""

from collections.abc import Callable
from struct import Struct
from typing import NamedTuple

INSERT, BEGIN, COMMIT, RELATION = b"IBCR"

_COMMIT = Struct(">xBqqq")
_LENGTH = Struct(">i")
_RELATION_HEAD = Struct(">xI")
_INSERT_HEAD = Struct(">xIcH")

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


class Commit(NamedTuple):
    """The end of a transaction: where to resume after it, and when it was committed (µs since 2000-01-01 UTC)."""

    end_lsn: int
    committed_at_us: int


def read_commit(message: memoryview) -> Commit:
    """A Commit message."""
    _, _, end_lsn, committed_at_us = _COMMIT.unpack_from(message)
    return Commit(end_lsn, committed_at_us)


class RowReader:
    """Reads inserts, by the column order that the server announced last for each table."""

    def __init__(self) -> None:
        self._picks: dict[int, Callable[[list[bytes | None]], OutboxEvent]] = {}

    def learn(self, message: memoryview) -> None:
        """Take in a Relation message.

        Raises:
            ValueError: a column that events need is not there.
        """
        relation = _RELATION_HEAD.unpack_from(message)[0]
        names = _column_names(bytes(message))
        places = [names.index(name) for name in OUTBOX_COLUMNS]

        def pick(values: list[bytes | None]) -> OutboxEvent:
            return OutboxEvent._make([values[place] for place in places])

        self._picks[relation] = pick

    def read(self, message: memoryview) -> OutboxEvent:
        """An Insert message."""
        relation, _, count = _INSERT_HEAD.unpack_from(message)
        values: list[bytes | None] = []
        position = _INSERT_HEAD.size
        for _ in range(count):
            # 116 is "t": text follows. "n" is NULL; "u" (unchanged TOAST) cannot be in an insert.
            if message[position] == 116:
                start = position + 5
                position = start + _LENGTH.unpack_from(message, position + 1)[0]
                values.append(bytes(message[start:position]))
            else:
                values.append(None)
                position += 1
        return self._picks[relation](values)


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
