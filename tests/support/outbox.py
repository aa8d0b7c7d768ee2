"""Outbox rows for the relay's tests, and assertions about the records published from them."""

import random
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple
from uuid import UUID, uuid4

import psycopg

INSERT = """
    INSERT INTO outbox (id, aggregateid, payment_seq, payload, type, occurred_at, traceparent, source, specversion)
    SELECT * FROM unnest(%s::uuid[], %s::text[], %s::int[], %s::text[], %s::text[], %s::text[], %s::text[],
                         %s::text[], %s::text[])
"""


class Row(NamedTuple):
    """The columns of an outbox row that a test chooses."""

    id: UUID
    key: str
    seq: int
    payload: str = "{}"
    type: str = "payment.captured.v1"
    occurred_at: str = "2026-01-02T03:04:05.000006Z"
    traceparent: str | None = None
    source: str = "/payments"
    specversion: str = "1.0"


def rows_of(key: str, count: int, *, first: int = 1, payload: str = "{}") -> list[Row]:
    """Events `first`, `first + 1`, … of one payment."""
    return [Row(uuid4(), key, seq, payload) for seq in range(first, first + count)]


async def insert(connection: psycopg.AsyncConnection, rows: Iterable[Row]) -> None:
    """Insert in the connection's current transaction."""
    columns = zip(*(row._replace(id=str(row.id)) for row in rows), strict=True)  # type: ignore[arg-type]
    await connection.execute(INSERT, [list(column) for column in columns])


async def commit(url: str, *transactions: Iterable[Row]) -> None:
    """Commit each argument as a transaction of its own, in this order."""
    async with await psycopg.AsyncConnection.connect(url, autocommit=True) as connection:
        for rows in transactions:
            await insert(connection, rows)


async def write_next(connection: psycopg.AsyncConnection, choose: random.Random, count: int, *, of: int) -> list[Row]:
    """Write the next events of `count` random payments out of the `of` in `seqs`, as the write path does.

    It locks them in order of id, takes the next numbers, inserts the events and commits.
    """
    some = choose.sample(range(1, of + 1), count)
    lock = "SELECT id, seq + 1 FROM seqs WHERE id = ANY(%s) ORDER BY id FOR NO KEY UPDATE"
    locked = await (await connection.execute(lock, [some])).fetchall()
    rows = [Row(uuid4(), f"pay_{number}", seq) for number, seq in locked]
    await connection.execute("UPDATE seqs SET seq = seq + 1 WHERE id = ANY(%s)", [some])
    await insert(connection, rows)
    await connection.commit()
    return rows


async def set_database(url: str, setting: str) -> None:
    """Make a setting such as `lock_timeout = '1s'` the default of every new connection to this database."""
    async with await psycopg.AsyncConnection.connect(url, autocommit=True) as connection:
        await connection.execute(f'ALTER DATABASE "{connection.info.dbname}" SET {setting}'.encode())


async def open_transaction(url: str) -> psycopg.AsyncConnection:
    """A connection with an open transaction that already has its transaction id."""
    connection = await psycopg.AsyncConnection.connect(url)
    await connection.execute("SELECT pg_current_xact_id()")
    return connection


async def fetch_value(url: str, query: str, *parameters: object) -> Any:
    """The first value of the first row, or None."""
    async with await psycopg.AsyncConnection.connect(url, autocommit=True) as connection:
        row = await (await connection.execute(query.encode(), parameters)).fetchone()
        return None if row is None else row[0]


def ids(records: Iterable[Any]) -> list[UUID]:
    """The outbox ids, in the order of the records."""
    return [UUID(dict(record.headers)["id"].decode()) for record in records]


def complete(rows: Iterable[Row]) -> Callable[[list[Any]], bool]:
    """A condition for `read_until`: every row has arrived at least once. Each call looks only at new records."""
    missing, looked_at = {row.id for row in rows}, 0

    def is_complete(records: list[Any]) -> bool:
        nonlocal looked_at
        missing.difference_update(ids(records[looked_at:]))
        looked_at = len(records)
        return not missing

    return is_complete


def assert_first_deliveries_in_order(records: Iterable[Any], rows: Iterable[Row]) -> None:
    """Every row arrived and nothing else did, and first deliveries of a payment come in the order of `payment_seq`."""
    known = {row.id: row for row in rows}
    first: dict[str, list[int]] = {}
    for event_id in dict.fromkeys(ids(records)):
        row = known.pop(event_id)
        first.setdefault(row.key, []).append(row.seq)
    assert not known, f"{len(known)} rows are missing, such as {next(iter(known.values()))}"
    for key, sequence in first.items():
        assert sequence == sorted(sequence), key
