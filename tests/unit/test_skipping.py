"""A failing read loses no record. Tested with aiokafka's own fetcher and positions, without a broker."""

import collections
import struct
from collections.abc import Callable
from typing import Any

import pytest
from aiokafka import TopicPartition
from aiokafka.consumer.fetcher import Fetcher, FetchError, FetchResult, PartitionRecords
from aiokafka.consumer.subscription_state import SubscriptionState
from aiokafka.errors import GroupAuthorizationFailedError, KafkaError, OffsetOutOfRangeError
from aiokafka.record.default_records import DefaultRecordBatchBuilder
from aiokafka.record.memory_records import MemoryRecords
from aiokafka.record.util import calc_crc32c

from infra.kafka.skipping import IDLE_PASSES_MAX, SkippingReader

SOUND, SICK = TopicPartition("t", 0), TopicPartition("t", 1)
BAD = b"bad"


def batch_of(base: int, values: list[bytes]) -> bytearray:
    """A batch in Kafka's format from offset `base`. The header name of a BAD record is not valid UTF-8."""
    builder = DefaultRecordBatchBuilder(2, 0, 0, -1, -1, -1, 1 << 20)
    for number, value in enumerate(values):
        builder.append(number, timestamp=1, key=None, value=value, headers=[("xx" if value == BAD else "ok", b"")])
    batch = bytearray(bytes(builder.build()).replace(b"xx", b"\xff\xfe"))
    struct.pack_into(">q", batch, 0, base)
    struct.pack_into(">I", batch, 17, calc_crc32c(memoryview(bytes(batch))[21:]))
    return batch


class Consumer:
    """The part of aiokafka's consumer that the reader uses, over logs that are already fetched."""

    def __init__(self, logs: dict[TopicPartition, list[bytes]]) -> None:
        self._logs = logs
        self.corrupt: set[TopicPartition] = set()
        self.begins_at: dict[TopicPartition, int] = {}
        self.committed_to: dict[TopicPartition, int] = {}
        self.failing_questions = 0
        self._state = SubscriptionState()
        self._state.subscribe({"t"})
        self.assign(*logs)
        self._fetcher: Any = Fetcher.__new__(Fetcher)
        vars(self._fetcher).update(
            _subscriptions=self._state, _records={}, _wait_consume_future=None, _closed=False, _fetch_waiters=set()
        )

    def assign(self, *partitions: TopicPartition) -> None:
        self._state.assign_from_subscribed(list(partitions))
        for each in partitions:
            self._state.subscription.assignment.state_value(each).reset_to(self.committed_to.get(each, 0))

    def assignment(self) -> frozenset[TopicPartition]:
        return frozenset(self._state.assigned_partitions())

    def _position(self, partition: TopicPartition) -> int:
        return int(self._state.subscription.assignment.state_value(partition).position)

    def _fetch(self) -> None:
        for partition in sorted(self.assignment() - self._fetcher._records.keys()):
            position = self._position(partition)
            if position < self.begins_at.get(partition, 0):
                error = OffsetOutOfRangeError({partition: position})
                self._fetcher._records[partition] = FetchError(error=error, backoff=0)
                continue
            if not (left := self._logs[partition][position:]):
                continue
            batch = batch_of(position, left)
            if partition in self.corrupt:
                batch[-1] ^= 1
            records = PartitionRecords(
                partition, MemoryRecords(bytes(batch)), [], position, None, None, check_crcs=True, isolation_level=0
            )
            self._fetcher._records[partition] = FetchResult(
                partition, assignment=self._state.subscription.assignment, backoff=0, partition_records=records
            )

    async def getmany(self, *partitions: TopicPartition, timeout_ms: int = 0, max_records: int | None = None) -> Any:
        self._fetch()
        return await self._fetcher.fetched_records(partitions, 0, max_records=max_records)

    async def position(self, partition: TopicPartition) -> int:
        return self._position(partition)

    async def committed(self, partition: TopicPartition) -> int | None:
        if self.failing_questions:
            self.failing_questions -= 1
            raise KafkaError("the coordinator is away")
        return self.committed_to.get(partition)

    async def beginning_offsets(self, partitions: list[TopicPartition]) -> dict[TopicPartition, int]:
        return {each: self.begins_at.get(each, 0) for each in partitions}

    def seek(self, partition: TopicPartition, offset: int) -> None:
        self._state.subscription.assignment.state_value(partition).seek(offset)
        self._fetcher._records.pop(partition, None)


async def read_on(consumer: Any, reads: int = 30) -> dict[int, list[bytes]]:
    """The records that a handler gets if it commits each batch and reads on after errors; repeated ones appear once."""
    given: dict[int, dict[int, bytes]] = collections.defaultdict(dict)
    for _ in range(reads):
        try:
            records = await consumer.getmany(timeout_ms=5, max_records=500)
        except KafkaError:
            continue
        for partition, found in records.items():
            given[partition.partition] |= {each.offset: each.value for each in found}
            consumer.committed_to[partition] = found[-1].offset + 1
    return {partition: [by_offset[each] for each in sorted(by_offset)] for partition, by_offset in given.items()}


def parks(failures: int = 0) -> tuple[Callable[..., Any], list[int]]:
    """A dead-letter topic that is away for the first `failures` tries, and the offsets that were parked."""
    parked: list[int] = []
    left = [failures]

    async def park(topic: str, partition: int, offset: int, trouble: str) -> None:
        if left[0]:
            left[0] -= 1
            raise KafkaError("the dead-letter topic is away")
        parked.append(offset)

    return park, parked


def unheard(*place: Any) -> None:
    raise AssertionError(f"nothing was deleted: {place}")


def logs() -> dict[TopicPartition, list[bytes]]:
    return {SOUND: [b"a1", b"a2", b"a3", b"a4", b"a5"], SICK: [b"b1", BAD, b"b3"]}


EVERYTHING = {0: [b"a1", b"a2", b"a3", b"a4", b"a5"], 1: [b"b1", b"b3"]}


@pytest.mark.parametrize("failures", [0, 3], ids=["", "the dead-letter topic is away"])
@pytest.mark.parametrize("questions", [0, 2], ids=["", "the coordinator is away"])
async def test_an_undecodable_record_is_parked_and_no_other_is_missing(failures: int, questions: int) -> None:
    consumer = Consumer(logs())
    consumer.failing_questions = questions
    park, parked = parks(failures)
    reader = SkippingReader.install(consumer, park, unheard)
    assert await read_on(consumer) == EVERYTHING
    assert (parked, reader.is_careful) == ([1], False)


async def test_a_partition_that_cannot_be_read_holds_up_no_other_and_loses_nothing() -> None:
    consumer = Consumer({SOUND: EVERYTHING[0], SICK: EVERYTHING[1]})
    consumer.corrupt = {SICK}
    SkippingReader.install(consumer, parks()[0], unheard)
    assert await read_on(consumer) == {0: EVERYTHING[0]}
    consumer.corrupt = set()
    consumer._fetcher._records.clear()
    assert await read_on(consumer) == {1: EVERYTHING[1]}


@pytest.mark.parametrize("is_careful", [False, True], ids=["", "read one by one"])
async def test_records_deleted_before_they_were_read_are_reported_and_cost_no_others(is_careful: bool) -> None:
    consumer = Consumer(logs() if is_careful else {SOUND: EVERYTHING[0], SICK: EVERYTHING[1]})
    told: list[Any] = []
    SkippingReader.install(consumer, parks()[0], lambda *place: told.append(place))
    consumer.begins_at = {SOUND: 2}
    assert await read_on(consumer) == {0: EVERYTHING[0][2:], 1: EVERYTHING[1]}
    assert told == [("t", 0, 0, 2)]


async def test_a_reader_that_loses_the_bad_records_partition_reads_as_usual_again() -> None:
    consumer = Consumer(logs())
    park, parked = parks()
    reader = SkippingReader.install(consumer, park, unheard)
    await consumer.getmany(timeout_ms=5, max_records=500)
    assert reader.is_careful
    consumer.assign(SOUND)
    assert await read_on(consumer, reads=1) == {0: EVERYTHING[0]}, "in one go"
    assert (parked, reader.is_careful) == ([], False)


async def test_once_the_bad_record_is_gone_it_reads_as_usual_again() -> None:
    """Kafka may delete the record before it is read again."""
    consumer = Consumer(logs())
    reader = SkippingReader.install(consumer, parks()[0], unheard)
    await consumer.getmany(timeout_ms=5, max_records=500)
    consumer._logs[SICK][1] = b"b2"
    await read_on(consumer, reads=10 + IDLE_PASSES_MAX)
    assert not reader.is_careful


async def test_read_positions_are_reported_and_a_partition_that_kafka_refuses_is_left_out() -> None:
    consumer: Any = Consumer({SOUND: [b"1", b"2"], SICK: [b"1"]})
    consumer.highwater = lambda partition: 2
    reader = SkippingReader.install(consumer, *parks()[:1], lambda *_: None)
    await consumer.getmany(timeout_ms=0, max_records=1)
    told = await reader.places()
    assert sorted(told) == [0, 1]
    assert {place.next_offset + place.lag for place in told.values()} == {2}

    position = consumer.position

    async def refuse(partition: TopicPartition) -> int:
        if partition == SICK:
            raise GroupAuthorizationFailedError
        return int(await position(partition))

    consumer.position = refuse
    assert sorted(await reader.places()) == [0]
