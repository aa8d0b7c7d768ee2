"""The life of a process of this service: event loop, signals, its own health and metrics port, exit code.

The work begins before the HTTP server of that port is even imported: start-up is part of every recovery.
"""

import asyncio
import gc
import socket
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Final

import uvloop

from app.command_line import advice_on, error_text, fail
from app.signals import stop_on_signals
from infra.last_resort import end_within

if TYPE_CHECKING:
    from starlette.types import ASGIApp
    from uvicorn import Server

REQUESTS_END_WITHIN: Final = 5
"""Seconds that a request may still take once all else has ended: one that never arrives completely would block us."""

Main = Callable[[asyncio.Event], Awaitable[None]]
"""Runs until the event is set."""
CreateApp = Callable[[], "ASGIApp"]
"""Imports what it needs; called beside `Main`, in a thread."""


def run(main: Main, *, create_app: CreateApp, host: str, port: int, end_seconds: float | None = None) -> None:
    """Run `main` beside an HTTP server until SIGTERM or SIGINT; an error of either ends the process.

    A port that is taken is reported before anything begins; if a server is away, the message says what to do. A process
    that has not ended `end_seconds` after the signal is ended with `last_resort.STATUS`.
    """
    listener = _listen(host, port)
    _put_off_garbage_collection()
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_live(main, create_app, listener, end_seconds))
    except ExceptionGroup as group:
        error, *others = group.exceptions
        if others or not _is_server_away(error):
            raise
        fail(f"{error_text(error)}\n{advice_on(error)}")


def _is_server_away(error: Exception) -> bool:
    """Whether a server is the cause, so that a traceback would not help. Imports the error types only now."""
    import asyncpg  # noqa: PLC0415
    from aiokafka.errors import KafkaError  # noqa: PLC0415

    from domain.errors import StoreUnavailable  # noqa: PLC0415

    if isinstance(error, (asyncpg.IntegrityConstraintViolationError, asyncpg.DataError)):
        return False  # A defect of ours: the server is answering.
    return isinstance(error, (StoreUnavailable, asyncpg.PostgresError, asyncpg.InternalClientError, KafkaError))


def _listen(host: str, port: int) -> socket.socket:
    """Bind our address first. Uvicorn would find it taken only once the work has begun, and would interrupt that."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        fail(
            f"cannot listen: {error.strerror}\n"
            "Stop what listens there, or set PAYMENTS_HTTP_HOST or this process's PAYMENTS_HTTP_PORT, "
            "PAYMENTS_WORKER_PORT or PAYMENTS_RELAY_PORT."
        )


def _put_off_garbage_collection() -> None:
    """Collect rarely: objects live long and form no cycles; the defaults would cost a worker a third of its CPU."""
    gc.freeze()  # Objects that exist now stay, and need not be scanned again.
    gc.set_threshold(100_000, 50, 100)


async def _live(main: Main, create_app: CreateApp, listener: socket.socket, end_seconds: float | None) -> None:
    def end() -> None:
        if end_seconds is not None:
            end_within(end_seconds)

    stop = stop_on_signals(first=end, then=end)
    async with asyncio.TaskGroup() as group:
        creating = asyncio.ensure_future(asyncio.to_thread(_create_server, create_app))
        serving = group.create_task(_serve(creating, listener))
        try:
            await main(stop)
        finally:
            creating.add_done_callback(_end_server)
            await asyncio.wait(
                [serving]
            )  # Cancelled because of an error of `main`, it would log a traceback of its own.


async def _serve(creating: "asyncio.Future[Server]", listener: socket.socket) -> None:
    await (await creating).serve([listener])


def _end_server(created: "asyncio.Future[Server]") -> None:
    if not created.cancelled() and created.exception() is None:
        created.result().should_exit = True


def _create_server(create_app: CreateApp) -> "Server":
    from app.server import create_server  # noqa: PLC0415 - said above

    return create_server(create_app(), end_within=REQUESTS_END_WITHIN)
