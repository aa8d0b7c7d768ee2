"""A hint which idempotency keys were seen lately, in two sets of Valkey that take turns. Never the truth.

A key that is not there is *probably* new, so Postgres need not be asked beforehand: its unique key catches the rest.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import RedisError

WINDOW_SECONDS = 3600
PAUSE_SECONDS = 1.0
"""After a failure Valkey is left alone for this long: its absence costs a timeout a second, not one a batch."""


class ValkeyRecentKeys:
    """Fits `domain.ports.RecentKeys`. While Valkey is away it knows nothing, and `on_unavailable` is called."""

    def __init__(self, redis: "Redis", *, on_unavailable: Callable[[], None]) -> None:
        self._redis = redis
        self._on_unavailable = on_unavailable
        self._away_until = 0.0
        self._unsent: list[str] = []
        self._sending: asyncio.Task[None] | None = None

    async def seen(self, idempotency_keys: Sequence[str]) -> set[str] | None:
        """The keys that were seen within the last one to two windows, or None when nobody can tell."""
        now, before = _windows()
        keys = list(idempotency_keys)
        answers = await self._ask(("SMISMEMBER", now, *keys), ("SMISMEMBER", before, *keys))
        if answers is None:
            return None
        return {key for key, new, old in zip(keys, *answers, strict=True) if new or old}

    def remember(self, idempotency_keys: Sequence[str]) -> None:
        """Note these keys soon, if Valkey is there; nobody waits for it."""
        self._unsent += idempotency_keys
        if self._sending is None or self._sending.done():
            self._sending = asyncio.create_task(self._send())

    async def _send(self) -> None:
        while self._unsent:
            keys, self._unsent = self._unsent, []
            now, _ = _windows()
            await self._ask(("SADD", now, *keys), ("EXPIRE", now, 2 * WINDOW_SECONDS))

    async def _ask(self, *commands: tuple[str | int, ...]) -> list[Any] | None:
        if time.monotonic() < self._away_until:
            self._on_unavailable()
            return None
        try:
            async with self._redis.pipeline(transaction=False) as pipe:
                for command in commands:
                    pipe.execute_command(*command)
                answers: list[Any] = await pipe.execute()
                return answers
        except (RedisError, OSError, TimeoutError):
            self._away_until = time.monotonic() + PAUSE_SECONDS
            self._on_unavailable()
            return None


def _windows() -> tuple[str, str]:
    window = int(time.time()) // WINDOW_SECONDS
    return f"payments:recent:{window}", f"payments:recent:{window - 1}"
