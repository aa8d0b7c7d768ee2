"""Log records of libraries have the same format as our own."""

import json
import subprocess
import sys

LOUD = """
import logging
from app.worker import Worker
from infra.observability.logs import configure_logs

configure_logs("worker", as_json=True)
for name in ("faststream", "aiokafka.cluster", "uvicorn.error"):
    logging.getLogger(name).warning("no partition assignments")
logging.getLogger("asyncpg.pool").warning("Failed to restore the pool connection floor; retrying")  # told by us
"""


def test_a_process_writes_nothing_but_json_whichever_library_speaks() -> None:
    told = subprocess.run([sys.executable, "-c", LOUD], capture_output=True, text=True, check=True)
    assert [json.loads(line)["event"] for line in told.stderr.splitlines()] == ["no partition assignments"] * 3
    assert not told.stdout
