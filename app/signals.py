"""Graceful shutdown: SIGINT and SIGTERM set an event."""

import asyncio
import signal
import threading
from collections.abc import Callable
from typing import Final

SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)


def stop_on_signals(
    *, first: Callable[[], None] | None = None, then: Callable[[], None] | None = None
) -> asyncio.Event:
    """An event that the first SIGINT or SIGTERM sets, which also calls `first`; every later one calls `then`.

    Without `then`, the second ends this process as it stands.
    """
    stop, loop = asyncio.Event(), asyncio.get_running_loop()

    def on_signal() -> None:
        call = then if stop.is_set() else first
        stop.set()
        if call is not None:
            call()
        if then is None:
            for number in SIGNALS:
                loop.remove_signal_handler(number)

    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            loop.add_signal_handler(number, on_signal)
    return stop
