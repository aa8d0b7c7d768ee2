"""A broker may create every topic that it is asked about (Kafka's default): none of our code creates one by asking."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

import aiokafka.client
import pytest
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.protocol.metadata import MetadataRequest
from faststream.kafka import KafkaBroker

from infra.kafka.access import KafkaAccess
from infra.kafka.topics import ensure_topics, has_topic
from infra.local import EmbeddedKafka
from infra.local.postgres import drop_database
from infra.relay import RelayConfig
from infra.relay.errors import TopicMissing
from infra.relay.publish.publisher import Publisher
from tests.conftest import PARTITIONS
from tests.support.outbox import assert_first_deliveries_in_order, commit, rows_of
from tests.support.relays import published, running
from tests.support.waiting import until

MISSING = "payments.mistyped"


class GenerousKafka(EmbeddedKafka):
    """Creates every topic that it is asked about."""

    def _settings(self) -> dict[str, str]:
        return super()._settings() | {"auto.create.topics.enable": "true"}


@pytest.fixture
def kafka(tmp_data_dir: Path) -> Iterator[KafkaAccess]:
    server = GenerousKafka(tmp_data_dir)
    try:
        server.start()
        yield server.access
    finally:
        server.erase()


@pytest.fixture
async def admin(kafka: KafkaAccess) -> AsyncIterator[AIOKafkaAdminClient]:
    client = AIOKafkaAdminClient(**kafka.client_arguments())
    await client.start()
    yield client
    await client.close()


@pytest.fixture
def config(postgres_url: str, kafka: KafkaAccess) -> Iterator[RelayConfig]:
    slot = f"test_{uuid4().hex[:12]}"
    yield RelayConfig(postgres_url=postgres_url, kafka=kafka, topic="payments.events", slot=slot, feedback_seconds=0.1)
    drop_database(postgres_url)


async def test_a_relay_waits_for_its_topic_and_makes_none_of_its_own(
    config: RelayConfig, admin: AIOKafkaAdminClient
) -> None:
    rows = rows_of("pay_a", 3)
    await commit(config.postgres_url, rows)
    async with running(config, "TopicMissing") as relay:
        assert not await has_topic(config.kafka, config.topic)
        await ensure_topics(config.kafka, {config.topic: PARTITIONS})
        assert_first_deliveries_in_order(await published(config, *rows), rows)
        await until(lambda: relay.health.detail == "active")


async def test_a_topic_that_is_deleted_under_a_relay_is_not_made_anew_by_it(
    config: RelayConfig, admin: AIOKafkaAdminClient
) -> None:
    before, after = rows_of("pay_a", 3), rows_of("pay_a", 3, first=4)
    await ensure_topics(config.kafka, {config.topic: PARTITIONS})
    async with running(config) as relay:
        await commit(config.postgres_url, before)
        await published(config, *before)
        await admin.delete_topics([config.topic])
        await commit(config.postgres_url, after)
        await until(lambda: "TopicMissing" in relay.health.detail, timeout_seconds=60)
        assert not await has_topic(config.kafka, config.topic)
        await ensure_topics(config.kafka, {config.topic: PARTITIONS})
        assert_first_deliveries_in_order(await published(config, *after), after)


async def test_a_worker_s_consumer_does_not_make_its_deleted_topic_anew(
    kafka: KafkaAccess, admin: AIOKafkaAdminClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    await ensure_topics(kafka, {"payments.commands": PARTITIONS})
    # The state of a process that has created no other client.
    monkeypatch.setitem(vars(aiokafka.client), "MetadataRequest", MetadataRequest)
    broker = KafkaBroker(kafka.bootstrap, security=kafka.broker_security(), metadata_max_age_ms=100)
    subscriber = broker.subscriber("payments.commands")

    @subscriber
    async def read(message: bytes) -> None:
        """No message arrives."""

    async with broker:
        await broker.start()
        await admin.delete_topics(["payments.commands"])
        await until(lambda: _has_none(admin))
        await asyncio.sleep(1)  # The subscriber has asked ten times since.
        assert await _has_none(admin)


async def _has_none(admin: AIOKafkaAdminClient) -> bool:
    return "payments.commands" not in await admin.list_topics()


async def test_a_publisher_to_a_missing_topic_says_so_without_flooding_the_log(
    config: RelayConfig, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(TopicMissing, match="there is no topic"):
        await Publisher.connect(replace(config, topic=MISSING), lambda: None)
    assert not await has_topic(config.kafka, MISSING)
    assert caplog.text.count("not found in cluster metadata") <= 10
