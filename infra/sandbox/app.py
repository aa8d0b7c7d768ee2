"""All simulators behind one address: each provider's own paths, all books on one page, and one place for webhooks.

`/_sandbox` shows the totals of every provider. `/_sandbox/all` returns them as JSON; a POST sets the latency of all.
"""

import html
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from infra.sandbox import stripe
from infra.sandbox.connections import KnownConnection
from infra.sandbox.journal import beside
from infra.sandbox.momo import MoMoSimulator
from infra.sandbox.paypal import PayPalSimulator
from infra.sandbox.vnpay import VNPaySimulator


class Sandbox:
    """One simulator per provider. With a state file each resumes after a restart, from its own file beside that one."""

    def __init__(self, state_file: Path | None = None) -> None:
        def of(name: str) -> Path | None:
            return state_file and beside(state_file, name)

        self.stripe = stripe.SandboxState(state_file=state_file)
        self.paypal = PayPalSimulator(state_file=of("paypal"))
        self.vnpay = VNPaySimulator(state_file=of("vnpay"))
        self.momo = MoMoSimulator(state_file=of("momo"))

    def send_webhooks_to(self, base_url: str, *, stripe_secret: str, paypal_webhook_id: str) -> None:
        """Make each provider send its webhooks to `<base_url>/<name>`; MoMo sends to the address in each order."""
        self.stripe.events.configure({"url": f"{base_url}/stripe", "secret": stripe_secret})
        self.paypal.webhook_url, self.paypal.webhook_id = f"{base_url}/paypal", paypal_webhook_id
        self.vnpay.ipn_url = f"{base_url}/vnpay"

    def totals(self) -> dict[str, dict[str, dict[str, int]]]:
        """Per provider and currency: amounts captured, refunded, held and disputed, and counts."""
        return {
            "stripe": self.stripe.books.totals(),
            "paypal": self.paypal.totals(),
            "vnpay": self.vnpay.totals(),
            "momo": self.momo.totals(),
        }

    def set_latency(self, seconds: float) -> None:
        """Set the delay of every request to every provider."""
        for each in (self.stripe, self.paypal, self.vnpay, self.momo):
            each.latency_seconds = seconds

    def load(self) -> None:
        for each in (self.stripe, self.paypal, self.vnpay, self.momo):
            each.load()

    async def close(self) -> None:
        """Leave unsent webhooks to the next start, and close the files."""
        await self.stripe.events.sender.close()
        self.stripe.journal.close()
        await self.paypal.sender.close()
        self.paypal.close()
        await self.vnpay.close()
        await self.momo.close()


def create_app(sandbox: Sandbox) -> Starlette:
    """The simulators, loaded at start-up and closed at shutdown."""

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        sandbox.load()
        yield
        await sandbox.close()

    async def show(_: Request) -> Response:
        return JSONResponse(sandbox.totals())

    async def configure(request: Request) -> Response:
        sandbox.set_latency(float((await request.json())["latency_ms"]) / 1000)
        return JSONResponse({"ok": True})

    async def page(_: Request) -> Response:
        return HTMLResponse(_page(sandbox.totals()))

    routes = [
        Route("/_sandbox", page),
        Route("/_sandbox/all", show, methods=["GET"]),
        Route("/_sandbox/all", configure, methods=["POST"]),
        *stripe.ROUTES,
        *sandbox.paypal.routes(),
        *sandbox.vnpay.routes(),
        *sandbox.momo.routes(),
    ]
    app = Starlette(routes=routes, lifespan=lifespan)
    app.state.sandbox = sandbox.stripe
    return app


def create_server(host: str, port: int, sandbox: Sandbox) -> uvicorn.Server:
    """A server for the simulators, not yet started. Its protocol class makes cut connections possible."""
    config = uvicorn.Config(
        create_app(sandbox),
        host=host,
        port=port,
        http=KnownConnection,
        log_level="warning",
        access_log=False,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=1,
    )
    return uvicorn.Server(config)


def _page(totals: dict[str, Any]) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(name)}<td>{html.escape(currency.upper())}"
        + "".join(f"<td>{sums.get(each, 0):,}" for each in ("captured", "refunded", "authorized_open", "disputed"))
        for name, by_currency in totals.items()
        for currency, sums in by_currency.items()
    )
    style = "<style>body{font:16px system-ui;margin:3rem}td,th{padding:.2rem 1rem;text-align:right}</style>"
    title = "<h1>Their books, in minor units</h1>"
    head = "<tr><th>provider<th>currency<th>captured<th>refunded<th>held<th>disputed"
    return f"<!doctype html><title>Provider simulators</title>{style}{title}<table>{head}{rows}</table>"
