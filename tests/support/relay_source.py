"""How a test's relay reads the outbox: from the WAL, with or without the compiled inner loop, or by polling."""

from typing import Any

import pytest

PLAIN = "wal-plain"
also_plain = pytest.mark.parametrize("source", ["wal", "poll", PLAIN], indirect=True)
"""Runs a test with both sources, and with `wal` without its compiled inner loop."""


def reading(source: str) -> dict[str, Any]:
    """The relay settings for this source."""
    return {"source": source.removesuffix("-plain"), "is_native": source != PLAIN}
