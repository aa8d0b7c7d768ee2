"""`payments relay …` against a running relay: what an operator types at night, and what the command answers."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from typer.testing import CliRunner

from app import relay_desk, relay_troubles
from app.cli import app
from app.relay_troubles import troubles_of
from app.settings import Settings
from infra.kafka.access import KafkaAccess
from infra.kafka.topics import ensure_topics
from infra.local import EmbeddedPostgres, StackUrls, create_database, drop_database, postgres
from infra.postgres.maintenance import maintain
from infra.relay import Relay, RelayConfig, metrics
from infra.relay.leadership import LEADERSHIP, lock_key
from infra.relay.progress.gaps import lost_by_kafka
from infra.relay.publish.replay import HEADER, EventReplay, Selection
from infra.relay.status import read_status
from infra.relay.wal.stream import ReplicationStream
from tests.conftest import PARTITIONS, Topics
from tests.support.outbox import (
    Row,
    assert_first_deliveries_in_order,
    commit,
    fetch_value,
    ids,
    insert,
    open_transaction,
    rows_of,
    set_database,
)
from tests.support.relays import (
    ADVANCE,
    CREATE,
    DROP,
    StandingStill,
    is_all_proven,
    poisoned_payment,
    published,
    running,
    set_topic_limit,
    wal_only,
)
from tests.support.topic import read_until
from tests.support.waiting import until

ROOT = Path(__file__).resolve().parents[2]


def environment_of(config: RelayConfig) -> dict[str, str]:
    """The environment with which `payments relay …` finds this relay."""
    return {
        "PAYMENTS_POSTGRES_URL": config.postgres_url,
        "PAYMENTS_KAFKA_BOOTSTRAP": config.kafka.bootstrap,
        "PAYMENTS_EVENTS_TOPIC": config.topic,
        "PAYMENTS_RELAY_SLOT": config.slot,
    }


async def payments_relay(config: RelayConfig, *arguments: str, columns: int = 200) -> subprocess.CompletedProcess[str]:
    environment = os.environ | environment_of(config) | {"COLUMNS": str(columns)}
    command = [sys.executable, "-m", "app.cli", "relay", *arguments]
    return await asyncio.to_thread(
        subprocess.run, command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False
    )


async def started(config: RelayConfig, *arguments: str) -> asyncio.subprocess.Process:
    """A command that is still running, for the test to stop."""
    command = [sys.executable, "-m", "app.cli", "relay", *arguments]
    environment = os.environ | environment_of(config) | {"COLUMNS": "200"}
    return await asyncio.create_subprocess_exec(*command, cwd=ROOT, env=environment, stdout=subprocess.PIPE)


async def proven(config: RelayConfig, *rows: Row) -> None:
    """Wait until the relay has saved the proof that these rows are published."""
    await published(config, *rows)
    query = "SELECT (SELECT max(xact) FROM outbox) < published_below FROM relay_slots WHERE slot_name = %s"
    await until(lambda: fetch_value(config.postgres_url, query, config.slot))


async def test_status_tells_how_it_is(config: RelayConfig) -> None:
    never = await payments_relay(config, "status")
    assert "No relay has ever run" in never.stdout
    async with running(config):
        await commit(config.postgres_url, rows_of("pay_a", 3))
        done = await payments_relay(config, "status", "--json")
        status: dict[str, Any] = json.loads(done.stdout)
        assert (done.returncode, status["troubles"]) == (0, [])
        (relay,) = status["relays"]
        assert (relay["slot"], relay["source"], relay["is_running"]) == (config.slot, config.source, True)
        async with running_standby(config):
            standing = json.loads((await payments_relay(config, "status", "--json")).stdout)
            assert standing["relays"][0]["standbys"] == 1
    off = await payments_relay(config, "status")
    assert off.returncode == 1
    assert "no relay is active" in off.stdout


@wal_only
async def test_status_tells_of_a_relay_that_leads_and_cannot_read(config: RelayConfig) -> None:
    async with running(config):
        pass

    async def is_told() -> bool:
        return any("its relay reads nothing" in each for each in troubles_of(await read_status(config.postgres_url)))

    stop = asyncio.Event()
    trying = asyncio.create_task(Relay(replace(config, topic=f"{config.topic}.missing")).run(stop))
    await until(is_told)
    stop.set()
    await trying
    assert not await is_told()


def running_standby(config: RelayConfig) -> Any:
    class Standby:
        async def __aenter__(self) -> Relay:
            self.stop = asyncio.Event()
            relay = Relay(config)
            self.task = asyncio.create_task(relay.run(self.stop))
            await until(lambda: relay.health.detail == "standby")
            return relay

        async def __aexit__(self, *exception: object) -> None:
            self.stop.set()
            await self.task

    return Standby()


@wal_only
async def test_status_names_a_slot_that_keeps_log_for_nobody(
    config: RelayConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(relay_troubles, "HELD_FOR_NOBODY", 0)
    desk = relay_desk.RelayDesk(Settings(postgres_url=config.postgres_url, relay_slot=config.slot))
    old = f"{config.slot}_old"
    async with running(config):
        assert await asyncio.to_thread(desk.status, as_json=True) == 0
        capsys.readouterr()
        await fetch_value(config.postgres_url, CREATE, old)
        await commit(config.postgres_url, rows_of("pay_a", 3))
        assert await asyncio.to_thread(desk.status, as_json=True) == 1
        told = capsys.readouterr().out
    status = json.loads(told[told.index("{") : told.rindex("}") + 1])
    assert [each["slot"] for each in status["strangers"]] == [old]
    (trouble,) = status["troubles"]
    assert trouble.startswith(f"slot {old} keeps ")
    assert trouble.endswith(f"if its reader is off for good, SELECT pg_drop_replication_slot('{old}')")
    await fetch_value(config.postgres_url, DROP, old)


@wal_only
async def test_status_names_the_slot_that_a_poll_has_left_behind(config: RelayConfig) -> None:
    """The WAL that this slot retains does not count as the polling relay's lag."""
    async with running(replace(config, source="wal")):
        await commit(config.postgres_url, rows_of("pay_a", 3))
    metrics.LAG_BYTES.set(0)
    async with running(replace(config, source="poll")):
        await commit(config.postgres_url, rows_of("pay_b", 3))
        retained = metrics.RETAINED_BYTES.labels(config.slot)._value
        await until(lambda: retained.get() > 0)
        status = await payments_relay(config, "status", "--json")
        told = json.loads(status.stdout)
        assert metrics.LAG_BYTES._value.get() == 0
    assert status.returncode == 1
    assert f"SELECT pg_drop_replication_slot('{config.slot}')" in told["troubles"][0]
    assert told["relays"][0]["lag_bytes"] is None


async def test_a_standby_that_goes_round_stays_ready(config: RelayConfig) -> None:
    async with running(config), running_standby(replace(config, stalled_seconds=0.5)) as standby:
        await asyncio.sleep(1.2)
        assert standby.health == (True, "standby")


@wal_only
async def test_a_repair_that_lasts_says_how_long_and_who_is_at_it(
    config: RelayConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async with running(config):
        await commit(config.postgres_url, rows_of("pay_a", 3))
    monkeypatch.setattr(relay_desk, "SAY_EVERY_SECONDS", 0.5)
    desk = relay_desk.RelayDesk(Settings(postgres_url=config.postgres_url, relay_slot=config.slot))
    waited = await asyncio.to_thread(desk.repair, everything=False, dry_run=False, limit=20, timeout_seconds=2.0)
    assert waited == 1
    assert "1 s: no relay is working on it yet" in capsys.readouterr().out


@wal_only
async def test_repair_says_what_it_would_do_and_does_it(config: RelayConfig) -> None:
    rows = rows_of("pay_a", 5)
    async with running(config):
        refused = await payments_relay(config, "repair")
        assert (refused.returncode, "is active, or is trying to be" in refused.stdout) == (1, True), "nothing to mend"
    await fetch_value(config.postgres_url, DROP, config.slot)
    await commit(config.postgres_url, rows)
    async with StandingStill(config):
        status = await payments_relay(config, "status")
        assert status.returncode == 1
        assert "the slot has disappeared" in status.stdout
        dry = await payments_relay(config, "repair", "--dry-run", "--limit", "4")
        assert "5 retained events have no proof" in dry.stdout
        assert [str(row.id) in dry.stdout for row in rows] == [True] * 4 + [False]
        assert "--limit shows more than 4" in dry.stderr
        done = await payments_relay(config, "repair")
        assert (done.returncode, "done: 5 events published" in done.stdout) == (0, True)
        assert ids(await published(config, *rows)) == [row.id for row in rows]


@pytest.mark.parametrize("source", ["poll"], indirect=True)
async def test_a_poll_that_is_repaired_publishes_afterwards_and_is_told_of_no_standbys(config: RelayConfig) -> None:
    rows = rows_of("pay_a", 5)
    async with running(config):
        await commit(config.postgres_url, rows)
        await published(config, *rows)
    await fetch_value(config.postgres_url, "UPDATE relay_slots SET system_identifier = '1' RETURNING 1")
    long_ago = "UPDATE outbox SET created_at = now() - interval '1 hour' RETURNING 1"
    await fetch_value(config.postgres_url, long_ago)
    async with StandingStill(config):
        told = json.loads((await payments_relay(config, "status", "--json")).stdout)
        assert [each for each in told["troubles"] if each.endswith("s: check that Kafka can be reached")]
        adopted = await payments_relay(config, "adopt")
        assert (adopted.returncode, "not done, the relay stands still" in adopted.stdout) == (1, True)
        done = await payments_relay(config, "repair")
        assert done.returncode == 0
        assert "done: the events to be repeated are published from here on; the relay goes on" in done.stdout
        await read_until(config.kafka.bootstrap, config.topic, lambda found: len(found) == 2 * len(rows))


async def test_the_reported_work_of_a_relay_matches_the_request(
    config: RelayConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async with running(config):
        await commit(config.postgres_url, rows_of("pay_a", 3))
    monkeypatch.setattr(relay_desk, "SAY_EVERY_SECONDS", -1)  # At every look.
    desk = relay_desk.RelayDesk(Settings(postgres_url=config.postgres_url, relay_slot=config.slot))
    await fetch_value(config.postgres_url, "UPDATE relay_slots SET gap = 'of a test' RETURNING 1")
    async with await psycopg.AsyncConnection.connect(config.postgres_url) as leader:
        await leader.execute("SELECT pg_advisory_lock(%s, %s)", lock_key(LEADERSHIP, config.slot))
        await asyncio.to_thread(desk.adopt, timeout_seconds=0.5)
        adopting = capsys.readouterr().out
        await asyncio.to_thread(desk.repair, everything=False, dry_run=False, limit=20, timeout_seconds=0.5)
        repairing = capsys.readouterr().out
    assert re.search(r"s: a relay is working on it$", adopting, re.MULTILINE)
    assert ("a relay is working on it: it creates the slot again" in repairing) == (config.source == "wal")


async def test_quarantine_is_listed_shown_retried_and_dropped(config: RelayConfig) -> None:
    poisoned = poisoned_payment()
    other = [row._replace(key="pay_0009") for row in poisoned_payment()]
    async with running(config):
        await commit(config.postgres_url, poisoned, other)
        await published(config, poisoned[0], other[0])
        await until(lambda: fetch_value(config.postgres_url, "SELECT count(*) = 4 FROM relay_quarantine"))
        listed = await payments_relay(config, "quarantine", "list")
        assert "MessageSizeTooLarge" in listed.stdout
        assert "2000002" in listed.stdout
        shown = json.loads((await payments_relay(config, "quarantine", "show", str(poisoned[1].id))).stdout)
        assert shown[0]["payload"] == poisoned[1].payload
        again = await payments_relay(config, "quarantine", "retry", "pay_0001")
        assert (again.returncode, "0 published, 2 in quarantine again" in again.stdout) == (1, True)
        assert "refused: MessageSizeTooLargeError" in again.stdout
        assert "To do: raise the topic's max.message.bytes, and retry; or give up" in again.stdout
        listed = await payments_relay(config, "quarantine", "list", "--limit", "1", "--json")
        assert (len(json.loads(listed.stdout)), "and more" in listed.stderr) == (1, True)
        dropped = await payments_relay(config, "quarantine", "drop", str(other[1].id), "--why", "test", "--yes")
        assert (dropped.returncode, "1 of 1 dropped" in dropped.stdout) == (0, True)
        await published(config, other[2])
        await set_topic_limit(config, 5_000_000)
        await until(lambda: fetch_value(config.postgres_url, "SELECT count(*) = 3 FROM relay_quarantine"))
        retried = await payments_relay(config, "quarantine", "retry", "--all")
        assert (retried.returncode, "all published" in retried.stdout) == (0, True)
        records = await published(config, *poisoned, other[0], other[2])
        await proven(config, other[2])
        left_out = await payments_relay(config, "replay", "--payment", "pay_0009", "--dry-run")
        assert "2 events would be published" in left_out.stdout, "of three, but not what was dropped"
    assert [each for each in ids(records) if each in {row.id for row in poisoned}] == [row.id for row in poisoned]


@wal_only
async def test_the_ids_in_a_narrow_list_can_be_given_to_retry_and_drop(config: RelayConfig) -> None:
    poisoned = [row._replace(key="3f6b2a5e-8f5c-4a4e-9a3c-0123456789ab") for row in poisoned_payment()]
    async with running(config):
        await commit(config.postgres_url, poisoned)
        await until(lambda: fetch_value(config.postgres_url, "SELECT count(*) = 2 FROM relay_quarantine"))
        listed = await payments_relay(config, "quarantine", "list", columns=80)
    for row in poisoned[1:]:
        (line,) = [each for each in listed.stdout.splitlines() if str(row.id) in each]
        assert row.key in line


@wal_only
async def test_a_retry_is_done_when_what_was_asked_for_is_published(config: RelayConfig) -> None:
    poisoned = poisoned_payment()
    other = [row._replace(key="pay_0009", payload=f'"{"x" * 3_000_000}"') for row in poisoned_payment()[1:2]]
    async with running(config):
        await commit(config.postgres_url, poisoned, other)
        await until(lambda: fetch_value(config.postgres_url, "SELECT count(*) = 3 FROM relay_quarantine"))
        await set_topic_limit(config, 2_500_000)
        retried = await payments_relay(config, "quarantine", "retry", "pay_0001", "pay_mistyped")
        assert "requested 2 events: all published" in retried.stdout, retried.stdout
        assert (retried.returncode, "pay_mistyped" in retried.stdout, "pay_0001" in retried.stdout) == (1, True, False)
        await published(config, *poisoned)
        assert await fetch_value(config.postgres_url, "SELECT count(*) FROM relay_quarantine") == 1
        nothing = await payments_relay(config, "quarantine", "drop", "pay_0009", "--why", "test", "--yes")
        assert nothing.returncode == 1
        assert f"Nothing of that is in quarantine of relay '{config.slot}'" in nothing.stdout
        unknown = await payments_relay(config, "quarantine", "show", "pay_0008")
        assert (unknown.returncode, unknown.stdout, "Nothing of that" in unknown.stderr) == (1, "[]\n", True)


@wal_only
async def test_an_event_dropped_before_is_reported_with_its_reason(config: RelayConfig) -> None:
    poisoned = poisoned_payment()
    event = str(poisoned[1].id)
    async with running(config):
        await commit(config.postgres_url, poisoned)
        await until(lambda: fetch_value(config.postgres_url, "SELECT count(*) = 2 FROM relay_quarantine"))
        blank = await payments_relay(config, "quarantine", "drop", event, "--why", " ", "--yes")
        assert (blank.returncode, "--why must say why" in blank.stderr, blank.stdout) == (1, True, "")
        await payments_relay(config, "quarantine", "drop", event, "--why", "agreed", "--yes")
        await published(config, poisoned[2])
        for command in (["drop", event, "--why", "once more", "--yes"], ["retry", event], ["retry", "pay_0001"]):
            again = await payments_relay(config, "quarantine", *command)
            assert (again.returncode, again.stdout) == (1, f"{event} of pay_0001 was dropped before: agreed\n")
        mixed = await payments_relay(config, "quarantine", "retry", event, "pay_mistyped")
    assert f"{event} of pay_0001 was dropped before" in mixed.stdout
    assert "Nothing of that is in quarantine" in mixed.stdout


@wal_only
async def test_a_replay_to_a_topic_that_is_not_there_says_so_at_once(config: RelayConfig) -> None:
    rows = rows_of("pay_a", 3)
    async with running(config):
        await commit(config.postgres_url, rows)
        await proven(config, *rows)
    absent = f"{config.topic}.absent"
    started = time.monotonic()
    done = await payments_relay(config, "replay", "--payment", "pay_a", "--to", absent)
    assert (done.returncode, f"there is no topic {absent}: create it" in done.stderr) == (1, True), done.stderr
    assert len(done.stderr.splitlines()) < 5
    assert time.monotonic() - started < 15


async def test_a_replay_to_a_topic_that_takes_no_such_message_says_so(config: RelayConfig) -> None:
    (row,) = rows_of("pay_a", 1, payload=f'"{"x" * 2000}"')
    async with running(config):
        await commit(config.postgres_url, [row])
        await proven(config, row)
    await set_topic_limit(config, 1000)
    refused = await payments_relay(config, "replay", "--payment", "pay_a")
    assert refused.returncode == 1
    assert refused.stderr.endswith("The topic takes no message of that size: raise its max.message.bytes.\n")


async def test_a_replay_that_is_refused_in_the_middle_says_how_far_it_is_and_how_to_go_on(config: RelayConfig) -> None:
    copies, rows = f"{config.topic}.copies", rows_of("pay_a", 30)
    rows[25] = rows[25]._replace(payload=f'"{"x" * 2_000_000}"')
    await set_topic_limit(config, 5_000_000)
    await ensure_topics(config.kafka, {copies: PARTITIONS})
    async with running(config):
        await commit(config.postgres_url, *([row] for row in rows))
        await proven(config, *rows)
    refused = await payments_relay(config, "replay", "--payment", "pay_a", "--to", copies, "--rate", "100")
    assert refused.returncode == 1
    assert f"24 of 30 events published again to {copies}" in refused.stdout
    assert "To go on: the same command with --since" in refused.stdout
    assert refused.stderr.endswith("The topic takes no message of that size: raise its max.message.bytes.\n")


async def test_a_replay_is_marked_in_order_and_goes_where_it_is_told(config: RelayConfig) -> None:
    rows, others = rows_of("pay_a", 30), rows_of("pay_b", 5)
    copies = f"{config.topic}.replay"
    await ensure_topics(config.kafka, {copies: PARTITIONS})
    async with running(config):
        await commit(config.postgres_url, *([row] for row in rows), others)
        await proven(config, *rows, *others)
        dry = await payments_relay(config, "replay", "--payment", "pay_a", "--dry-run")
        assert "30 events would be published" in dry.stdout
        done = await payments_relay(config, "replay", "--payment", "pay_a", "--to", copies, "--rate", "1000")
        assert done.returncode == 0, done.stdout + done.stderr
        records = await read_until(config.kafka.bootstrap, copies, lambda found: len(found) >= 30)
    assert ids(records) == [row.id for row in rows]
    assert all(record.headers[-1][0] == HEADER for record in records)
    first = await published(config, *rows)
    assert all(HEADER not in dict(record.headers) for record in first)
    whole = await payments_relay(config, "replay", "--since", "1h", "--type", "payment.captured.v1", "--dry-run")
    assert "35 events would be published" in whole.stdout
    none = await payments_relay(config, "replay", "--until", "1h", "--dry-run")
    assert "0 events would be published" in none.stdout
    assert (await payments_relay(config, "replay")).returncode == 1
    nobody = await payments_relay(config, "replay", "--payment", "pay_c")
    assert (nobody.returncode, "Nothing to publish again" in nobody.stdout) == (1, True), nobody.stdout


@pytest.mark.parametrize("topic", ["payments.commands", "payments.commands.dlq"])
async def test_events_are_not_replayed_to_a_topic_of_commands(config: RelayConfig, topic: str) -> None:
    """Consumers of those topics cannot read an event."""
    refused = await payments_relay(config, "replay", "--payment", "pay_a", "--to", topic, "--dry-run")
    assert (refused.returncode, "that topic is for commands" in refused.stderr) == (1, True), refused.stderr


@wal_only
async def test_no_time_limit_of_the_database_cuts_a_replay(config: RelayConfig) -> None:
    rows = rows_of("pay_a", 30)
    async with running(config):
        await commit(config.postgres_url, rows)
        await proven(config, *rows)
    await set_database(config.postgres_url, "transaction_timeout = '500ms'")
    done = await payments_relay(config, "replay", "--payment", "pay_a", "--rate", "20")
    assert done.returncode == 0, done.stderr


@wal_only
async def test_a_throttled_replay_has_no_transaction_open_between_its_portions(config: RelayConfig) -> None:
    """Otherwise, for as long as the replay lasts, VACUUM removes nothing and no partition is created or dropped."""
    rows = rows_of("pay_a", 30)
    async with running(config):
        await commit(config.postgres_url, rows)
        await proven(config, *rows)
    replaying = await started(config, "replay", "--payment", "pay_a", "--rate", "1")
    await read_until(config.kafka.bootstrap, config.topic, lambda found: bool(replayed(found)))
    fetching = "FROM pg_stat_activity WHERE query LIKE 'FETCH %% \"replay\"%%' AND datname = current_database()"
    async with await psycopg.AsyncConnection.connect(config.postgres_url, autocommit=True) as connection:

        async def states() -> set[tuple[str, bool]]:
            found = await connection.execute(f"SELECT state, backend_xmin IS NULL {fetching}".encode(), [])
            return set(await found.fetchall())

        await until(states, timeout_seconds=10)
        seen = [await states() for _ in range(100)]
    report = await maintain(config.postgres_url, days_ahead=1, retention_days=14)
    replaying.send_signal(signal.SIGTERM)
    assert "of 30 events published again" in (await replaying.communicate())[0].decode()
    assert seen.count({("idle", True)}) > 90, "one portion at most was being fetched"
    assert (len(report.made), report.failed) == (2, ())


@wal_only
async def test_a_replay_keeps_to_its_rate(config: RelayConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """30 events at 10 per second take at least 2.9 s. The command runs in this process, so no process start counts."""
    rows = rows_of("pay_a", 30)
    async with running(config):
        await commit(config.postgres_url, rows)
        await proven(config, *rows)
    for name, value in environment_of(config).items():
        monkeypatch.setenv(name, value)
    started = time.monotonic()
    arguments = ["relay", "replay", "--payment", "pay_a", "--rate", "10"]
    done = await asyncio.to_thread(CliRunner().invoke, app, arguments)
    took = time.monotonic() - started
    assert (done.exit_code, "30 events published again" in done.output) == (0, True), done.output
    assert took >= 2.9
    again = (await read_until(config.kafka.bootstrap, config.topic, lambda found: len(found) >= 60))[30:]
    assert ids(again) == [row.id for row in rows]
    assert all(HEADER in dict(record.headers) for record in again)


@wal_only
@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
async def test_a_replay_that_is_told_to_end_says_how_far_it_is_and_how_to_go_on(
    config: RelayConfig, end: signal.Signals
) -> None:
    """Events of a long transaction were written before the events ahead of them; --since must not leave any out."""
    first, late, last = rows_of("pay_a", 3), rows_of("pay_b", 1), rows_of("pay_a", 20, first=4)
    rows = first + late + last
    async with running(config):
        async with await open_transaction(config.postgres_url) as long:
            await commit(config.postgres_url, *([row] for row in first))
            await insert(long, late)
        await commit(config.postgres_url, *([row] for row in last))
        await proven(config, *rows)
    replaying = await started(config, "replay", "--since", "1h", "--rate", "1")
    await read_until(config.kafka.bootstrap, config.topic, lambda found: bool(replayed(found)))
    replaying.send_signal(end)
    told = (await replaying.communicate())[0].decode()
    assert replaying.returncode == 1
    assert re.search(rf"^[1-9][0-9]* of {len(rows)} events published again", told, re.MULTILINE), told
    (since,) = re.findall(r"--since (\S+) instead of its own", told)
    went_on = await payments_relay(config, "replay", "--since", since)
    assert went_on.returncode == 0
    await read_until(config.kafka.bootstrap, config.topic, lambda found: len(set(ids(replayed(found)))) == len(rows))


async def test_a_replay_whose_last_event_was_dropped_from_the_outbox_still_tells_what_is_left(
    config: RelayConfig,
) -> None:
    """During a long replay, maintenance may drop partitions."""
    rows = rows_of("pay_a", 15)
    async with running(config):
        await commit(config.postgres_url, rows)
        await proven(config, *rows)
    replay = EventReplay(config, Selection(payment="pay_a"), topic=config.topic, rate=100)
    stop = asyncio.Event()
    await replay.run(lambda _: stop.set(), stop)
    assert replay.done == 10
    dropped = "DELETE FROM outbox WHERE payment_seq <= 10 RETURNING 1"
    await fetch_value(config.postgres_url, dropped)
    assert (await replay.remaining())[0] == 5


def replayed(records: list[Any]) -> list[Any]:
    return [record for record in records if HEADER in dict(record.headers)]


async def test_events_not_published_yet_are_not_replayed(config: RelayConfig) -> None:
    rows, later = rows_of("pay_a", 3), rows_of("pay_a", 4, first=4)
    async with running(config):
        await commit(config.postgres_url, rows)
        await proven(config, *rows)
    await commit(config.postgres_url, later)
    done = await payments_relay(replace(config), "replay", "--payment", "pay_a", "--dry-run")
    assert "3 events would be published" in done.stdout


@wal_only
async def test_adopt_refuses_a_slot_that_is_gone_and_withdraws_what_no_relay_took_up(config: RelayConfig) -> None:
    query = "SELECT repair IS NULL FROM relay_slots WHERE slot_name = %s"
    async with running(config):
        pass
    unanswered = await payments_relay(config, "adopt", "--timeout", "0.5")
    assert (unanswered.returncode, "withdrawn" in unanswered.stdout) == (1, True)
    assert await fetch_value(config.postgres_url, query, config.slot)
    await fetch_value(config.postgres_url, DROP, config.slot)
    async with StandingStill(config):
        refused = await payments_relay(config, "adopt")
    assert (refused.returncode, "the slot has disappeared" in refused.stdout) == (1, True)
    assert await fetch_value(config.postgres_url, query, config.slot)


@wal_only
@pytest.mark.parametrize("end", [signal.SIGHUP, signal.SIGTERM, signal.SIGKILL])
async def test_nobody_adopts_for_who_waits_no_more(config: RelayConfig, end: signal.Signals) -> None:
    """If the request stayed, a relay started much later would adopt a slot that nobody meant."""
    rows = rows_of("pay_a", 5)
    async with running(config):
        pass
    asking = await started(config, "adopt")
    await until(lambda: fetch_value(config.postgres_url, "SELECT repair = 'adopt' FROM relay_slots"))
    asking.send_signal(end)
    await asking.wait()
    await commit(config.postgres_url, rows)
    await fetch_value(config.postgres_url, ADVANCE, config.slot)
    async with StandingStill(config) as standing:
        assert "further on" in standing.relay.health.detail


@wal_only
async def test_a_slot_that_another_reads_from_is_told_and_not_adopted_under_its_feet(config: RelayConfig) -> None:
    async with running(config):
        await commit(config.postgres_url, rows_of("pay_a", 3))
    other = await ReplicationStream.connect(config.postgres_url)
    await other._connection.execute("SET application_name = 'Debezium'")
    await other.start(config.slot, config.publication, 0)
    async with running_standby(config):
        status = await payments_relay(config, "status")
        assert status.returncode == 1
        assert "somebody else reads from its slot" in status.stdout
        adopt = await payments_relay(config, "adopt", "--timeout", "2")
        assert adopt.returncode == 1
        assert "withdrawn" in adopt.stdout
    await other.close()


async def test_events_without_any_relay_are_a_trouble_and_a_first_start_is_told(config: RelayConfig) -> None:
    await commit(config.postgres_url, rows_of("pay_a", 3))
    never = await payments_relay(config, "status")
    assert never.returncode == 1
    assert "no relay has ever run here: start one" in never.stdout
    if config.source == "poll":
        return  # A poll's first start is over at once.
    async with await open_transaction(config.postgres_url):
        relay, stop = Relay(config), asyncio.Event()
        task = asyncio.create_task(relay.run(stop))
        await until(lambda: relay.health.detail == "catching_up")
        starting = await payments_relay(config, "status")
        assert (starting.returncode, f"relay {config.slot}: its first start" in starting.stdout) == (0, True)
        stop.set()
        await task


@wal_only
async def test_a_repair_that_waits_for_a_transaction_names_it(config: RelayConfig) -> None:
    async with running(config):
        await commit(config.postgres_url, rows_of("pay_a", 3))
    await fetch_value(config.postgres_url, DROP, config.slot)
    relay, stop = Relay(replace(config, gap_seconds=0.1)), asyncio.Event()
    task = asyncio.create_task(relay.run(stop))
    await until(lambda: relay.health.detail.startswith("gap"))
    async with await open_transaction(config.postgres_url) as long:
        waiting = await payments_relay(config, "repair", "--timeout", "8")
        assert waiting.returncode == 1
        assert f"of backend {long.info.backend_pid}" in waiting.stdout
    await until(lambda: relay.health.detail == "active")
    stop.set()
    await task


@pytest.fixture
def prepared_transactions(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Postgres that allows prepared transactions: a command-line setting, so it is made before the server starts."""
    monkeypatch.setitem(postgres.SETTINGS, "max_prepared_transactions", "1")


@pytest.mark.usefixtures("prepared_transactions")
async def test_a_repair_that_waits_for_a_prepared_transaction_names_it(
    own_postgres: EmbeddedPostgres, kafka_bootstrap: str, topics: Topics
) -> None:
    url = own_postgres.url
    config = RelayConfig(postgres_url=url, kafka=KafkaAccess(kafka_bootstrap), topic=topics.events, gap_seconds=0.1)
    async with running(config):
        await commit(url, rows_of("pay_a", 1))
    await fetch_value(url, DROP, config.slot)
    async with StandingStill(config) as standing:
        async with await psycopg.AsyncConnection.connect(url) as left:
            await insert(left, rows_of("pay_a", 1, first=2))
            await left.execute("PREPARE TRANSACTION 'left over'")
        waiting = await payments_relay(config, "repair", "--timeout", "8")
        assert "of the prepared transaction 'left over'" in waiting.stdout
        async with await psycopg.AsyncConnection.connect(url, autocommit=True) as connection:
            await connection.execute("COMMIT PREPARED 'left over'")
        await until(lambda: standing.relay.health.detail == "active")


async def test_a_repair_does_not_publish_to_a_topic_that_was_mistyped(config: RelayConfig, topics: Topics) -> None:
    async with running(config):
        await commit(config.postgres_url, rows_of("pay_a", 3))
    mistyped = replace(config, topic=topics.dlq, gap_seconds=0.1)
    relay, stop = Relay(mistyped), asyncio.Event()
    task = asyncio.create_task(relay.run(stop))
    await until(lambda: relay.health.detail.startswith("gap"))
    refused = await payments_relay(mistyped, "repair")
    assert refused.returncode == 1
    assert "set PAYMENTS_EVENTS_TOPIC back" in " ".join(refused.stdout.split())
    assert (await payments_relay(mistyped, "adopt")).returncode == 0
    stop.set()
    await task


@wal_only
async def test_a_new_topic_is_not_adopted_with_what_the_slot_has_passed(config: RelayConfig, topics: Topics) -> None:
    """An operator who means the new topic would skip those events, and nobody would notice."""
    rows, missed = rows_of("pay_a", 3), rows_of("pay_a", 3, first=4)
    async with running(config):
        await commit(config.postgres_url, rows)
        await proven(config, *rows)
    await commit(config.postgres_url, missed)
    await fetch_value(config.postgres_url, ADVANCE, config.slot)
    moved = replace(config, topic=topics.dlq)
    async with StandingStill(moved):
        refused = await payments_relay(moved, "adopt")
        told = " ".join(refused.stdout.split())
        assert refused.returncode == 1
        assert f"not done, the relay stands still: the events before went to topic {config.topic}" in told
        assert "To do: set PAYMENTS_EVENTS_TOPIC back, and start the relay again; if Debezium moved it" in told
        assert await fetch_value(config.postgres_url, "SELECT gap IS NOT NULL AND repair IS NULL FROM relay_slots")
    async with StandingStill(config):
        assert (await payments_relay(config, "repair")).returncode == 0
        assert_first_deliveries_in_order(await published(config, *rows, *missed), rows + missed)
    async with StandingStill(moved):
        assert (await payments_relay(moved, "adopt")).returncode == 0


@pytest.fixture
def other_url(stack: StackUrls, migrated_template: str) -> Iterator[str]:
    url = create_database(stack.postgres_url, f"test_{uuid4().hex[:12]}", template=migrated_template)
    yield url
    drop_database(url)


@wal_only
async def test_another_databases_slot_of_the_same_name_is_not_called_left_over(
    config: RelayConfig, other_url: str
) -> None:
    """An operator who followed that advice would drop a slot that its own relay is using."""
    polling = replace(config, postgres_url=other_url, source="poll")
    async with running(config), running(polling):
        await commit(other_url, rows_of("pay_a", 2))
        status = await payments_relay(polling, "status", "--json")
        told = json.loads(status.stdout)
    assert told["troubles"] == []
    assert told["relays"][0]["slot_state"] == "none"


@pytest.mark.parametrize("command", [["repair", "--dry-run"], ["repair"], ["adopt"], ["replay", "--since", "1h"]])
async def test_a_relay_that_never_was_is_not_repaired_adopted_or_replayed(
    config: RelayConfig, command: list[str]
) -> None:
    """The name was mistyped: for such a relay nothing is proven, and nothing was published."""
    async with running(config):
        await commit(config.postgres_url, rows_of("pay_a", 3))
    refused = await payments_relay(replace(config, slot="mistyped"), *command)
    assert (refused.returncode, "has never run here" in refused.stderr, refused.stdout) == (1, True, "")


@wal_only
async def test_a_repeated_retry_request_finds_the_events_already_requested(config: RelayConfig) -> None:
    async with running(config):
        await commit(config.postgres_url, poisoned_payment())
        await until(lambda: fetch_value(config.postgres_url, "SELECT count(*) = 2 FROM relay_quarantine"))
    for _ in range(2):
        told = await payments_relay(config, "quarantine", "retry", "pay_0001", "--timeout", "0.5")
        assert (told.returncode, "0 published; no relay is active" in told.stdout) == (1, True), told.stdout


@wal_only
async def test_a_retry_does_not_call_published_what_somebody_has_dropped(config: RelayConfig) -> None:
    async with running(config):
        await commit(config.postgres_url, poisoned_payment())
        await until(lambda: fetch_value(config.postgres_url, "SELECT count(*) = 2 FROM relay_quarantine"))
    retry = asyncio.create_task(payments_relay(config, "quarantine", "retry", "pay_0001", "--timeout", "20"))
    await until(lambda: fetch_value(config.postgres_url, "SELECT bool_and(state = 'retry') FROM relay_quarantine"))
    await fetch_value(config.postgres_url, "UPDATE relay_quarantine SET state = 'dropped' RETURNING 1")
    told = await retry
    assert (told.returncode, "0 published, 2 dropped by somebody meanwhile" in told.stdout) == (1, True), told.stdout


@wal_only
async def test_a_relay_of_a_long_name_is_listed_once(config: RelayConfig) -> None:
    config = replace(config, slot=f"test_{'s' * 58}")
    async with running(config):
        await until(lambda: fetch_value(config.postgres_url, "SELECT count(*) = 1 FROM relay_slots"))
        told = json.loads((await payments_relay(config, "status", "--json")).stdout)
    assert (len(told["relays"]), told["starting"]) == (1, [])
    await fetch_value(config.postgres_url, DROP, config.slot)


@wal_only
@pytest.mark.parametrize("end", [signal.SIGINT, None], ids=["by Ctrl-C", "by its time"])
async def test_a_repair_that_is_waited_for_no_more_stays_asked_for_and_is_told(
    config: RelayConfig, end: signal.Signals | None
) -> None:
    """Otherwise the operator, who has given up waiting, would be surprised when the next relay starts to repair."""
    async with running(config):
        pass
    is_asked = "SELECT repair IS NOT NULL FROM relay_slots WHERE slot_name = %s"
    repairing = await started(config, "repair", "--timeout", "60" if end else "0.5")
    await until(lambda: fetch_value(config.postgres_url, is_asked, config.slot))
    if end is not None:
        repairing.send_signal(end)
    told, _ = await repairing.communicate()
    assert repairing.returncode == (130 if end else 1)
    assert "`payments relay repair` stays requested" in told.decode()
    assert "`payments relay repair`, and not done yet" in (await payments_relay(config, "status")).stdout
    async with running(config):
        assert not await fetch_value(config.postgres_url, is_asked, config.slot)
        assert "not done yet" not in (await payments_relay(config, "status")).stdout


async def test_a_smaller_repair_request_does_not_replace_a_larger_one_and_says_so(config: RelayConfig) -> None:
    async with running(config):
        pass
    asked = await payments_relay(config, "repair", "--everything", "--timeout", "0.2")
    assert (asked.returncode, "requested, but not done yet" in asked.stdout) == (1, True)
    other = await payments_relay(config, "repair", "--timeout", "0.2")
    assert other.returncode == 1
    assert "Not done: `payments relay repair --everything` was requested before" in other.stdout


async def test_a_repair_that_would_not_bring_back_what_kafka_lost_is_refused(config: RelayConfig) -> None:
    rows = rows_of("pay_a", 3)
    async with running(config):
        await commit(config.postgres_url, rows)
        await published(config, *rows)
        await until(lambda: is_all_proven(config))
    lost = lost_by_kafka(config.topic, 0, 0, 2)
    await fetch_value(
        config.postgres_url, "UPDATE relay_slots SET gap = %s WHERE slot_name = %s RETURNING 1", lost, config.slot
    )
    listed = await payments_relay(config, "repair", "--dry-run")
    assert listed.stdout.startswith("3 ")
    refused = await payments_relay(config, "repair", "--timeout", "0.2")
    assert refused.returncode == 1
    assert "It would publish nothing of what was lost: `payments relay repair --everything`" in refused.stdout
    other = await payments_relay(config, "repair", "--everything", "--timeout", "0.2")
    assert "requested, but not done yet" in other.stdout


@wal_only
async def test_two_relays_that_publish_to_one_topic_are_told_and_how_to_end_one(config: RelayConfig) -> None:
    """This happens after a mistake in PAYMENTS_RELAY_SLOT. Subscribers then get every event twice."""
    other = replace(config, source="poll", slot=f"{config.slot}_b")
    async with running(config), running(other):
        told = json.loads((await payments_relay(config, "status", "--json")).stdout)
    assert [each for each in told["troubles"] if f"publish to {config.topic}, each all events" in each]
    told = json.loads((await payments_relay(config, "status", "--json")).stdout)
    assert [each for each in told["troubles"] if each.endswith(f"slot_name = '{other.slot}'")]
    await fetch_value(config.postgres_url, DROP, config.slot)
