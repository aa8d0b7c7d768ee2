"""Messages frozen at release: old commands must still be read, and events must be written as before, byte for byte.

A version only gains optional fields. A failure here is a broken contract: write a v2 instead of changing a golden.
"""

from dataclasses import replace
from pathlib import Path

import pytest

from domain.commands import Command
from handlers.messages.command_models import COMMAND_MODELS
from handlers.messages.commands import command_from_content, read_command
from handlers.messages.events import EVENT_MODELS, write_event
from handlers.messages.examples import EVENT_EXAMPLES, EVENT_ID
from tests.support.events import read_event

GOLDENS = Path(__file__).parent / "goldens"
GATEWAY, ACTION_TYPE = "sandbox", "three_d_secure"
"""The values in the examples when they were frozen."""


def golden(name: str) -> str:
    return (GOLDENS / f"{name}.json").read_text(encoding="utf-8").rstrip("\n")


def test_every_message_has_a_golden() -> None:
    content = {f"{type_}.content" for type_ in COMMAND_MODELS}
    assert {path.stem for path in GOLDENS.glob("*.json")} == COMMAND_MODELS.keys() | EVENT_MODELS.keys() | content


@pytest.mark.parametrize("type_", COMMAND_MODELS)
def test_a_released_command_is_still_read_to_the_same_content(type_: str) -> None:
    """The content decides the fingerprint: if it changed, every key in use would turn into a conflict."""
    command = read_command(golden(type_).encode(), None)
    assert isinstance(command, Command)
    assert command.content == golden(f"{type_}.content")


@pytest.mark.parametrize("type_", COMMAND_MODELS)
def test_a_stored_command_is_still_read(type_: str) -> None:
    assert command_from_content(golden(f"{type_}.content")) == read_command(golden(type_).encode(), None)


@pytest.mark.parametrize("type_", EVENT_MODELS)
def test_a_released_event_is_still_written_byte_for_byte(type_: str) -> None:
    event = EVENT_EXAMPLES[type_]
    event = event._replace(snapshot=event.snapshot._replace(gateway=GATEWAY))
    if event.action is not None:
        event = event._replace(action=replace(event.action, action_type=ACTION_TYPE))
    assert write_event(event, EVENT_ID) == golden(type_)


@pytest.mark.parametrize("type_", EVENT_MODELS)
def test_a_released_event_is_still_read(type_: str) -> None:
    assert isinstance(read_event(golden(type_)), EVENT_MODELS[type_])
