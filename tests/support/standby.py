"""A hot standby of an embedded Postgres, set up as docs/operations/relay.md says, which can take over its work."""

import shutil
from pathlib import Path

import psutil
import psycopg
from psycopg.conninfo import make_conninfo

from infra.local import EmbeddedPostgres
from infra.local.server import LocalServerError

PHYSICAL_SLOT = "standby"


class Standby(EmbeddedPostgres):
    """Follows `primary`, which must run when this is first started, and keeps copies of its fail-over slots."""

    def __init__(self, data_dir: Path, primary: EmbeddedPostgres) -> None:
        super().__init__(data_dir)
        self._primary = primary

    def _initialize(self) -> None:
        partial = self.cluster_dir.with_name(f"{self.cluster_dir.name}.new")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(mode=0o700)
        if self._account.switch:
            self._account.take_over(partial)
        # --write-recovery-conf writes primary_conninfo, its dbname included, and primary_slot_name.
        options = ["--write-recovery-conf", "--create-slot", "--slot", PHYSICAL_SLOT, "--checkpoint=fast", "--no-sync"]
        source = make_conninfo(self._primary.url, application_name=PHYSICAL_SLOT)
        done = self._account.run([str(self._bin_dir / "pg_basebackup"), "-d", source, "-D", str(partial), *options])
        if done.returncode != 0:
            raise LocalServerError(self.title, f"pg_basebackup failed:\n{done.stdout}", "mend what it names")
        partial.rename(self.cluster_dir)

    def _command(self) -> list[str]:
        return [*super()._command(), "--sync_replication_slots=on", "--hot_standby_feedback=on"]

    @property
    def wal_receiver(self) -> psutil.Process:
        """The process that receives the primary's WAL."""
        with psycopg.connect(self.url) as connection:
            row = connection.execute("SELECT pid FROM pg_stat_wal_receiver").fetchone()
        assert row is not None, "the standby follows no primary"
        return psutil.Process(row[0])

    def promote(self) -> None:
        """Make it a primary; returns when it accepts writes."""
        with psycopg.connect(self.url, autocommit=True) as connection:
            row = connection.execute("SELECT pg_promote(wait_seconds => 30)").fetchone()
        assert row == (True,), "the standby becomes a primary in time"
