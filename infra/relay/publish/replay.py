"""Publishes retained events again on demand: marked, throttled, and never before their first delivery."""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

import psycopg
from aiokafka import AIOKafkaProducer

from infra.relay.config import RelayConfig
from infra.relay.connection import CONNECTION, lift_time_limit
from infra.relay.event import OutboxEvent
from infra.relay.outbox_rows import COLUMNS, event_of, rows_at_once
from infra.relay.publish.partitions import partition_of
from infra.relay.publish.records import headers_of

_CONNECTION: Final[dict[str, Any]] = CONNECTION | {"autocommit": False}
HEADER: Final = "replayed_at"
"""Header of every replayed message, with the time of the replay; first deliveries do not have it."""
CHUNK: Final = 100

# Events not proven to be published are left out: their first delivery is still to come.
MATCHING: Final = """
      FROM outbox AS o
     WHERE (%(payment)s::text IS NULL OR o.aggregateid = %(payment)s)
       AND (%(type)s::text IS NULL OR o.type = %(type)s)
       AND (%(since)s::timestamptz IS NULL OR o.created_at >= %(since)s)
       AND (%(until)s::timestamptz IS NULL OR o.created_at < %(until)s)
       AND EXISTS (SELECT FROM relay_slots AS r JOIN pg_control_system() AS s
                       ON s.system_identifier::text = r.system_identifier
                    WHERE r.slot_name = %(slot)s
                      AND (coalesce(o.xact, 0) < r.published_below
                           OR pg_visible_in_snapshot(o.xact::text::xid8, r.window_begin)))
       AND NOT EXISTS (SELECT FROM relay_quarantine AS q WHERE q.slot_name = %(slot)s AND q.id = o.id)
"""
COUNT: Final = f"SELECT count(*) {MATCHING}"
LARGEST: Final = f"SELECT coalesce(max(octet_length(o.payload)), 0) {MATCHING}"
# `position` has each payment's order; rows from before that column existed have none, and come first.
SELECT: Final = f"""
    SELECT coalesce(o.position, 0), {COLUMNS} {MATCHING} ORDER BY o.position NULLS FIRST, o.aggregateid, o.payment_seq
"""
# min(), because creation times are not ascending in the order of positions. The place of the last event is
# a parameter, because the event itself may have been dropped meanwhile.
REST_SINCE: Final = f"""
    SELECT count(*), min(o.created_at) {MATCHING}
       AND (coalesce(o.position, 0), o.aggregateid, o.payment_seq)
         > (%(last_position)s::bigint, %(last_payment)s, %(last_seq)s::bigint)
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Events that meet every given condition. The times bound when an event was written; `until` is exclusive."""

    payment: str | None = None
    type: str | None = None
    since: datetime | None = None
    until: datetime | None = None


class EventReplay:
    """One replay of a selection to a topic."""

    def __init__(self, config: RelayConfig, selection: Selection, *, topic: str, rate: int) -> None:
        self._config = config
        self._topic = topic
        self._rate = rate
        self._values: dict[str, Any] = {
            "payment": selection.payment,
            "type": selection.type,
            "since": selection.since,
            "until": selection.until,
            "slot": config.slot,
        }
        self.done = 0
        """How many events Kafka has acknowledged."""
        self._last: dict[str, Any] | None = None
        """The place of the last of those events, as query parameters."""

    async def count(self) -> int:
        """How many events it would publish.

        Raises:
            psycopg.Error: Postgres is away.
        """
        async with await psycopg.AsyncConnection.connect(self._config.postgres_url, **_CONNECTION) as connection:
            row = await (await connection.execute(COUNT.encode(), self._values)).fetchone()
            return int(row[0]) if row is not None else 0

    async def run(self, on_progress: Callable[[int], None], stop: asyncio.Event) -> None:
        """Publish the events, at most `rate` a second, each payment's in order, until `stop` is set.

        Raises:
            psycopg.Error, KafkaError: a server is away; what was acknowledged stays published.
        """
        async with (
            AIOKafkaProducer(
                **self._config.kafka.client_arguments(),
                acks="all",
                enable_idempotence=True,
                max_request_size=2 * self._config.message_bytes_max,
            ) as producer,
            contextlib.aclosing(self._chunks()) as chunks,
        ):
            partitions = len(await producer.partitions_for(self._topic))
            started = time.monotonic()
            async for chunk in chunks:
                await self._publish(producer, partitions, [event for _, event in chunk])
                self.done, self._last = self.done + len(chunk), _place_of(*chunk[-1])
                on_progress(self.done)
                if await _is_set_within(stop, started + self.done / self._rate - time.monotonic()):
                    break

    async def remaining(self) -> tuple[int, datetime | None]:
        """How many events are not published yet, and when the earliest of them was written.

        Raises:
            psycopg.Error: Postgres is away.
        """
        assert self._last is not None, "something was published"
        async with await psycopg.AsyncConnection.connect(self._config.postgres_url, **_CONNECTION) as connection:
            row = await (await connection.execute(REST_SINCE.encode(), self._values | self._last)).fetchone()
            assert row is not None, "an aggregate always gives a row"
            return row[0], row[1]

    async def _chunks(self) -> AsyncGenerator[list[tuple[int, OutboxEvent]], None]:
        """The events, each with its position."""
        size = max(1, min(CHUNK, self._rate // 10))
        # Postgres materializes the rows and the transaction ends. If it stayed open for all of a throttled replay, no
        # table could be vacuumed, and no partition of the outbox created or dropped.
        async with (
            await psycopg.AsyncConnection.connect(self._config.postgres_url, **CONNECTION) as connection,
            connection.cursor("replay", withhold=True) as cursor,
        ):
            await lift_time_limit(connection)
            async with connection.transaction():
                size = min(size, await rows_at_once(connection, LARGEST, self._values))
                await cursor.execute(SELECT.encode(), self._values)
            while rows := await cursor.fetchmany(size):
                yield [(position, event_of(columns)) for position, *columns in rows]

    async def _publish(self, producer: AIOKafkaProducer, partitions: int, events: list[OutboxEvent]) -> None:
        header = (HEADER, datetime.now(UTC).isoformat(timespec="seconds").encode())
        sent = [
            await producer.send(
                self._topic,
                value=event.payload,
                key=event.aggregateid,
                headers=[*headers_of(event), header],
                partition=partition_of(event.aggregateid, partitions),
            )
            for event in events
        ]
        await asyncio.gather(*sent)


def _place_of(position: int, event: OutboxEvent) -> dict[str, Any]:
    payment, seq = event.aggregateid.decode(), int(event.payment_seq)
    return {"last_position": position, "last_payment": payment, "last_seq": seq}


async def _is_set_within(stop: asyncio.Event, seconds: float) -> bool:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(max(0.0, seconds)):
            await stop.wait()
    return stop.is_set()
