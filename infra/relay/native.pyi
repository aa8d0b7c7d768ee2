"""Types of the compiled module, `native.pyx`."""

from collections.abc import Callable, Sequence

from infra.relay.event import Group, OutboxEvent
from infra.relay.publish.records import Records as AnyRecords

class Records:
    buffer: bytearray
    count: int
    payload_bytes: int
    groups: list[Group]
    counts: list[int]
    def __init__(self, bytes_max: int) -> None: ...
    def append(self, event: OutboxEvent, group: Group) -> bool: ...
    def seal(self) -> bytearray: ...

def encode(
    events: Sequence[OutboxEvent],
    group: Group,
    payload_max: int,
    records: list[AnyRecords | None],
    renew: Callable[[int], AnyRecords],
) -> tuple[int, int]: ...

class LogReader:
    group: Group
    committed_at_us: int
    has_commit: bool
    def __init__(
        self,
        get: Callable[[int], tuple[int, memoryview]],
        read_socket: Callable[[], None],
        note_keepalive: Callable[[memoryview], None],
        begin: Callable[[int], Group],
        taken: list[int],
    ) -> None: ...
    def learn(self, relation: int, columns: int, places: Sequence[int]) -> None: ...
    def read(
        self,
        events_max: int,
        bytes_max: int,
        payload_max: int,
        records: list[AnyRecords | None],
        renew: Callable[[int], AnyRecords],
    ) -> tuple[int, int, bool, bytes | None]: ...
