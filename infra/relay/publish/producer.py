"""A relay's producers: started, held to one Kafka cluster, and closed without waiting for anything."""

import asyncio
import contextlib
import random
import time
from typing import Any, Final
from weakref import WeakSet

from aiokafka import AIOKafkaProducer
from aiokafka.client import AIOKafkaClient
from aiokafka.conn import AIOKafkaConnection
from aiokafka.errors import KafkaConnectionError, KafkaError, TopicAuthorizationFailedError
from aiokafka.protocol.metadata import MetadataRequest

from infra.relay.config import RelayConfig
from infra.relay.errors import KafkaAway, TopicMissing

REQUEST_SECONDS: Final = 15.0
"""How long a broker may take to answer."""
TOPIC_SECONDS: Final = 5.0
"""How long a new topic may take until the broker knows it."""
TOPIC_LOOK_SECONDS: Final = 1.0
CLUSTER_SECONDS: Final = 3.0
"""How long one broker may take to report its cluster before the next one is asked."""
CLOSE_SECONDS: Final = 1.0
"""How long a connection may take to close."""


class OneCluster:
    """Restricts clients to the brokers of one cluster: that of the first broker, whose cluster id it learns.

    A session outlives the connections to its brokers. After a reconnect they may be another Kafka: through a wrong DNS
    entry, or because the data were lost. aiokafka would go on sending, and mistake the new cluster's acknowledgements
    for the old one's. So every connection is checked before it is used.
    """

    def __init__(self) -> None:
        self.id: str | None = None
        """None from brokers before Kafka 0.10.1, which do not report one."""
        self._other: str | None = None
        self._asked: WeakSet[AIOKafkaConnection] = WeakSet()

    def check(self) -> None:
        """Raise KafkaAway once a broker of another cluster was met; nothing was sent to it."""
        if self._other is not None:
            raise KafkaAway(f"a broker is of Kafka cluster {self._other}, and those before were of {self.id}")

    def hold(self, client: AIOKafkaClient) -> None:
        """Keep this client from using connections to another cluster."""
        get_connection = client._get_conn

        async def get_own(*arguments: Any, **options: Any) -> AIOKafkaConnection | None:
            connection = await get_connection(*arguments, **options)
            if connection is None or connection in self._asked or await self._is_own(connection):
                return connection
            connection.close()
            return None  # As for a broker that cannot be reached.

        vars(client)["_get_conn"] = get_own

    async def learn(self, client: AIOKafkaClient) -> None:
        """Learn the cluster's id from whichever broker answers first.

        Raises:
            KafkaConnectionError: no broker answers.
        """
        brokers = list(client.cluster.brokers())
        random.shuffle(brokers)
        for broker in brokers:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(CLUSTER_SECONDS):
                    if await client.ready(broker.nodeId):
                        return
        raise KafkaConnectionError("no broker answers")

    async def _is_own(self, connection: AIOKafkaConnection) -> bool:
        try:
            cluster_id = getattr(await connection.send(MetadataRequest([])), "cluster_id", None)
        except (KafkaError, OSError, TimeoutError):
            return False
        self.id = self.id or cluster_id
        if cluster_id not in (None, self.id):
            self._other = cluster_id
            return False
        self._asked.add(connection)
        return True


async def start_producer(config: RelayConfig, cluster: OneCluster) -> tuple[AIOKafkaProducer, int]:
    """A started producer whose retries neither reorder nor repeat, and its topic's number of partitions.

    It gives up a batch on its own only if the partition has had no leader for `REQUEST_SECONDS`.

    Raises:
        KafkaError: the brokers cannot be reached, or this user may not see the topic.
        TopicMissing: the brokers do not know the topic.
        KafkaAway: no broker says how it is divided.
    """
    producer = AIOKafkaProducer(
        **config.kafka.client_arguments(),
        acks="all",
        enable_idempotence=True,
        request_timeout_ms=int(REQUEST_SECONDS * 1000),
    )
    cluster.hold(producer.client)
    try:
        await producer.start()
        return producer, await _count_partitions(producer.client, config.topic)
    except BaseException:
        await abandon(producer)
        raise


async def _count_partitions(client: AIOKafkaClient, topic: str) -> int:
    """Asks once a second; aiokafka's own `partitions_for` asks ten times, and logs an error each time."""
    since = time.monotonic()
    client.add_topic(topic)
    while True:
        is_answered = await client.force_metadata_update()
        if partitions := client.cluster.partitions_for_topic(topic):
            return len(partitions)
        if topic in client.cluster.unauthorized_topics:
            raise TopicAuthorizationFailedError(topic)
        if time.monotonic() - since > TOPIC_SECONDS:
            raise _missing(topic) if is_answered else KafkaAway(f"no broker says how topic {topic} is divided")
        await asyncio.sleep(TOPIC_LOOK_SECONDS)


def _missing(topic: str) -> TopicMissing:
    return TopicMissing(
        f"there is no topic {topic}: create it (`payments migrate`), or set PAYMENTS_EVENTS_TOPIC to one"
    )


async def abandon(producer: AIOKafkaProducer) -> None:
    """Close a producer without waiting for unsent batches; its own `stop` waits for Kafka to come back."""
    producer._closed = True  # Avoids aiokafka's warning about a producer that was not stopped.
    sending = producer._sender.sender_task
    if sending is not None:
        sending.cancel()
    # Ends the requests in flight, on which a cancelled sender waits.
    await _close(producer.client)
    for _ in range(2):
        if sending is not None and not sending.done():
            await asyncio.wait([sending], timeout=1)
            sending.cancel()
    # For a connection that was being opened when the others were closed.
    await _close(producer.client)


async def _close(client: AIOKafkaClient) -> None:
    """Close it within a time limit: its connections first send what they hold, and a broker may not read that."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(CLOSE_SECONDS):
            await client.close()
