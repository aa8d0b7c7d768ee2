"""Keeping card numbers out: this service takes tokens, and a number that slips in must not be stored or logged.

Finding one is a matter of form (ISO/IEC 7812: a brand's prefix and length, Luhn's check digit), so that most order
numbers and timestamps made of digits pass: none of 13 digits is a card's, for the brands that had some issue them no
more. A payment method is never digits, so there the check digit alone is enough.
"""

import re
from collections.abc import Iterator
from typing import Final

REMOVED: Final = "[card number removed]"

_BRAND: Final = re.compile(
    r"4(?:\d{15}|\d{18})"  # Visa
    r"|(?:5[1-5]|2[2-7])\d{14}"  # Mastercard, Mir
    r"|3[47]\d{13}"  # American Express
    r"|3[0689](?:\d{12}|\d{14,17})|35\d{14,17}"  # Diners Club, JCB
    r"|(?:5[0678]|6\d)\d{14,17}"  # Maestro, Discover, UnionPay, RuPay
)
_RUN: Final = re.compile(r"(?<![0-9A-Za-z])(?=(\d{14,19}(?![0-9A-Za-z])|\d{1,6}(?:[ -]\d{1,6}){1,18}(?![0-9A-Za-z])))")
"""Digits in one piece or in short groups, at every place where they may start; a UUID's groups are too long."""
_SEPARATORS: Final = str.maketrans("", "", " -")
_SHAPE: Final = bytes(ord("0") if chr(byte).isdigit() and byte < 128 else ord("x") for byte in range(256))
_THIRTEEN_DIGITS: Final = b"0" * 13


def may_hold_card_number(text: bytes) -> bool:
    """Whether thirteen digits follow each other in this UTF-8 text, spaces and dashes aside. A False is certain.

    Thirteen, since that many are refused as a payment method.
    """
    return _THIRTEEN_DIGITS in text.translate(_SHAPE, b" -")


def holds_card_number(text: str) -> bool:
    """Whether this text is a card number, or has one in it that stands by itself."""
    return may_hold_card_number(text.encode(errors="replace")) and any(
        _BRAND.fullmatch(digits) and _passes_luhn(digits) for digits in _candidates(text)
    )


def is_card_number_of_any_brand(text: str) -> bool:
    """Whether this text is nothing but 13 to 19 digits with a right check digit: the rule for a payment method."""
    digits = text.translate(_SEPARATORS)
    return 13 <= len(digits) <= 19 and digits.isdecimal() and _passes_luhn(digits)


def _candidates(text: str) -> Iterator[str]:
    whole = text.translate(_SEPARATORS)
    if whole.isdecimal() and len(whole) <= 19:
        yield whole
    for match in _RUN.finditer(text):
        yield from _leading_groups(match[1])


def _leading_groups(run: str) -> Iterator[str]:
    """The first group of the run, the first two, and so on, as long as they may be a card number."""
    digits = ""
    for group in re.split("[ -]", run):
        digits += group
        if 14 <= len(digits) <= 19:
            yield digits


def _passes_luhn(digits: str) -> bool:
    """Source: ISO/IEC 7812-1, annex B."""
    odd = sum(int(digit) for digit in digits[-1::-2])
    doubled = sum(sum(divmod(2 * int(digit), 10)) for digit in digits[-2::-2])
    return (odd + doubled) % 10 == 0
