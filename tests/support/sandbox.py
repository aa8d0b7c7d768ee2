"""The providers' simulators in a process of their own, started as `payments sandbox` does."""

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from infra.local.server import free_port

CHECKOUT = Path(__file__).parents[2]


def wait_until_open(port: int, process: subprocess.Popen[bytes], timeout_seconds: float = 20) -> None:
    """Until this process, or one of its own, listens on the port."""
    deadline = time.monotonic() + timeout_seconds
    while time.monotonic() < deadline:
        assert process.poll() is None, "the server ended at once"
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise AssertionError(f"nothing listens on port {port}")


def start_sandbox(port: int, state_file: Path | None = None) -> subprocess.Popen[bytes]:
    """All simulators behind one port, ready; with a state file they continue where they stopped."""
    kept = [] if state_file is None else ["--state-file", str(state_file)]
    command = [sys.executable, "-m", "app.cli", "sandbox", "--port", str(port), *kept]
    process = subprocess.Popen(command, cwd=CHECKOUT)
    wait_until_open(port, process)
    return process


@contextmanager
def running_sandbox() -> Iterator[str]:
    """The address of the simulators, until the block ends."""
    port = free_port()
    process = start_sandbox(port)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(10)
