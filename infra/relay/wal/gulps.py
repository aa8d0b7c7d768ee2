"""When to read the log: at once while few events arrive, in gulps (batched reads) while many do.

Postgres sends each message of the log separately and wakes the waiting reader, which costs the server more than all its
other work. Messages sent while nobody waits pile up in the socket: a row of a small transaction then takes a third of
the time (docs/decisions/0014). This works over TCP only: a Unix socket's buffer is too small for a gulp, and the server
would wait for us.
"""

import time
from typing import Final

BUSY_RATE: Final = 20_000
"""Events per second from which the reader takes gulps."""
GULP_SECONDS: Final = 0.02


class Gulps:
    """The reader's pace, derived from the reads reported to `note`."""

    def __init__(self, *, is_taken: bool = True) -> None:
        self._is_taken = is_taken
        self._since = time.monotonic()
        self._events = 0
        self._next_at = 0.0

    @property
    def pause_seconds(self) -> float:
        """How long to leave arriving messages unread; 0 to read at once."""
        return max(0.0, self._next_at - time.monotonic())

    def note(self, events: int, *, is_all: bool) -> None:
        """Report a read of so many events; `is_all` if nothing was left to read."""
        self._events += events
        now = time.monotonic()
        elapsed = now - self._since
        if is_all and elapsed >= GULP_SECONDS:
            if self._is_taken and self._events >= BUSY_RATE * elapsed:
                self._next_at = now + GULP_SECONDS
            self._since, self._events = now, 0
