"""Tables for people. Ids are there to be copied: whole and on one line, even if the line runs over a narrow screen."""

from collections.abc import Iterable, Set
from typing import Final

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from app.console import safe_text

WIDTH_MIN: Final = 160
"""Narrower, the ids would leave nothing to the rest."""


def table_of(names: Iterable[str], rows: Iterable[Iterable[str]], *, whole: Set[str]) -> Table:
    """Rows of cells under these names, whatever is in them; the columns in `whole` are never broken."""
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False)
    for name in names:
        table.add_column(name, no_wrap=name in whole, overflow="fold")
    for row in rows:
        table.add_row(*(Text(safe_text(cell)) for cell in row))
    return table


def print_wide(console: Console, table: Table) -> None:
    """Print it as wide as it has to be."""
    Console(file=console.file, width=max(console.width, WIDTH_MIN)).print(table)
