"""Postgres's clock, which all processes share: how old a call is, or whether its lease has run out, is never told by a
machine's own, which may be hours off, or be set anew meanwhile."""

import time
from datetime import UTC, datetime, timedelta
from typing import Any


class PostgresClock:
    """What Postgres's clock says now: as at the last look, and the time that has passed since. Before the first look it
    is this machine's."""

    def __init__(self) -> None:
        self._told, self._at = datetime.now(UTC), time.monotonic()

    def __call__(self) -> datetime:
        """Timezone-aware UTC."""
        return self._told + timedelta(seconds=time.monotonic() - self._at)

    async def look(self, connection: Any) -> None:
        """Ask Postgres, over an asyncpg connection or pool. Right to half of what the question takes."""
        asked = time.monotonic()
        self._told = await connection.fetchval("SELECT clock_timestamp()")
        self._at = (asked + time.monotonic()) / 2
