"""Makes sure that the slot exists and that every row committed before it was published.

A slot knows only what was committed after it was created. So a row in `relay_slots` says that the table was published
up to where the slot begins; without it, or with another server's mark in it, the slot is made anew and the table read.
Rows are then published again, and none is left out.
"""

from collections.abc import Awaitable, Callable

import psycopg
import structlog

from infra.relay import metrics
from infra.relay.config import RelayConfig
from infra.relay.errors import SlotOfAnother
from infra.relay.pgoutput import OUTBOX_COLUMNS, OutboxEvent
from infra.relay.stream import CONNECTION, ReplicationStream

log = structlog.get_logger(__name__)

ROWS_AT_ONCE = 500

FIND_SLOT = """
    SELECT s.slot_name IS NOT NULL, s.database, s.database IS DISTINCT FROM current_database(),
           s.plugin, s.wal_status, r.system_identifier
      FROM (SELECT %s AS slot_name) AS wanted
      LEFT JOIN pg_replication_slots AS s ON s.slot_name::text = wanted.slot_name
      LEFT JOIN relay_slots AS r ON r.slot_name = wanted.slot_name
"""

SCAN = f"""
    -- created_at is when a transaction began, and one that began earlier may have had to wait for the payment's lock:
    -- only payment_seq has a payment's order. The index on both streams the rows without a sort. Unqualified names
    -- would mean the text columns of the result, where 10 comes before 2.
    SELECT {", ".join(f"o.{name}::text" for name in OUTBOX_COLUMNS)}
      FROM outbox AS o
     ORDER BY o.aggregateid, o.payment_seq
"""  # noqa: S608 - names from our own constant


async def reason_to_scan(leader: psycopg.AsyncConnection, slot: str, system: str) -> str | None:
    """Why the slot must be made anew; None if it has everything.

    Raises:
        SlotOfAnother: the name is taken; nothing was touched.
    """
    row = await (await leader.execute(FIND_SLOT, [slot])).fetchone()
    assert row is not None, "the query always gives a row"
    exists, database, is_elsewhere, plugin, wal_status, caught_up_system = row
    if exists and (is_elsewhere or plugin != "pgoutput"):
        raise SlotOfAnother(slot, f"database {database!r}, plugin {plugin!r}")
    if caught_up_system is None:
        return "a relay ended before it had caught up" if exists else "first start"
    if caught_up_system != system:
        return "this is another Postgres server than before"
    if not exists:
        return "the slot has disappeared"
    return "the server has removed log that the slot needed" if wal_status == "lost" else None


async def catch_up(
    leader: psycopg.AsyncConnection,
    stream: ReplicationStream,
    config: RelayConfig,
    *,
    system: str,
    publish: Callable[[OutboxEvent], Awaitable[None]],
    drained: Callable[[], Awaitable[None]],
) -> None:
    """Create the slot anew and publish every row that was committed before it.

    `publish` may wait for room; `drained` returns when all is acknowledged. Only then the slot counts as caught up.
    """
    await leader.execute("DELETE FROM relay_slots WHERE slot_name = %s", [config.slot])
    if await _exists(leader, config.slot):
        await stream.drop_slot(config.slot)
    snapshot = await stream.create_slot(config.slot)
    count = await _scan(config.postgres_url, snapshot, publish)
    await drained()
    metrics.RESCANNED.inc(count)
    if count:
        log.warning("every retained event was published again", slot=config.slot, events=count)
    await leader.execute(
        "INSERT INTO relay_slots (slot_name, system_identifier) VALUES (%s, %s)", [config.slot, system]
    )


async def _exists(leader: psycopg.AsyncConnection, slot: str) -> bool:
    cursor = await leader.execute("SELECT FROM pg_replication_slots WHERE slot_name = %s", [slot])
    return await cursor.fetchone() is not None


async def _scan(url: str, snapshot: str, publish: Callable[[OutboxEvent], Awaitable[None]]) -> int:
    count = 0
    async with await psycopg.AsyncConnection.connect(url, **(CONNECTION | {"autocommit": False})) as connection:
        await connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
        await connection.execute(f"SET TRANSACTION SNAPSHOT '{snapshot}'".encode())
        async with connection.cursor("outbox_scan") as cursor:
            cursor.itersize = ROWS_AT_ONCE
            await cursor.execute(SCAN.encode())
            async for row in cursor:
                await publish(OutboxEvent._make(None if value is None else value.encode() for value in row))
                count += 1
    return count
