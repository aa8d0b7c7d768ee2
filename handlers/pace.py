"""How fast a gateway is asked about what is stuck: never above a rate, and not at all while its provider wants to rest.

This is for questions and repeated attempts only. A payer's new operation is sent at once: it is what the provider's own
limit should be left for, and where it is refused at the door, that is proof that nothing moved.
"""

import asyncio
from collections.abc import Callable
from typing import Final

from domain.ports import Gateway, Resting

CATCH_UP_SECONDS: Final = 0.05
"""What was missed in this time, our event loop being busy, may follow at once."""
PATIENCE_SECONDS: Final = 2.0
"""A shorter rest is waited for, so that a low limit is made use of; a longer one would hold up the others."""
KEPT_BACK: Final = 0.1
"""Of the rate: half for what follows at once, half for what the network brings closer together on its way, so that
the provider never has more than `per_second` in a second."""


class Pace:
    """Turns of one gateway, in this process. Unlimited unless `per_second` is given."""

    def __init__(self, clock: Callable[[], float], gateway: Gateway, per_second: float | None = None) -> None:
        self.per_second = per_second
        self._clock = clock
        self._resting = gateway if isinstance(gateway, Resting) else None
        self._gap = 1 / (per_second * (1 - KEPT_BACK)) if per_second else 0.0
        self._late_max = max(CATCH_UP_SECONDS - self._gap, 0.0)
        self._next_at = 0.0

    @property
    def rests(self) -> bool:
        """Whether the provider said that it has had too much, and its time is not over."""
        return self._rests_seconds() > 0

    @property
    def rests_long(self) -> bool:
        """Whether it rests for longer than anybody who is on his turn should wait."""
        return self._rests_seconds() > PATIENCE_SECONDS

    @property
    def rests_briefly(self) -> bool:
        """Whether it rests, and not for long."""
        return self.rests and not self.rests_long

    def wait_seconds(self) -> float:
        """How long until the next turn; at most 0 if it may be taken now."""
        return max(self._next_at - self._clock(), self._rests_seconds())

    def take(self) -> None:
        """Use a turn, whose time has come."""
        self._next_at = max(self._next_at, self._clock() - self._late_max) + self._gap

    async def turn(self) -> bool:
        """Wait for a turn, and use it; False, without one, where the provider rests for long."""
        while (seconds := self.wait_seconds()) > 0:  # others take turns, the provider rests again
            if self.rests_long:
                return False
            await asyncio.sleep(seconds)
        self.take()
        return True

    def _rests_seconds(self) -> float:
        return self._resting.rests_seconds() if self._resting else 0.0
