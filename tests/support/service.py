"""Workers in this process, on a real Postgres: the write path with its dispatcher, settler, sweep and leases."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import asyncpg
from uuid_utils.compat import uuid7

from app.wiring import create_calling
from domain.decision import Delivery
from domain.money import MINOR_UNITS
from domain.ports import Gateway
from domain.rules import RetryPolicy, Rules
from handlers.dispatch import Dispatcher
from handlers.messages.commands import read_command
from handlers.pace import Pace
from handlers.settle import Settler
from handlers.sweep import Sweep
from handlers.write_path import Applied, WritePath
from infra.postgres.pool import create_pool
from infra.postgres.store import PostgresStore
from tests.support.dispatching import FAST
from tests.support.provider import BookkeepingGateway

QUICK_RETRY = RetryPolicy(
    lease=timedelta(seconds=1), first_delay=timedelta(milliseconds=50), delay_max=timedelta(milliseconds=200)
)


class NoHint:
    """Valkey is away: Postgres is asked about every key."""

    async def are_new(self, idempotency_keys: Sequence[str]) -> bool:
        return False


class WrongHint:
    """Valkey has forgotten everything: every key seems to be new."""

    async def are_new(self, idempotency_keys: Sequence[str]) -> bool:
        return True


def rules(retry: RetryPolicy = QUICK_RETRY, **more: Any) -> Rules:
    """Rules that accept everything, with the bookkeeping gateway as default."""
    defaults: dict[str, Any] = {
        "currencies": frozenset(MINOR_UNITS),
        "gateways": {"books": BookkeepingGateway.capabilities},
        "default_gateway": "books",
        "retry": retry,
    }
    return Rules(**(defaults | more))


def body(kind: str, payment_id: UUID, key: str, **fields: Any) -> bytes:
    """A command on the wire; charges and authorizations get what they need unless told otherwise."""
    opening = {"amount_minor": 10_000, "currency": "USD", "payment_method": "pm_card_visa", "order_id": "order-1"}
    message = {"type": f"payment.{kind}.v1", "payment_id": str(payment_id), "idempotency_key": key}
    return json.dumps(message | (opening if kind in ("charge", "authorize") else {}) | fields).encode()


def delivery(kind: str, payment_id: UUID, key: str, **fields: Any) -> Delivery:
    """A command as the consumer hands it to the write path."""
    return Delivery(read_command(body(kind, payment_id, key, **fields), None))


@dataclass
class InProcessWorker:
    """One worker's parts."""

    write_path: WritePath
    dispatcher: Dispatcher
    settler: Settler
    sweep: Sweep

    async def accept(self, *deliveries: Delivery) -> Applied:
        """Apply a batch and dispatch its requests, as the consumer does."""
        applied = await self.write_path.apply(deliveries)
        self.dispatcher.submit(applied.requests)
        return applied

    async def idle(self) -> None:
        """Wait until every request is answered and every answer saved."""
        async with asyncio.timeout(30):
            while self.dispatcher.waiting + self.settler.waiting:
                await asyncio.sleep(0.002)


@asynccontextmanager
async def running_worker(
    url: str, gateway: Gateway, *, hint: Any = None, sweeping: bool = False, given: Rules | None = None
) -> AsyncIterator[InProcessWorker]:
    """A worker without Kafka."""
    pool = await create_pool(url, size=5)
    known = {gateway.name: gateway.capabilities}
    store, chosen = PostgresStore(pool), given or rules(gateways=known, default_gateway=gateway.name)
    write_path = WritePath(
        store=store, rules=chosen, clock=lambda: datetime.now(UTC), new_id=uuid7, recent=hint or WrongHint()
    )
    gateways, limits = {gateway.name: gateway}, {gateway.name: 50}
    paces = {gateway.name: Pace(time.monotonic, gateway, FAST)}
    dispatcher, settler, leases = create_calling(store, write_path, chosen, gateways, limits, paces=paces)
    sweep = Sweep(
        store=store,
        submit=dispatcher.resubmit,
        room=lambda: 500,
        rooms=lambda: dispatcher.rooms,
        lease=chosen.retry.lease,
        interval_seconds=0.05,
    )
    loops = [settler.run(), leases.run()] + ([sweep.run()] if sweeping else [])
    tasks = [asyncio.create_task(loop) for loop in loops]
    try:
        yield InProcessWorker(write_path, dispatcher, settler, sweep)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        pool.terminate()


async def events_of(url: str, payment_id: UUID) -> list[dict[str, Any]]:
    """The payment's events in the outbox, in order of `payment_seq`."""
    connection = await asyncpg.connect(url)
    try:
        rows = await connection.fetch(
            "SELECT payload FROM outbox WHERE aggregateid = $1 ORDER BY payment_seq, created_at", str(payment_id)
        )
        return [json.loads(row["payload"]) for row in rows]
    finally:
        await connection.close()


async def value(url: str, query: str, *arguments: Any) -> Any:
    """One value from the database."""
    connection = await asyncpg.connect(url)
    try:
        return await connection.fetchval(query, *arguments)
    finally:
        await connection.close()


async def until_settled(url: str, *, timeout_seconds: float = 30) -> None:
    """Wait until no operation is open."""
    open_states = "('received','dispatched','indeterminate','pending','requires_action','needs_review')"
    async with asyncio.timeout(timeout_seconds):
        while await value(url, f"SELECT count(*) FROM operations WHERE state IN {open_states}"):
            await asyncio.sleep(0.02)


def new_payment_id() -> UUID:
    return uuid4()
