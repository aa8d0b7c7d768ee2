"""The demo's output: a story line by line, live numbers below it, tables at the end."""

import asyncio
import time
from collections.abc import Iterable
from typing import Final

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from app.console import safe_text
from app.demo.books import Books
from app.demo.orders import STORIES, TROUBLED
from app.demo.tally import Check, DemoTally, percentile
from domain.money import Money

REFRESH_SECONDS: Final = 0.1
PLAIN_LINE_SECONDS: Final = 2.0
COLOURS: Final = {"declined": "yellow", "command_rejected": "yellow", "missing": "red"}
LIVE_WIDTH: Final = 98
KINDS: Final = ("charge", "authorize", "capture", "void", "refund")
GOOD: Final = ("captured", "authorized", "voided", "refunded")


class Screen:
    """Prints the demo. `tell` and `say` take rich markup, so callers escape every text that is not the demo's own."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._started = time.monotonic()
        self._tally: DemoTally | None = None
        self._total = 0

    def tell(self, text: str) -> None:
        """One line of the story, with its time."""
        seconds = time.monotonic() - self._started
        self.say(f"[dim]{seconds:5.1f} s[/]  {text}")

    def say(self, text: str) -> None:
        # Lines are not wrapped in a file or a pipe.
        self.console.print(Text.from_markup(text, emoji=False), soft_wrap=not self.console.is_terminal)

    def heading(self, text: str) -> None:
        self.console.print(Text(f"\n{text}", "bold"))

    async def follow(self, tally: DemoTally, total: int) -> None:
        """Show the progress until cancelled."""
        self._tally, self._total = tally, total
        if self.console.is_terminal:
            with Live(get_renderable=self._live, console=self.console, refresh_per_second=1 / REFRESH_SECONDS):
                await asyncio.Event().wait()
        while True:
            await asyncio.sleep(PLAIN_LINE_SECONDS)
            self.tell(self._numbers(tally))

    def _live(self) -> Panel:
        assert self._tally is not None, "followed from now on"
        tally = self._tally
        grid = Table.grid(padding=(0, 2, 0, 0))
        grid.add_row("sent", ProgressBar(total=self._total, completed=tally.sent, width=40), self._of(tally.sent))
        grid.add_row(
            "answered", ProgressBar(total=tally.deliveries, completed=tally.answered, width=40), self._answered(tally)
        )
        results = Text.from_markup(f"results   {_counts(tally)}")
        title = f"{tally.in_flight} in flight"
        return Panel(Group(grid, results), title=title, title_align="left", box=box.ROUNDED, width=LIVE_WIDTH)

    def _of(self, sent: int) -> str:
        return f"{sent:,} of {self._total:,} messages"

    def _answered(self, tally: DemoTally) -> str:
        return f"{tally.answered:,} of {tally.deliveries:,} deliveries"

    def _numbers(self, tally: DemoTally) -> str:
        parts = [f"sent {self._of(tally.sent)}", f"answered {tally.answered:,}", f"in flight {tally.in_flight}"]
        return f"[dim]{', '.join(parts)}[/]"

    # --- at the end -------------------------------------------------------------------------------------------------

    def show_commands(self, tally: DemoTally) -> None:
        """Commands by type and result."""
        table = _table("command", "sent", "succeeded", "declined", "rejected")
        for kind in (kind for kind in KINDS if kind in tally.by_kind()):
            counts = tally.by_kind()[kind]
            good = sum(counts[word] for word in GOOD)
            table.add_row(
                kind, f"{counts.total():,}", f"{good:,}", f"{counts['declined']:,}", f"{counts['command_rejected']:,}"
            )
        self.console.print(table)

    def show_troubles(self, tally: DemoTally, unreadable: int, parked: int) -> None:
        """The faults and special cases, and the results of their commands."""
        table = _table("faults and special cases", "commands", "results")
        table.columns[2].justify = "left"
        by_story = tally.by_story()
        for story in TROUBLED:
            if story in by_story:
                table.add_row(story, f"{by_story[story]['commands']:,}", _outcome(story, by_story[story]))
        if unreadable:
            table.add_row("unreadable message", f"{unreadable:,}", f"{parked:,} kept in the dead-letter topic")
        self.console.print(table)

    def show_latency(self, tally: DemoTally) -> None:
        """Latency from sending a command to reading its result."""
        table = _table("from command to result", "commands", "p50", "p95", "p99", "slowest")
        for name, undisturbed in (("without fault, payer or crash", True), ("all", False)):
            seconds = tally.seconds(undisturbed=undisturbed)
            marks = (percentile(seconds, 0.5), percentile(seconds, 0.95), percentile(seconds, 0.99), *seconds[-1:])
            table.add_row(name, f"{len(seconds):,}", *(_duration(each) for each in marks))
        self.console.print(table)

    def show_books(self, books: Books) -> None:
        """The money in our ledger and in the providers' books."""
        table = _table("money", "our ledger", "provider's books", "difference")
        for each in books.currencies:
            rows = (
                ("captured", each.ours.captured, each.theirs.captured),
                ("refunded", each.ours.refunded, each.theirs.refunded),
                ("disputed", each.ours.disputed, each.theirs.disputed),
            )
            for word, ours, theirs in rows:
                if word == "disputed" and not ours and not theirs:
                    continue
                colour = "green" if ours == theirs else "bold red"
                difference = Text(_money(theirs - ours, each.currency), colour)
                table.add_row(
                    f"{each.gateway} {each.currency} {word}",
                    _money(ours, each.currency),
                    _money(theirs, each.currency),
                    difference,
                )
        self.console.print(table)

    def show_checks(self, checks: Iterable[Check]) -> None:
        for check in checks:
            mark = ("✓", "green") if check.held else ("✗", "bold red")
            line = Text.assemble("  ", mark, f" {check.promise}: ", (safe_text(check.found), "dim"))
            self.console.print(line, soft_wrap=True)


def _table(first: str, *others: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False)
    table.add_column(first, no_wrap=True)
    for name in others:
        table.add_column(name, justify="right")
    return table


def _counts(tally: DemoTally) -> str:
    words = (f"[{COLOURS.get(word, 'green')}]{count:,}[/] {_plain(word)}" for word, count in tally.results.items())
    return "  ".join(words)


def _outcome(story: str, counts: dict[str, int]) -> str:
    again = f"; {counts['again']} repeats absorbed" if counts["again"] else ""
    words = [f"{count} {_plain(word)}" for word, count in counts.items() if word not in ("commands", "again") and count]
    once = " once" if set(counts) == {"commands", "again", "captured"} else ""
    assert story in STORIES, "only stories that were told have counts"
    return f"{', '.join(words)}{once}{again}"


def _plain(word: str) -> str:
    return "rejected" if word == "command_rejected" else word


def _duration(seconds: float) -> str:
    return f"{seconds * 1000:,.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


def _money(minor: int, currency: str) -> str:
    return str(Money(minor, currency)).removeprefix(f"{currency} ")
