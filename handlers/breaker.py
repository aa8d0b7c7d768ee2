"""Stops sending to a provider that leaves one outcome after another unknown.

While it is open nothing is sent, which proves that nothing was executed: new payments wait instead of adding to the
doubt. Status queries are never stopped, because only their answers end doubt.
"""

from collections.abc import Callable
from typing import Final

from domain.operations import Outcome, Unknown, Unreachable

FAILURES_MAX: Final = 10
"""Unknown outcomes in a row, with no answer from the provider between them."""
TRIAL_INTERVAL_SECONDS: Final = 5.0
LAPSE_SECONDS: Final = 1200.0
"""Longer than any default retry interval of an operation that waits to be sent (needs_review: every 15 minutes)."""


class Breaker:
    """Closed, it lets everything through; open, one trial call per interval until one is answered."""

    def __init__(self, clock: Callable[[], float], on_change: Callable[[bool], None]) -> None:
        self._clock = clock
        self._on_change = on_change
        self._failures = 0
        self._opened_at: float | None = None
        self._wanted_at = 0.0

    @property
    def is_open(self) -> bool:
        """Whether calls are being held back. False once nothing was to be sent for `LAPSE_SECONDS`: then nothing waits,
        and nothing shows whether the provider is still away. The next call is a trial all the same.
        """
        return self._opened_at is not None and self._clock() - self._wanted_at < LAPSE_SECONDS

    def may_send(self) -> bool:
        """Whether a call may be made now. While open, lets one call through per `TRIAL_INTERVAL_SECONDS`."""
        if self._opened_at is None:
            return True
        self._wanted_at = self._clock()
        if self._clock() - self._opened_at < TRIAL_INTERVAL_SECONDS:
            return False
        self._opened_at = self._clock()
        return True

    def note(self, outcome: Outcome) -> None:
        """Note the outcome of a call. A call that did not reach the provider says nothing about how it answers."""
        if isinstance(outcome, Unreachable):
            return
        self._failures = self._failures + 1 if isinstance(outcome, Unknown) else 0
        if not self._failures and self._opened_at is not None:
            self._opened_at = None
            self._on_change(False)
        elif self._failures == FAILURES_MAX and self._opened_at is None:
            self._opened_at = self._wanted_at = self._clock()
            self._on_change(True)
