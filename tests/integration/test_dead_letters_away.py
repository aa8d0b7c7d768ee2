"""While the dead-letter topic accepts nothing, the partition waits, and its good commands are answered once."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from aiokafka.errors import UnknownTopicOrPartitionError

from domain.ports import DeadLetter
from handlers.backlog import Backlog
from handlers.consumer import CommandConsumer
from tests.support.provider import BookkeepingGateway
from tests.support.service import NoHint, body, new_payment_id, running_worker, value


class DeadLettersAway:
    """A dead-letter topic that was deleted."""

    def __init__(self) -> None:
        self.is_away = True
        self.parked: list[DeadLetter] = []

    async def park(self, letters: Sequence[DeadLetter]) -> None:
        if self.is_away:
            raise UnknownTopicOrPartitionError
        self.parked += letters


def record(offset: int, message: bytes) -> Any:
    return SimpleNamespace(topic="commands", partition=0, offset=offset, key=None, value=message, headers=())


async def test_good_commands_beside_a_message_that_cannot_be_parked_are_answered_once(postgres_url: str) -> None:
    letters, gateway = DeadLettersAway(), BookkeepingGateway()
    records = [record(each, body("charge", new_payment_id(), f"key-{each}")) for each in range(20)]
    records.append(record(20, b"not json"))
    async with running_worker(postgres_url, gateway, hint=NoHint()) as worker:
        consumer = CommandConsumer(
            write_path=worker.write_path,
            dispatcher=worker.dispatcher,
            dead_letters=letters,
            backlog=Backlog(capacity=1_000, waiting=lambda: 0),
            retries_before_parking=0,
        )
        for _ in range(5):
            with pytest.raises(UnknownTopicOrPartitionError):
                await consumer._accept(records)
            await worker.idle()
        assert await value(postgres_url, "SELECT count(*) FROM outbox") == 20
        letters.is_away = False
        await consumer._accept(records)
        assert [each.offset for each in letters.parked] == [20]
        assert await value(postgres_url, "SELECT count(*) FROM outbox WHERE payload LIKE '%\"replayed\":true%'") == 20
