"""Publishes rows with the real Debezium and with our relay, and compares the messages."""

import asyncio
import contextlib
import json
import random
from collections.abc import AsyncIterator, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from uuid import UUID

from infra.local.connect import EmbeddedConnect
from infra.relay import Relay, RelayConfig
from tests.support.outbox import Row, complete, fetch_value
from tests.support.topic import read_until
from tests.support.waiting import until

TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
PAYLOADS = (
    '{ "z" : [1, 2,3] ,\n\t"a":{"y":null,"b":{}}, "e":[] }',
    '{"u":"\\u0111","s":"a\\/b"}',
    '{"amount":9007199254740993,"dec":10.50,"exp":1e3}',
    '{"big":18446744073709551616,"dup":1,"dup":2}',
    '"scalar"',
    '[1,"a"]',
    "null",
    "true",
    "-0.0",
    '{"text":"giấy 📄 \\u0000", "empty":"", "nested":{"a":{"b":{"c":[[],{},[{}]]}}}}',
    '{"thanh toán":"được", "🧾":"한국어 \\ud83d\\ude00"}',
    json.dumps({"long": "ả" * 20_000}, ensure_ascii=False),
    "  {}  ",
)
TYPES = ("payment.captured.v1", "payment.refunded.v1", "thanh_toán.tạo", "x")


class Message(NamedTuple):
    """Everything that a subscriber sees of a message except its time."""

    partition: int
    key: str
    value: str
    headers: tuple[tuple[str, str | None], ...]
    timestamp_type: int

    def __str__(self) -> str:
        headers = "\n".join(
            f"    {name}: {'null' if value is None else bytes.fromhex(value)!r}" for name, value in self.headers
        )
        value = bytes.fromhex(self.value)
        shown = value if len(value) < 500 else value[:500] + b"..."
        return f"  partition {self.partition}, key {bytes.fromhex(self.key)!r}, value {shown!r}\n{headers}"


def message_of(record: Any) -> Message:
    """The record's message, with bytes as hexadecimal digits so that a JSON file can hold them."""
    headers = tuple((name, None if value is None else value.hex()) for name, value in record.headers)
    return Message(record.partition, record.key.hex(), record.value.hex(), headers, record.timestamp_type)


def varied_transactions(count: int, seed: int = 1) -> list[list[Row]]:
    """`count` rows of 45 payments, in transactions of one to twelve rows; the same for the same seed."""
    choose = random.Random(seed)
    keys = [*(f"pay_{number:04}" for number in range(40)), "pay_Đ4", "ключ", "a b/c", "支払い-🧾", "x" * 300]
    next_seq = dict.fromkeys(keys, 1)
    transactions: list[list[Row]] = []
    while count:
        size = min(count, choose.choice((1, 1, 1, 2, 5, 12)))
        rows = []
        for _ in range(size):
            key = choose.choice(keys)
            seq, next_seq[key] = next_seq[key], next_seq[key] + choose.choice((1, 1, 1, 2**20))
            rows.append(_row(choose, key, min(seq, 2**31 - 1)))
        transactions.append(rows)
        count -= size
    return transactions


def _row(choose: random.Random, key: str, seq: int) -> Row:
    return Row(
        UUID(int=choose.getrandbits(128), version=4),
        key,
        seq,
        choose.choice((choose.choice(PAYLOADS), _document(choose))),
        choose.choice(TYPES),
        f"2026-01-02T03:04:05.{choose.randrange(10**6):06}Z",
        choose.choice((None, TRACEPARENT, "")),
        choose.choice(("/payments", "//đơn vị/1", "")),
        choose.choice(("1.0", "1.1")),
    )


def _document(choose: random.Random) -> str:
    """Random JSON, with the spaces and escapes of one of several kinds of serializer."""
    spaces = choose.choice(((", ", ": "), (",", ":"), (" ,\t", " :\n")))
    return json.dumps(_value(choose, depth=4), ensure_ascii=choose.random() < 0.5, separators=spaces)


def _value(choose: random.Random, depth: int) -> object:
    match choose.randrange(8 if depth else 6):
        case 0:
            return choose.choice((None, True, False, "", 0))
        case 1:
            return choose.randrange(-(2 ** choose.randrange(1, 200)), 2**70)
        case 2:
            return choose.uniform(-1, 1) * 10 ** choose.randrange(-300, 300)
        case 3 | 4 | 5:
            return _text(choose)
        case 6:
            return [_value(choose, depth - 1) for _ in range(choose.randrange(5))]
        case _:
            return {_text(choose): _value(choose, depth - 1) for _ in range(choose.randrange(5))}


def _text(choose: random.Random) -> str:
    """Characters of every length in UTF-8, with quotes and control characters, but without NUL and surrogates."""
    ranges = ((0x20, 0x7F), (1, 0x20), (0x80, 0x800), (0x800, 0xD800), (0x10000, 0x110000))
    return "".join(chr(choose.randrange(*choose.choice(ranges))) for _ in range(choose.randrange(12)))


async def create_slot(config: RelayConfig) -> None:
    """Create the slot that Debezium will use, so that it publishes everything committed from now on."""
    await fetch_value(config.postgres_url, "SELECT pg_create_logical_replication_slot(%s, 'pgoutput')", config.slot)


@contextlib.asynccontextmanager
async def debezium(config: RelayConfig, data_dir: Path, *, tuning: str | None = None) -> AsyncIterator[EmbeddedConnect]:
    """The real Debezium on the slot of `config`, which must exist, publishing to its topic."""
    connect = EmbeddedConnect(
        data_dir,
        postgres_url=config.postgres_url,
        kafka_bootstrap=config.kafka.bootstrap,
        topic=config.topic,
        slot=config.slot,
        tuning=tuning,
    )
    await asyncio.to_thread(connect.start)
    try:
        yield connect
    finally:
        await asyncio.to_thread(connect.stop)


@contextlib.asynccontextmanager
async def our_relay(config: RelayConfig) -> AsyncIterator[Relay]:
    """Our relay, active; stopped cleanly at the end."""
    relay, stop = Relay(config), asyncio.Event()
    task = asyncio.create_task(relay.run(stop))
    try:
        await until(lambda: task.done() or relay.health.detail == "active")
        yield relay
    finally:
        stop.set()
        await asyncio.wait_for(task, 30)


async def messages_on(config: RelayConfig, rows: Iterable[Row]) -> dict[int, list[Message]]:
    """Wait until all rows are on the topic; returns the messages of each partition, in order."""
    records = await read_until(config.kafka.bootstrap, config.topic, complete(rows), timeout_seconds=90)
    found: dict[int, list[Message]] = {}
    for record in records:
        found.setdefault(record.partition, []).append(message_of(record))
    return found


def first_difference(theirs: dict[int, list[Message]], ours: dict[int, list[Message]]) -> str | None:
    """A readable description of the first difference between the topics; None if they are equal."""
    for partition in sorted(theirs.keys() | ours.keys()):
        left, right = theirs.get(partition, []), ours.get(partition, [])
        for number, (a, b) in enumerate(zip(left, right, strict=False)):
            if a != b:
                return f"partition {partition}, message {number}:\nDebezium\n{a}\nour relay\n{b}"
        if len(left) != len(right):
            return f"partition {partition}: {len(left)} messages of Debezium, {len(right)} of our relay"
    return None


def debeziums(config: RelayConfig, topic: str) -> RelayConfig:
    """The same database, with another slot and topic."""
    return replace(config, slot=f"{config.slot}_dbz", topic=topic)
