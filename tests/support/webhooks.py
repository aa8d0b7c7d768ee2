"""Runs our webhook server in a test, and applies its webhooks to payments."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from uuid import UUID

import uvicorn
from starlette.applications import Starlette
from starlette.types import ASGIApp

from app.settings import Settings
from app.webhooks import WebhookService
from handlers.apply_notices import NoticeApplier
from infra.postgres.inbox import PostgresInbox, listen
from infra.postgres.pool import create_pool
from tests.support.service import InProcessWorker, events_of, value
from tests.support.waiting import until

SECRET = "whsec_test"
SHOP = "https://shop.invalid/return"


@asynccontextmanager
async def applying(postgres_url: str, worker: InProcessWorker) -> AsyncIterator[NoticeApplier]:
    pool = await create_pool(postgres_url, size=2)
    applier = NoticeApplier(inbox=PostgresInbox(pool), write_path=worker.write_path, submit=worker.dispatcher.submit)
    tasks = [asyncio.create_task(applier.run()), asyncio.create_task(listen(postgres_url, applier.arrived.set))]
    listening = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'LISTEN%' AND datname = current_database()"

    async def is_listening() -> bool:
        return bool(await value(postgres_url, listening))

    await until(is_listening)  # Cancelled while it connects, `listen` would leave its connection unclosed.
    try:
        yield applier
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        pool.terminate()


async def kinds(postgres_url: str, payment_id: UUID) -> list[str]:
    return [each["type"].split(".")[1] for each in await events_of(postgres_url, payment_id)]


async def applied(postgres_url: str) -> bool:
    return not await value(postgres_url, "SELECT count(*) FROM inbox WHERE applied_at IS NULL")


@asynccontextmanager
async def serving(settings: Settings) -> AsyncIterator[str]:
    """Our webhooks on a port of their own."""
    service = WebhookService(settings)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        server = uvicorn.Server(uvicorn.Config(Starlette(routes=service.routes()), log_level="warning"))
        tasks = [asyncio.create_task(service.run()), asyncio.create_task(server.serve([listener]))]

        async def is_ready() -> bool:
            return server.started and await service.checks()["webhooks"]() is None

        await until(is_ready)
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            await tasks[1]
            tasks[0].cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


@asynccontextmanager
async def served(app: ASGIApp) -> AsyncIterator[str]:
    """Serve the app on a port of its own; yields its base URL."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off"))
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            await serving
