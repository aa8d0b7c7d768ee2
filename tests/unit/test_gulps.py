"""When the log is read: at once, or in gulps."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from infra.kafka.access import KafkaAccess
from infra.relay.config import RelayConfig
from infra.relay.source import Room
from infra.relay.wal import gulps
from infra.relay.wal.gulps import Gulps
from infra.relay.wal.source import WalSource

WHILE = 1 / 32
"""Longer than a gulp."""
MANY = 625
"""The fewest events that are much in this time."""


class Clock:
    """Stands still unless it is moved on."""

    def __init__(self) -> None:
        self.now = 1024.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(gulps, "time", clock)
    return clock


def busy(clock: Clock, *, is_taken: bool = True) -> Gulps:
    """After a while in which just so much came that gulps are taken."""
    pace = Gulps(is_taken=is_taken)
    clock.now += WHILE
    pace.note(MANY, is_all=True)
    return pace


def test_while_little_comes_nothing_is_left_lying(clock: Clock) -> None:
    pace = Gulps()
    for _ in range(500):
        clock.now += 0.001
        pace.note(19, is_all=True)
        assert not pace.pause_seconds


def test_a_first_event_after_a_long_silence_is_read_at_once(clock: Clock) -> None:
    pace = Gulps()
    clock.now += 3600
    pace.note(1000, is_all=True)
    assert not pace.pause_seconds


def test_while_much_comes_it_is_left_lying_for_twenty_milliseconds(clock: Clock) -> None:
    pace = busy(clock)
    assert pace.pause_seconds == pytest.approx(0.02)
    clock.now += 0.004
    assert pace.pause_seconds == pytest.approx(0.016)
    clock.now += 0.016_001
    assert not pace.pause_seconds


def test_one_event_fewer_than_many_causes_no_rest(clock: Clock) -> None:
    pace = Gulps()
    clock.now += WHILE
    pace.note(MANY - 1, is_all=True)
    assert not pace.pause_seconds


def test_a_burst_is_measured_over_a_gulp_at_least(clock: Clock) -> None:
    pace = Gulps()
    clock.now += 0.019
    pace.note(1000, is_all=True)
    assert not pace.pause_seconds
    clock.now += 0.002
    pace.note(0, is_all=True)
    assert pace.pause_seconds == pytest.approx(0.02)


def test_nothing_is_left_lying_before_all_that_has_come_is_read(clock: Clock) -> None:
    pace = Gulps()
    clock.now += WHILE
    pace.note(MANY, is_all=False)
    assert not pace.pause_seconds
    pace.note(0, is_all=True)
    assert pace.pause_seconds == pytest.approx(0.02)


def test_after_a_gulp_it_is_measured_anew(clock: Clock) -> None:
    pace = Gulps()
    for events in (100 * MANY, MANY - 1):
        clock.now += WHILE
        pace.note(events, is_all=True)
        pause = pace.pause_seconds
    assert not pause


def test_behind_a_unix_socket_nothing_is_left_lying(clock: Clock) -> None:
    pace = busy(clock, is_taken=False)
    assert not pace.pause_seconds


class Stream:
    """Says how it is used."""

    def __init__(self) -> None:
        self.watched: Callable[[], None] | None = None
        self.reads = 0

    def watch(self, on_ready: Callable[[], None]) -> None:
        self.watched = on_ready

    def unwatch(self) -> None:
        self.watched = None

    def receive(self) -> None:
        self.reads += 1


class Intake:
    """Has room."""

    room = Room(1000, 1000)
    open_records = None


class TestSource:
    def setup_method(self) -> None:
        leader: Any = None
        stream: Any = Stream()
        self.source = WalSource(RelayConfig(postgres_url="", kafka=KafkaAccess(""), topic="t"), leader)
        self.source._stream = self.stream = stream
        self.woken = asyncio.Event()

    async def test_it_reads_nothing_while_it_rests(self, clock: Clock) -> None:
        intake: Any = Intake()
        self.source._gulps = busy(clock)
        assert not await self.source.read(intake)
        assert self.stream.reads == 0
        clock.now += 0.021
        await self.source.read(intake)
        assert self.stream.reads == 1

    async def test_while_it_rests_it_is_woken_after_the_rest_and_not_by_the_socket(self, clock: Clock) -> None:
        self.source.watch(self.woken.set)
        assert self.stream.watched == self.woken.set
        self.source._gulps = busy(clock)
        self.source.watch(self.woken.set)
        assert self.stream.watched is None
        await asyncio.wait_for(self.woken.wait(), 5)
        clock.now += 0.021
        self.source.watch(self.woken.set)
        assert self.stream.watched == self.woken.set

    async def test_it_is_woken_once_for_a_rest_however_often_it_is_watched(self, clock: Clock) -> None:
        calls: list[None] = []
        self.source._gulps = busy(clock)
        for _ in range(3):
            self.source.watch(lambda: calls.append(None))
        await asyncio.sleep(0.05)
        assert len(calls) == 1

    async def test_nobody_is_woken_after_unwatch_and_the_next_watch_waits_anew(self, clock: Clock) -> None:
        self.source._gulps = busy(clock)
        self.source.watch(self.woken.set)
        self.source.unwatch()
        await asyncio.sleep(0.05)
        assert not self.woken.is_set()
        self.source.watch(self.woken.set)
        await asyncio.wait_for(self.woken.wait(), 5)

    async def test_reading_many_events_sets_the_rest(self, clock: Clock) -> None:
        intake: Any = Intake()
        self.source._gulps = Gulps()
        self.source._gulps.note(MANY, is_all=False)
        clock.now += WHILE
        await self.source.read(intake)
        assert self.source._gulps.pause_seconds == pytest.approx(0.02)
