"""Events from the write-ahead log, by logical replication: already in commit order.

A slot has only what was committed after its creation, so earlier events are read from the table first.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, assert_never

import psycopg
import structlog

from infra.relay import metrics
from infra.relay.config import RelayConfig
from infra.relay.errors import SlotBusy, SlotOfAnother
from infra.relay.event import OUTBOX_COLUMNS, Group, OutboxEvent
from infra.relay.outbox_rows import scan
from infra.relay.progress.beginning import Adopt, CatchUp, GoOn, LogState, Publication, settle_beginning
from infra.relay.progress.checkpoint import (
    SAVE_LSN,
    ended_by_now,
    flushed_by_now,
    refuse_gap,
    save_checkpoint,
    start_checkpoint,
)
from infra.relay.progress.snapshot import NOTHING, Snapshot
from infra.relay.publish.records import Records
from infra.relay.source import CatchUpSink, Intake
from infra.relay.wake_trigger import set_notify
from infra.relay.wal.gulps import Gulps
from infra.relay.wal.pgoutput import BEGIN, COMMIT, INSERT, RELATION, RowReader, read_begin, read_commit
from infra.relay.wal.prefix import Prefix
from infra.relay.wal.stream import ReplicationStream

if TYPE_CHECKING:
    from infra.relay.native import LogReader

log = structlog.get_logger(__name__)

READ_MAX: Final = 1000
"""The most events read from the log before the loop turns to Kafka; in Python, the most messages."""
IDLE_BYTES: Final = 1024 * 1024
"""How far the slot may lag behind a log without events of ours: saving the position itself writes log."""

PROOFS_MAX: Final = 1000
"""The most snapshots that wait until Kafka has acknowledged every event visible in them."""

FIND_SLOT: Final = """
    SELECT database, database IS DISTINCT FROM current_database(), plugin, wal_status,
           (confirmed_flush_lsn - '0/0'::pg_lsn)::bigint, active
      FROM pg_replication_slots WHERE slot_name = %s
"""
# A row filter, or a publication without inserts, leaves events out just as a missing table does. The second column
# changes with every change of the publication: what was committed while the table was left out is not in the log.
PUBLICATION: Final = """
    SELECT EXISTS (
        SELECT FROM pg_publication_tables AS t
         WHERE t.pubname = p.pubname AND p.pubinsert AND t.rowfilter IS NULL
           AND t.attnames::text[] @> %(columns)s::text[]
           AND format('%%I.%%I', t.schemaname, t.tablename)::regclass = 'outbox'::regclass),
           concat_ws(' ', p.oid, p.xmin, r.oid, r.xmin, n.oid, n.xmin)
      FROM pg_publication AS p
      LEFT JOIN pg_publication_rel AS r ON r.prpubid = p.oid AND r.prrelid = 'outbox'::regclass
      LEFT JOIN pg_publication_namespace AS n ON n.pnpubid = p.oid
           AND n.pnnspid = (SELECT relnamespace FROM pg_class WHERE oid = 'outbox'::regclass)
     WHERE p.pubname = %(name)s
"""


class WalSource:
    """One slot and its stream; fits `infra.relay.source.Source`."""

    def __init__(self, config: RelayConfig, leader: psycopg.AsyncConnection) -> None:
        self._config = config
        self._leader = leader
        self._stream: ReplicationStream
        self._prefix = Prefix()
        self._rows = RowReader(outbox=0)
        """Matches no table until `open`."""
        self._reader: LogReader | None = None
        """Reads the stream in C, if that is configured and compiled."""
        self._group = Group(end_lsn=0)
        """Counts the events that arrive, until it has an end."""
        self._committed_at_us = 0
        """Commit time of the transaction that began last in the log."""
        self._saved = 0
        self._unconfirmed: deque[tuple[int, int]] = deque()
        """Positions saved and not yet confirmed to the slot, as (log position after the save, saved position)."""
        self._confirmed = 0
        self._published = NOTHING
        self._proofs: deque[tuple[int, Snapshot]] = deque()
        self._has_news = True
        """There is something to prove; at first what a killed relay, or one that handed the slot back, published."""
        self._gulps = Gulps()
        self._next_gulp: asyncio.TimerHandle | None = None
        self._unproven: list[int] = []
        """Transactions that no proof sees yet: a commit is in the log before snapshots see it."""
        self._publication: str | None = None
        """Its version when this relay began to rely on the log."""

    async def open(self, sink: CatchUpSink) -> None:
        self._stream = await ReplicationStream.connect(self._config.postgres_url)
        await set_notify(self._leader, is_on=False)
        system = await self._stream.system_identifier()
        self._rows = RowReader(await self._outbox())
        await self._begin(sink, system)
        # From the saved position: the slot is confirmed later, and would repeat what was acknowledged since.
        await self._stream.start(self._config.slot, self._config.publication, self._saved)
        self._gulps = Gulps(is_taken=not self._stream.is_unix_socket)
        if self._config.uses_native:
            self._reader = self._stream.log_reader(self._prefix.begin, self._unproven)

    async def _outbox(self) -> int:
        row = await (await self._leader.execute("SELECT 'outbox'::regclass::oid::bigint")).fetchone()
        assert row is not None, "the query always gives a row"
        return int(row[0])

    async def _begin(self, sink: CatchUpSink, system: str) -> None:
        state = await self._find_log()
        self._publication = state.publication.version
        match await settle_beginning(self._leader, self._config, system, state):
            case CatchUp(reason, published):
                await self._catch_up(sink, system, reason, published)
            case Adopt(published):
                log.warning("slot adopted where it stands", slot=self._config.slot)
                await self._start_checkpoint(system, state.position, published)
            case GoOn(checkpoint, published):
                self._published, self._confirmed = published, state.position
                saved = checkpoint.confirmed_lsn
                await self._note_saved(state.position if saved is None else saved)
            case unknown:
                assert_never(unknown)

    async def _find_log(self) -> LogState:
        """The state of slot and publication.

        Raises:
            SlotOfAnother: the slot is of another database or plugin.
            SlotBusy: another client reads from it or is creating it.
        """
        publication = await self._find_publication()
        row = await (await self._leader.execute(FIND_SLOT, [self._config.slot])).fetchone()
        if row is None:
            return LogState("missing", 0, publication)
        database, is_elsewhere, plugin, slot_state, position, is_active = row
        if is_elsewhere or plugin != "pgoutput":
            raise SlotOfAnother(self._config.slot, f"database {database!r}, plugin {plugin!r}")
        if is_active or position is None:
            raise SlotBusy(f"another client reads from slot {self._config.slot}, or is creating it")
        return LogState(slot_state, position, publication)

    async def _catch_up(self, sink: CatchUpSink, system: str, reason: str, published: Snapshot) -> None:
        """Recreate the slot and publish every row committed before it that `published` does not cover.

        The checkpoint is saved only when everything is acknowledged; a catch-up that ends earlier starts over.
        """
        slot = self._config.slot
        log.warning("slot recreated: publishing from the table", slot=slot, reason=reason, beyond=str(published))
        if await (await self._leader.execute(FIND_SLOT, [slot])).fetchone() is not None:
            await self._stream.drop_slot(slot)
        snapshot = await self._stream.create_slot(slot)
        count, published = await scan(self._config.postgres_url, snapshot, sink.publish, published)
        await sink.drained()
        metrics.RESCANNED.inc(count)
        row = await (await self._leader.execute(FIND_SLOT, [slot])).fetchone()
        assert row is not None, "the slot was just made"
        await self._start_checkpoint(system, row[4], published, events=count)
        if count:
            log.warning("retained events were published from the table", slot=slot, events=count)

    async def _start_checkpoint(self, system: str, lsn: int, published: Snapshot, *, events: int = 0) -> None:
        self._saved = self._confirmed = lsn
        self._published = published
        values: dict[str, Any] = {"lsn": lsn, "events": events, "publication": self._publication}
        await start_checkpoint(self._leader, self._config, system, published, **values)

    # --- the stream -------------------------------------------------------------------------------------------------

    async def read(self, intake: Intake) -> bool:
        if self._gulps.pause_seconds:
            return False
        if self._reader is not None and intake.open_records is not None:
            count, is_all = self._read_natively(self._reader, intake, intake.open_records)
        else:
            count, is_all = self._read_in_python(intake)
        self._gulps.note(count, is_all=is_all)
        return not is_all

    def _read_natively(self, reader: "LogReader", intake: Intake, records: list[Records | None]) -> tuple[int, bool]:
        """Read and encode in C what it supports; the number of events, and whether nothing is left to read."""
        room = intake.room
        reader.group, reader.committed_at_us = self._group, self._committed_at_us
        count, size, is_all, message = reader.read(
            min(READ_MAX, room.events), room.size, intake.payload_max, records, intake.renew
        )
        self._group, self._committed_at_us = reader.group, reader.committed_at_us
        self._has_news, reader.has_commit = self._has_news or reader.has_commit, False
        intake.note(count, size)
        if message == b"":
            raise self._stream.ended()
        if message is not None:
            self._handle(message, intake)
        return count, is_all

    def _handle(self, message: bytes, intake: Intake) -> None:
        if message[0] != INSERT:
            self._follow(message)
        elif (event := self._rows.read(message)) is not None:
            self._publish([event], intake)

    def _publish(self, events: list[OutboxEvent], intake: Intake) -> list[OutboxEvent]:
        """Hand a transaction's events over together; returns an empty list for the next ones."""
        if not events:
            return events
        self._leave_ended_group()
        intake.publish(events, self._group)
        return []

    def _leave_ended_group(self) -> None:
        """Begin another group if this one has an end, of an earlier transaction: `Prefix` may drop it any time."""
        if self._group.end_lsn is not None:
            self._group = self._prefix.begin(self._committed_at_us)

    def _read_in_python(self, intake: Intake) -> tuple[int, bool]:
        receive, read, room = self._stream.receive, self._rows.read, intake.room
        events: list[OutboxEvent] = []
        message, count, size = None, 0, 0
        for _ in range(min(READ_MAX, room.events)):
            message = receive()
            if message is None:
                break
            if message[0] == INSERT:
                event = read(message)
                if event is None:
                    continue
                events.append(event)
                count += 1
                size += len(event.payload)
                if size >= room.size:
                    break
            else:
                events = self._publish(events, intake)
                self._follow(message)
        self._publish(events, intake)
        return count, message is None

    def _follow(self, message: bytes) -> None:
        match message[0]:
            case kind if kind == BEGIN:
                self._committed_at_us, xid = read_begin(message)
                self._group = self._prefix.begin(self._committed_at_us)
                self._unproven.append(xid)
            case kind if kind == COMMIT:
                self._leave_ended_group()
                self._group.end_lsn = read_commit(message)
                self._has_news = True
            case kind if kind == RELATION:
                self._rows.learn(message)
                if self._reader is not None:
                    self._reader.learn(*self._rows.outbox)
            case kind:
                log.warning("unexpected message in the log stream", kind=chr(kind))

    def watch(self, on_ready: Callable[[], None]) -> None:
        rest = self._gulps.pause_seconds
        if not rest:
            self._stream.watch(on_ready)
        elif self._next_gulp is None:
            self._stream.unwatch()
            self._next_gulp = asyncio.get_running_loop().call_later(rest, self._end_rest, on_ready)

    def _end_rest(self, on_ready: Callable[[], None]) -> None:
        self._next_gulp = None
        on_ready()

    def unwatch(self) -> None:
        if self._next_gulp is not None:
            self._next_gulp.cancel()
            self._next_gulp = None
        self._stream.unwatch()

    # --- how far --------------------------------------------------------------------------------------------------

    async def save(self) -> None:
        """Save the position to the table, then confirm it to the slot: a slot further on was moved by another client.

        The slot is confirmed once the stream has passed the commit of the save. Where a stream waits for standbys
        (synchronized_standby_slots), they then have the save too, so the same holds for their copies of table and slot.

        Raises:
            GapFound: the log may lack events committed since the last save.
        """
        await self._check_publication()
        lsn = self._prefix.advance(self._stream.wal_end)
        is_proof_due = bool(self._proofs) and self._proofs[0][0] <= lsn
        if lsn > self._saved and (self._has_news or is_proof_due or lsn - self._saved > IDLE_BYTES):
            await self._save(lsn)
        while self._unconfirmed and self._unconfirmed[0][0] <= lsn:
            _, self._confirmed = self._unconfirmed.popleft()
        self._stream.confirm(self._confirmed)

    async def _check_publication(self) -> None:
        """Ask the catalog: the log itself does not show that events are left out of it."""
        reason = (await self._find_publication()).doubt_since(self._publication)
        if reason is not None:
            await refuse_gap(self._leader, self._config.slot, reason, self._published)

    async def _find_publication(self) -> Publication:
        values = {"name": self._config.publication, "columns": list(OUTBOX_COLUMNS)}
        row = await (await self._leader.execute(PUBLICATION.encode(), values)).fetchone()
        return Publication(*row) if row is not None else Publication(is_whole=False, version=None)

    async def _save(self, lsn: int) -> None:
        if self._has_news and len(self._proofs) < PROOFS_MAX:
            position, snapshot = await ended_by_now(self._leader)
            self._proofs.append((position, snapshot))
            # The log can be far ahead of snapshots while a commit waits for a synchronous standby.
            self._unproven[:] = snapshot.unseen(self._unproven)
        self._has_news = bool(self._unproven) or not self._prefix.is_empty
        while self._proofs and self._proofs[0][0] <= lsn:
            _, self._published = self._proofs.popleft()
        values = {"slot": self._config.slot, "lsn": lsn, "publication": self._publication} | self._published.proof
        await save_checkpoint(self._leader, SAVE_LSN, values)
        await self._note_saved(lsn)

    async def _note_saved(self, lsn: int) -> None:
        self._saved = lsn
        self._unconfirmed.append((await flushed_by_now(self._leader), lsn))

    def answer(self) -> None:
        if self._stream.is_reply_wanted:
            self._stream.confirm(self._confirmed)

    @property
    def oldest_commit_us(self) -> int | None:
        return self._prefix.oldest_commit_us

    async def finish(self) -> None:
        # At once, so that the slot's next reader, perhaps Debezium, repeats nothing.
        self._stream.confirm(self._saved)
        await self._stream.finish()

    async def close(self) -> None:
        if hasattr(self, "_stream"):
            self.unwatch()
            await self._stream.close()
