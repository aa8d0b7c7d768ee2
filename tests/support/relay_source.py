"""How a relay of a test reads: from the log, compiled or not, or by polling."""

from typing import Any

import pytest

PLAIN = "wal-plain"
also_plain = pytest.mark.parametrize("source", ["wal", "poll", PLAIN], indirect=True)
"""As a relay reads whose inner loop was not compiled, too."""


def reading(source: str) -> dict[str, Any]:
    """The settings of a relay that reads so."""
    return {"source": source.removesuffix("-plain"), "is_native": source != PLAIN}
