"""Batches of Kafka records, each for one partition, encoded event by event as events arrive.

Format: https://kafka.apache.org/documentation/#recordbatch
"""

import time
from collections.abc import Callable, Sequence
from struct import Struct
from typing import Any, Final, Protocol

from aiokafka.record.default_records import DefaultRecord, DefaultRecordBatch
from aiokafka.record.util import calc_crc32c

from infra.relay.compiled import IS_COMPILED
from infra.relay.event import Group, OutboxEvent
from infra.relay.publish import plain
from infra.relay.publish.plain import HEAD_SIZE, HEADERS

if IS_COMPILED:
    from infra.relay import native

_HEAD: Final = Struct(">qiibIhiqqqhii")
_LENGTH_FROM: Final = 12
_FORMAT: Final = 2
_CHECKSUM: Final = Struct(">I")
_CHECKSUM_AT: Final = 17
_CHECKED_FROM: Final = 21
assert _HEAD.size == HEAD_SIZE


class Records(Protocol):
    """Encodes a batch: `plain.Records` or `native.Records`."""

    buffer: bytearray
    count: int
    payload_bytes: int
    groups: list[Group]
    counts: list[int]

    def append(self, event: OutboxEvent, group: Group) -> bool:
        """Encode an event; False if there is no room for it. The first event always fits."""
        ...

    def seal(self) -> bytearray:
        """End the batch, and return its buffer; nothing can be appended any more."""
        ...


def records_class(*, is_native: bool) -> Callable[[int], Records]:
    """The constructor of records; its argument is the most bytes of a batch."""
    return native.Records if is_native else plain.Records


class RecordBatch:
    """Records of one partition, in order, and their events' groups; serves an aiokafka producer as a `BatchBuilder`."""

    def __init__(self, records: Records) -> None:
        self.records = records
        self.held: OutboxEvent | None = None
        """The only event of this batch: it is too large to be sent, and waits for its turn to be refused."""
        self._held_of: Group | None = None
        self._created_ms = int(time.time() * 1000)
        self._producer = (-1, -1, -1)
        self._built: bytearray | None = None

    def hold(self, event: OutboxEvent, group: Group) -> None:
        """Make this batch hold one event that is not encoded at all."""
        self.records.seal()
        self.held, self._held_of = event, group

    @property
    def payload_bytes(self) -> int:
        """Bytes of all its events' payloads together."""
        return self.records.payload_bytes

    def settle(self) -> None:
        """Count its events as acknowledged in their groups."""
        for group, count in zip(self.records.groups, self.records.counts, strict=True):
            group.missing -= count

    def unpack(self) -> Sequence[tuple[OutboxEvent, Group]]:
        """The events, decoded again, each with its group; the batch must not be sent after this."""
        if self.held is not None:
            assert self._held_of is not None, "they are set together"
            return [(self.held, self._held_of)]
        runs = zip(self.records.groups, self.records.counts, strict=True)
        groups = [group for group, count in runs for _ in range(count)]
        decoded = DefaultRecordBatch(bytes(self._build()))
        return [(_event_of(record), group) for record, group in zip(decoded, groups, strict=True)]

    # --- what aiokafka's sender calls on a batch ----------------------------------------------------------------------

    def _set_producer_state(self, producer_id: int, producer_epoch: int, base_sequence: int) -> None:
        assert self._built is None, "the broker would take the built batch for another producer's, or for a new one"
        self._producer = (producer_id, producer_epoch, base_sequence)

    def _build(self) -> bytearray:
        if self._built is None:
            self._built = buffer = self.records.seal()
            count, times = self.records.count, (self._created_ms, self._created_ms)
            values = (0, count - 1, *times, *self._producer, count)
            _HEAD.pack_into(buffer, 0, 0, len(buffer) - _LENGTH_FROM, -1, _FORMAT, 0, *values)
            _CHECKSUM.pack_into(buffer, _CHECKSUM_AT, calc_crc32c(memoryview(buffer)[_CHECKED_FROM:]))
        return self._built

    def record_count(self) -> int:
        """The number of records."""
        return 1 if self.held is not None else self.records.count

    def closed(self) -> bool:
        """Whether it may be sent at once: always."""
        return True

    def close(self) -> None:
        """Nothing to do: the producer appends nothing."""


def headers_of(event: OutboxEvent) -> list[tuple[str, bytes | None]]:
    """The headers of an event's message."""
    id_, _, type_, _, seq, source, version, occurred_at, traceparent = event
    return list(zip(HEADERS, (id_, id_, type_, source, occurred_at, version, seq, traceparent), strict=True))


def _event_of(record: DefaultRecord) -> OutboxEvent:
    found: dict[str, Any] = dict(record.headers)
    return OutboxEvent(
        found["id"], record.key, found["ce_type"], record.value, found["payment_seq"], found["ce_source"],
        found["ce_specversion"], found["ce_time"], found["traceparent"],
    )  # fmt: skip
