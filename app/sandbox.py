"""`payments sandbox`, as a person sees it: what it needs to start, where it is, and what has the service use it."""

import errno
import shlex
import socket
from pathlib import Path
from urllib.parse import urlsplit

import typer

from app.settings import Settings
from app.up import PREFERRED_HTTP_PORT, simulated
from infra.local.server import HOST
from infra.loopback import LOOPBACK

ANYWHERE = ("0.0.0.0", "::")  # noqa: S104 - what a person may give as the address to listen on


class SandboxUnusable(ValueError):
    """The simulators cannot start with these options; the message says what to change."""


def check_sandbox(
    settings: Settings, host: str, port: int, *, state_file: Path | None, webhooks_to: str | None
) -> None:
    """Check that the simulators can start, and create the state file's folder.

    Raises:
        SandboxUnusable: the address is taken, the file cannot be one, or webhooks could not be signed.
    """
    _check_webhooks(settings, webhooks_to)
    if state_file is not None:
        if state_file.is_dir():
            raise SandboxUnusable(f"--state-file: {state_file} is a folder; name a file in it")
        try:
            state_file.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SandboxUnusable(f"--state-file: {state_file.parent} cannot be made: {error.strerror}") from error
    _check_address(host, port)


def _check_webhooks(settings: Settings, webhooks_to: str | None) -> None:
    if webhooks_to is None:
        return
    secrets = [each.get_secret_value() for each in settings.stripe_webhook_secrets[:1]]
    needed = {
        "PAYMENTS_STRIPE_WEBHOOK_SECRETS": any(secrets),
        "PAYMENTS_PAYPAL_WEBHOOK_ID": bool(settings.paypal_webhook_id),
    }
    unset = [name for name, is_set in needed.items() if not is_set]
    if unset:
        raise SandboxUnusable(
            f"--webhooks-to needs {' and '.join(unset)}, the same as the service's: without, webhooks would be signed "
            "with nothing, and refused.\nTry: export PAYMENTS_STRIPE_WEBHOOK_SECRETS='[\"whsec_sandbox\"]' "
            "PAYMENTS_PAYPAL_WEBHOOK_ID=1JE4291016473214C"
        )


def _check_address(host: str, port: int) -> None:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise SandboxUnusable(f"port {port} of {host} is in use; give another by --port") from error
        raise SandboxUnusable(f"{host} port {port} cannot be listened on: {error.strerror or error}") from error


def introduce(settings: Settings, host: str, port: int, *, webhooks_to: str | None) -> None:
    """Print the simulators' address, and the settings of a service that uses them."""
    simulator = f"http://{HOST if host in ANYWHERE else host}:{port}"
    typer.echo(f"Stripe, PayPal, VNPay and MoMo, simulated: {simulator}\nTheir books: {simulator}/_sandbox\n")
    typer.echo("# Settings that have the service use all four:")
    given = _settings(simulator, webhooks_to)
    if settings.paypal_webhook_id:
        given["PAYMENTS_PAYPAL_WEBHOOK_ID"] = settings.paypal_webhook_id
    for name, value in given.items():
        typer.echo(f"export {name}={shlex.quote(value)}")
    if webhooks_to is None:
        typer.echo(
            "# Of the four only MoMo sends webhooks now; the others are asked. To have all send them: --webhooks-to."
        )


def _settings(simulator: str, webhooks_to: str | None) -> dict[str, str]:
    """Those of `payments up`, but for the secret of Stripe's webhooks, which the caller chooses."""
    http = f"http://{HOST}:{PREFERRED_HTTP_PORT}"
    if webhooks_to is not None:
        url = urlsplit(webhooks_to)
        http = f"{url.scheme}://{url.netloc}"
    given = simulated(simulator, http)
    del given["PAYMENTS_STRIPE_WEBHOOK_SECRETS"]
    if urlsplit(simulator).hostname not in LOOPBACK:
        given["PAYMENTS_GATEWAYS_ALLOW_PLAIN_HTTP"] = "true"
    return given
