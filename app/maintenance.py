"""Hourly maintenance by `payments http`: creates the outbox's partitions ahead of time and drops them after their
retention, deletes applied webhooks after theirs, and compares payments with the ledger.

The HTTP process does it because every installation runs one, whoever publishes its events (our relay or Debezium);
any number may do it at once. Should none, rows land in the default partition and nothing is lost.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
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
from infra.postgres.errors import AWAY, safe_message
from infra.postgres.inbox import forget_applied
from infra.postgres.ledger import FIRST_ID, LedgerDifference, check_all, check_changed, database_time
from infra.postgres.maintenance import MaintenanceReport, maintain
from infra.postgres.schema import schema_trouble

LAST_SUCCESS: Final = Gauge(
    "payments_maintenance_last_success_timestamp_seconds", "When a round of maintenance last left nothing undone"
)
LEDGER_DIFFERENCES: Final = Gauge(
    "payments_ledger_differences", "Payments whose amounts are not what the ledger adds up to"
)
LEDGER_CHECKED: Final = Gauge(
    "payments_ledger_checked_timestamp_seconds", "Up to when all changes of payments were compared with the ledger"
)
WHOLE_AGAIN: Final = timedelta(days=1)
"""A change without an event is found within this time."""
LOGGED_MAX: Final = 100
"""At most this many new differences of one portion are logged one by one."""
CHECKED_AGAIN: Final = timedelta(minutes=10)
"""Overlap of two checks: a transaction that began before a check may commit after it."""
NEVER: Final = datetime.fromtimestamp(0, UTC)

log = structlog.get_logger(__name__)


class LeftUndone(Exception):
    """Postgres refused some of the maintenance; the message says what, and why."""


async def maintain_once(settings: Settings) -> MaintenanceReport:
    """Create the partitions of the coming days; drop partitions, and delete webhooks, that are past retention.

    The report and the log say what could not be done, and why.

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
    """The HTTP process's background work."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._differing: set[UUID] = set()
        self._changes_at = self._whole_at = self._whole_began = NEVER
        self._whole_next: UUID | None = None
        """Where an interrupted check of everything continues."""

    async def run(self, stop: asyncio.Event) -> None:
        """Maintain at once and then every `maintenance_interval_seconds`; after a failure the next turn tries again.

        The ledger has turns of its own: checking all of it may take hours, during which changes are checked as well.
        """
        async with asyncio.TaskGroup() as turns:
            turns.create_task(self._repeat(stop, "outbox and inbox", lambda: maintain_once(self._settings)))
            turns.create_task(self._repeat(stop, "ledger", self.check_changes))
            turns.create_task(self._repeat(stop, "whole ledger", self.check_everything))

    async def _repeat(self, stop: asyncio.Event, what: str, step: Callable[[], Awaitable[object]]) -> None:
        while not stop.is_set():
            await self._attempt(what, step)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._settings.maintenance_interval_seconds):
                    await stop.wait()

    async def _attempt(self, what: str, step: Callable[[], Awaitable[object]]) -> None:
        try:
            await step()
        except (*AWAY, PaymentsError) as error:  # Including a row that another process holds, or took first.
            log.warning("maintenance failed", step=what, error=type(error).__name__, message=safe_message(error))

    async def check_changes(self) -> None:
        """Check what has changed since the last check (the first time: since a day ago), and what differed then.

        Raises:
            `infra.postgres.errors.AWAY`: Postgres cannot be reached, or is gone.
        """
        url, differed = self._settings.postgres_url, set(self._differing)
        began = await database_time(url)
        since = began - WHOLE_AGAIN if self._changes_at == NEVER else self._changes_at - CHECKED_AGAIN
        found: set[UUID] = set()
        async for portion in check_changed(url, since, beside=differed):
            found |= self._note(portion.differences)
        self._differing -= differed - found
        self._changes_at = began
        self._publish()

    async def check_everything(self) -> None:
        """Check every payment, if that was not done for a day; an interrupted check continues where it ended.

        Raises:
            `infra.postgres.errors.AWAY`: Postgres cannot be reached, or is gone.
        """
        url = self._settings.postgres_url
        now = await database_time(url)
        if now - self._whole_at < WHOLE_AGAIN:
            return
        if self._whole_next is None:
            self._whole_began, self._whole_next = now, FIRST_ID
        async for portion in check_all(url, self._whole_next):
            self._note(portion.differences)
            self._whole_next = portion.next_id
            self._whole_at = self._whole_began if portion.next_id is None else self._whole_at
        self._publish()

    def _note(self, differences: Sequence[LedgerDifference]) -> set[UUID]:
        news = [each for each in differences if each.payment_id not in self._differing]
        for each in news[:LOGGED_MAX]:
            log.error("payment differs from the ledger", **each._asdict() | {"payment_id": str(each.payment_id)})
        if len(news) > LOGGED_MAX:
            log.error("more payments differ from the ledger", payments=len(news) - LOGGED_MAX)
        found = {each.payment_id for each in differences}
        self._differing |= found
        self._publish()
        return found

    def _publish(self) -> None:
        LEDGER_DIFFERENCES.set(len(self._differing))
        is_whole = self._changes_at - self._whole_at < 2 * WHOLE_AGAIN
        LEDGER_CHECKED.set((self._changes_at if is_whole else self._whole_at).timestamp())

    def checks(self) -> Checks:
        """The servers' health. The pages do not need them, but a server in trouble should be seen."""
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
