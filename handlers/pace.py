"""How fast a gateway is asked about stuck operations: within a rate, and not at all while its provider rests.

This limits questions and repeated attempts only. A payer's new operation is sent at once: the provider's own limit is
best left for those, and if the provider refuses one because of its limit, that proves that nothing moved.
"""

import asyncio
from collections.abc import Callable
from typing import Final

from domain.ports import Gateway, Resting

CATCH_UP_SECONDS: Final = 0.05
"""Turns that were missed within this time, because our event loop was busy, may be taken at once."""
PATIENCE_SECONDS: Final = 2.0
"""A rest up to this long is waited for, so that a low limit is fully used; a longer one would delay other work."""
KEPT_BACK: Final = 0.1
"""Share of the rate kept in reserve: half for turns that are caught up, half for requests that the network moves closer
together, so that the provider never receives more than `per_second` in a second."""


class Pace:
    """Hands out turns to call one gateway, in this process: at most `per_second`."""

    def __init__(self, clock: Callable[[], float], gateway: Gateway, per_second: float) -> None:
        self.per_second = per_second
        self._clock = clock
        self._resting = gateway if isinstance(gateway, Resting) else None
        self._gap = 1 / (per_second * (1 - KEPT_BACK))
        self._late_max = max(CATCH_UP_SECONDS - self._gap, 0.0)
        self._next_at = 0.0

    @property
    def rests(self) -> bool:
        """Whether the provider asked for fewer requests, and the time for that is not over."""
        return self._rests_seconds() > 0

    @property
    def rests_long(self) -> bool:
        """Whether the provider rests for longer than a caller should wait for its turn."""
        return self._rests_seconds() > PATIENCE_SECONDS

    @property
    def rests_briefly(self) -> bool:
        """Whether the provider rests, but not for long."""
        return self.rests and not self.rests_long

    def wait_seconds(self) -> float:
        """How long until the next turn; at most 0 if it may be taken now."""
        return max(self._next_at - self._clock(), self._rests_seconds())

    def take(self) -> None:
        """Use a turn; `wait_seconds` must have reached 0."""
        self._next_at = max(self._next_at, self._clock() - self._late_max) + self._gap

    async def turn(self) -> bool:
        """Wait for a turn and use it. Returns False, without a turn, if the provider rests for long."""
        while (seconds := self.wait_seconds()) > 0:  # others may take turns, the provider may rest again
            if self.rests_long:
                return False
            await asyncio.sleep(seconds)
        self.take()
        return True

    def _rests_seconds(self) -> float:
        return self._resting.rests_seconds() if self._resting else 0.0
