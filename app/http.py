"""The HTTP process's routes: health, all processes' metrics, the AsyncAPI page, and those given (webhooks).

Promise: the AsyncAPI page fetches nothing from other hosts. (Liveness and readiness: `health.py`.)
"""

import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from functools import cache
from html import escape
from pathlib import Path
from typing import Final

import yaml
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from app.health import Checks, health_routes, watching_readiness
from app.peers import PEER_READY_SECONDS, MetricsPage, Peers, peer_checks, peer_client
from handlers.messages.asyncapi import build_document

STATIC_DIR: Final = Path(__file__).parent / "static"
CONTENT_SECURITY_POLICY: Final = (
    "default-src 'none'; script-src 'self' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; img-src 'self' data:;"
    " font-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""No other host, whatever the bundle tries. Its JSON schema validator compiles schemas, hence `unsafe-eval`."""

Endpoint = Callable[[Request], Awaitable[Response]]


def create_http_app(*, checks: Checks, peers: Peers, more_routes: Sequence[Route] = ()) -> Starlette:
    """The HTTP process: health, all processes' metrics, the AsyncAPI document with its page, and `more_routes`.

    `peers` maps the name of another process to the base URL of its own HTTP.
    """
    client = peer_client()
    page = MetricsPage(peers, client)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        async with watching_readiness(checks):  # The others report their own, which are on the metrics page as well.
            yield
        await client.aclose()

    async def metrics(_: Request) -> Response:
        return Response(await page.text(), media_type=CONTENT_TYPE_LATEST)

    routes = [
        Route("/", _index),
        *more_routes,
        *health_routes({**checks, **peer_checks(peers, client)}, timeout_seconds=PEER_READY_SECONDS),
        Route("/metrics", metrics),
        Route("/asyncapi", _asyncapi_page),
        Route("/asyncapi.yaml", _asyncapi_yaml),
        Route("/asyncapi.json", _asyncapi_json),
        Mount("/static", StaticFiles(directory=STATIC_DIR)),
    ]
    return Starlette(routes=routes, lifespan=lifespan)


@cache
def _document() -> str:
    return build_document()


async def _asyncapi_yaml(_: Request) -> Response:
    return PlainTextResponse(_document(), media_type="application/yaml")


async def _asyncapi_json(_: Request) -> Response:
    return JSONResponse(yaml.safe_load(_document()))


async def _asyncapi_page(_: Request) -> Response:
    return HTMLResponse(_asyncapi_html(), headers={"content-security-policy": CONTENT_SECURITY_POLICY})


async def _index(_: Request) -> Response:
    rows = "".join(f'<li><a href="{escape(path)}">{path}</a> {escape(text)}</li>' for path, text in _INDEX.items())
    return HTMLResponse(f"{_HEAD}<title>Payments</title>{_STYLE}<body><main><h1>Payments</h1><ul>{rows}</ul></main>")


_INDEX: Final = {
    "/asyncapi": "the messages: what to send, what comes back",
    "/asyncapi.yaml": "the same as an AsyncAPI document",
    "/asyncapi.json": "the same as JSON",
    "/health/live": "whether this process runs",
    "/health/ready": "whether it can work, and what keeps it from it",
    "/metrics": "the metrics of all processes, for Prometheus",
}
_HEAD: Final = (
    '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
)
_STYLE: Final = (
    "<style>body{font:16px/1.5 system-ui,sans-serif;margin:0;color:#1a202c}main{max-width:44rem;margin:3rem auto;"
    "padding:0 1rem}li{margin:.4rem 0}a{color:#0b61c4}</style>"
)
_FONT: Final = "<style>html{font-family:system-ui,sans-serif;line-height:1.5}body{margin:0}</style>"
_NO_BACKTICKS: Final = "<style>.aui-root .prose code:before,.aui-root .prose code:after{content:none}</style>"
"""The viewer's style puts backticks around code that it has already set in another font."""
_PAGE_CONFIG: Final = {
    "show": {"sidebar": True},
    "expand": {"messageExamples": True},
    # The document says what the service does; the page is read by those on the other side.
    "receiveLabel": "YOU SEND",
    "sendLabel": "YOU READ",
}


@cache
def _asyncapi_html() -> str:
    """The page, with the document embedded so that it asks for nothing but its own script and style."""
    # A "</script>" within the document would end the element that it is embedded in.
    embedded = json.dumps({"schema": _document(), "config": _PAGE_CONFIG}).replace("</", "<\\/")
    return (
        f'{_HEAD}<title>Payments: messages</title><link rel="icon" href="data:,">{_FONT}'
        f'<link rel="stylesheet" href="/static/asyncapi/asyncapi-react.css">{_NO_BACKTICKS}'
        f'<body><div id="asyncapi"></div><script id="document" type="application/json">{embedded}</script>'
        '<script src="/static/asyncapi/asyncapi-react.js"></script><script src="/static/asyncapi/page.js"></script>'
    )
