"""Reading commands: from the bytes of a Kafka message to a domain command.

Promises: any bytes result in a command, in an unacceptable command (a typed refusal, published to its sender), or in
`MessageUnreadable` (nobody can be answered: dead-letter topic). A good command is read in one pass in Rust;
`second_look` reads a doubtful one again in Python.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from hashlib import sha256
from typing import Annotated, Final

from pydantic import Field, TypeAdapter, ValidationError

from domain.commands import AnyCommand, Command, OperationKind, UnacceptableCommand
from domain.errors import MessageUnreadable
from handlers.messages.card_numbers import holds_card_number, is_card_number_of_any_brand, may_hold_card_number
from handlers.messages.command_models import COMMAND_MODELS, NewPayment, PartOfPayment, VoidPayment, WireCommand
from handlers.messages.dead_letter_reason import DeadLetterReason
from handlers.messages.second_look import (
    DoubtfulCommand,
    Problems,
    has_repetitions,
    look_again,
    misfits,
    rejection,
)

COMMAND_BYTES_MAX: Final = 524_288
"""Longer values are not read. All known fields at their limits, every character escaped, need two thirds of this."""

_READER: Final[TypeAdapter[WireCommand]] = TypeAdapter(Annotated[WireCommand, Field(discriminator="type")])
_validate: Final[Callable[[bytes | str], WireCommand]] = _READER.validator.validate_json
_NUL: Final = b"\\u0000"
"""A NUL in JSON. An escaped backslash before "u0000" looks the same; the second look distinguishes them."""
_AMOUNT: Final = re.compile(rb"amount", re.IGNORECASE)
_TRACEPARENT: Final = re.compile(rb"00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")


def command_type(kind: OperationKind) -> str:
    """The wire type of a command: `payment.capture.v1` for CAPTURE."""
    return f"payment.{kind}.v1"


def read_command(value: bytes | None, traceparent: str | None) -> AnyCommand:
    """The command in a Kafka message's value.

    Equal known fields give an equal `content` and `fingerprint`, whatever their order, spacing or unknown neighbours.

    Raises:
        MessageUnreadable: no known type or no usable payment id; its reason is a `DeadLetterReason`.
    """
    if not value:
        raise MessageUnreadable(DeadLetterReason.EMPTY, "the message has no value")
    if len(value) > COMMAND_BYTES_MAX:
        raise MessageUnreadable(DeadLetterReason.TOO_LARGE, f"{len(value)} bytes; at most {COMMAND_BYTES_MAX} are read")
    try:
        message = _validate(value)
    except ValidationError:
        return _read_again(value, traceparent)
    content = message.__pydantic_serializer__.to_json(message, exclude_none=True)
    if _is_doubtful(value, content, message):
        return _read_again(value, traceparent)
    return message.command(content.decode(), sha256(content).digest(), traceparent)


def command_from_content(content: str, traceparent: str | None = None) -> Command:
    """The command read from its stored canonical content, after it waited or is recovered.

    Raises:
        pydantic.ValidationError: `read_command` never wrote this as the content of a command.
    """
    return _validate(content).command(content, sha256(content.encode()).digest(), traceparent)


def read_traceparent(headers: Iterable[tuple[str, bytes | None]]) -> str | None:
    """The message's W3C trace context, or None if there is no valid one.

    Source: https://www.w3.org/TR/trace-context/, version 00.
    """
    for name, value in headers:
        if name == "traceparent" and value and _TRACEPARENT.fullmatch(value):
            return value.decode()
    return None


def _read_again(value: bytes, traceparent: str | None) -> AnyCommand:
    doubtful = look_again(value)
    try:
        message = _validate(doubtful.text)
    except ValidationError as error:
        return _unacceptable(doubtful, misfits(error) | doubtful.problems, traceparent)
    if doubtful.problems:
        return _unacceptable(doubtful, doubtful.problems, traceparent)
    content = message.__pydantic_serializer__.to_json(message, exclude_none=True)
    return message.command(content.decode(), sha256(content).digest(), traceparent)


def _unacceptable(doubtful: DoubtfulCommand, problems: Problems, traceparent: str | None) -> UnacceptableCommand:
    return UnacceptableCommand(
        kind=COMMAND_MODELS[doubtful.type].kind,
        idempotency_key=doubtful.idempotency_key,
        payment_id=doubtful.payment_id,
        content=doubtful.text,
        fingerprint=sha256(doubtful.text.encode()).digest(),
        rejection=rejection(problems),
        currency=None if "currency" in problems else doubtful.currency,
        traceparent=traceparent,
    )


def _is_doubtful(value: bytes, content: bytes, message: WireCommand) -> bool:
    """Whether a message that fits its model may still repeat a field, give its amount under another name, or contain
    something that is refused: a card number or a NUL.

    A message without escapes has one colon after each name, plus those within its strings. If its content has as many,
    no field was dropped, so none was repeated.
    """
    if (value.count(b":") != content.count(b":") or b"\\" in value) and (has_repetitions(value) or _NUL in content):
        return True
    if _moves_all(message) and _AMOUNT.search(value):
        return True
    return may_hold_card_number(content) and _holds_card_number(message)


def _moves_all(message: WireCommand) -> bool:
    """Whether the command moves everything that remains, unless its amount is given under another name."""
    return isinstance(message, VoidPayment) or (isinstance(message, PartOfPayment) and message.amount_minor is None)


def _holds_card_number(message: WireCommand) -> bool:
    if isinstance(message, NewPayment) and is_card_number_of_any_brand(message.payment_method):
        return True
    return any(holds_card_number(text) for text in _texts(message))


def _texts(message: WireCommand) -> Iterator[str]:
    yield from (value for _, value in message if isinstance(value, str))
    for name, text in (message.metadata or {}).items():
        yield name
        yield text
