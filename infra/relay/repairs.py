"""What an operator asks of a relay that stands before a gap, and is told of it; what it does is in `beginning.py`."""

import asyncio
from typing import Any, Final

import psycopg

from infra.relay.leadership import ADOPTION, LEADERSHIP, is_held, lock_key
from infra.relay.progress import ASKED, Repair, find_published
from infra.relay.snapshot import NOTHING, UNPROVEN, Snapshot

REQUEST_TRIES: Final = 10
REQUEST_PAUSE_SECONDS: Final = 0.05

# What is being done, or will be when a relay runs, is not taken back: half of a repair is done by nobody else. But all
# that is retained has in it what is not proven, if that has not begun.
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
# A transaction that was prepared, and that nobody has ended since, has no backend any more.
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
    """Tell the relay of this name what to do; False if it never was, or is active: then there is nothing to mend.

    To adopt, it is told for as long as the connection lasts.
    """
    values = {"repair": repair, "slot": slot, "key": lock_key(LEADERSHIP, slot)[1]}
    if repair == "adopt":
        await connection.execute("SELECT pg_advisory_lock_shared(%s, %s)", lock_key(ADOPTION, slot))
    # An active relay leads all the time, one that tries in vain to become active for a moment, again and again.
    for _ in range(REQUEST_TRIES):
        if (await connection.execute(REPAIR.encode(), values)).rowcount == 1:
            return True
        await asyncio.sleep(REQUEST_PAUSE_SECONDS)
    return False


async def withdraw_adopt(connection: psycopg.AsyncConnection, slot: str) -> bool:
    """Nobody is to adopt any more: what a slot that is made later has passed, nobody has looked at.

    False if nobody was to.
    """
    query = "UPDATE relay_slots SET repair = NULL WHERE slot_name = %s AND repair = 'adopt'"
    return (await connection.execute(query, [slot])).rowcount == 1


async def find_source(connection: psycopg.AsyncConnection, slot: str) -> str | None:
    """What the relay of this name reads, or read last."""
    row = await (await connection.execute("SELECT source FROM relay_slots WHERE slot_name = %s", [slot])).fetchone()
    return None if row is None else str(row[0])


async def find_blocker(connection: psycopg.AsyncConnection, slot: str) -> tuple[str, Any] | None:
    """Whose transaction a slot that is being made waits for, and since when it runs."""
    row = await (await connection.execute(FIND_BLOCKER, [slot])).fetchone()
    return None if row is None else (row[0], row[1])


async def find_repair(connection: psycopg.AsyncConnection, slot: str) -> tuple[str | None, str | None, int]:
    """The gap that the relay stands before, what it was told to do, and how many events its last repair published."""
    query = f"SELECT gap, {ASKED}, repaired_events FROM relay_slots WHERE slot_name = %(slot)s"  # noqa: S608 - as above
    row = await (
        await connection.execute(query.encode(), {"slot": slot, "key": lock_key(ADOPTION, slot)[1]})
    ).fetchone()
    return row if row is not None else (None, None, 0)


async def count_unproven(connection: psycopg.AsyncConnection, slot: str) -> tuple[int, Any, Any]:
    """How many retained events have no proof of publication, and when the first and the last were written."""
    return await count_beyond(connection, await find_published(connection, slot))


async def list_unproven(connection: psycopg.AsyncConnection, slot: str, *, limit: int) -> list[tuple[Any, ...]]:
    """The first of them, as they were written: id, payment, `payment_seq`, type, time."""
    published = await find_published(connection, slot)
    return await (await connection.execute(LIST_UNPROVEN.encode(), published.proof | {"limit": limit})).fetchall()


async def count_retained(connection: psycopg.AsyncConnection) -> tuple[int, Any, Any]:
    """How many events are retained, and when the first and the last were written."""
    return await count_beyond(connection, NOTHING)


async def count_beyond(connection: psycopg.AsyncConnection, published: Snapshot) -> tuple[int, Any, Any]:
    """The same, where `published` is what is proven. It reads the whole outbox."""
    row = await (await connection.execute(COUNT_UNPROVEN.encode(), published.proof)).fetchone()
    assert row is not None, "an aggregate always gives a row"
    return row
