"""Structured logs on standard error: constant text, facts in fields, JSON lines (or colours for a person)."""

import contextlib
import logging
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def _hidden(library: str) -> Iterator[None]:
    """For the length of the block it counts as not installed, unless it was imported before."""
    if library in sys.modules:
        yield
        return
    sys.modules[library] = None  # type: ignore[assignment] # Python's own way to say so
    try:
        yield
    finally:
        del sys.modules[library]


# For traces of errors in colours, which ours are not: a tenth of every start, and so of every recovery.
with _hidden("rich"):
    import structlog


def configure_logs(process: str, *, as_json: bool) -> None:
    """Send everything, including the libraries' warnings, through one chain; call it once they are imported."""
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    renderer: structlog.typing.Processor = (
        structlog.processors.JSONRenderer() if as_json else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
    )
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    structlog.contextvars.bind_contextvars(process=process)
    handler = logging.StreamHandler(sys.stderr)
    formatter = structlog.stdlib.ProcessorFormatter(
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer], foreign_pre_chain=shared
    )
    handler.setFormatter(formatter)
    logging.basicConfig(handlers=[handler], level=logging.INFO, force=True)
    for name in ("aiokafka", "stripe", "httpx", "httpcore", "faststream", "alembic"):
        noisy = logging.getLogger(name)
        noisy.setLevel(logging.WARNING)
        noisy.handlers.clear()  # FastStream's writes past ours, in colours.
        noisy.propagate = True
    # Its pool warns with a stack trace at every attempt to reconnect; ours say that Postgres is away, and what waits.
    logging.getLogger("asyncpg").setLevel(logging.ERROR)
