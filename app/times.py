"""Times and ages as people type them in options."""

import re
from datetime import UTC, datetime, timedelta
from typing import Final

UNITS: Final = {"m": "minutes", "h": "hours", "d": "days"}


class TimeUnusable(ValueError):
    """The text is neither a time nor an age; the message says what to write."""


def moment(text: str | None) -> datetime | None:
    """`2026-01-31` (its midnight), `2026-01-31T12:00:00Z`, or an age: `15m`, `2h`, `7d`. Without a zone, in UTC."""
    if text is None:
        return None
    try:
        if (back := age(text)) is not None:
            return datetime.now(UTC) - back
        found = datetime.fromisoformat(text)
        return found.replace(tzinfo=UTC) if found.tzinfo is None else found.astimezone(UTC)
    except (ValueError, OverflowError) as error:  # An age may reach back before the year 1.
        raise TimeUnusable(
            f"{text!r} is not a date or age; write 2026-01-31, 2026-01-31T12:00:00Z, or 2h (ago)"
        ) from error


def age(text: str) -> timedelta | None:
    """`15m`, `2h` or `7d`; None for any other text."""
    found = re.fullmatch(r"([0-9]{1,6})([mhd])", text)
    return None if found is None else timedelta(**{UNITS[found[2]]: int(found[1])})
