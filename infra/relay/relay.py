"""The relay: publishes every committed outbox row, at least once, in order per payment.

Its progress (`relay_slots`, and with `wal` the slot's position) moves past a commit once Kafka has acknowledged every
event up to it. Any error ends a session, and the next one begins there; so events may repeat, but none is skipped.
"""

import asyncio
import contextlib
import random
import time

import psycopg
import structlog
from aiokafka.errors import KafkaError

from infra.relay import metrics
from infra.relay.config import RelayConfig
from infra.relay.connection import CONNECTION
from infra.relay.errors import GapFound, KafkaAway, RelayError, SlotBusy
from infra.relay.health import RelayHealth, State, Status
from infra.relay.progress.repairs import count_beyond
from infra.relay.session import Session

log = structlog.get_logger(__name__)

LONG_SECONDS = 10.0
"""After a session that lasted this long, the next pause is short again."""
COUNTS_AT_MOST = b"SET statement_timeout = '5s'"
"""A count of a large outbox would keep the relay from a stop, and from the operator's decision, for that long."""
NO_SCHEMA = "the database has no schema, or another release's: run `payments migrate`"


class Relay:
    """Runs sessions until it is stopped. Of several relays with one slot, one is active and the others stand by."""

    def __init__(self, config: RelayConfig) -> None:
        self._config = config
        self._status = Status(stalled_seconds=config.stalled_seconds)
        self._failures = 0
        self._gap_reason: str | None = None

    @property
    def health(self) -> RelayHealth:
        """The current result of the health check."""
        return self._status.health

    @property
    def trouble(self) -> str | None:
        """Why this relay is not ready; None while it publishes or stands by."""
        return None if self.health.ready else self.health.detail

    async def run(self, stop: asyncio.Event) -> None:
        """Publish until `stop` is set; then wait until everything read is acknowledged, and confirm it."""
        while not stop.is_set():
            started = time.monotonic()
            try:
                await Session(self._config, self._status, stop).run()
            except SlotBusy:
                self._status.enter(State.STANDBY)
                await self._pause(stop, self._config.standby_seconds)
            except GapFound as error:
                await self._stand_still(error)
                await self._pause(stop, self._config.gap_seconds)
            except (RelayError, KafkaError, psycopg.Error, OSError) as error:
                self._failures = 0 if time.monotonic() - started > LONG_SECONDS else self._failures + 1
                await self._reconnect(stop, error)
        self._status.enter(State.STOPPED)

    async def _stand_still(self, gap: GapFound) -> None:
        """Report a new gap. Counting the events that may be missing reads the outbox: once, and for a while at most."""
        if self._status.state is State.GAP and self._gap_reason == gap.reason:
            return
        self._gap_reason, text = gap.reason, str(gap)
        self._status.enter(State.GAP, text)
        with contextlib.suppress(psycopg.Error, OSError):
            async with await psycopg.AsyncConnection.connect(self._config.postgres_url, **CONNECTION) as connection:
                await connection.execute(COUNTS_AT_MOST)
                text = gap.told_with(*await count_beyond(connection, gap.published))
        self._status.enter(State.GAP, text)
        log.error("the relay stands still: events may be missing", slot=self._config.slot, error=text)

    async def _reconnect(self, stop: asyncio.Event, error: Exception) -> None:
        server = "kafka" if isinstance(error, (KafkaAway, KafkaError)) else "postgres"
        wait = min(self._config.retry_seconds_max, 0.1 * 2 ** min(self._failures, 10)) * random.uniform(0.5, 1)  # noqa: S311
        metrics.RECONNECTS.labels(server).inc()
        why = NO_SCHEMA if isinstance(error, psycopg.errors.UndefinedTable) else type(error).__name__
        self._status.enter(State.RECONNECTING, f"{server}: {why}")
        log.warning("relay session ended", server=server, error=str(error).strip(), retry_seconds=round(wait, 2))
        await self._pause(stop, wait)

    async def _pause(self, stop: asyncio.Event, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await stop.wait()
