"""`payments up`, as a person sees it."""

import asyncio
import time
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from app.child import ChildFailed
from app.command_line import advice_on
from app.reporter import ConsoleReporter
from app.stack_file import AlreadyRunning, StackFile
from app.up import Installation, run_until_stopped
from infra.local import LocalServerError


def up_here(data_dir: Path) -> int:
    """Run everything until told to stop; the exit code."""
    console = Console()
    reporter = ConsoleReporter(console)
    console.print(
        f"[bold]payments[/] starts everything on this machine [dim](data and logs in {data_dir})[/]", soft_wrap=True
    )
    try:
        with StackFile(data_dir) as stack_file:
            asyncio.run(_up(Installation(data_dir, stack_file, reporter), console, reporter))
    except AlreadyRunning as error:
        console.print(already_running(error), highlight=False)
        return 1
    except ChildFailed as failure:
        reporter.child_failed(failure)
        return 1
    except LocalServerError as error:
        console.print(f"[bold red]✗[/] {error}", highlight=False)
        return 1
    except Exception as error:
        # A server of the environment's, for which we do not care.
        advice = advice_on(error)
        if advice is None:
            raise
        console.print(f"[bold red]✗[/] {type(error).__name__}: {escape(str(error))}\n  {advice}", highlight=False)
        return 1
    finally:
        reporter.rest()
    console.print("Everything is stopped.")
    return 0


async def _up(installation: Installation, console: Console, reporter: ConsoleReporter) -> None:
    started = time.monotonic()

    def on_ready() -> None:
        reporter.rest()
        console.print(f"[bold green]Ready[/] after {time.monotonic() - started:.1f} s. Ctrl-C stops everything.\n")
        show_addresses(console, installation.urls)

    await run_until_stopped(installation, on_ready)


def show_addresses(console: Console, urls: dict[str, str]) -> None:
    """Where to look, and what to try."""
    http = urls["http"]
    lines = {
        "messages (AsyncAPI)": f"{http}/asyncapi",
        "health, metrics": f"{http}/health/ready  {http}/metrics",
        "provider's books": f"{urls['simulator']}/_sandbox" if "simulator" in urls else "the real provider's",
        "Kafka": urls["kafka"],
        "Postgres": urls["postgres"],
        "try": "payments send charge --amount 12.50 --currency USD",
    }
    for name, value in lines.items():
        console.print(f"  {name:<22}{value}", highlight=False, soft_wrap=True)


def already_running(error: AlreadyRunning) -> str:
    """What to tell somebody who starts a second one."""
    if error.stack is None:
        return f"[bold red]✗[/] Another `payments` is just starting or stopping in {error.data_dir}. Wait for it."
    where = error.stack.urls.get("http", "")
    return (
        f"[bold red]✗[/] Everything is running already (process {error.stack.pid}): {where}/asyncapi\n"
        f"  Use it: payments send charge --amount 12.50 --currency USD\n"
        f"  Stop it: Ctrl-C in its terminal, or kill {error.stack.pid}"
    )
