"""A client of the service: commands out, results in, as an order service would do it.

Promises: it seeks to the end of the results before it sends anything, so it misses none of its own. It recognizes a
result by the command's id, which is derived from the command's content and so is the same for each delivery.
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
"""How long to wait until every broker knows a topic that was just created."""
AMENDED_SECONDS: Final = 1.0
"""An event that took a result back follows the replayed result at once: one transaction wrote both."""

EventBody = dict[str, Any]
"""An event as JSON, whatever its type: one of a later release is passed on as well."""


class AmountUnusable(ValueError):
    """The text is not an amount in that currency; the message says why."""


class NoResultYet(Exception):
    """No result arrived in time; `last` is the newest event about the command, if any."""

    def __init__(self, last: EventBody | None) -> None:
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

    event: EventBody
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
        raise AmountUnusable(f"{amount!r} is not an amount; write it like 12.50")
    if amount.startswith("-") or not amount.strip("0."):
        raise AmountUnusable(f"{amount} is not an amount: it must be more than zero")
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
    """Reads the records that are written to a topic after `start`, each partition in order."""

    def __init__(self, kafka: KafkaAccess, topic: str) -> None:
        self._topic = topic
        self._consumer = AIOKafkaConsumer(**kafka.client_arguments(), enable_auto_commit=False, fetch_max_wait_ms=50)

    async def start(self, producer: AIOKafkaProducer) -> None:
        """Seek to the end of every partition; the producer supplies the list of partitions."""
        await self._consumer.start()
        partitions = [TopicPartition(self._topic, number) for number in await producer.partitions_for(self._topic)]
        self._consumer.assign(partitions)
        await self._consumer.seek_to_end(*partitions)
        for partition in partitions:
            await self._consumer.position(partition)

    async def stop(self) -> None:
        await self._consumer.stop()

    async def read(self) -> list[Any]:
        """The next records; empty if none arrived within a moment."""
        batches = await self._consumer.getmany(timeout_ms=POLL_MS)
        return [record for records in batches.values() for record in records]


class PaymentsClient:
    """An async context manager: sends commands and receives every event published after it was entered."""

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
        """Fail early if a topic is missing: a producer would wait long for it, and then blame Kafka."""
        for topic in self._topics:
            try:
                async with asyncio.timeout(TOPIC_SECONDS):
                    await self._producer.partitions_for(topic)
            except TimeoutError as error:
                problem = f"no topic {topic} was found within {TOPIC_SECONDS:g} s: `payments migrate` creates it"
                raise KafkaError(f"{problem}; nothing was sent") from error

    async def send(self, value: bytes, payment_id: UUID) -> None:
        """Send one message, and wait until Kafka has acknowledged it."""
        await self._producer.send_and_wait(self._commands, value, key=str(payment_id).encode())

    async def post(self, value: bytes, payment_id: UUID) -> None:
        """Queue one message to be sent with others; in order per payment."""
        await self._producer.send(self._commands, value, key=str(payment_id).encode())

    async def flush(self) -> None:
        """Wait until Kafka has acknowledged everything that was posted."""
        await self._producer.flush()

    async def heard(self) -> AsyncIterator[Heard]:
        """Every event from now on, in order per payment; never ends."""
        while True:
            records = await self._events.read()
            now = time.monotonic()
            for record in records:
                yield Heard(json.loads(record.value), now)

    async def result_of(self, command: OutgoingCommand, *, timeout_seconds: float) -> AsyncIterator[Heard]:
        """The events about one command, up to and including its final one and any that took it back since.

        Raises:
            NoResultYet: no final event came in time. The command may still succeed.
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


def is_final(event: EventBody) -> bool:
    """Whether this event ends its command."""
    return event["type"] in FINAL_TYPES


def is_result(event: EventBody) -> bool:
    """Whether this event ends its command, or takes back an event that did."""
    return event["type"] in FINAL_TYPES | AMENDING_TYPES


def _decimals(count: int) -> str:
    return {0: "no decimals", 1: "one decimal"}.get(count, f"{count} decimals")


def read_amount(amount: str | None, amount_minor: int | None, currency: str | None) -> int | None:
    """The amount in minor units, from whichever of the two options was given; None if neither was.

    Raises:
        AmountUnusable: both options were given, or the amount cannot be read.
    """
    if amount is None:
        return amount_minor
    if amount_minor is not None:
        raise AmountUnusable("give --amount or --amount-minor, not both")
    if currency is None:
        raise AmountUnusable("--amount needs --currency, to know its decimals; or use --amount-minor")
    return minor_units(amount, currency)
