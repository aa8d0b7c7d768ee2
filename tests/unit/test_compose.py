"""What docker compose starts and stops agrees with what the processes need for it."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from app.loops import DRAIN_SECONDS, LEAVES_WITHIN
from app.settings import Settings
from infra.kafka.access import KafkaAccess
from infra.local.postgres import SETTINGS as POSTGRES_SETTINGS
from infra.relay import RelayConfig

ROOT = Path(__file__).resolve().parents[2]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
SERVERS = ("postgres", "kafka", "valkey")
PORTS = {name: Settings.model_fields[f"{name}_port"].default for name in ("worker", "relay", "http")}


def granted_seconds(service: str) -> float:
    return float(SERVICES[service].get("stop_grace_period", "10s").removesuffix("s"))


def test_migrations_wait_for_both_servers_that_they_prepare() -> None:
    waits_for = SERVICES["migrate"]["depends_on"]
    assert waits_for == {name: {"condition": "service_healthy"} for name in ("postgres", "kafka")}


def test_a_worker_is_not_killed_before_it_has_saved_what_was_under_way() -> None:
    # It takes nothing new, leaves Kafka, lets its calls end, saves what they answered, and leaves Postgres.
    assert granted_seconds("worker") > 3 * LEAVES_WITHIN + 2 * DRAIN_SECONDS


def test_a_forgotten_transaction_is_ended_so_that_its_payments_rows_do_not_stay_locked() -> None:
    ends_after = f"-cidle_in_transaction_session_timeout={POSTGRES_SETTINGS['idle_in_transaction_session_timeout']}"
    assert ends_after in SERVICES["postgres"]["command"]


def test_a_relay_is_not_killed_before_it_ends_by_itself() -> None:
    config = RelayConfig(postgres_url="", kafka=KafkaAccess(""), topic="")
    assert granted_seconds("relay") > config.end_seconds


@pytest.mark.parametrize("name", sorted(SERVICES.keys() - {"migrate"}))
def test_every_service_but_the_migration_is_restarted(name: str) -> None:
    assert SERVICES[name]["restart"] == "unless-stopped"


@pytest.mark.parametrize(("name", "port"), PORTS.items())
def test_a_process_is_asked_at_its_own_port_whether_it_lives(name: str, port: int) -> None:
    assert f":{port}/health/live" in SERVICES[name]["healthcheck"]["test"][-1]


def test_the_providers_books_last_as_long_as_ours() -> None:
    sandbox = SERVICES["sandbox"]
    file = next(each for each in sandbox["command"] if each.startswith("--state-file=")).partition("=")[2]
    volume, _, folder = sandbox["volumes"][0].partition(":")
    assert Path(file).parent == Path(folder)
    assert volume in COMPOSE["volumes"]
    assert f"--owner=payments {folder}" in DOCKERFILE, "who runs it may write nothing else"


@pytest.mark.parametrize("name", SERVERS)
def test_a_server_is_the_same_next_year(name: str) -> None:
    assert re.search(r":\d+\.\d+", SERVICES[name]["image"])
