"""A relay's own record of how far it came, one row of `relay_slots`, and what it proves when something looks wrong.

`confirmed_lsn`: the slot is never told more. `window_begin`: every event of a transaction that this snapshot sees is on
the topic; `published_below` is its lower end.
"""

from dataclasses import dataclass
from typing import Any, Final, Literal, NoReturn

import psycopg
import structlog

from infra.relay.config import RelayConfig
from infra.relay.errors import CheckpointMissing, GapFound
from infra.relay.gaps import another_cluster, another_topic, gap_of
from infra.relay.leadership import ADOPTION, is_held, lock_key
from infra.relay.snapshot import NOTHING, Snapshot

log = structlog.get_logger(__name__)

Repair = Literal["unproven", "everything", "adopt"]

# Who asked to adopt, and waits no more, is not obeyed: what the slot has passed since, nobody has looked at.
ASKED: Final = f"CASE WHEN repair <> 'adopt' OR {is_held(ADOPTION)} THEN repair END"
FIND: Final = f"""
    SELECT system_identifier, source, confirmed_lsn - '0/0'::pg_lsn AS confirmed_lsn, published_below,
           window_begin::text, window_end::text, window_position,
           {ASKED}, gap, publication, topic, kafka_cluster
      FROM relay_slots WHERE slot_name = %(slot)s
"""  # noqa: S608 - names from our own constants
# Where the log ends is asked after the snapshot was taken: what the snapshot takes for finished lies before it.
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
           repaired_events = excluded.repaired_events, publication = excluded.publication, caught_up_at = now(),
           updated_at = now()
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
NOTIFIES: Final = """
    SELECT tgenabled <> 'D' FROM pg_trigger WHERE tgname = 'outbox_notify' AND tgrelid = 'outbox'::regclass
"""
# Always: who cannot write how far he is would publish the same again and again.
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
# Who of several relays came here first has forgotten; what has an id since then was written here, and somebody may have
# to find it by that.
FORGET: Final = """
    UPDATE outbox SET xact = NULL
     WHERE xact IS NOT NULL AND NOT EXISTS (
        SELECT FROM relay_slots AS r, pg_control_system() AS here
         WHERE r.system_identifier = here.system_identifier::text)
"""
MOVE: Final = """
    UPDATE relay_slots AS r
       SET system_identifier = here.system_identifier, repair = 'everything',
           published_below = 0, window_begin = NULL, window_end = NULL, window_position = 0
      FROM pg_control_system() AS here WHERE r.slot_name = %s
"""
# What a snapshot takes for the future, and is there, was written by another server's transactions.
FORGET_FUTURE: Final = """
    UPDATE outbox SET xact = NULL WHERE xact >= pg_snapshot_xmax(pg_current_snapshot())::text::bigint
"""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What a relay wrote down last."""

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
    """None from before it was written down, as `topic`."""

    def published_on(self, system: str) -> Snapshot:
        """What is proven to be on the topic. Ids of another server's transactions mean nothing, and prove nothing."""
        if self.system_identifier != system:
            return NOTHING
        if self.window_begin is None:
            return Snapshot.of_all_below(self.published_below)
        return Snapshot.read(self.window_begin)

    def another_destination(self, config: RelayConfig) -> str | None:
        """That it published to another topic before, or to one of another Kafka cluster."""
        topic, cluster = (self.topic, config.topic), (self.kafka_cluster, config.kafka_cluster)
        return gap_of(
            tell(before, now)
            for tell, (before, now) in ((another_topic, topic), (another_cluster, cluster))
            if before and now and before != now
        )


async def find_checkpoint(leader: psycopg.AsyncConnection, slot: str) -> Checkpoint | None:
    """The record of the relay of this name; None before its first catch-up."""
    values = {"slot": slot, "key": lock_key(ADOPTION, slot)[1]}
    row = await (await leader.execute(FIND.encode(), values)).fetchone()
    if row is None:
        return None
    system, source, lsn, *others = row
    return Checkpoint(system, source, None if lsn is None else int(lsn), *others)


async def find_published(connection: psycopg.AsyncConnection, slot: str) -> Snapshot:
    """What this relay has proven to be on the topic, as it was written down last."""
    checkpoint = await find_checkpoint(connection, slot)
    row = await (await connection.execute(SYSTEM)).fetchone()
    return checkpoint.published_on(row[0]) if checkpoint and row else NOTHING


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
    """All retained events that `published` sees are on the topic, and nothing is known to be amiss."""
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
    """Write the gap down, for who asks, and that it cannot be adopted, if that was asked for.

    Raises:
        GapFound: always.
    """
    await leader.execute(REFUSE, {"gap": reason, "slot": slot, "withdraws": withdraws_adopt})
    raise GapFound(reason, published)


async def trust_checkpoint(leader: psycopg.AsyncConnection, config: RelayConfig) -> None:
    """Everything is as it was left, and can be written down."""
    values = {"slot": config.slot, "topic": config.topic, "cluster": config.kafka_cluster}
    await leader.execute(TRUST, values)


async def save_checkpoint(leader: psycopg.AsyncConnection, query: str, values: dict[str, Any]) -> None:
    """Write down how far all is acknowledged, by SAVE_LSN or SAVE_WINDOW.

    Raises:
        CheckpointMissing: somebody has deleted the record.
    """
    if (await leader.execute(query.encode(), values)).rowcount != 1:
        raise CheckpointMissing("the relay's row of relay_slots is gone: what it proves is forgotten")


async def move_here(leader: psycopg.AsyncConnection, slot: str) -> None:
    """The rows came from another server: the ids of its transactions mean nothing here, and would be taken for ours.

    Nothing counts as published any more by the relay of this slot.
    """
    async with leader.transaction():
        await leader.execute("SELECT pg_advisory_xact_lock(hashtext('payments relays move'))")
        await leader.execute(FORGET)
        await forget_future_transactions(leader)
        await leader.execute(MOVE, [slot])


async def forget_future_transactions(leader: psycopg.AsyncConnection) -> None:
    """Rows of a restored outbox whose transactions, by their ids, are still to come here: they would never be seen.

    Where there are any, the others are not ours either, and earlier events of a payment may be among them.
    """
    async with leader.transaction():
        if (await leader.execute(FORGET_FUTURE)).rowcount:
            await leader.execute(FORGET)


async def set_notify(leader: psycopg.AsyncConnection, *, is_on: bool) -> bool:
    """Whether every insert into the outbox wakes a poller. False if that is not so yet: somebody writes for long.

    Where the relay's role does not own the outbox, it is so only if somebody enables the trigger; a tick wakes it then.
    """
    row = await (await leader.execute(NOTIFIES)).fetchone()
    if row is None or row[0] == is_on:
        return True
    try:
        # The lock waits for those who write, and lets others wait: hardly at all. One message, and so one transaction:
        # whoever else uses this connection finds it in none that has failed.
        await leader.execute(
            "SET LOCAL lock_timeout = '100ms';"
            f" ALTER TABLE outbox {'ENABLE' if is_on else 'DISABLE'} TRIGGER outbox_notify".encode()
        )
    except psycopg.errors.LockNotAvailable:
        return False
    except psycopg.errors.InsufficientPrivilege:
        log.warning("the relay's role does not own the outbox: see docs/operations/relay.md", trigger="outbox_notify")
    return True


async def ended_by_now(connection: psycopg.AsyncConnection) -> tuple[int, Snapshot]:
    """A position of the log that is behind the commits of all that the snapshot sees."""
    row = await (await connection.execute(NOW.encode())).fetchone()
    assert row is not None, "the query always gives a row"
    return row[1], Snapshot.read(row[0])


async def flushed_by_now(connection: psycopg.AsyncConnection) -> int:
    """A position of the log that is behind all that this connection has committed."""
    row = await (await connection.execute(FLUSHED)).fetchone()
    assert row is not None, "the query always gives a row"
    return int(row[0])
