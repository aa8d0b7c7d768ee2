"""Stops sending to a provider that leaves one outcome after the other unknown.

While it is open nothing is sent, which is proof that nothing was executed: new payments wait instead of adding to the
doubt. Questions are never stopped, for only their answers end doubt.
"""

from collections.abc import Callable
from typing import Final

from domain.operations import Outcome, Unknown, Unreachable

FAILURES_MAX: Final = 10
"""Unknown outcomes in a row, with no word of the provider's between them."""
TRIAL_INTERVAL_SECONDS: Final = 5.0
LAPSE_SECONDS: Final = 1200.0
"""Whatever still waits to be sent is tried again sooner than that, by default: what needs review every 15 minutes."""


class Breaker:
    """Closed, it lets everything through; open, nothing; after a rest, one call at a time until one is answered."""

    def __init__(self, clock: Callable[[], float], on_change: Callable[[bool], None]) -> None:
        self._clock = clock
        self._on_change = on_change
        self._failures = 0
        self._opened_at: float | None = None
        self._wanted_at = 0.0

    @property
    def is_open(self) -> bool:
        """Whether a provider is left alone. Not where nothing was to be sent for long: then nothing waits for it, and
        nothing tells whether it is still away. The next call is a trial all the same.
        """
        return self._opened_at is not None and self._clock() - self._wanted_at < LAPSE_SECONDS

    def may_send(self) -> bool:
        """Whether a call may be made now. After the rest this lets one through and starts another rest."""
        if self._opened_at is None:
            return True
        self._wanted_at = self._clock()
        if self._clock() - self._opened_at < TRIAL_INTERVAL_SECONDS:
            return False
        self._opened_at = self._clock()
        return True

    def note(self, outcome: Outcome) -> None:
        """What came of a call. One that did not reach the provider tells nothing of how it answers."""
        if isinstance(outcome, Unreachable):
            return
        self._failures = self._failures + 1 if isinstance(outcome, Unknown) else 0
        if not self._failures and self._opened_at is not None:
            self._opened_at = None
            self._on_change(False)
        elif self._failures == FAILURES_MAX and self._opened_at is None:
            self._opened_at = self._wanted_at = self._clock()
            self._on_change(True)
