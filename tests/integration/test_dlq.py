"""Dead letters: what can heal gets its chance before it is parked, and what is parked comes back as it came."""

import asyncio
import json
from typing import Any
from uuid import UUID

import pytest
from aiokafka import AIOKafkaProducer
from prometheus_client import REGISTRY
from typer.testing import CliRunner, Result

from app.cli import app
from app.settings import Settings
from handlers import write_path as write_path_module
from handlers.write_path import decide
from infra.kafka.dead_letter_log import DeadLetterLog
from tests.integration.test_consumer import UNREADABLE, running, settings, until_captured
from tests.support.service import body, events_of, new_payment_id, value
from tests.support.topic import read_until, send

__all__ = ["settings"]

ODD_HEADERS = [("trace", b"\xff\xfe"), ("x", b"")]


def payments_dlq(settings: Settings, *arguments: str, monkeypatch: pytest.MonkeyPatch) -> Result:
    """`payments dlq …` in this process: its own event loop runs in a thread of the runner's."""
    environment = {
        "PAYMENTS_POSTGRES_URL": settings.postgres_url,
        "PAYMENTS_KAFKA_BOOTSTRAP": settings.kafka_bootstrap,
        "PAYMENTS_DEAD_LETTER_TOPIC": settings.dead_letter_topic,
        "COLUMNS": "250",
    }
    for name, text in environment.items():
        monkeypatch.setenv(name, text)
    return CliRunner().invoke(app, ["dlq", *arguments])


class Failing:
    """`decide`, which fails on one payment a given number of times, in whatever company it comes."""

    def __init__(self, payment_id: UUID, times: int) -> None:
        self.payment_id, self.left = payment_id, times
        self.alone = 0

    def __call__(self, payment: Any, given: Any, **more: Any) -> Any:
        wanted = given.command.payment_id if hasattr(given, "command") else given.payment_id
        if wanted == self.payment_id and self.left:
            self.left -= 1
            raise RuntimeError("a defect that heals")
        return decide(payment, given, **more)


async def park(settings: Settings, *messages: tuple[bytes | None, bytes | None]) -> None:
    """Have these read by a worker, and parked."""
    async with running(settings):
        await send(settings.kafka_bootstrap, settings.commands_topic, *messages)
        await read_until(
            settings.kafka_bootstrap, settings.dead_letter_topic, lambda found: len(found) >= len(messages)
        )


async def until_parked(settings: Settings, count: int) -> None:
    await read_until(settings.kafka_bootstrap, settings.dead_letter_topic, lambda found: len(found) >= count)


async def letters(settings: Settings) -> list[Any]:
    log = DeadLetterLog(settings.kafka_bootstrap, settings.dead_letter_topic)
    return [letter async for letter in log.letters()]


async def in_thread(call: Any, *arguments: Any, **more: Any) -> Any:
    return await asyncio.to_thread(call, *arguments, **more)


# --- before parking ---------------------------------------------------------------------------------------------------


async def test_what_heals_is_not_parked_and_its_payments_later_commands_wait_for_it(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, others = new_payment_id(), [new_payment_id() for _ in range(20)]
    # Ten times: the bisection of the whole batch alone meets it some six times.
    monkeypatch.setattr(write_path_module, "decide", Failing(slow, 10))
    before = REGISTRY.get_sample_value("payments_command_retries_total") or 0
    batch = [(str(slow).encode(), body("authorize", slow, "a"))]
    batch += [(str(each).encode(), body("charge", each, f"k-{each}")) for each in others]
    batch += [(str(slow).encode(), body("capture", slow, "c"))]
    await send(settings.kafka_bootstrap, settings.commands_topic, *batch)
    async with running(settings):
        await until_captured(settings, 21)
    assert [event["type"] for event in await events_of(settings.postgres_url, slow)] == [
        "payment.authorized.v1",
        "payment.captured.v1",
    ]
    assert (REGISTRY.get_sample_value("payments_command_retries_total") or 0) > before
    assert await letters(settings) == []


async def test_what_does_not_heal_is_parked_and_a_retry_charges_once(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    poisoned, other = new_payment_id(), new_payment_id()
    settings = settings.model_copy(update={"retries_before_parking": 2})
    with monkeypatch.context() as patch:
        patch.setattr(write_path_module, "decide", Failing(poisoned, 10_000))
        await send(settings.kafka_bootstrap, settings.commands_topic, *(
            (str(each).encode(), body("charge", each, f"k-{each}")) for each in (poisoned, other)
        ))  # fmt: skip
        async with running(settings):
            await until_captured(settings, 1)
            await until_parked(settings, 1)
    (letter,) = await letters(settings)
    assert letter.reason == "cannot_be_processed"
    async with running(settings):
        for _ in range(2):
            done = await in_thread(payments_dlq, settings, "retry", str(letter.id), monkeypatch=monkeypatch)
            assert done.exit_code == 0, done.output
        await until_captured(settings, 2)
        await read_until(settings.kafka_bootstrap, settings.commands_topic, lambda found: len(found) >= 4)
    assert await value(settings.postgres_url, "SELECT count(*) FROM operations") == 2
    listed = await in_thread(payments_dlq, settings, "list", monkeypatch=monkeypatch)
    assert "No dead letters." in listed.output


# --- afterwards -------------------------------------------------------------------------------------------------------


async def test_letters_are_listed_shown_and_dropped(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    await park(
        settings, (b"k1", UNREADABLE), (None, b'{"type":"payment.unknown.v9"}'), (b"k3", b"\x1b[31m 4242424242424242")
    )
    listed = await in_thread(payments_dlq, settings, "list", "--json", monkeypatch=monkeypatch)
    rows = [json.loads(line) for line in listed.output.splitlines()]
    assert {row["reason"] for row in rows} == {"not_utf8", "unknown_type", "not_json"}
    assert "4242424242424242" not in listed.output
    assert "\x1b" not in (await in_thread(payments_dlq, settings, "list", monkeypatch=monkeypatch)).output
    name = next(row["letter"] for row in rows if row["key"] == "k1")
    shown = json.loads((await in_thread(payments_dlq, settings, "show", name, monkeypatch=monkeypatch)).output)
    assert bytes.fromhex(shown["hex"]) == UNREADABLE
    done = await in_thread(payments_dlq, settings, "drop", name, "--why", "rubbish", "--yes", monkeypatch=monkeypatch)
    assert done.exit_code == 0, done.output
    left = await in_thread(payments_dlq, settings, "list", "--json", monkeypatch=monkeypatch)
    assert len(left.output.splitlines()) == 2
    everything = await in_thread(payments_dlq, settings, "list", "--all", "--json", monkeypatch=monkeypatch)
    assert sorted(json.loads(line)["state"] for line in everything.output.splitlines()) == ["dropped", "open", "open"]


async def test_bytes_key_and_headers_come_back_as_they_came(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with AIOKafkaProducer(bootstrap_servers=settings.kafka_bootstrap) as producer:
        await producer.send_and_wait(settings.commands_topic, value=UNREADABLE, key=None, headers=ODD_HEADERS)
    await park(settings)
    async with running(settings):
        await until_parked(settings, 1)
    done = await in_thread(payments_dlq, settings, "retry", "--reason", "not_utf8", monkeypatch=monkeypatch)
    assert "1 of 1 published again" in done.output
    records = await read_until(settings.kafka_bootstrap, settings.commands_topic, lambda found: len(found) >= 2)
    assert [(each.value, each.key, list(each.headers)) for each in records] == [(UNREADABLE, None, ODD_HEADERS)] * 2


async def test_thousands_of_letters_are_read_to_the_end(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = [("dlq_reason", b"not_json"), ("dlq_topic", b"t"), ("dlq_partition", b"0"), ("dlq_offset", b"1")]
    async with AIOKafkaProducer(bootstrap_servers=settings.kafka_bootstrap) as producer:
        for number in range(5000):
            await producer.send(settings.dead_letter_topic, value=b"x", key=str(number).encode(), headers=facts)
    assert len(await letters(settings)) == 5000
    listed = await in_thread(payments_dlq, settings, "list", "--limit", "10", monkeypatch=monkeypatch)
    assert "and more" in listed.output


@pytest.mark.parametrize(
    ("arguments", "advice"),
    [
        (("show", "nonsense"), "PARTITION:OFFSET"),
        (("show", "0:999999"), "there is no letter 0:999999"),
        (("retry",), "--all or --reason"),
        (("retry", "0:1", "--all"), "--all or --reason"),
    ],
)
async def test_wrong_use_says_what_to_do(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], advice: str
) -> None:
    done = await in_thread(payments_dlq, settings, *arguments, monkeypatch=monkeypatch)
    assert done.exit_code == 1
    assert advice in done.output
