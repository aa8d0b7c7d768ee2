"""The topics that we create are replicated, since we take an event as published once Kafka acknowledges it."""

import pytest

from infra.kafka.topics import _new_topic


@pytest.mark.parametrize(
    ("brokers", "copies", "configs"),
    [(1, 1, {}), (2, 2, {}), (3, 3, {"min.insync.replicas": "2"}), (9, 3, {"min.insync.replicas": "2"})],
)
def test_it_has_as_many_copies_as_brokers_and_three_at_most(brokers: int, copies: int, configs: dict[str, str]) -> None:
    topic = _new_topic("payments.events", 8, brokers, is_kept=False)
    assert (topic.num_partitions, topic.replication_factor, topic.topic_configs) == (8, copies, configs)
