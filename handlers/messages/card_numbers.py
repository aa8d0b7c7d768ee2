"""Keeping card numbers out: this service takes tokens, and a number that slips in must not be stored or logged.

A number is known by its form (ISO/IEC 7812: a brand's prefix and length, Luhn's check digit), so that most order
numbers and timestamps pass. Numbers of 13 digits are not taken for cards: the brands that had such cards issue them no
longer. A payment method never consists of digits, so there the check digit alone is enough.
"""

import re
from bisect import bisect_left
from itertools import accumulate
from typing import Final

REMOVED: Final = "[card number removed]"

_BRAND: Final = re.compile(
    r"4(?:\d{15}|\d{18})"  # Visa
    r"|(?:5[1-5]|2[2-7])\d{14}"  # Mastercard, Mir
    r"|3[47]\d{13}"  # American Express
    r"|3[0689](?:\d{12}|\d{14,17})|35\d{14,17}"  # Diners Club, JCB
    r"|(?:5[0678]|6\d)\d{14,17}"  # Maestro, Discover, UnionPay, RuPay
)
_PIECE: Final = re.compile(r"(?<![0-9A-Za-z])\d{14,19}(?![0-9A-Za-z])")
_RUN: Final = re.compile(r"(?<![0-9A-Za-z])\d{1,6}(?:[ -]\d{1,6})+(?![0-9A-Za-z])")
"""Short groups of digits; those of a UUID are too long."""
_SEPARATOR: Final = re.compile("[ -]")
_SEPARATORS: Final = str.maketrans("", "", " -")
_SHAPE: Final = bytes(ord("0") if chr(byte).isdigit() and byte < 128 else ord("x") for byte in range(256))
_FIRST_DIGITS: Final = frozenset("23456")
_THIRTEEN_DIGITS: Final = b"0" * 13


def may_hold_card_number(text: bytes) -> bool:
    """Whether 13 digits follow each other in this UTF-8 text, ignoring spaces and dashes. False is certain.

    Thirteen, because a payment method of that many digits is refused.
    """
    return _THIRTEEN_DIGITS in text.translate(_SHAPE, b" -")


def holds_card_number(text: str) -> bool:
    """Whether this text is a card number, or contains a separate one. At most some microseconds per digit."""
    if not may_hold_card_number(text.encode(errors="replace")):
        return False
    whole = text.translate(_SEPARATORS)
    return (
        (whole.isdecimal() and _is_card_number(whole))
        or any(_is_card_number(piece) for piece in _PIECE.findall(text))
        or any(_has_card_number(_SEPARATOR.split(run)) for run in _RUN.findall(text))
    )


def is_card_number_of_any_brand(text: str) -> bool:
    """Whether this text is only 13 to 19 digits with a valid check digit: the rule for a payment method."""
    digits = text.translate(_SEPARATORS)
    return 13 <= len(digits) <= 19 and digits.isdecimal() and _passes_luhn(digits)


def _is_card_number(digits: str) -> bool:
    return _BRAND.fullmatch(digits) is not None and _passes_luhn(digits)


def _has_card_number(groups: list[str]) -> bool:
    """Whether consecutive groups form a card number. Luhn's sums are computed once and used for every place."""
    digits, ends = "".join(groups), list(accumulate(map(len, groups)))
    sums = _luhn_sums(digits)
    for first, begin in enumerate([0, *ends[:-1]]):
        if digits[begin] in _FIRST_DIGITS:
            at = bisect_left(ends, begin + 14, first)
            for end in ends[at : at + 6]:  # 14 to 19 digits, at least one in each group.
                of_end = sums[end % 2]
                if (of_end[end] - of_end[begin]) % 10 == 0 and _BRAND.fullmatch(digits, begin, end):
                    return True
    return False


def _luhn_sums(digits: str) -> tuple[list[int], list[int]]:
    """Luhn's sums of the first 0, 1, 2 … digits: for numbers that end at an even place, and at an odd one."""
    plain = [int(digit) for digit in digits]
    doubled = [sum(divmod(2 * digit, 10)) for digit in plain]
    pairs = list(zip(plain, doubled, strict=True))
    even = accumulate((pair[place % 2 == 0] for place, pair in enumerate(pairs)), initial=0)
    odd = accumulate((pair[place % 2] for place, pair in enumerate(pairs)), initial=0)
    return list(even), list(odd)


def _passes_luhn(digits: str) -> bool:
    """Source: ISO/IEC 7812-1, annex B."""
    sums = _luhn_sums(digits)[len(digits) % 2]
    return sums[-1] % 10 == 0
