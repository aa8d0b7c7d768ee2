"""Checks whether topics exist, and creates the service's topics where they are missing."""

from collections.abc import Collection, Mapping
from typing import Final

import structlog
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.errors import TopicAlreadyExistsError, for_code

from infra.kafka.access import KafkaAccess

log = structlog.get_logger(__name__)

COPIES: Final = 3
"""If a broker's disk is lost two remain, and whatever is acknowledged from then on is on both."""
KEPT: Final = {"retention.ms": "-1", "retention.bytes": "-1"}
"""Without this the broker's default holds, which is a week."""
BY_BROKER: Final = {"message.timestamp.type": "LogAppendTime"}
"""A letter parked later then has a later time, even if a worker's clock is off."""


async def ensure_topics(kafka: KafkaAccess, partitions: Mapping[str, int], *, kept: Collection[str] = ()) -> None:
    """Create each missing topic with its number of partitions; existing topics stay as they are.

    With three or more brokers, each partition has three copies, and whatever Kafka acknowledges is on at least two.
    Messages of the topics in `kept` stay until somebody deletes them; an existing topic with limits is logged.

    Raises:
        KafkaError: the broker cannot be reached or refuses.
    """
    admin = AIOKafkaAdminClient(**kafka.client_arguments())
    await admin.start()
    try:
        missing = set(partitions) - set(await admin.list_topics())
        if missing:
            brokers = len((await admin.describe_cluster())["brokers"])
            topics = [_new_topic(name, partitions[name], brokers, is_kept=name in kept) for name in sorted(missing)]
            _check(await admin.create_topics(topics))
        for name in set(kept) - missing:
            await _tell_of_limits(admin, name)
    finally:
        await admin.close()


async def has_topic(kafka: KafkaAccess, name: str) -> bool:
    """Whether the topic exists; asking does not create it.

    Raises:
        KafkaError: the broker cannot be reached.
    """
    admin = AIOKafkaAdminClient(**kafka.client_arguments())
    await admin.start()
    try:
        return name in await admin.list_topics()
    finally:
        await admin.close()


async def _tell_of_limits(admin: AIOKafkaAdminClient, topic: str) -> None:
    asked = ConfigResource(ConfigResourceType.TOPIC, topic, dict.fromkeys(KEPT))
    (answer,) = await admin.describe_configs([asked])
    # Without the permission to ask, the answer has no settings.
    limits = {name: value for *_, settings in answer.resources for name, value, *_ in settings if value != KEPT[name]}
    if limits:
        log.warning("this topic loses its messages: see docs/operations/dead-letters.md", topic=topic, limits=limits)


def _new_topic(name: str, partitions: int, brokers: int, *, is_kept: bool) -> NewTopic:
    copies = min(COPIES, brokers)
    safe = {"min.insync.replicas": str(COPIES - 1)} if copies == COPIES else {}
    return NewTopic(name, partitions, copies, topic_configs=safe | (KEPT | BY_BROKER if is_kept else {}))


def _check(response: object) -> None:
    for error in getattr(response, "topic_errors", ()):
        kind = for_code(error[1])
        if error[1] and kind is not TopicAlreadyExistsError:
            raise kind(f"topic {error[0]} was not created")
