"""When to read the log: at once while little comes, in gulps while much does.

Postgres sends every message of the log by itself, and wakes whoever waits for it, which costs it more than all else.
What it sends while nobody waits piles up instead: a row of a small transaction then takes it a third of the time
(docs/decisions/0014). Only through TCP: behind a Unix socket there is no room for a gulp, and it would wait for us.
"""

import time
from typing import Final

BUSY_RATE: Final = 20_000
"""Events a second from which on gulps are taken."""
GULP_SECONDS: Final = 0.02


class Gulps:
    """The reader's pace; told of every read."""

    def __init__(self, *, is_taken: bool = True) -> None:
        self._is_taken = is_taken
        self._since = time.monotonic()
        self._events = 0
        self._next_at = 0.0

    @property
    def pause_seconds(self) -> float:
        """How long to leave lying what comes now."""
        return max(0.0, self._next_at - time.monotonic())

    def note(self, events: int, *, is_all: bool) -> None:
        """So many events were read, which were all that had come or not."""
        self._events += events
        now = time.monotonic()
        elapsed = now - self._since
        if is_all and elapsed >= GULP_SECONDS:
            if self._is_taken and self._events >= BUSY_RATE * elapsed:
                self._next_at = now + GULP_SECONDS
            self._since, self._events = now, 0
