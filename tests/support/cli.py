"""Runs `payments` as a person does: in a process of its own, from the root of the repository."""

import os
import subprocess
import sys
from pathlib import Path

PAYMENTS = [sys.executable, "-m", "app.cli"]
ROOT = Path(__file__).resolve().parents[2]


def environment(data_dir: Path, **settings: str) -> dict[str, str]:
    # Wide enough that no text that a test looks for is wrapped.
    return os.environ | {"PAYMENTS_DATA_DIR": str(data_dir), "COLUMNS": "200"} | settings


def run(*arguments: str, data_dir: Path, **settings: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*PAYMENTS, *arguments],
        cwd=ROOT,
        env=environment(data_dir, **settings),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
