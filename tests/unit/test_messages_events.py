"""Every event is written as its model declares. A replay differs only in the fields that mark it as one."""

import json
import os
from datetime import UTC, datetime, timedelta, timezone
from typing import Any
from uuid import UUID, uuid4

import pytest

from domain.commands import command_id
from domain.events import Event, EventKind
from handlers.messages.events import (
    EVENT_MODELS,
    PaymentAuthorized,
    PaymentCaptured,
    PaymentLateSuccess,
    event_type,
    write_event,
    write_replay,
    write_time,
)
from handlers.messages.examples import EVENT_EXAMPLES, EVENT_ID
from tests.support.events import read_event

EXAMPLES = list(EVENT_EXAMPLES.values())
CAPTURED = EVENT_EXAMPLES["payment.captured.v1"]


def written(event: Event) -> dict[str, Any]:
    body = json.loads(write_event(event, EVENT_ID))
    assert isinstance(body, dict)
    return body


def optional(event: Event) -> set[str]:
    """The fields that this event may lack."""
    rare = {"original_event_id", "evidence", "expires_at"}
    return rare if event.kind is EventKind.LATE_SUCCESS else rare | {"owed_minor"}


def test_every_kind_of_event_has_its_model_and_example() -> None:
    assert [event_type(kind) for kind in EventKind] == list(EVENT_MODELS) == list(EVENT_EXAMPLES)


@pytest.mark.parametrize("event", EXAMPLES, ids=lambda event: event.kind)
def test_what_is_written_has_exactly_the_declared_fields(event: Event) -> None:
    body = written(event)
    assert next(iter(body)) == "type"
    assert body.keys() == EVENT_MODELS[body["type"]].model_fields.keys() - optional(event)


@pytest.mark.parametrize("event", EXAMPLES, ids=lambda event: event.kind)
def test_what_is_written_reads_back_the_same(event: Event) -> None:
    read = read_event(write_event(event, EVENT_ID))
    unsaid: dict[str, Any] = {**dict.fromkeys(optional(event) | {"occurred_at"}, True), "payment": {"owed_minor"}}
    again = read.model_dump(mode="json", exclude=unsaid)
    body = written(event)
    assert read.occurred_at == event.occurred_at
    assert again == {name: value for name, value in body.items() if name != "occurred_at"}


@pytest.mark.parametrize("event", EXAMPLES, ids=lambda event: event.kind)
def test_a_replay_differs_in_nothing_but_its_marks(event: Event) -> None:
    original = write_event(event, EVENT_ID)
    new_id = uuid4()
    replay = write_replay(original, new_id)
    marks = {"event_id": str(new_id), "replayed": True, "original_event_id": str(EVENT_ID)}
    assert json.loads(replay.text) == json.loads(original) | marks
    assert (replay.type, replay.payment_seq) == (event_type(event.kind), event.payment_seq)
    assert replay.occurred_at == write_time(event.occurred_at)


@pytest.mark.parametrize("type_", ["payment.authorized.v1", "payment.late_success.v1"])
def test_a_hold_says_when_its_provider_will_release_it(type_: str) -> None:
    end = datetime(2026, 12, 5, tzinfo=UTC)
    read = read_event(write_event(EVENT_EXAMPLES[type_]._replace(expires_at=end), EVENT_ID))
    assert isinstance(read, PaymentAuthorized | PaymentLateSuccess)
    assert read.expires_at == end


@pytest.mark.parametrize("type_", ["payment.authorized.v1", "payment.captured.v1"])
def test_a_success_that_came_twice_says_what_is_owed(type_: str) -> None:
    read = read_event(write_event(EVENT_EXAMPLES[type_]._replace(owed_minor=1_250), EVENT_ID))
    assert isinstance(read, PaymentAuthorized | PaymentCaptured)
    assert read.owed_minor == 1_250


def test_a_payment_that_owes_something_says_so_and_no_other_does() -> None:
    owing = CAPTURED._replace(snapshot=CAPTURED.snapshot._replace(owed_minor=1_250))
    read = read_event(write_event(owing, EVENT_ID))
    assert read.payment.owed_minor == 1_250
    assert "owed_minor" not in written(CAPTURED)["payment"]


def test_an_event_of_a_ruling_and_its_replay_carry_the_evidence() -> None:
    told = 'VNPay portal, "replayed":false'
    for name in ("authorized", "captured", "voided", "refunded", "command_rejected"):
        text = write_event(EVENT_EXAMPLES[f"payment.{name}.v1"]._replace(evidence=told), EVENT_ID)
        for each in (text, write_replay(text, uuid4()).text):
            read = read_event(each)
            assert getattr(read, "evidence") == told  # noqa: B009 - not every event has it


def test_texts_that_look_like_marks_survive_a_replay() -> None:
    tricky = CAPTURED._replace(idempotency_key='","replayed":false,"event_id":"', reference='\\"}{')
    replay = json.loads(write_replay(write_event(tricky, EVENT_ID), uuid4()).text)
    assert (replay["idempotency_key"], replay["provider_reference"]) == (tricky.idempotency_key, tricky.reference)
    assert replay["replayed"] is True


def test_the_command_id_is_the_domains() -> None:
    for _ in range(100):
        fingerprint = os.urandom(32)
        assert written(CAPTURED._replace(fingerprint=fingerprint))["command_id"] == str(command_id(fingerprint))


@pytest.mark.parametrize(
    ("moment", "text"),
    [
        (datetime(2026, 1, 31, 12, tzinfo=UTC), "2026-01-31T12:00:00.000000Z"),
        (datetime(2026, 1, 31, 12, 0, 0, 5, tzinfo=UTC), "2026-01-31T12:00:00.000005Z"),
        (datetime(2026, 1, 31, 14, tzinfo=timezone(timedelta(hours=2))), "2026-01-31T12:00:00.000000Z"),
    ],
)
def test_times_are_utc_with_six_decimals(moment: datetime, text: str) -> None:
    assert write_time(moment) == text


def test_a_reader_ignores_unknown_fields() -> None:
    body = written(CAPTURED) | {"later": 1}
    body["payment"]["later"] = 2
    read = read_event(json.dumps(body))
    assert read.payment_id == UUID(body["payment_id"])
