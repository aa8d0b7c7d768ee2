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
        self.trouble: str | None = None
        """What keeps an active relay from publishing; kept up to date by its session."""
        self.enter(State.STARTING)

    def enter(self, state: State, detail: str = "") -> None:
        """Change to `state`; an earlier trouble is over."""
        self.state, self._detail, self.trouble = state, detail, None
        self.beat()
        for each in State:
            metrics.STATE.labels(each.value).set(each is state)
        metrics.GAP.set(state is State.GAP)

    def beat(self) -> None:
        """Its session goes round; one that is stuck, whatever it waits for, soon does not."""
        self._beat_at = time.monotonic()

    @property
    def health(self) -> RelayHealth:
        """What a health check says now."""
        if self.trouble is not None:
            return RelayHealth(ready=False, detail=f"{self.state}: {self.trouble}")
        silent = time.monotonic() - self._beat_at
        if self.state is State.ACTIVE and silent > self._stalled_seconds:
            return RelayHealth(ready=False, detail=f"{self.state}: it has stood still for {silent:.0f} s")
        detail = f"{self.state}: {self._detail}" if self._detail else str(self.state)
        return RelayHealth(ready=self.state in (State.ACTIVE, State.STANDBY), detail=detail)
