"""How far a relay is behind, measured in Postgres: a source cannot report events that it does not bring."""

import contextlib
import time
from typing import Final

import psycopg
from psycopg import sql
from psycopg.pq import TransactionStatus

from infra.relay import metrics
from infra.relay.config import RelayConfig

SLOT: Final = """
    SELECT slot_name::text, pg_current_wal_flush_lsn() - confirmed_flush_lsn, pg_current_wal_lsn() - restart_lsn
      FROM pg_replication_slots WHERE slot_name = %s AND database = current_database()
"""
# Whether the transaction that was the newest one of the outbox is wholly on the topic by now, and which one is newest
# now. One message is one transaction, so the short lock_timeout holds for it alone, and other users of this connection
# do not wait long for a lock on the outbox.
NEWEST: Final = sql.SQL("""
    SET LOCAL lock_timeout = '100ms';
    SELECT (SELECT pg_visible_in_snapshot({newest}::text::xid8, window_begin) FROM relay_slots
             WHERE slot_name = {slot}),
           (SELECT xact FROM outbox WHERE xact IS NOT NULL ORDER BY xact DESC LIMIT 1)
""")
# How long the first event without proof has waited; a checkpoint of another server proves nothing here. The
# query gives up where a long transaction has left many events to search.
WAITING: Final = sql.SQL("""
    SET LOCAL statement_timeout = '1s';
    SELECT extract(epoch FROM now() - o.created_at)::float
      FROM (SELECT CASE WHEN is_own THEN published_below ELSE 0 END AS published_below,
                   CASE WHEN is_own THEN window_begin END AS window_begin
              FROM (SELECT saved.*, saved.system_identifier = here.system_identifier::text AS is_own
                      FROM relay_slots AS saved, pg_control_system() AS here WHERE slot_name = {slot}) AS found) AS r,
           LATERAL (
           SELECT created_at FROM outbox
            WHERE xact >= r.published_below
              AND (r.window_begin IS NULL OR NOT pg_visible_in_snapshot(xact::text::xid8, r.window_begin))
            ORDER BY xact LIMIT 1) AS o
""")
UNREAD_SECONDS = 5.0
"""A commit is usually proven to be published about two seconds later; one that waits longer is not being read."""


class Lag:
    """The lag, measured on the leader's connection, which other tasks use concurrently."""

    def __init__(self, leader: psycopg.AsyncConnection, config: RelayConfig) -> None:
        self._leader = leader
        self._config = config
        self._newest, self._newest_since = 0, time.monotonic()
        """A transaction that was the newest one of the outbox, and since when it has been waited for."""

    async def measure_log(self) -> None:
        """Set the metrics of the log: the stream shows only how far the server has read, not how long the log is."""
        row = await (await self._leader.execute(SLOT.encode(), [self._config.slot])).fetchone()
        if row is None:
            metrics.RETAINED_BYTES.clear()
            metrics.LAG_BYTES.set(0)
            return
        if self._config.source == "wal":  # A poll may still have a slot, but does not read from it.
            metrics.LAG_BYTES.set(max(0, int(row[1] or 0)))
        metrics.RETAINED_BYTES.labels(row[0]).set(max(0, int(row[2] or 0)))

    async def measure_waiting(self) -> None:
        """Set the lag to how long the first event without proof has waited, while no session can begin."""
        with contextlib.suppress(psycopg.errors.QueryCanceled, psycopg.errors.LockNotAvailable):
            cursor = await self._leader.execute(WAITING.format(slot=self._config.slot))
            cursor.nextset()
            row = await cursor.fetchone()
            metrics.LAG_SECONDS.set(0 if row is None else row[0])

    async def look_for_unread(self) -> None:
        """Look for unread events in the table: a source that brings nothing cannot know whether there are any."""
        if self._leader.info.transaction_status in (TransactionStatus.INTRANS, TransactionStatus.INERROR):
            return  # A lock time-out here would abort the transaction that another task has open on this connection.
        query = NEWEST.format(newest=self._newest, slot=self._config.slot)
        with contextlib.suppress(psycopg.errors.LockNotAvailable):
            cursor = await self._leader.execute(query)
            cursor.nextset()
            row = await cursor.fetchone()
            assert row is not None, "the query always gives a row"
            is_published, newest = row
            if is_published is not False or not self._newest:
                self.expect(newest or 0)

    def expect(self, transaction: int) -> None:
        """Measure from now on how long this transaction stays unread; 0 for none."""
        self._newest, self._newest_since = transaction, time.monotonic()

    @property
    def unread_seconds(self) -> float:
        """How long a transaction of the outbox has been waited for; 0 up to UNREAD_SECONDS, which is normal."""
        waited = time.monotonic() - self._newest_since if self._newest else 0.0
        return waited if waited > UNREAD_SECONDS else 0.0
