"""The SQL of the write path and of the workers that look after due operations: named statements, with their reasons.

Reads and writes are set-based. Rows are passed as one array of a composite type, which asyncpg encodes in a third of
the time of one array per column.
"""

from dataclasses import fields
from typing import Final

from domain.operations import Operation
from domain.payment import Payment

PAYMENT_FIELDS: Final = (*(each.name for each in fields(Payment) if each.name != "operations"), "open_operations")
"""A payment's columns, in the order of its fields; the last column is the number of operations in the last field."""

OPERATION_FIELDS: Final = tuple(each.name for each in fields(Operation) if each.name != "command")
"""An operation's columns, in the order of its fields and of the type `operation_row`."""

PAYMENT_COLUMNS: Final = ", ".join(PAYMENT_FIELDS)
OPERATION_COLUMNS: Final = ", ".join(OPERATION_FIELDS)
OPERATION_COLUMNS_OF_O: Final = ", ".join(f"o.{name}" for name in OPERATION_FIELDS)

# NO KEY: no foreign key refers to payments, and an UPDATE takes just this weaker lock.
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

# A row that exists already is another worker's: the count shows it, and the batch is decided again.
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
# Due times are written relative to the database's clock ($1 is the time of the decision): leases use one clock.
INSERT_OPERATIONS = f"""
    INSERT INTO operations ({OPERATION_COLUMNS}, settled_at)
    SELECT {OPERATION_COLUMNS.replace("due_at", "now() + (due_at - $1::timestamptz)", 1)},
           CASE WHEN result IS NOT NULL THEN now() END
      FROM unnest($4::operation_row[])
    ON CONFLICT DO NOTHING
"""
# The token in the WHERE clause is the fence: a worker whose lease was taken over matches no row. An operation in state
# 'received' was never leased; its payment's version guards it.
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
APPLY_NOTICES = "UPDATE inbox SET due_at = NULL, applied_at = now() WHERE id = ANY($8::bigint[])"
# One round trip for everything, and outside a transaction the statement is its own. The parts write different tables,
# so sharing a snapshot does not matter. If a part writes fewer rows than it was given, everything is undone.
SAVE = f"""
    WITH new_payments AS ({INSERT_PAYMENTS} RETURNING 1),
         changed_payments AS ({UPDATE_PAYMENTS} RETURNING 1),
         new_operations AS ({INSERT_OPERATIONS} RETURNING 1),
         changed_operations AS ({UPDATE_OPERATIONS} RETURNING 1),
         booked AS ({INSERT_LEDGER}),
         applied AS ({APPLY_NOTICES}),
         published AS ({INSERT_OUTBOX})
    SELECT require_rows(
        ARRAY[(SELECT count(*) FROM new_payments), (SELECT count(*) FROM changed_payments),
              (SELECT count(*) FROM new_operations), (SELECT count(*) FROM changed_operations)],
        ARRAY[cardinality($2), cardinality($3), cardinality($4), cardinality($5)])
"""
# SKIP LOCKED: several workers sweep at once and share the work. An expired lease means that its holder may have called
# the gateway. The query goes gateway by gateway, in index steps from one name to the next: so a full gateway ($3 and $4
# give each one's room), however much is due there, does not hide the operations of others. Half of the room is for
# operations refused at the door (surely not executed), newest first, because their payers are the likeliest to be still
# there; the rest is for the oldest of all, so that nothing waits for ever (room for one goes to either by chance). An
# operation found as both is updated once. Operations of gateways that the caller does not have (not in $3) are left to
# workers that have them: while a release adds a gateway, some workers do not have it yet, and those could only end what
# the others would send.
REFUSED = "state = 'dispatched' AND NOT is_leased"
OF_THIS = "($5::uuid IS NULL OR payment_id = $5)"
FORSAKEN_AFTER = "interval '6 hours'"
"""An operation due for this long is claimed even by workers without its gateway: presumably no worker has it."""
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
# Operations that nobody is working on: they wait for the next attempt, or their worker's lease has expired.
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
# Locked in the order in which batches are saved: in the order of the index, the two could deadlock.
MAKE_DUE = f"""
    WITH waiting AS MATERIALIZED (
        SELECT payment_id, number FROM operations WHERE due_at > now() AND NOT is_leased AND {OF_ONE}
         ORDER BY payment_id, number FOR NO KEY UPDATE
    )
    UPDATE operations AS o SET due_at = now() FROM waiting AS w
     WHERE o.payment_id = w.payment_id AND o.number = w.number
"""
HOLDING = "authorized_minor > captured_minor + released_minor"
HOLD_DUE = "greatest(hold_due_at, authorization_expires_at)"
"""This and HOLDING must match the index's expressions, or it is not used."""
HOLD_COLUMNS = f"""
    {", ".join(f"p.{name}" for name in PAYMENT_FIELDS)},
    {", ".join(f"o.{name} AS o_{name}" for name in OPERATION_FIELDS)}, {HOLD_DUE}
"""
HELD_BY = "operations AS o ON o.payment_id = p.payment_id AND o.kind = 'authorize' AND o.state = 'succeeded'"
# The claim itself postpones the next query, so that several workers share the holds, and if a worker stops midway its
# holds are asked about at their next due time. Jitter only shortens the delay, since $4 is the longest allowed.
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
# Holds past their end, whenever their next query is due. That is postponed by a day at most (`domain.rules`), which
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
MAKE_HOLDS_DUE = f"""
    WITH put_off AS MATERIALIZED (
        SELECT id FROM payments WHERE {LAPSED} AND {OF_ONE} AND hold_due_at > now()
         ORDER BY payment_id FOR NO KEY UPDATE
    )
    UPDATE payments AS p SET hold_due_at = NULL FROM put_off WHERE p.id = put_off.id
"""
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
    SELECT state, count(*), extract(epoch FROM now() - min(dispatched_at))::float AS seconds FROM operations
     WHERE state IN ('indeterminate', 'needs_review') GROUP BY state
"""
PAYMENTS_OF = f"SELECT {PAYMENT_COLUMNS} FROM payments WHERE payment_id = ANY($1::uuid[])"
