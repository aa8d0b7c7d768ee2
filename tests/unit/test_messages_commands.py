"""Any bytes become a command, a refusal that names its fields, or an unreadable message. Equal commands read equal."""

import json
import math
import random
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from domain.commands import Command, OperationKind, RejectionReason, UnacceptableCommand
from domain.errors import MessageUnreadable
from domain.money import AMOUNT_MAX_MINOR
from handlers.messages.card_numbers import holds_card_number
from handlers.messages.command_models import COMMAND_MODELS
from handlers.messages.commands import COMMAND_BYTES_MAX, command_from_content, read_command, read_traceparent
from handlers.messages.dead_letter_reason import DeadLetterReason

PAYMENT_ID = "0190b3a1-7a3c-7e11-9c53-1f0a3a8b9c00"
CHARGE: dict[str, Any] = {
    "type": "payment.charge.v1",
    "idempotency_key": "order-1001-charge",
    "payment_id": PAYMENT_ID,
    "order_id": "order-1001",
    "amount_minor": 1250,
    "currency": "USD",
    "payment_method": "pm_card_visa",
}
CARD = "4242424242424242"
HUGE = "five thousand digits, which Python itself would refuse to read"
TRACEPARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


def read(body: object) -> Command | UnacceptableCommand:
    return read_command(json.dumps(body).encode(), None)


def accepted(body: object) -> Command:
    command = read(body)
    assert isinstance(command, Command), command
    return command


def refused(value: bytes) -> UnacceptableCommand:
    command = read_command(value, None)
    assert isinstance(command, UnacceptableCommand), command
    return command


def refused_with(**fields: Any) -> UnacceptableCommand:
    return refused(json.dumps(CHARGE | fields).encode())


def unreadable(value: bytes | None) -> str:
    with pytest.raises(MessageUnreadable) as caught:
        read_command(value, None)
    return caught.value.reason


def survives(value: bytes) -> None:
    """Check what holds for any bytes."""
    try:
        command = read_command(value, None)
    except MessageUnreadable as error:
        DeadLetterReason(error.reason)
        return
    assert "\0" not in command.content
    command.content.encode()


def test_a_charge_carries_everything_that_was_sent() -> None:
    command = accepted(
        CHARGE
        | {
            "customer_id": "customer-77",
            "gateway": "sandbox",
            "expires_at": "2030-01-01T13:00:00+01:00",
            "metadata": {"b": "2", "a": "1"},
            "off_session": True,
        }
    )
    assert command.off_session
    assert command.kind is OperationKind.CHARGE
    assert command.payment_id == UUID(PAYMENT_ID)
    assert (command.amount_minor, command.currency, command.order_id) == (1250, "USD", "order-1001")
    assert (command.customer_id, command.gateway, command.payment_method) == ("customer-77", "sandbox", "pm_card_visa")
    assert command.expires_at == datetime(2030, 1, 1, 12, tzinfo=UTC)
    assert command.metadata == {"a": "1", "b": "2"}


@pytest.mark.parametrize("kind", ["capture", "refund", "void"])
def test_a_command_without_an_amount_means_all_that_remains(kind: str) -> None:
    command = accepted({"type": f"payment.{kind}.v1", "idempotency_key": "k", "payment_id": PAYMENT_ID})
    assert (command.kind, command.amount_minor, command.currency) == (OperationKind(kind), None, None)


def test_order_spacing_case_and_unknown_fields_do_not_change_the_fingerprint() -> None:
    first = accepted(CHARGE)
    shuffled = dict(reversed(CHARGE.items())) | {
        "payment_id": PAYMENT_ID.upper(),
        "note": {"deep": [1]},
        "gateway": None,
        "off_session": False,
    }
    again = read_command(json.dumps(shuffled, indent=3).encode(), None)
    assert (again.content, again.fingerprint) == (first.content, first.fingerprint)


def test_escapes_and_sorted_metadata_do_not_change_the_fingerprint() -> None:
    plain = json.dumps(CHARGE | {"metadata": {"å": "é", "b": "2"}}, ensure_ascii=False).encode()
    escaped = json.dumps(CHARGE | {"metadata": {"b": "2", "å": "é"}}).encode()
    assert read_command(plain, None).fingerprint == read_command(escaped, None).fingerprint


def test_every_field_counts_in_the_fingerprint() -> None:
    changes: list[dict[str, Any]] = [
        {"amount_minor": 1251},
        {"currency": "EUR"},
        {"type": "payment.authorize.v1"},
        {"customer_id": "c"},
        {"off_session": True},
    ]
    assert len({accepted(CHARGE | change).fingerprint for change in [{}, *changes]}) == 6


def test_a_command_comes_back_from_its_content() -> None:
    command = read_command(
        json.dumps(CHARGE | {"expires_at": "2030-01-01T12:00:00.5Z", "metadata": {"a": "1"}}).encode(), "t"
    )
    assert command_from_content(command.content, "t") == command


@pytest.mark.parametrize(
    "amount",
    [0, -1, 10.5, 10.0, "10.5", "1250", True, [], AMOUNT_MAX_MINOR + 1, 10**30, HUGE, float("nan"), float("inf")],
)
def test_an_amount_that_is_no_positive_integer_is_refused_as_invalid_amount(amount: object) -> None:
    body = json.dumps(CHARGE).replace("1250", "9" * 5000 if amount is HUGE else json.dumps(amount))
    rejection = refused(body.encode()).rejection
    assert (rejection.reason, rejection.fields) == (RejectionReason.INVALID_AMOUNT, ("amount_minor",))
    assert "minor units" in rejection.message


@pytest.mark.parametrize("currency", ["usd", "XXX", "", 840, None])
def test_a_currency_that_is_not_known_is_refused(currency: object) -> None:
    rejection = refused_with(currency=currency).rejection
    expected = RejectionReason.INVALID_COMMAND if currency is None else RejectionReason.UNKNOWN_CURRENCY
    assert (rejection.reason, rejection.fields) == (expected, ("currency",))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("order_id", ""),
        ("order_id", "x" * 256),
        ("order_id", 7),
        ("order_id", None),
        ("order_id", "a\0b"),
        ("order_id", "\ud800"),
        ("customer_id", "x" * 256),
        ("payment_method", None),
        ("payment_method", "x" * 256),
        ("gateway", 1),
        ("expires_at", "2030-01-01T12:00:00"),
        ("expires_at", "1700000000"),
        ("expires_at", 1700000000),
        ("expires_at", "0001-01-01T00:00:00+23:00"),
        ("metadata", []),
        ("metadata", {"a": 1}),
        ("metadata", {"a": None}),
        ("metadata", {"": "a"}),
        ("metadata", {"k" * 41: "a"}),
        ("metadata", {"k": "a" * 501}),
        ("metadata", {str(n): "a" for n in range(51)}),
        ("metadata", {"a\0": "b"}),
    ],
)
def test_another_field_that_does_not_fit_is_refused_and_named(field: str, value: object) -> None:
    command = refused_with(**{field: value})
    assert (command.rejection.reason, command.rejection.fields) == (RejectionReason.INVALID_COMMAND, (field,))
    assert f"`{field}` " in command.rejection.message
    assert command.idempotency_key == "order-1001-charge"
    assert "\\u0000" not in command.content


@pytest.mark.parametrize(
    ("field", "value"),
    [("off_session", "true"), ("gateway", True), ("order_id", 7), ("expires_at", 7), ("metadata", [])],
)
def test_a_refusal_says_what_the_field_must_be(field: str, value: object) -> None:
    told = {
        "off_session": "true or false",
        "gateway": "a string of 1 to 64 characters",
        "order_id": "a string of 1 to 255 characters",
        "expires_at": "a string in RFC 3339",
        "metadata": "an object",
    }
    assert refused_with(**{field: value}).rejection.message.startswith(f"`{field}` must be {told[field]}")


@pytest.mark.parametrize("key", ["", "x" * 256, 7, None, "a\0", CARD, math.nan, math.inf, 10**41])
def test_an_unusable_idempotency_key_is_not_remembered(key: object) -> None:
    command = refused_with(idempotency_key=key)
    assert command.idempotency_key is None
    assert command.rejection.fields == ("idempotency_key",)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e400", "9" * 41])
@pytest.mark.parametrize("name", ["order_id", "customer_id", "payment_method", "gateway"])
def test_a_number_that_json_cannot_repeat_is_no_text(name: str, number: str) -> None:
    command = refused(json.dumps(CHARGE | {name: "?"}).replace('"?"', number).encode())
    assert command.rejection.fields == (name,)


CAPTURE = {"type": "payment.capture.v1", "idempotency_key": "k", "payment_id": PAYMENT_ID}


@pytest.mark.parametrize("kind", ["capture", "refund", "void"])
@pytest.mark.parametrize(
    "name", ["amount", "amountMinor", "AMOUNT_MINOR", "_amount", "refund_amount", "captureAmount", "total_amount"]
)
def test_an_amount_under_another_name_does_not_move_all_that_there_is(kind: str, name: str) -> None:
    plain = CAPTURE | {"type": f"payment.{kind}.v1"}
    command = refused(json.dumps(plain | {name: 250}).encode())
    assert (command.rejection.reason, command.rejection.fields) == (RejectionReason.INVALID_AMOUNT, ("amount_minor",))
    good = read_command(json.dumps(plain).encode(), None)
    assert command.fingerprint != good.fingerprint, "what is sent after it, in order, is another command"


def test_a_void_has_no_amount() -> None:
    command = refused(json.dumps(CAPTURE | {"type": "payment.void.v1", "amount_minor": 250}).encode())
    assert command.rejection.fields == ("amount_minor",)


@pytest.mark.parametrize(
    "fields",
    [
        {"amount_minor": None, "amount": None},
        {"amount_minor": 250, "amount": "2.50"},
        {"order_amount": 1},
        {"amount_currency": "USD"},
        {"note": "amount"},
    ],
)
def test_other_fields_beside_an_amount_are_ignored(fields: dict[str, object]) -> None:
    assert isinstance(read_command(json.dumps(CAPTURE | fields).encode(), None), Command)


@pytest.mark.parametrize(
    "value",
    ["4-" * 250_000, ["4-" * 100] * 2_500, {f"4-{n}": "4-" * 20 for n in range(9_000)}, [["4-" * 10] * 9] * 2_000],
)
@pytest.mark.parametrize("name", ["order_id", "metadata", "idempotency_key"])
def test_of_a_refused_command_no_more_is_kept_or_searched_than_of_a_good_one(name: str, value: object) -> None:
    """Searching half a megabyte of possible card numbers once took twenty seconds, during which no payment went on."""
    command = refused_with(**{name: value})
    assert command.rejection.fields == (name,)
    assert len(command.content) < 50_000


def test_nested_metadata_is_refused() -> None:
    assert refused_with(metadata={"a": {"b": "c"}}).rejection.fields == ("metadata",)


def test_several_problems_are_told_at_once() -> None:
    rejection = refused_with(amount_minor=-1, currency="usd", order_id=7).rejection
    assert rejection.reason is RejectionReason.INVALID_COMMAND
    assert rejection.fields == ("amount_minor", "currency", "order_id")


@pytest.mark.parametrize(
    "card", [CARD, "4242 4242 4242 4242", "4242-4242-4242-4242", "378282246310005", "6011111111111117"]
)
@pytest.mark.parametrize(
    "field", ["payment_method", "order_id", "customer_id", "gateway", "idempotency_key", "expires_at"]
)
def test_a_card_number_is_refused_and_kept_nowhere(field: str, card: str) -> None:
    command = refused_with(**{field: card})
    assert command.rejection.reason is RejectionReason.INVALID_COMMAND
    assert field in command.rejection.fields
    assert card not in repr(command)


@pytest.mark.parametrize(
    "gap",
    [" ", "  ", "\t", "\u00a0", "\u202f", ".", "-", " - ", "\u2010", "\u2011", "\u2013", "\u2212"],
    ids=lambda gap: "+".join(f"{ord(each):x}" for each in gap),
)
def test_a_card_number_is_found_whatever_is_between_its_groups(gap: str) -> None:
    spaced = gap.join((CARD[:4], CARD[4:8], CARD[8:12], CARD[12:]))
    for field in ("payment_method", "order_id"):
        for text in (spaced, f"card {spaced}, thanks"):
            assert spaced not in repr(refused_with(**{field: text}))


def test_a_card_number_in_full_width_digits_is_found() -> None:
    wide = "".join(chr(ord(digit) + 0xFEE0) for digit in CARD)
    assert wide not in repr(refused_with(order_id=wide))


@pytest.mark.parametrize(
    "value",
    [
        {"metadata": {"note": f"card {CARD} 12/30"}},
        {"metadata": {CARD: "a"}},
        {"metadata": [[CARD]]},
        {"metadata": int(CARD)},
        {"payment_method": int(CARD)},
        {"payment_method": f"tok_{CARD}"},
        {"order_id": float(CARD)},
        {"amount_minor": int(CARD)},
        {"amount_minor": CARD},
        {"currency": CARD},
    ],
)
def test_a_card_number_in_an_odd_place_is_kept_nowhere(value: dict[str, Any]) -> None:
    assert CARD not in repr(refused_with(**value))


@pytest.mark.parametrize(
    "text",
    [
        "order-1764112345678",
        "1764112345678",
        "20261123120955",
        "4242424242424241",
        "12345678-4242-4242-4242-424242424242",
    ],
)
def test_other_numbers_are_no_card_numbers(text: str) -> None:
    assert accepted(CHARGE | {"order_id": text, "idempotency_key": text}).order_id == text


def test_no_order_number_of_thirteen_digits_is_taken_for_a_card_number() -> None:
    """Such numbers are common in shops, and a tenth of them have a valid check digit."""
    chosen = random.Random(13)  # A fixed seed: the same numbers each time.
    for _ in range(5_000):
        number = f"{chosen.choice('3456')}{chosen.randrange(10**12):012}"
        for text in (number, f"order {number}", f"{number[:4]}-{number[4:]}"):
            assert not holds_card_number(text)
        command = accepted(CHARGE | {"order_id": number, "customer_id": number, "metadata": {number: number}})
        assert command.order_id == number


@pytest.mark.parametrize(
    "card",
    [
        "4242424242424242",  # Visa
        "4000000000000000006",
        "5555555555554444",  # Mastercard
        "2223003122003222",
        "2200000000000004",  # Mir
        "378282246310005",  # American Express
        "30569309025904",  # Diners Club
        "36227206271667",
        "3622720627166007",
        "3530111333300000",  # JCB
        "5018000000000009",  # Maestro
        "6759649826438453",
        "6799990100000000019",
        "6011111111111117",  # Discover
        "6205500000000000004",  # UnionPay
        "6250947000000014",
        "6074820000000009",  # RuPay
    ],
)
def test_a_card_number_of_each_brand_and_length_is_found(card: str) -> None:
    assert holds_card_number(card)
    assert holds_card_number(f"card {card[:4]} {card[4:8]}-{card[8:12]} {card[12:16]} {card[16:]} 12/30")
    assert refused_with(order_id=card).rejection.fields == ("order_id",)


def test_thirteen_digits_with_a_right_check_digit_are_no_payment_method() -> None:
    assert refused_with(payment_method="4222222222222").rejection.fields == ("payment_method",)
    assert accepted(CHARGE | {"order_id": "4222222222222"})


@pytest.mark.parametrize("field", ["order_id", "customer_id", "idempotency_key", "metadata"])
def test_a_sender_is_told_where_card_numbers_are_refused(field: str) -> None:
    assert "card number" in (COMMAND_MODELS["payment.charge.v1"].model_fields[field].description or "")


def test_a_repeated_field_is_refused_and_never_reads_like_the_good_command() -> None:
    twice = json.dumps(CHARGE)[:-1] + ', "amount_minor": 1250}'
    command = refused(twice.encode())
    assert command.rejection.fields == ("amount_minor",)
    assert command.fingerprint != accepted(CHARGE).fingerprint


def test_a_field_repeated_by_an_escaped_name_or_in_metadata_is_refused() -> None:
    escaped = json.dumps(CHARGE)[:-1] + ', "amount\\u005fminor": 1}'
    inside = json.dumps(CHARGE)[:-1] + ', "metadata": {"a": "1", "a": "2"}}'
    assert refused(escaped.encode()).rejection.fields == ("amount_minor",)
    assert refused(inside.encode()).rejection.fields == ("metadata",)


def test_a_repeated_unknown_field_is_ignored() -> None:
    assert isinstance(read_command((json.dumps(CHARGE)[:-1] + ', "x": 1, "x": 2}').encode(), None), Command)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, DeadLetterReason.EMPTY),
        (b"", DeadLetterReason.EMPTY),
        (b" " * (COMMAND_BYTES_MAX + 1), DeadLetterReason.TOO_LARGE),
        (b" ", DeadLetterReason.NOT_JSON),
        (b"\xff\xfe{}", DeadLetterReason.NOT_UTF8),
        (b"\xef\xbb\xbf{}", DeadLetterReason.NOT_JSON),
        (b"{", DeadLetterReason.NOT_JSON),
        (b"[" * 200_000, DeadLetterReason.NOT_JSON),
        (b"[]", DeadLetterReason.NOT_AN_OBJECT),
        (b"null", DeadLetterReason.NOT_AN_OBJECT),
        (b"{}", DeadLetterReason.UNKNOWN_TYPE),
        (b'{"type": "payment.charge.v2"}', DeadLetterReason.UNKNOWN_TYPE),
        (b'{"type": ["payment.charge.v1"]}', DeadLetterReason.UNKNOWN_TYPE),
        (b'{"type": "payment.charge.v1"}', DeadLetterReason.NO_PAYMENT_ID),
        (b'{"type": "payment.charge.v1", "payment_id": 7}', DeadLetterReason.NO_PAYMENT_ID),
        (
            b'{"type": "payment.charge.v1", "payment_id": "0190b3a17a3c7e119c531f0a3a8b9c00"}',
            DeadLetterReason.NO_PAYMENT_ID,
        ),
        (b'{"type": "payment.void.v1", "type": "payment.refund.v1"}', DeadLetterReason.UNKNOWN_TYPE),
    ],
)
def test_a_message_that_nobody_could_answer_is_unreadable(value: bytes | None, reason: DeadLetterReason) -> None:
    assert unreadable(value) == reason


def test_deep_nesting_in_any_field_is_survived() -> None:
    for depth in (10, 100, 300, 900, 5_000, 50_000):
        for field in ("metadata", "note"):
            survives((json.dumps(CHARGE)[:-1] + f', "{field}": ' + "[" * depth + "]" * depth + "}").encode())


def test_half_a_surrogate_pair_in_an_unknown_field_is_ignored() -> None:
    assert isinstance(read_command((json.dumps(CHARGE)[:-1] + ', "note": "\\ud800"}').encode(), None), Command)


def test_a_refusal_reads_the_same_each_time() -> None:
    assert refused_with(amount_minor="10.5") == refused_with(amount_minor="10.5")


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ([], None),
        ([("traceparent", TRACEPARENT.encode())], TRACEPARENT),
        ([("x", b"1"), ("traceparent", None)], None),
        ([("traceparent", TRACEPARENT.upper().encode())], None),
        ([("traceparent", b"01" + TRACEPARENT[2:].encode())], None),
        ([("traceparent", b"00-" + b"0" * 32 + b"-00f067aa0ba902b7-01")], None),
        ([("traceparent", b"00-4bf92f3577b34da6a3ce929d0e0e4736-" + b"0" * 16 + b"-01")], None),
        ([("traceparent", TRACEPARENT.encode() + b"\n")], None),
        ([("traceparent", b"\xff")], None),
    ],
)
def test_only_a_valid_trace_context_is_taken(headers: list[tuple[str, bytes | None]], expected: str | None) -> None:
    assert read_traceparent(headers) == expected


NAMES = sorted({name for model in COMMAND_MODELS.values() for name in model.model_fields})
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(exclude_categories=()))
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=5)
TYPED = st.fixed_dictionaries(
    {"type": st.sampled_from(sorted(COMMAND_MODELS)), "payment_id": st.uuids().map(str)},
    optional={name: VALUES for name in NAMES if name not in ("type", "payment_id")},
)


@given(st.binary() | VALUES.map(lambda value: json.dumps(value).encode()))
@settings(max_examples=300)
def test_any_bytes_are_read_or_told_unreadable(value: bytes) -> None:
    survives(value)


@given(TYPED, st.data())
@settings(max_examples=300)
def test_any_fields_are_read_or_refused(fields: dict[str, object], data: st.DataObject) -> None:
    good = {name: value for name, value in CHARGE.items() if data.draw(st.booleans())}
    value = json.dumps(fields | good).encode()
    survives(value)
    at = data.draw(st.integers(0, len(value)))
    survives(value[:at] + data.draw(st.binary(max_size=2)) + value[at + 1 :])
