"""Errors that end a relay's session. After each one a new session begins, from the saved checkpoint.

RelayError
├── PostgresAway      no connection, or it was lost        RECONNECT, with backoff
├── SlotBusy          somebody else streams from the slot  STAND BY
├── SlotMissing       the slot does not exist              RECONNECT; the next session finds the gap
├── GapFound          events may be missing                STOP, report it, wait for an operator's decision
├── EventsLost        Kafka lost acknowledged events       the session records a gap, and STOPS
├── CheckpointMissing the record of progress is gone       RECONNECT, as on a first start
├── SlotOfAnother     the name is another client's slot    RECONNECT, without touching it, and report it
├── ColumnMissing     the log lacks columns events need    RECONNECT, and report it until the publication is fixed
└── KafkaAway         the producer is beyond repair        RECONNECT with a new one
    └── TopicMissing  there is no such topic               RECONNECT, and report it until there is
"""

from datetime import datetime
from typing import Final

from infra.relay.progress.gaps import advice_on
from infra.relay.progress.snapshot import Snapshot

LISTED: Final = " (`payments relay repair --dry-run` lists them)"


class RelayError(Exception):
    """A session of the relay cannot go on."""


class PostgresAway(RelayError):
    """No connection, or it was lost."""


class SlotBusy(RelayError):
    """Somebody else streams from the slot, or is creating it: another relay, or Debezium."""


class SlotMissing(RelayError):
    """The slot does not exist."""


class GapFound(RelayError):
    """Events may never have been published; the relay waits for an operator's decision (docs/operations/relay.md).

    All events of the transactions visible in `published` are proven to be published.
    """

    def __init__(self, reason: str, published: Snapshot) -> None:
        self.reason, self.published = reason, published
        super().__init__(f"{reason}: {advice_on(reason)}")

    def told_with(self, events: int, first: datetime | None, last: datetime | None) -> str:
        """The message, with the number of events without proof and when the first and last of them were written."""
        span = f", written from {first:%Y-%m-%d %H:%M:%S%z} to {last:%H:%M:%S}" if first and last else ""
        unproven = f"{events} retained events have no proof of publication{span}{LISTED if events else ''}"
        return f"{self.reason}: {unproven}: {advice_on(self.reason)}"


class EventsLost(RelayError):
    """Kafka has lost events that it had acknowledged; the message says where."""


class CheckpointMissing(RelayError):
    """The record of what is published is gone; like a first start, the next one publishes everything retained."""


class SlotOfAnother(RelayError):
    """The name belongs to a slot that is not for this database's outbox; slots share one namespace per server."""

    def __init__(self, slot: str, owner: str) -> None:
        self.slot, self.owner = slot, owner
        super().__init__(f"slot {slot!r} belongs to {owner}: give this relay another slot name")


class ColumnMissing(RelayError):
    """The publication lacks columns of the outbox that events need."""


class KafkaAway(RelayError):
    """Events could not be published."""


class TopicMissing(KafkaAway):
    """There is no topic to publish to."""
