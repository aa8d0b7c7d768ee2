"""Measures the whole service: throughput, latency, memory and CPU, and the throughput of a naive service."""

import asyncio
import contextlib
import time
import urllib.request
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
from rich.console import Console

from benchmarks.load import Load, make_charges, percentile
from benchmarks.machine import Machine
from benchmarks.preload import preload_payments
from infra.kafka.access import KafkaAccess
from infra.kafka.topics import ensure_topics
from infra.local import LocalStack
from infra.local.postgres import create_database, drop_database
from infra.local.server import free_port
from infra.postgres.migrate import upgrade

ROOT = Path(__file__).resolve().parents[1]
PARTITIONS = 8
console = Console()


@dataclass(frozen=True)
class Plan:
    """How much of each measurement."""

    commands: int
    slow_commands: int
    naive_commands: int
    latency_seconds: int
    stripe_commands: int
    backlog: int
    stored_payments: int


QUICK = Plan(4_000, 3_000, 250, 2, 80, 3_000, 0)
FULL = Plan(150_000, 100_000, 5_000, 20, 10_000, 500_000, 1_000_000)


class Bench:
    """One run over one set of servers."""

    def __init__(self, stack: LocalStack, plan: Plan) -> None:
        self.plan = plan
        self.results: dict[str, Any] = {"throughput": [], "latency": []}
        self._stack = stack
        self._urls = stack.urls
        run = uuid4().hex[:8]
        self.postgres_url = create_database(self._urls.postgres_url, f"bench_{run}")
        self._topics = {
            "PAYMENTS_COMMANDS_TOPIC": f"bench.{run}.commands",
            "PAYMENTS_EVENTS_TOPIC": f"bench.{run}.events",
            "PAYMENTS_DEAD_LETTER_TOPIC": f"bench.{run}.dlq",
        }
        self._ports = {name: str(free_port()) for name in ("PAYMENTS_WORKER_PORT", "PAYMENTS_RELAY_PORT")}
        self.sandbox_port = free_port()
        environment = self._urls.as_environment() | self._topics | self._ports
        environment |= {
            "PAYMENTS_POSTGRES_URL": self.postgres_url,
            "PAYMENTS_RELAY_SLOT": f"bench_{run}",
            "PAYMENTS_GATEWAYS": '["instant"]',
            "PAYMENTS_DEFAULT_GATEWAY": "instant",
            "PAYMENTS_GATEWAY_CONCURRENCY": '{"instant": 8000, "stripe": 64}',
            "PAYMENTS_CONSUMER_GROUP": f"bench-{run}",
            "PAYMENTS_STRIPE_API_BASE": f"http://127.0.0.1:{self.sandbox_port}",
            "PAYMENTS_STRIPE_API_KEY": "sk_test_bench",
            "PAYMENTS_STRIPE_RETURN_URL": "https://shop.invalid/return",
        }
        self.machine = Machine(ROOT / ".local" / "bench-logs", environment)

    async def prepare(self) -> None:
        """Migrate and create topics."""
        upgrade(self.postgres_url)
        await ensure_topics(KafkaAccess(self._urls.kafka_bootstrap), dict.fromkeys(self._topics.values(), PARTITIONS))

    def erase(self) -> None:
        """Drop the run's database."""
        drop_database(self.postgres_url)

    @contextlib.asynccontextmanager
    async def service(self, gateway_ms: int = 0) -> AsyncIterator[Load]:
        """Worker and relay with a warm load generator, for the measurements in the block."""
        await self.start_service(PAYMENTS_INSTANT_GATEWAY_LATENCY_MS=str(gateway_ms))
        load = await self.load()
        await self._warm_up(load)
        yield load
        await load.stop()
        self.machine.stop()

    async def start_service(self, **environment: str) -> None:
        """Start worker and relay and wait until they are ready."""
        self.machine.start("relay", "app.cli", "relay", **environment)
        self.machine.start("worker", "app.cli", "worker", **environment)
        await self._ready("PAYMENTS_WORKER_PORT")
        await self._ready("PAYMENTS_RELAY_PORT")

    async def worker_metric(self, name: str) -> float:
        """The worker's current value of a gauge without labels."""
        async with httpx.AsyncClient(trust_env=False) as client:
            text = (await client.get(f"http://127.0.0.1:{self._ports['PAYMENTS_WORKER_PORT']}/metrics")).text
        return float(next(line.split()[1] for line in text.splitlines() if line.startswith(f"{name} ")))

    @property
    def partitions(self) -> int:
        return PARTITIONS

    async def set_sandbox_latency(self, milliseconds: int) -> None:
        """Wait for the simulator, then make it delay each request."""
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{self.sandbox_port}", trust_env=False) as client:
            for _ in range(200):
                try:
                    await client.post("/_sandbox/latency", json={"latency_ms": milliseconds})
                    return
                except httpx.TransportError:
                    await asyncio.sleep(0.05)
        raise TimeoutError("the simulator is not ready")

    async def _ready(self, port: str) -> None:
        url = f"http://127.0.0.1:{self._ports[port]}/health/ready"
        for _ in range(600):
            self.machine.check()
            try:
                with await asyncio.to_thread(urllib.request.urlopen, url, timeout=1):
                    return
            except OSError:
                await asyncio.sleep(0.05)
        raise TimeoutError(f"{url} is not ready")

    async def load(self) -> Load:
        """A started generator."""
        load = Load(
            self._urls.kafka_bootstrap, self._topics["PAYMENTS_COMMANDS_TOPIC"], self._topics["PAYMENTS_EVENTS_TOPIC"]
        )
        await load.start()
        return load

    async def throughput(self, load: Load, gateway_ms: int, commands: int) -> None:
        """Commands a second from the first command sent to the last result on the topic."""
        messages = make_charges(commands, PARTITIONS, gateway="instant")
        before = self._cpu()
        started = time.perf_counter()
        sending = asyncio.create_task(load.send_all(messages))
        ended = await load.count_results(commands)
        await sending
        after = self._cpu()
        rate = commands / (ended - started)
        row = {
            "gateway_ms": gateway_ms,
            "commands": commands,
            "commands_per_second": round(rate),
            "worker_processes": 1,
        }
        self.results["throughput"].append(row)
        if gateway_ms == 0:
            self.results["cpu"] = {
                name: round((after[name] - before[name]) / commands * 1000, 4) for name in after if name in before
            }
        console.print(row)

    async def _warm_up(self, load: Load, commands: int = 1000) -> None:
        """Run some commands, so that plans are prepared, topics are known and code is warm."""
        await load.send_all(make_charges(commands, PARTITIONS, gateway="instant"))
        await load.count_results(commands)

    def _cpu(self) -> dict[str, float]:
        servers = {"postgres": self._stack.postgres, "kafka": self._stack.kafka, "valkey": self._stack.valkey}
        pids = {name: server.pid for name, server in servers.items() if server is not None and server.pid is not None}
        own = time.process_time()
        return self.machine.cpu_seconds(**pids) | {"generator": own}

    async def latency(self, load: Load, rate: int, key: str = "latency") -> None:
        """Percentiles from command to result at a steady rate."""
        messages = make_charges(rate * self.plan.latency_seconds, PARTITIONS, gateway="instant")
        taken = await load.time_results(messages, rate)
        # The first second measures the start-up.
        steady = taken[rate:]
        shares = {"p50_ms": 0.5, "p95_ms": 0.95, "p99_ms": 0.99}
        row = {"rate": rate} | {name: round(percentile(steady, share) * 1000, 1) for name, share in shares.items()}
        self.results.setdefault(key, []).append(row)
        console.print(key, row)

    async def stripe_http(self) -> None:
        """Throughput with Stripe's official SDK over HTTP, against the simulator in its own process."""
        self.machine.start("sandbox", "app.cli", "sandbox", "--port", str(self.sandbox_port))
        settings = {"PAYMENTS_GATEWAYS": '["stripe"]', "PAYMENTS_DEFAULT_GATEWAY": "stripe"}
        await self.start_service(**settings)
        load = await self.load()
        messages = make_charges(self.plan.stripe_commands, PARTITIONS, gateway="stripe")
        started = time.perf_counter()
        await load.send_all(messages)
        ended = await load.count_results(len(messages))
        await load.stop()
        self.machine.stop()
        self.results["stripe_http"] = {"commands_per_second": round(len(messages) / (ended - started))}
        console.print("stripe_http", self.results["stripe_http"])

    async def memory(self) -> None:
        """The largest memory of worker and relay while they process a backlog on the topic."""
        load = await self.load()
        await load.send_all(make_charges(self.plan.backlog, PARTITIONS, gateway="instant"))
        await self.start_service()
        counting = asyncio.create_task(load.count_results(self.plan.backlog))
        largest = {"worker": 0.0, "relay": 0.0}
        while not counting.done():
            largest = {name: max(size, self.machine.rss_mb(name)) for name, size in largest.items()}
            await asyncio.sleep(0.2)
        await counting
        await load.stop()
        self.machine.stop()
        sizes = {f"{name}_rss_mb": round(size) for name, size in largest.items()}
        self.results["memory"] = sizes | {"backlog": self.plan.backlog}
        console.print("memory", self.results["memory"])

    async def naive(self) -> None:
        """The same load on the naive service."""
        self.machine.start("naive", "benchmarks.naive")
        load = await self.load()
        messages = make_charges(self.plan.naive_commands, PARTITIONS, gateway="instant")
        await load.send_all(messages[:100])
        await load.count_results(100)
        started = time.perf_counter()
        await load.send_all(messages[100:])
        ended = await load.count_results(len(messages) - 100)
        await load.stop()
        self.machine.stop()
        self.results["naive"] = {"commands_per_second": round((len(messages) - 100) / (ended - started))}
        console.print("naive", self.results["naive"])

    async def with_full_tables(self) -> None:
        """Throughput and latency again with many stored payments."""
        await preload_payments(self.postgres_url, self.plan.stored_payments)
        async with self.service() as load:
            await self.throughput(load, 0, self.plan.commands)
            full = self.results["throughput"].pop()
            await self.latency(load, 2000, key="latency_after_preload")
        latency = self.results.pop("latency_after_preload")
        self.results["full_tables"] = {
            "stored_payments": self.plan.stored_payments,
            "throughput": full,
            "latency": latency,
        }


async def run(stack: LocalStack, plan: Plan) -> dict[str, Any]:
    """All measurements, one after the other."""
    bench = Bench(stack, plan)
    await bench.prepare()
    try:
        async with bench.service() as load:
            await bench.throughput(load, 0, plan.commands)
            for rate in (500, 2000):
                await bench.latency(load, rate)
        await bench.naive()
        for gateway_ms in (100, 200):
            async with bench.service(gateway_ms) as load:
                await bench.throughput(load, gateway_ms, plan.slow_commands)
        await bench.stripe_http()
        await bench.memory()
        if plan.stored_payments:
            await bench.with_full_tables()
    finally:
        bench.machine.stop()
        bench.erase()
    return bench.results
