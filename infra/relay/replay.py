"""Publishes retained events once more, on demand: marked, throttled, and never before their first delivery."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

import psycopg
from aiokafka import AIOKafkaProducer

from infra.relay.config import RelayConfig
from infra.relay.partitions import partition_of
from infra.relay.pgoutput import OutboxEvent
from infra.relay.records import headers_of
from infra.relay.scan import COLUMNS, event_of
from infra.relay.stream import CONNECTION, lift_time_limit

_CONNECTION: Final[dict[str, Any]] = CONNECTION | {"autocommit": False}
HEADER: Final = "replayed_at"
"""On every replayed message, with the time of the replay; no first delivery has it."""
CHUNK: Final = 100

# What is not proven to be published is left out: its first delivery is still to come.
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
# `position` has every payment's order; rows from before it existed have none, and come first.
SELECT: Final = f"SELECT {COLUMNS} {MATCHING} ORDER BY o.position NULLS FIRST, o.aggregateid, o.payment_seq"


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Which events: those that meet every condition that is given. Times are of the writing, `until` exclusive."""

    payment: str | None = None
    type: str | None = None
    since: datetime | None = None
    until: datetime | None = None


class Replay:
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

    async def count(self) -> int:
        """How many events it would publish.

        Raises:
            psycopg.Error: Postgres is away.
        """
        async with await psycopg.AsyncConnection.connect(self._config.postgres_url, **_CONNECTION) as connection:
            row = await (await connection.execute(COUNT.encode(), self._values)).fetchone()
            return int(row[0]) if row is not None else 0

    async def run(self, on_progress: Callable[[int], None]) -> int:
        """Publish them, at most `rate` a second, each payment's in order; how many Kafka has acknowledged.

        Raises:
            psycopg.Error, KafkaError: a server is away; what was acknowledged stays published.
        """
        done = 0
        async with AIOKafkaProducer(
            bootstrap_servers=self._config.kafka_bootstrap,
            acks="all",
            enable_idempotence=True,
            max_request_size=2 * self._config.message_bytes_max,
        ) as producer:
            partitions = len(await producer.partitions_for(self._topic))
            started = time.monotonic()
            async for chunk in self._chunks():
                await self._publish(producer, partitions, chunk)
                done += len(chunk)
                on_progress(done)
                await asyncio.sleep(max(0.0, started + done / self._rate - time.monotonic()))
        return done

    async def _chunks(self) -> AsyncIterator[list[OutboxEvent]]:
        size = max(1, min(CHUNK, self._rate // 10))
        async with (
            await psycopg.AsyncConnection.connect(self._config.postgres_url, **_CONNECTION) as connection,
            connection.cursor("replay") as cursor,
        ):
            await lift_time_limit(connection)
            await cursor.execute(SELECT.encode(), self._values)
            while rows := await cursor.fetchmany(size):
                yield [event_of(row) for row in rows]

    async def _publish(self, producer: AIOKafkaProducer, partitions: int, events: list[OutboxEvent]) -> None:
        mark = (HEADER, datetime.now(UTC).isoformat(timespec="seconds").encode())
        sent = [
            await producer.send(
                self._topic,
                value=event.payload,
                key=event.aggregateid,
                headers=[*headers_of(event), mark],
                partition=partition_of(event.aggregateid, partitions),
            )
            for event in events
        ]
        await asyncio.gather(*sent)
