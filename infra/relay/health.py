"""A relay's state, for its HTTP health and its metrics."""

import time
from enum import StrEnum
from typing import NamedTuple

from infra.relay import metrics


class State(StrEnum):
    """Every state that a relay can be in."""

    STARTING = "starting"
    STANDBY = "standby"
    CATCHING_UP = "catching_up"
    ACTIVE = "active"
    RECONNECTING = "reconnecting"
    GAP = "gap"
    STOPPED = "stopped"


GOING_ROUND = (State.ACTIVE, State.STANDBY)
"""States that are ready as long as the session calls `beat`."""
GAP_KNOWN = (State.GAP, State.ACTIVE, State.STANDBY, State.STOPPED)
"""States that settle whether there is a gap; in any other state the last answer stands."""
NOT_LEADING = (State.STANDBY, State.STOPPED)
"""States in which another relay reports the backlog. A leader keeps reporting it, even at a gap or without Kafka."""


class RelayHealth(NamedTuple):
    """`ready`: the relay publishes, or stands by to take over; `detail` says what it does, or what stops it."""

    ready: bool
    detail: str


class Status:
    """The state that the session reports, for health checks and metrics."""

    def __init__(self, *, stalled_seconds: float) -> None:
        self._stalled_seconds = stalled_seconds
        self._beat_at = time.monotonic()
        self.state = State.STARTING
        self._detail = ""
        self._is_before_gap = False
        self.trouble: str | None = None
        """What keeps an active relay from publishing; kept up to date by its session."""
        self.enter(State.STARTING)

    def enter(self, state: State, detail: str = "") -> None:
        """Change to `state`, which clears `trouble`.

        A gap is not cleared: catching up, to check whether the gap is still there, does not change the state, and a
        lost connection does not reset the metric.
        """
        if self.state is State.GAP and state is State.CATCHING_UP:
            self.beat()
            return
        if state in GAP_KNOWN:
            self._is_before_gap = state is State.GAP
        if state in NOT_LEADING:
            metrics.forget_backlog()
        self.state, self._detail, self.trouble = state, detail, None
        self.beat()
        for each in State:
            metrics.STATE.labels(each.value).set(each is state)
        metrics.GAP.set(self._is_before_gap)

    def beat(self) -> None:
        """Report that the session is alive; a stuck session, whatever it waits for, stops calling this."""
        self._beat_at = time.monotonic()

    @property
    def health(self) -> RelayHealth:
        """The current result of the health check."""
        if self.trouble is not None:
            return RelayHealth(ready=False, detail=f"{self.state}: {self.trouble}")
        silent = time.monotonic() - self._beat_at
        if self.state in GOING_ROUND and silent > self._stalled_seconds:
            return RelayHealth(ready=False, detail=f"{self.state}: it has stood still for {silent:.0f} s")
        detail = f"{self.state}: {self._detail}" if self._detail else str(self.state)
        return RelayHealth(ready=self.state in GOING_ROUND, detail=detail)
