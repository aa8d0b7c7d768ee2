"""A second look at a command that the fast reader refused or doubted: what is wrong with it, field by field.

Promises: nothing it returns holds a card number, a NUL or half a surrogate pair; it names fields and remedies, never
values. It is slow (tens of microseconds), and used only for those few commands.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, Final
from uuid import UUID

from pydantic import ValidationError

from domain.commands import Rejection, RejectionReason
from domain.errors import MessageUnreadable
from domain.money import AMOUNT_MAX_MINOR, MINOR_UNITS
from handlers.messages.card_numbers import REMOVED, holds_card_number, is_card_number_of_any_brand
from handlers.messages.command_models import COMMAND_MODELS, UUID_PATTERN, PartOfPayment, VoidPayment, WireCommand
from handlers.messages.dead_letter_reason import DeadLetterReason

CHARACTERS_MAX: Final = 512
ENTRIES_MAX: Final = 64
"""How much of a text, and of an object, is kept of a refused command: more than any field allows, so a value that was
cut does not fit either. To search everything in a message for card numbers could delay every payment for seconds."""
CUT: Final = "[nested too deeply]"


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a field is refused; `remedy` completes the sentence "`field` …" and says what to do."""

    reason: RejectionReason
    remedy: str


Problems = dict[str, Problem]
"""The first problem of each field."""


@dataclass(frozen=True, slots=True)
class DoubtfulCommand:
    """The known fields of a command as canonical JSON that is safe to store, and the problems found so far."""

    type: str
    payment_id: UUID
    idempotency_key: str | None
    currency: Any
    """The value exactly as received."""
    text: str
    problems: Problems


_REMEDIES: Final[Mapping[str, Problem]] = {
    "amount_minor": Problem(
        RejectionReason.INVALID_AMOUNT,
        f"must be a JSON integer of minor units from 1 to {AMOUNT_MAX_MINOR}, such as 1250 for USD 12.50",
    ),
    "currency": Problem(
        RejectionReason.UNKNOWN_CURRENCY,
        f"must be one of {', '.join(sorted(MINOR_UNITS))}",
    ),
    "expires_at": Problem(
        RejectionReason.INVALID_COMMAND,
        "must be a string in RFC 3339 with an offset, such as 2030-01-01T12:00:00Z",
    ),
    "gateway": Problem(RejectionReason.INVALID_COMMAND, "must be a string of 1 to 64 characters"),
    "off_session": Problem(RejectionReason.INVALID_COMMAND, "must be true or false"),
    "metadata": Problem(
        RejectionReason.INVALID_COMMAND,
        "must be an object with at most 50 strings of at most 500 characters, and keys of 1 to 40 characters",
    ),
}
_TEXT: Final = Problem(RejectionReason.INVALID_COMMAND, "must be a string of 1 to 255 characters")
_MISSING: Final = Problem(RejectionReason.INVALID_COMMAND, "is required")
_REPEATED: Final = Problem(RejectionReason.INVALID_COMMAND, "is given twice: send it once")
_CARD: Final = Problem(
    RejectionReason.INVALID_COMMAND, "seems to contain a card number: send the provider's token, never a card number"
)
_UNPRINTABLE: Final = Problem(
    RejectionReason.INVALID_COMMAND, "contains a NUL character or half a surrogate pair: remove it"
)
_MISNAMED: Final = Problem(
    RejectionReason.INVALID_AMOUNT,
    "is missing, but a similarly named field is present: rename it to amount_minor, or send no amount to move "
    "everything that remains",
)
_VOID_OF_A_PART: Final = Problem(
    RejectionReason.INVALID_AMOUNT,
    "is not allowed in a void, which releases everything that is held: leave it out",
)
_AMOUNT_NAME: Final = re.compile(
    "[^a-z]*((refund|capture|total|partial)[^a-z]*)?amount([^a-z]*(minor|cents|value|units?))?[^a-z]*", re.IGNORECASE
)
_PAYMENT_ID: Final = re.compile(UUID_PATTERN)
_SHOWABLE_TYPE: Final = re.compile(r"[a-z_.]{1,64}(v[0-9]{1,3})?")
_UNSTORABLE: Final = re.compile("[\0\ud800-\udfff]")


class _Object(dict[str, Any]):
    """A JSON object that remembers which of its names were given more than once."""

    repeated: frozenset[str] = frozenset()


def look_again(value: bytes) -> DoubtfulCommand:
    """Read a command slowly and thoroughly.

    Raises:
        MessageUnreadable: no known type or no usable payment id; its reason is a `DeadLetterReason`.
    """
    fields = _parse(value)
    type_, payment_id = _type_of(fields), _payment_id_of(fields)
    names = COMMAND_MODELS[type_].model_fields
    known = {name: _cut(fields[name], is_whole=True) for name in names if fields.get(name) is not None}
    problems = _problems_of_values(known) | dict.fromkeys(sorted(_repeated(fields) & names.keys()), _REPEATED)
    problems |= _problem_of_amount(COMMAND_MODELS[type_], fields)
    return DoubtfulCommand(
        type=type_,
        payment_id=payment_id,
        idempotency_key=None if "idempotency_key" in problems else _usable_key(known.get("idempotency_key")),
        currency=known.get("currency"),
        text=_storable_text(known, problems),
        problems=problems,
    )


def has_repetitions(value: bytes) -> bool:
    """Whether any name occurs more than once in the outermost object of this valid JSON, or in its metadata."""
    return bool(_repeated(_parse(value)))


def misfits(error: ValidationError) -> Problems:
    """The problem of each field that does not fit its model."""
    details = error.errors(include_url=False, include_context=False, include_input=False)
    return dict(_misfit(str(detail["loc"][1]), detail["type"]) for detail in details)


def rejection(problems: Problems) -> Rejection:
    """One refusal for all problems; its reason is the amount's or the currency's only if nothing else is wrong."""
    reasons = {problem.reason for problem in problems.values()}
    order = (RejectionReason.INVALID_COMMAND, RejectionReason.INVALID_AMOUNT, RejectionReason.UNKNOWN_CURRENCY)
    sentences = [f"`{name}` {problem.remedy}." for name, problem in sorted(problems.items())]
    return Rejection(next(r for r in order if r in reasons), " ".join(sentences), tuple(sorted(problems)))


def _parse(value: bytes) -> _Object:
    try:
        fields = json.loads(value.decode(), object_pairs_hook=_object, parse_int=_bounded_int)
    except UnicodeDecodeError as error:
        raise MessageUnreadable(DeadLetterReason.NOT_UTF8, f"byte {error.start} is not UTF-8") from error
    except RecursionError as error:
        raise MessageUnreadable(DeadLetterReason.NOT_JSON, "nested too deeply") from error
    except json.JSONDecodeError as error:
        raise MessageUnreadable(DeadLetterReason.NOT_JSON, f"{error.msg} at character {error.pos}") from error
    if not isinstance(fields, _Object):
        raise MessageUnreadable(DeadLetterReason.NOT_AN_OBJECT, "the value is JSON, but not an object")
    return fields


def _object(pairs: list[tuple[str, Any]]) -> _Object:
    built = _Object(pairs)
    if len(built) != len(pairs):
        counts = Counter(name for name, _ in pairs)
        built.repeated = frozenset(name for name, count in counts.items() if count > 1)
    return built


def _bounded_int(digits: str) -> int | float:
    """An integer that every later step can print; a longer one becomes infinite, which no field accepts."""
    return int(digits) if len(digits) <= 40 else math.inf


def _type_of(fields: _Object) -> str:
    type_ = fields.get("type")
    if isinstance(type_, str) and type_ in COMMAND_MODELS and "type" not in fields.repeated:
        return type_
    shown = f" {type_!r}" if isinstance(type_, str) and _SHOWABLE_TYPE.fullmatch(type_) else ""
    raise MessageUnreadable(
        DeadLetterReason.UNKNOWN_TYPE, f"`type`{shown} must be given once, as one of {', '.join(COMMAND_MODELS)}"
    )


def _payment_id_of(fields: _Object) -> UUID:
    payment_id = fields.get("payment_id")
    if isinstance(payment_id, str) and _PAYMENT_ID.fullmatch(payment_id) and "payment_id" not in fields.repeated:
        return UUID(payment_id)
    raise MessageUnreadable(
        DeadLetterReason.NO_PAYMENT_ID, "`payment_id` must be given once, as a UUID in the form 8-4-4-4-12"
    )


def _repeated(fields: _Object) -> frozenset[str]:
    """Names that occur more than once; `metadata` stands for any name within it."""
    metadata = fields.get("metadata")
    inside = isinstance(metadata, _Object) and metadata.repeated
    return fields.repeated | {"metadata"} if inside else fields.repeated


def _usable_key(key: object) -> str | None:
    return key if isinstance(key, str) and 1 <= len(key) <= 255 else None


def _misfit(name: str, error_type: str) -> tuple[str, Problem]:
    return name, _MISSING if error_type == "missing" else _REMEDIES.get(name, _TEXT)


def _problems_of_values(known: Mapping[str, Any]) -> Problems:
    found = ((name, _problem_of_value(name, value)) for name, value in known.items())
    return {name: problem for name, problem in found if problem}


def _problem_of_amount(model: type[WireCommand], fields: _Object) -> Problems:
    """An amount under another name cannot be ignored like other unknown fields: everything would be moved instead."""
    if model is VoidPayment:
        problem = _VOID_OF_A_PART
    elif issubclass(model, PartOfPayment) and fields.get("amount_minor") is None:
        problem = _MISNAMED
    else:
        return {}
    is_given = any(_AMOUNT_NAME.fullmatch(name) for name, value in fields.items() if value is not None)
    return {"amount_minor": problem} if is_given else {}


def _problem_of_value(name: str, value: object) -> Problem | None:
    texts = list(_texts(value))
    if name not in ("amount_minor", "payment_id") and any(_is_card(name, text) for text in texts):
        return _CARD
    return _UNPRINTABLE if any(_UNSTORABLE.search(text) for text in texts) else None


def _is_card(name: str, text: str) -> bool:
    return holds_card_number(text) or (name == "payment_method" and is_card_number_of_any_brand(text))


def _texts(value: object) -> Iterator[str]:
    """Every text and number in a JSON value, as text."""
    match value:
        case dict():
            for name, inner in value.items():
                yield name
                yield from _texts(inner)
        case list():
            for inner in value:
                yield from _texts(inner)
        case _:
            yield _as_text(value)


def _as_text(value: object) -> str:
    return f"{value:.0f}" if isinstance(value, float) else str(value)


def _cut(value: object, *, is_whole: bool) -> object:
    """As much of a field's value as is kept; objects and lists nested in it are replaced by `CUT`."""
    match value:
        case dict() | list() if not is_whole:
            return [CUT]  # A list fits nowhere; a text would.
        case dict():
            entries = islice(value.items(), ENTRIES_MAX)
            return {name[:CHARACTERS_MAX]: _cut(inner, is_whole=False) for name, inner in entries}
        case list():
            return [_cut(inner, is_whole=False) for inner in value[:ENTRIES_MAX]]
        case str():
            return value[:CHARACTERS_MAX]
        case _:
            return value


def _storable_text(known: Mapping[str, Any], problems: Problems) -> str:
    """Canonical JSON of what may be kept, marked so that it always differs from the text of an acceptable command."""
    kept = {name: _storable(name, value) for name, value in known.items()}
    if repeated := [name for name, problem in problems.items() if problem is _REPEATED]:
        kept["repeated_fields"] = repeated
    if any(problem in (_MISNAMED, _VOID_OF_A_PART) for problem in problems.values()):
        kept["has_other_amount"] = True
    return json.dumps(kept, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def _storable(name: str, value: object) -> object:
    match value:
        case dict():
            return {str(_storable(name, key)): _storable(name, inner) for key, inner in value.items()}
        case list():
            return [_storable(name, inner) for inner in value]
        case bool():
            return value
        case int() if name == "amount_minor" and value <= AMOUNT_MAX_MINOR:
            return value
        case float() if not math.isfinite(value):
            return [str(value)]  # JSON has no such number, and a text might fit the field: a list fits none.
        case _ if name != "payment_id" and _is_card(name, _as_text(value)):
            return REMOVED
        case str():
            return _UNSTORABLE.sub("\ufffd", value)
        case _:
            return value
