"""`make bench`: throughput, latency, memory and CPU of the whole service on this one machine, beside a naive one.

Everything is real: Kafka, Postgres with `fsync` and `synchronous_commit` on, Valkey, worker, relay, load generator.
Results go to `.bench/results.json`; `--quick` ends within a minute.
"""

import argparse
import asyncio
import json
import sys
from typing import Any

from rich.table import Table

from benchmarks import gateways
from benchmarks.relay import RelayBench, RelayPlan
from benchmarks.service import FULL, QUICK, ROOT, Bench, console, run
from infra.local import LocalStack

RELAY_SOURCES = ("wal", "poll", "debezium")
RELAY_QUICK = RelayPlan(drain_rows=10_000, latency_seconds=3)
RELAY_FULL = RelayPlan(drain_rows=500_000, latency_seconds=20, stored_rows=10_000_000)


async def run_gateways(stack: LocalStack, plan: gateways.GatewayPlan) -> dict[str, Any]:
    """Webhooks, reconciliation, and payments through a gateway over HTTP."""
    bench = Bench(stack, QUICK)
    await bench.prepare()
    try:
        return await gateways.GatewayBench(bench, plan).run()
    finally:
        bench.machine.stop()
        bench.erase()


def report_gateways(table: Table, results: dict[str, Any]) -> None:
    """Webhooks, reconciliation, finding what is stuck, memory, payments."""
    for name in ("webhooks", "reconciliation", "finder", "memory"):
        table.add_row(name, " · ".join(f"{key} {value}" for key, value in results[name].items()))
    for row in results["payments"]:
        table.add_row(f"payments through {row['gateway']}", " · ".join(f"{key} {value}" for key, value in row.items()))


def report(results: dict[str, Any]) -> None:
    """The table that a person reads."""
    table = Table("measurement", "result", title="payments benchmark")
    if "throughput" in results:
        report_service(table, results)
    if "relay" in results:
        report_relay(table, results["relay"])
    if "gateways" in results:
        report_gateways(table, results["gateways"])
    console.print(table)


def report_relay(table: Table, results: dict[str, Any]) -> None:
    """Drain, latency and restart of each source."""
    for row in results["drain"]:
        figures = f"{row['rows_per_second']:,} rows/s · {row['cpu_us_per_row']} µs CPU a row · {row['rss_mb']} MB"
        table.add_row(f"relay drain, {row['source']}, {row['rows_per_transaction']} a transaction", figures)
    for row in results["latency"]:
        table.add_row(f"relay at {row['rate']:,}/s, {row['source']}", f"p50 {row['p50_ms']} · p99 {row['p99_ms']} ms")
    table.add_row("relay restart to first event", f"{results['restart_s']} s")
    for row in results.get("with_stored_rows", []):
        told = f"{row['rows_per_second']:,} rows/s · p50 {row['p50_ms']} · p99 {row['p99_ms']} ms"
        table.add_row(f"relay, {row['source']}, {row['stored_rows']:,} rows stored", told)


def report_service(table: Table, results: dict[str, Any]) -> None:
    """Throughput, latency, memory and CPU of the whole service."""
    ratio = results["throughput"][0]["commands_per_second"] / results["naive"]["commands_per_second"]
    for row in results["throughput"]:
        table.add_row(f"throughput, gateway {row['gateway_ms']} ms", f"{row['commands_per_second']:,} commands/s")
    table.add_row("naive service", f"{results['naive']['commands_per_second']:,} commands/s ({ratio:.0f}x)")
    for row in results["latency"]:
        figures = f"p50 {row['p50_ms']} · p95 {row['p95_ms']} · p99 {row['p99_ms']} ms"
        table.add_row(f"latency at {row['rate']:,}/s", figures)
    table.add_row("Stripe SDK over HTTP", f"{results['stripe_http']['commands_per_second']:,} commands/s")
    table.add_row("memory", str(results["memory"]))
    table.add_row("CPU seconds per 1,000 commands", str(results["cpu"]))
    if "full_tables" in results:
        table.add_row("with full tables", str(results["full_tables"]))


def main() -> int:
    """Run, print, and write `.bench/results.json`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small loads: ends within a minute")
    parser.add_argument(
        "--only", choices=("service", "relay", "gateways"), help="one part; the others' last results are kept"
    )
    arguments = parser.parse_args()
    target = ROOT / ".bench" / "results.json"
    target.parent.mkdir(exist_ok=True)
    results = json.loads(target.read_text()) if arguments.only and target.exists() else {}
    with LocalStack(ROOT / ".local" / "bench", on_progress=console.print) as stack:
        if arguments.only in (None, "service"):
            results |= asyncio.run(run(stack, QUICK if arguments.quick else FULL))
        if arguments.only == "relay" or (arguments.only is None and not arguments.quick):
            # Not in the quick run: the service alone takes its minute, and this starts three publishers, one a JVM.
            bench = RelayBench(stack, RELAY_QUICK if arguments.quick else RELAY_FULL, ROOT)
            results["relay"] = asyncio.run(bench.run(RELAY_SOURCES))
        if arguments.only in (None, "gateways"):
            plan = gateways.QUICK if arguments.quick else gateways.FULL
            results["gateways"] = asyncio.run(run_gateways(stack, plan))
    report(results)
    target.write_text(json.dumps(results, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
