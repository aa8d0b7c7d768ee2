"""Whether topics exist; creates those that the service speaks on, where they are missing."""

from collections.abc import Mapping

from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.errors import TopicAlreadyExistsError, for_code


async def ensure_topics(bootstrap: str, partitions: Mapping[str, int], *, replication_factor: int = 1) -> None:
    """Create each missing topic with its number of partitions; existing topics stay as they are.

    Raises:
        KafkaError: the broker cannot be reached or refuses.
    """
    admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap)
    await admin.start()
    try:
        missing = set(partitions) - set(await admin.list_topics())
        topics = [NewTopic(name, partitions[name], replication_factor) for name in sorted(missing)]
        if topics:
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


def _check(response: object) -> None:
    for error in getattr(response, "topic_errors", ()):
        kind = for_code(error[1])
        if error[1] and kind is not TopicAlreadyExistsError:
            raise kind(f"topic {error[0]} was not created")
