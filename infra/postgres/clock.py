"""Postgres's clock, which all processes share: how old a call is, or whether its lease has run out, is never told by a
machine's own, which may be hours off, or be set anew meanwhile."""

import time
from datetime import UTC, datetime, timedelta
from typing import Any, Final

_RUNNING: Final = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
"""One that goes on while the machine sleeps, where there is one (Linux): what waits to be sent when it wakes up is as
old as it is."""


class PostgresClock:
    """What Postgres's clock says now: as at the last look, and the time that has passed since. Before the first look it
    is this machine's."""

    def __init__(self) -> None:
        self._told, self._at = datetime.now(UTC), _seconds()

    def __call__(self) -> datetime:
        """Timezone-aware UTC."""
        return self._told + timedelta(seconds=_seconds() - self._at)

    async def look(self, connection: Any) -> None:
        """Ask Postgres, over an asyncpg connection or pool. Right to half of what the question takes."""
        asked = _seconds()
        self._told = await connection.fetchval("SELECT clock_timestamp()")
        self._at = (asked + _seconds()) / 2


def _seconds() -> float:
    return time.clock_gettime(_RUNNING)
