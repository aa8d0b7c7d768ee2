"""The base of every embedded server: its process, port, log and pid file, and a reliable shutdown.

Guarantees
- `start` returns once the server has served a real request, not when its port opens.
- One owner per data folder: the owning process keeps the pid file locked from `start` to `stop`.
- A server outlives its owner only on systems without a parent-death signal (Linux has one). The signal is bound to the
  *thread* that started the child, so one thread that lives as long as this process starts all children. The next start
  over the same folder ends a server that was left over nevertheless, as its pid file shows.
- Only processes that we started are ever signalled: a pid counts as ours only together with its start time.
"""

import contextlib
import fcntl
import itertools
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import IO, ClassVar, Self

import psutil

from infra.local import guarded_exec

HOST = "127.0.0.1"
# Below every system's range for outgoing connections. Inside it, a client that keeps dialling a stopped server's port
# would some time get that same port as its own and connect to itself; then the server could not start again.
PORTS = range(20_000, 30_000)
PORTS_LOOKED_AT_MAX = 200
PORT_ATTEMPTS_MAX = 5
PROBE_INTERVAL_SECONDS = 0.02
LOG_TAIL_BYTES = 4_000
LOG_BYTES_MAX = 20_000_000

Progress = Callable[[str], None]


class LocalServerError(Exception):
    """An embedded server cannot run; the message says why, and what to do about it."""

    def __init__(self, server: str, reason: str, advice: str) -> None:
        self.server, self.reason, self.advice = server, reason, advice
        super().__init__(f"{server}: {reason}\n  What to do: {advice}")


class NotReady(Exception):
    """Raised by a probe: the server is alive, but not serving yet."""


def silent(message: str) -> None:
    """A progress callback that ignores messages."""


@cache
def _launcher(_pid: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix="local-server-launcher")


def is_free(port: int) -> bool:
    """Whether nothing listens on this loopback port now; connections that just ended do not count."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with contextlib.suppress(OSError):
            probe.bind((HOST, port))
            return True
    return False


# Each port comes once per cycle, so two calls before a server listens return different ports.
_ports = itertools.cycle(random.SystemRandom().sample(PORTS, k=len(PORTS)))


def free_port() -> int:
    """A loopback port that nothing listens on now, and that was not returned recently."""
    for port in itertools.islice(_ports, PORTS_LOOKED_AT_MAX):
        if is_free(port):
            return port
    raise LocalServerError("network", f"no free port found in {PORTS}", "end other servers on this machine")


class EmbeddedServer(ABC):
    """A real server as a child process, with its data in `data_dir/<name>/`.

    Usable as a context manager. Not thread-safe, but any one thread may call it. Calls block, so asynchronous code uses
    `asyncio.to_thread`.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    stop_signal: ClassVar[signal.Signals] = signal.SIGTERM
    death_signal: ClassVar[signal.Signals] = signal.SIGKILL
    start_timeout_seconds: ClassVar[float] = 60.0
    stop_timeout_seconds: float = 15.0

    def __init__(self, data_dir: Path, port: int | None = None, *, on_progress: Progress = silent) -> None:
        self.data_dir = data_dir.resolve()
        self.log_path = self.data_dir / f"{self.name}.log"
        self.pid_path = self.data_dir / f"{self.name}.pid"
        self._port = port
        self._progress = on_progress
        self._process: subprocess.Popen[bytes] | None = None
        self._claim: IO[str] | None = None
        self._log_start = 0

    # For each server to implement.

    @abstractmethod
    def _prepare(self) -> None:
        """Prepare the data folder for a start; fast if it is already prepared."""

    @abstractmethod
    def _command(self) -> list[str]:
        """The program and its arguments, for `self.port`."""

    @abstractmethod
    def _probe(self) -> None:
        """Send one real request. Raises NotReady while the server is not serving yet."""

    def _account_name(self) -> str | None:
        """The account to run as; None keeps ours."""
        return None

    def _environment(self) -> dict[str, str] | None:
        """The environment variables to run with; None keeps ours."""
        return None

    # For callers.

    @property
    def port(self) -> int:
        """The port; it stays the same from the first start."""
        assert self._port is not None, "the port is chosen by start()"
        return self._port

    @property
    def pid(self) -> int:
        """The server's process id while it runs."""
        assert self._process is not None, "not running"
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start, and wait until it serves; does nothing if it runs. Keeps data; ends a leftover server.

        Raises:
            LocalServerError: it cannot run here, its data folder is in use, or it was not ready in time.
        """
        if self.running:
            return
        self._progress(f"starting {self.title} …")
        self._acquire_claim()
        try:
            self._end_leftover()
            self._prepare()
            self._launch()
        except BaseException:
            self.kill()
            raise

    def stop(self) -> None:
        """Shut down cleanly, or kill the server after `stop_timeout_seconds`; data is kept."""
        try:
            if self._process is not None and self.running:
                self._process.send_signal(self.stop_signal)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(self.stop_timeout_seconds)
        finally:
            self.kill()

    def kill(self) -> None:
        """Kill the server and all its children with SIGKILL, as in a crash; data is kept."""
        if self._process is not None:
            if self.running:
                _kill_tree(self._process.pid)
            self._process.wait()
            self._process = None
        self._release_claim()

    def restart(self) -> None:
        """Stop if it runs, then start on the same port and data; also after `kill`.

        Raises:
            LocalServerError: as `start` does.
        """
        self.stop()
        self.start()

    def erase(self) -> None:
        """Stop and delete the data; the next start begins from scratch."""
        self.stop()
        for path in self._data_paths():
            shutil.rmtree(path, ignore_errors=True)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    # Internals.

    def _data_paths(self) -> Iterator[Path]:
        yield self.data_dir / self.name

    def _launch(self) -> None:
        if self._port is not None:
            self._require_free(self._port)
            self._spawn()
            self._wait_until_ready()
            return
        for attempts_left in reversed(range(PORT_ATTEMPTS_MAX)):
            self._port = free_port()
            self._spawn()
            try:
                self._wait_until_ready()
                return
            except LocalServerError as error:
                # Another process may have taken the port between our check and the server's bind.
                if not (attempts_left and "ddress already in use" in error.reason):
                    raise

    def _require_free(self, port: int) -> None:
        """Check the port, because the probe of a server that cannot bind would be answered by the port's owner."""
        if not is_free(port):
            advice = "stop the program that listens there, or choose another port"
            raise LocalServerError(self.title, f"port {port} is in use", advice)

    def _spawn(self) -> None:
        command = [sys.executable, "-I", "-S", guarded_exec.__file__]
        command += [str(os.getpid()), str(int(self.death_signal)), self._account_name() or "-", *self._command()]
        with self._open_log() as log:
            start = _launcher(os.getpid()).submit(_popen, command, log, self._environment())
            self._process = start.result()
        self._record_pid(self._process.pid)

    def _open_log(self) -> IO[bytes]:
        log = self.log_path.open("ab")
        if log.tell() > LOG_BYTES_MAX:
            log.truncate(0)
        self._log_start = log.seek(0, os.SEEK_END)
        return log

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + self.start_timeout_seconds
        while time.monotonic() < deadline:
            with contextlib.suppress(NotReady):
                self._probe()
                return
            if not self.running:
                raise self._failure("it ended while starting")
            time.sleep(PROBE_INTERVAL_SECONDS)
        raise self._failure(f"it was not ready after {self.start_timeout_seconds:.0f} seconds")

    def _failure(self, reason: str) -> LocalServerError:
        return LocalServerError(
            self.title,
            f"{reason}; the end of its log:\n{self.log_tail()}",
            f"read {self.log_path}; if the data is damaged, delete {self.data_dir} and start again",
        )

    def log_tail(self) -> str:
        """The last lines of the log since the server was last started."""
        with self.log_path.open("rb") as log:
            end = log.seek(0, os.SEEK_END)
            log.seek(max(self._log_start, end - LOG_TAIL_BYTES))
            return log.read().decode(errors="replace").strip()

    def _acquire_claim(self) -> None:
        self.data_dir.mkdir(parents=True, exist_ok=True)
        claim = self.pid_path.open("a+")
        try:
            fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            claim.close()
            raise LocalServerError(
                self.title,
                f"another process is using {self.data_dir}",
                "stop that process (a demo or a test run, perhaps), or choose another data folder",
            ) from error
        self._claim = claim

    def _release_claim(self) -> None:
        if self._claim is not None:
            self._claim.truncate(0)
            self._claim.close()
            self._claim = None

    def _record_pid(self, pid: int) -> None:
        assert self._claim is not None, "only the owner of the data folder starts a server"
        self._claim.truncate(0)
        json.dump({"pid": pid, "started": psutil.Process(pid).create_time(), "port": self.port}, self._claim)
        self._claim.flush()

    def _end_leftover(self) -> None:
        """End a server whose owner has ended: we hold the claim, so it is one if the pid file still records it."""
        assert self._claim is not None
        self._claim.seek(0)
        with contextlib.suppress(ValueError, KeyError, psutil.NoSuchProcess):
            record = json.load(self._claim)
            if abs(psutil.Process(record["pid"]).create_time() - record["started"]) < 1:
                self._progress(f"ending a {self.title} that an earlier run left behind …")
                _kill_tree(record["pid"])


def run_quietly(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a short tool to its end; stderr joins stdout. Does not raise on a nonzero exit status."""
    return subprocess.run(  # noqa: S603 - our own programs
        command,
        cwd="/",
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


def _popen(command: list[str], log: IO[bytes], environment: dict[str, str] | None) -> subprocess.Popen[bytes]:
    # A session of its own, so that Ctrl-C reaches only us, and we can shut the server down cleanly.
    return subprocess.Popen(  # noqa: S603 - our own programs
        command, cwd="/", stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, env=environment
    )


def _kill_tree(pid: int) -> None:
    """Kill `pid` and its descendants, and wait for the descendants; suspending it first stops it from forking."""
    with contextlib.suppress(psutil.NoSuchProcess):
        root = psutil.Process(pid)
        root.suspend()
        family = [root, *root.children(recursive=True)]
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        psutil.wait_procs(family[1:], timeout=5)
