"""Published events, read by the models that declare them."""

import json

from handlers.messages.events import EVENT_MODELS, WireEvent


def read_event(text: str) -> WireEvent:
    """The event in a message's text; raises if it does not fit the model of its type."""
    return EVENT_MODELS[json.loads(text)["type"]].model_validate_json(text)
