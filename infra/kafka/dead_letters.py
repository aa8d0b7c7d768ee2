"""The dead-letter topic: originals kept byte for byte, with where they came from and why they are here."""

from collections.abc import Sequence

from aiokafka import AIOKafkaProducer

from domain.ports import DeadLetter


class KafkaDeadLetters:
    """Parks messages in `topic`; fits `domain.ports.DeadLetters`."""

    def __init__(self, producer: AIOKafkaProducer, *, topic: str) -> None:
        self._producer = producer
        self._topic = topic

    async def park(self, letters: Sequence[DeadLetter]) -> None:
        """Return only when the broker has acknowledged all of them.

        Raises:
            KafkaError: not all of them are surely parked; park them again.
        """
        sent = [
            await self._producer.send(self._topic, value=each.value, key=each.key, headers=_headers(each))
            for each in letters
        ]
        for acknowledgement in sent:
            await acknowledgement


def _headers(letter: DeadLetter) -> list[tuple[str, bytes]]:
    facts = {
        "dlq_reason": letter.reason,
        "dlq_detail": letter.detail,
        "dlq_topic": letter.topic,
        "dlq_partition": str(letter.partition),
        "dlq_offset": str(letter.offset),
    }
    return [*letter.headers, *((name, text.encode()) for name, text in facts.items())]
