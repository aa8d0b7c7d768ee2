"""What grows is kept in bounds: the outbox's partitions, made ahead of time and dropped after their retention, and
applied webhooks, forgotten after theirs. `payments http` does it all along.

The HTTP process does it because every installation runs one, whoever publishes its events (our relay or Debezium);
any number may do it at once. Should none, rows land in the default partition and nothing is lost.
"""

import asyncio
from datetime import timedelta
from typing import Final

import asyncpg
import structlog
from aiokafka.admin import AIOKafkaAdminClient
from prometheus_client import Gauge

from app.health import Checks
from app.settings import Settings
from domain.errors import PaymentsError
from infra.postgres.errors import AWAY
from infra.postgres.inbox import forget_applied
from infra.postgres.maintenance import MaintenanceReport, maintain
from infra.postgres.schema import schema_trouble

LAST_SUCCESS: Final = Gauge(
    "payments_maintenance_last_success_timestamp_seconds", "When a round of maintenance last left nothing undone"
)

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

    async def run(self, stop: asyncio.Event) -> None:
        """Maintain at once and then every `maintenance_interval_seconds`; a failure waits for the next turn."""
        while not stop.is_set():
            try:
                await maintain_once(self._settings)
            except (*AWAY, PaymentsError) as error:  # A row that somebody holds, or has taken first, among them.
                log.warning("maintenance failed", error=type(error).__name__)
            try:
                async with asyncio.timeout(self._settings.maintenance_interval_seconds):
                    await stop.wait()
            except TimeoutError:
                continue

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
