"""What a source of events is to a session; `wal_source.py` and `poll_source.py` are the two there are."""

from collections.abc import Awaitable, Callable, Sequence
from typing import NamedTuple, Protocol

from infra.relay.pgoutput import OutboxEvent
from infra.relay.prefix import Group
from infra.relay.records import Records


class Room(NamedTuple):
    """How much may be handed over: so many events, and none after `size` bytes of payload."""

    events: int
    size: int


class Intake(Protocol):
    """Who takes events over while a source streams, and counts them in their groups until they are acknowledged."""

    payload_max: int
    """The bytes of a payload above which an event is not for Kafka."""

    @property
    def room(self) -> Room:
        """How much may be handed over now."""
        ...

    def publish(self, events: Sequence[OutboxEvent], group: Group) -> None:
        """Take over some events of one group."""
        ...

    @property
    def open_records(self) -> list[Records | None] | None:
        """For a source that encodes events by itself: each partition's, None where `renew` gives some.

        None at all while it must not.
        """
        ...

    def renew(self, number: int) -> Records:
        """Other records for a partition whose are full."""
        ...

    def note(self, events: int, size: int) -> None:
        """So many events, with so many bytes of payload, were encoded, and counted in their groups."""
        ...


class CatchUpSink(NamedTuple):
    """How a source hands over events before it streams: `publish` waits for room, `drained` for acknowledgements."""

    publish: Callable[[OutboxEvent], Awaitable[None]]
    drained: Callable[[], Awaitable[None]]


class Source(Protocol):
    """Committed events in an order that has each payment's, and the position up to which all is acknowledged."""

    async def open(self, sink: CatchUpSink) -> None:
        """Find the position to begin at, having published what lies before it.

        Raises:
            GapFound: events may be missing, and no one has said what to do about it.
        """
        ...

    async def read(self, intake: Intake) -> bool:
        """Hand over what has arrived, up to a portion that there is room for; whether there may be more."""
        ...

    def watch(self, on_ready: Callable[[], None]) -> None:
        """Call `on_ready` when there may be something to read, until `unwatch`."""
        ...

    def unwatch(self) -> None:
        """Leave it lying."""
        ...

    async def save(self) -> None:
        """Write down how far all is acknowledged; called every second or so, and at the end."""
        ...

    def answer(self) -> None:
        """Answer the server, if it wants to know how far we are."""
        ...

    @property
    def oldest_commit_us(self) -> int | None:
        """When the first event that is not acknowledged was committed, in µs since 2000-01-01 UTC."""
        ...

    async def finish(self) -> None:
        """End in good order, after the last `save`."""
        ...

    async def close(self) -> None:
        """Let go of connections at once."""
        ...
