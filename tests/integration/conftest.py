"""Fixtures of more than one module: a relay of a test's own, and a worker's settings."""

from collections.abc import Iterator
from typing import Any
from uuid import uuid4

import pytest

from app.settings import Settings
from infra.kafka.access import KafkaAccess
from infra.local.postgres import drop_database
from infra.relay import RelayConfig
from tests.conftest import Topics
from tests.support.relay_source import reading


@pytest.fixture(params=["wal", "poll"])
def source(request: pytest.FixtureRequest) -> Any:
    """Every test runs with both sources, except the tests about the slot."""
    return request.param


@pytest.fixture
def config(postgres_url: str, kafka_bootstrap: str, topics: Topics, source: Any) -> Iterator[RelayConfig]:
    """The configuration of this test's own relay; its slot ends with the test."""
    yield RelayConfig(
        postgres_url=postgres_url,
        kafka=KafkaAccess(kafka_bootstrap),
        topic=topics.events,
        slot=f"test_{uuid4().hex[:12]}",
        **reading(source),
        feedback_seconds=0.1,
        standby_seconds=0.1,
    )
    drop_database(postgres_url)


@pytest.fixture
def settings(postgres_url: str, kafka_bootstrap: str, redis_url: str, topics: Topics) -> Settings:
    return Settings(
        postgres_url=postgres_url,
        kafka_bootstrap=kafka_bootstrap,
        redis_url=redis_url,
        commands_topic=topics.commands,
        events_topic=topics.events,
        dead_letter_topic=topics.dlq,
        consumer_group=topics.commands,
        gateways=["instant"],
        default_gateway="instant",
        lease_seconds=2,
        retry_first_delay_seconds=0.2,
        sweep_interval_seconds=0.2,
    )
