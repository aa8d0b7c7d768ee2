"""What `payments up` prints."""

import asyncio
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import typer
from rich.console import Console
from rich.text import Text

from app.child import ChildFailed
from app.command_line import advice_on, error_text, folder_option
from app.console import new_console, safe_lines, safe_text
from app.reporter import ConsoleReporter
from app.stack_file import AlreadyRunning, StackFile
from app.up import Installation, run_until_stopped
from infra.local import LocalServerError

PASSWORD: Final = re.compile(r"(?<=://)([^:/@]*:)[^@/]*(?=@)|([?&]password=)[^&]*")
TO_TRY: Final = "payments send charge --amount 12.50 --currency USD"


def up_here(data_dir: Path) -> int:
    """Run everything until told to stop. Returns the exit code."""
    console = new_console()
    reporter = ConsoleReporter(console)
    where = f"(data and logs in {safe_text(str(data_dir))})"
    title = Text.assemble(("payments", "bold"), " starts everything on this machine ", (where, "dim"))
    console.print(title, soft_wrap=True)
    try:
        with start_errors(console, reporter), StackFile(data_dir) as stack_file:
            asyncio.run(_up(Installation(data_dir, stack_file, reporter), console, reporter))
    except typer.Exit:
        raise
    except Exception as error:
        # From a server named in the environment, which we do not manage, or from the data folder.
        advice = advice_on(error)
        if advice is None and not isinstance(error, OSError):
            raise
        console.print(trouble("\n  ".join(filter(None, (error_text(error), advice)))), soft_wrap=True)
        return 1
    console.print("Everything is stopped.")
    return 0


@contextmanager
def start_errors(console: Console, reporter: ConsoleReporter) -> Iterator[None]:
    """In this block, print why a part could not start, or that everything runs here already, and exit with 1."""
    try:
        yield
        return
    except AlreadyRunning as error:
        console.print(already_running(error), soft_wrap=True)
    except ChildFailed as failure:
        reporter.child_failed(failure)
    except LocalServerError as error:
        console.print(trouble(str(error)), soft_wrap=True)
    finally:
        reporter.stop_spinner()
    raise typer.Exit(1)


async def _up(installation: Installation, console: Console, reporter: ConsoleReporter) -> None:
    started = time.monotonic()

    def on_ready() -> None:
        reporter.stop_spinner()
        after = f" after {time.monotonic() - started:.1f} s. Ctrl-C stops everything.\n"
        console.print(Text.assemble(("Ready", "bold green"), after))
        show_addresses(console, installation.urls, installation.data_dir)

    await run_until_stopped(installation, on_ready)


def without_password(url: str) -> str:
    """A database's URL with its password masked."""
    return PASSWORD.sub(lambda found: f"{found[1] or found[2]}***", url)


def show_addresses(console: Console, urls: dict[str, str], data_dir: Path) -> None:
    """Print the addresses of all parts, and a command to try."""
    http = urls["http"]
    lines = {
        "messages (AsyncAPI)": f"{http}/asyncapi",
        "health, metrics": f"{http}/health/ready  {http}/metrics",
        "provider's books": f"{urls['simulator']}/_sandbox" if "simulator" in urls else "the real provider's",
        "Kafka": urls["kafka"],
        "Postgres": without_password(urls["postgres"]),
        "try": f"{TO_TRY}{folder_option(data_dir)}",
    }
    for name, value in lines.items():
        console.print(f"  {name:<22}{value}", soft_wrap=True)


def trouble(message: str) -> Text:
    """A message about something that went wrong, marked in red."""
    return Text.assemble(("✗", "bold red"), f" {safe_lines(message)}")


def already_running(error: AlreadyRunning) -> Text:
    """The message for a person who starts a second installation in the same folder."""
    if error.stack is None:
        return trouble(f"Another `payments` is just starting or stopping in {error.data_dir}. Wait for it.")
    where = error.stack.urls.get("http", "")
    return trouble(
        f"Everything is running already (process {error.stack.pid}): {where}/asyncapi\n"
        f"  Use it: {TO_TRY}{folder_option(error.data_dir)}\n"
        f"  Stop it: Ctrl-C in its terminal, or kill {error.stack.pid}"
    )
