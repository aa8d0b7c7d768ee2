"""The interface between a session and its source of events: `wal/source.py` or `poll/source.py`."""

from collections.abc import Awaitable, Callable, Sequence
from typing import NamedTuple, Protocol

from infra.relay.event import Group, OutboxEvent
from infra.relay.publish.records import Records


class Room(NamedTuple):
    """How much may be handed over: up to `events` events, and none after `size` bytes of payload."""

    events: int
    size: int


class Intake(Protocol):
    """Accepts events while a source streams, and counts them in their groups until they are acknowledged."""

    payload_max: int
    """The largest payload, in bytes, that is sent to Kafka."""

    @property
    def room(self) -> Room:
        """How much may be handed over now."""
        ...

    def publish(self, events: Sequence[OutboxEvent], group: Group) -> None:
        """Accept some events of one group."""
        ...

    @property
    def open_records(self) -> list[Records | None] | None:
        """Each partition's open records, for a source that encodes events itself; None where it must call `renew`.

        None instead of the list while the source must not encode.
        """
        ...

    def renew(self, number: int) -> Records:
        """New records for a partition whose open ones are full or missing."""
        ...

    def note(self, events: int, size: int) -> None:
        """Report events that the source has encoded and counted in their groups; `size` is their bytes of payload."""
        ...


class CatchUpSink(NamedTuple):
    """How a source hands over events before it streams: `publish` waits for room, `drained` for acknowledgements."""

    publish: Callable[[OutboxEvent], Awaitable[None]]
    drained: Callable[[], Awaitable[None]]


class Source(Protocol):
    """Committed events, each payment's in order, and the position up to which all are acknowledged."""

    async def open(self, sink: CatchUpSink) -> None:
        """Find the position to begin at, and publish whatever lies before it.

        Raises:
            GapFound: events may be missing, and no operator has decided what to do about it.
        """
        ...

    async def read(self, intake: Intake) -> bool:
        """Hand over arrived events, at most a portion that there is room for; whether there may be more."""
        ...

    def watch(self, on_ready: Callable[[], None]) -> None:
        """Call `on_ready` when there may be something to read, until `unwatch`."""
        ...

    def unwatch(self) -> None:
        """Stop calling `on_ready`; unread events wait where they are."""
        ...

    async def save(self) -> None:
        """Save the position up to which everything is acknowledged; called about every second, and at the end."""
        ...

    def answer(self) -> None:
        """Answer the server if it has asked for the confirmed position."""
        ...

    @property
    def oldest_commit_us(self) -> int | None:
        """Commit time of the first unacknowledged event, in µs since 2000-01-01 UTC; None if there is none."""
        ...

    async def finish(self) -> None:
        """End the stream in good order, after the last `save`."""
        ...

    async def close(self) -> None:
        """Close the connections at once."""
        ...
