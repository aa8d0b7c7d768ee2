"""A relay's own record of its progress: one row of `relay_slots`, and what that proves when something looks wrong.

`confirmed_lsn`: the slot is never confirmed beyond it. `window_begin`: a snapshot; every event of a transaction visible
in it is on the topic. `published_below` is that snapshot's lower end.
"""

from dataclasses import dataclass
from typing import Any, Final, Literal, NoReturn

import psycopg

from infra.relay.config import RelayConfig
from infra.relay.errors import CheckpointMissing, GapFound
from infra.relay.leadership import ADOPTION, is_held, lock_key
from infra.relay.progress.gaps import another_cluster, another_topic, gap_of, lost_before
from infra.relay.progress.snapshot import NOTHING, Snapshot

Repair = Literal["unproven", "everything", "adopt"]

# A request to adopt counts only while its command still waits: nobody has checked what the slot passed since then.
ASKED: Final = f"CASE WHEN repair <> 'adopt' OR {is_held(ADOPTION)} THEN repair END"
FIND: Final = f"""
    SELECT system_identifier, source, confirmed_lsn - '0/0'::pg_lsn AS confirmed_lsn, published_below,
           window_begin::text, window_end::text, window_position,
           {ASKED}, gap, publication, topic, kafka_cluster, acknowledged_offsets
      FROM relay_slots WHERE slot_name = %(slot)s
"""  # noqa: S608 - names from our own constants
# The end of the log is read after the snapshot is taken, so every transaction that the snapshot sees ends before it.
NOW: Final = """
    SELECT pg_current_snapshot()::text, (pg_current_wal_insert_lsn() - '0/0'::pg_lsn)::bigint
"""
FLUSHED: Final = "SELECT (pg_current_wal_flush_lsn() - '0/0'::pg_lsn)::bigint"
START: Final = """
    INSERT INTO relay_slots (slot_name, system_identifier, source, topic, kafka_cluster, confirmed_lsn,
                             published_below, window_begin, repaired_events, publication)
    VALUES (%(slot)s, %(system)s, %(source)s, %(topic)s, %(cluster)s, '0/0'::pg_lsn + %(lsn)s,
            %(below)s, %(published)s, %(events)s, %(publication)s)
    ON CONFLICT (slot_name) DO UPDATE
       SET system_identifier = excluded.system_identifier, source = excluded.source, topic = excluded.topic,
           kafka_cluster = coalesce(excluded.kafka_cluster, relay_slots.kafka_cluster),
           confirmed_lsn = excluded.confirmed_lsn, published_below = excluded.published_below,
           window_begin = excluded.window_begin, window_end = NULL, window_position = 0, gap = NULL, repair = NULL,
           repaired_events = excluded.repaired_events, publication = excluded.publication,
           acknowledged_offsets = NULL, caught_up_at = now(), updated_at = now()
"""
SAVE_LSN: Final = """
    UPDATE relay_slots SET confirmed_lsn = '0/0'::pg_lsn + %(lsn)s, published_below = %(below)s,
                           window_begin = %(published)s, publication = %(publication)s, updated_at = now()
     WHERE slot_name = %(slot)s
"""
SAVE_WINDOW: Final = """
    UPDATE relay_slots SET published_below = %(below)s, window_begin = %(begin)s, window_end = %(end)s,
                           window_position = %(position)s, updated_at = now()
     WHERE slot_name = %(slot)s
"""
SAVE_OFFSETS: Final = "UPDATE relay_slots SET acknowledged_offsets = %(offsets)s WHERE slot_name = %(slot)s"
# Always write: a relay that cannot record its progress would publish the same events again and again.
TRUST: Final = """
    UPDATE relay_slots SET gap = NULL, topic = %(topic)s, kafka_cluster = coalesce(%(cluster)s, kafka_cluster),
                           repair = nullif(repair, 'adopt')
     WHERE slot_name = %(slot)s
"""
REFUSE: Final = """
    UPDATE relay_slots SET gap = %(gap)s, repair = CASE WHEN %(withdraws)s THEN nullif(repair, 'adopt') ELSE repair END
     WHERE slot_name = %(slot)s
"""
SYSTEM: Final = "SELECT system_identifier::text FROM pg_control_system()"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The progress that a relay saved last."""

    system_identifier: str
    source: str
    confirmed_lsn: int | None
    published_below: int
    window_begin: str | None
    window_end: str | None
    window_position: int
    repair: Repair | None
    gap: str | None
    publication: str | None
    topic: str | None
    kafka_cluster: str | None
    """None in a record from before this was saved; likewise `topic`."""
    acknowledged_offsets: list[int] | None = None
    """The last offset that Kafka has acknowledged in each partition, or -1; None before the first is saved."""

    def published_on(self, system: str) -> Snapshot:
        """The events proven to be on the topic. Transaction ids of another server prove nothing on this one."""
        if self.system_identifier != system:
            return NOTHING
        if self.window_begin is None:
            return Snapshot.of_all_below(self.published_below)
        return Snapshot.read(self.window_begin)

    def another_destination(self, config: RelayConfig) -> str | None:
        """The gap's reason if it published to another topic or Kafka cluster before; None otherwise."""
        topic, cluster = (self.topic, config.topic), (self.kafka_cluster, config.kafka_cluster)
        return gap_of(
            tell(before, now)
            for tell, (before, now) in ((another_topic, topic), (another_cluster, cluster))
            if before and now and before != now
        )

    def offsets_to_exceed(self, config: RelayConfig) -> list[int]:
        """The offsets that this relay's events must exceed; none where others count from now on, or already do."""
        is_decided = self.repair in ("everything", "adopt")
        return [] if is_decided or self.another_destination(config) else self.acknowledged_offsets or []


async def find_checkpoint(leader: psycopg.AsyncConnection, slot: str) -> Checkpoint | None:
    """The record of the relay of this name; None before its first catch-up."""
    values = {"slot": slot, "key": lock_key(ADOPTION, slot)[1]}
    row = await (await leader.execute(FIND.encode(), values)).fetchone()
    if row is None:
        return None
    system, source, lsn, *others = row
    return Checkpoint(system, source, None if lsn is None else int(lsn), *others)


async def find_published(connection: psycopg.AsyncConnection, slot: str) -> Snapshot:
    """The events proven to be on the topic, as this relay saved them last; none if Kafka has lost some of them."""
    checkpoint = await find_checkpoint(connection, slot)
    row = await (await connection.execute(SYSTEM)).fetchone()
    if checkpoint is None or row is None or lost_before(checkpoint.gap):
        return NOTHING
    return checkpoint.published_on(row[0])


async def start_checkpoint(
    leader: psycopg.AsyncConnection,
    config: RelayConfig,
    system: str,
    published: Snapshot,
    *,
    lsn: int = 0,
    events: int = 0,
    publication: str | None = None,
) -> None:
    """Record that all retained events visible in `published` are on the topic; clears any gap and requested repair."""
    values: dict[str, Any] = {
        "slot": config.slot,
        "system": system,
        "source": config.source,
        "topic": config.topic,
        "cluster": config.kafka_cluster,
        "lsn": lsn,
        "events": events,
        "publication": publication,
    }
    await leader.execute(START.encode(), values | published.proof)


async def refuse_gap(
    leader: psycopg.AsyncConnection, slot: str, reason: str, published: Snapshot, *, withdraws_adopt: bool = False
) -> NoReturn:
    """Record the gap for `payments relay status`; `withdraws_adopt` also withdraws a request to adopt.

    Raises:
        GapFound: always.
    """
    await leader.execute(REFUSE, {"gap": reason, "slot": slot, "withdraws": withdraws_adopt})
    raise GapFound(reason, published)


async def trust_checkpoint(leader: psycopg.AsyncConnection, config: RelayConfig) -> None:
    """Record that nothing has changed since the checkpoint was saved; clears any gap and request to adopt."""
    values = {"slot": config.slot, "topic": config.topic, "cluster": config.kafka_cluster}
    await leader.execute(TRUST, values)


async def save_checkpoint(leader: psycopg.AsyncConnection, query: str, values: dict[str, Any]) -> None:
    """Record, by SAVE_LSN or SAVE_WINDOW, the point up to which every event is acknowledged.

    Raises:
        CheckpointMissing: the record has been deleted.
    """
    if (await leader.execute(query.encode(), values)).rowcount != 1:
        raise CheckpointMissing("the relay's row of relay_slots is gone, and with it the proof of what is published")


async def save_offsets(leader: psycopg.AsyncConnection, slot: str, offsets: list[int]) -> None:
    """Record the last acknowledged offset of each partition."""
    await leader.execute(SAVE_OFFSETS, {"offsets": offsets, "slot": slot})


async def ended_by_now(connection: psycopg.AsyncConnection) -> tuple[int, Snapshot]:
    """A snapshot, and a position of the log after the commits of all transactions that it sees."""
    row = await (await connection.execute(NOW.encode())).fetchone()
    assert row is not None, "the query always gives a row"
    return row[1], Snapshot.read(row[0])


async def flushed_by_now(connection: psycopg.AsyncConnection) -> int:
    """A position of the log after everything that this connection has committed."""
    row = await (await connection.execute(FLUSHED)).fetchone()
    assert row is not None, "the query always gives a row"
    return int(row[0])
