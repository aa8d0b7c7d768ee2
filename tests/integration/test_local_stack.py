"""The embedded servers: they serve, they survive a crash with their data, they leave nothing behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import psycopg
import pytest
import redis
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient, NewTopic

from infra.local import (
    EmbeddedKafka,
    EmbeddedPostgres,
    EmbeddedValkey,
    LocalServerError,
    LocalStack,
    StackUrls,
    create_database,
    drop_database,
)
from infra.local.server import free_port
from tests.conftest import Topics

AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root has to hand Postgres to another account")

STACK_THAT_IS_KILLED = """
import os, pathlib, signal, sys
from infra.local import LocalStack
stack = LocalStack(pathlib.Path(sys.argv[1]))
stack.start()
print(*(server.pid for server in stack.servers), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_stack_serves_requests_on_all_three_servers(stack: StackUrls) -> None:
    with psycopg.connect(stack.postgres_url) as connection:
        assert connection.execute("SELECT current_database()").fetchone() == ("payments",)
    with redis.Redis.from_url(stack.redis_url) as client:
        assert client.ping()
    host, port = stack.kafka_bootstrap.split(":")
    assert host
    assert int(port)


def test_postgres_is_as_durable_and_as_logical_as_in_production(own_postgres: EmbeddedPostgres) -> None:
    wanted = {"fsync": "on", "synchronous_commit": "on", "wal_level": "logical", "max_replication_slots": "16"}
    with psycopg.connect(own_postgres.url) as connection:
        found = {name: connection.execute(f"SHOW {name}").fetchone() for name in wanted}
    assert found == {name: (value,) for name, value in wanted.items()}


def test_committed_rows_survive_a_kill_of_postgres(own_postgres: EmbeddedPostgres) -> None:
    with psycopg.connect(own_postgres.url) as connection:
        connection.execute("CREATE TABLE kept (id int)")
        connection.execute("INSERT INTO kept VALUES (7)")
    port = own_postgres.port
    own_postgres.kill()
    with pytest.raises(psycopg.OperationalError):
        psycopg.connect(own_postgres.url)
    own_postgres.restart()
    with psycopg.connect(own_postgres.url) as connection:
        assert connection.execute("SELECT id FROM kept").fetchall() == [(7,)]
    assert own_postgres.port == port


def test_a_kill_of_postgres_ends_its_backends_too(own_postgres: EmbeddedPostgres) -> None:
    with psycopg.connect(own_postgres.url) as connection:
        family = psutil.Process(own_postgres.pid).children(recursive=True)
        own_postgres.kill()
        assert connection.info.backend_pid in {member.pid for member in family}
        assert not [member for member in family if member.is_running()]


def test_a_database_with_a_replication_slot_in_it_can_be_dropped(own_postgres: EmbeddedPostgres) -> None:
    url = create_database(own_postgres.url, "slotted")
    with psycopg.connect(url) as connection:
        connection.execute("SELECT pg_create_logical_replication_slot('s', 'pgoutput')")
    drop_database(url)
    with pytest.raises(psycopg.OperationalError, match="does not exist"):
        psycopg.connect(url)


def test_a_lock_file_with_a_recycled_pid_does_not_block_postgres(own_postgres: EmbeddedPostgres) -> None:
    own_postgres.kill()
    lock = own_postgres.cluster_dir / "postmaster.pid"
    _, *rest = lock.read_text().splitlines(keepends=True)
    bystander = subprocess.Popen(["/bin/sleep", "60"])
    try:
        lock.write_text("".join([f"{bystander.pid}\n", *rest]))
        own_postgres.restart()
        assert own_postgres.running
    finally:
        bystander.kill()
        bystander.wait()


async def test_acknowledged_records_survive_a_kill_of_kafka(own_kafka: EmbeddedKafka) -> None:
    port = own_kafka.port
    await create_topic(own_kafka.bootstrap, "kept")
    async with AIOKafkaProducer(bootstrap_servers=own_kafka.bootstrap, acks="all") as producer:
        await producer.send_and_wait("kept", b"7")
    own_kafka.kill()
    own_kafka.restart()
    assert await first_record(own_kafka.bootstrap, "kept") == b"7"
    assert own_kafka.port == port


async def test_kafka_creates_no_topic_that_nobody_asked_for(own_kafka: EmbeddedKafka) -> None:
    admin = AIOKafkaAdminClient(bootstrap_servers=own_kafka.bootstrap)
    await admin.start()
    try:
        await admin.describe_topics(["mistyped"])
        assert "mistyped" not in await admin.list_topics()
    finally:
        await admin.close()


def test_valkey_comes_back_on_its_port_after_a_kill(own_valkey: EmbeddedValkey) -> None:
    url = own_valkey.url
    own_valkey.kill()
    own_valkey.restart()
    with redis.Redis.from_url(url) as client:
        assert client.ping()


async def test_topics_of_a_test_can_be_written_and_read(kafka_bootstrap: str, topics: Topics) -> None:
    async with AIOKafkaProducer(bootstrap_servers=kafka_bootstrap) as producer:
        await producer.send_and_wait(topics.commands, b"7")
    assert await first_record(kafka_bootstrap, topics.commands) == b"7"


def test_a_second_start_keeps_the_data_and_the_cluster(tmp_data_dir: Path) -> None:
    with EmbeddedPostgres(tmp_data_dir) as server:
        first = cluster_identity(server)
    messages: list[str] = []
    with EmbeddedPostgres(tmp_data_dir, on_progress=messages.append) as server:
        assert cluster_identity(server) == first
        server.erase()
    assert messages == ["starting Postgres …"]


def test_a_data_folder_has_one_owner(own_valkey: EmbeddedValkey) -> None:
    with pytest.raises(LocalServerError, match="another process is using"):
        EmbeddedValkey(own_valkey.data_dir).start()
    assert own_valkey.running


def test_a_server_that_cannot_start_says_why_and_what_to_do(own_valkey: EmbeddedValkey, tmp_data_dir: Path) -> None:
    second = EmbeddedValkey(tmp_data_dir / "second", port=own_valkey.port)
    with pytest.raises(LocalServerError, match=r"(?s)port \d+ is in use.*What to do"):
        second.start()
    assert not second.running


def test_a_killed_process_takes_its_servers_along_and_blocks_no_later_start(tmp_data_dir: Path) -> None:
    command = [sys.executable, "-c", STACK_THAT_IS_KILLED, str(tmp_data_dir)]
    died = subprocess.run(command, capture_output=True, text=True, check=False)
    assert died.returncode == -signal.SIGKILL, died.stderr
    pids = [int(pid) for pid in died.stdout.split()]
    if sys.platform == "linux":
        wait_until_gone(pids)
    stack = LocalStack(tmp_data_dir)
    stack.start()
    stack.erase()
    wait_until_gone(pids)


def test_a_leftover_server_is_ended_by_the_next_start(tmp_data_dir: Path) -> None:
    first = EmbeddedValkey(tmp_data_dir)
    first.start()
    leftover = psutil.Process(first.pid)
    abandon(first)
    with EmbeddedValkey(tmp_data_dir) as second:
        assert second.pid != leftover.pid
        assert not leftover.is_running() or leftover.status() == psutil.STATUS_ZOMBIE
    first.kill()


def test_a_url_in_the_environment_takes_the_place_of_that_server(
    own_valkey: EmbeddedValkey, tmp_data_dir: Path
) -> None:
    given = {
        "PAYMENTS_POSTGRES_URL": "postgresql://given/payments",
        "PAYMENTS_KAFKA_BOOTSTRAP": "given:9092",
        "PAYMENTS_REDIS_URL": "",
    }
    stack = LocalStack.from_environment(given, tmp_data_dir / "partly-given")
    try:
        urls = stack.start()
        assert (urls.postgres_url, urls.kafka_bootstrap) == ("postgresql://given/payments", "given:9092")
        assert [server.name for server in stack.servers] == ["valkey"]
        assert urls.redis_url != own_valkey.url
    finally:
        stack.erase()


@AS_ROOT
def test_root_hands_postgres_to_an_unprivileged_account(own_postgres: EmbeddedPostgres) -> None:
    assert psutil.Process(own_postgres.pid).uids().effective != 0


@AS_ROOT
def test_postgres_finds_another_place_when_its_account_cannot_enter_the_folder(tmp_data_dir: Path) -> None:
    hidden = tmp_data_dir / "hidden"
    hidden.mkdir(mode=0o700)
    server = EmbeddedPostgres(hidden / "data")
    try:
        server.start()
        assert not server.cluster_dir.is_relative_to(hidden)
        with psycopg.connect(server.url) as connection:
            assert connection.execute("SELECT 1").fetchone() == (1,)
    finally:
        server.erase()
    assert not server.cluster_dir.exists()


def cluster_identity(server: EmbeddedPostgres) -> object:
    with psycopg.connect(server.url) as connection:
        return connection.execute("SELECT system_identifier FROM pg_control_system()").fetchone()


def abandon(server: EmbeddedValkey) -> None:
    """Release the data folder as if this process had died, with the server still running and recorded."""
    assert server._claim is not None
    server._claim.close()
    server._claim = None


def wait_until_gone(pids: list[int], timeout_seconds: float = 15.0) -> None:
    deadline = time.monotonic() + timeout_seconds
    while alive := [pid for pid in pids if psutil.pid_exists(pid)]:
        assert time.monotonic() < deadline, f"still running: {alive}"
        time.sleep(0.05)


async def create_topic(bootstrap: str, name: str) -> None:
    admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap)
    await admin.start()
    try:
        await admin.create_topics([NewTopic(name, num_partitions=1, replication_factor=1)])
    finally:
        await admin.close()


async def first_record(bootstrap: str, topic: str) -> bytes | None:
    async with AIOKafkaConsumer(topic, bootstrap_servers=bootstrap, auto_offset_reset="earliest") as consumer:
        value: bytes | None = (await consumer.getone()).value
        return value


def test_many_free_ports_are_all_different() -> None:
    ports = [free_port() for _ in range(500)]

    assert len(set(ports)) == len(ports)
