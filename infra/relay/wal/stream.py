"""One replication connection: the slot, the copy-both stream, and the feedback that advances the slot.

psycopg has no replication API, but its libpq wrapper sends START_REPLICATION and reads the stream.
Source: https://www.postgresql.org/docs/17/protocol-replication.html
"""

import asyncio
import time
from collections.abc import Callable
from struct import Struct
from typing import Any, Self

import psycopg
from psycopg import errors, generators, pq

from infra.relay.compiled import IS_COMPILED
from infra.relay.connection import lift_time_limit, with_settings
from infra.relay.errors import PostgresAway, SlotBusy, SlotMissing
from infra.relay.event import US_1970_TO_2000, Group

if IS_COMPILED:
    from infra.relay.native import LogReader

_XLOG_DATA = Struct(">cqqq")
_KEEPALIVE = Struct(">cqqB")
_FEEDBACK = Struct(">cqqqqB")
_LOG_DATA = ord("w")
FAILOVER_SLOTS_SINCE = 170_000


class ReplicationStream:
    """A connection in replication mode. Not for concurrent use; any error ends it."""

    def __init__(self, connection: psycopg.AsyncConnection) -> None:
        self._connection = connection
        self._pgconn = connection.pgconn
        self._loop = asyncio.get_running_loop()
        self._watched: int | None = None
        self.wal_end = 0
        self.is_reply_wanted = False

    @classmethod
    async def connect(cls, url: str) -> Self:
        """Open the connection.

        Raises:
            psycopg.OperationalError: it cannot be reached.
        """
        # wal_sender_timeout: the slot of a relay that vanished silently is free again soon.
        options = with_settings("-c wal_sender_timeout=10s")
        connect = psycopg.AsyncConnection.connect
        connection = await connect(url, replication="database", application_name="relay", **options)
        await lift_time_limit(connection)
        return cls(connection)

    @property
    def is_unix_socket(self) -> bool:
        """Whether the server is reached without TCP."""
        return self._pgconn.host.startswith(b"/")

    async def close(self) -> None:
        """End the connection; the server frees the slot."""
        try:
            self.unwatch()
        finally:
            await self._connection.close()

    async def system_identifier(self) -> str:
        """The identifier of this database cluster."""
        return str((await self._ask("IDENTIFY_SYSTEM"))[0])

    async def create_slot(self, name: str) -> str:
        """Create the slot; returns the name of an exported snapshot of everything committed before it.

        The snapshot can be imported until the next call on this connection.
        """
        # A slot that is synchronized to standbys survives a fail-over (docs/operations/relay.md).
        failover = ", FAILOVER" if self._pgconn.server_version >= FAILOVER_SLOTS_SINCE else ""
        options = f"(SNAPSHOT 'export'{failover})"
        return str((await self._ask(f'CREATE_REPLICATION_SLOT "{name}" LOGICAL pgoutput {options}'))[2])

    async def drop_slot(self, name: str) -> None:
        """Drop the slot.

        Raises:
            SlotBusy: somebody else streams from it.
        """
        try:
            await self._connection.execute(f'DROP_REPLICATION_SLOT "{name}"'.encode())
        except errors.ObjectInUse as error:
            raise SlotBusy(str(error)) from error

    async def start(self, slot: str, publication: str, lsn: int) -> None:
        """Begin to stream after `lsn`, or from the slot's position if that is further on.

        Raises:
            SlotBusy: somebody else streams from it.
            SlotMissing: there is no such slot.
        """
        options = f"proto_version '1', publication_names '\"{publication}\"'"
        position = f"{lsn >> 32:X}/{lsn & 0xFFFFFFFF:X}"
        self._pgconn.send_query(f'START_REPLICATION SLOT "{slot}" LOGICAL {position} ({options})'.encode())
        result = (await self._connection.wait(generators.execute(self._pgconn)))[0]
        if result.status != pq.ExecStatus.COPY_BOTH:
            raise _error(result)

    async def _ask(self, statement: str) -> tuple[Any, ...]:
        row = await (await self._connection.execute(statement.encode())).fetchone()
        assert row is not None, "the replication commands used here return a row"
        return row

    def watch(self, on_readable: Callable[[], None]) -> None:
        """Call `on_readable` while there are bytes on the socket, until `unwatch`."""
        if self._watched is None:
            self._watched = self._pgconn.socket
            self._loop.add_reader(self._watched, on_readable)

    def unwatch(self) -> None:
        """Stop watching; while nothing is read the server waits."""
        if self._watched is not None:
            # By number: a lost connection does not have it any more, and the next socket may get the same one.
            self._loop.remove_reader(self._watched)
            self._watched = None

    def receive(self) -> bytes | None:
        """The next pgoutput message that has arrived, or None. Keepalives change `wal_end` and `is_reply_wanted`.

        Raises:
            PostgresAway: the stream has ended.
        """
        was_read = False
        while True:
            size, data = self._pgconn.get_copy_data(1)
            if size > 0:
                if data[0] == _LOG_DATA:
                    return bytes(data[_XLOG_DATA.size :])
                self._note_keepalive(data)
            elif size < 0:
                raise self.ended()
            elif was_read:
                return None
            else:
                # libpq buffers about 16 KB: returning to the event loop after each would make small Kafka batches.
                self._read_socket()
                was_read = True

    def ended(self) -> PostgresAway:
        """The error for a stream whose end was read. libpq reports the end only once, and why in a result."""
        result = None if self._pgconn.is_busy() else self._pgconn.get_result()
        return self._lost((result or self._pgconn).get_error_message())

    def log_reader(self, begin: Callable[[int], Group], taken: list[int]) -> "LogReader":
        """A reader in C that continues where `receive` stopped; only if it was compiled.

        `begin` makes groups of transactions; every transaction's id is appended to `taken`.
        """
        return LogReader(self._pgconn.get_copy_data, self._read_socket, self._note_keepalive, begin, taken)

    def _note_keepalive(self, data: memoryview) -> None:
        _, wal_end, _, reply = _KEEPALIVE.unpack_from(data)
        self.wal_end = max(self.wal_end, wal_end)
        self.is_reply_wanted = self.is_reply_wanted or bool(reply)

    def _read_socket(self) -> None:
        try:
            self._pgconn.consume_input()
        except psycopg.Error as error:
            raise self._lost(str(error)) from error

    def _lost(self, why: str) -> PostgresAway:
        """The error for a lost connection; stops watching, as libpq closed the socket and its number can be reused."""
        self.unwatch()
        return PostgresAway(why)

    def confirm(self, lsn: int) -> None:
        """Confirm that everything before `lsn` is safe elsewhere, so that the slot may release it.

        Raises:
            PostgresAway: the connection is gone.
        """
        now_us = int(time.time() * 1_000_000) - US_1970_TO_2000
        try:
            self._pgconn.put_copy_data(_FEEDBACK.pack(b"r", lsn, lsn, lsn, now_us, 0))
            self._pgconn.flush()
        except psycopg.Error as error:
            raise self._lost(str(error)) from error
        self.is_reply_wanted = False

    async def finish(self) -> None:
        """End the stream in good order: on return the server has processed the last confirmation."""
        self.unwatch()
        self._pgconn.put_copy_end()
        readable = asyncio.Event()
        self.watch(readable.set)
        while True:
            self._pgconn.flush()
            size, _ = self._pgconn.get_copy_data(1)
            if size < 0:
                return
            if size == 0:
                readable.clear()
                await readable.wait()
                self._read_socket()


def _error(result: pq.abc.PGresult) -> Exception:
    message = result.get_error_message()
    match result.error_field(pq.DiagnosticField.SQLSTATE):
        case b"55006":
            return SlotBusy(message)
        case b"42704":
            return SlotMissing(message)
        case _:
            return PostgresAway(message)
