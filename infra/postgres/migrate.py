"""The schema's versions: forward and back by Alembic, whose scripts lie in `migrations/`."""

import time
from collections.abc import Callable
from pathlib import Path

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext

import migrations

# Any number that only migrations use: two processes that migrate at once must take turns.
MIGRATION_LOCK = 7_205_759_403


def sync_url(url: str) -> str:
    """The URL in the form that SQLAlchemy's psycopg driver wants."""
    return url.replace("postgresql://", "postgresql+psycopg://", 1)


def upgrade(url: str, revision: str = "head") -> str:
    """Bring the database at `url` to `revision`; where it is there or beyond, nothing is done. The one it is at now.

    Safe to run concurrently, and again where it was interrupted.
    """
    return _run(url, lambda config: command.upgrade(config, revision))


def downgrade(url: str, revision: str) -> str:
    """Take the database back to `revision` ("base" is empty); the one it is at now. Data of dropped tables is lost."""
    return _run(url, lambda config: command.downgrade(config, revision))


def _take_turns(connection: sa.Connection) -> None:
    """Wait without a transaction: an index that is made CONCURRENTLY waits for the end of all that are open."""
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
