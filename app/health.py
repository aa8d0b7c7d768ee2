"""Whether a process can do its work, and the HTTP endpoints that report it, beside the process's own metrics.

Promises: liveness depends only on the event loop; readiness names the parts that are not ready; all parts are checked
at the same time, and none can delay the answer; the metric `payments_ready` shows the same for each part, even if
nobody asks. Every process imports this module, so it imports little: start-up time is part of every recovery.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Final

from prometheus_client import CONTENT_TYPE_LATEST, REGISTRY, Gauge, generate_latest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

CHECK_TIMEOUT_SECONDS: Final = 2.0
WATCH_SECONDS: Final = 10.0
READY: Final = Gauge("payments_ready", "1 if this part of the process is ready, as /health/ready shows it", ["part"])

Check = Callable[[], Awaitable[str | None]]
"""Returns None if the part is ready, otherwise why it is not, in a text that may be shown."""
Checks = Mapping[str, Check]


def create_process_app(*, checks: Checks) -> Starlette:
    """The worker's or the relay's own health and metrics."""

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        async with watching_readiness(checks):
            yield

    return Starlette(routes=[*health_routes(checks), Route("/metrics", _own_metrics)], lifespan=lifespan)


def health_routes(checks: Checks, *, timeout_seconds: float = CHECK_TIMEOUT_SECONDS) -> list[Route]:
    """Liveness, and readiness with the state of every part."""

    async def ready(_: Request) -> Response:
        found = await troubles(checks, timeout_seconds=timeout_seconds)
        parts = {name: found.get(name, "ready") for name in checks}
        return JSONResponse({"ready": not found, "parts": parts}, status_code=503 if found else 200)

    return [Route("/health/live", _live), Route("/health/ready", ready)]


@asynccontextmanager
async def watching_readiness(checks: Checks) -> AsyncIterator[None]:
    """Keep `payments_ready` up to date within the block: now, and every `WATCH_SECONDS`."""
    watching = asyncio.create_task(_watch_readiness(checks))
    try:
        yield
    finally:
        watching.cancel()


async def _watch_readiness(checks: Checks) -> None:
    while True:
        found = await troubles(checks)
        for part in checks:
            READY.labels(part).set(part not in found)
        await asyncio.sleep(WATCH_SECONDS)


async def _live(_: Request) -> Response:
    return JSONResponse({"live": True})


async def _own_metrics(_: Request) -> Response:
    return Response(generate_latest(REGISTRY), media_type=CONTENT_TYPE_LATEST)


async def troubles(checks: Checks, *, timeout_seconds: float = CHECK_TIMEOUT_SECONDS) -> dict[str, str]:
    """The parts that are not ready, and why; empty if all are. Takes at most `timeout_seconds`."""
    found = await asyncio.gather(*(_trouble(check, timeout_seconds) for check in checks.values()))
    return {name: trouble for name, trouble in zip(checks, found, strict=True) if trouble}


async def _trouble(check: Check, timeout_seconds: float) -> str | None:
    asking = asyncio.ensure_future(check())
    asking.add_done_callback(_ended)
    try:
        async with asyncio.timeout(timeout_seconds):
            return await asyncio.shield(asking)
    except TimeoutError:
        return f"no answer within {timeout_seconds:g} s"
    except asyncio.CancelledError:
        if not asking.cancelled():
            raise
        return "check failed: it was cancelled by a library"
    except Exception as error:  # A check that fails means that its part is not ready, whatever the error.
        # Only the kind of error is shown: its message may hold a password from a URL.
        return f"check failed: {type(error).__name__}"
    finally:
        # Not waited for: a connection whose server is frozen takes half a minute to give up.
        asking.cancel()


def _ended(asking: "asyncio.Future[str | None]") -> None:
    """Retrieve an error that came after the timeout, so that asyncio does not log it."""
    if not asking.cancelled():
        asking.exception()
