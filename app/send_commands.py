"""`payments send`: one command to the service, and its result."""

# ruff: noqa: PLC0415 - as in cli.py: `payments --help` answers at once

from pathlib import Path
from typing import Annotated, Any

import typer

from app.command_line import (
    DataDir,
    default_data_dir,
    fail,
    find_settings,
    folder_option,
    no_nan,
    read_payment_id,
    readable_errors,
)

send = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Send one command and wait for its result.\n\n"
    "Finds the servers by the environment or, without, those of a running `payments up`.",
)

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


def open_payment(
    context: typer.Context,
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
    """Send a charge or an authorize, the first command of a payment."""
    fields = {
        "amount_minor": _required_amount(amount, amount_minor, currency),
        "currency": currency,
        "payment_method": payment_method,
        "order_id": order_id,
        "customer_id": customer_id,
        "off_session": off_session or None,
        "gateway": gateway,
    }
    _send(context, payment_id, idempotency_key, fields, wait=wait, timeout=timeout, as_json=as_json, data_dir=data_dir)


def move_part(
    context: typer.Context,
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
    """Send a capture or a refund, of everything that remains or of a part."""
    fields = {"amount_minor": _amount(amount, amount_minor, currency), "currency": currency}
    _send(context, payment_id, idempotency_key, fields, wait=wait, timeout=timeout, as_json=as_json, data_dir=data_dir)


def void(
    context: typer.Context,
    payment_id: KnownPayment,
    idempotency_key: IdempotencyKey = None,
    wait: Wait = True,
    timeout: Timeout = 30.0,
    as_json: AsMessage = False,
    data_dir: DataDir = None,
) -> None:
    _send(context, payment_id, idempotency_key, {}, wait=wait, timeout=timeout, as_json=as_json, data_dir=data_dir)


# Two commands each are one function, and the help lists all in this order.
send.command(
    "charge",
    help="Take money now.\n\nExample: payments send charge --amount 12.50 --currency USD",
)(open_payment)
send.command(
    "authorize",
    help="Reserve money, to be captured or voided later.\n\n"
    "Example: payments send authorize --amount 80 --currency EUR",
)(open_payment)
send.command(
    "capture",
    help="Collect what was authorized; without an amount all of it.\n\n"
    "Example: payments send capture --payment-id 5d2f6a0e-6f0e-4a57-9b1c-1f2d3c4b5a69 --amount 30 --currency EUR",
)(move_part)
send.command(
    "void",
    help="Release what was authorized and not captured.\n\n"
    "Example: payments send void --payment-id 5d2f6a0e-6f0e-4a57-9b1c-1f2d3c4b5a69",
)(void)
send.command(
    "refund",
    help="Return captured money; without an amount all of it.\n\n"
    "Example: payments send refund --payment-id 5d2f6a0e-6f0e-4a57-9b1c-1f2d3c4b5a69 --amount 2.50 --currency USD",
)(move_part)


def _send(
    context: typer.Context,
    payment_id: str | None,
    idempotency_key: str | None,
    fields: dict[str, Any],
    *,
    wait: bool,
    timeout: float,
    as_json: bool,
    data_dir: Path | None,
) -> None:
    """Send the command that the context names, and exit by its result."""
    import uuid

    from app.client import outgoing
    from app.send import send_and_report
    from domain.commands import OperationKind
    from domain.requests import OPENING

    settings = find_settings(data_dir, "PAYMENTS_KAFKA_BOOTSTRAP")
    if idempotency_key == "":  # Perhaps an unset shell variable; every retry would be another payment.
        fail("--idempotency-key is empty: leave it out for a new key")
    payment = uuid.uuid4() if payment_id is None else read_payment_id(payment_id)
    kind = OperationKind(context.command.name or "")
    if kind in OPENING:
        fields["order_id"] = fields["order_id"] or f"order-{str(payment)[:8]}"
    key = f"{kind}-{uuid.uuid4()}" if idempotency_key is None else idempotency_key
    command = outgoing(kind, payment, key, fields)
    is_named = payment_id is not None and idempotency_key is not None
    with readable_errors():
        code = send_and_report(
            settings,
            kind,
            command,
            is_named=is_named,
            wait=wait,
            timeout_seconds=timeout,
            as_json=as_json,
            folder=folder_option(data_dir or default_data_dir()),
        )
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
