"""`payments dlq`: look at messages that could not be processed, and retry or drop them."""

# ruff: noqa: PLC0415 - as in cli.py: `payments --help` answers at once

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from app.command_line import AsJson, DataDir, confirm, fail, find_settings, readable_errors

if TYPE_CHECKING:
    from app.dlq_desk import DeadLetterDesk

dlq = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Commands that could not be processed.\n\n"
    "Each is kept on the dead-letter topic with its original bytes, key and headers, and the reason. `retry` "
    "publishes it again unchanged: commands are idempotent, so retrying twice moves no money twice.",
)

Names = Annotated[list[str] | None, typer.Argument(metavar="[LETTER]...", help="PARTITION:OFFSET as `list` shows it.")]
Everything = Annotated[bool, typer.Option("--all", help="All that are open.")]
Reason = Annotated[str | None, typer.Option(help="Only those with this reason.")]


@dlq.command("list")
def list_letters(
    with_decided: Annotated[bool, typer.Option("--all", help="Also those that were retried or dropped.")] = False,
    reason: Reason = None,
    limit: Annotated[int, typer.Option(min=1)] = 100,
    as_json: AsJson = False,
    data_dir: DataDir = None,
) -> None:
    """List parked messages, and why they were parked.

    Letters stay until somebody deletes them, if `payments migrate` created the topic; it warns about a topic that keeps
    them only for a limited time.
    """
    with readable_errors():
        raise typer.Exit(
            _desk(data_dir).list_letters(with_decided=with_decided, reason=reason, limit=limit, as_json=as_json)
        )


@dlq.command("show")
def show_letter(letter: Annotated[str, typer.Argument(metavar="LETTER")], data_dir: DataDir = None) -> None:
    """Show one letter with every byte, as JSON."""
    with readable_errors():
        raise typer.Exit(_desk(data_dir).show(letter))


@dlq.command("retry")
def retry_letters(
    letters: Names = None,
    everything: Everything = False,
    reason: Reason = None,
    again: Annotated[
        bool, typer.Option("--again", help="With named letters: also those retried or dropped before.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show which.")] = False,
    data_dir: DataDir = None,
) -> None:
    """Publish letters unchanged to the topic that they came from.

    Letters that were retried or dropped before are left alone, and listed.

    Example: payments dlq retry --all --reason cannot_be_processed
    """
    _require_choice(letters, everything=everything, reason=reason)
    if again and not letters:
        fail("--again needs named letters")
    with readable_errors():
        raise typer.Exit(_desk(data_dir).retry(letters or [], reason=reason, dry_run=dry_run, again=again))


@dlq.command("drop")
def drop_letters(
    why: Annotated[str, typer.Option(help="Kept with the decision.")],
    letters: Names = None,
    everything: Everything = False,
    reason: Reason = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    data_dir: DataDir = None,
) -> None:
    """Decide that nothing will be done. The letters stay on the topic.

    Letters that were retried or dropped before are left as they are, and listed.
    """
    _require_choice(letters, everything=everything, reason=reason)
    if not why.strip():
        fail("--why must say why nothing will be done: it is kept with the decision")
    with readable_errors():
        desk = _desk(data_dir)
        chosen = desk.choose(letters or [], reason=reason)
        wanted = desk.undecided(chosen)
        if not wanted:
            typer.echo("Nothing to drop.")
            raise typer.Exit(1 if chosen else 0)
        if not yes:
            confirm(f"Drop {len(wanted)} of these dead letters? They are not retried then.")
        raise typer.Exit(max(desk.drop(wanted, why=why), int(len(wanted) < len(chosen))))


def _require_choice(letters: list[str] | None, *, everything: bool, reason: str | None) -> None:
    if letters and (everything or reason is not None):
        fail("name letters, or use --all or --reason, not both")
    if not letters and not everything and reason is None:
        fail("name letters, or use --all or --reason")


def _desk(data_dir: Path | None) -> "DeadLetterDesk":
    from app.dlq_desk import DeadLetterDesk

    return DeadLetterDesk(find_settings(data_dir, "PAYMENTS_POSTGRES_URL", "PAYMENTS_KAFKA_BOOTSTRAP"))
