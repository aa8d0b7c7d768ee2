"""How a process of this service lives: its event loop, its signals, its own health and metrics port, its exit code."""

import asyncio
import contextlib
import gc
import signal
from collections.abc import Awaitable, Callable
from typing import Final

import structlog
import uvicorn
import uvloop
from starlette.types import ASGIApp

from infra.last_resort import end_within

log = structlog.get_logger(__name__)

REQUESTS_END_WITHIN: Final = 5
"""Seconds. Once all else has ended, a request that has not is cut off: one that never comes whole would hold us up."""

Main = Callable[[asyncio.Event], Awaitable[None]]
"""Runs until the event is set."""


def run(main: Main, *, app: ASGIApp, host: str, port: int, end_seconds: float | None = None) -> None:
    """Run `main` beside an HTTP server for `app` until SIGTERM or SIGINT; an error of either ends the process.

    If it has not ended `end_seconds` after the signal, it ends all the same, with `last_resort.STATUS`.
    """
    # Many long-lived objects and no cycles among them: the collector's default rhythm would cost a third of the CPU.
    gc.set_threshold(100_000, 50, 100)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_live(main, app, host, port, end_seconds))


async def _live(main: Main, app: ASGIApp, host: str, port: int, end_seconds: float | None) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def end() -> None:
        stop.set()
        if end_seconds is not None:
            end_within(end_seconds)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, end)
    async with asyncio.TaskGroup() as group:
        server = _Server(
            uvicorn.Config(
                app,
                host=host,
                port=port,
                log_config=None,
                access_log=False,
                proxy_headers=False,
                timeout_graceful_shutdown=REQUESTS_END_WITHIN,
            )
        )
        group.create_task(server.serve())
        try:
            await main(stop)
        finally:
            server.should_exit = True


class _Server(uvicorn.Server):
    """Uvicorn without its own signal handlers: the process has one owner of signals."""

    def capture_signals(self) -> contextlib.AbstractContextManager[None]:  # type: ignore[override]
        return contextlib.nullcontext()
