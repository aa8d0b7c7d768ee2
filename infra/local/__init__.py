"""Real servers without Docker: Postgres, Kafka and Valkey as child processes, installed as Python packages.

They are for the demo, the tests and the benchmarks; production has its own. Needs the `local` extra. Nothing here reads
settings from the environment: the caller passes them in.
"""

from infra.local.kafka import EmbeddedKafka
from infra.local.postgres import EmbeddedPostgres, create_database, drop_database
from infra.local.server import LocalServerError, Progress
from infra.local.stack import DEFAULT_DATA_DIR, LocalStack, StackUrls
from infra.local.valkey import EmbeddedValkey

__all__ = [
    "DEFAULT_DATA_DIR",
    "EmbeddedKafka",
    "EmbeddedPostgres",
    "EmbeddedValkey",
    "LocalServerError",
    "LocalStack",
    "Progress",
    "StackUrls",
    "create_database",
    "drop_database",
]
