"""Which state a relay is in, for its HTTP health and its metrics."""

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
"""Ready, as long as they beat."""
GAP_KNOWN = (State.GAP, State.ACTIVE, State.STANDBY, State.STOPPED)
"""Who is in any other state does not know yet whether there is a gap: what was true last goes on."""
NOT_LEADING = (State.STANDBY, State.STOPPED)
"""What waits is another's to show; a leader goes on showing what it knows of it, before a gap and without Kafka."""


class RelayHealth(NamedTuple):
    """`ready`: it publishes, or would take over; `detail` says what it does, or what keeps it from it."""

    ready: bool
    detail: str


class Status:
    """The state, told by the session and read by whoever asks."""

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
        """Change to `state`; an earlier trouble is over.

        A gap is not: to look whether it is still there is no other state, and no broken connection closes it.
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
        """Its session goes round; one that is stuck, whatever it waits for, soon does not."""
        self._beat_at = time.monotonic()

    @property
    def health(self) -> RelayHealth:
        """What a health check says now."""
        if self.trouble is not None:
            return RelayHealth(ready=False, detail=f"{self.state}: {self.trouble}")
        silent = time.monotonic() - self._beat_at
        if self.state in GOING_ROUND and silent > self._stalled_seconds:
            return RelayHealth(ready=False, detail=f"{self.state}: it has stood still for {silent:.0f} s")
        detail = f"{self.state}: {self._detail}" if self._detail else str(self.state)
        return RelayHealth(ready=self.state in GOING_ROUND, detail=detail)
