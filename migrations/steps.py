"""The steps of a migration over a busy table: each a transaction of its own, so that no lock outlives its statement.

A lock that waits makes every payment behind it wait as well. So what needs one that payments notice is given up after
`LOCK_TIMEOUT` and asked for again after a pause; and what takes long (reads a table, makes an index) needs none.

A migration that was interrupted begins again at its first step: each can be repeated. What can not be (a new table, an
attribute of a type) comes last, outside of these, in the transaction that notes the new version.
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
"""Longer than `deadlock_timeout` as Postgres has it (1 s), after which an autovacuum gives way to who waits."""


def change(statement: str) -> None:
    """Execute what takes milliseconds and locks payments out for as long.

    Raises:
        OperationalError: the table stayed too busy, for some 20 seconds.
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
    """Put each named CHECK in the place of the one that had its name, and see that all rows pass.

    New rows are held to it from the first moment on; those that are there are read while payments go on.
    """
    change(_replacement(table, checks, " NOT VALID"))
    _execute(f"ALTER TABLE {table} " + ", ".join(f"VALIDATE CONSTRAINT {name}" for name in checks))


def constrain_at_once(table: str, checks: dict[str, str]) -> None:
    """The same within the transaction of the whole migration, for a way back: a row that does not pass undoes it all.

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
    """Make it while payments go on. One that is there is left as it is, unless its making broke off."""
    broken = sa.text("SELECT NOT indisvalid FROM pg_index WHERE indexrelid = to_regclass(:name)")
    if op.get_bind().scalar(broken, {"name": name}):
        drop_index(name)
    _execute(f"CREATE INDEX CONCURRENTLY IF NOT EXISTS {name} ON {on}")


def drop_index(name: str) -> None:
    """While payments go on."""
    _execute(f"DROP INDEX CONCURRENTLY IF EXISTS {name}")


def gather_statistics(table: str, columns: Iterable[str]) -> None:
    """Anew, after these columns had their type changed, by which they lose them; while payments go on."""
    _execute(f"ANALYZE {table} ({', '.join(columns)})")


def _execute(statement: str) -> None:
    with op.get_context().autocommit_block():
        op.execute(statement)
