"""What can end a relay's session. All of it ends in a new session, from the slot's confirmed position.

RelayError
├── PostgresAway      no connection, or it was lost        RECONNECT, with backoff
├── SlotBusy          another relay streams from the slot  STAND BY
├── SlotMissing       the slot does not exist              RECONNECT, and find that there is a gap
├── GapFound          events may be missing                STOP, say which, wait for `payments relay repair`
├── CheckpointMissing the record of progress is gone       RECONNECT, as on a first start
├── SlotOfAnother     the name is taken by somebody else   REFUSE to touch it, and say so
├── ColumnMissing     the log leaves out what events need  RECONNECT, and say so until the publication is mended
└── KafkaAway         the producer is beyond repair        RECONNECT with a new one
    └── TopicMissing  there is no such topic               RECONNECT, and say so until there is
"""

from datetime import datetime
from typing import Final

from infra.relay.gaps import advice_on
from infra.relay.snapshot import Snapshot

LISTED: Final = " (`payments relay repair --dry-run` lists them)"


class RelayError(Exception):
    """A session of the relay cannot go on."""


class PostgresAway(RelayError):
    """No connection, or it was lost."""


class SlotBusy(RelayError):
    """Another relay streams from the slot."""


class SlotMissing(RelayError):
    """The slot does not exist."""


class GapFound(RelayError):
    """Events may never have been published; nothing goes on before somebody decides (docs/operations/relay.md).

    Of transactions that `published` sees all are proven to be published.
    """

    def __init__(self, reason: str, published: Snapshot) -> None:
        self.reason, self.published = reason, published
        super().__init__(f"{reason}: {advice_on(reason)}")

    def told_with(self, events: int, first: datetime | None, last: datetime | None) -> str:
        """The message, with how many events have no proof, and when the first and the last were written."""
        span = f", written from {first:%Y-%m-%d %H:%M:%S%z} to {last:%H:%M:%S}" if first and last else ""
        unproven = f"{events} retained events have no proof of publication{span}{LISTED if events else ''}"
        return f"{self.reason}: {unproven}: {advice_on(self.reason)}"


class CheckpointMissing(RelayError):
    """Nobody knows any more what is published; a first start publishes all that is retained."""


class SlotOfAnother(RelayError):
    """The name belongs to a slot that is not this database's outbox; slots share one namespace per server."""

    def __init__(self, slot: str, owner: str) -> None:
        self.slot, self.owner = slot, owner
        super().__init__(f"slot {slot!r} belongs to {owner}: give this relay another slot name")


class ColumnMissing(RelayError):
    """The publication does not have all of the outbox's columns that events need."""


class KafkaAway(RelayError):
    """Events could not be published."""


class TopicMissing(KafkaAway):
    """There is no topic to publish to."""
