"""The relay part of `make bench`: our relay's two sources and a tuned Debezium, with equal rows, one after the other.

Drain: throughput for rows that are already committed, from the first message on the topic to the last. Latency: from
commit to consumer, at a steady rate of transactions.
"""

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Final

import asyncpg
import httpx
import psutil
from aiokafka.admin import AIOKafkaAdminClient
from confluent_kafka import Consumer, TopicPartition

from benchmarks.load import percentile
from benchmarks.machine import Machine
from infra.kafka.access import KafkaAccess
from infra.kafka.topics import ensure_topics
from infra.local import LocalStack
from infra.local.connect import EmbeddedConnect
from infra.local.postgres import create_database, drop_database
from infra.local.server import free_port
from infra.postgres.maintenance import maintain
from infra.postgres.migrate import upgrade

PARTITIONS: Final = 8
WRITERS: Final = 4
PLAIN: Final = "wal-python"
"""`wal` without its compiled inner loop, as on a machine without a C compiler."""
WARM_ROWS: Final = 50_000
"""Rows published before measuring, enough for the JVM's compiler to have done its work."""
OPTIMIZED: Final = ("-Xmx1g", "-XX:+UseParallelGC")
"""Debezium at its best: the optimizing compiler, and a warm JVM before anything is measured."""
TURNS: Final = 5
"""How often a measurement is repeated where differences of a tenth matter; its median counts."""
STORED_DAYS: Final = 10
PAYLOAD: Final = (
    '{"type":"payment.captured.v1","event_id":"01890000-0000-7000-8000-000000000000","occurred_at":"2026-01-02T03:04:05'
    '.000006Z","payment_id":"5d2f6a0e-6f0e-4a57-9b1c-1f2d3c4b5a69","payment_seq":1,"amount_minor":1250,"currency":"USD",'
    '"replayed":false,"payment":{"status":"captured","captured_minor":1250,"authorized_minor":1250,"refunded_minor":0}}'
)
WRITE: Final = """
    INSERT INTO outbox (id, aggregateid, type, payload, payment_seq, occurred_at)
    SELECT gen_random_uuid(), 'pay_' || ($2::bigint + n), 'payment.captured.v1', $3, 1, '2026-01-02T03:04:05.000006Z'
      FROM generate_series(1, $1::int) AS n
"""
FILL: Final = """
    DO $$ BEGIN FOR i IN 1..{transactions} LOOP
        INSERT INTO outbox (id, aggregateid, type, payload, payment_seq, occurred_at, created_at)
        SELECT gen_random_uuid(), 'pay_' || (i * 1000 + n), 'payment.captured.v1', '{payload}', 1, 'then',
               now() - make_interval(days => i % {days})
          FROM generate_series(1, {rows}) AS n;
        COMMIT;
    END LOOP; END $$
"""
BEGIN_HERE: Final = """
    INSERT INTO relay_slots (slot_name, system_identifier, source, confirmed_lsn, published_below)
    SELECT $1, system_identifier, $2, confirmed_flush_lsn, pg_snapshot_xmin(pg_current_snapshot())::text::bigint
      FROM pg_control_system() LEFT JOIN pg_replication_slots ON slot_name = $1
"""
"""Makes the rows that are in the outbox now count as published."""


@dataclass(frozen=True)
class RelayPlan:
    """How much of each measurement."""

    drain_rows: int
    latency_seconds: int
    rate: int = 1000
    stored_rows: int = 0


class RelayBench:
    """One database for all sources; each source has its own slot, made before the rows are written, and topic."""

    def __init__(self, stack: LocalStack, plan: RelayPlan, root: Path) -> None:
        self.results: dict[str, Any] = {"drain": [], "latency": []}
        self._stack = stack
        self._plan = plan
        self._root = root
        self._run = uuid.uuid4().hex[:8]
        self._url = create_database(stack.urls.postgres_url, f"bench_relay_{self._run}")
        self._folder = root / ".local" / "bench-connect"
        self._log_folder = root / ".local" / "bench-logs"
        self._serial = 0
        self._keeps_rows = False
        self._connector_url = ""

    async def run(self, sources: tuple[str, ...]) -> dict[str, Any]:
        """All measurements."""
        upgrade(self._url)
        try:
            await self._drain(sources[0], 100)  # Not counted: this warms up the broker's JVM.
            for rows in (100, 1):
                await self._drains((*sources, PLAIN), rows)
            for source in sources:
                self.results["latency"].append(await self._latency(source))
                print(self.results["latency"][-1])
            await self._restarts()
            if self._plan.stored_rows:
                await self._with_stored_rows()
        finally:
            drop_database(self._url)
        return self.results

    # --- drain ------------------------------------------------------------------------------------------------------

    async def _drains(self, sources: tuple[str, ...], rows: int) -> None:
        """Drain equal backlogs with every source; each backlog is written after the source's slot or cursor exists."""
        for source in sources:
            self.results["drain"].append(await self._drain(source, rows))
            print(self.results["drain"][-1])

    async def _drain(self, source: str, rows: int) -> dict[str, Any]:
        async with self._reader(source) as reader:
            backlog = self._backlog_of_debezium if source == "debezium" else self._backlog_of_relay
            async with backlog(reader, rows) as process:
                first = await asyncio.to_thread(reader.read, 1)
                cpu = _cpu(process.pid)
                ended = await asyncio.to_thread(reader.read, self._plan.drain_rows - 1)
                used, rss = _cpu(process.pid) - cpu, psutil.Process(process.pid).memory_info().rss
        count = self._plan.drain_rows
        return {
            "source": source,
            "rows_per_transaction": rows,
            "rows_per_second": round((count - 1) / (ended - first)),
            "cpu_us_per_row": round(used / count * 1e6, 1),
            "rss_mb": round(rss / 2**20),
        }

    @contextlib.asynccontextmanager
    async def _backlog_of_relay(self, reader: "_Reader", rows: int) -> AsyncIterator[psutil.Process]:
        """Run the relay once so that its slot or cursor exists, write the rows while it is stopped, and start it."""
        async with self._publisher(reader):
            await self._write(100)
            await asyncio.to_thread(reader.read, 100)
        await self._fill(self._plan.drain_rows // rows, rows)
        async with self._publisher(reader, wait=False) as process:
            yield process

    @contextlib.asynccontextmanager
    async def _backlog_of_debezium(self, reader: "_Reader", rows: int) -> AsyncIterator[psutil.Process]:
        """Warm up Debezium, then stop only its connector while the rows are written, so that the JVM stays warm."""
        async with self._publisher(reader) as process:
            await self._write(WARM_ROWS)
            await asyncio.to_thread(reader.read, WARM_ROWS)
            await asyncio.sleep(1.5)  # It writes its offsets every second.
            await asyncio.to_thread(httpx.put, f"{self._connector_url}/stop")
            await self._until_inactive(reader)
            await self._fill(self._plan.drain_rows // rows, rows)
            await asyncio.to_thread(httpx.put, f"{self._connector_url}/resume")
            yield process

    async def _until_inactive(self, reader: "_Reader") -> None:
        connection = await asyncpg.connect(self._url)
        query = "SELECT active FROM pg_replication_slots WHERE slot_name = $1"
        async with asyncio.timeout(60):
            while await connection.fetchval(query, reader.name):  # noqa: ASYNC110 - a JVM does it
                await asyncio.sleep(0.05)
        await connection.close()

    async def _fill(self, transactions: int, rows: int, days: int = 1) -> None:
        connection = await asyncpg.connect(self._url)
        await connection.execute("SET synchronous_commit = off")  # Only while the rows are made.
        fill = FILL.format(transactions=transactions, rows=rows, payload=PAYLOAD, days=days)
        await connection.execute(fill, timeout=900)
        # Otherwise the vacuum and checkpoint that so many writes cause would run during the measurement.
        await connection.execute("VACUUM (ANALYZE) outbox", timeout=600)
        await connection.execute("CHECKPOINT", timeout=600)
        await connection.close()

    async def _write(self, count: int) -> None:
        connection = await asyncpg.connect(self._url)
        self._serial += count
        await connection.execute(WRITE, count, self._serial, PAYLOAD)
        await connection.close()

    # --- latency ----------------------------------------------------------------------------------------------------

    async def _latency(self, source: str) -> dict[str, Any]:
        async with self._reader(source) as reader, self._publisher(reader, tuning="latency"):
            await self._write(WARM_ROWS)
            await asyncio.to_thread(reader.read, WARM_ROWS)
            count = self._plan.rate * self._plan.latency_seconds
            reading = asyncio.create_task(asyncio.to_thread(reader.times, count))
            committed = await self._write_steadily(count)
            arrived = await reading
        taken = [arrived[name] - at for name, at in committed.items()][self._plan.rate :]
        row = {"source": source, "rate": self._plan.rate}
        return row | {f"p{share}_ms": round(percentile(taken, share / 100) * 1000, 2) for share in (50, 99)}

    async def _write_steadily(self, count: int) -> dict[bytes, float]:
        """Write `count` rows at the plan's rate, one per transaction; the time at which each key's commit returned."""
        committed: dict[bytes, float] = {}
        self._serial += count + 1
        base, started = self._serial, time.perf_counter()
        pool = await asyncpg.create_pool(self._url, min_size=WRITERS, max_size=WRITERS)

        async def write(writer: int) -> None:
            async with pool.acquire() as connection:
                for number in range(writer, count, WRITERS):
                    ahead = started + number / self._plan.rate - time.perf_counter()
                    if ahead > 0:
                        await asyncio.sleep(ahead)
                    await connection.execute(WRITE, 1, base + number - 1, PAYLOAD)
                    committed[f"pay_{base + number}".encode()] = time.perf_counter()

        await asyncio.gather(*map(write, range(WRITERS)))
        await pool.close()
        self._serial += count
        return dict(sorted(committed.items(), key=lambda item: item[1]))

    async def _restarts(self) -> None:
        """The median of several restarts; the first one may also have to compile the bytecode."""
        self.results["restart_s"] = round(median([await self._restart() for _ in range(TURNS)]), 2)
        print({"restart_s": self.results["restart_s"]})

    async def _restart(self) -> float:
        """Seconds from the start of the process until the event of a waiting row arrives."""
        async with self._reader("wal") as reader:
            async with self._publisher(reader):
                await self._write(1)
                await asyncio.to_thread(reader.read, 1)
            await self._write(1)
            started = time.perf_counter()
            async with self._publisher(reader, wait=False):
                ended = await asyncio.to_thread(reader.read, 1)
        return ended - started

    async def _with_stored_rows(self) -> None:
        """Drain and latency with a full and an empty outbox, alternately, so that drift over time affects both."""
        full = RelayBench(self._stack, self._plan, self._root)
        upgrade(full._url)
        try:
            await full._store(self._plan.stored_rows)
            self.results["with_stored_rows"] = [
                row for source in ("wal", "poll") for row in await self._beside(full, source)
            ]
        finally:
            drop_database(full._url)

    async def _store(self, rows: int) -> None:
        """Store `rows` published rows of several days, in the partitions that `payments maintain` makes for them."""
        await self._fill(STORED_DAYS, 1, STORED_DAYS)
        await maintain(self._url, days_ahead=1, retention_days=2 * STORED_DAYS)
        await self._fill(rows // 1000, 1000, STORED_DAYS)
        self._keeps_rows = True

    async def _beside(self, full: "RelayBench", source: str) -> list[dict[str, Any]]:
        benches = {0: self, self._plan.stored_rows: full}
        turns: dict[int, list[dict[str, Any]]] = {stored: [] for stored in benches}
        for turn in range(TURNS):
            # The order alternates, since the first run may leave the machine faster or slower for the second.
            for stored, bench in sorted(benches.items(), reverse=bool(turn % 2)):
                turns[stored].append(await bench._drain(source, 100) | await bench._latency(source))
                print(turns[stored][-1] | {"stored_rows": stored})
        return [_middle(rows) | {"stored_rows": stored} for stored, rows in turns.items()]

    # --- publishers and readers ---------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def _reader(self, source: str) -> AsyncIterator["_Reader"]:
        self._serial += 1
        name = f"bench_{self._run}_{self._serial}"
        await ensure_topics(KafkaAccess(self._stack.urls.kafka_bootstrap), {name: PARTITIONS})
        connection = await asyncpg.connect(self._url)
        if source == "debezium":
            await connection.execute("SELECT pg_create_logical_replication_slot($1, 'pgoutput')", name)
            # A relay on `wal` disables it too.
            await connection.execute("ALTER TABLE outbox DISABLE TRIGGER outbox_notify")
        else:
            if not self._keeps_rows:
                await connection.execute("TRUNCATE outbox")
            if source != "poll":
                await connection.execute("SELECT pg_create_logical_replication_slot($1, 'pgoutput')", name)
            await connection.execute(BEGIN_HERE, name, _source_of(source))
        reader = _Reader(self._stack.urls.kafka_bootstrap, source, name)
        yield reader
        reader.close()
        await connection.execute(
            "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE slot_name = $1", name
        )
        await connection.close()
        await _delete_topic(self._stack.urls.kafka_bootstrap, name)

    @contextlib.asynccontextmanager
    async def _publisher(
        self, reader: "_Reader", *, tuning: str = "throughput", wait: bool = True
    ) -> AsyncIterator[psutil.Process]:
        if reader.source == "debezium":
            connect = EmbeddedConnect(
                self._folder / reader.name,
                postgres_url=self._url,
                kafka_bootstrap=self._stack.urls.kafka_bootstrap,
                topic=reader.name,
                slot=reader.name,
                tuning=tuning,
                jvm_options=OPTIMIZED,
            )
            await asyncio.to_thread(connect.start)
            self._connector_url = connect.connector_url
            try:
                yield psutil.Process(connect.pid)
                await asyncio.sleep(1.5)  # It writes its offsets every second.
            finally:
                await asyncio.to_thread(connect.stop)
        else:
            machine = self._machine(reader)
            machine.start("relay", "app.cli", "relay")
            try:
                if wait:
                    await self._active(reader)
                yield machine.process("relay")
            finally:
                machine.stop()

    def _machine(self, reader: "_Reader") -> Machine:
        environment = {
            "PAYMENTS_POSTGRES_URL": self._url,
            "PAYMENTS_KAFKA_BOOTSTRAP": self._stack.urls.kafka_bootstrap,
            "PAYMENTS_EVENTS_TOPIC": reader.name,
            "PAYMENTS_RELAY_SLOT": reader.name,
            "PAYMENTS_RELAY_SOURCE": _source_of(reader.source),
            "PAYMENTS_RELAY_NATIVE": str(reader.source != PLAIN),
            "PAYMENTS_RELAY_PORT": str(free_port()),
        }
        return Machine(self._log_folder, environment)

    async def _active(self, reader: "_Reader") -> None:
        connection = await asyncpg.connect(self._url)
        async with asyncio.timeout(30):
            while not await connection.fetchval(  # noqa: ASYNC110 - another process does it
                "SELECT true FROM relay_slots WHERE slot_name = $1", reader.name
            ):
                await asyncio.sleep(0.05)
        await connection.close()


class _Reader:
    """Reads what one source publishes to its topic. Blocking, and on librdkafka, so that it costs little CPU."""

    def __init__(self, bootstrap: str, source: str, name: str) -> None:
        self.source, self.name = source, name
        settings = {"bootstrap.servers": bootstrap, "group.id": name, "enable.auto.commit": False}
        self._consumer = Consumer(settings | {"fetch.wait.max.ms": 100, "queued.max.messages.kbytes": 65536})
        self._consumer.assign([TopicPartition(name, number, 0) for number in range(PARTITIONS)])

    def close(self) -> None:
        self._consumer.close()

    def read(self, count: int) -> float:
        """Read `count` messages; the time at which the last one came (`perf_counter`)."""
        return [now for now, _ in self._batches(count)][-1]

    def times(self, count: int) -> dict[bytes, float]:
        """Read `count` messages; the time at which each key first came."""
        found: dict[bytes, float] = {}
        for now, batch in self._batches(count):
            for message in batch:
                found.setdefault(message.key() or b"", now)
        return found

    def _batches(self, count: int) -> Iterator[tuple[float, list[Any]]]:
        while count:
            batch = self._consumer.consume(1, 30)
            if not batch:
                raise TimeoutError(f"{count} messages are missing on {self.name}")
            batch += self._consumer.consume(min(1000, count - 1), 0) if count > 1 else []
            yield time.perf_counter(), batch
            count -= len(batch)


async def _delete_topic(bootstrap: str, name: str) -> None:
    """Each drain leaves half a gigabyte, which would fill the disk over the runs."""
    admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap)
    await admin.start()
    await admin.delete_topics([name])
    await admin.close()


def _middle(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The median of each figure; the medians may come from different turns."""
    names = [name for name, value in rows[0].items() if not isinstance(value, str)]
    return rows[0] | {name: median(row[name] for row in rows) for name in names}


def _source_of(name: str) -> str:
    return "wal" if name == PLAIN else name


def _cpu(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return times.user + times.system
