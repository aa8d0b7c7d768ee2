"""A process that was told to stop ends, whatever hangs: a server that is frozen neither answers nor hangs up."""

import os
import threading

import structlog

log = structlog.get_logger(__name__)

STATUS = 70
"""The exit status then (EX_SOFTWARE): not ended in good order."""


def end_within(seconds: float) -> None:
    """End this process in `seconds`, if it has not ended by itself; what was not confirmed the next one does again."""
    timer = threading.Timer(seconds, _end, [seconds])
    timer.daemon = True
    timer.start()


def _end(seconds: float) -> None:
    log.error("not ended in good order: something hangs", seconds=seconds)
    os._exit(STATUS)
