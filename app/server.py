"""A process's HTTP server, which leaves signals and the listening socket to its caller."""

import contextlib

import uvicorn
from starlette.types import ASGIApp


def create_server(app: ASGIApp, *, end_within: int) -> uvicorn.Server:
    """Serve `app` until `should_exit`; a request that has not ended `end_within` seconds later is cut off."""
    settings = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        proxy_headers=False,
        timeout_graceful_shutdown=end_within,
    )
    return _Server(settings)


class _Server(uvicorn.Server):
    """Uvicorn without its own signal handlers: the process has one owner of signals."""

    def capture_signals(self) -> contextlib.AbstractContextManager[None]:  # type: ignore[override]
        return contextlib.nullcontext()
