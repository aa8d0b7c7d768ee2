"""How `up` and `demo` report progress: a spinner on a terminal, plain lines elsewhere."""

from rich.console import Console
from rich.status import Status
from rich.text import Text

from app.child import ChildFailed
from app.console import safe_lines, safe_text


class ConsoleReporter:
    """Fits `app.up.Reporter`. Use a console of `app.console`: some of the texts are not ours."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._status: Status | None = None

    def step(self, text: str) -> None:
        if not self._console.is_terminal:
            self._console.print(f"  · {safe_text(text)}", style="dim")
        elif self._status is None:
            self._status = self._console.status(Text(safe_text(text), "dim"))
            self._status.start()
        else:
            self._status.update(Text(safe_text(text), "dim"))

    def done(self, what: str, detail: str) -> None:
        self._console.print(Text.assemble("  ", ("✓", "green"), f" {what:<26}", (safe_text(detail), "dim")))

    def note(self, text: str) -> None:
        self._console.print(Text.assemble("  ", ("!", "yellow"), f" {safe_lines(text)}"), soft_wrap=True)

    def stop_spinner(self) -> None:
        """Stop the spinner: nothing is being waited for."""
        if self._status is not None:
            self._status.stop()
            self._status = None

    def child_failed(self, failure: ChildFailed) -> None:
        """Print which process did not start, and the end of its log."""
        self.stop_spinner()
        self._console.print(Text(f"\n✗ {safe_lines(str(failure))}", "bold red"))
        self._console.print(Text(f"the end of {failure.log_path}:", "dim"), soft_wrap=True)
        self._console.print(safe_lines(failure.log_tail or "(empty)"))
