"""What docker compose starts and stops agrees with what the processes need for it."""

from pathlib import Path
from typing import Any

import yaml

from app.worker import DRAIN_SECONDS, LEAVES_WITHIN

COMPOSE = Path(__file__).resolve().parents[2] / "docker-compose.yml"
SERVICES: dict[str, dict[str, Any]] = yaml.safe_load(COMPOSE.read_text(encoding="utf-8"))["services"]


def test_migrations_wait_for_both_servers_that_they_prepare() -> None:
    waits_for = SERVICES["migrate"]["depends_on"]
    assert waits_for == {name: {"condition": "service_healthy"} for name in ("postgres", "kafka")}


def test_a_worker_is_not_killed_before_it_has_saved_what_was_under_way() -> None:
    granted = float(SERVICES["worker"].get("stop_grace_period", "10s").removesuffix("s"))
    # It takes nothing new, leaves Kafka, lets its calls end, saves what they answered, and leaves Postgres.
    assert granted > 3 * LEAVES_WITHIN + 2 * DRAIN_SECONDS
