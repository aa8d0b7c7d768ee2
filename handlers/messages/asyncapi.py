"""The AsyncAPI 3 document of this service: `python -m handlers.messages.asyncapi > asyncapi.yaml`.

Promises: every message that is read or written is in it, each by itself, with the very models that read and write it.
FastStream generates it from a declaration for each message (the running subscriber takes batches, which would show as
arrays). It gives each declaration a channel of its own; here they are gathered by topic, and what FastStream has no
words for is added: headers, keys, examples and what each reason means. AsyncAPI ignores what stands beside a `$ref`, so
nothing does.
"""

import inspect
import json
from collections.abc import Mapping
from typing import Any, Final

import yaml
from faststream.kafka import KafkaBroker
from faststream.specification import AsyncAPI
from pydantic import BaseModel

from domain.commands import RejectionReason
from domain.money import MINOR_UNITS
from handlers.messages.command_models import COMMAND_MODELS, ChargePayment
from handlers.messages.commands import COMMAND_BYTES_MAX
from handlers.messages.events import EVENT_MODELS, write_event
from handlers.messages.examples import COMMAND_EXAMPLES, EVENT_EXAMPLES, EVENT_ID, PAYMENT_ID
from handlers.messages.refusals import DeadLetterReason

COMMANDS_TOPIC: Final = "payments.commands"
EVENTS_TOPIC: Final = "payments.events"
DEAD_LETTERS_TOPIC: Final = "payments.commands.dlq"
DEAD_LETTER: Final = "dead_letter"

JsonObject = dict[str, Any]

_DESCRIPTION: Final = f"""\
Payment **commands** come in on a Kafka topic, **events** go out on another; money moves at most once for each command.

- Send a command with a `payment_id` of your choice (a UUID), which is also the message key, and an `idempotency_key`.
  Sending it again is safe: nothing moves twice, and the result is published again with `replayed: true`, as it was
  (`payment`, too), followed by what took it back since, if anything did (`late_success`, `refund_failed`).
- Again means with the same content: every known field as it was, `expires_at` and an explicit `gateway` included. Their
  order, unknown fields and headers do not count, and null is as good as left out. Other content under a known key is
  refused (`idempotency_conflict`); that is no result of the first command, which stands and has its own.
- Every readable command ends in exactly one final event, whatever comes in between (`requires_action`, `pending`,
  `needs_review`). Find it by `payment_id` and `idempotency_key`. Two refusals are not remembered, but
  published for each delivery: of a conflict, and of a command without a usable key. Any other refusal uses up its key:
  send the corrected command under a new one.
- A readable command is one JSON object in UTF-8, without a byte order mark, of at most {COMMAND_BYTES_MAX} bytes, with
  a known `type` and a `payment_id` in the form 8-4-4-4-12, each given once. Anything else is never answered: it is kept
  on `{DEAD_LETTERS_TOPIC}` for an operator. So is a readable command that failed by a defect
  (`cannot_be_processed`); it is answered once an operator retries it.
- Commands of a payment run one at a time. One that comes while another is under way, which may wait for its payer for a
  day, waits for its turn, and nothing is published of it until then; nor of a second delivery of the first. (Of such
  deliveries the first thousand are answered.) Three do not wait: a command with a wrong field and a conflict are
  refused at once, and where the gateway can cancel, a void of what waits for its payer goes before the queue.
- So do not pay for an order under another `payment_id` while the first is open, or both may be paid: send a `void`, and
  wait for its result.
- A charge or authorization is taken only while `payment.status` is `created`, `failed` or `expired`, under a new key
  and in the payment's currency. A `canceled` payment takes none: what is to be paid after all needs a new `payment_id`.
  (So it is after a void of what waits for its payer, though that ends as `declined`, with the reason `canceled`, before
  `voided`.)
- Events come at least once and in order for each payment: `payment_seq` has no gaps.
- Amounts are integers in minor units beside an ISO 4217 currency. Texts hold neither U+0000 nor half a surrogate pair.
- Unknown fields are ignored, but for an amount under another name (`amount`, `amountMinor`) in a capture or refund
  without `amount_minor`, which would move all that remains, and in a void: these are refused. Ignore them, too,
  and events of a `type` that you do not know.
"""

_CHANNELS: Final[Mapping[str, str]] = {
    COMMANDS_TOPIC: "What an order service asks for. The key is the `payment_id`. It is not read, but keeps a "
    "payment's commands in order: otherwise one may overtake another, and be refused. So write it in one way "
    "(another case may mean another partition), and let all senders choose partitions by murmur2, as Java's client "
    "does (librdkafka: `partitioner=murmur2_random`). Before partitions are added, stop the senders until all is "
    "read, or payments lose their order. Commands of a Kafka transaction are read once it is committed, and those of "
    "one that is aborted never. `payments migrate` sets no retention, so that the broker's default holds, mostly a "
    "week; what is deleted before it was read is never answered, and may be sent again.",
    EVENTS_TOPIC: "What happened to payments, in order for each payment. The key is the `payment_id`, and the "
    "partition its murmur2; after partitions were added, `payment_seq` shows what is read too early. Retention is "
    "that of the commands. What is gone, `payments relay replay` publishes again for as long as the outbox keeps it, "
    "by default 14 days.",
    DEAD_LETTERS_TOPIC: "What could not be read or processed, byte for byte, with the reason. `payments migrate` "
    "makes the topic so that letters stay until somebody deletes them. One may lie there twice: `dlq_topic`, "
    "`dlq_partition` and `dlq_offset` name the original.",
}
_REJECTIONS: Final[Mapping[RejectionReason, str]] = {
    RejectionReason.INVALID_COMMAND: "a field is missing, given twice, of a wrong form, or holds a card number",
    RejectionReason.INVALID_AMOUNT: "`amount_minor` is no integer in digits alone, out of bounds, under another name, "
    "or given for a void",
    RejectionReason.UNKNOWN_CURRENCY: "the currency is not known, or not accepted by this installation",
    RejectionReason.CURRENCY_MISMATCH: "the payment is in another currency",
    RejectionReason.AMOUNT_BELOW_MINIMUM: "less than may be paid in this currency at this gateway",
    RejectionReason.AMOUNT_ABOVE_MAXIMUM: "more than may be paid in this currency at this gateway",
    RejectionReason.COMMAND_EXPIRED: "its `expires_at` had passed, and it was not executed",
    RejectionReason.IDEMPOTENCY_CONFLICT: "the key is another command's, which stands and has a result of its own",
    RejectionReason.PAYMENT_NOT_FOUND: "no charge or authorization of this payment was ever begun",
    RejectionReason.PAYMENT_ALREADY_EXISTS: "the payment's status takes no other charge or authorization",
    RejectionReason.INVALID_STATE: "there is nothing that could be captured, voided or refunded",
    RejectionReason.AMOUNT_EXCEEDS_CAPTURABLE: "more than can still be captured",
    RejectionReason.AMOUNT_EXCEEDS_REFUNDABLE: "more than can still be refunded; what is disputed cannot",
    RejectionReason.UNKNOWN_GATEWAY: "the gateway is none of those that are set up",
    RejectionReason.UNSUPPORTED_BY_GATEWAY: "the gateway cannot do this at all, in part, in this currency, or without "
    "the payer: `fields` tells which",
    RejectionReason.GATEWAY_REFUSED: "the provider refused it, such as a void of what was just paid; or it cannot "
    "express the amount",
    RejectionReason.GATEWAY_UNAVAILABLE: "the provider could not be reached, by default for 15 minutes, and nothing "
    "was sent; a new command under a new key may fare better",
}
_DEAD_LETTERS: Final[Mapping[DeadLetterReason, str]] = {
    DeadLetterReason.EMPTY: "there is no value",
    DeadLetterReason.TOO_LARGE: f"the value has more than {COMMAND_BYTES_MAX} bytes",
    DeadLetterReason.NOT_UTF8: "the value is not UTF-8",
    DeadLetterReason.NOT_JSON: "the value is no JSON, begins with a byte order mark, or is nested too deeply",
    DeadLetterReason.NOT_AN_OBJECT: "the value is JSON, but no object",
    DeadLetterReason.UNKNOWN_TYPE: "`type` is missing, given twice, misspelt, or of a later version",
    DeadLetterReason.NO_PAYMENT_ID: "`payment_id` is missing, given twice, or not in the form 8-4-4-4-12",
    DeadLetterReason.RECORD_UNDECODABLE: "a header's name is not UTF-8, so that the client cannot read the message",
    DeadLetterReason.CANNOT_BE_PROCESSED: "the command can be read, and failed alone",
}
_OPERATIONS: Final[Mapping[str, tuple[str, str, str]]] = {
    "receiveCommands": ("receive", COMMANDS_TOPIC, "The service reads commands."),
    "sendEvents": ("send", EVENTS_TOPIC, "The service publishes events."),
    "sendDeadLetters": ("send", DEAD_LETTERS_TOPIC, "The service parks what it cannot process, and goes on."),
}


def _told(opening: str, meanings: Mapping[RejectionReason, str] | Mapping[DeadLetterReason, str]) -> str:
    return "\n".join([opening, "", *(f"- `{reason}`: {meaning}." for reason, meaning in meanings.items())])


def _text(description: str, *examples: str) -> JsonObject:
    return {"type": "string", "description": description} | ({"examples": list(examples)} if examples else {})


_TRACEPARENT: Final = _text(
    "W3C trace context; empty or absent where there is none.", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
) | {"type": ["string", "null"]}
_HEADERS: Final[Mapping[str, JsonObject]] = {
    COMMANDS_TOPIC: {"type": "object", "properties": {"traceparent": _TRACEPARENT}},
    EVENTS_TOPIC: {
        "type": "object",
        "required": ["id", "ce_id", "ce_type", "ce_source", "ce_time", "ce_specversion", "payment_seq"],
        "properties": {
            "id": _text("As `event_id` in the body.", str(EVENT_ID)),
            "ce_id": _text("CloudEvents: as `event_id` in the body.", str(EVENT_ID)),
            "ce_type": _text("CloudEvents: as `type` in the body.", "payment.captured.v1"),
            "ce_source": _text("CloudEvents: which service wrote it.", "/payments"),
            "ce_time": _text("CloudEvents: as `occurred_at` in the body.", "2026-01-31T12:00:00.250000Z"),
            "ce_specversion": _text("CloudEvents.", "1.0"),
            "payment_seq": _text("As `payment_seq` in the body, in decimal digits.", "1"),
            "traceparent": _TRACEPARENT,
            "replayed_at": _text(
                "Only on what an operator published once more: when, to the second. No first delivery has it.",
                "2026-01-31T12:00:00+00:00",
            ),
        },
    },
    DEAD_LETTERS_TOPIC: {
        "type": "object",
        "description": "These, and the headers that the message came with: but for one whose value is left out, and "
        "for one that the Kafka client could not decode (`record_undecodable`), of which only its place is known.",
        "required": ["dlq_reason", "dlq_detail", "dlq_topic", "dlq_partition", "dlq_offset"],
        "properties": {
            "dlq_reason": _text(_told("A word from a closed list.", _DEAD_LETTERS)) | {"enum": list(DeadLetterReason)},
            "dlq_detail": _text("For people: what was wrong."),
            "dlq_topic": _text("Where the message stood.", COMMANDS_TOPIC),
            "dlq_partition": _text("Where the message stood, in decimal digits.", "3"),
            "dlq_offset": _text("Where the message stood, in decimal digits.", "1042"),
            "dlq_value_left_out": _text(
                "Only where the topic did not take the message, too large with these headers: it lies here without its "
                "value and its own headers. The value's size in bytes, in decimal digits.",
                "1048576",
            ),
            "dlq_key_left_out": _text(
                "Only beside `dlq_value_left_out`, where the key was too long, too: its size in bytes, in digits.",
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
        "description": "As the message came: any bytes, mostly the payment's id, or null. Null, too, where "
        "`dlq_key_left_out` tells its size, and where the Kafka client could not decode the message.",
        "examples": [PAYMENT_ID, None],
    },
}


class _Dumper(yaml.SafeDumper):
    """Writes a text of several lines as a block, to be read and compared by people."""


_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None),
)


def build_document() -> str:
    """The whole document as YAML text, the same at every call."""
    # The detour over JSON leaves plain values, none of them shared: YAML would write shared ones as anchors.
    # FastStream's name for the schema of what has no model holds a colon, which AsyncAPI's keys may not.
    plain = json.loads(json.dumps(build_specification()).replace(f"{DEAD_LETTER}:Message:Payload", "DeadLetter"))
    return yaml.dump(plain, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def build_specification() -> JsonObject:
    """The whole document as JSON values."""
    generated = AsyncAPI(
        _declared(), title="Payments", version="1.0.0", description=_DESCRIPTION, schema_version="3.0.0"
    ).to_specification()
    document: JsonObject = generated.to_jsonable()
    schemas = _with_currency(document["components"]["schemas"])
    schemas["RejectionReason"]["description"] = _told(schemas["RejectionReason"]["description"], _REJECTIONS)
    payloads = {name: document["components"]["messages"][f"{name}:Message"]["payload"] for name in _messages()}
    return {
        "asyncapi": document["asyncapi"],
        "info": document["info"],
        "defaultContentType": document["defaultContentType"],
        "servers": {name: _without_pathname(server) for name, server in document["servers"].items()},
        "channels": {topic: _channel(topic, document) for topic in _CHANNELS},
        "operations": {name: _operation(*told) for name, told in _OPERATIONS.items()},
        "components": {
            "messages": {name: _message(name, payload) for name, payload in payloads.items()},
            "schemas": {name: schemas[name] for name in sorted(schemas)},
        },
    }


def _with_currency(schemas: JsonObject) -> JsonObject:
    """The list of currencies once, by a name of its own, instead of in every command."""
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


def _without_pathname(server: JsonObject) -> JsonObject:
    """FastStream writes an empty path, which readers show as a slash; a Kafka server has none."""
    return {name: value for name, value in server.items() if name != "pathname"}


def _messages() -> dict[str, str]:
    """Every message's name, with its topic."""
    commands, events = dict.fromkeys(COMMAND_MODELS, COMMANDS_TOPIC), dict.fromkeys(EVENT_MODELS, EVENTS_TOPIC)
    return {**commands, **events, DEAD_LETTER: DEAD_LETTERS_TOPIC}


def _declared() -> KafkaBroker:
    """A broker that is never started and declares every message by itself."""
    where = "Where docker compose publishes it; `make up` takes a free port, and prints it."
    broker = KafkaBroker("localhost:29092", description=f"Plain Kafka; any version since 2.4 will do. {where}")
    models: dict[str, Any] = {**COMMAND_MODELS, **EVENT_MODELS, DEAD_LETTER: bytes | None}
    for name, topic in _messages().items():
        # A publisher also for what the service reads: it needs no handler, and the schema is the same.
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
        "headers": _HEADERS[topic],
        "payload": payload,
        "bindings": {"kafka": {"key": _KEYS[topic], "bindingVersion": "0.5.0"}},
    }
    if topic == DEAD_LETTERS_TOPIC:
        return message | {
            "summary": "A message's value as it was, whatever that is; null or empty where it had none, where the "
            "Kafka client could not decode it, and where `dlq_value_left_out` tells its size.",
            "contentType": "application/octet-stream",
        }
    return message | {
        "summary": _summary({**COMMAND_MODELS, **EVENT_MODELS}[name]),
        "correlationId": {"location": "$message.payload#/idempotency_key"},
        "examples": [{"name": "example", "payload": _example(name)}],
    }


def _summary(model: type[BaseModel]) -> str:
    return " ".join((inspect.getdoc(model) or "").split())


def _example(name: str) -> JsonObject:
    example = (
        COMMAND_EXAMPLES[name] if name in COMMAND_EXAMPLES else json.loads(write_event(EVENT_EXAMPLES[name], EVENT_ID))
    )
    return dict(example)


if __name__ == "__main__":
    print(build_document(), end="")
