"""`payments reconcile`: ask about what is open, compare a day's books, or end an operation by a person's finding."""

# ruff: noqa: PLC0415 - as in cli.py: `payments --help` answers at once

from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated
from uuid import UUID

import typer

from app.command_line import AsJson, DataDir, fail, find_settings, read_payment_id, readable_errors

if TYPE_CHECKING:
    from app.settings import Settings


def reconcile(
    now: Annotated[bool, typer.Option("--now", help="Ask about everything that is open, at once.")] = False,
    payment: Annotated[str | None, typer.Option(help="With --now: only this payment. With --as: the payment.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="With --now: only ask; change nothing.")] = False,
    day: Annotated[
        datetime | None, typer.Option(formats=["%Y-%m-%d"], help="Compare the books of this UTC day instead.")
    ] = None,
    gateway: Annotated[str | None, typer.Option(help="With --day: which gateway.", show_default="the default")] = None,
    operation: Annotated[int | None, typer.Option(help="With --as: the operation's number.")] = None,
    verdict: Annotated[
        str | None, typer.Option("--as", help="succeeded or not-executed: end an operation that needs review.")
    ] = None,
    evidence: Annotated[str | None, typer.Option(help="With --as: how you know; it is stored, and published.")] = None,
    reference: Annotated[
        str | None, typer.Option(help="With --as succeeded: the provider's id of the operation.")
    ] = None,
    amount: Annotated[
        str | None,
        typer.Option(
            help="With --as succeeded: the amount moved, like 12.50 in the payment's currency, if not as requested."
        ),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="With --as: do not ask.")] = False,
    as_json: AsJson = False,
    data_dir: DataDir = None,
) -> None:
    """Ask the providers about everything that is open.

    Workers do this all the time, for each operation when it is due. --now does it at once for everything that nobody
    is working on: operations in doubt, pending or waiting for the payer, and holds past their end. Only a provider's
    answer ends anything. Exits with 1 if anything got no answer or was not asked about.

    --day compares the provider's own list with our books, both ways, and exits with 1 if they differ. Which providers
    offer a list: payments gateways.

    --as ends one operation that needs review by what a person found out, if the provider will never give evidence; it
    needs --payment, --operation and --evidence. Nothing else can be ended this way. It prints what will be booked, and
    asks before it does so.

    Example: payments reconcile --now --dry-run
    """
    _check_options(
        now=now,
        day=day is not None,
        ruling=verdict is not None,
        of_now=payment is not None or dry_run,
        of_day=gateway is not None,
        of_ruling=yes or (operation, evidence, reference, amount) != (None, None, None, None),
    )
    settings = _begin(data_dir)
    wanted = None if payment is None else read_payment_id(payment)
    if day is not None:
        code = _compare(settings, day, gateway, as_json=as_json)
    elif verdict is not None:
        found = operation, evidence, reference, amount
        code = _rule(settings, wanted, verdict, *found, dry_run=dry_run, yes=yes, as_json=as_json)
    else:
        code = _ask(settings, wanted, dry_run=dry_run, as_json=as_json)
    raise typer.Exit(code)


def _check_options(*, now: bool, day: bool, ruling: bool, of_now: bool, of_day: bool, of_ruling: bool) -> None:
    """Check that exactly one of the three was chosen, with only the options that belong to it."""
    if now + day + ruling != 1:
        fail(
            "use --now, to ask about what is open, or --day 2026-01-31, to compare a day's books, or --as, to decide "
            "an operation that needs review"
        )
    if of_ruling and not ruling:
        fail("--operation, --evidence, --reference, --amount and --yes go with --as")
    if of_day and not day:
        fail("--gateway goes with --day")
    if of_now and day:
        fail("--payment and --dry-run go with --now: --day compares all of a day, and changes nothing")


def _begin(data_dir: Path | None) -> "Settings":
    from infra.observability.logs import configure_logs

    settings = find_settings(data_dir, "PAYMENTS_POSTGRES_URL")
    configure_logs("reconcile", as_json=settings.log_json)  # on stderr, so that stdout has only the result
    return settings


def _ask(settings: "Settings", payment_id: UUID | None, *, dry_run: bool, as_json: bool) -> int:
    from app.reconcile import reconcile as reconcile_now

    with readable_errors():
        return reconcile_now(settings, payment_id, dry_run=dry_run, as_json=as_json)


def _compare(settings: "Settings", day: datetime, gateway: str | None, *, as_json: bool) -> int:
    from app.daily_report import report_day

    with readable_errors():
        return report_day(settings, day.date(), gateway, as_json=as_json)


def _rule(
    settings: "Settings",
    payment_id: UUID | None,
    verdict: str,
    operation: int | None,
    evidence: str | None,
    reference: str | None,
    amount: str | None,
    *,
    dry_run: bool,
    yes: bool,
    as_json: bool,
) -> int:
    from app.ruling import Finding, rule

    if payment_id is None or operation is None or evidence is None or dry_run:
        fail("--as needs --payment, --operation and --evidence, and has no --dry-run")
    if as_json and not yes:
        fail("--as with --json cannot ask for confirmation: add --yes")
    with readable_errors():
        finding = Finding(payment_id, operation, verdict, evidence, reference, amount)
        return rule(settings, finding, yes=yes, as_json=as_json)
