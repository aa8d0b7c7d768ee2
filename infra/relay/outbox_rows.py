"""Reads outbox rows from the table, each payment's in order: for rows that a slot does not have."""

from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any, Final

import psycopg

from infra.relay.connection import CONNECTION, lift_time_limit
from infra.relay.event import OUTBOX_COLUMNS, OutboxEvent
from infra.relay.progress.snapshot import NOTHING, UNPROVEN, Snapshot

ROWS_AT_ONCE: Final = 2000
PORTION_BYTES: Final = 8 * 1024 * 1024
"""The payload bytes read from the table at once, however large its rows are."""
COLUMNS: Final = ", ".join(f"o.{name}::text" for name in OUTBOX_COLUMNS)

# created_at is when a transaction began, and one that began earlier may have waited for the payment's lock: only
# payment_seq orders a payment's events. The index on both columns returns the rows without a sort. Unqualified names
# would mean the result's text columns, where 10 sorts before 2.
SCAN: Final = f"""
    SELECT {COLUMNS} FROM outbox AS o ORDER BY o.aggregateid, o.payment_seq
"""  # noqa: S608 - names from our own constant
LARGEST: Final = "SELECT coalesce(max(octet_length(payload)), 0) FROM outbox"
SCAN_UNPROVEN: Final = f"""
    SELECT {COLUMNS} FROM outbox AS o WHERE {UNPROVEN} ORDER BY o.aggregateid, o.payment_seq
"""  # noqa: S608 - names from our own constants


async def rows_at_once(
    connection: psycopg.AsyncConnection, largest: str, values: Mapping[str, Any] | None = None
) -> int:
    """How many rows may be fetched at once; the query `largest` returns the bytes of the largest payload."""
    row = await (await connection.execute(largest.encode(), values)).fetchone()
    assert row is not None, "an aggregate always gives a row"
    return max(1, min(ROWS_AT_ONCE, PORTION_BYTES // max(1, int(row[0]))))


async def scan(
    url: str, snapshot: str, publish: Callable[[OutboxEvent], Awaitable[None]], published: Snapshot
) -> tuple[int, Snapshot]:
    """Publish the rows that the exported `snapshot` sees and `published` does not.

    Returns how many these are, and the snapshot whose events are all handed over now.
    """
    async with await psycopg.AsyncConnection.connect(url, **(CONNECTION | {"autocommit": False})) as connection:
        await lift_time_limit(connection)
        await connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
        await connection.execute(f"SET TRANSACTION SNAPSHOT '{snapshot}'".encode())
        row = await (await connection.execute("SELECT pg_current_snapshot()::text")).fetchone()
        assert row is not None, "the query always gives a row"
        return await _publish_all(connection, publish, published), Snapshot.read(row[0])


async def _publish_all(
    connection: psycopg.AsyncConnection, publish: Callable[[OutboxEvent], Awaitable[None]], published: Snapshot
) -> int:
    count = 0
    async with connection.cursor("outbox_scan") as cursor:
        cursor.itersize = await rows_at_once(connection, LARGEST)
        await cursor.execute((SCAN if published == NOTHING else SCAN_UNPROVEN).encode(), published.proof)
        async for row in cursor:
            await publish(event_of(row))
            count += 1
    return count


def event_of(row: Iterable[str | None]) -> OutboxEvent:
    """The event of a row of `COLUMNS`, byte for byte as in the log."""
    return OutboxEvent._make(None if value is None else value.encode() for value in row)
