"""Tables for people. Ids are there to be copied: whole and on one line, even if the line runs over a narrow screen."""

from collections.abc import Iterable, Set
from typing import Final

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from app.console import safe_text

WIDTH_MIN: Final = 160
"""In a narrower table the ids would leave no room for the other columns."""
WIDTH_MAX: Final = 10_000
"""No row is longer: a key or an id has at most 255 characters."""


def table_of(names: Iterable[str], rows: Iterable[Iterable[str]], *, whole: Set[str]) -> Table:
    """Rows of cells under these names, whatever is in them; the columns in `whole` are never broken."""
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False)
    cells = [[Text(safe_text(cell)) for cell in row] for row in rows]
    for number, name in enumerate(names):
        is_whole = name in whole
        width = max((row[number].cell_len for row in cells), default=0) if is_whole else None
        table.add_column(name, no_wrap=is_whole, min_width=width, overflow="fold")
    for row in cells:
        table.add_row(*row)
    return table


def print_wide(console: Console, table: Table) -> None:
    """Print the table as wide as its unbreakable columns need, whatever the screen's width."""
    needed = Measurement.get(console, console.options.update(max_width=WIDTH_MAX), table).minimum
    Console(file=console.file, width=max(console.width, WIDTH_MIN, needed)).print(table)
