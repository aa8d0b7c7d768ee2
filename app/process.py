"""How a process of this service lives: its event loop, its signals, its own health and metrics port, its exit code."""

import asyncio
import contextlib
import socket
from collections.abc import Awaitable, Callable
from typing import Final

import structlog
import uvicorn
import uvloop
from starlette.types import ASGIApp

from app.command_line import advice_on, fail, told_error
from app.signals import stop_on_signals
from infra.last_resort import end_within

log = structlog.get_logger(__name__)

REQUESTS_END_WITHIN: Final = 5
"""Seconds. Once all else has ended, a request that has not is cut off: one that never comes whole would hold us up."""

Main = Callable[[asyncio.Event], Awaitable[None]]
"""Runs until the event is set."""


def run(main: Main, *, app: ASGIApp, host: str, port: int, end_seconds: float | None = None) -> None:
    """Run `main` beside an HTTP server for `app` until SIGTERM or SIGINT; an error of either ends the process.

    A port that it cannot have is told before anything begins, and of a server that is away what to do.
    If it has not ended `end_seconds` after the signal, it ends all the same, with `last_resort.STATUS`.
    """
    listener = _listen(host, port)
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_live(main, app, listener, end_seconds))
    except ExceptionGroup as group:
        error, *others = group.exceptions
        if others or not _is_server_away(error):
            raise
        fail(f"{told_error(error)}\n{advice_on(error)}")


def _is_server_away(error: Exception) -> bool:
    """Whether a trace of our calls would tell nothing. (Whose errors these are is looked up only now.)"""
    import asyncpg  # noqa: PLC0415
    from aiokafka.errors import KafkaError  # noqa: PLC0415

    from domain.errors import StoreUnavailable  # noqa: PLC0415

    if isinstance(error, (asyncpg.IntegrityConstraintViolationError, asyncpg.DataError)):
        return False  # A defect of ours: it is answering.
    return isinstance(error, (StoreUnavailable, asyncpg.PostgresError, asyncpg.InternalClientError, KafkaError))


def _listen(host: str, port: int) -> socket.socket:
    """Our own address. Uvicorn would find it taken only when the work beside it has begun, and end that in mid-air."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        fail(
            f"cannot listen: {error.strerror}\n"
            "Stop what listens there, or set PAYMENTS_HTTP_HOST or this process's PAYMENTS_HTTP_PORT, "
            "PAYMENTS_WORKER_PORT or PAYMENTS_RELAY_PORT."
        )


async def _live(main: Main, app: ASGIApp, listener: socket.socket, end_seconds: float | None) -> None:
    def end() -> None:
        if end_seconds is not None:
            end_within(end_seconds)

    stop = stop_on_signals(first=end, then=end)
    async with asyncio.TaskGroup() as group:
        settings = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            proxy_headers=False,
            timeout_graceful_shutdown=REQUESTS_END_WITHIN,
        )
        server = _Server(settings)
        serving = group.create_task(server.serve([listener]))
        try:
            await main(stop)
        finally:
            server.should_exit = True
            await asyncio.wait([serving])  # Ended by an error of `main`, it would log a trace of its own.


class _Server(uvicorn.Server):
    """Uvicorn without its own signal handlers: the process has one owner of signals."""

    def capture_signals(self) -> contextlib.AbstractContextManager[None]:  # type: ignore[override]
        return contextlib.nullcontext()
