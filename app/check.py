"""`payments check`: whether each payment's amounts are what the ledger adds up to."""

import asyncio
from datetime import datetime
from uuid import UUID

from rich.progress import Progress, TextColumn

from app.console import new_console, print_json
from app.settings import Settings
from app.tables import print_wide, table_of
from app.times import moment
from domain.money import Money
from infra.postgres.ledger import LedgerDifference, check_all, check_changed

NAMES = (
    "payment",
    "captured",
    "booked",
    "refunded",
    "booked",
    "disputed",
    "booked",
    "owed",
    "booked",
    "in another currency",
)


def check_payments(settings: Settings, since: str | None, *, as_json: bool) -> int:
    """Print the differences. Returns the exit code: 1 if there are any.

    Raises:
        TimeUnusable: `since` is not a date or age.
    """
    found = asyncio.run(_find(settings.postgres_url, moment(since), is_silent=as_json))
    if as_json:
        print_json({"differences": [each._asdict() | {"payment_id": str(each.payment_id)} for each in found]})
    else:
        _print(found)
    return 1 if found else 0


async def _find(url: str, since: datetime | None, *, is_silent: bool) -> list[LedgerDifference]:
    found: dict[UUID, LedgerDifference] = {}
    columns = (TextColumn("{task.completed:,} payments looked at, {task.fields[found]:,} differ"),)
    with Progress(*columns, console=new_console(to_stderr=True), disable=is_silent) as progress:
        task = progress.add_task("", total=None, found=0, visible=False)  # Nothing is said if Postgres is away.
        async for portion in check_all(url) if since is None else check_changed(url, since):
            found |= {each.payment_id: each for each in portion.differences}
            progress.update(task, advance=portion.payments, found=len(found), visible=True)
    return list(found.values())


def _print(found: list[LedgerDifference]) -> None:
    if found:
        print_wide(new_console(), table_of(NAMES, map(_cells, found), whole={"payment"}))
        new_console().print('What to do: docs/operations/reconciliation.md, "Alert LedgerDiffers".')
    new_console().print(f"{len(found):,} payments differ from the ledger.")


def _cells(each: LedgerDifference) -> list[str]:
    amounts = (
        each.captured_minor,
        each.booked_captured_minor,
        each.refunded_minor,
        each.booked_refunded_minor,
        each.disputed_minor,
        each.booked_disputed_minor,
        each.captured_minor - each.refunded_minor - each.disputed_minor,
        each.booked_clearing_minor,
    )
    texts = [str(Money(amount, each.currency)) if each.currency else str(amount) for amount in amounts]
    return [str(each.payment_id), *texts, str(each.foreign_minor or "")]
