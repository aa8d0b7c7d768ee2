"""The command line, `payments`: run the processes, run everything at once, send a payment, look at one, see the demo.

Exit codes: 0 done, 1 trouble (the message says what to do), 2 declined or rejected, 3 no result in time.
"""

# ruff: noqa: PLC0415 - each command imports what it needs: `payments --help` answers at once; Typer passes
# by name

import gc
import logging
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from app.command_line import (
    AsJson,
    DataDir,
    default_data_dir,
    fail,
    find_settings,
    no_nan,
    read_service_settings,
    read_settings,
    readable_errors,
)
from app.dlq_commands import dlq
from app.relay_commands import relay

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
send = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Send one command and wait for its result.\n\n"
    "Finds the servers by the environment or, without, those of a running `payments up`.",
)
app.add_typer(send, name="send")
app.add_typer(relay, name="relay")
app.add_typer(dlq, name="dlq")


@app.callback()
def _begin() -> None:
    # A command says itself what is amiss, and what to do; a process has the libraries told in its log.
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)


PaymentArgument = Annotated[str, typer.Argument(metavar="PAYMENT_ID", help="The payment's UUID.")]
KnownPayment = Annotated[str, typer.Option("--payment-id", help="The payment's UUID, from its charge or authorize.")]
NewPayment = Annotated[str | None, typer.Option("--payment-id", help="A UUID of yours.", show_default="a new one")]
Amount = Annotated[str | None, typer.Option(help="Like 12.50, of --currency.")]
PartAmount = Annotated[str | None, typer.Option(help="Like 12.50; needs --currency.")]
AmountMinor = Annotated[int | None, typer.Option(help="In minor units instead: 1250 is USD 12.50.")]
Currency = Annotated[str, typer.Option(help="ISO 4217.")]
SameCurrency = Annotated[str | None, typer.Option(help="ISO 4217; checked against the payment's.")]
PaymentMethod = Annotated[
    str, typer.Option(help="The provider's token. Try pm_card_visa_chargeDeclined, pm_sandbox_lost_answer.")
]
OrderId = Annotated[str | None, typer.Option(help="Your order.", show_default="made from the payment id")]
OffSession = Annotated[
    bool, typer.Option("--off-session", help="The payer is away: decline where they would have to act.")
]
CustomerId = Annotated[str | None, typer.Option(help="Your customer.")]
Gateway = Annotated[str | None, typer.Option(help="Which gateway.", show_default="the service's default")]
IdempotencyKey = Annotated[
    str | None,
    typer.Option(help="Names this request: the same again moves nothing.", show_default="a new one"),
]
AsMessage = Annotated[bool, typer.Option("--json", help="The result as JSON, the message as it came.")]
Wait = Annotated[bool, typer.Option("--wait/--no-wait", help="Wait for the result.")]
Timeout = Annotated[float, typer.Option(min=0, callback=no_nan, help="How many seconds to wait.")]


# --- run it on this machine -------------------------------------------------------------------------------------------


@app.command()
def up(data_dir: DataDir = None) -> None:
    """Start everything on this machine, until Ctrl-C.

    Kafka, Postgres, Valkey, a provider simulator, worker, relay and HTTP, each a process of its own.

    A URL in the environment (PAYMENTS_POSTGRES_URL, PAYMENTS_KAFKA_BOOTSTRAP, PAYMENTS_REDIS_URL,
    PAYMENTS_STRIPE_API_BASE) takes the place of that part. While it runs, stack.json in the data folder says where
    everything is.
    """
    from app.up_command import up_here

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
            help="For this demo's data, emptied first.",
            show_default=".local",
        ),
    ] = None,
) -> None:
    """See it work: orders, faults, a crash, equal books.

    Real orders through real servers; at the end our books against the provider simulator's own.

    Exits with 0 only if every command has its one result and the books agree to the last cent.
    """
    from app.demo.run import run_demo

    folder = (data_dir or default_data_dir()) / "demo"
    raise typer.Exit(run_demo(folder, orders=orders, seed=seed, stay=stay))


# --- use it -----------------------------------------------------------------------------------------------------------


@send.command("charge")
def send_charge(
    amount: Amount = None,
    amount_minor: AmountMinor = None,
    currency: Currency = "USD",
    payment_method: PaymentMethod = "pm_card_visa",
    payment_id: NewPayment = None,
    order_id: OrderId = None,
    customer_id: CustomerId = None,
    off_session: OffSession = False,
    gateway: Gateway = None,
    idempotency_key: IdempotencyKey = None,
    wait: Wait = True,
    timeout: Timeout = 30.0,
    as_json: AsMessage = False,
    data_dir: DataDir = None,
) -> None:
    """Take money now.

    Example: payments send charge --amount 12.50 --currency USD
    """
    fields = {
        "amount_minor": _required_amount(amount, amount_minor, currency),
        "currency": currency,
        "payment_method": payment_method,
        "order_id": order_id,
        "customer_id": customer_id,
        "off_session": off_session or None,
        "gateway": gateway,
    }
    _send("charge", payment_id, idempotency_key, fields, wait=wait, timeout=timeout, as_json=as_json, data_dir=data_dir)


@send.command("authorize")
def send_authorize(
    amount: Amount = None,
    amount_minor: AmountMinor = None,
    currency: Currency = "USD",
    payment_method: PaymentMethod = "pm_card_visa",
    payment_id: NewPayment = None,
    order_id: OrderId = None,
    customer_id: CustomerId = None,
    off_session: OffSession = False,
    gateway: Gateway = None,
    idempotency_key: IdempotencyKey = None,
    wait: Wait = True,
    timeout: Timeout = 30.0,
    as_json: AsMessage = False,
    data_dir: DataDir = None,
) -> None:
    """Reserve money, to be captured or voided later.

    Example: payments send authorize --amount 80 --currency EUR
    """
    fields = {
        "amount_minor": _required_amount(amount, amount_minor, currency),
        "currency": currency,
        "payment_method": payment_method,
        "order_id": order_id,
        "customer_id": customer_id,
        "off_session": off_session or None,
        "gateway": gateway,
    }
    _send(
        "authorize", payment_id, idempotency_key, fields, wait=wait, timeout=timeout, as_json=as_json, data_dir=data_dir
    )


@send.command("capture")
def send_capture(
    payment_id: KnownPayment,
    amount: PartAmount = None,
    amount_minor: AmountMinor = None,
    currency: SameCurrency = None,
    idempotency_key: IdempotencyKey = None,
    wait: Wait = True,
    timeout: Timeout = 30.0,
    as_json: AsMessage = False,
    data_dir: DataDir = None,
) -> None:
    """Collect what was authorized; without an amount all of it.

    Example: payments send capture --payment-id 5d2f6a0e-6f0e-4a57-9b1c-1f2d3c4b5a69 --amount 30 --currency EUR
    """
    fields = {"amount_minor": _amount(amount, amount_minor, currency), "currency": currency}
    _send(
        "capture", payment_id, idempotency_key, fields, wait=wait, timeout=timeout, as_json=as_json, data_dir=data_dir
    )


@send.command("void")
def send_void(
    payment_id: KnownPayment,
    idempotency_key: IdempotencyKey = None,
    wait: Wait = True,
    timeout: Timeout = 30.0,
    as_json: AsMessage = False,
    data_dir: DataDir = None,
) -> None:
    """Release what was authorized and not captured.

    Example: payments send void --payment-id 5d2f6a0e-6f0e-4a57-9b1c-1f2d3c4b5a69
    """
    _send("void", payment_id, idempotency_key, {}, wait=wait, timeout=timeout, as_json=as_json, data_dir=data_dir)


@send.command("refund")
def send_refund(
    payment_id: KnownPayment,
    amount: PartAmount = None,
    amount_minor: AmountMinor = None,
    currency: SameCurrency = None,
    idempotency_key: IdempotencyKey = None,
    wait: Wait = True,
    timeout: Timeout = 30.0,
    as_json: AsMessage = False,
    data_dir: DataDir = None,
) -> None:
    """Return captured money; without an amount all of it.

    Example: payments send refund --payment-id 5d2f6a0e-6f0e-4a57-9b1c-1f2d3c4b5a69 --amount 2.50 --currency USD
    """
    fields = {"amount_minor": _amount(amount, amount_minor, currency), "currency": currency}
    _send("refund", payment_id, idempotency_key, fields, wait=wait, timeout=timeout, as_json=as_json, data_dir=data_dir)


@app.command()
def show(
    payment_id: PaymentArgument,
    as_json: AsJson = False,
    data_dir: DataDir = None,
) -> None:
    """One payment: state, amounts, operations, events."""
    from app.show import show_payment

    settings = find_settings(data_dir, "PAYMENTS_POSTGRES_URL")
    with readable_errors():
        raise typer.Exit(show_payment(settings, _uuid(payment_id), as_json=as_json))


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
    customer: Annotated[str | None, typer.Option(help="Of this customer; stands alone.")] = None,
    order: Annotated[str | None, typer.Option(help="For this order; stands alone.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=200, help="How many at once.")] = 20,
    cursor: Annotated[str | None, typer.Option(help="Where the page before ended.")] = None,
    as_json: AsJson = False,
    data_dir: DataDir = None,
) -> None:
    """Payments, newest first.

    Example: payments list --status captured --currency USD --min 100 --since 2h
    """
    from app.show import Wanted, list_payments

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
        limit=limit,
        cursor=cursor,
    )
    settings = find_settings(data_dir, "PAYMENTS_POSTGRES_URL")
    with readable_errors():
        raise typer.Exit(list_payments(settings, wanted, as_json=as_json))


@app.command()
def reconcile(
    now: Annotated[bool, typer.Option("--now", help="Ask about everything that is open, at once.")] = False,
    payment: Annotated[str | None, typer.Option(help="With --now: only of this payment. With --as: whose.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="With --now: only ask; change nothing.")] = False,
    day: Annotated[
        datetime | None, typer.Option(formats=["%Y-%m-%d"], help="Compare the books of this UTC day instead.")
    ] = None,
    gateway: Annotated[str | None, typer.Option(help="With --day: whose.", show_default="the default")] = None,
    operation: Annotated[int | None, typer.Option(help="With --as: the operation's number.")] = None,
    verdict: Annotated[
        str | None, typer.Option("--as", help="succeeded or not-executed: end an operation that needs review.")
    ] = None,
    evidence: Annotated[str | None, typer.Option(help="With --as: how you know; it is kept, and published.")] = None,
    reference: Annotated[str | None, typer.Option(help="With --as succeeded: the provider's id of it.")] = None,
    amount: Annotated[
        str | None,
        typer.Option(
            help="With --as succeeded: what it moved, like 12.50 in the payment's currency, if not what was asked for."
        ),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="With --as: do not ask.")] = False,
    as_json: AsJson = False,
    data_dir: DataDir = None,
) -> None:
    """What the providers say of all that is open.

    Workers do this all along, each operation at its time. --now does it at once for all that nobody is working on: what
    is in doubt, pending, or waits for the payer, and holds past their end. Only a provider's word ends anything. Exits
    with 1 if anything got no answer or was not asked about.

    --day compares the provider's own list with our books, both ways, and exits with 1 if they differ. Which providers
    offer a list: payments gateways.

    --as ends one operation that needs review as a person found out, where the provider will never tell: with --payment,
    --operation and --evidence. Nothing else can be ended so. It says what will be booked, and asks before it does that.

    Example: payments reconcile --now --dry-run
    """
    from app.daily_report import report_day
    from app.reconcile_command import reconcile as reconcile_now
    from app.ruling_command import Finding, rule
    from infra.observability.logs import configure_logs

    if now + (day is not None) + (verdict is not None) != 1:
        fail(
            "say --now, to ask about what is open, or --day 2026-01-31, to compare a day's books, or --as, to decide "
            "an operation that needs review"
        )
    if verdict is None and (yes or (operation, evidence, reference, amount) != (None, None, None, None)):
        fail("--operation, --evidence, --reference, --amount and --yes go with --as")
    if day is None and gateway is not None:
        fail("--gateway goes with --day")
    if day is not None and (payment is not None or dry_run):
        fail("--payment and --dry-run go with --now: --day compares all of a day, and changes nothing")
    settings = find_settings(data_dir, "PAYMENTS_POSTGRES_URL")
    configure_logs("reconcile", as_json=settings.log_json)  # beside the result, not in it
    if day is not None:
        with readable_errors():
            raise typer.Exit(report_day(settings, day.date(), gateway, as_json=as_json))
    wanted = None if payment is None else _uuid(payment)
    if verdict is not None:
        if wanted is None or operation is None or evidence is None or dry_run:
            fail("--as needs --payment, --operation and --evidence, and has no --dry-run")
        if as_json and not yes:
            fail("--as with --json asks nothing, for a program reads it: say --yes as well")
        with readable_errors():
            finding = Finding(wanted, operation, verdict, evidence, reference, amount)
            raise typer.Exit(rule(settings, finding, yes=yes, as_json=as_json))
    with readable_errors():
        raise typer.Exit(reconcile_now(settings, wanted, dry_run=dry_run, as_json=as_json))


@app.command()
def gateways(as_json: AsJson = False, data_dir: DataDir = None) -> None:
    """What each gateway can do, and what is refused."""
    from app.gateways_command import list_gateways

    settings = find_settings(data_dir, "PAYMENTS_GATEWAYS", or_defaults=True)
    with readable_errors():
        raise typer.Exit(list_gateways(settings, as_json=as_json))


# --- its processes ----------------------------------------------------------------------------------------------------


@app.command()
def worker() -> None:
    """Read commands, call gateways, save outcomes.

    Any number of it may run."""
    from app.processes import run_worker

    run_worker(read_service_settings())


@app.command()
def http(
    host: Annotated[str | None, typer.Option(help="Address to listen on.", show_default="PAYMENTS_HTTP_HOST")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on.", show_default="PAYMENTS_HTTP_PORT")] = None,
) -> None:
    """Health, metrics, the AsyncAPI page.

    The metrics are those of all processes. It also keeps the outbox's partitions."""
    from app.processes import run_http

    settings = read_service_settings()
    given = {"http_host": host, "http_port": port}
    run_http(settings.model_copy(update={name: value for name, value in given.items() if value is not None}))


@app.command()
def sandbox(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8090,
    state_file: Annotated[
        Path | None, typer.Option(help="Keeps books and undelivered webhooks across restarts.")
    ] = None,
    webhooks_to: Annotated[
        str | None, typer.Option(help="Send webhooks here, say http://127.0.0.1:8080/webhooks.", show_default="none")
    ] = None,
) -> None:
    """Stripe, PayPal, VNPay and MoMo, simulated, behind one address.

    Prints the settings that have the service use them, to be put into the environment of all its processes. Webhooks
    are signed as the simulators' own settings say, so --webhooks-to needs PAYMENTS_STRIPE_WEBHOOK_SECRETS (the first
    signs) and PAYMENTS_PAYPAL_WEBHOOK_ID, the same as the service's."""
    from app.processes import run_sandbox
    from app.sandbox_command import check_sandbox, introduce

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

    Does nothing where they are what this version needs. With --to, only the schema: topics and partitions are made as
    the newest one needs them.

    Example, back to the first revision, with all that later ones made dropped: payments migrate --down --to 0001
    """
    import asyncio

    from app import processes
    from infra.postgres import migrate as schema

    settings = find_settings(data_dir, "PAYMENTS_POSTGRES_URL", or_defaults=True)
    if not to:  # A variable that is not set, perhaps.
        fail("--to is empty: write a revision, or leave it out")
    if down and to == "head":
        fail("--down needs --to REVISION: where to go back to (base is an empty database, with all payments lost)")
    with readable_errors():
        if to != "head":
            now = (schema.downgrade if down else schema.upgrade)(settings.postgres_url, to)
            typer.echo(f"The schema is at {now}.")
            return
        asyncio.run(processes.prepare(settings))
    typer.echo("The schema is at head; topics and partitions are there.")


@app.command()
def maintain(data_dir: DataDir = None) -> None:
    """Make coming and drop old outbox partitions, once.

    `payments http` does it every hour."""
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

    Every message that the service reads and writes, with examples."""
    from handlers.messages.asyncapi import build_document

    with readable_errors():
        typer.echo(build_document(), nl=False)


# --- what they share --------------------------------------------------------------------------------------------------


def _send(
    kind: str,
    payment_id: str | None,
    idempotency_key: str | None,
    fields: dict[str, Any],
    *,
    wait: bool,
    timeout: float,
    as_json: bool,
    data_dir: Path | None,
) -> None:
    import uuid

    from app.client import outgoing
    from app.send import send_and_report
    from domain.commands import OperationKind

    settings = find_settings(data_dir, "PAYMENTS_KAFKA_BOOTSTRAP")
    if idempotency_key == "":  # A variable that is not set, perhaps; every try would be another payment.
        fail("--idempotency-key is empty: leave it out for a new key")
    payment = uuid.uuid4() if payment_id is None else _uuid(payment_id)
    if kind in ("charge", "authorize"):
        fields["order_id"] = fields["order_id"] or f"order-{str(payment)[:8]}"
    key = f"{kind}-{uuid.uuid4()}" if idempotency_key is None else idempotency_key
    command = outgoing(OperationKind(kind), payment, key, fields)
    with readable_errors():
        code = send_and_report(settings, kind, command, wait=wait, timeout_seconds=timeout, as_json=as_json)
    raise typer.Exit(code)


def _required_amount(amount: str | None, amount_minor: int | None, currency: str | None) -> int:
    found = _amount(amount, amount_minor, currency)
    if found is None:
        fail("how much? Give --amount 12.50 (with --currency) or --amount-minor 1250")
    return found


def _amount(amount: str | None, amount_minor: int | None, currency: str | None) -> int | None:
    from app.client import AmountUnusable, read_amount

    try:
        return read_amount(amount, amount_minor, currency)
    except AmountUnusable as error:
        fail(str(error))


def _uuid(text: str) -> Any:
    from uuid import UUID

    try:
        return UUID(text)
    except ValueError:
        fail(f"{text!r} is no payment id: a UUID such as 5d2f6a0e-6f0e-4a57-9b1c-1f2d3c4b5a69 is needed")


def main() -> None:
    """The entry point."""
    # Many long-lived objects and no cycles among them: the collector's default rhythm would cost a worker a third of
    # its CPU, and every command a tenth of its start.
    gc.set_threshold(100_000, 50, 100)
    # Typer's own code for wrong usage is 2, which here says that a payment was refused.
    usage_error = typer.BadParameter.__base__
    assert usage_error is not None, "BadParameter is one kind of UsageError"
    usage_error.exit_code = 1  # type: ignore[attr-defined]
    app(prog_name="payments")


if __name__ == "__main__":
    main()
