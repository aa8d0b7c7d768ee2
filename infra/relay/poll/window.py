"""A window: the rows that one snapshot of the outbox sees and an earlier one did not, in the order of `position`.

`read_first` reads a window's first rows. `WindowReader` sorts the keys alone and fetches the rows by ctid, in one
transaction: rows that its snapshot sees are neither moved nor removed meanwhile. Sorting half a million rows with their
payloads spilled to files, for half a second before the first row came.
"""

import asyncio
from bisect import bisect_left
from collections.abc import Callable, Iterable
from itertools import accumulate
from operator import itemgetter
from typing import Any, Final, NamedTuple

import psycopg

from infra.relay.event import OUTBOX_COLUMNS, OutboxEvent
from infra.relay.outbox_rows import COLUMNS, PORTION_BYTES

PORTION: Final = 1000
KEYS_AT_ONCE: Final = 20_000


class Portion(NamedTuple):
    """Consecutive events of a window, the last one's position, and when the first was written (µs since 1970)."""

    events: list[OutboxEvent]
    position: int
    written_us: int


_Key = tuple[int, bytes, int, int, int]
"""A row's partition (its OID), its ctid there, its payload's size in bytes, its position, and when it was written."""

_EVENT: Final = ", ".join((*OUTBOX_COLUMNS, "position"))
_WRITTEN: Final = "(date_part('epoch', created_at) * 1000000)::bigint AS written"


class _Walk(NamedTuple):
    """A range of the index, and the condition that the rows must meet besides."""

    of: str
    past: str = "true"


# The walks that make up a window, with the values of `Snapshot.until`. Near: one walk, from the oldest transaction that
# ended late. Far: the late ones each by its id, and all others, which begin at `first`.
_NEAR: Final = (
    _Walk(
        "xact >= %(oldest)s AND xact < %(end)s",
        "xact <> ALL(%(open)s::bigint[]) AND (xact >= %(first)s OR xact = ANY(%(late)s::bigint[]))",
    ),
)
_FAR: Final = (
    _Walk("xact >= %(first)s AND xact < %(end)s", "xact <> ALL(%(open)s::bigint[])"),
    _Walk("xact = ANY(%(late)s::bigint[])"),
)
NEAR_MAX: Final = 1_000
"""Up to so many transactions between `oldest` and `first`, skipping them is cheaper than walking each index twice."""


def _window(columns: str, walks: Iterable[_Walk]) -> str:
    # OFFSET 0: rows to skip are then filtered in one place, and the filter is not set up in each partition's scan.
    return " UNION ALL ".join(
        f"SELECT {columns}, {_WRITTEN} FROM (SELECT tableoid, ctid, * FROM outbox WHERE {walk.of} OFFSET 0) AS o"  # noqa: S608 - as below
        f" WHERE {walk.past} AND position > %(position)s"
        for walk in walks
    )


def _read(walks: Iterable[_Walk]) -> str:
    return f"""
        SELECT o.position, o.written, o.size, {COLUMNS}
          FROM (SELECT *, sum(octet_length(payload)) OVER (ORDER BY position) AS size
                  FROM ({_window(_EVENT, walks)} ORDER BY position LIMIT {PORTION}) AS o) AS o
         WHERE o.size - octet_length(o.payload) < {PORTION_BYTES}
         ORDER BY o.position
    """  # noqa: S608 - names from our own constants


def _keys(walks: Iterable[_Walk]) -> str:
    columns = "tableoid AS partition, ctid AS place, octet_length(payload) AS size, position"
    return f"""
        SELECT o.partition, o.place::text, o.size, o.position, o.written
          FROM ({_window(columns, walks)}) AS o ORDER BY o.position
    """  # noqa: S608 - names from our own constants


# For near and far windows, in the order of `_is_far`.
READ: Final = (_read(_NEAR), _read(_FAR))
KEYS: Final = (_keys(_NEAR), _keys(_FAR))
FETCH: Final = f"""
    SELECT {COLUMNS} FROM {{partition}} AS o WHERE o.ctid = ANY(%s::tid[]) ORDER BY o.position
"""  # noqa: S608 - names from our own constants, and a partition's as Postgres writes it
PARTITION: Final = "SELECT %s::oid::regclass::text"


async def read_first(reader: psycopg.AsyncConnection, values: dict[str, Any]) -> tuple[Portion | None, bool]:
    """The first portion of a window, if it has any, and whether there may be more; `values` are of `Snapshot.until`."""
    rows = await (await reader.execute(READ[_is_far(values)].encode(), values, binary=True)).fetchall()
    if not rows:
        return None, False
    portion = Portion([OutboxEvent._make(row[3:]) for row in rows], rows[-1][0], rows[0][1])
    return portion, len(rows) >= PORTION or rows[-1][2] >= PORTION_BYTES


class WindowReader:
    """Reads a window after a position, in portions; the reader's transaction stays open until `close`.

    A portion has at most PORTION events, and ends with the event that reaches PORTION_BYTES of payloads.
    """

    def __init__(self, reader: psycopg.AsyncConnection) -> None:
        self._reader = reader
        self._cursor = reader.cursor("window", binary=True)
        self._keys: list[_Key] = []
        self._fetches: dict[int, bytes] = {}
        self._ahead: asyncio.Task[Portion | None] | None = None

    async def open(self, values: dict[str, Any]) -> None:
        """Begin the transaction; the keys are sorted when the first portion is read."""
        await self._reader.execute("BEGIN ISOLATION LEVEL REPEATABLE READ, READ ONLY")
        await self._cursor.execute(KEYS[_is_far(values)].encode(), values)

    async def read(self) -> Portion | None:
        """The next portion, None at the end; Postgres already fetches the one after it while this one is published."""
        portion = await (self._ahead or self._fetch())
        self._ahead = asyncio.create_task(self._fetch()) if portion is not None else None
        await asyncio.sleep(0)  # Lets that task send its query before these events are encoded.
        return portion

    async def close(self) -> None:
        """End the transaction; a later window after the last position read finds the remaining rows again."""
        if self._ahead is not None:
            await self._ahead
        await self._cursor.close()
        await self._reader.execute("COMMIT")

    async def abandon(self) -> None:
        """Stop reading, and close the reader's connection, which may be lost already."""
        if self._ahead is not None:
            self._ahead.cancel()
            await asyncio.gather(self._ahead, return_exceptions=True)
        await self._reader.close()
        await self._cursor.close()

    async def _fetch(self) -> Portion | None:
        keys = await self._next_keys()
        if not keys:
            return None
        partitions = set(map(itemgetter(0), keys))
        found = {each: iter(await self._read(each, keys)) for each in partitions}
        # Almost always one partition (a day); rows of several are merged in the order of their keys.
        events = found[keys[0][0]] if len(partitions) == 1 else (next(found[key[0]]) for key in keys)
        return Portion(list(events), position=keys[-1][3], written_us=keys[0][4])

    async def _next_keys(self) -> list[_Key]:
        if len(self._keys) < PORTION:
            self._keys += await self._cursor.fetchmany(KEYS_AT_ONCE)
        count = how_many_fill(PORTION_BYTES, map(itemgetter(2), self._keys[:PORTION]))
        keys, self._keys = self._keys[:count], self._keys[count:]
        return keys

    async def _read(self, partition: int, keys: Iterable[_Key]) -> list[OutboxEvent]:
        """The rows of those of these keys that are in the partition."""
        places = b'","'.join([key[1] for key in keys if key[0] == partition]).decode()
        async with self._reader.cursor(binary=True, row_factory=_event_row) as cursor:
            await cursor.execute(await self._fetch_from(partition), [f'{{"{places}"}}'])
            return await cursor.fetchall()

    async def _fetch_from(self, partition: int) -> bytes:
        """The query for this partition; its parameter is an array of ctids. `regclass` has quoted the name already."""
        if partition not in self._fetches:
            row = await (await self._reader.execute(PARTITION, [partition], binary=True)).fetchone()
            assert row is not None, "the query always gives a row"
            self._fetches[partition] = FETCH.format(partition=row[0].decode().replace("%", "%%")).encode()
        return self._fetches[partition]


def how_many_fill(size: int, sizes: Iterable[int]) -> int:
    """How many of `sizes` it takes to reach `size`, including the one that reaches it; all of them if they never do."""
    sums = list(accumulate(sizes))
    return min(bisect_left(sums, size) + 1, len(sums))


def _is_far(values: dict[str, Any]) -> bool:
    return bool(values["first"] - values["oldest"] > NEAR_MAX)


def _event_row(_: object) -> Callable[[Iterable[Any]], OutboxEvent]:
    return OutboxEvent._make
