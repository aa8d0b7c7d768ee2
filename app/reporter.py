"""How `up` and `demo` tell a person what they do: a spinner where there is a terminal, plain lines where not."""

from rich.console import Console
from rich.status import Status

from app.child import ChildFailed


class ConsoleReporter:
    """Fits `app.up.Reporter`."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._status: Status | None = None

    def step(self, text: str) -> None:
        if not self._console.is_terminal:
            self._console.print(f"  · {text}", style="dim", highlight=False)
        elif self._status is None:
            self._status = self._console.status(f"[dim]{text}")
            self._status.start()
        else:
            self._status.update(f"[dim]{text}")

    def done(self, what: str, detail: str) -> None:
        self._console.print(f"  [green]✓[/] {what:<26}[dim]{detail}", highlight=False)

    def note(self, text: str) -> None:
        self._console.print(f"  [yellow]![/] {text}", highlight=False, soft_wrap=True)

    def rest(self) -> None:
        """End the spinner: nothing is being waited for."""
        if self._status is not None:
            self._status.stop()
            self._status = None

    def child_failed(self, failure: ChildFailed) -> None:
        """Say which process did not come up, and show the end of its log."""
        self.rest()
        self._console.print(f"\n[bold red]✗ {failure}[/]\n[dim]the end of {failure.log_path}:[/]", highlight=False)
        self._console.print(failure.log_tail or "(empty)", markup=False, highlight=False)
