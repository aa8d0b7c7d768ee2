"""The relay: publishes every committed outbox row, at least once, in commit order per payment.

The slot's confirmed position is the only progress: it moves past a commit when Kafka has acknowledged every event up to
it. A session ends with any error, and the next one begins at that position; so events may repeat, and none is skipped.
"""

import asyncio
import contextlib
import random
import time
import zlib
from dataclasses import dataclass

import psycopg
import structlog
from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError

from infra.relay import metrics
from infra.relay.errors import RelayError, SlotBusy
from infra.relay.pgoutput import (
    BEGIN,
    COMMIT,
    INSERT,
    OUTBOX_COLUMNS,
    RELATION,
    Commit,
    OutboxEvent,
    RowReader,
    read_commit,
)
from infra.relay.publisher import Group, Prefix, Publisher
from infra.relay.stream import ReplicationStream

log = structlog.get_logger(__name__)

PORTION = 2000
"""Messages of the log that are taken in one go."""
BUSY_SECONDS = 0.05
"""How soon a failure of Kafka is noticed while there is nothing new in the log."""
_US_1970_TO_2000 = 946_684_800_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class RelayConfig:
    """`unacknowledged_max` events at most are in memory: beyond it the log is not read on."""

    postgres_url: str
    kafka_bootstrap: str
    topic: str
    slot: str = "payments_relay"
    publication: str = "payments_outbox"
    unacknowledged_max: int = 20_000
    feedback_seconds: float = 1.0
    standby_seconds: float = 0.5
    retry_seconds_max: float = 5.0
    message_bytes_max: int = 4 * 1024 * 1024


class Relay:
    """Runs sessions until told to stop. Of several relays with one slot, one is active and the others stand by."""

    def __init__(self, config: RelayConfig) -> None:
        self._config = config
        self.state = "starting"

    @property
    def trouble(self) -> str | None:
        """Why this relay is not ready; None while it publishes or stands by."""
        return None if self.state in ("active", "standby") else self.state

    async def run(self, stop: asyncio.Event) -> None:
        """Publish until `stop` is set; then have everything that was read acknowledged, and confirm it."""
        failures = 0
        while not stop.is_set():
            started = time.monotonic()
            try:
                await _Session(self, self._config, stop).run()
            except (RelayError, KafkaError, psycopg.Error, OSError) as error:
                metrics.SESSIONS.labels(type(error).__name__).inc()
                failures = 0 if time.monotonic() - started > 10 else failures + 1
                await self._back_off(stop, error, failures)
            finally:
                metrics.ACTIVE.set(0)

    async def _back_off(self, stop: asyncio.Event, error: Exception, failures: int) -> None:
        if isinstance(error, SlotBusy):
            self.state, wait = "standby", self._config.standby_seconds
        else:
            self.state = f"reconnecting: {type(error).__name__}"
            wait = min(self._config.retry_seconds_max, 0.1 * 2 ** min(failures, 10)) * random.uniform(0.5, 1)  # noqa: S311
            log.warning("relay session ended", error=str(error).strip(), retry_seconds=round(wait, 2))
        try:
            async with asyncio.timeout(wait):
                await stop.wait()
        except TimeoutError:
            return


class _Session:
    """One life of a replication connection and a producer."""

    def __init__(self, relay: Relay, config: RelayConfig, stop: asyncio.Event) -> None:
        self._relay = relay
        self._config = config
        self._stop = stop
        self._prefix = Prefix()
        self._rows = RowReader()
        self._group = Group()
        self._confirmed = 0
        self._next_feedback = 0.0
        self._counted = 0

    async def run(self) -> None:
        async with await self._lead() as leader:
            stream = await ReplicationStream.connect(self._config.postgres_url)
            try:
                producer = self._new_producer()
                await producer.start()
                publisher = Publisher(producer, self._config.topic, await self._partitions(producer))
                try:
                    await self._prepare(leader, stream, publisher)
                    await self._publish(stream, publisher)
                finally:
                    await publisher.close()
            finally:
                stream.close()

    async def _lead(self) -> psycopg.AsyncConnection:
        """The connection whose advisory lock makes this the one relay that may create, scan and stream.

        Raises:
            SlotBusy: another relay leads.
        """
        connection = await psycopg.AsyncConnection.connect(
            self._config.postgres_url, autocommit=True, connect_timeout=5
        )
        key = zlib.crc32(self._config.slot.encode())
        row = await (await connection.execute("SELECT pg_try_advisory_lock(8146, %s)", [key - 2**31])).fetchone()
        if row is None or not row[0]:
            await connection.close()
            raise SlotBusy("another relay leads")
        return connection

    def _new_producer(self) -> AIOKafkaProducer:
        return AIOKafkaProducer(
            bootstrap_servers=self._config.kafka_bootstrap,
            acks="all",
            enable_idempotence=True,
            max_batch_size=262_144,
            max_request_size=self._config.message_bytes_max,
        )

    async def _partitions(self, producer: AIOKafkaProducer) -> int:
        return len(await producer.partitions_for(self._config.topic))

    # --- the slot ---------------------------------------------------------------------------------------------------

    async def _prepare(self, leader: psycopg.AsyncConnection, stream: ReplicationStream, publisher: Publisher) -> None:
        """Have a slot before which every row was published: an existing one, or a new one and a scan of the table."""
        system = await stream.system_identifier()
        if not await self._has_caught_up(leader, system):
            await self._catch_up(leader, stream, publisher, system)
        await stream.start(self._config.slot, self._config.publication)
        self._relay.state = "active"
        metrics.ACTIVE.set(1)
        log.info("relay active", slot=self._config.slot, topic=self._config.topic)

    async def _has_caught_up(self, leader: psycopg.AsyncConnection, system: str) -> bool:
        cursor = await leader.execute(
            "SELECT 1 FROM pg_replication_slots AS s JOIN relay_slots AS r USING (slot_name)"
            " WHERE s.slot_name = %s AND r.system_identifier = %s AND s.database = current_database()"
            " AND s.wal_status <> 'lost'",
            [self._config.slot, system],
        )
        return await cursor.fetchone() is not None

    async def _catch_up(
        self, leader: psycopg.AsyncConnection, stream: ReplicationStream, publisher: Publisher, system: str
    ) -> None:
        """Create the slot anew and publish, once more, every row that was committed before it."""
        self._relay.state = "catching up"
        await leader.execute("DELETE FROM relay_slots WHERE slot_name = %s", [self._config.slot])
        await stream.drop_slot(self._config.slot)
        slot = await stream.create_slot(self._config.slot)
        count = await self._scan(slot.snapshot, publisher)
        metrics.RESCANNED.inc(count)
        if count:
            log.warning("slot was new: all retained events were published again", events=count)
        await leader.execute(
            "INSERT INTO relay_slots (slot_name, system_identifier) VALUES (%s, %s)", [self._config.slot, system]
        )

    async def _scan(self, snapshot: str, publisher: Publisher) -> int:
        """Publish the rows of the snapshot in the order of their transactions, and wait for all acknowledgements."""
        group, count = Group(), 0
        columns = ", ".join(f"{name}::text" for name in OUTBOX_COLUMNS)
        async with await psycopg.AsyncConnection.connect(self._config.postgres_url) as connection:
            await connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
            await connection.execute(f"SET TRANSACTION SNAPSHOT '{snapshot}'")
            async with connection.cursor("outbox_scan") as cursor:
                await cursor.execute(f"SELECT {columns} FROM outbox ORDER BY created_at, aggregateid, payment_seq")  # noqa: S608
                async for row in cursor:
                    values = [None if value is None else value.encode() for value in row]
                    publisher.publish(OutboxEvent._make(values), group)
                    count += 1
                    await self._wait_for_room(publisher)
        while group.missing:
            await self._wait_for_progress(publisher)
        return count

    async def _wait_for_room(self, publisher: Publisher) -> None:
        while publisher.unacknowledged >= self._config.unacknowledged_max:
            await self._wait_for_progress(publisher)

    async def _wait_for_progress(self, publisher: Publisher) -> None:
        publisher.progress.clear()
        await publisher.progress.wait()
        if publisher.failed.done():
            publisher.failed.result()

    # --- the stream -------------------------------------------------------------------------------------------------

    async def _publish(self, stream: ReplicationStream, publisher: Publisher) -> None:
        while not self._stop.is_set():
            is_more = publisher.unacknowledged < self._config.unacknowledged_max and self._read(stream, publisher)
            self._confirm(stream, publisher)
            await self._rest(stream, publisher, is_more=is_more)
            if publisher.failed.done():
                publisher.failed.result()
        await self._finish(stream, publisher)

    async def _rest(self, stream: ReplicationStream, publisher: Publisher, *, is_more: bool) -> None:
        """Wait for the next thing to do: more log, or, while Kafka is slow, its acknowledgements."""
        if is_more:
            await asyncio.sleep(0)
        elif publisher.unacknowledged >= self._config.unacknowledged_max:
            publisher.progress.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._config.feedback_seconds):
                    await publisher.progress.wait()
        else:
            await stream.wait(BUSY_SECONDS if publisher.unacknowledged else self._config.feedback_seconds)

    def _read(self, stream: ReplicationStream, publisher: Publisher) -> bool:
        """Take what has arrived, up to a portion that leaves the loop time for Kafka; whether there is more."""
        message = None
        for _ in range(PORTION):
            message = stream.receive()
            if message is None:
                break
            self._take(message, publisher)
        self._close_group(None)
        return message is not None

    def _take(self, message: memoryview, publisher: Publisher) -> None:
        kind = message[0]
        if kind == INSERT:
            publisher.publish(self._rows.read(message), self._group)
        elif kind == COMMIT:
            self._close_group(read_commit(message))
        elif kind == RELATION:
            self._rows.learn(message)
        elif kind != BEGIN:
            log.warning("unexpected message in the log stream", kind=chr(kind))

    def _close_group(self, commit: Commit | None) -> None:
        """End the current group at a commit, or amid a transaction so that its acknowledgements are counted."""
        if commit is None and not self._group.missing:
            return
        self._group.commit = commit
        self._prefix.append(self._group)
        self._group = Group()

    def _confirm(self, stream: ReplicationStream, publisher: Publisher) -> None:
        """Tell the server how far everything is acknowledged, when it asks and every `feedback_seconds`."""
        lsn = self._prefix.advance()
        if self._prefix.oldest is None and not self._group.missing and not publisher.unacknowledged:
            # Nothing of ours is on its way: what else is in the log need not be kept for us.
            lsn = max(lsn, stream.wal_end)
        now = time.monotonic()
        if stream.reply_wanted or now >= self._next_feedback:
            self._confirmed = max(self._confirmed, lsn)
            stream.confirm(self._confirmed)
            self._next_feedback = now + self._config.feedback_seconds
            self._show(stream, publisher)

    def _show(self, stream: ReplicationStream, publisher: Publisher) -> None:
        metrics.EVENTS.inc(publisher.published - self._counted)
        self._counted = publisher.published
        metrics.UNACKNOWLEDGED.set(publisher.unacknowledged)
        metrics.LAG_BYTES.set(max(0, stream.wal_end - self._confirmed))
        metrics.LAG_SECONDS.set(_age(self._prefix.oldest))

    async def _finish(self, stream: ReplicationStream, publisher: Publisher) -> None:
        """Have what was read acknowledged, and say so, that the next start repeats nothing."""
        async with asyncio.timeout(20):
            while publisher.unacknowledged:
                await self._wait_for_progress(publisher)
        self._next_feedback = 0.0
        self._confirm(stream, publisher)
        log.info("relay stopped", confirmed=self._confirmed)


def _age(group: Group | None) -> float:
    if group is None or group.commit is None:
        return 0.0
    return max(0.0, time.time() - (group.commit.committed_at_us + _US_1970_TO_2000) / 1_000_000)
