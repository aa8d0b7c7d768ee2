"""One replication connection: the slot, the copy-both stream, and the feedback that moves the slot on.

psycopg has no replication API, but its libpq wrapper sends START_REPLICATION and reads the stream.
Source: https://www.postgresql.org/docs/17/protocol-replication.html
"""

import asyncio
import time
from struct import Struct
from typing import NamedTuple, Self

from psycopg import pq
from psycopg.conninfo import make_conninfo
from psycopg.pq.abc import PGconn, PGresult

from infra.relay.errors import PostgresAway, SlotBusy, SlotMissing

_XLOG_DATA = Struct(">cqqq")
_KEEPALIVE = Struct(">cqqB")
_FEEDBACK = Struct(">cqqqqB")
_EPOCH_2000 = 946_684_800

OBJECT_IN_USE, UNDEFINED_OBJECT = "55006", "42704"


class NewSlot(NamedTuple):
    """A slot that was just created, and the snapshot of everything that was committed before it."""

    snapshot: str


class ReplicationStream:
    """A connection in replication mode. Not for concurrent use; any error ends it."""

    def __init__(self, connection: PGconn) -> None:
        self._connection = connection
        self._readable = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self.wal_end = 0
        self.reply_wanted = False

    @classmethod
    async def connect(cls, url: str) -> Self:
        """Open the connection.

        Raises:
            PostgresAway: it cannot be reached.
        """
        # wal_sender_timeout: a relay that vanished without a word frees its slot soon.
        options = "-c wal_sender_timeout=10s"
        info = make_conninfo(url, replication="database", connect_timeout=5, options=options, application_name="relay")
        connection = await asyncio.to_thread(pq.PGconn.connect, info.encode())
        if connection.status != pq.ConnStatus.OK:
            raise PostgresAway(connection.get_error_message())
        return cls(connection)

    def close(self) -> None:
        """End the connection; the server frees the slot."""
        self._connection.finish()

    async def system_identifier(self) -> str:
        """Which database cluster this is."""
        result = await self._execute("IDENTIFY_SYSTEM")
        value = result.get_value(0, 0)
        assert value is not None, "IDENTIFY_SYSTEM always answers"
        return value.decode()

    async def create_slot(self, name: str) -> NewSlot:
        """Create the slot; its snapshot can be used until the next call on this connection."""
        result = await self._execute(f"CREATE_REPLICATION_SLOT \"{name}\" LOGICAL pgoutput (SNAPSHOT 'export')")
        snapshot = result.get_value(0, 2)
        assert snapshot is not None, "an exported snapshot has a name"
        return NewSlot(snapshot.decode())

    async def drop_slot(self, name: str) -> None:
        """Drop the slot; missing already is fine."""
        try:
            await self._execute(f'DROP_REPLICATION_SLOT "{name}"')
        except SlotMissing:
            return

    async def start(self, slot: str, publication: str) -> None:
        """Begin to stream from where the slot stands.

        Raises:
            SlotBusy: another relay streams from it.
            SlotMissing: there is no such slot.
        """
        options = f"proto_version '1', publication_names '\"{publication}\"'"
        await self._execute(f'START_REPLICATION SLOT "{slot}" LOGICAL 0/0 ({options})')
        self._connection.nonblocking = 1

    async def _execute(self, statement: str) -> PGresult:
        result = await asyncio.to_thread(self._connection.exec_, statement.encode())
        if result.status in (pq.ExecStatus.TUPLES_OK, pq.ExecStatus.COMMAND_OK, pq.ExecStatus.COPY_BOTH):
            return result
        raise _error(result)

    async def wait(self, timeout_seconds: float) -> None:
        """Return when there may be something to read, or after the timeout.

        Only here bytes are taken off the socket: who does not wait lets the server wait.
        """
        socket = self._connection.socket
        self._readable.clear()
        self._loop.add_reader(socket, self._readable.set)
        try:
            async with asyncio.timeout(timeout_seconds):
                await self._readable.wait()
        except TimeoutError:
            return
        finally:
            self._loop.remove_reader(socket)
        try:
            self._connection.consume_input()
        except Exception as error:
            raise PostgresAway(str(error)) from error

    def receive(self) -> memoryview | None:
        """The next pgoutput message that has arrived, or None. Keepalives only change `wal_end` and `reply_wanted`.

        Raises:
            PostgresAway: the stream has ended.
        """
        while True:
            size, data = self._connection.get_copy_data(1)
            if size == 0:
                return None
            if size < 0:
                raise PostgresAway(self._connection.get_error_message())
            if data[0] == 119:  # "w": log data
                self.wal_end = max(self.wal_end, _XLOG_DATA.unpack_from(data)[2])
                return data[_XLOG_DATA.size :]
            _, wal_end, _, reply = _KEEPALIVE.unpack_from(data)
            self.wal_end = max(self.wal_end, wal_end)
            self.reply_wanted = self.reply_wanted or bool(reply)

    def confirm(self, lsn: int) -> None:
        """Everything before `lsn` is safe elsewhere: the slot may forget it.

        Raises:
            PostgresAway: the connection is gone.
        """
        now = int((time.time() - _EPOCH_2000) * 1_000_000)
        try:
            self._connection.put_copy_data(_FEEDBACK.pack(b"r", lsn, lsn, lsn, now, 0))
            self._connection.flush()
        except Exception as error:
            raise PostgresAway(str(error)) from error
        self.reply_wanted = False


def _error(result: PGresult) -> Exception:
    state = (result.error_field(pq.DiagnosticField.SQLSTATE) or b"").decode()
    message = result.get_error_message()
    if state == OBJECT_IN_USE:
        return SlotBusy(message)
    if state == UNDEFINED_OBJECT:
        return SlotMissing(message)
    return PostgresAway(message)
