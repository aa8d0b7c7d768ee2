"""Quarantine: events that Kafka refused for good, and their payments' later events, in order.

Quarantined events count as delivered, so other payments go on and the slot advances. `retry` publishes a payment's
events in order; `drop` gives an event up for ever and records the operator's reason.
"""

from collections.abc import Collection, Iterable, Sequence
from typing import Any, Final

import psycopg
from psycopg.rows import dict_row

from infra.relay.event import OUTBOX_COLUMNS, OutboxEvent
from infra.relay.leadership import LEADERSHIP, is_held, lock_key
from infra.relay.outbox_rows import COLUMNS, PORTION_BYTES, event_of
from infra.relay.progress.checkpoint import find_published
from infra.relay.progress.snapshot import UNPROVEN
from infra.relay.publish.publisher import Diverted

_NAMES: Final = ", ".join(OUTBOX_COLUMNS)
_VALUES: Final = ", ".join(f"%({name})s" for name in OUTBOX_COLUMNS)

PAYMENTS_AT_ONCE: Final = 200
REASONS_MAX: Final = 3

# An event that arrives again is here already. A dropped event stays dropped.
PUT: Final = f"""
    INSERT INTO relay_quarantine (slot_name, {_NAMES}, state, reason)
    VALUES (%(slot)s, {_VALUES}, %(state)s, %(reason)s)
    ON CONFLICT (slot_name, id) DO UPDATE SET state = excluded.state, reason = excluded.reason
     WHERE relay_quarantine.state <> 'dropped'
       AND NOT (relay_quarantine.state = 'refused' AND excluded.state = 'waiting')
"""  # noqa: S608 - names from our own constant
KEYS: Final = "SELECT DISTINCT aggregateid FROM relay_quarantine WHERE slot_name = %s AND state <> 'dropped'"
# The log or the table may bring an event again unless it is proven to be published.
GIVEN_UP: Final = f"""
    SELECT q.id::text
      FROM relay_quarantine AS q
      JOIN outbox AS o ON o.aggregateid = q.aggregateid AND o.payment_seq = q.payment_seq AND o.id = q.id
     WHERE q.slot_name = %(slot)s AND q.state = 'dropped' AND {UNPROVEN}
"""  # noqa: S608 - names from our own constant
DUE: Final = f"""
    SELECT {COLUMNS} FROM relay_quarantine AS o
     WHERE slot_name = %s AND state <> 'dropped'
       AND aggregateid IN (
           SELECT aggregateid
             FROM (SELECT aggregateid, sum(octet_length(payload)) AS size,
                          sum(sum(octet_length(payload))) OVER (ORDER BY min(number)) AS size_to_here
                     FROM relay_quarantine WHERE slot_name = %s AND state <> 'dropped' AND aggregateid <> ALL(%s)
                    GROUP BY aggregateid HAVING bool_or(state = 'retry') OR NOT bool_or(state = 'refused')
                    ORDER BY min(number) LIMIT {PAYMENTS_AT_ONCE}) AS due
            WHERE size_to_here - size < {PORTION_BYTES})
     ORDER BY o.payment_seq
"""  # noqa: S608 - names from our own constant
DONE: Final = "DELETE FROM relay_quarantine WHERE slot_name = %s AND state <> 'dropped' AND id = ANY(%s::uuid[])"
MARK_DUE: Final = """
    UPDATE relay_quarantine SET state = 'retry' WHERE slot_name = %s AND state <> 'dropped' AND aggregateid = ANY(%s)
    RETURNING id::text
"""
COUNT: Final = "SELECT count(*) FROM relay_quarantine WHERE slot_name = %s AND state <> 'dropped'"

LIST: Final = """
    SELECT id::text, aggregateid, payment_seq, type, state, coalesce(reason, ''), octet_length(payload),
           quarantined_at, coalesce(dropped_because, '')
      FROM relay_quarantine WHERE slot_name = %s AND (state <> 'dropped' OR %s) ORDER BY number LIMIT %s
"""
SHOW: Final = (
    "SELECT * FROM relay_quarantine WHERE slot_name = %s AND (id::text = %s OR aggregateid = %s) ORDER BY number"
)
# Events that are being tried are returned but not updated: their relay may lock the same rows in another order.
RETRY: Final = """
    WITH asked AS (
        SELECT id, aggregateid FROM relay_quarantine
         WHERE slot_name = %(slot)s AND state <> 'dropped'
           AND aggregateid IN (SELECT aggregateid FROM relay_quarantine
                                WHERE slot_name = %(slot)s AND state <> 'dropped'
                                  AND (%(all)s OR id::text = ANY(%(names)s) OR aggregateid = ANY(%(names)s)))),
         changed AS (
        UPDATE relay_quarantine SET state = 'retry'
         WHERE slot_name = %(slot)s AND state IN ('refused', 'waiting') AND id IN (SELECT id FROM asked))
    SELECT id::text, aggregateid FROM asked
"""
DROPPED: Final = """
    SELECT id::text, aggregateid, coalesce(dropped_because, '') FROM relay_quarantine
     WHERE slot_name = %s AND state = 'dropped' AND (id::text = ANY(%s) OR aggregateid = ANY(%s)) ORDER BY number
"""
REASONS: Final = f"""
    SELECT DISTINCT reason FROM relay_quarantine
     WHERE slot_name = %s AND state = 'refused' AND id = ANY(%s::uuid[]) ORDER BY reason LIMIT {REASONS_MAX}
"""  # noqa: S608 - a number of our own
STATES: Final = "SELECT state FROM relay_quarantine WHERE slot_name = %s AND id = ANY(%s::uuid[])"
# An event that a relay is trying may be on the topic already, so it is not dropped.
DROP: Final = f"""
    WITH dropped AS (UPDATE relay_quarantine SET state = 'dropped', dropped_because = %(why)s
                      WHERE slot_name = %(slot)s AND state <> 'dropped' AND id::text = ANY(%(names)s)
                        AND (state <> 'retry' OR NOT {is_held(LEADERSHIP)})
                      RETURNING id, aggregateid),
         freed AS (UPDATE relay_quarantine SET state = 'retry'
                     FROM (SELECT DISTINCT aggregateid FROM dropped) AS d
                    WHERE relay_quarantine.aggregateid = d.aggregateid AND slot_name = %(slot)s
                      AND relay_quarantine.state IN ('refused', 'waiting') AND id NOT IN (SELECT id FROM dropped))
    SELECT count(*) FROM dropped
"""  # noqa: S608 - names from our own constants
COUNT_TRIED: Final = """
    SELECT count(*) FROM relay_quarantine WHERE slot_name = %s AND state = 'retry' AND id::text = ANY(%s)
"""


class Quarantine:
    """The relay's side: puts events in, and takes out those that an operator asked to retry."""

    def __init__(self, leader: psycopg.AsyncConnection, slot: str) -> None:
        self._leader = leader
        self._slot = slot

    async def keys(self) -> set[bytes]:
        """The payments whose events wait here."""
        rows = await (await self._leader.execute(KEYS, [self._slot])).fetchall()
        return {row[0].encode() for row in rows}

    async def put(self, diverted: Sequence[Diverted]) -> None:
        """Store these events, in this order; on return they are on disk.

        There is no transaction block: other users of this connection would be inside it, and COMMIT of a failed one
        raises no error. The statements are sent as one message, which is one transaction all the same.
        """
        async with self._leader.cursor() as cursor:
            await cursor.executemany(PUT.encode(), [self._row(each) for each in diverted])

    def _row(self, diverted: Diverted) -> dict[str, Any]:
        event, _, reason = diverted
        texts = {name: value and value.decode() for name, value in event._asdict().items()}
        state = "waiting" if reason is None else "refused"
        return {**texts, "payment_seq": int(event.payment_seq), "slot": self._slot, "state": state, "reason": reason}

    async def given_up(self) -> set[bytes]:
        """Ids of dropped events that the source may bring again; they must not be published."""
        published = await find_published(self._leader, self._slot)
        rows = await (await self._leader.execute(GIVEN_UP.encode(), published.proof | {"slot": self._slot})).fetchall()
        return {row[0].encode() for row in rows}

    async def due(self, besides: Iterable[bytes] = ()) -> list[OutboxEvent]:
        """Events of payments that are to be retried, or wait behind no refused event; each payment's in order.

        This is a portion: more payments may be due. `besides` are payments to leave out, being tried already.
        """
        values = [self._slot, self._slot, [key.decode() for key in besides]]
        rows = await (await self._leader.execute(DUE.encode(), values)).fetchall()
        return [event_of(row) for row in rows]

    async def mark_due(self, keys: Sequence[bytes]) -> set[bytes]:
        """Mark all events of these payments as being tried; those that Kafka refuses again are `put` again.

        Returns the events' ids; while the relay leads, none of them can be dropped.
        """
        rows = await self._leader.execute(MARK_DUE, [self._slot, [key.decode() for key in keys]])
        return {row[0].encode() for row in await rows.fetchall()}

    async def done(self, published: Sequence[bytes]) -> None:
        """Remove these events: they are on the topic."""
        await self._leader.execute(DONE, [self._slot, [each.decode() for each in published]])

    async def count(self) -> int:
        """How many events are here."""
        row = await (await self._leader.execute(COUNT, [self._slot])).fetchone()
        return int(row[0]) if row is not None else 0


class QuarantineDesk:
    """The operator's side, on a connection of its own."""

    def __init__(self, connection: psycopg.AsyncConnection, slot: str) -> None:
        self._connection = connection
        self._slot = slot

    async def entries(self, *, with_dropped: bool, limit: int) -> list[tuple[Any, ...]]:
        """id, payment, seq, type, state, reason, payload bytes, quarantine time, why dropped; in order of arrival."""
        return await (await self._connection.execute(LIST, [self._slot, with_dropped, limit])).fetchall()

    async def show(self, name: str) -> list[dict[str, Any]]:
        """All columns of the event with this id, or of all events of the payment with it."""
        async with self._connection.cursor(row_factory=dict_row) as cursor:
            return await (await cursor.execute(SHOW, [self._slot, name, name])).fetchall()

    async def retry(self, names: Sequence[str], *, everything: bool = False) -> dict[str, str]:
        """Have the relay retry all events of the payments named, directly or by one of their events.

        Returns the payment of each event to be tried.
        """
        values = {"slot": self._slot, "names": list(names), "all": everything}
        return dict(await (await self._connection.execute(RETRY.encode(), values)).fetchall())

    async def states(self, events: Collection[str]) -> list[str]:
        """The states of these events; those that are not here any more are left out."""
        return [row[0] for row in await (await self._connection.execute(STATES, [self._slot, list(events)])).fetchall()]

    async def reasons(self, events: Collection[str]) -> list[str]:
        """Why Kafka refused these events, without duplicates; at most REASONS_MAX reasons."""
        rows = await self._connection.execute(REASONS.encode(), [self._slot, list(events)])
        return [row[0] for row in await rows.fetchall()]

    async def dropped(self, names: Collection[str]) -> list[tuple[str, str, str]]:
        """id, payment and reason of each dropped event among these events or payments."""
        values = [self._slot, list(names), list(names)]
        return await (await self._connection.execute(DROPPED, values)).fetchall()

    async def drop(self, names: Sequence[str], *, why: str) -> tuple[int, int]:
        """Give these events up for ever; the events that waited behind them are tried.

        Returns how many were dropped, and how many were not because a relay is trying them.
        """
        key = lock_key(LEADERSHIP, self._slot)[1]
        values = {"slot": self._slot, "names": list(names), "why": why, "key": key}
        dropped = await self._count(DROP, values)
        return dropped, await self._count(COUNT_TRIED, [self._slot, list(names)])

    async def _count(self, query: str, values: Any) -> int:
        row = await (await self._connection.execute(query.encode(), values)).fetchone()
        assert row is not None, "an aggregate always gives a row"
        return int(row[0])
