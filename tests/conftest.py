"""The real servers that the tests run against.

By default they are the embedded servers, with data in `.local/test/<pid>/` that is deleted at the end.
`PAYMENTS_POSTGRES_URL`, `PAYMENTS_KAFKA_BOOTSTRAP` and `PAYMENTS_REDIS_URL` each replace one of them with your own
server, and `PAYMENTS_TEST_SERVERS=testcontainers` uses Docker containers for the rest. Nothing else here depends on
the choice, except that the `own_…` fixtures are always embedded servers: a test may kill them.
"""

import contextlib
import itertools
import os
import shutil
import signal
import sys
import uuid
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import redis
import structlog
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.errors import for_code

from infra.kafka.access import KafkaAccess
from infra.local import (
    DEFAULT_DATA_DIR,
    EmbeddedKafka,
    EmbeddedPostgres,
    EmbeddedValkey,
    LocalStack,
    StackUrls,
    create_database,
    drop_database,
)
from tests.support.first_connection import close_what_a_cancelled_start_leaves

TESTS_DIR = DEFAULT_DATA_DIR / "test"
PARTITIONS = 8
# A Redis server has 16 databases by default; number 0 is left to people.
REDIS_DATABASES = range(1, 16)

serial = itertools.count(1)


def pytest_configure() -> None:
    """Set up this process before any test runs."""
    # A shell starts background jobs with SIGINT ignored, and every process that the tests start would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # Logs go to standard error, as in each of our processes, so that they do not mix with a command's output.
    structlog.configure(logger_factory=lambda *_: structlog.PrintLogger(sys.stderr))
    close_what_a_cancelled_start_leaves()


@dataclass(frozen=True, slots=True)
class Topics:
    """The topics of one test, with eight partitions each."""

    commands: str
    events: str
    dlq: str


@pytest.fixture(scope="session")
def data_dir() -> Iterator[Path]:
    """This run's folder for the servers' data. Folders that dead runs left behind are deleted."""
    TESTS_DIR.mkdir(parents=True, exist_ok=True)
    for folder in TESTS_DIR.iterdir():
        if folder.name.isdigit() and not psutil.pid_exists(int(folder.name)):
            shutil.rmtree(folder, ignore_errors=True)
    own = TESTS_DIR / str(os.getpid())
    own.mkdir(exist_ok=True)
    yield own
    shutil.rmtree(own, ignore_errors=True)


@pytest.fixture(scope="session")
def stack(data_dir: Path) -> Iterator[StackUrls]:
    """The URLs of the session's three servers."""
    with contextlib.ExitStack() as containers:
        environment = dict(os.environ)
        if environment.get("PAYMENTS_TEST_SERVERS") == "testcontainers":
            environment = container_urls(containers) | environment
        servers = LocalStack.from_environment(environment, data_dir)
        containers.callback(servers.erase)
        yield servers.start()


@pytest.fixture(scope="session")
def migrated_template(stack: StackUrls) -> Iterator[str]:
    """The name of a database at the newest schema version, to be copied for each test."""
    from infra.postgres import migrate

    name = f"template_{uuid.uuid4().hex[:12]}"
    url = create_database(stack.postgres_url, name)
    migrate.upgrade(url)
    yield name
    drop_database(url)


@pytest.fixture
def empty_postgres_url(stack: StackUrls) -> Iterator[str]:
    """An empty database for this test alone."""
    url = create_database(stack.postgres_url, f"test_{uuid.uuid4().hex[:12]}")
    yield url
    drop_database(url)


@pytest.fixture
def postgres_url(stack: StackUrls, migrated_template: str) -> Iterator[str]:
    """A database for this test alone, at the newest schema version."""
    url = create_database(stack.postgres_url, f"test_{uuid.uuid4().hex[:12]}", template=migrated_template)
    yield url
    drop_database(url)


@pytest.fixture
def kafka_bootstrap(stack: StackUrls) -> str:
    """The session's broker, shared by all tests; a test's own topics are in `topics`."""
    return stack.kafka_bootstrap


@pytest.fixture
def redis_url(stack: StackUrls) -> str:
    """A Redis database that is empty when the test begins."""
    number = REDIS_DATABASES[next(serial) % len(REDIS_DATABASES)]
    url = f"{stack.redis_url.rsplit('/', 1)[0]}/{number}"
    with redis.Redis.from_url(url) as client:
        client.flushdb()
    return url


@pytest.fixture
async def topics(kafka_bootstrap: str) -> AsyncIterator[Topics]:
    """Three new topics, deleted afterwards because a broker with thousands of partitions is slow."""
    prefix = f"test-{uuid.uuid4().hex[:12]}"
    names = [f"{prefix}.{name}" for name in ("commands", "events", "dlq")]
    admin = AIOKafkaAdminClient(bootstrap_servers=kafka_bootstrap)
    await admin.start()
    try:
        response = await admin.create_topics([NewTopic(name, PARTITIONS, 1) for name in names])
        for name, code, *_ in response.topic_errors:
            assert code == 0, f"{name}: {for_code(code).__name__}"
        yield Topics(*names)
        await admin.delete_topics(names)
    finally:
        await admin.close()


@pytest.fixture
def own_postgres(tmp_data_dir: Path) -> Iterator[EmbeddedPostgres]:
    """A private Postgres to kill and restart; its database `payments` is at the newest schema version."""
    from infra.postgres import migrate

    server = EmbeddedPostgres(tmp_data_dir)
    try:
        server.start()
        migrate.upgrade(server.url)
        yield server
    finally:
        server.erase()


@pytest.fixture
def own_kafka(tmp_data_dir: Path) -> Iterator[EmbeddedKafka]:
    """A private Kafka to kill and restart, without topics."""
    server = EmbeddedKafka(tmp_data_dir)
    try:
        server.start()
        yield server
    finally:
        server.erase()


@pytest.fixture
def own_valkey(tmp_data_dir: Path) -> Iterator[EmbeddedValkey]:
    """A private Valkey to kill and restart."""
    server = EmbeddedValkey(tmp_data_dir)
    try:
        server.start()
        yield server
    finally:
        server.erase()


@pytest.fixture
def tmp_data_dir(data_dir: Path) -> Iterator[Path]:
    """A folder for one test's servers. Not `tmp_path`: Postgres may run as another user, which cannot enter that."""
    folder = data_dir / f"own-{next(serial)}"
    folder.mkdir()
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def container_urls(running: contextlib.ExitStack) -> dict[str, str]:
    """Start the three servers with testcontainers; `running` stops them. Skips the test if no Docker engine answers."""
    import docker
    from testcontainers.core.container import DockerContainer
    from testcontainers.postgres import PostgresContainer
    from testcontainers.redis import RedisContainer

    from infra.local.postgres import SETTINGS
    from infra.local.server import free_port

    try:
        docker.from_env().ping()
    except docker.errors.DockerException as error:
        pytest.skip(f"PAYMENTS_TEST_SERVERS=testcontainers, but no Docker engine answers: {error}")
    kept = ("wal_level", "max_replication_slots", "max_wal_senders", "max_connections")
    settings = " ".join(f"-c {name}={SETTINGS[name]}" for name in kept)
    postgres = PostgresContainer("postgres:17", username="postgres", dbname="payments", driver=None)
    valkey = RedisContainer("valkey/valkey:8")
    kafka_port = free_port()
    kafka = DockerContainer("apache/kafka:4.1.1").with_bind_ports(9092, kafka_port)
    for name, value in kafka_environment(kafka_port).items():
        kafka = kafka.with_env(name, value)
    for container in (postgres.with_command(f"postgres {settings}"), kafka, valkey):
        running.enter_context(container)
    wait_for_kafka(f"localhost:{kafka_port}")
    return {
        "PAYMENTS_POSTGRES_URL": postgres.get_connection_url(),
        "PAYMENTS_KAFKA_BOOTSTRAP": f"localhost:{kafka_port}",
        "PAYMENTS_REDIS_URL": f"redis://{valkey.get_container_host_ip()}:{valkey.get_exposed_port(6379)}/0",
    }


def kafka_environment(port: int) -> dict[str, str]:
    """Environment of the `apache/kafka` image: one node, reached at `port` of this machine."""
    from infra.local.kafka import SETTINGS

    listeners = {
        "controller.quorum.voters": "1@localhost:9093",
        "listeners": "PLAINTEXT://:9092,CONTROLLER://:9093",
        "advertised.listeners": f"PLAINTEXT://localhost:{port}",
        "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT",
    }
    return {f"KAFKA_{key.replace('.', '_').upper()}": value for key, value in (SETTINGS | listeners).items()}


def wait_for_kafka(bootstrap: str) -> None:
    """Wait until the broker at `bootstrap` accepts a record."""
    import time

    from infra.local.kafka import write_one_record
    from infra.local.server import NotReady

    deadline = time.monotonic() + 60
    while True:
        try:
            return write_one_record(KafkaAccess(bootstrap))
        except NotReady:
            assert time.monotonic() < deadline, "Kafka's container did not become ready"
            time.sleep(0.2)
