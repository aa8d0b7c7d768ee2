"""Retries after transient failures, with growing waits and jitter, so that processes do not retry in step."""

import random
from collections.abc import Awaitable, Callable
from typing import ParamSpec, TypeVar

from tenacity import AsyncRetrying, retry_if_exception_type, wait_random_exponential

from domain.errors import StoreUnavailable

P = ParamSpec("P")
T = TypeVar("T")


async def until_store_answers(work: Callable[P, Awaitable[T]], *args: P.args, **options: P.kwargs) -> T:
    """Call `work` until Postgres is available, and return its result."""
    retrying = AsyncRetrying(
        retry=retry_if_exception_type(StoreUnavailable), wait=wait_random_exponential(multiplier=0.1, max=5)
    )
    return await retrying(work, *args, **options)


class Backoff:
    """Waits that double while a failure lasts, from `first_seconds` to `max_seconds`, each less up to a half."""

    def __init__(self, *, first_seconds: float, max_seconds: float) -> None:
        self._first_seconds = first_seconds
        self._max_seconds = max_seconds
        self._failures = 0

    def next_seconds(self) -> float:
        doubled = self._first_seconds * 2.0 ** min(self._failures, 20)
        self._failures += 1
        return min(doubled, self._max_seconds) * random.uniform(0.5, 1)  # noqa: S311 - spreads load, no secret

    def reset(self) -> None:
        self._failures = 0
