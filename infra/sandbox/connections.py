"""Answers that break the connection, for simulators behind uvicorn.

ASGI cannot close a connection without an answer, so the protocol class keeps the transport of each connection.
"""

import asyncio
from collections.abc import Awaitable
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

_open: dict[tuple[Any, Any], asyncio.Transport] = {}
"""The open connections by (client, server) address."""


class KnownConnection(H11Protocol):
    """uvicorn's HTTP/1.1 protocol; it registers its transport, so that an answer can find it."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        _open[self.client, self.server] = transport

    def connection_lost(self, exc: Exception | None) -> None:
        _open.pop((self.client, self.server), None)
        super().connection_lost(exc)


class NoAnswer(Response):
    """Close the connection without sending a byte; with `is_hanging`, leave it open until the client gives up."""

    def __init__(self, *, is_hanging: bool = False) -> None:
        super().__init__()
        self._is_hanging = is_hanging

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not self._is_hanging:
            _transport(scope).abort()
        while (await receive())["type"] != "http.disconnect":
            pass


class HalfAnswer(Response):
    """Announce the whole body, send half of it, and close the connection."""

    def __init__(self, response: Response) -> None:
        super().__init__(response.body, response.status_code, media_type="application/json")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        half = bytes(self.body)[: len(self.body) // 2]
        await send({"type": "http.response.body", "body": half, "more_body": True})
        _transport(scope).close()
        while (await receive())["type"] != "http.disconnect":
            pass


class LaterAnswer(Response):
    """The same answer, sent once `until` has finished."""

    def __init__(self, response: Response, until: Awaitable[None]) -> None:
        super().__init__()
        self._response = response
        self._until = until

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._until
        await self._response(scope, receive, send)


def _transport(scope: Scope) -> asyncio.Transport:
    client, server = scope["client"], scope["server"]
    return _open[tuple(client), tuple(server)]
