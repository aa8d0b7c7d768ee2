"""An operator's requests to a relay that stopped at a gap (`beginning.py` carries them out), and queries about it."""

import asyncio
from typing import Any, Final

import psycopg

from infra.relay.leadership import ADOPTION, LEADERSHIP, is_held, lock_key
from infra.relay.progress.checkpoint import ASKED, Repair, find_published
from infra.relay.progress.snapshot import NOTHING, UNPROVEN, Snapshot

REQUEST_TRIES: Final = 10
REQUEST_PAUSE_SECONDS: Final = 0.05

# A repair that is under way or requested is not replaced: nobody else would finish its other half. But 'everything'
# includes 'unproven', so it may replace that if no relay has begun it.
REPAIR: Final = f"""
    UPDATE relay_slots SET repair = %(repair)s
     WHERE slot_name = %(slot)s AND (gap IS NOT NULL OR NOT {is_held(LEADERSHIP)})
       AND (coalesce({ASKED}, %(repair)s) = %(repair)s
            OR %(repair)s = 'everything' AND repair = 'unproven' AND NOT {is_held(LEADERSHIP)})
"""  # noqa: S608 - names from our own constants
COUNT_UNPROVEN: Final = f"SELECT count(*), min(o.created_at), max(o.created_at) FROM outbox AS o WHERE {UNPROVEN}"  # noqa: S608 - names from our own constants
LIST_UNPROVEN: Final = f"""
    SELECT o.id::text, o.aggregateid, o.payment_seq, o.type, o.created_at FROM outbox AS o WHERE {UNPROVEN}
     ORDER BY o.created_at, o.aggregateid, o.payment_seq LIMIT %(limit)s
"""  # noqa: S608 - names from our own constants
# A prepared transaction that has not been ended has no backend any more.
FIND_BLOCKER: Final = """
    SELECT who, since
      FROM (SELECT format('backend %%s', pid) AS who, xact_start AS since
              FROM pg_stat_activity WHERE backend_xid IS NOT NULL
             UNION ALL
            SELECT format('the prepared transaction %%L', gid), prepared FROM pg_prepared_xacts) AS running
     WHERE EXISTS (SELECT FROM pg_replication_slots WHERE slot_name = %s AND confirmed_flush_lsn IS NULL)
     ORDER BY since LIMIT 1
"""


async def request_repair(connection: psycopg.AsyncConnection, slot: str, repair: Repair) -> bool:
    """Request a repair from the relay of this name; False if it has no record, is active, or has another request.

    A request to adopt holds only as long as the connection.
    """
    values = {"repair": repair, "slot": slot, "key": lock_key(LEADERSHIP, slot)[1]}
    if repair == "adopt":
        await connection.execute("SELECT pg_advisory_lock_shared(%s, %s)", lock_key(ADOPTION, slot))
    # An active relay leads all the time; one that fails to become active leads for a moment, again and again.
    for _ in range(REQUEST_TRIES):
        if (await connection.execute(REPAIR.encode(), values)).rowcount == 1:
            return True
        await asyncio.sleep(REQUEST_PAUSE_SECONDS)
    return False


async def withdraw_adopt(connection: psycopg.AsyncConnection, slot: str) -> bool:
    """Withdraw a request to adopt: nobody has checked what a slot created later has passed.

    False if there was no such request.
    """
    query = "UPDATE relay_slots SET repair = NULL WHERE slot_name = %s AND repair = 'adopt'"
    return (await connection.execute(query, [slot])).rowcount == 1


async def find_source(connection: psycopg.AsyncConnection, slot: str) -> str | None:
    """The source that the relay of this name uses, or used last."""
    row = await (await connection.execute("SELECT source FROM relay_slots WHERE slot_name = %s", [slot])).fetchone()
    return None if row is None else str(row[0])


async def find_blocker(connection: psycopg.AsyncConnection, slot: str) -> tuple[str, Any] | None:
    """The oldest transaction that a slot being created waits for, and when it began; None if the slot does not wait."""
    row = await (await connection.execute(FIND_BLOCKER, [slot])).fetchone()
    return None if row is None else (row[0], row[1])


async def find_repair(connection: psycopg.AsyncConnection, slot: str) -> tuple[str | None, str | None, int]:
    """The gap at which the relay stopped, the requested repair, and how many events its last repair published."""
    query = f"SELECT gap, {ASKED}, repaired_events FROM relay_slots WHERE slot_name = %(slot)s"  # noqa: S608 - as above
    row = await (
        await connection.execute(query.encode(), {"slot": slot, "key": lock_key(ADOPTION, slot)[1]})
    ).fetchone()
    return row if row is not None else (None, None, 0)


async def count_unproven(connection: psycopg.AsyncConnection, slot: str) -> tuple[int, Any, Any]:
    """How many retained events have no proof of publication, and when the first and the last were written."""
    return await count_beyond(connection, await find_published(connection, slot))


async def list_unproven(connection: psycopg.AsyncConnection, slot: str, *, limit: int) -> list[tuple[Any, ...]]:
    """The first retained events without proof, in the order written: id, payment, `payment_seq`, type, time."""
    published = await find_published(connection, slot)
    return await (await connection.execute(LIST_UNPROVEN.encode(), published.proof | {"limit": limit})).fetchall()


async def count_retained(connection: psycopg.AsyncConnection) -> tuple[int, Any, Any]:
    """How many events are retained, and when the first and the last were written."""
    return await count_beyond(connection, NOTHING)


async def count_beyond(connection: psycopg.AsyncConnection, published: Snapshot) -> tuple[int, Any, Any]:
    """How many events `published` does not prove, and when the first and the last were written.

    Reads the whole outbox.
    """
    row = await (await connection.execute(COUNT_UNPROVEN.encode(), published.proof)).fetchone()
    assert row is not None, "an aggregate always gives a row"
    return row
