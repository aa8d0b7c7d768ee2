"""One process of the service as a child of `payments up`: its log, its health, its exit."""

import asyncio
import os
import signal
import sys
import time
from pathlib import Path
from typing import Final

import httpx

from infra.local import guarded_exec

ROOT: Final = Path(__file__).resolve().parents[1]
LOG_BYTES_MAX: Final = 20_000_000
TAIL_BYTES: Final = 4_000
TAIL_LINES: Final = 12
PROBE_INTERVAL_SECONDS: Final = 0.05
READY_SECONDS: Final = 60.0
STOP_SECONDS: Final = 75.0
"""As long as a worker may take, 25 s for calls and as much to save them: killed earlier, it would leave calls to be
recovered."""


class ChildFailed(Exception):
    """A process did not start; the message says which and why, `log_tail` is the end of its log."""

    def __init__(self, name: str, reason: str, log_path: Path, log_tail: str) -> None:
        self.name, self.reason, self.log_path, self.log_tail = name, reason, log_path, log_tail
        super().__init__(f"{name} {reason}")


class Child:
    """`payments <arguments>` as a process with our environment; on Linux the kernel ends it when we die."""

    def __init__(self, name: str, arguments: list[str], *, health_url: str, log_dir: Path) -> None:
        self.name = name
        self.health_url = health_url
        self.log_path = log_dir / f"{name}.log"
        self.started_at = 0.0
        self.is_ready = False
        self._arguments = arguments
        self._process: asyncio.subprocess.Process | None = None
        self._log_start = 0

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None and self._process.returncode is None else None

    @property
    def age_seconds(self) -> float:
        return time.monotonic() - self.started_at

    async def start(self) -> None:
        """Start it, without waiting until it is ready. Call from the main thread: the child dies with its thread."""
        guard = [sys.executable, "-I", "-S", guarded_exec.__file__, str(os.getpid()), str(int(signal.SIGKILL)), "-"]
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        with self.log_path.open("ab") as log:
            if log.tell() > LOG_BYTES_MAX:
                log.truncate(0)
            self._log_start = log.seek(0, os.SEEK_END)
            # A session of its own: Ctrl-C then reaches only this process, which stops everything in order.
            self._process = await asyncio.create_subprocess_exec(
                *guard,
                *(sys.executable, "-m", "app.cli", *self._arguments),
                cwd=ROOT,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.started_at = time.monotonic()
        self.is_ready = False

    async def wait_until_ready(self, client: httpx.AsyncClient) -> float:
        """Wait until its health page says that it is ready. Returns the seconds since its start.

        Raises:
            ChildFailed: it ended, or is still not ready after `READY_SECONDS`.
        """
        answer = "no answer"
        while self.age_seconds < READY_SECONDS:
            if self.pid is None:
                raise self._failure(f"ended while starting ({self.ending()})")
            try:
                response = await client.get(self.health_url)
                if response.is_success:
                    self.is_ready = True
                    return self.age_seconds
                answer = response.text
            except httpx.HTTPError as error:
                answer = type(error).__name__
            await asyncio.sleep(PROBE_INTERVAL_SECONDS)
        raise self._failure(f"was not ready after {READY_SECONDS:.0f} s: {answer}")

    async def wait(self) -> None:
        """Return when it has ended."""
        assert self._process is not None, "started before"
        await self._process.wait()

    async def stop(self) -> bool:
        """Send SIGTERM, and SIGKILL if it does not end in time. Returns whether it ended by itself."""
        if self._process is None or self.pid is None:
            return True
        self._process.terminate()
        try:
            async with asyncio.timeout(STOP_SECONDS):
                return await self._process.wait() in (0, -signal.SIGTERM)
        except TimeoutError:
            self.kill()
            await self._process.wait()
            return False

    def kill(self) -> None:
        """End it with SIGKILL, as a crash would."""
        self.is_ready = False
        if self._process is not None and self.pid is not None:
            self._process.kill()

    def ending(self) -> str:
        """How it ended, in words."""
        code = self._process.returncode if self._process is not None else None
        if code is not None and code < 0:
            return signal.Signals(-code).name
        return f"exit code {code}"

    def _failure(self, reason: str) -> ChildFailed:
        return ChildFailed(self.name, reason, self.log_path, self._log_tail())

    def _log_tail(self) -> str:
        with self.log_path.open("rb") as log:
            end = log.seek(0, os.SEEK_END)
            log.seek(max(self._log_start, end - TAIL_BYTES))
            text = log.read().decode(errors="replace").strip()
        return "\n".join(text.splitlines()[-TAIL_LINES:])
