"""The service's real processes for fault tests: reached by their ports, killed by their pids."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from infra.local.server import free_port

QUICK = {
    "PAYMENTS_LEASE_SECONDS": "2",
    "PAYMENTS_RETRY_FIRST_DELAY_SECONDS": "0.2",
    "PAYMENTS_RETRY_DELAY_MAX_SECONDS": "1",
    "PAYMENTS_SWEEP_INTERVAL_SECONDS": "0.2",
    "PAYMENTS_STRIPE_API_KEY": "sk_test_faults",
    "PAYMENTS_STRIPE_RETURN_URL": "https://shop.invalid/return",
}


class Processes:
    """Worker, relay and simulator over given servers. Every process that was started is ended by `stop`."""

    def __init__(self, environment: Mapping[str, str], log_dir: Path) -> None:
        self._ports = {name: free_port() for name in ("worker", "relay", "sandbox")}
        self._log_dir = log_dir
        self._running: list[subprocess.Popen[bytes]] = []
        self.environment = dict(os.environ) | QUICK | dict(environment)
        self.environment["PAYMENTS_STRIPE_API_BASE"] = f"http://127.0.0.1:{self._ports['sandbox']}"

    def start(self, name: str, *arguments: str, **environment: str) -> subprocess.Popen[bytes]:
        """Start `python -m arguments`; its output goes to `<name>.log`."""
        with (self._log_dir / f"{name}.log").open("ab") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", *arguments],
                env=self.environment | environment,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        self._running.append(process)
        return process

    def sandbox(self) -> None:
        """Start the provider simulator and wait until it is ready."""
        self.start("sandbox", "app.cli", "sandbox", "--port", str(self._ports["sandbox"]))
        self._wait("sandbox", "/_sandbox/books")

    def worker(self, *, port: int | None = None) -> subprocess.Popen[bytes]:
        """Start a worker without waiting until it is ready."""
        return self.start("worker", "app.cli", "worker", PAYMENTS_WORKER_PORT=str(port or free_port()))

    def relay(self) -> subprocess.Popen[bytes]:
        """Start a relay without waiting until it is ready."""
        return self.start("relay", "app.cli", "relay", PAYMENTS_RELAY_PORT=str(free_port()))

    def running(self) -> list[subprocess.Popen[bytes]]:
        """The processes that have not ended, oldest first."""
        return [process for process in self._running if process.poll() is None]

    def books(self) -> dict[str, Any]:
        """The simulator's own books."""
        return dict(json.loads(self._get("sandbox", "/_sandbox/books")))

    def _wait(self, name: str, path: str, timeout_seconds: float = 30) -> None:
        deadline = time.monotonic() + timeout_seconds
        while True:
            try:
                self._get(name, path)
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
            else:
                return

    def _get(self, name: str, path: str) -> bytes:
        with urllib.request.urlopen(f"http://127.0.0.1:{self._ports[name]}{path}", timeout=2) as answer:
            content: bytes = answer.read()
            return content

    def stop(self) -> None:
        """Kill everything that still runs."""
        for process in self._running:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
        for process in self._running:
            process.wait(10)
