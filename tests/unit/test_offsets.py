"""Offsets are committed once, never back and never past what is in Postgres, whatever happens to their partitions."""

import asyncio
from types import SimpleNamespace
from unittest.mock import AsyncMock, Mock

import pytest
from aiokafka import TopicPartition
from aiokafka.errors import KafkaError

from handlers.offsets import Offsets


async def test_newer_offsets_outlast_a_commit_that_failed() -> None:
    offsets = Offsets()

    def record(offset: int) -> SimpleNamespace:
        return SimpleNamespace(topic="t", partition=3, offset=offset)

    async def commit(_: object) -> None:
        await offsets.accepted(kafka, [record(7)])
        raise KafkaError("away")

    mine = {TopicPartition("t", 3)}
    kafka = Mock(commit=commit, position=AsyncMock(return_value=0), assignment=lambda: mine)
    await offsets.accepted(kafka, [record(4)])
    await offsets.commit()
    assert offsets._next == {TopicPartition("t", 3): 8}


async def test_a_partition_that_has_moved_keeps_no_other_from_being_committed() -> None:
    offsets = Offsets()
    kafka = AsyncMock(assignment=lambda: {TopicPartition("t", 1)})
    kafka.position.return_value = 0
    await offsets.accepted(kafka, [SimpleNamespace(topic="t", partition=each, offset=4) for each in (1, 2)])
    await offsets.commit()
    kafka.commit.assert_awaited_once_with({TopicPartition("t", 1): 5})


@pytest.mark.parametrize(("position", "read_to"), [(9, 9), (2, 5), (None, 5)], ids=["the end of a transaction", "", ""])
async def test_the_next_offset_is_at_least_behind_the_last_accepted_record(position: int | None, read_to: int) -> None:
    """A partition that was just assigned again has its old position, or none yet, and nothing may wait for one."""

    async def wait_for_ever(_: object) -> int:
        await asyncio.Event().wait()
        raise AssertionError

    offsets = Offsets()
    kafka = Mock(position=AsyncMock(return_value=position) if position else wait_for_ever)
    await offsets.accepted(kafka, [SimpleNamespace(topic="t", partition=3, offset=4)])
    assert offsets._next == {TopicPartition("t", 3): read_to}
