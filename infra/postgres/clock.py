"""Postgres's clock, which all processes share. The age of a call, and whether its lease has expired, never depend on a
machine's own clock, which may be hours off or be reset meanwhile."""

import time
from datetime import UTC, datetime, timedelta
from typing import Any, Final

_RUNNING: Final = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
"""A clock that runs on while the machine sleeps, where there is one (Linux), so that operations waiting to be sent have
their true age after it wakes up."""


class PostgresClock:
    """The time of Postgres's clock: the last reading plus the time elapsed since. Before the first `look` it is this
    machine's time."""

    def __init__(self) -> None:
        self._told, self._at = datetime.now(UTC), _seconds()

    def __call__(self) -> datetime:
        """The current time, in timezone-aware UTC."""
        return self._told + timedelta(seconds=_seconds() - self._at)

    async def look(self, connection: Any) -> None:
        """Read Postgres's clock over an asyncpg connection or pool; exact to half of the round-trip time."""
        asked = _seconds()
        self._told = await connection.fetchval("SELECT clock_timestamp()")
        self._at = (asked + _seconds()) / 2


def _seconds() -> float:
    return time.clock_gettime(_RUNNING)
