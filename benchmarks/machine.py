"""Starts the processes under measurement as in production, and reads their CPU seconds and memory from the system."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil

MIB = 1024 * 1024


class Machine:
    """Starts processes of the service by name, with their logs in one folder."""

    def __init__(self, log_dir: Path, environment: Mapping[str, str]) -> None:
        self._log_dir = log_dir
        # Bytecode is kept, as in an image; otherwise every start would compile the service again.
        self._environment = dict(os.environ) | {"PYTHONDONTWRITEBYTECODE": ""} | dict(environment)
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        log_dir.mkdir(parents=True, exist_ok=True)

    def start(self, name: str, module: str, *arguments: str, **environment: str) -> None:
        """Start `python -m module arguments`."""
        with (self._log_dir / f"{name}.log").open("wb") as output:
            self._running[name] = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                env=self._environment | environment,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def stop(self, *names: str) -> None:
        """End these processes (all, if none is named) and wait for them."""
        chosen = names or tuple(self._running)
        for name in chosen:
            self._running[name].send_signal(signal.SIGTERM)
        for name in chosen:
            process = self._running.pop(name)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def process(self, name: str) -> psutil.Process:
        """The process of this name."""
        return psutil.Process(self._running[name].pid)

    def check(self) -> None:
        """Raise if a process has ended by itself."""
        for name, process in self._running.items():
            if process.poll() is not None:
                tail = (self._log_dir / f"{name}.log").read_text(errors="replace")[-2000:]
                raise RuntimeError(f"{name} ended with {process.returncode}:\n{tail}")

    def cpu_seconds(self, **others: int) -> dict[str, float]:
        """CPU seconds so far by process name; `others` are further pids, each with its children."""
        pids = {name: process.pid for name, process in self._running.items()} | others
        return {name: _cpu_seconds(pid) for name, pid in pids.items()}

    def rss_mb(self, name: str) -> float:
        """Resident memory now, in MiB."""
        return float(psutil.Process(self._running[name].pid).memory_info().rss) / MIB


def _cpu_seconds(pid: int) -> float:
    parent = psutil.Process(pid)
    total = 0.0
    for process in [parent, *parent.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total += times.user + times.system
    # Postgres backends that have ended are counted in their parent's times.
    return total + parent.cpu_times().children_user + parent.cpu_times().children_system


@contextlib.contextmanager
def stopwatch() -> Iterator[list[float]]:
    """Seconds that the block took, in a list of one."""
    taken: list[float] = []
    started = time.perf_counter()
    yield taken
    taken.append(time.perf_counter() - started)
