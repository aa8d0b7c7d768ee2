"""The dead-letter topic: keeps originals byte for byte, with their source and the reason why they were parked."""

from asyncio import Future
from collections.abc import Sequence
from typing import Any

from aiokafka import AIOKafkaProducer
from aiokafka.errors import MessageSizeTooLargeError, RecordListTooLargeError

from domain.ports import DeadLetter
from infra.kafka.access import KafkaAccess

KEY_BYTES_MAX = 1024
TOO_LARGE = (MessageSizeTooLargeError, RecordListTooLargeError)


def dead_letter_producer(kafka: KafkaAccess) -> AIOKafkaProducer:
    """A producer for `KafkaDeadLetters`; the caller starts and stops it.

    It is not idempotent: after a letter that the broker refuses, aiokafka's next sequence number is one too high, and
    every later letter of that partition would be refused as out of order. So a letter may be parked twice.
    """
    return AIOKafkaProducer(**kafka.client_arguments(), acks="all")


class KafkaDeadLetters:
    """Parks messages in `topic`; fits `domain.ports.DeadLetters`.

    A message that is too large for the topic with our headers added is parked without its value and headers, and
    without its key if that is too long for a payment id (`dlq_value_left_out` and `dlq_key_left_out` hold their sizes;
    the original is at `dlq_offset` of `dlq_topic`): it must not hold up its partition for ever.
    """

    def __init__(self, producer: AIOKafkaProducer, *, topic: str) -> None:
        self._producer = producer
        self._topic = topic

    async def park(self, letters: Sequence[DeadLetter]) -> None:
        """Park these letters; returns only when the broker has acknowledged all of them.

        Raises:
            KafkaError: some of them may not be parked; park all of them again.
        """
        sent = [(each, await self._send_whole(each)) for each in letters]
        for letter, acknowledgement in sent:
            try:
                await acknowledgement
            except TOO_LARGE:
                await (await self._send_stub(letter))

    async def _send_whole(self, letter: DeadLetter) -> "Future[Any]":
        try:
            return await self._send(letter.value, letter.key, [*letter.headers, *_facts(letter)])
        except TOO_LARGE:
            return await self._send_stub(letter)

    async def _send_stub(self, letter: DeadLetter) -> "Future[Any]":
        left_out = [("dlq_value_left_out", _size(letter.value))]
        key = letter.key
        if key is not None and len(key) > KEY_BYTES_MAX:
            left_out.append(("dlq_key_left_out", _size(key)))
            key = None
        return await self._send(None, key, [*_facts(letter), *left_out])

    async def _send(self, value: bytes | None, key: bytes | None, headers: list[tuple[str, bytes]]) -> "Future[Any]":
        if value is None and key is None:
            value = b""  # aiokafka, unlike other clients, does not send a record that has neither.
        acknowledgement: Future[Any] = await self._producer.send(self._topic, value=value, key=key, headers=headers)
        return acknowledgement


def _size(value: bytes | None) -> bytes:
    return str(len(value or b"")).encode()


def _facts(letter: DeadLetter) -> list[tuple[str, bytes]]:
    facts = {
        "dlq_reason": letter.reason,
        "dlq_detail": letter.detail,
        "dlq_topic": letter.topic,
        "dlq_partition": str(letter.partition),
        "dlq_offset": str(letter.offset),
    }
    return [(name, text.encode()) for name, text in facts.items()]
