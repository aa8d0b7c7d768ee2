"""Finds payments for people and tools: one by any of its ids, or many page by page.

The write path (infra/postgres/store.py) decides and books; this module reads, and repairs single rows. Every finder
uses an index and keeps at most 200 payments in memory; tests/integration/test_repository.py checks the plans.
"""

import base64
import binascii
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final, NoReturn
from uuid import UUID

import asyncpg
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from domain.commands import OperationKind
from domain.errors import ConcurrentUpdate, InputRefusedByStore, PaymentsError, StoreUnavailable
from domain.events import PaymentStatus
from domain.operations import OPEN, Operation, OperationState
from domain.payment import Payment
from domain.ports import OutboxRow
from infra.postgres.errors import LOST_RACE, REFUSED, UNAVAILABLE, safe_message
from infra.postgres.statements import OPERATION_FIELDS, PAYMENT_FIELDS
from infra.postgres.tables import operations, outbox, payments

MAX_PAGE_SIZE: Final = 200
DEFAULT_PAGE_SIZE: Final = 50

_PAYMENT_FIELDS: Final = PAYMENT_FIELDS[: PAYMENT_FIELDS.index("open_operations")]
_OPERATION_COLUMNS: Final = tuple(operations.c[name] for name in OPERATION_FIELDS)
_OPEN_STATES: Final = sorted(OPEN)

_UNAVAILABLE: Final = (*UNAVAILABLE, sa.exc.TimeoutError)


class PaymentExists(ConcurrentUpdate):
    """Another writer stored this payment first: read it and decide again."""


class GatewayPaymentTaken(InputRefusedByStore):
    """Another payment has this id at the gateway; a retry will not help."""


class StatusUnknown(InputRefusedByStore):
    """A status that the schema does not have."""


class AmountNegative(InputRefusedByStore):
    """An amount, or the count of open operations, below zero."""


class CapturedBeyondAuthorized(InputRefusedByStore):
    """Captured, released and reserved for capture together exceed what was authorized."""


class RefundedBeyondCaptured(InputRefusedByStore):
    """Refunded and reserved for refund together exceed what was captured."""


class ReturnedBeyondOwed(InputRefusedByStore):
    """More of other attempts' money was returned than they took, or than was refunded."""


class GatewayMissing(InputRefusedByStore):
    """The payment has a gateway's id but no gateway."""


class CurrencyMissing(InputRefusedByStore):
    """Money was authorized without a currency."""


ERROR_OF_CONSTRAINT: Final[dict[str, type[PaymentsError]]] = {
    "payments_payment_id_key": PaymentExists,
    "payments_gateway_payment_id": GatewayPaymentTaken,
    "payments_status_known": StatusUnknown,
    "payments_amounts_not_negative": AmountNegative,
    "payments_captured_within_authorized": CapturedBeyondAuthorized,
    "payments_refunded_within_captured": RefundedBeyondCaptured,
    "payments_returned_within_owed": ReturnedBeyondOwed,
    "payments_amounts_have_currency": CurrencyMissing,
    "payments_gateway_payment_has_gateway": GatewayMissing,
}
"""The error for each constraint of `payments`; a test checks that none is missing."""


@dataclass(frozen=True, slots=True)
class PaymentRecord:
    """A payment as it is stored, with its open operations. `id` is the store's own number, ascending."""

    id: int
    payment: Payment
    created_at: datetime
    updated_at: datetime


@dataclass(frozen=True, slots=True)
class Page:
    """Some of the matching payments, newest first; `next_cursor` leads to the others, None if there are none."""

    items: tuple[PaymentRecord, ...]
    next_cursor: str | None = None


@dataclass(frozen=True, slots=True)
class Stuck:
    """The payments that have waited longest, longest wait first; `is_more` says whether others wait as well."""

    items: tuple[PaymentRecord, ...]
    is_more: bool


@dataclass(frozen=True, slots=True)
class PaymentFilters:
    """Conditions on payments; None matches all. The bounds of amounts are inclusive, `created_until` is exclusive."""

    status: PaymentStatus | None = None
    gateway: str | None = None
    currency: str | None = None
    amount_min: int | None = None
    amount_max: int | None = None
    created_since: datetime | None = None
    created_until: datetime | None = None


def create_engine(url: str, *, size: int = 5) -> AsyncEngine:
    """An engine on asyncpg for a `postgresql://` URL. It connects when it is first used.

    Each query is planned for its own values: which index is best depends on how common a status is.
    """

    async def connect() -> "asyncpg.Connection[asyncpg.Record]":
        # asyncpg itself parses the URL: SQLAlchemy would pass the parameters after a `?` on as arguments that asyncpg
        # does not have.
        return await asyncpg.connect(
            url, timeout=10, command_timeout=30, server_settings={"plan_cache_mode": "force_custom_plan"}
        )

    return create_async_engine(
        "postgresql+asyncpg://",
        async_creator=connect,
        pool_size=size,
        max_overflow=0,
        pool_timeout=10,
        pool_pre_ping=True,
    )


class PaymentRepository:
    """The payments in Postgres.

    Every method raises StoreUnavailable when Postgres is away. The writing methods raise ConcurrentUpdate when another
    writer was first, and InputRefusedByStore when a constraint fails: the subclass in ERROR_OF_CONSTRAINT.
    """

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        # Two statements read a payment and its operations; they must share a snapshot.
        self._reader = engine.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)

    # --- writing -----------------------------------------------------------------------------------------------

    async def create(self, payment: Payment) -> PaymentRecord:
        """Store a new payment as version 1.

        Raises:
            PaymentExists: it is already stored.
            GatewayPaymentTaken: another payment has this id at its gateway.
            ValueError: the payment has operations, which only the write path stores.
        """
        if payment.operations:
            raise ValueError("operations are stored by the write path, together with what they book")
        values = _values(payment) | {"version": 1}
        async with self._write() as connection:
            result = await connection.execute(payments.insert().values(values).returning(payments))
            return _record(result.one(), ())

    async def update(self, payment: Payment) -> PaymentRecord:
        """Store `payment` as the version after `payment.version`; its operations are not changed.

        Raises:
            ConcurrentUpdate: the stored version differs, or there is no such payment.
            GatewayPaymentTaken: another payment has this id at its gateway.
        """
        return await self._change(payment.payment_id, payment.version, _values(payment))

    async def update_status(self, payment_id: UUID, status: PaymentStatus, *, version: int) -> PaymentRecord:
        """Set only the status, for repairs: the write path derives it from the amounts, and will do so again.

        Raises:
            ConcurrentUpdate: the stored version is not `version`, or there is no such payment.
        """
        return await self._change(payment_id, version, {"status": status.value})

    async def _change(self, payment_id: UUID, version: int, values: dict[str, Any]) -> PaymentRecord:
        change = (
            payments.update()
            .where(payments.c.payment_id == payment_id, payments.c.version == version)
            .values(values | {"version": version + 1, "updated_at": sa.func.now()})
            .returning(payments)
        )
        async with self._write() as connection:
            row = (await connection.execute(change)).one_or_none()
            if row is None:
                raise ConcurrentUpdate(f"payment {payment_id} is not at version {version}")
            return (await _with_operations(connection, [row]))[0]

    # --- one payment -------------------------------------------------------------------------------------------

    async def find_by_id(self, record_id: int) -> PaymentRecord | None:
        """The payment with this `PaymentRecord.id`."""
        return await self._one(sa.select(payments).where(payments.c.id == record_id))

    async def find_by_payment_id(self, payment_id: UUID) -> PaymentRecord | None:
        """The payment with this id in messages."""
        return await self._one(sa.select(payments).where(payments.c.payment_id == payment_id))

    async def find_by_gateway_payment_id(self, gateway: str, gateway_payment_id: str) -> PaymentRecord | None:
        """The payment with this id at `gateway`'s provider."""
        same = (payments.c.gateway_payment_id == gateway_payment_id, payments.c.gateway == gateway)
        return await self._one(sa.select(payments).where(*same))

    async def find_by_idempotency_key(self, idempotency_key: str) -> PaymentRecord | None:
        """The payment that has an operation accepted under this key."""
        owner = sa.select(operations.c.payment_id).where(operations.c.idempotency_key == idempotency_key)
        return await self._one(sa.select(payments).where(payments.c.payment_id == owner.scalar_subquery()))

    async def operations_of(self, payment_id: UUID) -> tuple[Operation, ...]:
        """All operations of a payment, open and final, in the order they were accepted."""
        wanted = sa.select(*_OPERATION_COLUMNS).where(operations.c.payment_id == payment_id)
        rows = await self._all(wanted.order_by(operations.c.number))
        return tuple(_operation(row) for row in rows)

    async def events_of(self, payment_id: UUID) -> tuple[OutboxRow, ...]:
        """The events of a payment that the outbox still has, in the order they happened."""
        o = outbox.c
        wanted = sa.select(o.id, o.type, o.payload, o.payment_seq, o.occurred_at, o.traceparent).where(
            o.aggregateid == str(payment_id)
        )
        rows = await self._all(wanted.order_by(o.payment_seq, o.created_at))
        return tuple(OutboxRow(payment_id=payment_id, **row._mapping) for row in rows)

    # --- many payments -----------------------------------------------------------------------------------------

    async def find_by_order_id(
        self, order_id: str, *, limit: int = DEFAULT_PAGE_SIZE, cursor: str | None = None
    ) -> Page:
        """The payments of an order."""
        return await self._page([payments.c.order_id == order_id], limit, cursor)

    async def find_by_customer_id(
        self, customer_id: str, *, limit: int = DEFAULT_PAGE_SIZE, cursor: str | None = None
    ) -> Page:
        """The payments of a customer."""
        return await self._page([payments.c.customer_id == customer_id], limit, cursor)

    async def find_by_status(
        self, status: PaymentStatus, *, limit: int = DEFAULT_PAGE_SIZE, cursor: str | None = None
    ) -> Page:
        """The payments in a status."""
        return await self._page([payments.c.status == status.value], limit, cursor)

    async def find_by_filters(
        self, filters: PaymentFilters, *, limit: int = DEFAULT_PAGE_SIZE, cursor: str | None = None
    ) -> Page:
        """The payments that match all of `filters`.

        Status and creation time have indexes; the other filters are applied to the rows read.
        """
        return await self._page(_conditions(filters), limit, cursor)

    async def count_by_filters(self, filters: PaymentFilters) -> int:
        """How many payments match; reads as many as the filters by status and creation time leave."""
        rows = await self._all(sa.select(sa.func.count()).select_from(payments).where(*_conditions(filters)))
        return int(rows[0][0])

    async def find_pending_captures(self, *, limit: int = DEFAULT_PAGE_SIZE) -> tuple[PaymentRecord, ...]:
        """Payments with something left to capture, those whose authorization ends soonest first."""
        p = payments.c
        wanted = (
            sa.select(payments)
            # A literal, because a bound value would not match the partial index.
            .where(sa.literal_column("payments.status IN ('authorized', 'partially_captured')"))
            .where(
                p.authorized_minor > p.captured_minor + p.released_minor + p.reserved_capture_minor + p.owed_held_minor
            )
            .order_by(p.authorization_expires_at, p.id)
            .limit(_page_size(limit))
        )
        return await self._records(wanted)

    async def find_stuck_payments(self, older_than: timedelta, *, limit: int = DEFAULT_PAGE_SIZE) -> Stuck:
        """Payments that wait for something that should have happened `older_than` ago or earlier.

        Either an operation that was due then has not been taken up, or one sent to the gateway then is still in
        progress; an operation that needs review counts at any age. Reads the index of all operations in progress.
        """
        size = _page_size(limit)
        o, horizon = operations.c, sa.func.now() - sa.literal(older_than, sa.Interval)
        # Every operation in progress has a due time, so the index of due operations contains it.
        kinds: tuple[tuple[sa.Column[datetime], sa.ColumnElement[bool]], ...] = (
            (o.due_at, o.due_at <= horizon),
            (o.dispatched_at, sa.and_(o.due_at.is_not(None), o.dispatched_at <= horizon)),
            (o.dispatched_at, _NEEDS_REVIEW),
        )
        found = sa.union_all(*(_longest(since, condition, size + 1) for since, condition in kinds)).subquery()
        oldest = sa.select(found.c.payment_id, sa.func.min(found.c.since).label("since")).group_by(found.c.payment_id)
        waits = oldest.subquery()
        wanted = sa.select(payments).join(waits, waits.c.payment_id == payments.c.payment_id)
        records = await self._records(wanted.order_by(waits.c.since, payments.c.id).limit(size + 1))
        return Stuck(records[:size], is_more=len(records) > size)

    # --- how ---------------------------------------------------------------------------------------------------

    async def _page(self, conditions: Iterable[sa.ColumnElement[bool]], limit: int, cursor: str | None) -> Page:
        size = _page_size(limit)
        wanted = sa.select(payments).where(*conditions)
        if cursor is not None:
            wanted = wanted.where(payments.c.id < _position(cursor))
        found = await self._records(wanted.order_by(payments.c.id.desc()).limit(size + 1))
        items = found[:size]
        return Page(items, _cursor(items[-1].id) if len(found) > size else None)

    async def _one(self, wanted: sa.Select[Any]) -> PaymentRecord | None:
        found = await self._records(wanted)
        return found[0] if found else None

    async def _records(self, wanted: sa.Select[Any]) -> tuple[PaymentRecord, ...]:
        async with self._read() as connection:
            return await _with_operations(connection, (await connection.execute(wanted)).all())

    async def _all(self, wanted: sa.Select[Any]) -> Sequence[sa.Row[Any]]:
        async with self._read() as connection:
            rows: Sequence[sa.Row[Any]] = (await connection.execute(wanted)).all()
            return rows

    @asynccontextmanager
    async def _read(self) -> AsyncIterator[AsyncConnection]:
        with _translated():
            async with self._reader.connect() as connection:
                yield connection

    @asynccontextmanager
    async def _write(self) -> AsyncIterator[AsyncConnection]:
        with _translated():
            async with self._engine.begin() as connection:
                yield connection


# A literal, because with a bound value the planner would not know that the partial index applies.
_NEEDS_REVIEW: Final = sa.literal_column(f"operations.state = '{OperationState.NEEDS_REVIEW.value}'", sa.Boolean)


def _longest(since: sa.Column[datetime], condition: sa.ColumnElement[bool], size: int) -> sa.Select[Any]:
    """The payments of the `size` operations that have met `condition` longest."""
    wanted = sa.select(operations.c.payment_id, since.label("since")).where(condition)
    return wanted.order_by(since).limit(size).subquery().select()


async def _with_operations(connection: AsyncConnection, rows: Sequence[sa.Row[Any]]) -> tuple[PaymentRecord, ...]:
    """The payments in `rows`, each with its open operations."""
    busy = [row.payment_id for row in rows if row.open_operations]
    found: dict[UUID, list[Operation]] = {}
    if busy:
        wanted = sa.select(*_OPERATION_COLUMNS).where(
            operations.c.payment_id == sa.any_(sa.literal(busy, sa.ARRAY(operations.c.payment_id.type))),
            operations.c.state.in_(_OPEN_STATES),
        )
        for row in await connection.execute(wanted.order_by(operations.c.payment_id, operations.c.number)):
            found.setdefault(row.payment_id, []).append(_operation(row))
    return tuple(_record(row, tuple(found.get(row.payment_id, ()))) for row in rows)


def _record(row: sa.Row[Any], open_operations: tuple[Operation, ...]) -> PaymentRecord:
    values = {name: row._mapping[name] for name in _PAYMENT_FIELDS}
    payment = Payment(**values | {"status": PaymentStatus(row.status)}, operations=open_operations)
    return PaymentRecord(row.id, payment, row.created_at, row.updated_at)


def _operation(row: sa.Row[Any]) -> Operation:
    values = dict(row._mapping)
    return Operation(**values | {"kind": OperationKind(row.kind), "state": OperationState(row.state)})


def _values(payment: Payment) -> dict[str, Any]:
    return {name: getattr(payment, name) for name in _PAYMENT_FIELDS} | {"status": payment.status.value}


def _conditions(filters: PaymentFilters) -> list[sa.ColumnElement[bool]]:
    p = payments.c
    possible: list[tuple[object, sa.ColumnElement[bool]]] = [
        (filters.status, p.status == filters.status),
        (filters.gateway, p.gateway == filters.gateway),
        (filters.currency, p.currency == filters.currency),
        (filters.amount_min, p.amount_minor >= sa.literal(filters.amount_min, sa.BigInteger)),
        (filters.amount_max, p.amount_minor <= sa.literal(filters.amount_max, sa.BigInteger)),
        (filters.created_since, p.created_at >= sa.literal(filters.created_since, p.created_at.type)),
        (filters.created_until, p.created_at < sa.literal(filters.created_until, p.created_at.type)),
    ]
    return [condition for value, condition in possible if value is not None]


def _page_size(limit: int) -> int:
    if not 1 <= limit <= MAX_PAGE_SIZE:
        raise ValueError(f"a page has 1 to {MAX_PAGE_SIZE} payments, not {limit}")
    return limit


def _cursor(record_id: int) -> str:
    return base64.urlsafe_b64encode(record_id.to_bytes(8, "big")).decode().rstrip("=")


def _position(cursor: str) -> int:
    try:
        decoded = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError("not a cursor of this service") from error
    position = int.from_bytes(decoded, "big")
    if len(decoded) != 8 or position >= 2**63:
        raise ValueError("not a cursor of this service")
    return position


@contextmanager
def _translated() -> Iterator[None]:
    """Translate the driver's errors into ours."""
    try:
        yield
    except sa.exc.DBAPIError as error:
        # The dialect wraps asyncpg's own error, whose type distinguishes the cases.
        _raise_ours(error.orig.__cause__ if error.orig is not None else None, error)
    except (*_UNAVAILABLE, asyncpg.PostgresError) as error:  # errors while connecting are not wrapped
        _raise_ours(error, error)


def _raise_ours(cause: BaseException | None, error: Exception) -> NoReturn:
    ours = _ours(cause, error)
    if ours is None:
        raise error
    raise ours from error


def _ours(cause: BaseException | None, error: Exception) -> PaymentsError | None:
    """Our error for `cause`, most specific first; None where we have none, as for a wrong column."""
    message = safe_message(cause or error)
    named = ERROR_OF_CONSTRAINT.get(getattr(cause, "constraint_name", None) or "")
    if named is not None:
        return named(message)
    kinds: tuple[tuple[type[PaymentsError], tuple[type[BaseException], ...]], ...] = (
        (ConcurrentUpdate, LOST_RACE),
        (InputRefusedByStore, REFUSED),
        (StoreUnavailable, _UNAVAILABLE),
    )
    for kind, vendors in kinds:
        if isinstance(cause, vendors):
            return kind(message)
    return None
