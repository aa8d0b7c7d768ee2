"""Events from the write-ahead log, by logical replication: the order of commits, with nothing to reconstruct.

A slot knows only what was committed after it was created, so what was committed before is read from the table first.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, assert_never

import psycopg
import structlog

from infra.relay import metrics
from infra.relay.beginning import Adopt, CatchUp, GoOn, LogState, Publication, find_beginning
from infra.relay.config import RelayConfig
from infra.relay.errors import SlotBusy, SlotOfAnother
from infra.relay.gulps import Gulps
from infra.relay.pgoutput import (
    BEGIN,
    COMMIT,
    INSERT,
    OUTBOX_COLUMNS,
    RELATION,
    OutboxEvent,
    RowReader,
    read_begin,
    read_commit,
)
from infra.relay.prefix import Group, Prefix
from infra.relay.progress import (
    SAVE_LSN,
    ended_by_now,
    flushed_by_now,
    refuse_gap,
    save_checkpoint,
    set_notify,
    start_checkpoint,
)
from infra.relay.records import Records
from infra.relay.scan import scan
from infra.relay.snapshot import NOTHING, Snapshot
from infra.relay.source import CatchUpSink, Intake
from infra.relay.stream import ReplicationStream

if TYPE_CHECKING:
    from infra.relay.native import LogReader

log = structlog.get_logger(__name__)

PORTION: Final = 1000
"""What is taken of the log in one go, before the loop turns to Kafka: events, or in Python messages."""
IDLE_BYTES: Final = 1024 * 1024
"""How far the slot may stay behind a log in which nothing is ours: writing the position down is itself log."""

PROOFS_MAX: Final = 1000
"""Snapshots that wait until Kafka has acknowledged what they see."""

FIND_SLOT: Final = """
    SELECT database, database IS DISTINCT FROM current_database(), plugin, wal_status,
           (confirmed_flush_lsn - '0/0'::pg_lsn)::bigint, active
      FROM pg_replication_slots WHERE slot_name = %s
"""
# With a row filter, or without inserts, the log is as silent as without the table. The second column changes with
# whatever is done to the publication: what was committed while the table was left out is not in the log.
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
        """Of no table, until it is open."""
        self._reader: LogReader | None = None
        """What reads the stream in C, if that is to be done."""
        self._group = Group(end_lsn=0)
        """What counts the events that come, unless it has ended."""
        self._committed_at_us = 0
        """When the transaction that was begun last was committed."""
        self._saved = 0
        self._written: deque[tuple[int, int]] = deque()
        """Positions that the slot is not told yet, each behind where the log has it that they were written down."""
        self._confirmed = 0
        self._published = NOTHING
        self._proofs: deque[tuple[int, Snapshot]] = deque()
        self._has_news = True
        """Something is to be proven: at first what was published by who was killed, or has handed the slot back."""
        self._gulps = Gulps()
        self._next_gulp: asyncio.TimerHandle | None = None
        self._taken: list[int] = []
        """Transactions that no proof sees yet: the log has a commit before snapshots do."""
        self._publication: str | None = None
        """As it was when what is in the log began to count."""

    async def open(self, sink: CatchUpSink) -> None:
        self._stream = await ReplicationStream.connect(self._config.postgres_url)
        await set_notify(self._leader, is_on=False)
        system = await self._stream.system_identifier()
        self._rows = RowReader(await self._outbox())
        await self._begin(sink, system)
        # From what was written down: the slot is told later, and would repeat what is acknowledged since.
        await self._stream.start(self._config.slot, self._config.publication, self._saved)
        self._gulps = Gulps(is_taken=not self._stream.is_unix_socket)
        if self._config.uses_native:
            self._reader = self._stream.log_reader(self._prefix.begin, self._taken)

    async def _outbox(self) -> int:
        row = await (await self._leader.execute("SELECT 'outbox'::regclass::oid::bigint")).fetchone()
        assert row is not None, "the query always gives a row"
        return int(row[0])

    async def _begin(self, sink: CatchUpSink, system: str) -> None:
        state = await self._find_log()
        self._publication = state.publication.version
        match await find_beginning(self._leader, self._config, system, state):
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
        """Where it is ours, and nobody else reads it."""
        publication = await self._find_publication()
        row = await (await self._leader.execute(FIND_SLOT, [self._config.slot])).fetchone()
        if row is None:
            return LogState("missing", 0, publication)
        database, is_elsewhere, plugin, slot_state, position, is_active = row
        if is_elsewhere or plugin != "pgoutput":
            raise SlotOfAnother(self._config.slot, f"database {database!r}, plugin {plugin!r}")
        if is_active or position is None:
            raise SlotBusy(f"somebody else reads from slot {self._config.slot}, or is making it")
        return LogState(slot_state, position, publication)

    async def _catch_up(self, sink: CatchUpSink, system: str, reason: str, published: Snapshot) -> None:
        """Make the slot anew and publish every row beyond `published` that was committed before it.

        Only when all of it is acknowledged this is written down; ended before, it begins again.
        """
        slot = self._config.slot
        log.warning("slot made anew: publishing from the table", slot=slot, reason=reason, beyond=str(published))
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
            count, is_all = self._hand_over(intake)
        self._gulps.note(count, is_all=is_all)
        return not is_all

    def _read_natively(self, reader: "LogReader", intake: Intake, records: list[Records | None]) -> tuple[int, bool]:
        """Read and encode in C what can be; how many events, and whether that was all."""
        room = intake.room
        reader.group, reader.committed_at_us = self._group, self._committed_at_us
        count, size, is_all, message = reader.read(
            min(PORTION, room.events), room.size, intake.payload_max, records, intake.renew
        )
        self._group, self._committed_at_us = reader.group, reader.committed_at_us
        self._has_news, reader.has_commit = self._has_news or reader.has_commit, False
        intake.note(count, size)
        if message == b"":
            raise self._stream.ended()
        if message is not None:
            self._take_any(message, intake)
        return count, is_all

    def _take_any(self, message: bytes, intake: Intake) -> None:
        if message[0] != INSERT:
            self._take(message)
        elif (event := self._rows.read(message)) is not None:
            self._publish([event], intake)

    def _publish(self, events: list[OutboxEvent], intake: Intake) -> list[OutboxEvent]:
        """Give a transaction's events on, together; a new list for the next ones."""
        if not events:
            return events
        self._leave_ended_group()
        intake.publish(events, self._group)
        return []

    def _leave_ended_group(self) -> None:
        """One with an end, of an earlier transaction, may be forgotten any time."""
        if self._group.end_lsn is not None:
            self._group = self._prefix.begin(self._committed_at_us)

    def _hand_over(self, intake: Intake) -> tuple[int, bool]:
        receive, read, room = self._stream.receive, self._rows.read, intake.room
        events: list[OutboxEvent] = []
        message, count, size = None, 0, 0
        for _ in range(min(PORTION, room.events)):
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
                self._take(message)
        self._publish(events, intake)
        return count, message is None

    def _take(self, message: bytes) -> None:
        match message[0]:
            case kind if kind == BEGIN:
                self._committed_at_us, xid = read_begin(message)
                self._group = self._prefix.begin(self._committed_at_us)
                self._taken.append(xid)
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
        """First to the table, then to the slot: so a slot that is further on was moved by somebody else.

        The slot is told when the stream has come past what the table was told: where a stream waits for standbys
        (synchronized_standby_slots), that is on them, too, and holds of their copies of table and slot.

        Raises:
            GapFound: the log has not brought us all that was committed since the last time.
        """
        await self._check_publication()
        lsn = self._prefix.advance(self._stream.wal_end)
        is_proof_due = bool(self._proofs) and self._proofs[0][0] <= lsn
        if lsn > self._saved and (self._has_news or is_proof_due or lsn - self._saved > IDLE_BYTES):
            await self._save(lsn)
        while self._written and self._written[0][0] <= lsn:
            _, self._confirmed = self._written.popleft()
        self._stream.confirm(self._confirmed)

    async def _check_publication(self) -> None:
        """Nothing in the log says that events are left out of it."""
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
            # Long before, if it waits for a synchronous standby.
            self._taken[:] = snapshot.unseen(self._taken)
        self._has_news = bool(self._taken) or not self._prefix.is_empty
        while self._proofs and self._proofs[0][0] <= lsn:
            _, self._published = self._proofs.popleft()
        values = {"slot": self._config.slot, "lsn": lsn, "publication": self._publication} | self._published.proof
        await save_checkpoint(self._leader, SAVE_LSN, values)
        await self._note_saved(lsn)

    async def _note_saved(self, lsn: int) -> None:
        self._saved = lsn
        self._written.append((await flushed_by_now(self._leader), lsn))

    def answer(self) -> None:
        if self._stream.is_reply_wanted:
            self._stream.confirm(self._confirmed)

    @property
    def oldest_commit_us(self) -> int | None:
        return self._prefix.oldest_commit_us

    async def finish(self) -> None:
        # At once: who reads the slot next, Debezium perhaps, is to repeat nothing.
        self._stream.confirm(self._saved)
        await self._stream.finish()

    async def close(self) -> None:
        if hasattr(self, "_stream"):
            self.unwatch()
            await self._stream.close()
