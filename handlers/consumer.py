"""The edge where commands come in: a FastStream batch subscriber. Offsets are committed only once Postgres has a batch.

Messages are parsed one by one, so an unreadable one goes to the dead-letter topic and its neighbours go on. One failure
policy: if Postgres is away, rewind and back off; any other failure was already isolated to single messages.
"""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any, Final

import structlog
from aiokafka import ConsumerRebalanceListener
from aiokafka.errors import IllegalStateError, KafkaError
from faststream import AckPolicy
from faststream.kafka import KafkaBroker, KafkaMessage

from domain.decision import Delivery
from domain.errors import MessageUnreadable, StoreUnavailable
from domain.ports import DeadLetter, DeadLetters
from handlers import metrics
from handlers.backlog import Backlog
from handlers.dispatch import Dispatcher
from handlers.messages.commands import read_command, read_traceparent
from handlers.messages.dead_letter_reason import DeadLetterReason
from handlers.offsets import Offsets, Record
from handlers.retry import Backoff
from handlers.write_path import Applied, SavedInPart, WritePath

log = structlog.get_logger(__name__)

BATCH_MAX = 500
IDLE_POLL_MS = 5
CYCLE_SECONDS = 0.004
"""Least time from one batch to the next: under a steady load, tiny batches are the most expensive."""
READS_ON_SECONDS: Final = 0.02
"""Longest time spent parsing before yielding to the event loop for heartbeats, answers and health checks."""


class CommandConsumer:
    """Accepts batches of commands through the write path and passes the resulting requests to the dispatcher."""

    def __init__(
        self,
        *,
        write_path: WritePath,
        dispatcher: Dispatcher,
        dead_letters: DeadLetters,
        backlog: Backlog,
        retries_before_parking: int,
    ) -> None:
        self.offsets = Offsets()
        self._write_path = write_path
        self._dispatcher = dispatcher
        self._dead_letters = dead_letters
        self._backlog = backlog
        self._retries_before_parking = retries_before_parking
        self._retry = Backoff(first_seconds=0.2, max_seconds=5)
        self._last_started = 0.0
        self._accepting = asyncio.Lock()
        self._closing = asyncio.Event()
        self._has_unparked = False

    def subscribe(self, broker: KafkaBroker, *, topic: str, group_id: str) -> Any:
        """Register the batch subscriber, and return it. The AsyncAPI document shows single messages instead.

        The caller finds the offset to begin at if the group has none (`infra/kafka/skipping.py`).
        """
        subscriber = broker.subscriber(
            topic,
            batch=True,
            max_records=BATCH_MAX,
            batch_timeout_ms=IDLE_POLL_MS,
            group_id=group_id,
            auto_offset_reset="none",  # Deleted unread commands are reported: `report_deleted`.
            isolation_level="read_committed",  # An order that was rolled back is not to be charged.
            ack_policy=AckPolicy.MANUAL,
            parser=_whole,
            decoder=_itself,
            listener=_Rebalance(self.offsets, self._backlog),
            include_in_schema=False,
        )
        subscriber(self.on_batch)
        return subscriber

    async def on_batch(self, message: Any) -> None:
        """Accept one batch (a `KafkaMessage`): afterwards Postgres owns it and its offsets may be committed."""
        async with self._accepting:
            if self._closing.is_set():
                await _rewind(message)
                await asyncio.sleep(IDLE_POLL_MS / 1000)
            else:
                await self._pace()
                await self._on_batch(message)

    async def park_undecodable(self, topic: str, partition: int, offset: int, trouble: str) -> None:
        """Park the place of a record that the Kafka client could not decode; its content is not known."""
        letter = DeadLetter(
            value=None, key=None, headers=(), topic=topic, partition=partition, offset=offset,
            reason=DeadLetterReason.RECORD_UNDECODABLE, detail=trouble,
        )  # fmt: skip
        await self._park([letter])

    def report_deleted(self, topic: str, partition: int, expected: int, beginning: int) -> None:
        """Report that the log begins at another offset than this group's next one. Reading goes on from there."""
        place = {"topic": topic, "partition": partition, "from_offset": expected, "to_offset": beginning}
        if beginning > expected:
            metrics.COMMANDS_LOST.inc(beginning - expected)
            log.error("commands were deleted before they were read", **place)
        else:
            log.error("the topic ends before what was read of it; it is read again from its beginning", **place)

    async def close(self) -> None:
        """Accept nothing more, and commit the offsets of what was accepted."""
        self._closing.set()
        async with self._accepting:
            await self.offsets.commit()

    async def _on_batch(self, message: KafkaMessage) -> None:
        records: Sequence[Record] = message.raw_message
        consumer: Any = message.consumer
        try:
            await self._accept(records)
        except (StoreUnavailable, KafkaError) as error:
            cause = "postgres" if isinstance(error, StoreUnavailable) else "kafka"
            log.warning("batch postponed", records=len(records), cause=cause, error=str(error))
            if isinstance(error, SavedInPart):
                self._dispatcher.submit(error.requests)
            await self._postpone(message, cause)
            return
        except Exception:
            # A defect. FastStream would go on with the next batch, whose offsets would mark this one as done, too.
            log.exception("batch postponed", records=len(records))
            await self._postpone(message, "defect")
            return
        self._retry.reset()
        await self.offsets.accepted(consumer, records)
        self._backlog.pause_if_full(consumer)

    async def _postpone(self, message: KafkaMessage, cause: str) -> None:
        metrics.POSTPONED.labels("command", cause).inc()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._retry.next_seconds()):
                await self._closing.wait()
        await _rewind(message)

    async def _pace(self) -> None:
        rest = CYCLE_SECONDS - (time.monotonic() - self._last_started)
        if rest > 0:
            await asyncio.sleep(rest)
        self._last_started = time.monotonic()

    async def _accept(self, records: Sequence[Record]) -> None:
        metrics.COMMANDS.inc(len(records))
        deliveries, letters = await _read(records)
        if self._has_unparked:  # Otherwise each round would accept, and answer, the good commands of the batch again.
            await self._park(letters)
            letters = []
        with metrics.BATCH_SECONDS.labels("command").time():
            applied = await self._write_path.apply([delivery for delivery, _ in deliveries])
        self._dispatcher.submit(applied.requests)
        if applied.may_heal:
            applied = await self._try_again([delivery for delivery, _ in deliveries], applied)
        for refused in applied.refused:
            record = next(record for delivery, record in deliveries if delivery is refused.given)
            log.error(
                "command cannot be processed",
                payment=str(refused.given.payment_id),
                partition=record.partition,
                offset=record.offset,
                error=repr(refused.error),
                exc_info=refused.defect,
            )
            letters.append(_letter(record, DeadLetterReason.CANNOT_BE_PROCESSED, type(refused.error).__name__))
        await self._park(letters)

    async def _try_again(self, deliveries: list[Delivery], applied: Applied) -> Applied:
        """Retry isolated failures for some seconds. Other payments are done; later commands of the same one wait."""
        backoff = Backoff(first_seconds=0.3, max_seconds=3)
        for _ in range(self._retries_before_parking):
            await asyncio.sleep(backoff.next_seconds())
            metrics.COMMAND_RETRIES.inc()
            applied = await self._write_path.apply_again(deliveries, applied)
            self._dispatcher.submit(applied.requests)
            if not applied.may_heal:
                return applied
        return await self._give_up(applied)

    async def _give_up(self, applied: Applied) -> Applied:
        """Leave failed commands behind, and apply those that waited for them to the state as it is.

        These may fail as well, with others waiting behind them: each round leaves fewer, and the last none.
        """
        while applied.not_tried:
            rest = await self._write_path.apply(applied.not_tried)
            self._dispatcher.submit(rest.requests)
            applied = Applied(refused=applied.refused).then(rest)
        return applied

    async def _park(self, letters: list[DeadLetter]) -> None:
        if not letters:
            return
        self._has_unparked = True
        await self._dead_letters.park(letters)
        self._has_unparked = False
        for letter in letters:
            metrics.DEAD_LETTERS.labels(letter.reason).inc()
            log.warning("message parked", reason=letter.reason, partition=letter.partition, offset=letter.offset)


async def _rewind(message: KafkaMessage) -> None:
    """Have the batch read again. If one of its partitions has moved, all were already reset to what is committed."""
    with contextlib.suppress(IllegalStateError):
        await message.nack()


async def _whole(records: tuple[Record, ...], parse: Callable[[tuple[Record, ...]], Awaitable[Any]]) -> Any:
    """Parse a batch without its headers: FastStream decodes each as UTF-8, and drops the whole batch if one is not.

    That would go unnoticed: the offsets of the next batch would mark this one as done, too.
    """
    message = await parse((replace(records[0], headers=()), replace(records[-1], headers=())))
    message.raw_message = records
    return message


async def _itself(message: Any) -> Any:
    """Pass the handler the whole message, undecoded: by default one body that is not JSON would fail the whole batch.

    Requested by its type instead, it would come from a dependency that FastStream resolves on another thread.
    """
    return message


async def _read(records: Sequence[Record]) -> tuple[list[tuple[Delivery, Record]], list[DeadLetter]]:
    """The commands in these records; yields to the event loop while many are parsed."""
    deliveries: list[tuple[Delivery, Record]] = []
    letters: list[DeadLetter] = []
    since = time.monotonic()
    for record in records:
        if time.monotonic() - since > READS_ON_SECONDS:
            await asyncio.sleep(0)
            since = time.monotonic()
        try:
            command = read_command(record.value, read_traceparent(record.headers))
        except MessageUnreadable as error:
            letters.append(_letter(record, error.reason, error.detail))
        else:
            deliveries.append((Delivery(command), record))
    return deliveries, letters


def _letter(record: Record, reason: str, detail: str) -> DeadLetter:
    return DeadLetter(
        value=record.value,
        key=record.key,
        headers=record.headers,
        topic=record.topic,
        partition=record.partition,
        offset=record.offset,
        reason=reason,
        detail=detail,
    )


class _Rebalance(ConsumerRebalanceListener):  # type: ignore[misc]  # aiokafka ships no types
    """Commits before partitions are revoked, so that the next owner starts where this worker stopped."""

    def __init__(self, offsets: Offsets, backlog: Backlog) -> None:
        self._offsets = offsets
        self._backlog = backlog

    async def on_partitions_revoked(self, revoked: Any) -> None:
        await self._offsets.commit()

    async def on_partitions_assigned(self, assigned: Any) -> None:
        self._backlog.forget_pause()
