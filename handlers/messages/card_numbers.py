"""Keeping card numbers out: this service takes tokens, and a number that slips in must not be stored or logged.

A card number is recognised by its form (ISO/IEC 7812: a brand's prefix and length, Luhn's check digit), so most order
numbers and timestamps made of digits pass. None of 13 digits is taken for one, since the brands that had such numbers
no longer issue them. A payment method is never digits, so there the check digit alone is enough. Spaces, dashes and
dots between the digits make no difference, nor do full-width digits.
"""

import re
import unicodedata
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
_RUN: Final = re.compile(r"(?<![0-9A-Za-z])\d{1,6}(?: \d{1,6})+(?![0-9A-Za-z])")
"""Short groups of digits; a UUID's are too long."""
_GAP: Final = re.compile(r"[\s.\-\u2010-\u2015\u2212]+")
"""What may stand between the groups: white space, dots, and the dashes that text programs make of a hyphen."""
_SHAPE: Final = bytes(ord("0") if chr(byte).isdigit() and byte < 128 else ord("x") for byte in range(256))
_FIRST_DIGITS: Final = frozenset("23456")
_THIRTEEN_DIGITS: Final = b"0" * 13


def may_hold_card_number(text: bytes) -> bool:
    """Whether thirteen digits follow each other in this JSON text (UTF-8), gaps aside. A False is certain.

    Thirteen, since that many are refused as a payment method. Of what is escaped, or not ASCII, nothing is certain.
    """
    return not text.isascii() or b"\\" in text or _THIRTEEN_DIGITS in text.translate(_SHAPE, b" -.")


def holds_card_number(text: str) -> bool:
    """Whether this text is a card number, or has one in it that stands by itself. Some microseconds a digit at most."""
    plain = _plain(text)
    whole = plain.replace(" ", "")
    if _THIRTEEN_DIGITS not in whole.encode(errors="replace").translate(_SHAPE):
        return False
    return (
        (whole.isdecimal() and _is_card_number(whole))
        or any(_is_card_number(piece) for piece in _PIECE.findall(plain))
        or any(_has_card_number(run.split(" ")) for run in _RUN.findall(plain))
    )


def is_card_number_of_any_brand(text: str) -> bool:
    """Whether this text is nothing but 13 to 19 digits with a right check digit: the rule for a payment method."""
    digits = _plain(text).replace(" ", "")
    return 13 <= len(digits) <= 19 and digits.isdecimal() and _passes_luhn(digits)


def _plain(text: str) -> str:
    """The text with each gap as one space, and full-width digits as the usual ones."""
    return _GAP.sub(" ", text if text.isascii() else unicodedata.normalize("NFKC", text))


def _is_card_number(digits: str) -> bool:
    return _BRAND.fullmatch(digits) is not None and _passes_luhn(digits)


def _has_card_number(groups: list[str]) -> bool:
    """Whether some of these groups, one after the other, are one. Each place is looked at with sums made once."""
    digits, ends = "".join(groups), list(accumulate(map(len, groups)))
    sums = _luhn_sums(digits)
    for first, begin in enumerate([0, *ends[:-1]]):
        if digits[begin] in _FIRST_DIGITS:
            at = bisect_left(ends, begin + 14, first)
            for end in ends[at : at + 6]:  # Of 14 to 19 digits, and each group has one at least.
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
