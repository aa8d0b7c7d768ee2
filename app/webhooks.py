"""Webhooks over HTTP: the raw request in, the provider's own form of answer out.

Until Postgres is there nothing can be stored, and each provider is told to send again.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime
from typing import Final

import structlog
from starlette.requests import ClientDisconnect
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from app import wiring
from app.clock import watch_clock
from app.health import Checks
from app.settings import Settings
from domain.errors import StoreUnavailable
from domain.notices import BODY_BYTES_MAX, WebhookAnswer, WebhookRequest
from domain.ports import Accepted, Received
from handlers.retry import until_store_answers
from handlers.webhooks import Webhooks
from infra.postgres.inbox import PostgresInbox
from infra.postgres.pool import close_pool, create_pool

log = structlog.get_logger(__name__)

BODY_SECONDS: Final = 10.0
"""A provider sends a body at once. Anybody can begin one that never arrives completely: it must not be held forever."""
LATE: Final = WebhookAnswer(408)


class WebhookService:
    """The webhooks of all gateways that this installation uses."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._inbox: PostgresInbox | None = None
        self._readers = wiring.create_webhook_readers(settings)
        self._webhooks = Webhooks(readers=self._readers, accept=self._accept)
        for gateway, variable in wiring.missing_webhook_keys(settings).items():
            log.warning(
                "webhooks of this gateway are refused until its setting is there", gateway=gateway, set=variable
            )

    async def _accept(self, received: Sequence[Received]) -> list[Accepted]:
        if self._inbox is None:
            raise StoreUnavailable("not connected yet")
        return await self._inbox.accept(received)

    async def run(self) -> None:
        """Connect, however long that takes, and store what is received until cancelled."""
        storing = asyncio.create_task(self._webhooks.run())
        try:
            pool = await until_store_answers(
                create_pool, self._settings.postgres_url, size=self._settings.webhook_connections
            )
            try:
                self._inbox = PostgresInbox(pool)
                # A signature's age is measured by this machine's clock.
                watching = asyncio.create_task(watch_clock(pool))
                await storing
            finally:
                watching.cancel()
                await close_pool(pool)
        finally:
            storing.cancel()
            for reader in self._readers.values():
                await reader.close()

    def routes(self) -> list[Route]:
        """One path for each gateway."""
        return [Route("/webhooks/{gateway}", _Endpoint(self._receive), methods=["GET", "POST"])]

    def checks(self) -> Checks:
        return {"webhooks": self._check}

    async def _check(self) -> str | None:
        return None if self._inbox is not None else "not connected to Postgres"

    async def _receive(self, gateway: str, request: WebhookRequest) -> WebhookAnswer:
        if gateway not in self._webhooks.gateways:
            return WebhookAnswer(404, b"no webhooks of this name are received here\n")
        return await self._webhooks.receive(gateway, request)


class _Endpoint:
    """Plain ASGI: the framework's request and response objects would double the cost of a webhook."""

    def __init__(self, receive: Callable[[str, WebhookRequest], Awaitable[WebhookAnswer]]) -> None:
        self._receive = receive

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer = await self._answer(scope, receive)
        headers = [
            (b"content-type", answer.content_type.encode()),
            (b"content-length", str(len(answer.body)).encode()),
        ]
        if answer is LATE:
            headers.append((b"connection", b"close"))
        await send({"type": "http.response.start", "status": answer.status, "headers": headers})
        await send({"type": "http.response.body", "body": answer.body})

    async def _answer(self, scope: Scope, receive: Receive) -> WebhookAnswer:
        try:
            async with asyncio.timeout(BODY_SECONDS):
                request = await _raw(scope, receive)
        except (TimeoutError, ClientDisconnect):
            return LATE
        return await self._receive(scope["path_params"]["gateway"], request)


async def _raw(scope: Scope, receive: Receive) -> WebhookRequest:
    """The request as it came; of a body that is too large, just enough to show that.

    Raises:
        ClientDisconnect: it did not come whole, so that nothing can be said of its signature.
    """
    body, is_more = b"", True
    while is_more and len(body) <= BODY_BYTES_MAX:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        body += message.get("body", b"")
        is_more = message.get("more_body", False)
    headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
    return WebhookRequest(scope["method"], scope["query_string"].decode("latin-1"), headers, body, datetime.now(UTC))
