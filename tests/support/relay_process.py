"""Relays as processes, which tests can kill and freeze and whose memory they measure."""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from infra.relay import RelayConfig
from tests.support.outbox import fetch_value
from tests.support.waiting import until


@dataclass
class Peak:
    """The largest resident memory that was seen."""

    bytes: int = 0

    @property
    def mb(self) -> float:
        return self.bytes / 2**20


class RelayProcess:
    """One `python -m infra.relay`; its output goes to a file."""

    def __init__(self, config: RelayConfig, log_path: Path) -> None:
        self._config = config
        self._log_path = log_path
        with log_path.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "infra.relay"],
                env=os.environ | {"RELAY_CONFIG": json.dumps(asdict(config))},
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    @contextlib.asynccontextmanager
    async def peak_memory(self) -> AsyncIterator[Peak]:
        """Its largest memory during the block; a reading at the end would miss memory that was released by then."""
        peak, process = Peak(), psutil.Process(self.pid)

        async def look() -> None:
            while True:
                peak.bytes = max(peak.bytes, process.memory_info().rss)
                await asyncio.sleep(0.02)

        looking = asyncio.create_task(look())
        try:
            yield peak
        finally:
            looking.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await looking

    async def says(self, words: str) -> None:
        """Wait until its output contains these words."""

        def is_said() -> bool:
            output = self._log_path.read_text()
            assert self._process.poll() is None, f"it has ended:\n{output}"
            return words in output

        await until(is_said)

    async def stands_by(self) -> None:
        """Wait until it is standby."""
        await self.says("relay stands by")

    async def streams(self) -> None:
        """Wait until it is the active relay, which publishes."""
        await self.says("relay active")

    async def holds_the_slot(self) -> bool:
        """Whether any process streams from the slot."""
        query = "SELECT active FROM pg_replication_slots WHERE slot_name = %s"
        return bool(await fetch_value(self._config.postgres_url, query, self._config.slot))

    def freeze(self) -> None:
        """Suspend it: the process exists but does nothing."""
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def terminate(self) -> int:
        """Stop it cleanly; returns its exit status."""
        self._process.terminate()
        return self._process.wait(30)

    def kill(self) -> None:
        """Send SIGKILL, which is safe even if it has ended or is frozen."""
        self._process.kill()
        self._process.wait(10)
