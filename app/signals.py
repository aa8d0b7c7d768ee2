"""Commands that end in good order when they are told to."""

import asyncio
import signal
import threading
from typing import Final

from app.console import new_console

SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)


def stop_on_signals(told: str) -> asyncio.Event:
    """An event that the first SIGINT or SIGTERM sets, and tells; the second ends this process as it stands."""
    stop, loop = asyncio.Event(), asyncio.get_running_loop()

    def on_signal() -> None:
        stop.set()
        new_console(to_stderr=True).print(told, soft_wrap=True)
        for number in SIGNALS:
            loop.remove_signal_handler(number)

    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            loop.add_signal_handler(number, on_signal)
    return stop
