"""What a source hands over: outbox events, in groups that are acknowledged as a whole."""

from typing import Final, NamedTuple

US_1970_TO_2000: Final = 946_684_800_000_000
"""Postgres counts microseconds from 2000-01-01 UTC; so do `Group.committed_at_us` and its users."""

OUTBOX_COLUMNS = (
    "id", "aggregateid", "type", "payload", "payment_seq", "source", "specversion", "occurred_at", "traceparent",
)  # fmt: skip


class OutboxEvent(NamedTuple):
    """One row of the outbox as in the log: text in UTF-8, None where the column is NULL."""

    id: bytes
    aggregateid: bytes
    type: bytes
    payload: bytes
    payment_seq: bytes
    source: bytes
    specversion: bytes
    occurred_at: bytes
    traceparent: bytes | None


class Group:
    """One or several consecutive transactions: how many events are unacknowledged, and where the last transaction ends.

    `end_lsn` is None until the first COMMIT is read.
    """

    __slots__ = ("committed_at_us", "end_lsn", "missing")

    def __init__(self, committed_at_us: int = 0, end_lsn: int | None = None) -> None:
        self.committed_at_us = committed_at_us
        self.missing = 0
        self.end_lsn = end_lsn
