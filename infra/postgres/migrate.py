"""The schema's versions: upgrades and downgrades by Alembic, whose scripts are in `migrations/`."""

import time
from collections.abc import Callable
from pathlib import Path

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext

import migrations

# Any number that only migrations use: processes that migrate at the same time must take turns.
MIGRATION_LOCK = 7_205_759_403


def sync_url(url: str) -> str:
    """The URL in the form that SQLAlchemy's psycopg driver expects."""
    return url.replace("postgresql://", "postgresql+psycopg://", 1)


def upgrade(url: str, revision: str = "head") -> str:
    """Upgrade the database at `url` to `revision`, unless it is there or beyond; returns its revision afterwards.

    Safe to run concurrently, and to run again after an interruption.
    """
    return _run(url, lambda config: command.upgrade(config, revision))


def downgrade(url: str, revision: str) -> str:
    """Downgrade the database to `revision` ("base": empty); returns its new revision. Dropped tables' data is lost."""
    return _run(url, lambda config: command.downgrade(config, revision))


def _take_turns(connection: sa.Connection) -> None:
    """Wait without a transaction: CREATE INDEX CONCURRENTLY would wait for the end of every open one."""
    while not connection.scalar(sa.select(sa.func.pg_try_advisory_lock(MIGRATION_LOCK))):
        connection.commit()
        time.sleep(0.1)
    connection.commit()


def _run(url: str, step: Callable[[Config], None]) -> str:
    config = Config()
    config.set_main_option("script_location", str(Path(migrations.__file__).parent))
    engine = sa.create_engine(sync_url(url), poolclass=sa.NullPool)
    try:
        with engine.connect() as connection:
            _take_turns(connection)
            config.attributes["connection"] = connection
            step(config)
            connection.commit()
            return MigrationContext.configure(connection).get_current_revision() or "base"
    finally:
        engine.dispose()
