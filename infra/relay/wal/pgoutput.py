"""Decodes the part of pgoutput (protocol version 1) that an insert-only publication of the outbox produces.

Source: https://www.postgresql.org/docs/17/protocol-logicalrep-message-formats.html
"""

from collections.abc import Callable
from operator import itemgetter
from struct import Struct
from typing import Any, NamedTuple

import structlog

from infra.relay.errors import ColumnMissing
from infra.relay.event import OUTBOX_COLUMNS, OutboxEvent

log = structlog.get_logger(__name__)

INSERT, BEGIN, COMMIT, RELATION = b"IBCR"

_BEGIN = Struct(">xqqI")
_COMMIT = Struct(">xBqqq")
_LENGTH = Struct(">i")
_RELATION_HEAD = Struct(">xI")
_INSERT_HEAD = Struct(">xIcH")
_TEXT = ord("t")
_SHORT_TEXT = b"t\0\0"
"""The bytes before the last two of a short text's length. They occur nowhere else: Postgres has no text with a NUL."""
SHORT_MESSAGE = 0xFFFF
"""A message up to this size has short texts only."""

OPTIONAL_COLUMN = "traceparent"


def read_begin(message: bytes) -> tuple[int, int]:
    """A Begin message's commit time, in µs since 2000-01-01 UTC, and the lower 32 bits of its transaction id."""
    _, committed_at_us, xid = _BEGIN.unpack_from(message)
    return committed_at_us, xid


def read_commit(message: bytes) -> int:
    """The position after the transaction that a Commit message ends: where to resume."""
    _, _, end_lsn, _ = _COMMIT.unpack_from(message)
    assert isinstance(end_lsn, int)
    return end_lsn


class _Layout(NamedTuple):
    """Where a table has an event's columns, and which column may be NULL."""

    pick: Callable[[list[Any]], tuple[Any, ...]]
    optional: int


class RowReader:
    """Reads inserts into the table with this OID, by the column order that the server announced last.

    By OID, because another schema may have a table of the same name.
    """

    def __init__(self, outbox: int) -> None:
        self._outbox = outbox
        self._layouts: dict[int, _Layout | None] = {}
        self._skipped: set[int] = set()
        self.outbox: tuple[int, int, list[int]] = (0, 0, [0] * len(OUTBOX_COLUMNS))
        """The OID of the outbox, how many columns it has, and the indexes of `OUTBOX_COLUMNS` among them."""

    def learn(self, message: bytes) -> None:
        """Learn the layout from a Relation message; rows of tables other than the outbox are ignored.

        Raises:
            ColumnMissing: a column that events need is not there.
        """
        (relation,) = _RELATION_HEAD.unpack_from(message)
        if relation != self._outbox:
            # The outbox's partitions are announced too; no rows of theirs follow.
            self._layouts[relation] = None
            return
        names = _column_names(message)
        if missing := {*OUTBOX_COLUMNS} - {*names}:
            raise ColumnMissing(f"the publication leaves out columns of the outbox: {', '.join(sorted(missing))}")
        places = [names.index(name) for name in OUTBOX_COLUMNS]
        self._layouts[relation] = _Layout(itemgetter(*places), names.index(OPTIONAL_COLUMN))
        self.outbox = relation, len(names), places

    def read(self, message: bytes) -> OutboxEvent | None:
        """The event of an Insert message; None if it is not into the outbox."""
        relation, _, count = _INSERT_HEAD.unpack_from(message)
        layout = self._layouts[relation]
        if layout is None:
            self._skip(relation)
            return None
        pick, optional = layout
        if len(message) <= SHORT_MESSAGE:
            # One split: without a NULL there are as many pieces as columns, each beginning with its length.
            pieces: list[Any] = message[_INSERT_HEAD.size :].split(_SHORT_TEXT)
            if len(pieces) == count and _is_null_behind(pieces[optional]):
                pieces[optional : optional + 1] = pieces[optional][:-1], None
            if len(pieces) == count + 1:
                del pieces[0]
                id_, key, type_, payload, seq, source, version, time, trace = pick(pieces)
                return tuple.__new__(
                    OutboxEvent,
                    (id_[2:], key[2:], type_[2:], payload[2:], seq[2:], source[2:], version[2:], time[2:],
                     trace and trace[2:]),
                )  # fmt: skip
        return tuple.__new__(OutboxEvent, pick(_column_values(message, count)))

    def _skip(self, relation: int) -> None:
        if relation not in self._skipped:
            self._skipped.add(relation)
            log.warning("the publication has another table: its rows are skipped", relation=relation)


def _is_null_behind(piece: bytes) -> bool:
    """Whether one byte follows this piece's text: the mark of a NULL, which does not begin a piece of its own."""
    return len(piece) == 3 + int.from_bytes(piece[:2], "big")


def _column_values(message: bytes, count: int) -> list[bytes | None]:
    """Texts and NULLs: an insert has no unchanged TOAST values, and the binary format was not requested."""
    values: list[bytes | None] = []
    append, length_at = values.append, _LENGTH.unpack_from
    position = _INSERT_HEAD.size
    for _ in range(count):
        if message[position] == _TEXT:
            start = position + 5
            position = start + length_at(message, position + 1)[0]
            append(message[start:position])
        else:
            append(None)
            position += 1
    return values


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
