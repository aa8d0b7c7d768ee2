"""End a stopping process even if something hangs: a frozen server neither answers nor closes the connection."""

import os
import threading

import structlog

log = structlog.get_logger(__name__)

STATUS = 70
"""The exit status then (EX_SOFTWARE): the process did not shut down cleanly."""


def end_within(seconds: float) -> None:
    """End this process after `seconds`, unless it ends by itself; the next one repeats what was not confirmed."""
    timer = threading.Timer(seconds, _end, [seconds])
    timer.daemon = True
    timer.start()


def _end(seconds: float) -> None:
    log.error("not shut down cleanly: something hangs", seconds=seconds)
    os._exit(STATUS)
