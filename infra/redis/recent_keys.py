"""A hint whether idempotency keys are new, from a set in Valkey per hour. Never the truth.

One round trip a batch, with one number for an answer: asked key by key, Valkey would cost more than the look-up in
Postgres that it saves (docs/decisions/0006).
"""

import time
from collections.abc import Callable, Sequence

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

    async def are_new(self, idempotency_keys: Sequence[str]) -> bool:
        """Note the keys; whether all of them are new within the hour. False also when nobody can tell."""
        if time.monotonic() < self._away_until:
            self._on_unavailable()
            return False
        window = f"payments:recent:{int(time.time()) // WINDOW_SECONDS}"
        try:
            async with self._redis.pipeline(transaction=False) as pipe:
                pipe.execute_command("SADD", window, *idempotency_keys)
                pipe.execute_command("EXPIRE", window, WINDOW_SECONDS)
                added, _ = await pipe.execute()
        except (RedisError, OSError, TimeoutError):
            self._away_until = time.monotonic() + PAUSE_SECONDS
            self._on_unavailable()
            return False
        return bool(added == len(idempotency_keys))
