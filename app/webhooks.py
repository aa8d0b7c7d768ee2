"""Webhooks over HTTP: the raw request in, the provider's own form of answer out.

Until Postgres is there nothing can be stored, and each provider is told to send again.
"""

import asyncio
from collections.abc import Sequence
from datetime import UTC, datetime

import structlog
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from tenacity import AsyncRetrying, retry_if_exception_type, wait_random_exponential

from app import wiring
from app.health import Checks
from app.settings import Settings
from domain.errors import StoreUnavailable
from domain.notices import BODY_BYTES_MAX, WebhookRequest
from domain.ports import Accepted, Received
from handlers.webhooks import Webhooks
from infra.postgres.inbox import PostgresInbox
from infra.postgres.store import create_pool

log = structlog.get_logger(__name__)


class WebhookService:
    """The webhooks of all gateways that this installation uses."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._inbox: PostgresInbox | None = None
        self._webhooks = Webhooks(readers=wiring.create_webhook_readers(settings), accept=self._accept)

    async def _accept(self, received: Sequence[Received]) -> list[Accepted]:
        if self._inbox is None:
            raise StoreUnavailable("not connected yet")
        return await self._inbox.accept(received)

    async def run(self) -> None:
        """Connect, however long that takes, and store what is received until cancelled."""
        storing = asyncio.create_task(self._webhooks.run())
        try:
            async for attempt in AsyncRetrying(
                retry=retry_if_exception_type(StoreUnavailable), wait=wait_random_exponential(multiplier=0.1, max=5)
            ):
                with attempt:
                    pool = await create_pool(self._settings.postgres_url, size=self._settings.webhook_connections)
            async with pool:
                self._inbox = PostgresInbox(pool)
                await storing
        finally:
            storing.cancel()

    def routes(self) -> list[Route]:
        """One path for each gateway."""
        return [Route("/webhooks/{gateway}", self._receive, methods=["GET", "POST"])]

    def checks(self) -> Checks:
        return {"webhooks": self._check}

    async def _check(self) -> str | None:
        return None if self._inbox is not None else "not connected to Postgres"

    async def _receive(self, request: Request) -> Response:
        gateway = request.path_params["gateway"]
        if gateway not in self._webhooks.gateways:
            return PlainTextResponse("no webhooks of this name are received here\n", 404)
        answer = await self._webhooks.receive(gateway, await _raw(request))
        return Response(answer.body, answer.status, media_type=answer.content_type)


async def _raw(request: Request) -> WebhookRequest:
    """The request as it came; of a body that is too large, just enough to show that."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > BODY_BYTES_MAX:
            break
    headers = {name.lower(): value for name, value in request.headers.items()}
    return WebhookRequest(request.method, request.url.query, headers, bytes(body), datetime.now(UTC))
