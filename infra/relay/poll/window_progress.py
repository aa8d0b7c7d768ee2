"""How far a poll has got: the portions it has handed over, and the last point up to which all are acknowledged."""

from collections import deque
from dataclasses import dataclass, field
from typing import Any

from infra.relay.event import US_1970_TO_2000, Group
from infra.relay.poll.window import Portion
from infra.relay.progress.snapshot import Snapshot


@dataclass(frozen=True, slots=True)
class Point:
    """Every event visible in `begin` is read, and of the window from there to `end` those up to `position`."""

    begin: Snapshot
    end: Snapshot | None = None
    """None between two windows."""
    position: int = 0

    @property
    def values(self) -> dict[str, Any]:
        """The values of SAVE_WINDOW, but for the slot."""
        end = None if self.end is None else str(self.end)
        return {"below": self.begin.below, "begin": str(self.begin), "end": end, "position": self.position}


@dataclass(frozen=True, slots=True)
class _Step:
    """The point that may be saved once the events that lead to it are acknowledged."""

    point: Point
    group: Group = field(default_factory=Group)


class WindowProgress:
    """The steps from the checkpoint to where the reader is now."""

    def __init__(self, published: Snapshot) -> None:
        self._steps: deque[_Step] = deque()
        self._proven = published.below
        self._unproven_end = published.end

    @property
    def group(self) -> Group:
        """Counts the events of the last portion."""
        return self._steps[-1].group

    @property
    def oldest_commit_us(self) -> int | None:
        """When the first unacknowledged event was written, in µs since 2000-01-01 UTC; None if there is none."""
        return next((step.group.committed_at_us for step in self._steps if step.group.missing), None)

    def is_proof_due(self, point: Point) -> bool:
        """Transactions concurrent with the last events have ended, so the checkpoint can prove more of them."""
        return self._proven < point.begin.below and self._proven < self._unproven_end

    def note(self, point: Point, portion: Portion | None, window_end: Snapshot) -> None:
        """Remember where the reader is: once this portion is acknowledged, the checkpoint may move there."""
        self._steps.append(_Step(point))
        if portion is not None:
            self.group.committed_at_us = portion.written_us - US_1970_TO_2000
            self._unproven_end = window_end.end
        self._proven = point.begin.below

    def advance(self, *, is_portion_left: bool) -> Point | None:
        """The point to save now: everything up to it is acknowledged; None if that has not moved.

        `is_portion_left`: some events of the last portion are not handed over yet, so its group does not count them.
        """
        last = None
        while self._steps and not self._steps[0].group.missing and (len(self._steps) > 1 or not is_portion_left):
            last = self._steps.popleft().point
        return last
