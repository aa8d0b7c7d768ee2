"""Fixtures that run the service's processes on the test's servers."""

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import pytest

from infra.kafka.access import KafkaAccess
from infra.kafka.topics import ensure_topics
from infra.local import EmbeddedKafka, EmbeddedPostgres
from infra.local.postgres import drop_database
from tests.support.processes import Processes


@dataclass(frozen=True)
class Service:
    """The service's processes, servers and topics."""

    processes: Processes
    postgres_url: str
    kafka_bootstrap: str
    commands: str
    events: str
    dead_letters: str


def _service(postgres_url: str, kafka_bootstrap: str, redis_url: str, log_dir: Path) -> Service:
    run = uuid4().hex[:8]
    topics = [f"fault.{run}.{name}" for name in ("commands", "events", "dlq")]
    asyncio.run(ensure_topics(KafkaAccess(kafka_bootstrap), dict.fromkeys(topics, 8)))
    environment = {
        "PAYMENTS_POSTGRES_URL": postgres_url,
        "PAYMENTS_KAFKA_BOOTSTRAP": kafka_bootstrap,
        "PAYMENTS_REDIS_URL": redis_url,
        "PAYMENTS_COMMANDS_TOPIC": topics[0],
        "PAYMENTS_EVENTS_TOPIC": topics[1],
        "PAYMENTS_DEAD_LETTER_TOPIC": topics[2],
        "PAYMENTS_CONSUMER_GROUP": f"fault-{run}",
        "PAYMENTS_RELAY_SLOT": f"fault_{run}",
    }
    return Service(Processes(environment, log_dir), postgres_url, kafka_bootstrap, *topics)


@pytest.fixture
def service(postgres_url: str, kafka_bootstrap: str, redis_url: str, tmp_path: Path) -> Iterator[Service]:
    """The simulator and the relay are running; the test starts the worker."""
    service = _service(postgres_url, kafka_bootstrap, redis_url, tmp_path)
    try:
        service.processes.sandbox()
        service.processes.relay()
        yield service
    finally:
        service.processes.stop()
        drop_database(postgres_url)


@pytest.fixture
def own_service(
    own_postgres: EmbeddedPostgres, own_kafka: EmbeddedKafka, redis_url: str, tmp_path: Path
) -> Iterator[Service]:
    """Simulator, relay and worker, on a Postgres and a Kafka that the test may kill."""
    service = _service(own_postgres.url, own_kafka.bootstrap, redis_url, tmp_path)
    try:
        service.processes.sandbox()
        service.processes.relay()
        service.processes.worker()
        yield service
    finally:
        service.processes.stop()
