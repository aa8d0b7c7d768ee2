"""Dead letters: a command that may still succeed is retried before it is parked; a retry republishes it unchanged."""

import asyncio
import json
import re
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from prometheus_client import REGISTRY
from structlog.testing import capture_logs
from typer.testing import CliRunner, Result

from app.cli import app
from app.dlq_desk import DeadLetterDesk
from app.processes import prepare
from app.settings import Settings
from domain.decide import decide
from domain.ports import DeadLetter
from handlers import batch as batch_module
from infra.kafka.access import KafkaAccess
from infra.kafka.dead_letter_log import DeadLetterLog
from infra.kafka.dead_letters import KafkaDeadLetters, dead_letter_producer
from infra.kafka.topics import ensure_topics, has_topic
from infra.postgres.letters import LetterDecisions
from tests.conftest import PARTITIONS
from tests.support.service import body, events_of, new_payment_id, value
from tests.support.topic import read_until, send
from tests.support.waiting import until
from tests.support.workers import UNREADABLE, committed, running, until_captured

PARKED_AT = datetime(2026, 3, 1, tzinfo=UTC)
ODD_HEADERS = [("trace", b"\xff\xfe"), ("x", b"")]


def payments_dlq(settings: Settings, *arguments: str, monkeypatch: pytest.MonkeyPatch) -> Result:
    """`payments dlq …` in this process: the runner runs in a thread, where the command has its own event loop."""
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
    """A `decide` that fails on one payment a given number of times, whatever else is in the batch."""

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
    """Let a worker read these messages and park them."""
    async with running(settings):
        await send(settings.kafka_bootstrap, settings.commands_topic, *messages)
        await read_until(
            settings.kafka_bootstrap, settings.dead_letter_topic, lambda found: len(found) >= len(messages)
        )


async def until_parked(settings: Settings, count: int) -> None:
    await read_until(settings.kafka_bootstrap, settings.dead_letter_topic, lambda found: len(found) >= count)


async def letters(settings: Settings) -> list[Any]:
    log = DeadLetterLog(settings.kafka, settings.dead_letter_topic)
    return [letter async for letter in log.letters()]


async def in_thread(call: Any, *arguments: Any, **more: Any) -> Any:
    return await asyncio.to_thread(call, *arguments, **more)


def facts(
    settings: Settings, *, topic: str | None = None, partition: int = 0, offset: int = 1
) -> list[tuple[str, bytes]]:
    """Our headers, as a worker writes them."""
    texts = {"reason": "not_json", "detail": "", "topic": topic or settings.commands_topic}
    texts |= {"partition": str(partition), "offset": str(offset)}
    return [(f"dlq_{name}", text.encode()) for name, text in texts.items()]


async def put(
    settings: Settings, text: bytes | None, *, headers: list[tuple[str, bytes]], key: bytes | None = None
) -> str:
    """Write a letter directly to the dead-letter topic; returns its name."""
    async with AIOKafkaProducer(bootstrap_servers=settings.kafka_bootstrap) as producer:
        sent = await producer.send_and_wait(settings.dead_letter_topic, value=text, key=key, headers=headers)
    return f"{sent.partition}:{sent.offset}"


async def is_waiting_for_a_lock(postgres_url: str) -> bool:
    return bool(await value(postgres_url, "SELECT count(*) FROM pg_locks WHERE NOT granted"))


LETTER = DeadLetter(
    value=b"", key=b"key", headers=(), topic="commands", partition=0, offset=0, reason="not_json", detail=""
)


async def test_a_letter_that_the_topic_refuses_holds_up_no_later_one_of_its_partition(settings: Settings) -> None:
    topic = f"{settings.dead_letter_topic}.small"
    admin = AIOKafkaAdminClient(bootstrap_servers=settings.kafka_bootstrap)
    await admin.start()
    await admin.create_topics([NewTopic(topic, 1, 1, topic_configs={"max.message.bytes": "1200"})])
    async with dead_letter_producer(settings.kafka) as producer:
        parking = KafkaDeadLetters(producer, topic=topic)
        for offset, size in enumerate([10, 5_000, 10, 5_000, 10]):
            letter = replace(LETTER, value=b"x" * size, offset=offset)
            async with asyncio.timeout(10):
                await parking.park([letter])
    parked = await read_until(settings.kafka_bootstrap, topic, lambda found: len(found) >= 5)
    assert [len(each.value or b"") for each in parked] == [10, 0, 10, 0, 10]
    await admin.delete_topics([topic])
    await admin.close()


async def told_limits(settings: Settings) -> list[dict[str, str]]:
    """The limits of the dead-letter topic that `payments migrate` logs."""
    with capture_logs() as logs:
        await prepare(settings)
    return [each["limits"] for each in logs if each.get("topic") == settings.dead_letter_topic]


async def test_letters_are_kept_and_a_topic_from_before_that_loses_them_is_told(settings: Settings) -> None:
    topic = f"{settings.dead_letter_topic}.own"
    settings = settings.model_copy(update={"dead_letter_topic": topic})
    admin = AIOKafkaAdminClient(bootstrap_servers=settings.kafka_bootstrap)
    await admin.start()
    assert await told_limits(settings) == await told_limits(settings) == []
    await admin.alter_configs([ConfigResource(ConfigResourceType.TOPIC, topic, {"retention.ms": "86400000"})])

    async def is_told() -> bool:
        return await told_limits(settings) == [{"retention.ms": "86400000"}]

    await until(is_told, timeout_seconds=20)
    await admin.delete_topics([topic])
    await admin.close()


# --- before parking ---------------------------------------------------------------------------------------------------


async def test_a_command_that_heals_is_not_parked_and_its_payments_later_commands_wait_for_it(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, others = new_payment_id(), [new_payment_id() for _ in range(20)]
    # Ten failures, because the bisection of the whole batch alone causes about six.
    monkeypatch.setattr(batch_module, "decide", Failing(slow, 10))
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


async def test_a_command_that_does_not_heal_is_parked_and_a_retry_charges_once(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    poisoned, other = new_payment_id(), new_payment_id()
    settings = settings.model_copy(update={"retries_before_parking": 2})
    with monkeypatch.context() as patch:
        patch.setattr(batch_module, "decide", Failing(poisoned, 10_000))
        await send(settings.kafka_bootstrap, settings.commands_topic, *(
            (str(each).encode(), body("charge", each, f"k-{each}")) for each in (poisoned, other)
        ))  # fmt: skip
        async with running(settings):
            await until_captured(settings, 1)
            await until_parked(settings, 1)
    (letter,) = await letters(settings)
    assert letter.reason == "cannot_be_processed"
    async with running(settings):
        for again in ([], ["--again"]):
            done = await in_thread(payments_dlq, settings, "retry", str(letter.id), *again, monkeypatch=monkeypatch)
            assert done.exit_code == 0, done.output
        await until_captured(settings, 2)
        await read_until(settings.kafka_bootstrap, settings.commands_topic, lambda found: len(found) >= 4)
    assert await value(settings.postgres_url, "SELECT count(*) FROM operations") == 2
    listed = await in_thread(payments_dlq, settings, "list", monkeypatch=monkeypatch)
    assert "No dead letters." in listed.output


async def test_every_command_of_a_payment_that_always_fails_is_parked_in_order(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    poisoned, other = new_payment_id(), new_payment_id()
    settings = settings.model_copy(update={"retries_before_parking": 1})
    monkeypatch.setattr(batch_module, "decide", Failing(poisoned, 10_000))
    commands = [body("authorize", poisoned, "a"), *(body("capture", poisoned, f"c{number}") for number in range(5))]
    batch = [(str(poisoned).encode(), each) for each in commands]
    await send(settings.kafka_bootstrap, settings.commands_topic, *batch, (b"other", body("charge", other, "o")))
    async with running(settings):
        await until_captured(settings, 1)
        await until_parked(settings, len(commands))
    assert [letter.value for letter in await letters(settings)] == commands
    assert await committed(settings) == len(commands) + 1


# --- afterwards -------------------------------------------------------------------------------------------------------


async def test_a_misspelt_reason_is_told_with_those_that_there_are(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    for command in ("list", "retry", "drop --why x --yes"):
        told = await in_thread(payments_dlq, settings, *command.split(), "--reason", "not_jsn", monkeypatch=monkeypatch)
        assert told.exit_code == 1
        assert "'not_jsn' is not a reason; use one of: empty, " in told.output


async def test_letters_are_listed_shown_and_dropped(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    await park(
        settings, (b"k1", UNREADABLE), (None, b'{"type":"payment.unknown.v9"}'), (b"k3", b"\x1b[31m 4242424242424242")
    )
    listed = await in_thread(payments_dlq, settings, "list", "--json", monkeypatch=monkeypatch)
    rows = json.loads(listed.output)
    assert {row["reason"] for row in rows} == {"not_utf8", "unknown_type", "not_json"}
    assert all(re.fullmatch(r"20[0-9-]{8}T[0-9:.]+Z", row["parked_at"]) for row in rows)
    assert "4242424242424242" not in listed.output
    table = (await in_thread(payments_dlq, settings, "list", monkeypatch=monkeypatch)).output
    assert "\x1b" not in table
    assert "parked at" in table
    assert re.search(r" 20[0-9-]{8} [0-9:]{8}Z ", table)
    name = next(row["letter"] for row in rows if row["key"] == "k1")
    shown = json.loads((await in_thread(payments_dlq, settings, "show", name, monkeypatch=monkeypatch)).output)
    assert bytes.fromhex(shown["hex"]) == UNREADABLE
    asked = await in_thread(payments_dlq, settings, "drop", name, "--why", "rubbish", monkeypatch=monkeypatch)
    assert (asked.exit_code, "nobody can answer here: use --yes" in asked.output) == (1, True)
    done = await in_thread(payments_dlq, settings, "drop", name, "--why", "rubbish", "--yes", monkeypatch=monkeypatch)
    assert done.exit_code == 0, done.output
    left = await in_thread(payments_dlq, settings, "list", "--json", monkeypatch=monkeypatch)
    assert len(json.loads(left.output)) == 2
    everything = await in_thread(payments_dlq, settings, "list", "--all", "--json", monkeypatch=monkeypatch)
    assert sorted(row["state"] for row in json.loads(everything.output)) == ["dropped", "open", "open"]


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


async def test_letters_are_published_again_as_they_lie_however_they_are_named(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In reverse order, a capture would come before its authorization and be refused for good."""
    names = [await put(settings, each, key=b"pay", headers=facts(settings)) for each in (b"first", b"second")]
    await in_thread(payments_dlq, settings, "retry", *reversed(names), monkeypatch=monkeypatch)
    records = await read_until(settings.kafka_bootstrap, settings.commands_topic, lambda found: len(found) >= 2)
    assert [each.value for each in records] == [b"first", b"second"]


async def test_thousands_of_letters_are_read_to_the_end(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    where = facts(settings)
    async with AIOKafkaProducer(bootstrap_servers=settings.kafka_bootstrap) as producer:
        for number in range(5000):
            await producer.send(settings.dead_letter_topic, value=b"x", key=str(number).encode(), headers=where)
    assert len(await letters(settings)) == 5000
    listed = await in_thread(payments_dlq, settings, "list", "--limit", "10", monkeypatch=monkeypatch)
    assert "and more" in listed.output


async def test_a_message_that_no_worker_parked_breaks_no_listing_and_is_refused(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    foreign = await put(settings, b"foreign", headers=[("dlq_partition", b"no number")])
    ours = await put(settings, b"ours", headers=facts(settings))
    listed = await in_thread(payments_dlq, settings, "list", "--json", monkeypatch=monkeypatch)
    assert {row["letter"] for row in json.loads(listed.output)} == {foreign, ours}
    done = await in_thread(payments_dlq, settings, "retry", "--all", monkeypatch=monkeypatch)
    assert done.exit_code == 1
    assert "1 of 2 published again" in done.output
    assert f"letter {foreign} does not say where it came from" in done.output


async def test_a_card_number_is_not_shown_because_it_was_cut(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    await put(settings, b"x" * 44 + b" 4242424242424242 and more", headers=facts(settings))
    for arguments in (["list"], ["list", "--json"]):
        listed = await in_thread(payments_dlq, settings, *arguments, monkeypatch=monkeypatch)
        assert "card number removed" in listed.output
        assert "42424242" not in listed.output


async def test_a_value_that_was_left_out_comes_back_from_its_source_with_its_headers(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with AIOKafkaProducer(bootstrap_servers=settings.kafka_bootstrap) as producer:
        sent = await producer.send_and_wait(settings.commands_topic, b"large", key=b"k", headers=ODD_HEADERS)
    where = facts(settings, partition=sent.partition, offset=sent.offset)
    name = await put(settings, None, key=b"k", headers=[*where, ("dlq_value_left_out", b"5")])
    done = await in_thread(payments_dlq, settings, "retry", name, monkeypatch=monkeypatch)
    assert done.exit_code == 0, done.output
    records = await read_until(settings.kafka_bootstrap, settings.commands_topic, lambda found: len(found) >= 2)
    assert [(each.value, each.key, list(each.headers)) for each in records] == [(b"large", b"k", ODD_HEADERS)] * 2


@pytest.mark.parametrize("left_out", [b"4", b"5"])
@pytest.mark.parametrize("topic", ["the source", "gone.topic"])
async def test_a_value_that_is_nowhere_is_refused_and_stays_open(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, topic: str, left_out: bytes
) -> None:
    """The source topic is gone, or it has lost the message, or has a message of another size at that offset."""
    source = settings.commands_topic if topic == "the source" else topic
    async with AIOKafkaProducer(bootstrap_servers=settings.kafka_bootstrap) as producer:
        await producer.send_and_wait(settings.commands_topic, b"other one", key=b"k", partition=0)
    where = facts(settings, topic=source, partition=0, offset=0)
    name = await put(settings, None, key=b"k", headers=[*where, ("dlq_value_left_out", left_out)])
    done = await in_thread(payments_dlq, settings, "retry", name, monkeypatch=monkeypatch)
    assert done.exit_code == 1
    assert "they no longer stand at" in done.output.replace("\n", " ")
    listed = await in_thread(payments_dlq, settings, "list", "--json", monkeypatch=monkeypatch)
    assert [row["state"] for row in json.loads(listed.output)] == ["open"]


async def test_of_two_operators_only_one_decides_and_a_crash_decides_nothing(settings: Settings) -> None:
    letter, topic, url = (0, 7), settings.dead_letter_topic, settings.postgres_url
    async with LetterDecisions.connect(url, topic) as first, LetterDecisions.connect(url, topic) as second:

        async def claim_second() -> bool:
            async with second.claim(letter, "retried", parked_at=PARKED_AT, seen=None) as is_ours:
                return is_ours

        async def crash() -> None:
            async with first.claim(letter, "retried", parked_at=PARKED_AT, seen=None):
                raise RuntimeError("crash")

        with pytest.raises(RuntimeError, match="crash"):
            await crash()
        assert await first.all() == {}
        async with first.claim(letter, "retried", parked_at=PARKED_AT, seen=None) as is_ours:
            assert is_ours
            waiting = asyncio.create_task(claim_second())
            await until(lambda: is_waiting_for_a_lock(url))
            assert not waiting.done()
        assert await waiting is False
        seen = (await second.all())[letter]
        async with second.claim(letter, "dropped", parked_at=PARKED_AT, seen=seen, why="seen") as is_ours:
            assert is_ours
        assert (await first.all())[letter].name == "dropped"


async def test_a_retry_of_all_letters_says_so_if_there_are_none(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = await in_thread(payments_dlq, settings, "retry", "--all", monkeypatch=monkeypatch)
    assert (done.exit_code, done.output) == (0, "No open letter matches.\n")


async def test_a_claim_outlasts_the_servers_limit_of_idle_transactions(settings: Settings) -> None:
    """Kafka may take long while a letter is claimed."""
    letter, url = (0, 7), settings.postgres_url
    await value(url, f"ALTER DATABASE {url.rsplit('/', 1)[1]} SET idle_in_transaction_session_timeout = '200ms'")
    async with LetterDecisions.connect(url, settings.dead_letter_topic) as decisions:
        async with decisions.claim(letter, "retried", parked_at=PARKED_AT, seen=None):
            await asyncio.sleep(0.5)
        assert (await decisions.all())[letter].name == "retried"


async def test_a_letter_that_another_operator_has_decided_about_is_not_published(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = await put(settings, b"v", headers=facts(settings))
    desk = DeadLetterDesk(settings)
    chosen = await in_thread(desk.choose, [name], reason=None)
    dropped = await in_thread(payments_dlq, settings, "drop", name, "--why", "mine", "--yes", monkeypatch=monkeypatch)
    assert dropped.exit_code == 0, dropped.output
    assert await desk._retry_all(chosen, is_named=True) == 0
    assert await value(settings.postgres_url, "SELECT decision FROM dead_letter_decisions") == "dropped"
    async with AIOKafkaConsumer(bootstrap_servers=settings.kafka_bootstrap) as consumer:
        places = [TopicPartition(settings.commands_topic, number) for number in range(8)]
        assert set((await consumer.end_offsets(places)).values()) == {0}


async def test_an_earlier_dead_letter_decision_is_reported_and_kept(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, other = [await put(settings, b"v", headers=facts(settings)) for _ in range(2)]
    await in_thread(payments_dlq, settings, "drop", name, "--why", "a [test]", "--yes", monkeypatch=monkeypatch)
    for command in (["retry", name], ["drop", name, other, "--why", "mine", "--yes"]):
        told = await in_thread(payments_dlq, settings, *command, monkeypatch=monkeypatch)
        assert told.exit_code == 1
        assert f"{name} was dropped already: a [test] (20" in told.output
    decisions = "SELECT string_agg(decision || ' ' || why, ', ' ORDER BY why) FROM dead_letter_decisions"
    assert await value(settings.postgres_url, decisions) == "dropped a [test], dropped mine"
    done = await in_thread(payments_dlq, settings, "retry", name, "--again", monkeypatch=monkeypatch)
    assert (done.exit_code, "1 of 1 published again" in done.output) == (0, True), done.output
    told = await in_thread(payments_dlq, settings, "drop", name, "--why", "late", "--yes", monkeypatch=monkeypatch)
    assert f"{name} was retried already (20" in told.output


async def make_anew(bootstrap: str, topic: str) -> None:
    """Delete the topic with everything in it, and create an empty one of the same name."""

    async def is_gone() -> bool:
        return not await has_topic(KafkaAccess(bootstrap), topic)

    admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap)
    await admin.start()
    await admin.delete_topics([topic])
    await until(is_gone)
    await ensure_topics(KafkaAccess(bootstrap), {topic: PARTITIONS})
    await admin.close()


async def test_a_letter_in_the_place_of_one_on_a_topic_that_is_gone_is_open(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    for command in (["drop", "--why", "old", "--yes"], ["retry"], ["drop", "--why", "new", "--yes"]):
        name = await put(settings, b"v", key=b"k", headers=facts(settings))
        rows = json.loads((await in_thread(payments_dlq, settings, "list", "--json", monkeypatch=monkeypatch)).output)
        assert [(row["letter"], row["state"]) for row in rows] == [(name, "open")]
        done = await in_thread(payments_dlq, settings, *command, name, monkeypatch=monkeypatch)
        assert (done.exit_code, "1 of 1" in done.output) == (0, True), done.output
        left = await in_thread(payments_dlq, settings, "list", monkeypatch=monkeypatch)
        assert "No dead letters." in left.output
        await make_anew(settings.kafka_bootstrap, settings.dead_letter_topic)


async def test_dead_letter_decisions_of_the_previous_release_still_count(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    partition, offset = (await put(settings, b"v", headers=facts(settings))).split(":")
    note = """INSERT INTO dead_letter_decisions (topic, "partition", "offset", decision)
              VALUES ($1, $2, $3, 'dropped') RETURNING true"""
    assert await value(settings.postgres_url, note, settings.dead_letter_topic, int(partition), int(offset))
    listed = await in_thread(payments_dlq, settings, "list", monkeypatch=monkeypatch)
    assert "No dead letters." in listed.output


async def test_to_drop_what_is_not_there_is_not_asked_about(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = await in_thread(payments_dlq, settings, "drop", "--all", "--why", "rubbish", monkeypatch=monkeypatch)
    assert (done.exit_code, done.output) == (0, "Nothing to drop.\n")


async def test_hundreds_are_published_again_in_the_order_of_each_key(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = facts(settings)
    async with AIOKafkaProducer(bootstrap_servers=settings.kafka_bootstrap) as producer:
        for number in range(400):
            key, text = str(number % 7).encode(), str(number).encode()
            await producer.send(settings.dead_letter_topic, value=text, key=key, headers=where)
    done = await in_thread(payments_dlq, settings, "retry", "--all", monkeypatch=monkeypatch)
    assert "400 of 400 published again" in done.output
    records = await read_until(settings.kafka_bootstrap, settings.commands_topic, lambda found: len(found) >= 400)
    for key in {each.key for each in records}:
        numbers = [int(each.value) for each in records if each.key == key]
        assert numbers == sorted(numbers)


@pytest.mark.parametrize(
    ("arguments", "advice"),
    [
        (("show", "nonsense"), "PARTITION:OFFSET"),
        (("show", "0:999999"), "there is no letter 0:999999"),
        (("retry",), "--all or --reason"),
        (("retry", "0:1", "--all"), "--all or --reason, not both"),
        (("retry", "--all", "--again"), "needs named letters"),
        (("drop", "--all", "--why", " ", "--yes"), "--why must say why"),
    ],
)
async def test_wrong_use_says_what_to_do(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], advice: str
) -> None:
    done = await in_thread(payments_dlq, settings, *arguments, monkeypatch=monkeypatch)
    assert done.exit_code == 1
    assert advice in done.output
