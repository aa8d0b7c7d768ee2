"""The command line, `payments`: run processes or everything at once, send a payment, show one, run the demo.

Exit codes: 0 done, 1 trouble (the message says what to do), 2 declined or rejected, 3 no result in time.
"""

# ruff: noqa: PLC0415 - each command imports what it needs: `payments --help` answers at once; Typer passes
# by name

import gc
import logging
from pathlib import Path
from typing import Annotated

import typer

from app.command_line import (
    AsJson,
    DataDir,
    default_data_dir,
    fail,
    find_settings,
    read_payment_id,
    read_service_settings,
    read_settings,
    readable_errors,
)
from app.dlq_commands import dlq
from app.reconcile_commands import reconcile
from app.relay_commands import relay
from app.send_commands import send

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="A payment service that moves money exactly once: commands in on Kafka, results out.\n\n"
    "First steps: `payments demo` shows everything; `payments up` starts everything on this machine; "
    "`payments send charge --amount 12.50 --currency USD` pays.",
    epilog="Settings are environment variables (PAYMENTS_…, see app/settings.py). "
    "Exit codes: 0 done, 1 trouble, 2 declined or rejected, 3 no result in time.",
)
app.add_typer(send, name="send")
app.add_typer(relay, name="relay")
app.add_typer(dlq, name="dlq")


@app.callback()
def _begin() -> None:
    # Commands print their own errors and advice; only the long-running processes log what libraries report.
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)


# --- run it on this machine -------------------------------------------------------------------------------------------


@app.command()
def up(data_dir: DataDir = None) -> None:
    """Start everything on this machine, until Ctrl-C.

    Kafka, Postgres, Valkey, provider simulators, worker, relay and HTTP, each in its own process.

    A URL in the environment (PAYMENTS_POSTGRES_URL, PAYMENTS_KAFKA_BOOTSTRAP, PAYMENTS_REDIS_URL) replaces that part;
    with PAYMENTS_STRIPE_API_BASE no provider is simulated. While it runs, stack.json in the data folder has all
    addresses.
    """
    from app.up_report import up_here

    read_settings()
    raise typer.Exit(up_here(data_dir or default_data_dir()))


@app.command()
def demo(
    orders: Annotated[int, typer.Option(min=1, help="How many orders to send.")] = 400,
    seed: Annotated[int | None, typer.Option(help="Repeats a stream of orders.", show_default="random")] = None,
    stay: Annotated[bool, typer.Option("--stay", help="Leave everything running at the end, until Ctrl-C.")] = False,
    data_dir: Annotated[
        Path | None,
        typer.Option(
            envvar="PAYMENTS_DATA_DIR",
            file_okay=False,
            help="Folder for the demo's data; emptied first.",
            show_default=".local",
        ),
    ] = None,
) -> None:
    """See it work: orders, faults, a crash, equal books.

    Sends real orders through real servers, then compares our books with the provider simulator's own.

    Exits with 0 only if every command has its one result and the books agree to the last cent.
    """
    from app.demo.run import run_demo

    folder = (data_dir or default_data_dir()) / "demo"
    raise typer.Exit(run_demo(folder, orders=orders, seed=seed, stay=stay))


# --- use it -----------------------------------------------------------------------------------------------------------


@app.command()
def show(
    payment_id: Annotated[str, typer.Argument(metavar="PAYMENT_ID", help="The payment's UUID.")],
    as_json: AsJson = False,
    data_dir: DataDir = None,
) -> None:
    """Show one payment: state, amounts, operations, events."""
    from app.show import show_payment

    settings = find_settings(data_dir, "PAYMENTS_POSTGRES_URL")
    with readable_errors():
        raise typer.Exit(show_payment(settings, read_payment_id(payment_id), as_json=as_json))


@app.command("list")
def list_(
    status: Annotated[str | None, typer.Option(help="Like captured, authorized, failed, processing.")] = None,
    gateway: Annotated[str | None, typer.Option(help="Like stripe.")] = None,
    currency: Annotated[str | None, typer.Option(help="Of this currency (ISO 4217).")] = None,
    amount_min: Annotated[str | None, typer.Option("--min", help="At least this amount; needs --currency.")] = None,
    amount_max: Annotated[str | None, typer.Option("--max", help="At most this amount; needs --currency.")] = None,
    since: Annotated[
        str | None, typer.Option(help="Created since 2026-01-31 (in UTC), 2026-01-31T12:00:00Z, 2h (ago).")
    ] = None,
    until: Annotated[str | None, typer.Option(help="Created before, written in the same way.")] = None,
    customer: Annotated[str | None, typer.Option(help="Of this customer; no other filter.")] = None,
    order: Annotated[str | None, typer.Option(help="For this order; no other filter.")] = None,
    stuck: Annotated[
        str | None,
        typer.Option(
            metavar="AGE",
            help="Without an outcome for this long (15m, 2h, 7d), and all that need review; no other filter.",
        ),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, max=200, help="How many at once.")] = 20,
    cursor: Annotated[str | None, typer.Option(help="Where the previous page ended.")] = None,
    as_json: AsJson = False,
    data_dir: DataDir = None,
) -> None:
    """List payments, newest first.

    A payment whose charge or authorize was rejected is `created`: it has no amount, gateway or order.

    Examples: payments list --status captured --currency USD --min 100 --since 2h, and payments list --stuck 1h
    """
    from app.listing import Wanted, list_payments

    wanted = Wanted(
        status=status,
        gateway=gateway,
        currency=currency,
        amount_min=amount_min,
        amount_max=amount_max,
        since=since,
        until=until,
        customer=customer,
        order=order,
        stuck=stuck,
        limit=limit,
        cursor=cursor,
    )
    settings = find_settings(data_dir, "PAYMENTS_POSTGRES_URL")
    with readable_errors():
        raise typer.Exit(list_payments(settings, wanted, as_json=as_json))


@app.command()
def check(
    since: Annotated[
        str | None, typer.Option(help="Only what changed since 2026-01-31 (in UTC), 2026-01-31T12:00:00Z, 2h (ago).")
    ] = None,
    as_json: AsJson = False,
    data_dir: DataDir = None,
) -> None:
    """Check that payments' amounts match the ledger.

    Exits with 1 if any differs. `payments http` checks changes every hour, and everything once a day; its metric is
    payments_ledger_differences. --since goes back as far as events are retained."""
    from app.check import check_payments

    settings = find_settings(data_dir, "PAYMENTS_POSTGRES_URL")
    with readable_errors():
        raise typer.Exit(check_payments(settings, since, as_json=as_json))


app.command()(reconcile)


@app.command()
def gateways(as_json: AsJson = False, data_dir: DataDir = None) -> None:
    """What each gateway can do, and what is refused."""
    from app.gateways import list_gateways

    settings = find_settings(data_dir, "PAYMENTS_GATEWAYS", or_defaults=True)
    with readable_errors():
        raise typer.Exit(list_gateways(settings, as_json=as_json))


# --- its processes ----------------------------------------------------------------------------------------------------


@app.command()
def worker() -> None:
    """Read commands, call gateways, save outcomes.

    Any number of workers may run."""
    from app.processes import run_worker

    run_worker(read_service_settings(for_calls=True))


@app.command()
def http(
    host: Annotated[str | None, typer.Option(help="Address to listen on.", show_default="PAYMENTS_HTTP_HOST")] = None,
    port: Annotated[
        int | None, typer.Option(min=1, max=65_535, help="Port to listen on.", show_default="PAYMENTS_HTTP_PORT")
    ] = None,
) -> None:
    """Webhooks, health, metrics, the AsyncAPI page.

    Serves the metrics of all processes, and does the hourly maintenance."""
    from app.processes import run_http

    settings = read_service_settings(for_calls=False)
    given = {"http_host": host, "http_port": port}
    run_http(settings.model_copy(update={name: value for name, value in given.items() if value is not None}))


@app.command()
def sandbox(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65_535, help="Port to listen on.")] = 8090,
    state_file: Annotated[
        Path | None, typer.Option(help="Keeps books and undelivered webhooks across restarts.")
    ] = None,
    webhooks_to: Annotated[
        str | None, typer.Option(help="Send webhooks here, say http://127.0.0.1:8080/webhooks.", show_default="none")
    ] = None,
) -> None:
    """Simulate Stripe, PayPal, VNPay and MoMo at one address.

    Prints the settings that make the service use it, for the environment of all its processes. Webhooks are signed
    according to the simulator's own settings, so --webhooks-to needs PAYMENTS_STRIPE_WEBHOOK_SECRETS (the first
    signs) and PAYMENTS_PAYPAL_WEBHOOK_ID, the same as the service's."""
    from app.processes import run_sandbox
    from app.sandbox import check_sandbox, introduce

    settings = read_settings()
    with readable_errors():
        check_sandbox(settings, host, port, state_file=state_file, webhooks_to=webhooks_to)
    introduce(settings, host, port, webhooks_to=webhooks_to)
    run_sandbox(settings, host, port, state_file=state_file, webhooks_to=webhooks_to)


@app.command()
def migrate(
    to: Annotated[str, typer.Option(metavar="REVISION", help="To this revision of the schema.")] = "head",
    down: Annotated[bool, typer.Option("--down", help="Back to --to; dropped tables lose their data.")] = False,
    data_dir: DataDir = None,
) -> None:
    """Prepare the schema, the topics, the partitions.

    Does nothing if they are already as this version needs them. With --to, only the schema: topics and partitions are
    created for the newest one.

    Example, back to the first revision, dropping all that later ones created: payments migrate --down --to 0001
    """
    import asyncio

    from app import processes
    from infra.postgres import migrate as schema

    settings = find_settings(data_dir, "PAYMENTS_POSTGRES_URL", or_defaults=True)
    if not to:  # Perhaps from a variable that is not set.
        fail("--to is empty: write a revision, or leave it out")
    if down and to == "head":
        fail(
            "--down needs --to REVISION, the revision to go back to (base is an empty database: all payments are lost)"
        )
    with readable_errors():
        if to != "head":
            now = (schema.downgrade if down else schema.upgrade)(settings.postgres_url, to)
            typer.echo(f"The schema is at {now}.")
            return
        asyncio.run(processes.prepare(settings))
    typer.echo("The schema is at head; topics and partitions are there.")


@app.command()
def maintain(data_dir: DataDir = None) -> None:
    """Run maintenance once: partitions, old webhooks.

    `payments http` does it hourly."""
    import asyncio

    from app.maintenance import maintain_once

    settings = find_settings(data_dir, "PAYMENTS_POSTGRES_URL", or_defaults=True)
    with readable_errors():
        report = asyncio.run(maintain_once(settings))
    typer.echo(f"{len(report.made)} partitions made, {len(report.dropped)} dropped, {report.moved_rows} rows moved.")
    for reason in report.kept_because:
        typer.echo(f"Old partitions are kept: {reason}.")
    if report.failed:
        fail("\n".join(f"Left undone: {each}." for each in report.failed))


@app.command()
def asyncapi() -> None:
    """Print the AsyncAPI document.

    It has every message that the service reads and writes, with examples."""
    from handlers.messages.asyncapi import build_document

    with readable_errors():
        typer.echo(build_document(), nl=False)


def main() -> None:
    """The entry point."""
    # Imported modules live until the end: collecting garbage among them takes a tenth of every command's start.
    gc.set_threshold(300_000, 50, 100)
    # Typer exits with 2 on wrong usage, which here means that a payment was refused. Its UsageError is reached through
    # a subclass: Typer 0.29 vendors click as typer._click, so there is no public name.
    usage_error = typer.BadParameter.__base__
    assert usage_error is not None, "BadParameter is one kind of UsageError"
    usage_error.exit_code = 1  # type: ignore[attr-defined]  # no public name: `type` is all that mypy knows
    app(prog_name="payments")


if __name__ == "__main__":
    main()
