"""`payments gateways`: what each gateway can do, read from the code that decides by it."""

from datetime import timedelta
from typing import Any

from rich import box
from rich.table import Table

from app import wiring
from app.console import new_console, print_json
from app.settings import Settings
from domain.capabilities import Capabilities, Listing
from domain.commands import OperationKind
from domain.money import Money

YES, NO = "yes", "no"
LISTS = {
    Listing.NONE: "not offered by the provider",
    Listing.PAYMENTS: "by its payments",
    Listing.MOVEMENTS: "by its captures and refunds",
}
"""How `payments reconcile --day` compares."""


def list_gateways(settings: Settings, *, as_json: bool) -> int:
    """Print the matrix of all gateways of this release. Returns the exit code.

    Raises:
        ValueError: a configured gateway does not exist.
    """
    wiring.check_names(settings)
    known = known_capabilities(settings)
    if as_json:
        print_json({name: described(each) for name, each in known.items()})
        return 0
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for name in known:
        table.add_column(name + _mark(settings, name))
    for row in rows(known):
        table.add_row(*row)
    console = new_console()
    console.print(table)
    console.print("* used by this installation (PAYMENTS_GATEWAYS), ** also where a command names no gateway.")
    console.print("What a gateway cannot do is refused up front.")
    return 0


def _mark(settings: Settings, name: str) -> str:
    if name == settings.default_gateway:
        return " **"
    return " *" if name in settings.gateways else ""


def known_capabilities(settings: Settings) -> dict[str, Capabilities]:
    """What every gateway of this release declares under these settings, by name; no provider is called."""
    return {
        name: each.create(settings, wiring.now).capabilities
        for name, each in wiring.GATEWAYS.items()
        if name != "instant"
    }


def rows(known: dict[str, Capabilities]) -> list[list[str]]:
    """The matrix: one row per ability, one cell per gateway."""
    texts = {name: described(each) for name, each in known.items()}
    labels = list(next(iter(texts.values())))
    return [[label, *(_cell(text[label]) for text in texts.values())] for label in labels]


def described(given: Capabilities) -> dict[str, Any]:
    """One gateway's abilities, by label."""
    kinds: dict[str, Any] = {str(kind): kind in given.operations for kind in OperationKind}
    return kinds | {
        "capture in part": given.partial_capture,
        "capture several times": given.multi_capture,
        "refund in part": given.partial_refund,
        "charge while the payer is away": given.off_session,
        "void while the payer is awaited": given.cancel_waiting,
        "currencies": _currencies(given),
        "limits": _limits(given),
        "a repeated key is safe for": _retention(given.idempotency_retention),
        "a day's books are compared": LISTS[given.listing],
    }


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return YES if value else NO
    return str(value)


def _currencies(given: Capabilities) -> str:
    return ", ".join(sorted(given.currencies)) if len(given.currencies) <= 3 else f"{len(given.currencies)} currencies"


def _limits(given: Capabilities) -> str:
    texts = (
        f"{Money(each.minimum_minor, currency)} to {Money(each.maximum_minor, currency)}"
        for currency, each in sorted(given.limits.items())
    )
    return "; ".join(texts) if len(given.limits) <= 1 else f"by currency ({len(given.limits)})"


def _retention(given: timedelta) -> str:
    if not given:
        return "never: a lost answer is asked for"
    hours = given.total_seconds() / 3600
    return f"{hours / 24:g} days" if hours >= 48 else f"{hours:g} hours"
