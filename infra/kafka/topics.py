"""Whether topics exist; creates those that the service speaks on, where they are missing."""

from collections.abc import Mapping
from typing import Final

from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.errors import TopicAlreadyExistsError, for_code

COPIES: Final = 3
"""With a broker's disk gone there are two, and what is acknowledged from then on is on both."""


async def ensure_topics(bootstrap: str, partitions: Mapping[str, int]) -> None:
    """Create each missing topic with its number of partitions; existing topics stay as they are.

    What Kafka acknowledges is on two brokers at least, where there are three: each partition has three copies then.

    Raises:
        KafkaError: the broker cannot be reached or refuses.
    """
    admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap)
    await admin.start()
    try:
        missing = set(partitions) - set(await admin.list_topics())
        if missing:
            brokers = len((await admin.describe_cluster())["brokers"])
            topics = [_new_topic(name, partitions[name], brokers) for name in sorted(missing)]
            _check(await admin.create_topics(topics))
    finally:
        await admin.close()


async def has_topic(bootstrap: str, name: str) -> bool:
    """Whether there is such a topic; to ask creates none.

    Raises:
        KafkaError: the broker cannot be reached.
    """
    admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap)
    await admin.start()
    try:
        return name in await admin.list_topics()
    finally:
        await admin.close()


def _new_topic(name: str, partitions: int, brokers: int) -> NewTopic:
    copies = min(COPIES, brokers)
    configs = {"min.insync.replicas": str(COPIES - 1)} if copies == COPIES else {}
    return NewTopic(name, partitions, copies, topic_configs=configs)


def _check(response: object) -> None:
    for error in getattr(response, "topic_errors", ()):
        kind = for_code(error[1])
        if error[1] and kind is not TopicAlreadyExistsError:
            raise kind(f"topic {error[0]} was not created")
