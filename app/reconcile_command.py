"""`payments reconcile`: what the providers say of everything that is open, now.

A dry run only asks. Otherwise this process does once what workers do all along: it takes over what is not being worked
on, asks or repeats under the same key, and saves the answers through the write path.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final
from uuid import UUID

from rich import box
from rich.console import Console
from rich.table import Table

from app import wiring
from app.settings import Settings
from domain.decision import Answer
from domain.errors import GatewayError
from domain.operations import GatewayRequest, Operation, Outcome
from domain.payment import Payment
from domain.ports import Gateway
from domain.requests import gateway_request
from handlers.messages.commands import command_from_content
from handlers.sweep import CLAIMED_MAX, Sweep
from infra.postgres.store import PostgresStore, create_pool

ASKED_MAX: Final = 1_000
"""Operations of one dry run: the soonest due; workers ask about all of them anyway."""
AT_ONCE: Final = 8


@dataclass(frozen=True, slots=True)
class Found:
    """One open operation, and the provider's word on it."""

    payment_id: UUID
    operation: str
    gateway: str
    state: str
    amount: str
    age: str
    answer: str


def reconcile(settings: Settings, payment_id: UUID | None, *, dry_run: bool, as_json: bool) -> int:
    """Ask about what is open, print it, and unless it is a dry run apply it; the exit code."""
    found = asyncio.run(_ask(settings, payment_id) if dry_run else _apply(settings, payment_id))
    if as_json:
        lines = [{name: str(getattr(each, name)) for name in Found.__slots__} for each in found]
        Console().print_json(json.dumps(lines))
    else:
        _print(found, dry_run=dry_run)
    return 0


def _print(found: list[Found], *, dry_run: bool) -> None:
    console = Console()
    if not found:
        console.print("Nothing is open that is not being worked on.")
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("payment", "operation", "gateway", "state", "amount", "age", "the provider says"):
        table.add_column(name, justify="right" if name in ("amount", "age") else "left", overflow="fold")
    for each in found:
        table.add_row(*(str(getattr(each, name)) for name in Found.__slots__))
    console.print(table)
    console.print(
        "Nothing was changed." if dry_run else "Applied. `payments show PAYMENT_ID` tells what became of one."
    )


# --- a dry run --------------------------------------------------------------------------------------------------------


async def _ask(settings: Settings, payment_id: UUID | None) -> list[Found]:
    async with _parts(settings) as (store, gateways):
        open_operations = await store.find_under_way(payment_id, limit=ASKED_MAX)
        limit = asyncio.Semaphore(AT_ONCE)
        return list(await asyncio.gather(*(_asked(gateways, *each, limit) for each in open_operations)))


async def _asked(
    gateways: dict[str, Gateway], payment: Payment, operation: Operation, limit: asyncio.Semaphore
) -> Found:
    request = gateway_request(payment, operation, command_from_content(operation.content))
    gateway = gateways.get(request.gateway)
    if gateway is None:
        return _found(request, "this gateway is not configured here")
    async with limit:
        try:
            return _found(request, said(await gateway.status(request)))
        except GatewayError as error:
            return _found(request, f"no answer: {error.message}")


# --- for real ---------------------------------------------------------------------------------------------------------


async def _apply(settings: Settings, payment_id: UUID | None) -> list[Found]:
    async with _parts(settings) as (store, gateways):
        found: list[Found] = []
        async with _working(settings, store, gateways, found) as (sweep, is_idle):
            await store.make_due(payment_id)
            while await sweep.sweep_once() == CLAIMED_MAX:
                await is_idle()
            await is_idle()
        return [each for each in found if payment_id in (None, each.payment_id)]


@asynccontextmanager
async def _working(
    settings: Settings, store: PostgresStore, gateways: dict[str, Gateway], found: list[Found]
) -> AsyncIterator[tuple[Sweep, Callable[[], Awaitable[None]]]]:
    """A worker's parts without Kafka; every answer is noted in `found`, too."""
    rules, redis = wiring.create_rules(settings, gateways), wiring.connect_redis(settings)
    limits = {name: min(AT_ONCE, settings.concurrency_of(name)) for name in gateways}
    write_path = wiring.create_write_path(store, rules, redis)
    dispatcher, settler, leases = wiring.create_calling(store, write_path, rules, gateways, limits)
    asked: dict[tuple[UUID, int], GatewayRequest] = {}

    def submit(requests: list[GatewayRequest]) -> None:
        asked.update({(each.payment_id, each.operation_number): each for each in requests})
        dispatcher.submit(requests)

    def on_answer(answer: Answer) -> None:
        request = asked.get((answer.payment_id, answer.operation_number))
        if request is not None:
            found.append(_found(request, said(answer.outcome)))
        settler.add(answer)

    async def is_idle() -> None:
        while dispatcher.waiting + settler.waiting:  # noqa: ASYNC110 - either hands work to the other, and signals none
            await asyncio.sleep(0.05)

    dispatcher.on_answer = on_answer
    sweep = Sweep(store=store, submit=submit, room=lambda: CLAIMED_MAX, lease=rules.retry.lease, interval_seconds=1)
    loops = [asyncio.create_task(settler.run()), asyncio.create_task(leases.run())]
    try:
        yield sweep, is_idle
    finally:
        for loop in loops:
            loop.cancel()
        await asyncio.gather(*loops, return_exceptions=True)
        await redis.aclose()


@asynccontextmanager
async def _parts(settings: Settings) -> AsyncIterator[tuple[PostgresStore, dict[str, Gateway]]]:
    async with AsyncExitStack() as stack:
        gateways = wiring.create_gateways(settings)
        for gateway in gateways.values():
            stack.push_async_callback(gateway.close)
        pool = await stack.enter_async_context(await create_pool(settings.postgres_url, size=2))
        yield PostgresStore(pool), gateways


# --- in words ---------------------------------------------------------------------------------------------------------


def _found(request: GatewayRequest, answer: str) -> Found:
    return Found(
        request.payment_id,
        f"{request.kind} {request.operation_number}",
        request.gateway,
        request.state.value,
        str(request.amount),
        _age(request.first_dispatched_at),
        answer,
    )


def said(outcome: Outcome) -> str:
    """An outcome as a line of text: what it is, and what it says; a payer's URL is long, and in the event."""
    details: dict[str, Any] = {name: getattr(outcome, name) for name in outcome.__slots__}
    told = ", ".join(f"{name} {value}" for name, value in details.items() if value not in (None, "") and name != "url")
    word = "".join(f" {letter.lower()}" if letter.isupper() else letter for letter in type(outcome).__name__).strip()
    return f"{word} ({told})" if told else word


def _age(since: datetime | None) -> str:
    if since is None:
        return ""
    minutes = int((datetime.now(UTC) - since).total_seconds() // 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h"
