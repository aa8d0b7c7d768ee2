"""The transaction of the write path; no other module writes for it (repository.py changes single rows).

Its statements (statements.py) are sent on asyncpg directly: this is the hot path.
"""

from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from contextvars import ContextVar
from datetime import timedelta
from operator import attrgetter
from typing import Any, Final
from uuid import UUID

import asyncpg

from domain.commands import OperationKind
from domain.events import PaymentStatus
from domain.operations import OPEN, Operation, OperationState
from domain.payment import Payment
from domain.ports import Changes, HeldLease, LapsedHold, OutboxRow, Place, Stuck
from infra.postgres.clock import PostgresClock
from infra.postgres.errors import translated
from infra.postgres.pool import Connection
from infra.postgres.statements import (
    CLAIM_DUE,
    CLAIM_HOLDS,
    COUNT_DUE_BUT,
    COUNT_UNDER_WAY,
    FIND_LAPSED_HOLDS,
    FIND_OPERATIONS,
    FIND_UNDER_WAY,
    IN_DOUBT,
    LOCK_PAYMENTS,
    MAKE_DUE,
    MAKE_HOLDS_DUE,
    OPEN_OPERATIONS,
    OPERATION_FIELDS,
    OPERATIONS_AT,
    OPERATIONS_OF_KIND,
    PAYMENT_FIELDS,
    PAYMENTS_OF,
    RENEW_LEASES,
    SAVE,
    STUCK,
)

_OPEN_STATES: Final = sorted(OPEN)

_in_transaction: ContextVar[bool] = ContextVar("in_transaction", default=False)


class PostgresStore:
    """Payments in Postgres; fits `domain.ports.PaymentStore`, which documents the methods without a docstring here.

    Every method raises StoreUnavailable when Postgres is away.
    """

    def __init__(self, pool: "asyncpg.Pool[asyncpg.Record]", clock: PostgresClock | None = None) -> None:
        self._pool = pool
        self.now = clock or PostgresClock()

    async def look_at_clock(self) -> None:
        """Make `now` return Postgres's time from here on; before that it is this machine's."""
        async with self._connection() as connection:
            await self.now.look(connection)

    @asynccontextmanager
    async def _connection(self) -> AsyncIterator[Connection]:
        with translated():
            async with self._pool.acquire() as connection:
                yield connection

    @asynccontextmanager
    async def begin(self) -> AsyncIterator["PostgresTransaction"]:
        """Leaving the block commits, raising rolls back. Nesting is an error."""
        assert not _in_transaction.get(), "a write transaction does not nest"
        mark = _in_transaction.set(True)
        try:
            async with self._connection() as connection, connection.transaction():
                yield PostgresTransaction(connection)
        finally:
            _in_transaction.reset(mark)

    async def save(self, changes: Changes) -> None:
        async with self._connection() as connection:
            await _save(connection, changes)

    def in_transaction(self) -> bool:
        return _in_transaction.get()

    async def claim_due(
        self, *, limit: int, lease: timedelta, rooms: Mapping[str, int], payment_id: UUID | None = None
    ) -> list[tuple[Payment, Operation]]:
        async with self._connection() as connection:
            await self.now.look(connection)  # The age of a claimed operation decides whether it may be sent again.
            rows = await connection.fetch(CLAIM_DUE, limit, lease, list(rooms), list(rooms.values()), payment_id)
            return await _with_payments(connection, [_operation(row) for row in rows])

    async def find_under_way(self, payment_id: UUID | None, *, limit: int) -> list[tuple[Payment, Operation]]:
        """Operations that nobody is working on, soonest due first, of one payment or of all. Claims nothing.

        They wait for their next attempt, or their worker's lease expired without an answer.
        """
        async with self._connection() as connection:
            operations = [_operation(row) for row in await connection.fetch(FIND_UNDER_WAY, payment_id, limit)]
            return await _with_payments(connection, operations)

    async def count_under_way(self, payment_id: UUID | None) -> int:
        """How many operations nobody is working on, of one payment or of all."""
        async with self._connection() as connection:
            return int(await connection.fetchval(COUNT_UNDER_WAY, payment_id))

    async def count_due_but(self, asked: Iterable[tuple[UUID, int]], payment_id: UUID | None) -> dict[str, int]:
        """How many operations besides `asked` are due, by gateway, of one payment or of all."""
        places = list(asked)
        known, numbers = [each[0] for each in places], [each[1] for each in places]
        async with self._connection() as connection:
            rows = await connection.fetch(COUNT_DUE_BUT, payment_id, known, numbers)
        return {row["gateway"]: row["number"] for row in rows}

    async def make_due(self, payment_id: UUID | None) -> int:
        async with self._connection() as connection:
            return int((await connection.execute(MAKE_DUE, payment_id)).split()[-1])

    async def in_doubt(self) -> dict[OperationState, tuple[int, float]]:
        async with self._connection() as connection:
            rows = await connection.fetch(IN_DOUBT)
        return {OperationState(row["state"]): (row["count"], row["seconds"] or 0.0) for row in rows}

    async def stuck(self) -> dict[str, Stuck]:
        async with self._connection() as connection:
            rows = await connection.fetch(STUCK)
        return {
            row["subject"]: Stuck(row["number"], row["oldest"] or 0.0, max(row["overdue"] or 0.0, 0.0)) for row in rows
        }

    async def claim_holds(
        self, payment_id: UUID | None = None, *, limit: int, first_delay: timedelta, delay_max: timedelta
    ) -> list[LapsedHold]:
        async with self._connection() as connection:
            return [
                _hold(row) for row in await connection.fetch(CLAIM_HOLDS, limit, payment_id, first_delay, delay_max)
            ]

    async def find_lapsed_holds(
        self, payment_id: UUID | None = None, *, after: Place | None = None, limit: int
    ) -> list[LapsedHold]:
        async with self._connection() as connection:
            place = after or (None, None)
            return [_hold(row) for row in await connection.fetch(FIND_LAPSED_HOLDS, payment_id, *place, limit)]

    async def make_holds_due(self, payment_id: UUID | None = None) -> int:
        async with self._connection() as connection:
            return int((await connection.execute(MAKE_HOLDS_DUE, payment_id)).split()[-1])

    async def renew(self, held: Sequence[HeldLease], *, lease: timedelta) -> list[HeldLease]:
        async with self._connection() as connection:
            # Sorted as answers are saved, which may be those of the same operations: the two cannot deadlock.
            rows = await connection.fetch(RENEW_LEASES, *zip(*sorted(held), strict=True), lease)
        return [HeldLease(*row) for row in rows]


def _hold(row: asyncpg.Record) -> LapsedHold:
    width = len(PAYMENT_FIELDS)
    *values, due_at = row
    return LapsedHold(_payment(values[:width], ()), _operation(values[width:]), due_at)


async def _with_payments(connection: Connection, operations: list[Operation]) -> list[tuple[Payment, Operation]]:
    found = await connection.fetch(PAYMENTS_OF, [each.payment_id for each in operations])
    payments = {row["payment_id"]: _payment(row, ()) for row in found}
    return [(payments[each.payment_id], each) for each in operations]


class PostgresTransaction:
    """One open write transaction; fits `domain.ports.WriteTransaction`, which documents each method."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def lock_payments(self, payment_ids: Iterable[UUID]) -> dict[UUID, Payment]:
        rows = await self._connection.fetch(LOCK_PAYMENTS, list(payment_ids))
        open_operations = await self._open_operations([row["payment_id"] for row in rows if row["open_operations"]])
        return {row["payment_id"]: _payment(row, tuple(open_operations.get(row["payment_id"], ()))) for row in rows}

    async def _open_operations(self, payment_ids: list[UUID]) -> dict[UUID, list[Operation]]:
        if not payment_ids:
            return {}
        grouped: dict[UUID, list[Operation]] = {}
        for row in await self._connection.fetch(OPEN_OPERATIONS, payment_ids, _OPEN_STATES):
            grouped.setdefault(row["payment_id"], []).append(_operation(row))
        return grouped

    async def find_operations(self, idempotency_keys: Iterable[str]) -> dict[str, Operation]:
        keys = list(idempotency_keys)
        if not keys:
            return {}
        rows = await self._connection.fetch(FIND_OPERATIONS, keys)
        return {row["idempotency_key"]: _operation(row) for row in rows}

    async def operations_at(self, places: Iterable[tuple[UUID, int]]) -> dict[tuple[UUID, int], Operation]:
        wanted = list(places)
        if not wanted:
            return {}
        rows = await self._connection.fetch(OPERATIONS_AT, *zip(*wanted, strict=True))
        return {(row["payment_id"], row["number"]): _operation(row) for row in rows}

    async def operations_of_kind(
        self, places: Iterable[tuple[UUID, OperationKind]]
    ) -> dict[tuple[UUID, OperationKind], list[Operation]]:
        wanted = list(places)
        if not wanted:
            return {}
        found: dict[tuple[UUID, OperationKind], list[Operation]] = {}
        for row in await self._connection.fetch(OPERATIONS_OF_KIND, *zip(*wanted, strict=True)):
            operation = _operation(row)
            found.setdefault((operation.payment_id, operation.kind), []).append(operation)
        return found

    async def save(self, changes: Changes) -> None:
        with translated():
            await _save(self._connection, changes)


async def _save(connection: Connection, changes: Changes) -> None:
    """Write everything or nothing, rows in a fixed order so that two batches never deadlock."""
    await connection.fetchval(
        SAVE,
        changes.decided_at,
        [_new_payment_row(each) for each in sorted(changes.new_payments, key=_lock_order)],
        [_payment_row(each) for each in sorted(changes.payments, key=_lock_order)],
        [_new_operation_row(each) for each in sorted(changes.new_operations, key=_key_order)],
        [_operation_row(each) for each in sorted(changes.operations, key=_place_order)],
        [_transfer_row(each) for each in changes.transfers],
        [_outbox_row(each) for each in changes.outbox],
        changes.notices,
    )


_lock_order = attrgetter("payment_id.int")
_place_order = attrgetter("payment_id.int", "number")


def _key_order(operation: Operation) -> str:
    return operation.idempotency_key or ""


_payment_fields = attrgetter(*PAYMENT_FIELDS[: PAYMENT_FIELDS.index("disputes")])
_operation_row = attrgetter(
    "payment_id", "number", "state", "amount_minor", "gateway", "reference", "attempts", "lease_token", "is_leased",
    "due_at", "dispatched_at", "replays_due", "result",
)  # fmt: skip
_new_operation_row = attrgetter(*OPERATION_FIELDS)
_transfer_row = attrgetter("payment_id", "payment_seq", "debit", "credit", "amount_minor", "currency")


_STATUS: Final = PAYMENT_FIELDS.index("status")
_VERSION: Final = PAYMENT_FIELDS.index("version")
_KIND: Final = OPERATION_FIELDS.index("kind")
_STATE: Final = OPERATION_FIELDS.index("state")


def _payment_row(payment: Payment) -> tuple[Any, ...]:
    """The values in the order of the type `payment_row`, to which later columns were appended."""
    owed = payment.owed_held_minor, payment.owed_captured_minor, payment.owed_returned_minor
    return (*_payment_fields(payment), len(payment.operations), payment.disputes, *owed)


def _new_payment_row(payment: Payment) -> tuple[Any, ...]:
    """A new payment is stored as version 1."""
    row = _payment_row(payment)
    return (*row[:_VERSION], 1, *row[_VERSION + 1 :])


def _outbox_row(row: OutboxRow) -> tuple[Any, ...]:
    return (row.id, str(row.payment_id), row.type, row.payload, row.payment_seq, row.occurred_at, row.traceparent)


def _payment(row: Iterable[Any], operations: tuple[Operation, ...]) -> Payment:
    values: list[Any] = list(row)  # A record iterates its values.
    values[_STATUS], values[-1] = PaymentStatus(values[_STATUS]), operations
    return Payment(*values)


def _operation(row: Iterable[Any]) -> Operation:
    values: list[Any] = list(row)
    values[_KIND], values[_STATE] = OperationKind(values[_KIND]), OperationState(values[_STATE])
    return Operation(*values)
