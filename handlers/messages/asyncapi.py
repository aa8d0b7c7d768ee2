"""The AsyncAPI 3 document of this service: `python -m handlers.messages.asyncapi > asyncapi.yaml`.

Promises: it describes every message that is read or written, one by one, with the models that read and write it.
FastStream generates it from one declaration per message (the running subscriber takes batches, which would appear as
arrays). FastStream gives each declaration its own channel; this module groups them by topic, and adds what FastStream
cannot express: headers, keys, examples and what each reason means. AsyncAPI ignores anything beside a `$ref`, so
nothing is put there.
"""

import inspect
import json
from collections.abc import Mapping
from typing import Any, Final

import yaml
from faststream.kafka import KafkaBroker
from faststream.specification import AsyncAPI
from pydantic import BaseModel

from domain.accept import QUEUE_MAX
from domain.commands import RejectionReason
from domain.money import MINOR_UNITS
from handlers.messages.command_models import COMMAND_MODELS, ChargePayment
from handlers.messages.commands import COMMAND_BYTES_MAX
from handlers.messages.dead_letter_reason import DeadLetterReason
from handlers.messages.events import EVENT_MODELS, write_event
from handlers.messages.examples import COMMAND_EXAMPLES, EVENT_EXAMPLES, EVENT_ID, PAYMENT_ID

COMMANDS_TOPIC: Final = "payments.commands"
EVENTS_TOPIC: Final = "payments.events"
DEAD_LETTERS_TOPIC: Final = "payments.commands.dlq"
DEAD_LETTER: Final = "dead_letter"

JsonObject = dict[str, Any]

_DESCRIPTION: Final = f"""\
Payment **commands** come in on one Kafka topic, **events** go out on another; each command moves money at most once.

- Send a command with a `payment_id` of your choice (a UUID), which is also the message key, and an `idempotency_key`.
  Sending it again is safe: no money moves twice. Its result is published again unchanged with `replayed: true`,
  including `payment` as it was then, followed by any event that took the result back since (`late_success`,
  `refund_failed`).
- A command counts as sent again if its content is the same: every known field has its earlier value, including
  `expires_at` and an explicit `gateway`. The order of fields, unknown fields and headers do not matter, and null means
  the same as leaving a field out. A known key with other content is refused (`idempotency_conflict`); that is not the
  result of the first command, which remains valid and has its own.
- Every readable command ends in exactly one final event, whatever comes in between (`requires_action`, `pending`,
  `needs_review`). Find it by `payment_id` and `idempotency_key`. Two refusals are not remembered, but published for
  each delivery: of a conflict, and of a command without a usable key. Any other refusal uses up its key: send the
  corrected command with a new one.
- A readable command is one JSON object in UTF-8, without a byte order mark, of at most {COMMAND_BYTES_MAX} bytes, with
  a known `type` and a `payment_id` in the form 8-4-4-4-12, each given once. Anything else is never answered: it is kept
  on `{DEAD_LETTERS_TOPIC}` for an operator. So is a readable command that failed because of a defect
  (`cannot_be_processed`); it is answered once an operator retries it.
- The commands of a payment run one at a time. A command that arrives while another is under way, which may wait for
  its payer for a day, waits for its turn, and no event is published for it until then; nor for a second delivery of the
  first. (Of all such deliveries for a payment the first thousand are answered.) Three kinds do not wait: a command with
  an invalid field and a conflict are refused at once, and, if the gateway can cancel, a void of what waits for its
  payer goes first. At most {QUEUE_MAX} commands of a payment wait: a further one is rejected (`invalid_state`).
- So do not pay for an order with another `payment_id` while the first payment is open, or both may be paid: send a
  `void`, and wait for its result.
- A charge or authorization is accepted only while `payment.status` is `created`, `failed` or `expired`, with a new key
  and in the payment's currency. A `canceled` payment accepts none: to pay after all, use a new `payment_id`. (A void
  of what waits for its payer also leaves the payment `canceled`, although the attempt ends as `declined` with the
  reason `canceled` before `voided`.)
- Events are delivered at least once and in order for each payment: `payment_seq` has no gaps. Take a payment's state
  only from the highest `payment_seq` that you have seen: a replay answers its command with an earlier state.
- Amounts are integers in minor units beside an ISO 4217 currency. Strings contain neither U+0000 nor half a surrogate
  pair.
- Unknown fields in commands are ignored, with one exception: an amount under another name (`amount`, `amountMinor`) is
  refused in a void, and in a capture or refund without `amount_minor`, which would move everything that remains. Ignore
  unknown fields, too, and events of a `type` that you do not know.
"""

_CHANNELS: Final[Mapping[str, str]] = {
    COMMANDS_TOPIC: (
        "What an order service asks for. The key is the `payment_id`. The service does not read it, but it keeps a "
        "payment's commands in order: without it, one may overtake another and be refused. So always write it the same "
        "way (another case may mean another partition), and have all senders choose partitions by murmur2, as the Java "
        "client does (librdkafka: `partitioner=murmur2_random`). Before partitions are added, stop the senders until "
        "everything is read, or payments lose their order. Commands in a Kafka transaction are read once it is "
        "committed, and never if it is aborted. `payments migrate` sets no retention, so the broker's default applies, "
        "usually a week; a command that is deleted before it was read is never answered, and may be sent again."
    ),
    EVENTS_TOPIC: (
        "What happened to payments, in order for each payment. The key is the `payment_id`, and its murmur2 hash "
        "chooses the partition; after partitions were added, `payment_seq` shows which events are read too early. "
        "Retention is that of the commands. `payments relay replay` publishes deleted events again for as long as the "
        "outbox keeps them, by default 14 days."
    ),
    DEAD_LETTERS_TOPIC: (
        "Messages that could not be read or processed, byte for byte, with the reason. `payments migrate` creates the "
        "topic so that letters stay until somebody deletes them. A message may be there twice: `dlq_topic`, "
        "`dlq_partition` and `dlq_offset` identify the original."
    ),
}
_REJECTIONS: Final[Mapping[RejectionReason, str]] = {
    RejectionReason.INVALID_COMMAND: "a field is missing, given twice, malformed, or contains a card number",
    RejectionReason.INVALID_AMOUNT: "`amount_minor` is not an integer written in digits alone, is out of bounds, has "
    "another name, or is given for a void",
    RejectionReason.UNKNOWN_CURRENCY: "the currency is unknown, or not accepted by this installation",
    RejectionReason.CURRENCY_MISMATCH: "the payment is in another currency",
    RejectionReason.AMOUNT_BELOW_MINIMUM: "less than may be paid in this currency at this gateway",
    RejectionReason.AMOUNT_ABOVE_MAXIMUM: "more than may be paid in this currency at this gateway",
    RejectionReason.COMMAND_EXPIRED: "its `expires_at` had passed, and it was not executed",
    RejectionReason.IDEMPOTENCY_CONFLICT: "the key is another command's, which remains valid and has its own result",
    RejectionReason.PAYMENT_NOT_FOUND: "no charge or authorization of this payment was ever begun",
    RejectionReason.PAYMENT_ALREADY_EXISTS: "the payment's status does not allow another charge or authorization",
    RejectionReason.INVALID_STATE: "there is nothing to capture, void or refund",
    RejectionReason.AMOUNT_EXCEEDS_CAPTURABLE: "more than can still be captured",
    RejectionReason.AMOUNT_EXCEEDS_REFUNDABLE: "more than can still be refunded; a disputed amount cannot",
    RejectionReason.UNKNOWN_GATEWAY: "the gateway is not one of those that are configured",
    RejectionReason.UNSUPPORTED_BY_GATEWAY: "the gateway cannot do this at all, for a part, in this currency, or "
    "without the payer: `fields` says which",
    RejectionReason.GATEWAY_REFUSED: "the provider refused it, such as a void of what was just paid, or cannot express "
    "the amount",
    RejectionReason.GATEWAY_UNAVAILABLE: "the provider could not be reached, by default for 15 minutes, and nothing "
    "was sent; a new command with a new key may succeed",
}
_DEAD_LETTERS: Final[Mapping[DeadLetterReason, str]] = {
    DeadLetterReason.EMPTY: "there is no value",
    DeadLetterReason.TOO_LARGE: f"the value has more than {COMMAND_BYTES_MAX} bytes",
    DeadLetterReason.NOT_UTF8: "the value is not UTF-8",
    DeadLetterReason.NOT_JSON: "the value is not JSON, begins with a byte order mark, or is nested too deeply",
    DeadLetterReason.NOT_AN_OBJECT: "the value is JSON, but not an object",
    DeadLetterReason.UNKNOWN_TYPE: "`type` is missing, given twice, misspelt, or of a later version",
    DeadLetterReason.NO_PAYMENT_ID: "`payment_id` is missing, given twice, or not in the form 8-4-4-4-12",
    DeadLetterReason.RECORD_UNDECODABLE: "a header's name is not UTF-8, so the client cannot read the message",
    DeadLetterReason.CANNOT_BE_PROCESSED: "the command can be read, but processing it failed, even by itself",
}
_OPERATIONS: Final[Mapping[str, tuple[str, str, str]]] = {
    "receiveCommands": ("receive", COMMANDS_TOPIC, "The service reads commands."),
    "sendEvents": ("send", EVENTS_TOPIC, "The service publishes events."),
    "sendDeadLetters": ("send", DEAD_LETTERS_TOPIC, "The service parks messages that it cannot process, and goes on."),
}


def _explained(opening: str, meanings: Mapping[RejectionReason, str] | Mapping[DeadLetterReason, str]) -> str:
    return "\n".join([opening, "", *(f"- `{reason}`: {meaning}." for reason, meaning in meanings.items())])


def _text(description: str, *examples: str) -> JsonObject:
    return {"type": "string", "description": description} | ({"examples": list(examples)} if examples else {})


_TRACEPARENT: Final = _text(
    "W3C trace context; empty or absent if there is none.", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
) | {"type": ["string", "null"]}
_HEADERS: Final[Mapping[str, JsonObject]] = {
    COMMANDS_TOPIC: {"type": "object", "properties": {"traceparent": _TRACEPARENT}},
    EVENTS_TOPIC: {
        "type": "object",
        "required": ["id", "ce_id", "ce_type", "ce_source", "ce_time", "ce_specversion", "payment_seq"],
        "properties": {
            "id": _text("Same as `event_id` in the body.", str(EVENT_ID)),
            "ce_id": _text("CloudEvents: same as `event_id` in the body.", str(EVENT_ID)),
            "ce_type": _text("CloudEvents: same as `type` in the body."),
            "ce_source": _text("CloudEvents: the service that wrote the event.", "/payments"),
            "ce_time": _text("CloudEvents: same as `occurred_at` in the body.", "2026-01-31T12:00:00.250000Z"),
            "ce_specversion": _text("CloudEvents.", "1.0"),
            "payment_seq": _text("Same as `payment_seq` in the body, in decimal digits.", "1"),
            "traceparent": _TRACEPARENT,
            "replayed_at": _text(
                "Only on events that an operator published again: when, to the second. No first delivery has it.",
                "2026-01-31T12:00:00+00:00",
            ),
        },
    },
    DEAD_LETTERS_TOPIC: {
        "type": "object",
        "description": "These, and the message's own headers. Its own are missing if its value is left out, and if the "
        "Kafka client could not decode it (`record_undecodable`): then only its place is known.",
        "required": ["dlq_reason", "dlq_detail", "dlq_topic", "dlq_partition", "dlq_offset"],
        "properties": {
            "dlq_reason": _text(_explained("One of a closed list.", _DEAD_LETTERS)) | {"enum": list(DeadLetterReason)},
            "dlq_detail": _text("For people: what was wrong."),
            "dlq_topic": _text("The topic of the original message.", COMMANDS_TOPIC),
            "dlq_partition": _text("The partition of the original message, in decimal digits.", "3"),
            "dlq_offset": _text("The offset of the original message, in decimal digits.", "1042"),
            "dlq_value_left_out": _text(
                "Only if the message with these headers was too large for the topic: it is kept without its value and "
                "its own headers. The value's size in bytes, in decimal digits.",
                "1048576",
            ),
            "dlq_key_left_out": _text(
                "Only beside `dlq_value_left_out`, if the key was too long, too: its size in bytes, in decimal digits.",
                "2048",
            ),
        },
    },
}
_PAYMENTS_KEY: Final = _text("The payment's id.", PAYMENT_ID)
_KEYS: Final[Mapping[str, JsonObject]] = {
    COMMANDS_TOPIC: _PAYMENTS_KEY,
    EVENTS_TOPIC: _PAYMENTS_KEY,
    DEAD_LETTERS_TOPIC: {
        "type": ["string", "null"],
        "description": "The message's own key: any bytes, usually the payment's id, or null. Also null if "
        "`dlq_key_left_out` gives its size, and if the Kafka client could not decode the message.",
        "examples": [PAYMENT_ID, None],
    },
}


class _Dumper(yaml.SafeDumper):
    """Writes a string of several lines as a block, which people can read and compare."""


_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None),
)


def build_document() -> str:
    """The whole document as YAML text, the same at every call."""
    # The round trip through JSON leaves plain values and shares none: YAML would write shared ones as anchors.
    # FastStream's name for the schema of a message without a model contains a colon, which AsyncAPI's keys may not.
    plain = json.loads(json.dumps(build_specification()).replace(f"{DEAD_LETTER}:Message:Payload", "DeadLetter"))
    return yaml.dump(plain, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def build_specification() -> JsonObject:
    """The whole document as JSON values."""
    generated = AsyncAPI(
        _declared(), title="Payments", version="1.0.0", description=_DESCRIPTION, schema_version="3.0.0"
    ).to_specification()
    document: JsonObject = generated.to_jsonable()
    schemas = _with_currency(document["components"]["schemas"])
    schemas["RejectionReason"]["description"] = _explained(schemas["RejectionReason"]["description"], _REJECTIONS)
    payloads = {name: document["components"]["messages"][f"{name}:Message"]["payload"] for name in _messages()}
    return {
        "asyncapi": document["asyncapi"],
        "info": document["info"],
        "defaultContentType": document["defaultContentType"],
        "servers": {name: _plain_server(server) for name, server in document["servers"].items()},
        "channels": {topic: _channel(topic, document) for topic in _CHANNELS},
        "operations": {name: _operation(*declared) for name, declared in _OPERATIONS.items()},
        "components": {
            "messages": {name: _message(name, payload) for name, payload in payloads.items()},
            "schemas": {name: schemas[name] for name in sorted(schemas)},
        },
    }


def _with_currency(schemas: JsonObject) -> JsonObject:
    """The schemas with the list of currencies once, as `Currency`, instead of in every command."""
    listed = sorted(MINOR_UNITS)

    def shared(value: Any) -> Any:
        match value:
            case {"enum": currencies} if currencies == listed:
                return {"$ref": "#/components/schemas/Currency"}
            case dict():
                return {name: shared(inner) for name, inner in value.items()}
            case list():
                return [shared(inner) for inner in value]
            case _:
                return value

    return {**shared(schemas), "Currency": schemas[ChargePayment.__name__]["properties"]["currency"]}


def _plain_server(server: JsonObject) -> JsonObject:
    """The server without an empty path, which viewers show as a slash, and without the protocol version `auto`."""
    return {name: value for name, value in server.items() if name not in ("pathname", "protocolVersion")}


def _messages() -> dict[str, str]:
    """Every message's name, with its topic."""
    commands, events = dict.fromkeys(COMMAND_MODELS, COMMANDS_TOPIC), dict.fromkeys(EVENT_MODELS, EVENTS_TOPIC)
    return {**commands, **events, DEAD_LETTER: DEAD_LETTERS_TOPIC}


def _declared() -> KafkaBroker:
    """A broker that is never started and declares every message by itself."""
    where = "Where docker compose publishes it; `make up` picks a free port, and prints it."
    broker = KafkaBroker("localhost:29092", description=f"Plain Kafka, version 2.4 or later. {where}")
    models: dict[str, Any] = {**COMMAND_MODELS, **EVENT_MODELS, DEAD_LETTER: bytes | None}
    for name, topic in _messages().items():
        # A publisher also for messages that the service reads: it needs no handler, and the schema is the same.
        broker.publisher(topic, title=name, schema=models[name])
    return broker


def _channel(topic: str, generated: JsonObject) -> JsonObject:
    names = [name for name, at in _messages().items() if at == topic]
    return {
        "address": topic,
        "description": _CHANNELS[topic],
        "servers": generated["channels"][names[0]]["servers"],
        "messages": {name: {"$ref": f"#/components/messages/{name}"} for name in names},
        "bindings": generated["channels"][names[0]]["bindings"],
    }


def _operation(action: str, topic: str, summary: str) -> JsonObject:
    return {"action": action, "channel": {"$ref": f"#/channels/{topic}"}, "summary": summary}


def _message(name: str, payload: JsonObject) -> JsonObject:
    topic = _messages()[name]
    message = {
        "name": name,
        "title": name,
        "contentType": "application/json",
        "headers": _headers(name, topic),
        "payload": payload,
        "bindings": {"kafka": {"key": _KEYS[topic], "bindingVersion": "0.5.0"}},
    }
    if topic == DEAD_LETTERS_TOPIC:
        return message | {
            "summary": "The original message's value, unchanged; null or empty if it had none, if the Kafka client "
            "could not decode it, and if dlq_value_left_out gives its size.",
            "contentType": "application/octet-stream",
        }
    return message | {
        "summary": _summary({**COMMAND_MODELS, **EVENT_MODELS}[name]),
        "correlationId": {"location": "$message.payload#/idempotency_key"},
        "examples": [{"name": "example", "payload": _example(name)}],
    }


def _headers(name: str, topic: str) -> JsonObject:
    """The topic's headers; those of an event say which `ce_type` it has, so that subscribers can route by it."""
    headers = _HEADERS[topic]
    if name not in EVENT_MODELS:
        return headers
    properties = headers["properties"]
    return headers | {"properties": properties | {"ce_type": properties["ce_type"] | {"const": name}}}


def _summary(model: type[BaseModel]) -> str:
    """Plain text: viewers do not render Markdown in a summary."""
    return " ".join((inspect.getdoc(model) or "").replace("`", "").split())


def _example(name: str) -> JsonObject:
    example = (
        COMMAND_EXAMPLES[name] if name in COMMAND_EXAMPLES else json.loads(write_event(EVENT_EXAMPLES[name], EVENT_ID))
    )
    return dict(example)


if __name__ == "__main__":
    print(build_document(), end="")
