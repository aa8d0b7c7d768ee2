"""The relays' status from Postgres, for `payments relay status`: any process can ask, and no relay needs to run."""

from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

import psycopg
from psycopg.rows import dict_row

from infra.relay.connection import CONNECTION
from infra.relay.leadership import LEADERSHIP, is_held, lock_key

# A checkpoint of another server proves nothing here: everything in the outbox waits. `failover` exists since 17.
CHECKPOINTS: Final = """
    SELECT r.slot_name, r.source, r.topic, r.gap, r.repair, r.updated_at, s.active, s.wal_status,
           (to_jsonb(s) ->> 'failover')::boolean AS failover,
           s.active AND EXISTS (SELECT FROM pg_stat_activity AS a
                                 WHERE a.pid = s.active_pid AND a.application_name <> 'relay') AS is_anothers,
           pg_current_wal_flush_lsn() - s.confirmed_flush_lsn AS lag_bytes,
           pg_current_wal_lsn() - s.restart_lsn AS retained_bytes,
           coalesce(extract(epoch FROM now() - (
               SELECT min(created_at) FROM outbox
                WHERE xact >= proven.below
                  AND (proven.begin IS NULL OR NOT pg_visible_in_snapshot(xact::text::xid8, proven.begin))
                  AND (proven.end IS NULL OR position > r.window_position
                       OR NOT pg_visible_in_snapshot(xact::text::xid8, proven.end))
           )), 0)::float AS lag_seconds
      FROM relay_slots AS r CROSS JOIN pg_control_system() AS here
     CROSS JOIN LATERAL (
           SELECT CASE WHEN is_own THEN r.published_below ELSE 0 END AS below,
                  CASE WHEN is_own THEN r.window_begin END AS begin,
                  CASE WHEN is_own THEN r.window_end END AS end
             FROM (SELECT r.system_identifier = here.system_identifier::text AS is_own) AS whose) AS proven
      LEFT JOIN pg_replication_slots AS s ON s.slot_name::text = r.slot_name AND s.database = current_database()
     ORDER BY r.slot_name
"""
STRANGERS: Final = """
    SELECT slot_name::text, active, wal_status, pg_current_wal_lsn() - restart_lsn AS retained_bytes
      FROM pg_replication_slots
     WHERE database = current_database() AND NOT temporary
       AND slot_name::text NOT IN (SELECT slot_name FROM relay_slots)
       AND left(slot_name::text, 57) <> ALL(%s)
"""
RELAYS: Final = """
    SELECT count(*) AS relays,
           count(*) FILTER (WHERE EXISTS (
               SELECT FROM pg_locks AS l WHERE l.pid = a.pid AND l.locktype = 'advisory' AND l.granted
                  AND l.classid = %(class)s AND l.objid = %(half)s::bigint & 4294967295)) AS leaders
      FROM pg_stat_activity AS a WHERE a.application_name = %(name)s AND a.datname = current_database()
"""
QUARANTINE: Final = """
    SELECT count(*) FILTER (WHERE state = 'refused') AS refused, count(*) FILTER (WHERE state = 'waiting') AS waiting,
           count(*) FILTER (WHERE state = 'retry') AS retrying, count(*) FILTER (WHERE state = 'dropped') AS dropped,
           count(DISTINCT aggregateid) FILTER (WHERE state <> 'dropped') AS payments
      FROM relay_quarantine WHERE slot_name = %s
"""
LAST_EVENT: Final = """
    SELECT coalesce((SELECT created_at FROM outbox WHERE xact IS NOT NULL ORDER BY xact DESC LIMIT 1),
                    (SELECT max(created_at) FROM outbox)) AS created_at
"""
STARTING: Final = """
    SELECT DISTINCT substr(application_name, 7) AS slot_name FROM pg_stat_activity
     WHERE application_name LIKE 'relay %' AND datname = current_database()
       AND substr(application_name, 7) NOT IN (SELECT left(slot_name, 57) FROM relay_slots)
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class RelayStatus:
    """One relay, named after its slot. Bytes are of the write-ahead log, None without a slot.

    At a gap, `is_running` is false: a relay that checks whether the gap is still there publishes nothing. A poll has no
    `lag_bytes`; any slot it has is left over from logical replication.
    """

    slot: str
    source: str
    topic: str | None
    is_running: bool
    is_anothers: bool
    """Another client reads from its slot; its relays stand by."""
    standbys: int
    slot_state: str
    lag_bytes: int | None
    lag_seconds: float
    retained_bytes: int | None
    saved_at: datetime
    gap: str | None
    repair: str | None
    quarantine: dict[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stranger:
    """A slot that retains log and that no relay of this database has used."""

    slot: str
    is_active: bool
    wal_status: str | None
    retained_bytes: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Overview:
    """All relays of this database, other slots that retain its log, and when the newest event was written.

    `starting` names relays whose first start has not finished, so they have no record yet.
    """

    relays: list[RelayStatus]
    starting: list[str]
    strangers: list[Stranger]
    last_event_at: datetime | None


async def read_status(postgres_url: str) -> Overview:
    """The status of all relays of this database.

    Raises:
        psycopg.Error: Postgres is away.
    """
    connect = psycopg.AsyncConnection.connect
    async with await connect(postgres_url, row_factory=dict_row, **CONNECTION) as connection:
        checkpoints = await _rows(connection, CHECKPOINTS)
        starting = [row["slot_name"] for row in await _rows(connection, STARTING)]
        (last,) = await _rows(connection, LAST_EVENT)
        return Overview(
            relays=[await _relay(connection, checkpoint) for checkpoint in checkpoints],
            starting=starting,
            strangers=[_stranger(row) for row in await _rows(connection, STRANGERS, [starting])],
            last_event_at=last["created_at"],
        )


async def is_led(connection: psycopg.AsyncConnection, slot: str) -> bool:
    """Whether a relay of this name holds its leadership lock now."""
    values = {"key": lock_key(LEADERSHIP, slot)[1]}
    row = await (await connection.execute(f"SELECT {is_held(LEADERSHIP)}".encode(), values)).fetchone()
    return row is not None and bool(row[0])


async def _relay(connection: "psycopg.AsyncConnection[dict[str, Any]]", checkpoint: dict[str, Any]) -> RelayStatus:
    name = checkpoint["slot_name"]
    values = {"name": f"relay {name}"[:63], "class": LEADERSHIP, "half": lock_key(LEADERSHIP, name)[1]}
    (running,) = await _rows(connection, RELAYS, values)
    (quarantine,) = await _rows(connection, QUARANTINE, [name])
    return RelayStatus(
        slot=name,
        source=checkpoint["source"],
        topic=checkpoint["topic"],
        is_running=running["leaders"] > 0 and checkpoint["gap"] is None and not checkpoint["is_anothers"],
        is_anothers=bool(checkpoint["is_anothers"]),
        standbys=running["relays"] - running["leaders"],
        slot_state=_slot_state(checkpoint),
        lag_bytes=_integer(checkpoint["lag_bytes"]) if checkpoint["source"] == "wal" else None,
        lag_seconds=round(checkpoint["lag_seconds"], 3),
        retained_bytes=_integer(checkpoint["retained_bytes"]),
        saved_at=checkpoint["updated_at"],
        gap=checkpoint["gap"],
        repair=checkpoint["repair"],
        quarantine=quarantine,
    )


def _slot_state(checkpoint: dict[str, Any]) -> str:
    if checkpoint["wal_status"] is None:
        return "none"
    words = ["active" if checkpoint["active"] else "inactive", checkpoint["wal_status"]]
    return ", ".join(words + (["fail-over"] if checkpoint["failover"] else []))


def _stranger(row: dict[str, Any]) -> Stranger:
    return Stranger(
        slot=row["slot_name"],
        is_active=row["active"],
        wal_status=row["wal_status"],
        retained_bytes=_integer(row["retained_bytes"]),
    )


def _integer(value: Any) -> int | None:
    return None if value is None else max(0, int(value))


async def _rows(
    connection: "psycopg.AsyncConnection[dict[str, Any]]", query: str, values: Any = None
) -> list[dict[str, Any]]:
    return await (await connection.execute(query.encode(), values)).fetchall()
