"""How far a worker's clock is from Postgres's, as the worker reports it."""

import math
import time

import asyncpg
import pytest
from structlog.testing import capture_logs

from app.clock import OFFSET_SECONDS, note_offset
from app.settings import Settings
from tests.support.waiting import until
from tests.support.workers import running


def told() -> float:
    """The gauge as Prometheus would scrape it."""
    (metric,) = OFFSET_SECONDS.collect()
    return metric.samples[0].value


@pytest.mark.parametrize(
    ("asked", "answered", "offset", "logged"),
    [(7, 7, 7, [7.0]), (-7, -7, -7, [-7.0]), (6, 7.5, 6.75, [6.75]), (0, 0, 0, [])],
)
async def test_a_clock_is_off_by_what_it_shows_in_the_middle_of_the_question(
    postgres_url: str, asked: float, answered: float, offset: float, logged: list[float]
) -> None:
    shifts = iter([asked, answered])
    async with asyncpg.create_pool(postgres_url, min_size=1) as pool:
        with capture_logs() as logs:
            await note_offset(pool, lambda: time.time() + next(shifts))
    assert told() == pytest.approx(offset, abs=0.3)
    assert [each["offset_seconds"] for each in logs] == pytest.approx(logged, abs=0.3)


async def test_an_answer_that_took_long_tells_nothing(postgres_url: str) -> None:
    OFFSET_SECONDS.set(0)
    shifts = iter([10.0, 20.0])
    async with asyncpg.create_pool(postgres_url, min_size=1) as pool:
        await note_offset(pool, lambda: time.time() + next(shifts))
    assert told() == 0


async def test_a_worker_tells_it(settings: Settings) -> None:
    OFFSET_SECONDS.set(math.nan)

    async def is_told() -> bool:
        return not math.isnan(told())

    async with running(settings):
        await until(is_told, timeout_seconds=20)
    assert told() == pytest.approx(0, abs=0.5)
