"""`payments relay`: run a relay, show the state of all, and repair what is wrong."""

# ruff: noqa: PLC0415 - as in cli.py: `payments --help` answers at once

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from app.command_line import AsJson, DataDir, confirm, fail, find_settings, read_settings, readable_errors

if TYPE_CHECKING:
    from app.relay_desk import RelayDesk

relay = typer.Typer(
    invoke_without_command=True,
    rich_markup_mode=None,
    help="Publish committed events.\n\n"
    "Without a command this runs a relay: of several, one is active and the others stand by. PAYMENTS_RELAY_SOURCE "
    "sets its source: `wal` (logical replication), or `poll` where that is not available.\n\n"
    "The commands manage relays that run elsewhere.",
)
quarantine = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Events that Kafka refused for good.\n\n"
    "An event too large for its topic, for example. Later events of its payment wait behind it, other payments go on. "
    "Fix the cause and `retry`, or give the event up with `drop`.",
)
relay.add_typer(quarantine, name="quarantine")

Names = Annotated[list[str] | None, typer.Argument(metavar="[EVENT_ID|PAYMENT_ID]...", help="As `list` shows them.")]
Yes = Annotated[bool, typer.Option("--yes", help="Do not ask.")]


@relay.callback()
def run(context: typer.Context) -> None:
    if context.invoked_subcommand is not None:
        return
    from app.processes import run_relay

    run_relay(read_settings())


@relay.command()
def status(as_json: AsJson = False, data_dir: DataDir = None) -> None:
    """Show the relays: source, slot, lag, quarantine, standbys.

    Exits with 1 if something needs a person: a gap, a quarantine, no active relay, log held for nobody.
    """
    with readable_errors():
        raise typer.Exit(_desk(data_dir).status(as_json=as_json))


@relay.command()
def repair(
    everything: Annotated[
        bool, typer.Option("--everything", help="Publish every retained event, not only those without proof.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show and list what would be published.")] = False,
    limit: Annotated[int, typer.Option(min=1, help="How many events without proof are listed.")] = 20,
    timeout: Annotated[float, typer.Option(help="How many seconds to wait for the relay.")] = 300.0,
    data_dir: DataDir = None,
) -> None:
    """Close a gap: publish what has no proof of publication.

    For a relay that stopped because its slot is gone, was moved, or is on another server, or because the publication
    was changed. If Kafka has lost events, only --everything brings them back. The slot is recreated; a polling relay
    goes back to where proof ends. Events may be repeated, none is left out. A running relay does it; if none runs, the
    next one does at its start.
    """
    with readable_errors():
        desk = _desk(data_dir)
        raise typer.Exit(desk.repair(everything=everything, dry_run=dry_run, limit=limit, timeout_seconds=timeout))


@relay.command()
def adopt(data_dir: DataDir = None, timeout: Annotated[float, typer.Option(help="Seconds to wait.")] = 60.0) -> None:
    """Go on past a gap that missed no event.

    Nothing is published again.

    For the way back from Debezium on the same slot: Debezium has published everything up to the slot's position. For
    another PAYMENTS_EVENTS_TOPIC or Kafka cluster, if that is intended and the only reason, and the earlier events are
    not needed there; or if nobody needs the events that Kafka has lost. And after pg_upgrade, if everything was
    published before.
    """
    with readable_errors():
        raise typer.Exit(_desk(data_dir).adopt(timeout_seconds=timeout))


@relay.command()
def replay(
    payment: Annotated[str | None, typer.Option(help="Events of this payment.")] = None,
    since: Annotated[str | None, typer.Option(help="Written since: 2026-01-31T12:00:00Z, or 2h (ago).")] = None,
    until: Annotated[str | None, typer.Option(help="Written before.")] = None,
    type_: Annotated[str | None, typer.Option("--type", help="Like payment.captured.v1.")] = None,
    to: Annotated[str | None, typer.Option(help="Another topic.", show_default="PAYMENTS_EVENTS_TOPIC")] = None,
    rate: Annotated[int, typer.Option(min=1, help="Events a second at most.")] = 500,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show how many.")] = False,
    data_dir: DataDir = None,
) -> None:
    """Publish retained events again.

    Each message has the header `replayed_at`. Events that were not delivered yet are left out, and so are events that
    were dropped from quarantine. The topic must exist. Exits with 1 if no event matches, or if the command was stopped
    before all were published; then it prints how to go on.

    Example: payments relay replay --since 2h --type payment.captured.v1 --to payments.events.replay
    """
    if payment is None and since is None and until is None and type_ is None:
        fail("choose events with --payment, --since, --until or --type; they can be combined")
    with readable_errors():
        desk = _desk(data_dir, "PAYMENTS_KAFKA_BOOTSTRAP")
        wanted = {"payment": payment, "type": type_, "since": since, "until": until}
        raise typer.Exit(desk.replay(wanted, topic=to, rate=rate, dry_run=dry_run))


@quarantine.command("list")
def list_quarantine(
    with_dropped: Annotated[bool, typer.Option("--all", help="Also those that were dropped.")] = False,
    limit: Annotated[int, typer.Option(min=1)] = 100,
    as_json: AsJson = False,
    data_dir: DataDir = None,
) -> None:
    """List the events in quarantine, in order of arrival."""
    with readable_errors():
        raise typer.Exit(_desk(data_dir).list_quarantine(with_dropped=with_dropped, limit=limit, as_json=as_json))


@quarantine.command("show")
def show_quarantine(
    name: Annotated[str, typer.Argument(metavar="EVENT_ID|PAYMENT_ID")], data_dir: DataDir = None
) -> None:
    """Show one event, or all of one payment, with every byte, as JSON."""
    with readable_errors():
        raise typer.Exit(_desk(data_dir).show_quarantine(name))


@quarantine.command("retry")
def retry_quarantine(
    names: Names = None,
    everything: Annotated[bool, typer.Option("--all", help="All of them.")] = False,
    timeout: Annotated[float, typer.Option(help="How many seconds to wait for the relay.")] = 30.0,
    data_dir: DataDir = None,
) -> None:
    """Publish the events of these payments, in order. What Kafka refuses again comes back."""
    if bool(names) == everything:
        fail("name events or payments, or use --all")
    with readable_errors():
        raise typer.Exit(_desk(data_dir).retry(names or [], everything=everything, timeout_seconds=timeout))


@quarantine.command("drop")
def drop_quarantine(
    names: Annotated[list[str], typer.Argument(metavar="EVENT_ID...")],
    why: Annotated[str, typer.Option(help="Kept with the event.")],
    yes: Yes = False,
    data_dir: DataDir = None,
) -> None:
    """Give events up forever: subscribers will never see them. Events that waited behind them are published.

    The events stay in the table, with the reason, and `replay` leaves them out. They stay in the outbox, too: `repair
    --everything`, which publishes all that is retained, tries them again.
    """
    if not why.strip():
        fail("--why must say why subscribers will never see the event: it is kept with the event")
    if not yes:
        confirm(f"Subscribers will never see {len(names)} event(s). Go on?")
    with readable_errors():
        raise typer.Exit(_desk(data_dir).drop(names, why=why))


def _desk(data_dir: Path | None, *also_needs: str) -> "RelayDesk":
    from app.relay_desk import RelayDesk

    return RelayDesk(find_settings(data_dir, "PAYMENTS_POSTGRES_URL", *also_needs))
