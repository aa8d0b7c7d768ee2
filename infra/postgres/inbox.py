"""The inbox: stores webhooks before they are answered, each event once, for the write path to apply."""

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, Final

import asyncpg

from domain.errors import StoreUnavailable
from domain.operations import OperationState
from domain.ports import Accepted, Received, StoredNotice
from infra.postgres.errors import translated

RECONNECT_SECONDS: Final = 1.0
CHANNEL: Final = "payments_inbox"
"""Postgres notifies this channel when something was stored, so that nobody has to poll."""

# An operation matches only its own gateway: a message signed by one provider says nothing about another's. A payment
# may have been tried at several gateways, so an event that names no operation matches if any operation of the payment
# was at this gateway. An event without our mark is matched by the provider's id of the payment, the current one or
# another attempt's. All processes store events in one order: two that received the same ones could deadlock otherwise.
ACCEPT: Final = """
    WITH given AS (
        SELECT * FROM unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::bytea[], $6::uuid[], $7::integer[],
                             $8::text[], $9::boolean[]) WITH ORDINALITY
            AS g(gateway, event_id, type, content, body, payment_id, number, gateway_payment_id, is_about_nothing,
                 place)
    ), found AS (
        SELECT g.*, p.currency, o.state, o.amount_minor,
               CASE WHEN o.state IS NOT NULL OR (g.number IS NULL AND EXISTS (
                             SELECT FROM operations AS tried
                              WHERE tried.payment_id = p.payment_id AND tried.gateway = g.gateway))
                    THEN p.payment_id END AS found_id
          FROM given AS g
          LEFT JOIN LATERAL (
              SELECT payment_id, currency FROM payments WHERE payment_id = g.payment_id
              UNION ALL
              SELECT payment_id, currency FROM payments
               WHERE g.payment_id IS NULL AND gateway_payment_id = g.gateway_payment_id AND gateway = g.gateway
              UNION ALL
              SELECT payment_id, (SELECT currency FROM payments WHERE payments.payment_id = attempt.payment_id)
                FROM operations AS attempt
               WHERE g.payment_id IS NULL AND reference = g.gateway_payment_id AND gateway = g.gateway
                 AND kind IN ('authorize', 'charge')
               LIMIT 1) AS p ON true
          LEFT JOIN operations AS o
            ON o.payment_id = p.payment_id AND o.number = g.number AND o.gateway = g.gateway
    ), stored AS (
        INSERT INTO inbox (gateway, event_id, type, content, body, payment_id, operation_number, due_at, applied_at)
        SELECT gateway, event_id, type, content, body, found_id, CASE WHEN state IS NOT NULL THEN number END,
               CASE WHEN NOT is_about_nothing THEN now() END, CASE WHEN is_about_nothing THEN now() END
          FROM found
         WHERE is_about_nothing OR found_id IS NOT NULL
         ORDER BY gateway, event_id
        ON CONFLICT (gateway, event_id) DO NOTHING
        RETURNING gateway, event_id
    ), told AS (
        SELECT pg_notify('payments_inbox', '') WHERE EXISTS (SELECT FROM stored)
    )
    SELECT found_id AS payment_id,
           EXISTS (SELECT FROM stored AS s WHERE s.gateway = f.gateway AND s.event_id = f.event_id) AS is_new,
           currency, state, amount_minor
      FROM found AS f LEFT JOIN told ON true ORDER BY place
"""
CLAIM: Final = """
    UPDATE inbox AS i SET due_at = now() + $2::interval
      FROM (SELECT id FROM inbox WHERE due_at IS NOT NULL AND due_at <= now()
             ORDER BY due_at, id LIMIT $1 FOR UPDATE SKIP LOCKED) AS due
     WHERE i.id = due.id
    RETURNING i.id, i.payment_id, i.gateway, i.event_id, i.type, i.operation_number, i.content
"""

# Ids ascend in the order of arrival: the first portion with an event too recent to be forgotten is the last one.
FORGET: Final = """
    WITH portion AS (SELECT id, received_at, applied_at FROM inbox WHERE id > $1 ORDER BY id LIMIT $2),
         gone AS (DELETE FROM inbox USING portion
                   WHERE inbox.id = portion.id AND portion.applied_at < now() - $3::interval RETURNING 1)
    SELECT (SELECT max(id) FROM portion) AS last_id, (SELECT count(*) FROM gone) AS gone,
           (SELECT max(received_at) FROM portion) < now() - $3::interval AS is_more
"""
PORTION: Final = 5_000


class PostgresInbox:
    """Fits `domain.ports.Inbox`. The write path marks the notices that it has applied (`Changes.notices`)."""

    def __init__(self, pool: "asyncpg.Pool[asyncpg.Record]") -> None:
        self._pool = pool

    async def accept(self, received: Sequence[Received]) -> list[Accepted]:
        """Store each event once, if its payment exists here and was at its gateway; on return they are on disk."""
        rows = await self._fetch(ACCEPT, *_columns(received))
        return [_accepted(row) for row in rows]

    async def claim(self, *, limit: int, lease: timedelta) -> list[StoredNotice]:
        """Claim notices that are due, oldest first; unless they are applied, they are due again after `lease`."""
        rows = await self._fetch(CLAIM, limit, lease)
        return sorted(StoredNotice(*row.values()) for row in rows)

    async def _fetch(self, statement: str, *arguments: Any) -> list[asyncpg.Record]:
        with translated():
            async with self._pool.acquire() as connection:
                return await connection.fetch(statement, *arguments)


async def forget_applied(postgres_url: str, *, older_than: timedelta) -> int:
    """Delete webhooks applied longer ago than this; returns how many. One that was never applied is kept for ever.

    The provider should have stopped resending them by then; if not, one is applied again and changes nothing.

    Raises:
        StoreUnavailable: Postgres is away.
        ConcurrentUpdate: another session locks such a row for longer than the database's lock time-out, or deleted it.
        InputRefusedByStore: a constraint added later, such as a foreign key, forbids the deletion.
    """
    with translated():
        connection = await asyncpg.connect(postgres_url, timeout=10, command_timeout=60)
        try:
            forgotten, last_id, is_more = 0, 0, True
            while is_more:
                last_id, gone, is_more = (await connection.fetch(FORGET, last_id, PORTION, older_than))[0]
                forgotten += gone
            return forgotten
        finally:
            await connection.close(timeout=10)


async def listen(postgres_url: str, on_arrival: Callable[[], None]) -> None:
    """Call `on_arrival` whenever an event was stored, until cancelled. While Postgres is away there are no calls."""
    while True:
        with contextlib.suppress(StoreUnavailable):
            await _listen_once(postgres_url, on_arrival)
        await asyncio.sleep(RECONNECT_SECONDS)


async def _listen_once(postgres_url: str, on_arrival: Callable[[], None]) -> None:
    ended = asyncio.Event()
    with translated():
        connection = await asyncpg.connect(postgres_url, timeout=10)
        try:
            connection.add_termination_listener(lambda _: ended.set())
            await connection.add_listener(CHANNEL, lambda *_: on_arrival())
            await ended.wait()
        finally:
            connection.terminate()


def _columns(received: Sequence[Received]) -> list[list[Any]]:
    names = ("gateway", "event_id", "type", "content", "body", "payment_id", "operation_number", "gateway_payment_id")
    return [[getattr(each, name) for each in received] for name in (*names, "is_about_nothing")]


def _accepted(row: asyncpg.Record) -> Accepted:
    state = row["state"]
    return Accepted(
        row["payment_id"],
        row["is_new"],
        row["currency"],
        None if state is None else OperationState(state),
        row["amount_minor"],
    )
