"""A client of the service: commands out, results in, as an order service would do it.

Promises: it stands at the end of the results before it sends anything, so it misses none of its own; a result is known
by the id of the command, which is derived from the command's content and so the same for each delivery of it.
"""

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Self
from uuid import UUID

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.errors import KafkaError

from app.settings import Settings
from domain.commands import OperationKind, command_id
from domain.events import AMENDING_EVENTS, FINAL_EVENTS
from domain.money import MINOR_UNITS
from handlers.messages.commands import command_type, read_command
from handlers.messages.events import event_type
from infra.kafka.access import KafkaAccess

FINAL_TYPES: Final = frozenset(event_type(kind) for kind in FINAL_EVENTS)
AMENDING_TYPES: Final = frozenset(event_type(kind) for kind in AMENDING_EVENTS)
REFUSALS: Final = frozenset(("payment.declined.v1", "payment.command_rejected.v1", "payment.refund_failed.v1"))
AMOUNT: Final = re.compile(r"-?(?=\.?[0-9])[0-9]{0,18}\.?[0-9]{0,50}")
POLL_MS: Final = 200
TOPIC_SECONDS: Final = 5.0
"""Until a topic that was made just now is known to every broker."""
AMENDED_SECONDS: Final = 1.0
"""What took a result back follows its repetition at once: both were written in one transaction."""

WireEvent = dict[str, Any]


class AmountUnusable(ValueError):
    """This is no amount of that currency; the message says why."""


class NoResultYet(Exception):
    """The wait was over before the result came; `last` is the newest event about the command, if any."""

    def __init__(self, last: WireEvent | None) -> None:
        self.last = last
        super().__init__("no result yet")


@dataclass(frozen=True, slots=True)
class OutgoingCommand:
    """A command as it goes on the wire."""

    payment_id: UUID
    idempotency_key: str
    value: bytes
    command_id: UUID


@dataclass(frozen=True, slots=True)
class Heard:
    """An event, and when (`time.monotonic`) it was read."""

    event: WireEvent
    at: float


def minor_units(amount: str, currency: str) -> int:
    """`12.50` and `USD` are 1250, exactly.

    Raises:
        AmountUnusable: unknown currency, no digits, or more decimals than the currency has.
    """
    decimals = MINOR_UNITS.get(currency)
    if decimals is None:
        raise AmountUnusable(f"{currency} is not one of the currencies known here: {', '.join(sorted(MINOR_UNITS))}")
    if AMOUNT.fullmatch(amount) is None:
        raise AmountUnusable(f"{amount!r} is no amount; write it like 12.50")
    if amount.startswith("-") or not amount.strip("0."):
        raise AmountUnusable(f"{amount} is no amount: it must be more than zero")
    whole, _, fraction = amount.partition(".")
    fraction = fraction.rstrip("0")
    if len(fraction) > decimals:
        raise AmountUnusable(f"{currency} has {_decimals(decimals)}: {amount} cannot be paid")
    return int(whole + fraction.ljust(decimals, "0"))


def outgoing(kind: OperationKind, payment_id: UUID, idempotency_key: str, fields: Mapping[str, Any]) -> OutgoingCommand:
    """The message for a command; `fields` that are None are left out."""
    body: dict[str, Any] = {
        "type": command_type(kind),
        "idempotency_key": idempotency_key,
        "payment_id": str(payment_id),
        **{name: value for name, value in fields.items() if value is not None},
    }
    value = json.dumps(body).encode()
    return OutgoingCommand(payment_id, idempotency_key, value, command_id(read_command(value, None).fingerprint))


class Tail:
    """Reads what is written to a topic from `start` on, partition by partition in order."""

    def __init__(self, kafka: KafkaAccess, topic: str) -> None:
        self._topic = topic
        self._consumer = AIOKafkaConsumer(**kafka.client_arguments(), enable_auto_commit=False, fetch_max_wait_ms=50)

    async def start(self, producer: AIOKafkaProducer) -> None:
        """Stand at the end of every partition; the producer knows how many there are."""
        await self._consumer.start()
        partitions = [TopicPartition(self._topic, number) for number in await producer.partitions_for(self._topic)]
        self._consumer.assign(partitions)
        await self._consumer.seek_to_end(*partitions)
        for partition in partitions:
            await self._consumer.position(partition)

    async def stop(self) -> None:
        await self._consumer.stop()

    async def read(self) -> list[Any]:
        """The next records, none where none came for a moment."""
        batches = await self._consumer.getmany(timeout_ms=POLL_MS)
        return [record for records in batches.values() for record in records]


class PaymentsClient:
    """An async context manager: sends commands and hears every event published since it was entered."""

    def __init__(self, settings: Settings) -> None:
        self._commands = settings.commands_topic
        self._topics = settings.topics
        self._producer = AIOKafkaProducer(**settings.kafka.client_arguments(), acks="all", enable_idempotence=True)
        self._events = Tail(settings.kafka, settings.events_topic)
        self.dead_letters = Tail(settings.kafka, settings.dead_letter_topic)

    async def __aenter__(self) -> Self:
        try:
            await self._producer.start()
            await self._find_topics()
            await asyncio.gather(self._events.start(self._producer), self.dead_letters.start(self._producer))
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._producer.stop()
        await self._events.stop()
        await self.dead_letters.stop()

    async def _find_topics(self) -> None:
        """A producer would wait long for a topic that is not there, and then blame Kafka."""
        for topic in self._topics:
            try:
                async with asyncio.timeout(TOPIC_SECONDS):
                    await self._producer.partitions_for(topic)
            except TimeoutError as error:
                told = f"no topic {topic} was found within {TOPIC_SECONDS:g} s: `payments migrate` makes it"
                raise KafkaError(f"{told}; nothing was sent") from error

    async def send(self, value: bytes, payment_id: UUID) -> None:
        """Have Kafka acknowledge one message."""
        await self._producer.send_and_wait(self._commands, value, key=str(payment_id).encode())

    async def post(self, value: bytes, payment_id: UUID) -> None:
        """Hand over one message to be sent with others; in order per payment."""
        await self._producer.send(self._commands, value, key=str(payment_id).encode())

    async def flush(self) -> None:
        """Have Kafka acknowledge all that was posted."""
        await self._producer.flush()

    async def heard(self) -> AsyncIterator[Heard]:
        """Every event from now on, in order per payment; ends never."""
        while True:
            records = await self._events.read()
            now = time.monotonic()
            for record in records:
                yield Heard(json.loads(record.value), now)

    async def result_of(self, command: OutgoingCommand, *, timeout_seconds: float) -> AsyncIterator[Heard]:
        """The events about one command, up to and with its final one and what took that back since.

        Raises:
            NoResultYet: it did not come in time. The command may still succeed.
        """
        last, has_ended = None, False
        deadline = time.monotonic() + timeout_seconds
        events = self.heard()
        while True:
            try:
                async with asyncio.timeout(deadline - time.monotonic()):
                    heard = await anext(events)
            except TimeoutError as error:
                if has_ended:
                    return
                raise NoResultYet(last) from error
            if heard.event["command_id"] == str(command.command_id):
                last = heard.event
                yield heard
                if is_final(last):
                    if not last["replayed"]:
                        return
                    has_ended, deadline = True, time.monotonic() + AMENDED_SECONDS


def is_final(event: WireEvent) -> bool:
    """Whether this event ends its command."""
    return event["type"] in FINAL_TYPES


def is_result(event: WireEvent) -> bool:
    """Whether this event says what became of its command: it ends it, or takes back the one that did."""
    return event["type"] in FINAL_TYPES | AMENDING_TYPES


def _decimals(count: int) -> str:
    return {0: "no decimals", 1: "one decimal"}.get(count, f"{count} decimals")


def read_amount(amount: str | None, amount_minor: int | None, currency: str | None) -> int | None:
    """The amount that a person gave in one of two ways; None where in neither.

    Raises:
        AmountUnusable: given twice, or in a way that cannot be read.
    """
    if amount is None:
        return amount_minor
    if amount_minor is not None:
        raise AmountUnusable("give --amount or --amount-minor, not both")
    if currency is None:
        raise AmountUnusable("--amount needs --currency, to know its decimals; or use --amount-minor")
    return minor_units(amount, currency)
