"""While only standbys answer, the code that queries Postgres periodically reports it and tries again."""

import asyncio
from pathlib import Path

import asyncpg
import pytest

from app import clock, slots
from app.maintenance import Maintenance
from app.settings import Settings
from tests.support.cli import run


def nobody_writes(postgres_url: str) -> str:
    """An address that accepts no primary, just as an address for writing accepts no standby."""
    return f"{postgres_url}?target_session_attrs=read-only"


async def test_slots_and_clocks_are_watched_and_the_outbox_maintained_when_it_is_over(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slots, "WATCH_SECONDS", 0.05)
    monkeypatch.setattr(clock, "WATCH_SECONDS", 0.05)
    url = nobody_writes(postgres_url)
    maintenance = Maintenance(Settings(postgres_url=url, maintenance_interval_seconds=0.05))
    async with asyncpg.create_pool(url, min_size=0) as pool:
        loops = slots.watch_slots(url), clock.watch_clock(pool), maintenance.run(asyncio.Event())
        tasks = {asyncio.create_task(each) for each in loops}
        ended, _ = await asyncio.wait(tasks, timeout=1)
        for each in tasks:
            each.cancel()
    assert not ended


def test_a_command_says_what_is_the_matter(postgres_url: str, tmp_path: Path) -> None:
    done = run("maintain", data_dir=tmp_path, PAYMENTS_POSTGRES_URL=nobody_writes(postgres_url))
    assert done.returncode == 1
    assert done.stderr.endswith("Is Postgres running, and PAYMENTS_POSTGRES_URL right?\n")
    assert "Traceback" not in done.stderr
