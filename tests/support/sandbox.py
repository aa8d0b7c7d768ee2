"""The providers' simulators in a process of their own, started as `payments sandbox` does."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from infra.local.server import free_port

CHECKOUT = Path(__file__).parents[2]


def wait_until_open(port: int, process: subprocess.Popen[bytes], timeout_seconds: float = 20) -> None:
    """Wait until something listens on the port; fails if the process ends before that."""
    deadline = time.monotonic() + timeout_seconds
    while time.monotonic() < deadline:
        assert process.poll() is None, "the server ended at once"
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise AssertionError(f"nothing listens on port {port}")


def start_sandbox(
    port: int,
    state_file: Path | None = None,
    *,
    webhooks_to: str | None = None,
    environment: Mapping[str, str] | None = None,
) -> subprocess.Popen[bytes]:
    """All simulators behind one port, ready; with a state file they continue where they stopped.

    `environment` is added to this process's own; it has the secrets that sign the webhooks.
    """
    given = {"--state-file": state_file, "--webhooks-to": webhooks_to}
    options = [text for name, value in given.items() if value is not None for text in (name, str(value))]
    command = [sys.executable, "-m", "app.cli", "sandbox", "--port", str(port), *options]
    process = subprocess.Popen(command, cwd=CHECKOUT, env={**os.environ, **(environment or {})})
    wait_until_open(port, process)
    return process


@contextmanager
def running_sandbox(port: int | None = None, **more: Any) -> Iterator[str]:
    """The address of the simulators, until the block ends. `more` is as `start_sandbox` takes it."""
    port = port or free_port()
    process = start_sandbox(port, **more)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(10)
