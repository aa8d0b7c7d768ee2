"""Steps of a migration of a busy table, each in its own transaction, so that no lock outlives its statement.

A lock that waits makes every payment behind it wait as well. So a step that needs a lock which blocks payments gives up
after `LOCK_TIMEOUT` and retries after a pause, and a long step (reading a table, building an index) needs no such lock.

An interrupted migration begins again at its first step, because each step can be repeated. Changes that cannot (a new
table, an attribute of a type) come last, outside these steps, in the transaction that records the new version.
"""

import time
from collections.abc import Iterable
from typing import Final

import sqlalchemy as sa
from alembic import op
from psycopg.errors import LockNotAvailable
from sqlalchemy.exc import OperationalError

from infra.postgres.maintenance import LOCK_TIMEOUT, PAUSES_SECONDS

LAST_LOCK_TIMEOUT: Final = "1500ms"
"""Longer than Postgres's default `deadlock_timeout` (1 s), after which an autovacuum yields to whoever waits for it."""


def change(statement: str) -> None:
    """Execute a statement that takes milliseconds and blocks payments for that time.

    Raises:
        OperationalError: the table stayed too busy for about 20 seconds.
    """
    for pause in PAUSES_SECONDS:
        try:
            _execute(f"SET LOCAL lock_timeout = '{LOCK_TIMEOUT}'; {statement}")
        except OperationalError as error:
            if not isinstance(error.orig, LockNotAvailable):
                raise
            time.sleep(pause)
        else:
            return
    _execute(f"SET LOCAL lock_timeout = '{LAST_LOCK_TIMEOUT}'; {statement}")


def constrain(table: str, checks: dict[str, str]) -> None:
    """Replace each named CHECK, or add it, and validate all rows.

    New rows are checked from the first moment; existing rows are read while payments continue.
    """
    change(_replacement(table, checks, " NOT VALID"))
    _execute(f"ALTER TABLE {table} " + ", ".join(f"VALIDATE CONSTRAINT {name}" for name in checks))


def constrain_at_once(table: str, checks: dict[str, str]) -> None:
    """The same in the transaction of the whole migration, for a downgrade: a row that fails the check undoes it all.

    The rows are read under the lock.
    """
    op.execute(_replacement(table, checks, ""))


def _replacement(table: str, checks: dict[str, str], how: str) -> str:
    parts = (
        f"DROP CONSTRAINT IF EXISTS {name}, ADD CONSTRAINT {name} CHECK ({check}){how}"
        for name, check in checks.items()
    )
    return f"ALTER TABLE {table} {', '.join(parts)}"


def make_index(name: str, on: str) -> None:
    """Create the index while payments continue. An existing index is kept, unless its creation was interrupted."""
    broken = sa.text("SELECT NOT indisvalid FROM pg_index WHERE indexrelid = to_regclass(:name)")
    if op.get_bind().scalar(broken, {"name": name}):
        drop_index(name)
    _execute(f"CREATE INDEX CONCURRENTLY IF NOT EXISTS {name} ON {on}")


def drop_index(name: str) -> None:
    """Drop the index, if it exists, while payments continue."""
    _execute(f"DROP INDEX CONCURRENTLY IF EXISTS {name}")


def gather_statistics(table: str, columns: Iterable[str]) -> None:
    """Rebuild the statistics that a type change discards; payments continue meanwhile."""
    _execute(f"ANALYZE {table} ({', '.join(columns)})")


def _execute(statement: str) -> None:
    with op.get_context().autocommit_block():
        op.execute(statement)
