"""The producers of one session: one for all partitions, and another for each partition in which that is spent.

A producer numbers its batches per partition. Once a batch that it has numbered was not written there, the broker
accepts none of its later ones, so that partition needs another producer.
"""

import asyncio
from collections.abc import Callable
from typing import Final

from aiokafka import AIOKafkaProducer

from infra.relay.config import RelayConfig
from infra.relay.errors import KafkaAway
from infra.relay.publish.producer import OneCluster, abandon, start_producer

RENEWAL_SECONDS: Final = 40.0
"""How long starting another producer may take: two unreachable brokers may be asked before a live one."""


class Producers:
    """`on_renewed` is called when a partition has its new producer, or with the error that kept it from one."""

    def __init__(
        self,
        config: RelayConfig,
        cluster: OneCluster,
        first: AIOKafkaProducer,
        partitions: int,
        on_renewed: Callable[[Exception | None], None],
    ) -> None:
        self.of_partition = [first] * partitions
        self.spent: set[int] = set()
        """Partitions that need another producer."""
        self.renewing: set[int] = set()
        """Partitions for which another producer is being started; nothing may be sent to them meanwhile."""
        self.renewals: set[asyncio.Task[None]] = set()
        self._config = config
        self._cluster = cluster
        self._open = {first}
        self._on_renewed = on_renewed

    def begin_renewal(self, partition: int) -> None:
        """In a task, so that the other partitions go on: a vanished broker may be asked first, for a long time."""
        self.renewing.add(partition)
        renewal = asyncio.create_task(self._renew(partition))
        self.renewals.add(renewal)
        renewal.add_done_callback(self.renewals.discard)

    def check_partitions(self) -> None:
        """Check the number of the topic's partitions by every producer's metadata; see `Publisher.check_partitions`."""
        topic, known = self._config.topic, len(self.of_partition)
        for producer in self._open:
            partitions = producer.client.cluster.partitions_for_topic(topic)
            if partitions and len(partitions) != known:
                raise KafkaAway(f"topic {topic} has {len(partitions)} partitions, and had {known}")

    async def close(self) -> None:
        """Abandon all of them, and those that are being started."""
        for renewal in self.renewals:
            renewal.cancel()
        await asyncio.gather(*self.renewals, return_exceptions=True)
        await asyncio.gather(*map(abandon, self._open))

    async def _renew(self, partition: int) -> None:
        try:
            async with asyncio.timeout(RENEWAL_SECONDS):
                producer, _ = await start_producer(self._config, self._cluster)
                self._open.add(producer)
        except TimeoutError:  # Its own text is empty.
            self._on_renewed(KafkaAway(f"partition {partition} got no other producer within {RENEWAL_SECONDS:g} s"))
            return
        except Exception as error:  # Whatever it is, the publisher reports it, and the session ends.
            self._on_renewed(error)
            return
        spent, self.of_partition[partition] = self.of_partition[partition], producer
        self.spent.discard(partition)
        self.renewing.discard(partition)
        self._on_renewed(None)
        if spent not in self.of_partition:
            await abandon(spent)  # If this is cancelled, `close` does it.
            self._open.discard(spent)
