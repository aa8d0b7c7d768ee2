"""The client of `payments send`, against a real Kafka: which events are the result of a command."""

import json
from typing import Any
from uuid import uuid4

import pytest

from app.client import NoResultYet, PaymentsClient, outgoing
from app.settings import Settings
from domain.commands import OperationKind
from tests.conftest import Topics
from tests.support.topic import send

REFUND = outgoing(OperationKind.REFUND, uuid4(), "refund-1", {"amount_minor": 500})


def event(kind: str, *, replayed: bool) -> bytes:
    told = {"type": f"payment.{kind}.v1", "command_id": str(REFUND.command_id), "replayed": replayed}
    return json.dumps(told).encode()


async def heard(bootstrap: str, topics: Topics, *events: bytes, seconds: float) -> list[Any]:
    settings = Settings(
        kafka_bootstrap=bootstrap,
        commands_topic=topics.commands,
        events_topic=topics.events,
        dead_letter_topic=topics.dlq,
    )
    async with PaymentsClient(settings) as client:
        await send(bootstrap, topics.events, *((str(REFUND.payment_id).encode(), each) for each in events))
        found = client.result_of(REFUND, timeout_seconds=seconds)
        return [each.event["type"].split(".")[1] async for each in found]


async def test_a_repeated_result_is_heard_with_what_took_it_back(kafka_bootstrap: str, topics: Topics) -> None:
    events = event("refunded", replayed=True), event("refund_failed", replayed=True)
    assert await heard(kafka_bootstrap, topics, *events, seconds=20) == ["refunded", "refund_failed"]


async def test_a_repeated_result_that_stands_is_waited_for_no_longer(kafka_bootstrap: str, topics: Topics) -> None:
    assert await heard(kafka_bootstrap, topics, event("refunded", replayed=True), seconds=20) == ["refunded"]


async def test_a_command_in_doubt_has_no_result_yet(kafka_bootstrap: str, topics: Topics) -> None:
    with pytest.raises(NoResultYet):
        await heard(kafka_bootstrap, topics, event("pending", replayed=False), seconds=2)
