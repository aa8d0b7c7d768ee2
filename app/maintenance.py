"""Hourly maintenance by `payments http`: the outbox's partitions, made ahead of time and dropped after their retention;
applied webhooks, forgotten after theirs; payments that changed, compared with the ledger.

The HTTP process does it because every installation runs one, whoever publishes its events (our relay or Debezium);
any number may do it at once. Should none, rows land in the default partition and nothing is lost.
"""

import asyncio
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Final
from uuid import UUID

import asyncpg
import structlog
from aiokafka.admin import AIOKafkaAdminClient
from prometheus_client import Gauge

from app.health import Checks
from app.settings import Settings
from domain.errors import PaymentsError
from infra.postgres.errors import AWAY
from infra.postgres.inbox import forget_applied
from infra.postgres.ledger import check_changed
from infra.postgres.maintenance import MaintenanceReport, maintain
from infra.postgres.schema import schema_trouble

LAST_SUCCESS: Final = Gauge(
    "payments_maintenance_last_success_timestamp_seconds", "When a round of maintenance last left nothing undone"
)
LEDGER_DIFFERENCES: Final = Gauge(
    "payments_ledger_differences", "Payments whose amounts are not what the ledger adds up to"
)
CHECKED_AT_FIRST: Final = timedelta(days=1)
"""How far back the first look at the ledger goes; `payments check` looks at everything."""
CHECKED_AGAIN: Final = timedelta(minutes=10)
"""What began before a look may have been committed after it."""

log = structlog.get_logger(__name__)


async def maintain_once(settings: Settings) -> MaintenanceReport:
    """Make the partitions of the coming days; drop those past retention, and forget webhooks that are.

    What is left undone, and why, is in the report and in the log.

    Raises:
        `infra.postgres.errors.AWAY`: as `infra.postgres.maintenance.maintain`.
        StoreUnavailable, ConcurrentUpdate, InputRefusedByStore: as `infra.postgres.inbox.forget_applied`.
    """
    report = await maintain(
        settings.postgres_url,
        days_ahead=settings.outbox_days_ahead,
        retention_days=settings.outbox_retention_days,
    )
    if report.failed:
        log.warning("maintenance left something undone", failed=report.failed)
    if report.kept_because:
        log.warning("old outbox partitions kept", reasons=report.kept_because)
    forgotten = await forget_applied(settings.postgres_url, older_than=timedelta(days=settings.inbox_retention_days))
    if forgotten:
        log.info("old webhooks forgotten", webhooks=forgotten)
    if not (report.failed or report.kept_because):
        LAST_SUCCESS.set_to_current_time()
    return report


class Maintenance:
    """What the HTTP process does beside answering."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._checked_since = datetime.now(UTC) - CHECKED_AT_FIRST
        self._differing: set[UUID] = set()

    async def run(self, stop: asyncio.Event) -> None:
        """Maintain at once and then every `maintenance_interval_seconds`; a failure waits for the next turn."""
        while not stop.is_set():
            await self._attempt("outbox and inbox", lambda: maintain_once(self._settings))
            await self._attempt("ledger", self.check_ledger)
            try:
                async with asyncio.timeout(self._settings.maintenance_interval_seconds):
                    await stop.wait()
            except TimeoutError:
                continue

    async def _attempt(self, what: str, step: Callable[[], Awaitable[object]]) -> None:
        try:
            await step()
        except (*AWAY, PaymentsError) as error:  # A row that somebody holds, or has taken first, among them.
            log.warning("maintenance failed", step=what, error=type(error).__name__)

    async def check_ledger(self) -> None:
        """Look at what has changed since the last time, and at what differed then; keep the metric.

        Raises:
            `infra.postgres.errors.AWAY`: Postgres cannot be reached, or is gone.
        """
        began = datetime.now(UTC)
        found = await check_changed(self._settings.postgres_url, self._checked_since, beside=self._differing)
        for each in found:
            if each.payment_id not in self._differing:
                log.error("payment differs from the ledger", **each._asdict() | {"payment_id": str(each.payment_id)})
        self._differing = {each.payment_id for each in found}
        self._checked_since = began - CHECKED_AGAIN
        LEDGER_DIFFERENCES.set(len(found))

    def checks(self) -> Checks:
        """What the HTTP process needs from others: nothing for its pages, but a sick server should be seen."""
        return {"postgres": self._check_postgres, "kafka": self._check_kafka}

    async def _check_postgres(self) -> str | None:
        connection = await asyncpg.connect(self._settings.postgres_url, timeout=1.5)
        try:
            return await schema_trouble(connection)
        finally:
            await connection.close()

    async def _check_kafka(self) -> str | None:
        admin = AIOKafkaAdminClient(**self._settings.kafka.client_arguments())
        try:
            await admin.start()
            missing = set(self._settings.topics) - set(await admin.list_topics())
        finally:
            await admin.close()
        return f"missing topics: {', '.join(sorted(missing))}; run `payments migrate`" if missing else None
