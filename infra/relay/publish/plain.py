"""Encodes outbox events as Kafka records, in plain Python; `native.pyx` does the same where it could be compiled.

aiokafka's own builder takes the headers of every event as a list of tuples, and the events would have to be kept until
they are acknowledged: that took as long as everything else. Format: https://kafka.apache.org/documentation/#recordbatch
"""

from functools import lru_cache
from typing import Final

from infra.relay.event import Group, OutboxEvent

HEADERS: Final = ("id", "ce_id", "ce_type", "ce_source", "ce_time", "ce_specversion", "payment_seq", "traceparent")
"""In the order in which Debezium's outbox event router emits them (docs/decisions/0002-relay.md)."""
HEAD_SIZE: Final = 61
"""Bytes of a batch before its records."""


@lru_cache(maxsize=8192)
def _varint(value: int) -> bytes:
    """Protobuf's signed (zigzag) variable-length integer."""
    rest, encoded = value << 1 ^ value >> 63, bytearray()
    while rest > 0x7F:
        encoded.append(rest & 0x7F | 0x80)
        rest >>= 7
    encoded.append(rest)
    return bytes(encoded)


_NULL: Final = _varint(-1)
_ID, _CE_ID, _TYPE, _SOURCE, _TIME, _VERSION, _SEQ, _TRACE = (_varint(len(name)) + name.encode() for name in HEADERS)
_COUNT_AND_ID: Final = _varint(len(HEADERS)) + _ID


class Records:
    """Records of one batch, after room for its head, and how many are of each group, in order."""

    def __init__(self, bytes_max: int) -> None:
        self.buffer = bytearray(HEAD_SIZE)
        self.count = 0
        self.payload_bytes = 0
        self.groups: list[Group] = []
        self.counts: list[int] = []
        self._bytes_max = bytes_max
        self._is_sealed = False

    def append(self, event: OutboxEvent, group: Group) -> bool:
        """Encode an event; False if there is no room for it. The first event always fits."""
        if self._is_sealed:
            return False
        id_, key, type_, payload, seq, source, version, occurred_at, trace = event
        # No attributes; a time offset of 0 ms from the batch.
        # fmt: off
        record = b"".join((
            b"\0\0", _varint(self.count), _size(key), key, _size(payload), payload,
            _COUNT_AND_ID, _size(id_), id_, _CE_ID, _size(id_), id_, _TYPE, _size(type_), type_,
            _SOURCE, _size(source), source, _TIME, _size(occurred_at), occurred_at,
            _VERSION, _size(version), version, _SEQ, _size(seq), seq,
            _TRACE, _NULL if trace is None else _size(trace), trace or b"",
        ))
        # fmt: on
        size = _size(record)
        if self.count and len(self.buffer) + len(size) + len(record) > self._bytes_max:
            return False
        self.buffer += size
        self.buffer += record
        self.count += 1
        self.payload_bytes += len(payload)
        self._note(group)
        return True

    def _note(self, group: Group) -> None:
        if self.groups and self.groups[-1] is group:
            self.counts[-1] += 1
        else:
            self.groups.append(group)
            self.counts.append(1)

    def seal(self) -> bytearray:
        """End the batch, and return its buffer; nothing can be appended any more."""
        self._is_sealed = True
        return self.buffer


def _size(value: bytes) -> bytes:
    return _varint(len(value))
