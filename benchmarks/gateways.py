"""`make bench ONLY=gateways`: webhooks accepted, payments through a gateway over HTTP, and reconciliation of many.

The senders of webhooks share the machine with the server that they measure, so their CPU cost is in the results too.
"""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any, Final
from uuid import UUID, uuid4

import asyncpg
import httpx
import stripe
from rich.console import Console

from app.up import simulated
from benchmarks.finder import time_finders
from benchmarks.load import make_charges, percentile
from benchmarks.service import Bench
from benchmarks.watch import Memory
from infra.gateways.transport import SmallPools
from infra.local.server import free_port

SECRET: Final = "whsec_bench"
CONNECTIONS: Final = 200
"""Providers open a connection for nearly every delivery. With 48 connections, each sending one webhook at a time, the
server had to wait for the senders."""
PROVIDER_MS: Final = 100
CONCURRENCY: Final = 64
LIMIT_AT_ONCE: Final = 150
LIMIT_PER_SECOND: Final = 1_000
"""A provider's rate limit, ten times Stripe's: with Stripe's, 100,000 operations would take a quarter of an hour."""
PAYERS: Final = 32
CURRENCIES: Final = {"stripe": "USD", "paypal": "USD", "vnpay": "VND", "momo": "VND"}
console = Console()

OPEN_PAYMENTS: Final = """
    WITH given AS (SELECT * FROM unnest($1::uuid[]) AS payment_id),
    made AS (
        INSERT INTO payments (payment_id, gateway, gateway_payment_id, currency, amount_minor, status, open_operations,
                              last_operation, last_seq)
        SELECT payment_id, $2, 'pi_' || payment_id, 'USD', 1000, 'processing', 1, 1, 1 FROM given)
    INSERT INTO operations (payment_id, number, kind, idempotency_key, fingerprint, content, state, amount_minor,
                            gateway, reference, attempts, lease_token, due_at, dispatched_at)
    SELECT payment_id, 1, 'charge', 'bench-' || payment_id, sha256(payment_id::text::bytea),
           $5 || payment_id || '","idempotency_key":"bench-' || payment_id || '"}', $3, 1000, $2,
           'pi_' || payment_id, 1, 1, now() + $4::interval, now() FROM given
"""
CONTENT: Final = (
    '{"type":"payment.charge.v1","amount_minor":1000,"currency":"USD","payment_method":"x","order_id":"bench",'
    '"payment_id":"'
)


@dataclass(frozen=True)
class GatewayPlan:
    """How much of each measurement."""

    webhooks: int
    steady_seconds: int
    stuck_operations: int
    payments: int
    stored_payments: int


QUICK: Final = GatewayPlan(
    webhooks=3_000, steady_seconds=3, stuck_operations=3_000, payments=300, stored_payments=100_000
)
FULL: Final = GatewayPlan(
    webhooks=60_000, steady_seconds=20, stuck_operations=100_000, payments=5_000, stored_payments=10_000_000
)


class GatewayBench:
    """The measurements, over the servers and processes of the service's bench."""

    def __init__(self, bench: Bench, plan: GatewayPlan) -> None:
        self._bench = bench
        self._plan = plan
        self._memory = Memory(bench.machine)
        self.results: dict[str, Any] = {}

    async def run(self) -> dict[str, Any]:
        """All measurements, one after the other."""
        await self._webhooks()
        await self._reconciliation()
        await self._payments()
        await self._finder()
        self.results["memory"] = {f"{name}_rss_mb": round(size) for name, size in self._memory.largest.items()}
        console.print("memory", self.results["memory"])
        return self.results

    # --- webhooks ---------------------------------------------------------------------------------------------------

    async def _webhooks(self) -> None:
        """Webhooks stored and answered per second at full speed, then the latency at a steady rate."""
        rate, steady = 1_000, 1_000 * self._plan.steady_seconds
        payments = await self._open_payments(self._plan.webhooks + steady, "stripe", "pending", "1 day")
        port = free_port()
        machine = self._bench.machine
        environment = {
            "PAYMENTS_HTTP_PORT": str(port),
            "PAYMENTS_GATEWAYS": '["stripe"]',
            "PAYMENTS_DEFAULT_GATEWAY": "stripe",
            "PAYMENTS_STRIPE_WEBHOOK_SECRETS": json.dumps([SECRET]),
        }
        machine.start("http", "app.cli", "http", **environment)
        requests = [_request(each, port) for each in payments]
        sender = Sender(port)
        await sender.connect()
        await sender.send(requests[:200])
        before, started, own = machine.cpu_seconds(), time.perf_counter(), time.process_time()
        await sender.send(requests[200 : self._plan.webhooks])
        seconds, count = time.perf_counter() - started, self._plan.webhooks - 200
        cpu = machine.cpu_seconds()["http"] - before["http"]
        taken = await sender.send_steadily(requests[self._plan.webhooks :], rate)
        self.results["webhooks"] = {
            "accepted_per_second": round(count / seconds),
            "cpu_us_each": round(cpu / count * 1e6),
            "sender_cpu_us_each": round((time.process_time() - own) / (count + steady) * 1e6),
            "rate": rate,
            "p50_ms": round(percentile(taken, 0.5) * 1000, 1),
            "p99_ms": round(percentile(taken, 0.99) * 1000, 1),
            "rss_mb": round(machine.rss_mb("http")),
        }
        sender.close()
        machine.stop("http")
        await self._forget()
        console.print("webhooks", self.results["webhooks"])

    # --- reconciliation ---------------------------------------------------------------------------------------------

    async def _reconciliation(self) -> None:
        """Query and end pending operations that are due: first at full speed, then within a provider's rate limit."""
        fast = await self._reconcile(concurrency=8_000, per_second=1_000_000)
        limited = await self._reconcile(concurrency=LIMIT_AT_ONCE, per_second=LIMIT_PER_SECOND)
        self.results["reconciliation"] = fast | {"within_a_limit": limited}
        console.print("reconciliation", self.results["reconciliation"])

    async def _reconcile(self, *, concurrency: int, per_second: int) -> dict[str, Any]:
        count, machine = self._plan.stuck_operations, self._bench.machine
        await self._open_payments(count, "instant", "pending", "-1 second")
        load = await self._bench.load()
        started = time.perf_counter()
        await self._bench.start_service(
            PAYMENTS_INSTANT_GATEWAY_LATENCY_MS=str(PROVIDER_MS),
            PAYMENTS_GATEWAY_CONCURRENCY=json.dumps({"instant": concurrency}),
            PAYMENTS_GATEWAY_QUESTIONS_PER_SECOND=json.dumps({"instant": per_second}),
        )
        async with self._memory.watch("worker", "relay"):
            ended = await load.count_results(count, stall_seconds=30)
        names = ("most_at_once", "most_in_a_second")
        seen = {name: round(await self._bench.worker_metric(f"payments_instant_gateway_{name}")) for name in names}
        await load.stop()
        machine.stop()
        await self._forget()
        return {
            "operations": count,
            "provider_ms": PROVIDER_MS,
            "operations_per_second": round(count / (ended - started)),
            "limit_at_once": concurrency,
            "limit_per_second": per_second,
        } | seen

    async def _finder(self) -> None:
        """The queries that find stuck operations and holds among many payments."""
        self.results["finder"] = await time_finders(
            self._bench.postgres_url, f"finder_{uuid4().hex[:8]}", self._plan.stored_payments
        )
        console.print("finder", self.results["finder"])

    # --- payments ---------------------------------------------------------------------------------------------------

    async def _payments(self) -> None:
        """Charges through each gateway over HTTP until they are captured. The simulators run in their own process.

        Stripe's charges use the official SDK and need no payer. At the others the payer approves at once, and the
        provider reports that by webhook. VNPay's charge is only a signed URL, so it sends no request.
        """
        machine, http = self._bench.machine, f"http://127.0.0.1:{free_port()}"
        simulator = f"http://127.0.0.1:{self._bench.sandbox_port}"
        environment = simulated(simulator, http) | {
            "PAYMENTS_DEFAULT_GATEWAY": "stripe",
            "PAYMENTS_HTTP_PORT": http.rpartition(":")[2],
            "PAYMENTS_GATEWAY_CONCURRENCY_DEFAULT": str(CONCURRENCY),
        }
        to = ("--port", str(self._bench.sandbox_port), "--webhooks-to", f"{http}/webhooks")
        machine.start("sandbox", "app.cli", "sandbox", *to, **environment)
        machine.start("http", "app.cli", "http", **environment)
        await self._bench.set_sandbox_latency(PROVIDER_MS)
        await self._bench.start_service(**environment)
        self.results["payments"] = []
        for gateway, currency in CURRENCIES.items():
            self.results["payments"].append(await self._payments_through(gateway, currency, simulator))
            console.print("payments", self.results["payments"][-1])
        machine.stop()

    async def _payments_through(self, gateway: str, currency: str, simulator: str) -> dict[str, Any]:
        machine, count = self._bench.machine, self._plan.payments
        messages = make_charges(count, self._bench.partitions, gateway=gateway, currency=currency)
        load = await self._bench.load()
        async with payers(simulator) as consent, self._memory.watch("worker", "relay", "http", "sandbox"):
            before, started = machine.cpu_seconds(), time.perf_counter()
            await load.send_all(messages)
            ended = await load.count_captures(count, on_action=consent)
        after = machine.cpu_seconds()
        await load.stop()
        return {
            "gateway": gateway,
            "provider_ms": PROVIDER_MS,
            "payments_per_second": round(count / (ended - started)),
            "worker_cpu_us_each": round((after["worker"] - before["worker"]) / count * 1e6),
            "http_cpu_us_each": round((after["http"] - before["http"]) / count * 1e6),
            "simulator_cpu_us_each": round((after["sandbox"] - before["sandbox"]) / count * 1e6),
            "worker_rss_mb": round(machine.rss_mb("worker")),
        }

    # --- rows -------------------------------------------------------------------------------------------------------

    async def _open_payments(self, count: int, gateway: str, state: str, due_in: str) -> list[UUID]:
        payments = [uuid4() for _ in range(count)]
        connection = await asyncpg.connect(self._bench.postgres_url)
        for start in range(0, count, 20_000):
            portion = payments[start : start + 20_000]
            statement = OPEN_PAYMENTS.replace("$4::interval", f"interval '{due_in}'").replace("$5", "$4")
            await connection.execute(statement, portion, gateway, state, CONTENT)
        await connection.execute("VACUUM ANALYZE payments, operations")
        await connection.close()
        return payments

    async def _forget(self) -> None:
        connection = await asyncpg.connect(self._bench.postgres_url)
        await connection.execute("TRUNCATE inbox")
        await connection.execute("DELETE FROM operations; DELETE FROM payments")
        await connection.execute("VACUUM payments, operations")
        await connection.close()


@contextlib.asynccontextmanager
async def payers(simulator: str) -> AsyncIterator[Callable[[bytes], None]]:
    """Payers who approve at once; yields the function that hands them an event."""
    loop, waiting = asyncio.get_running_loop(), asyncio.Queue[Any]()
    client = httpx.AsyncClient(transport=SmallPools(PAYERS), timeout=30, trust_env=False)

    async def consent() -> None:
        while True:
            event = json.loads(await waiting.get())
            url = httpx.URL(event["action"]["url"])
            if event["payment"]["gateway"] == "paypal":
                where = httpx.URL(f"{simulator}/_sandbox/paypal/orders/{url.params['token']}/approve")
            else:
                where = url.copy_add_param("success", "true")
            (await client.post(where)).raise_for_status()

    def hear(value: bytes) -> None:
        loop.call_soon_threadsafe(waiting.put_nowait, value)

    tasks = [asyncio.create_task(consent()) for _ in range(PAYERS)]
    yield hear
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await client.aclose()


def _request(payment_id: UUID, port: int) -> bytes:
    intent = {
        "id": f"pi_{payment_id}",
        "object": "payment_intent",
        "amount": 1000,
        "amount_received": 1000,
        "amount_capturable": 0,
        "capture_method": "automatic",
        "currency": "usd",
        "status": "succeeded",
        "metadata": {"payment_id": str(payment_id), "operation_number": "1"},
    }
    event = {"id": f"evt_{payment_id}", "object": "event", "type": "payment_intent.succeeded"}
    body = json.dumps(event | {"data": {"object": intent}})
    signature = stripe.WebhookSignature.generate_signature_header(body, SECRET, timestamp=int(time.time()))
    head = (
        f"POST /webhooks/stripe HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nStripe-Signature: {signature}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return (head + body).encode()


class Sender:
    """Plain HTTP/1.1 over kept connections: a client library would cost more than the server that is measured."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._connections: asyncio.Queue[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = asyncio.Queue()

    async def connect(self, timeout_seconds: float = 30) -> None:
        """Open the connections, once the server is there and takes webhooks."""
        async with asyncio.timeout(timeout_seconds):
            while self._connections.empty():
                try:
                    reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
                    writer.write(b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n")
                    await _answer(reader)
                    self._connections.put_nowait((reader, writer))
                except OSError:
                    await asyncio.sleep(0.1)
        await asyncio.sleep(1.0)  # Until the server has connected to Postgres.
        for _ in range(CONNECTIONS - 1):
            self._connections.put_nowait(await asyncio.open_connection("127.0.0.1", self._port))

    async def send(self, requests: list[bytes]) -> None:
        """Send all requests, one at a time on each connection."""
        waiting = iter(requests)

        async def work() -> None:
            for request in waiting:
                await self._exchange(request)

        await asyncio.gather(*(work() for _ in range(CONNECTIONS)))

    async def send_steadily(self, requests: list[bytes], rate: int) -> list[float]:
        """Send at `rate` per second; sorted seconds from the time at which each request was due to its answer."""
        started = time.perf_counter()
        tasks = []
        for number, request in enumerate(requests):
            due = started + number / rate
            if due > time.perf_counter():
                await asyncio.sleep(due - time.perf_counter())
            tasks.append(asyncio.create_task(self._timed(request, due)))
        return sorted(await asyncio.gather(*tasks))

    async def _timed(self, request: bytes, due: float) -> float:
        await self._exchange(request)
        return time.perf_counter() - due

    async def _exchange(self, request: bytes) -> None:
        reader, writer = await self._connections.get()
        writer.write(request)
        status = await _answer(reader)
        assert status == 200, f"a webhook was answered with {status}"
        self._connections.put_nowait((reader, writer))

    def close(self) -> None:
        while not self._connections.empty():
            self._connections.get_nowait()[1].close()


async def _answer(reader: asyncio.StreamReader) -> int:
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    length = head.split(b"content-length: ")[1].split(b"\r\n")[0]
    await reader.readexactly(int(length))
    return int(head[9:12])
