"""All three servers at once, each embedded unless the caller provides one."""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from infra.local.kafka import EmbeddedKafka
from infra.local.postgres import EmbeddedPostgres
from infra.local.server import EmbeddedServer, Progress, silent
from infra.local.valkey import EmbeddedValkey

DEFAULT_DATA_DIR = Path(__file__).resolve().parents[2] / ".local"
POSTGRES_VARIABLE = "PAYMENTS_POSTGRES_URL"
KAFKA_VARIABLE = "PAYMENTS_KAFKA_BOOTSTRAP"
REDIS_VARIABLE = "PAYMENTS_REDIS_URL"


@dataclass(frozen=True, slots=True)
class StackUrls:
    """The addresses of the three servers."""

    postgres_url: str
    kafka_bootstrap: str
    redis_url: str

    def as_environment(self) -> dict[str, str]:
        """The environment variables from which the service's processes know the servers."""
        return {
            POSTGRES_VARIABLE: self.postgres_url,
            KAFKA_VARIABLE: self.kafka_bootstrap,
            REDIS_VARIABLE: self.redis_url,
        }


class LocalStack:
    """Postgres, Kafka and Valkey on free loopback ports; a server that is given is used instead, but never managed.

    Embedded servers are in `postgres`, `kafka` and `valkey`, which are None for a given server.
    """

    def __init__(
        self,
        data_dir: Path = DEFAULT_DATA_DIR,
        *,
        postgres_url: str | None = None,
        kafka_bootstrap: str | None = None,
        redis_url: str | None = None,
        on_progress: Progress = silent,
    ) -> None:
        self._given = (postgres_url, kafka_bootstrap, redis_url)
        self.postgres = None if postgres_url else EmbeddedPostgres(data_dir, on_progress=on_progress)
        self.kafka = None if kafka_bootstrap else EmbeddedKafka(data_dir, on_progress=on_progress)
        self.valkey = None if redis_url else EmbeddedValkey(data_dir, on_progress=on_progress)

    @classmethod
    def from_environment(
        cls, environment: Mapping[str, str], data_dir: Path = DEFAULT_DATA_DIR, *, on_progress: Progress = silent
    ) -> Self:
        """A stack that uses the servers named in `environment`; an empty value names none."""
        return cls(
            data_dir,
            postgres_url=environment.get(POSTGRES_VARIABLE),
            kafka_bootstrap=environment.get(KAFKA_VARIABLE),
            redis_url=environment.get(REDIS_VARIABLE),
            on_progress=on_progress,
        )

    @property
    def servers(self) -> list[EmbeddedServer]:
        """The embedded servers, slowest to start first."""
        return [server for server in (self.kafka, self.postgres, self.valkey) if server is not None]

    @property
    def urls(self) -> StackUrls:
        """The addresses of the servers; valid after `start`."""
        postgres_url, kafka_bootstrap, redis_url = self._given
        return StackUrls(
            postgres_url=self.postgres.url if self.postgres else postgres_url or "",
            kafka_bootstrap=self.kafka.bootstrap if self.kafka else kafka_bootstrap or "",
            redis_url=self.valkey.url if self.valkey else redis_url or "",
        )

    def start(self) -> StackUrls:
        """Start the embedded servers in parallel; returns once all serve. If one cannot start, none is left running.

        Raises:
            LocalServerError: of the first server that could not start.
        """
        try:
            self._for_all(lambda server: server.start())
        except BaseException:
            self.stop()
            raise
        return self.urls

    def stop(self) -> None:
        """Shut the embedded servers down cleanly; their data is kept."""
        self._for_all(lambda server: server.stop())

    def erase(self) -> None:
        """Stop the embedded servers and delete their data."""
        self._for_all(lambda server: server.erase())

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _for_all(self, verb: Callable[[EmbeddedServer], None]) -> None:
        with ThreadPoolExecutor(max_workers=3, thread_name_prefix="local-stack") as pool:
            tasks = [pool.submit(verb, server) for server in self.servers]
        for task in tasks:
            task.result()
