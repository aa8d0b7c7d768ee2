"""The documentation's matrix of gateways is the code's."""

from pathlib import Path

from app.gateways_command import known_capabilities, rows
from app.settings import Settings
from app.wiring import GATEWAYS, WEBHOOKS

DOCUMENT = Path(__file__).parents[2] / "docs" / "gateways.md"


def test_the_documented_matrix_is_what_the_code_decides_by() -> None:
    known = known_capabilities(Settings())
    table = [line for line in DOCUMENT.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    expected = [["", *known], *rows(known)]
    assert [[cell.strip() for cell in line.strip("|").split("|")] for line in table[: len(expected) + 1]] == [
        expected[0],
        ["---"] * (len(known) + 1),
        *expected[1:],
    ]


def test_every_gateway_but_the_one_for_benchmarks_receives_webhooks() -> None:
    assert GATEWAYS.keys() - {"instant"} == WEBHOOKS.keys()
