"""The one write path's transaction: the only module that begins, commits and rolls back a write of payments.

Reads and writes are set-based statements, sent on asyncpg directly: this is the hot path. Rows travel as one
array of a composite type, which asyncpg encodes in a third of the time that one array a column takes. The plans are
pinned to the indexes (`PINNED_PLANS`): joined with `unnest`, Postgres guesses row counts, and a plan made while a table
was small would scan all of it for ever (tests/integration/test_query_plans.py reads the plans).
"""

import asyncio
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from contextvars import ContextVar
from dataclasses import fields
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

IDLE_IN_TRANSACTION_MS: Final = 10_000
"""A process that is stopped in the middle of its transaction keeps its payments locked for no longer than this."""

PINNED_PLANS: Final = {"enable_seqscan": "off", "enable_hashjoin": "off", "enable_mergejoin": "off"}

PAYMENT_FIELDS: Final = (*(each.name for each in fields(Payment) if each.name != "operations"), "open_operations")
"""A payment's columns, in the order of its fields: the last only counts what the last field holds."""

OPERATION_FIELDS: Final = tuple(each.name for each in fields(Operation) if each.name != "command")
"""An operation's columns, in the order of its fields and of the type `operation_row`."""

PAYMENT_COLUMNS: Final = ", ".join(PAYMENT_FIELDS)
OPERATION_COLUMNS: Final = ", ".join(OPERATION_FIELDS)
OPERATION_COLUMNS_OF_O: Final = ", ".join(f"o.{name}" for name in OPERATION_FIELDS)

# NO KEY: nothing refers to payments by foreign key, and the weaker lock is the one that an UPDATE takes anyway.
LOCK_PAYMENTS = f"""
    SELECT {PAYMENT_COLUMNS} FROM payments WHERE payment_id = ANY($1::uuid[])
     ORDER BY payment_id FOR NO KEY UPDATE
"""
OPEN_OPERATIONS = f"""
    SELECT {OPERATION_COLUMNS} FROM operations
     WHERE payment_id = ANY($1::uuid[]) AND state = ANY($2::text[])
     ORDER BY payment_id, number
"""
OPERATIONS_AT = f"""
    SELECT {OPERATION_COLUMNS} FROM operations
     WHERE (payment_id, number) IN (SELECT * FROM unnest($1::uuid[], $2::integer[]))
"""
OPERATIONS_OF_KIND = f"""
    SELECT {OPERATION_COLUMNS} FROM operations
     WHERE (payment_id, kind) IN (SELECT * FROM unnest($1::uuid[], $2::text[]))
     ORDER BY payment_id, number
"""
FIND_OPERATIONS = f"SELECT {OPERATION_COLUMNS} FROM operations WHERE idempotency_key = ANY($1::text[])"

# A row that exists already is another worker's: the count tells, and the batch is decided again.
INSERT_PAYMENTS = f"""
    INSERT INTO payments ({PAYMENT_COLUMNS}) SELECT {PAYMENT_COLUMNS} FROM unnest($2::payment_row[])
    ON CONFLICT (payment_id) DO NOTHING
"""
UPDATE_PAYMENTS = """
    UPDATE payments AS p
       SET order_id = x.order_id, customer_id = x.customer_id, gateway = x.gateway,
           gateway_payment_id = x.gateway_payment_id, currency = x.currency, amount_minor = x.amount_minor,
           authorized_minor = x.authorized_minor, captured_minor = x.captured_minor,
           released_minor = x.released_minor, refunded_minor = x.refunded_minor,
           disputed_minor = x.disputed_minor, reserved_capture_minor = x.reserved_capture_minor,
           reserved_refund_minor = x.reserved_refund_minor, status = x.status,
           has_indeterminate = x.has_indeterminate, last_operation = x.last_operation, last_seq = x.last_seq,
           version = x.version + 1, authorization_expires_at = x.authorization_expires_at,
           disputes = x.disputes, owed_held_minor = x.owed_held_minor, owed_captured_minor = x.owed_captured_minor,
           owed_returned_minor = x.owed_returned_minor, open_operations = x.open_operations, updated_at = now()
      FROM unnest($3::payment_row[]) AS x
     WHERE p.payment_id = x.payment_id AND p.version = x.version
"""
# Due times are written relative to the database's clock ($1 is the time of the decision): leases know one clock.
INSERT_OPERATIONS = f"""
    INSERT INTO operations ({OPERATION_COLUMNS}, settled_at)
    SELECT {OPERATION_COLUMNS.replace("due_at", "now() + (due_at - $1::timestamptz)", 1)},
           CASE WHEN result IS NOT NULL THEN now() END
      FROM unnest($4::operation_row[])
    ON CONFLICT DO NOTHING
"""
# The token in the WHERE clause is the fence: a worker whose lease was taken over matches no row. An operation that
# waits was never leased; its payment's version guards it.
UPDATE_OPERATIONS = """
    UPDATE operations AS o
       SET state = x.state, amount_minor = x.amount_minor, gateway = x.gateway, reference = x.reference,
           attempts = x.attempts, lease_token = x.lease_token, is_leased = x.is_leased,
           due_at = now() + (x.due_at - $1::timestamptz), dispatched_at = x.dispatched_at,
           replays_due = x.replays_due, result = x.result,
           settled_at = CASE WHEN x.result IS NOT NULL THEN now() END
      FROM unnest($5::operation_change[]) AS x
     WHERE o.payment_id = x.payment_id AND o.number = x.number
       AND (o.lease_token = x.lease_token OR o.state = 'received')
"""
INSERT_LEDGER = """
    INSERT INTO ledger (payment_id, payment_seq, debit, credit, amount_minor, currency)
    SELECT * FROM unnest($6::transfer_row[])
"""
INSERT_OUTBOX = """
    INSERT INTO outbox (id, aggregateid, type, payload, payment_seq, occurred_at, traceparent)
    SELECT * FROM unnest($7::outbox_row[])
"""
HEED_NOTICES = "UPDATE inbox SET due_at = NULL, applied_at = now() WHERE id = ANY($8::bigint[])"
# One round trip for all of it and, outside a transaction, one by itself. The parts touch different tables, so that they
# share a snapshot does not matter. If a part wrote fewer rows than it was given, all of it is undone.
SAVE = f"""
    WITH new_payments AS ({INSERT_PAYMENTS} RETURNING 1),
         changed_payments AS ({UPDATE_PAYMENTS} RETURNING 1),
         new_operations AS ({INSERT_OPERATIONS} RETURNING 1),
         changed_operations AS ({UPDATE_OPERATIONS} RETURNING 1),
         booked AS ({INSERT_LEDGER}),
         heeded AS ({HEED_NOTICES}),
         published AS ({INSERT_OUTBOX})
    SELECT require_rows(
        ARRAY[(SELECT count(*) FROM new_payments), (SELECT count(*) FROM changed_payments),
              (SELECT count(*) FROM new_operations), (SELECT count(*) FROM changed_operations)],
        ARRAY[cardinality($2), cardinality($3), cardinality($4), cardinality($5)])
"""
# SKIP LOCKED: several workers sweep at once and share the work. An expired lease means that its holder may have
# called the gateway. Gateway by gateway, found by steps from one name to the next: one that is full ($3 and $4 say how
# much each has room for), with however much is due there, keeps none of the others' from being found. Half of the room
# is for what was refused at the door, its newest first, whose payer is the likeliest to be still there; the oldest of
# all have the rest, so that nothing waits for ever (where there is room for one only, they have it by chance). One that
# is found as both is updated once. What is of none of the caller's gateways ($3) is for workers that have it: while a
# release adds one, some have it and some not yet, and these could only end what those would send.
REFUSED = "state = 'dispatched' AND NOT is_leased"
OF_THIS = "($5::uuid IS NULL OR payment_id = $5)"
FORSAKEN_AFTER = "interval '6 hours'"
"""Due for so long, it is taken over by whoever does not have its gateway: nobody has it any more."""
DUE = f"""
    named AS (
        (SELECT gateway FROM operations WHERE due_at IS NOT NULL ORDER BY gateway LIMIT 1)
        UNION ALL
        SELECT (SELECT o.gateway FROM operations AS o WHERE o.due_at IS NOT NULL AND o.gateway > n.gateway
                 ORDER BY o.gateway LIMIT 1)
          FROM named AS n WHERE n.gateway IS NOT NULL
    ), due AS MATERIALIZED (
        SELECT d.payment_id, d.number
          FROM (SELECT n.gateway, least($1, coalesce(r.room, $1)) AS room,
                       CASE WHEN r.gateway IS NOT NULL THEN now() ELSE now() - {FORSAKEN_AFTER} END AS by
                  FROM named AS n LEFT JOIN unnest($3::text[], $4::integer[]) AS r(gateway, room) USING (gateway)
               ) AS given
         CROSS JOIN LATERAL (
               SELECT * FROM (
                      SELECT payment_id, number FROM operations
                       WHERE gateway = given.gateway AND {REFUSED} AND due_at <= given.by AND {OF_THIS}
                       ORDER BY due_at DESC LIMIT (given.room + round(random())::integer) / 2
                         FOR UPDATE SKIP LOCKED) AS refused
               UNION ALL
               SELECT * FROM (
                      SELECT payment_id, number FROM operations
                       WHERE gateway = given.gateway AND due_at IS NOT NULL AND due_at <= given.by AND {OF_THIS}
                       ORDER BY due_at LIMIT given.room FOR UPDATE SKIP LOCKED) AS oldest
               LIMIT given.room) AS d
    )
"""
CLAIM_DUE = f"""
    WITH RECURSIVE {DUE}
    UPDATE operations AS o
       SET state = CASE WHEN o.is_leased AND o.state = 'dispatched' THEN 'indeterminate' ELSE o.state END,
           lease_token = o.lease_token + 1, attempts = o.attempts + 1, is_leased = true, due_at = now() + $2::interval
      FROM due
     WHERE o.payment_id = due.payment_id AND o.number = due.number
    RETURNING {OPERATION_COLUMNS_OF_O}
"""
RENEW_LEASES = """
    UPDATE operations AS o SET due_at = now() + $4::interval
      FROM unnest($1::uuid[], $2::integer[], $3::bigint[]) AS x(payment_id, number, lease_token)
     WHERE o.payment_id = x.payment_id AND o.number = x.number AND o.lease_token = x.lease_token AND o.is_leased
    RETURNING o.payment_id, o.number, o.lease_token
"""
# What nobody is working on: it waits for its next attempt, or its worker has not answered within the lease.
NOT_AT_WORK = "due_at IS NOT NULL AND (NOT is_leased OR due_at <= now())"
OF_ONE = "($1::uuid IS NULL OR payment_id = $1)"
FIND_UNDER_WAY = f"""
    SELECT {OPERATION_COLUMNS_OF_O} FROM operations AS o
     WHERE {NOT_AT_WORK} AND {OF_ONE}
     ORDER BY due_at LIMIT $2
"""
COUNT_UNDER_WAY = f"SELECT count(*) FROM operations WHERE {NOT_AT_WORK} AND {OF_ONE}"
COUNT_DUE_BUT = f"""
    SELECT gateway, count(*) AS number FROM operations
     WHERE due_at IS NOT NULL AND due_at <= now() AND {OF_ONE}
       AND (payment_id, number) NOT IN (SELECT * FROM unnest($2::uuid[], $3::integer[]))
     GROUP BY gateway
"""
MAKE_DUE = """
    UPDATE operations SET due_at = now()
     WHERE due_at > now() AND NOT is_leased AND ($1::uuid IS NULL OR payment_id = $1)
"""
HOLDING = "authorized_minor > captured_minor + released_minor"
HOLD_DUE = "greatest(hold_due_at, authorization_expires_at)"
"""Both as the index has them, or it is not used."""
HOLD_COLUMNS = f"""
    {", ".join(f"p.{name}" for name in PAYMENT_FIELDS)},
    {", ".join(f"o.{name} AS o_{name}" for name in OPERATION_FIELDS)}, {HOLD_DUE}
"""
HELD_BY = "operations AS o ON o.payment_id = p.payment_id AND o.kind = 'authorize' AND o.state = 'succeeded'"
# The claim itself puts the next question off, so that several workers share the holds, and one that ends in the middle
# of it leaves them to be asked about at their next time. Spread downwards, since $4 is the latest that may be.
HOLDS_DUE = f"""
    due AS MATERIALIZED (
        SELECT id FROM payments
         WHERE {HOLDING} AND {HOLD_DUE} <= now() AND open_operations = 0
           AND ($2::uuid IS NULL OR payment_id = $2)
         ORDER BY {HOLD_DUE} LIMIT $1 FOR NO KEY UPDATE SKIP LOCKED
    )
"""
CLAIM_HOLDS = f"""
    WITH {HOLDS_DUE}, claimed AS (
        UPDATE payments AS p
           SET hold_due_at = now() + (0.75 + random() / 4)
                           * least($4::interval, $3::interval * (2.0 ^ least(p.hold_questions, 20))::float),
               hold_questions = p.hold_questions + 1
          FROM due WHERE p.id = due.id
        RETURNING p.*
    )
    SELECT {HOLD_COLUMNS} FROM claimed AS p JOIN {HELD_BY}
"""
# Past their end, whenever they are to be asked about next; that is put off by a day at most (`domain.rules`), which
# bounds how much of the index is read.
LAPSED = (
    f"{HOLDING} AND authorization_expires_at <= now() AND {HOLD_DUE} <= now() + interval '1 day'"
    " AND open_operations = 0"
)
FIND_LAPSED_HOLDS = f"""
    SELECT {HOLD_COLUMNS}
      FROM (SELECT * FROM payments
             WHERE {LAPSED} AND {OF_ONE} AND {HOLD_DUE} >= coalesce($2::timestamptz, '-infinity')
               AND ($2 IS NULL OR ({HOLD_DUE}, payment_id) > ($2, $3))
             ORDER BY {HOLD_DUE}, payment_id LIMIT $4) AS p
      JOIN {HELD_BY}
     ORDER BY {HOLD_DUE}, p.payment_id
"""
MAKE_HOLDS_DUE = f"UPDATE payments SET hold_due_at = NULL WHERE {LAPSED} AND {OF_ONE} AND hold_due_at > now()"
STUCK = f"""
    SELECT 'operation' AS subject, count(*) AS number, extract(epoch FROM now() - min(dispatched_at))::float AS oldest,
           extract(epoch FROM now() - min(due_at))::float AS overdue
      FROM operations WHERE {NOT_AT_WORK}
    UNION ALL
    SELECT 'hold', count(*), extract(epoch FROM now() - min(authorization_expires_at))::float,
           extract(epoch FROM now() - min({HOLD_DUE}))::float
      FROM payments WHERE {LAPSED}
    UNION ALL
    SELECT 'webhook', count(*), extract(epoch FROM now() - min(received_at))::float,
           extract(epoch FROM now() - min(due_at))::float
      FROM inbox WHERE due_at IS NOT NULL
"""
IN_DOUBT = """
    SELECT count(*), extract(epoch FROM now() - min(dispatched_at))::float AS seconds FROM operations
     WHERE state IN ('indeterminate', 'needs_review')
"""
PAYMENTS_OF = f"SELECT {PAYMENT_COLUMNS} FROM payments WHERE payment_id = ANY($1::uuid[])"

_OPEN_STATES: Final = sorted(OPEN)

CLOSES_WITHIN: Final = 5.0
"""Seconds that a server may take to let connections go."""

_in_transaction: ContextVar[bool] = ContextVar("in_transaction", default=False)

Connection = Any
"""An asyncpg connection or the pool's proxy of one, which share no public type."""


async def create_pool(url: str, *, size: int) -> "asyncpg.Pool[asyncpg.Record]":
    """A pool for the write path, with the plans pinned.

    Raises:
        StoreUnavailable: Postgres cannot be reached.
    """
    with translated():
        return await asyncpg.create_pool(
            url,
            min_size=1,
            max_size=size,
            command_timeout=30,
            timeout=10,
            server_settings=PINNED_PLANS | {"idle_in_transaction_session_timeout": str(IDLE_IN_TRANSACTION_MS)},
            init=_insist_on_the_disk,
            reset=_keep_session,
        )


async def close_pool(pool: "asyncpg.Pool[asyncpg.Record]") -> None:
    """End its connections in good order, or at once where the server does not answer."""
    try:
        async with asyncio.timeout(CLOSES_WITHIN):
            await pool.close()
    except TimeoutError:
        pool.terminate()


async def _insist_on_the_disk(connection: Connection) -> None:
    """A provider is called, and a webhook answered, on the strength of a commit: it must outlive a crash of Postgres,
    whatever the database is set to. Whether standbys are waited for, too, is the database's own affair.
    """
    await connection.execute(
        "SELECT set_config('synchronous_commit', 'on', false) WHERE current_setting('synchronous_commit') = 'off'"
    )


async def _keep_session(_: Connection) -> None:
    """Transactions leave nothing behind in a session, so the pool's default reset would be a round trip for nothing."""


class PostgresStore:
    """Payments in Postgres. Every method raises StoreUnavailable when Postgres is away."""

    def __init__(self, pool: "asyncpg.Pool[asyncpg.Record]", clock: PostgresClock | None = None) -> None:
        self._pool = pool
        self.now = clock or PostgresClock()

    async def look_at_clock(self) -> None:
        """Have `now` tell Postgres's time from here on; before, it is this machine's."""
        with translated():
            await self.now.look(self._pool)

    @asynccontextmanager
    async def begin(self) -> AsyncIterator["PostgresTransaction"]:
        """Leaving the block commits, raising rolls back. Nesting is an error."""
        assert not _in_transaction.get(), "a write transaction does not nest"
        mark = _in_transaction.set(True)
        try:
            with translated():
                async with self._pool.acquire() as connection, connection.transaction():
                    yield PostgresTransaction(connection)
        finally:
            _in_transaction.reset(mark)

    async def save(self, changes: Changes) -> None:
        """Write changes that were decided without a look at the stored rows: all of them, or nothing.

        Raises:
            ConcurrentUpdate: a row is not as the changes assume.
            InputRefusedByStore: a constraint refused a row.
        """
        with translated():
            async with self._pool.acquire() as connection:
                await _save(connection, changes)

    def in_transaction(self) -> bool:
        """Whether the current task is inside `begin`, where no gateway may be called."""
        return _in_transaction.get()

    async def claim_due(
        self, *, limit: int, lease: timedelta, rooms: Mapping[str, int], payment_id: UUID | None = None
    ) -> list[tuple[Payment, Operation]]:
        """Take over operations that are due, each gateway's oldest first: the caller's until `lease` has passed.

        Of one payment, or of all; of one gateway at most `limit`, or what `rooms` says if that is less: these are the
        caller's gateways: of others it gets what nobody has taken over in hours.
        An operation whose lease ran out without an answer comes back `indeterminate`.
        """
        with translated():
            async with self._pool.acquire() as connection:
                await self.now.look(connection)  # How old what is taken over is, decides whether it may be sent again.
                rows = await connection.fetch(CLAIM_DUE, limit, lease, list(rooms), list(rooms.values()), payment_id)
                return await _with_payments(connection, [_operation(row) for row in rows])

    async def find_under_way(self, payment_id: UUID | None, *, limit: int) -> list[tuple[Payment, Operation]]:
        """Operations that nobody is working on, soonest due first: of one payment, or of all. Claims nothing.

        They wait for their next attempt, or their worker's lease ran out without an answer.
        """
        with translated():
            async with self._pool.acquire() as connection:
                operations = [_operation(row) for row in await connection.fetch(FIND_UNDER_WAY, payment_id, limit)]
                return await _with_payments(connection, operations)

    async def count_under_way(self, payment_id: UUID | None) -> int:
        """How many operations nobody is working on."""
        with translated():
            async with self._pool.acquire() as connection:
                return int(await connection.fetchval(COUNT_UNDER_WAY, payment_id))

    async def count_due_but(self, asked: Iterable[tuple[UUID, int]], payment_id: UUID | None) -> dict[str, int]:
        """How many operations are due, by gateway, besides these: of one payment, or of all."""
        places = list(asked)
        known, numbers = [each[0] for each in places], [each[1] for each in places]
        with translated():
            async with self._pool.acquire() as connection:
                rows = await connection.fetch(COUNT_DUE_BUT, payment_id, known, numbers)
        return {row["gateway"]: row["number"] for row in rows}

    async def make_due(self, payment_id: UUID | None) -> int:
        """Have operations that wait for their next attempt claimed at once; how many there are."""
        with translated():
            async with self._pool.acquire() as connection:
                return int((await connection.execute(MAKE_DUE, payment_id)).split()[-1])

    async def in_doubt(self) -> tuple[int, float]:
        """How many operations are in doubt, and for how many seconds the oldest has been under way."""
        with translated():
            async with self._pool.acquire() as connection:
                row = await connection.fetchrow(IN_DOUBT)
        assert row is not None, "a count has a row"
        return row["count"], row["seconds"] or 0.0

    async def stuck(self) -> dict[str, Stuck]:
        """What there is of each subject: `operation` (nobody is working on it just now), `hold` (past its end) and
        `webhook` (in the inbox, and not applied)."""
        with translated():
            async with self._pool.acquire() as connection:
                rows = await connection.fetch(STUCK)
        return {
            row["subject"]: Stuck(row["number"], row["oldest"] or 0.0, max(row["overdue"] or 0.0, 0.0)) for row in rows
        }

    async def claim_holds(
        self, payment_id: UUID | None = None, *, limit: int, first_delay: timedelta, delay_max: timedelta
    ) -> list[LapsedHold]:
        """Take holds past their end that are to be asked about now, with nothing under way: of one payment, or of all.

        Each is due again after `first_delay`, doubled with every question up to `delay_max`, less a spread.
        """
        with translated():
            async with self._pool.acquire() as connection:
                return [
                    _hold(row) for row in await connection.fetch(CLAIM_HOLDS, limit, payment_id, first_delay, delay_max)
                ]

    async def find_lapsed_holds(
        self, payment_id: UUID | None = None, *, after: Place | None = None, limit: int
    ) -> list[LapsedHold]:
        """Holds past their end that hold money still, with nothing under way, soonest due first. Claims none."""
        with translated():
            async with self._pool.acquire() as connection:
                place = after or (None, None)
                return [_hold(row) for row in await connection.fetch(FIND_LAPSED_HOLDS, payment_id, *place, limit)]

    async def make_holds_due(self, payment_id: UUID | None = None) -> int:
        """Have holds past their end asked about at once, however lately they were; how many there are."""
        with translated():
            async with self._pool.acquire() as connection:
                return int((await connection.execute(MAKE_HOLDS_DUE, payment_id)).split()[-1])

    async def renew(self, held: Sequence[HeldLease], *, lease: timedelta) -> list[HeldLease]:
        """Start these leases anew, except those that were taken over; which of them run."""
        with translated():
            async with self._pool.acquire() as connection:
                # In the order in which answers are saved, which may be those of the same operations.
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
    """One open write transaction; fits `domain.ports.WriteTransaction`."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def lock_payments(self, payment_ids: Iterable[UUID]) -> dict[UUID, Payment]:
        """The payments that exist, each with its open operations, locked in ascending order of id."""
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
        """The operations that were accepted under these keys."""
        keys = list(idempotency_keys)
        if not keys:
            return {}
        rows = await self._connection.fetch(FIND_OPERATIONS, keys)
        return {row["idempotency_key"]: _operation(row) for row in rows}

    async def operations_at(self, places: Iterable[tuple[UUID, int]]) -> dict[tuple[UUID, int], Operation]:
        """The operations that exist at these payments and numbers, whether open or ended."""
        wanted = list(places)
        if not wanted:
            return {}
        rows = await self._connection.fetch(OPERATIONS_AT, *zip(*wanted, strict=True))
        return {(row["payment_id"], row["number"]): _operation(row) for row in rows}

    async def operations_of_kind(
        self, places: Iterable[tuple[UUID, OperationKind]]
    ) -> dict[tuple[UUID, OperationKind], list[Operation]]:
        """All operations of these payments and kinds, whether open or ended, in the order accepted."""
        wanted = list(places)
        if not wanted:
            return {}
        found: dict[tuple[UUID, OperationKind], list[Operation]] = {}
        for row in await self._connection.fetch(OPERATIONS_OF_KIND, *zip(*wanted, strict=True)):
            operation = _operation(row)
            found.setdefault((operation.payment_id, operation.kind), []).append(operation)
        return found

    async def save(self, changes: Changes) -> None:
        """Write it all.

        Raises:
            ConcurrentUpdate: a new row exists already, or a fenced row moved on.
            InputRefusedByStore: a constraint refused a row.
        """
        with translated():
            await _save(self._connection, changes)


async def _save(connection: Connection, changes: Changes) -> None:
    """Write it all or nothing, rows in a fixed order so that two batches never wait for each other in a circle."""
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
    """In the order of the type `payment_row`, to which what came later was appended."""
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
