"""The tables for SQLAlchemy Core, for reading and repairing; `migrations/` creates the schema itself.

The write path does not use these: it sends its own SQL (infra/postgres/statements.py).
"""

from typing import Final

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import UUID as PG_UUID

metadata: Final = sa.MetaData()

_Time: Final = sa.DateTime(timezone=True)
_Uuid: Final = PG_UUID(as_uuid=True)
_Key: Final = sa.Text(collation="C")
"""Compared by its bytes: a unique index must not depend on an operating system's sort order."""

payments: Final = sa.Table(
    "payments",
    metadata,
    sa.Column("id", sa.BigInteger, sa.Identity(always=True), primary_key=True),
    sa.Column("payment_id", _Uuid, nullable=False, unique=True),
    sa.Column("order_id", sa.Text),
    sa.Column("customer_id", sa.Text),
    sa.Column("gateway", _Key),
    sa.Column("gateway_payment_id", _Key),
    sa.Column("currency", sa.Text),
    sa.Column("amount_minor", sa.BigInteger, nullable=False),
    sa.Column("authorized_minor", sa.BigInteger, nullable=False),
    sa.Column("captured_minor", sa.BigInteger, nullable=False),
    sa.Column("released_minor", sa.BigInteger, nullable=False),
    sa.Column("refunded_minor", sa.BigInteger, nullable=False),
    sa.Column("disputed_minor", sa.BigInteger, nullable=False),
    sa.Column("reserved_capture_minor", sa.BigInteger, nullable=False),
    sa.Column("reserved_refund_minor", sa.BigInteger, nullable=False),
    sa.Column("status", sa.Text, nullable=False),
    sa.Column("has_indeterminate", sa.Boolean, nullable=False),
    sa.Column("open_operations", sa.Integer, nullable=False),
    sa.Column("last_operation", sa.Integer, nullable=False),
    sa.Column("last_seq", sa.Integer, nullable=False),
    sa.Column("version", sa.BigInteger, nullable=False),
    sa.Column("authorization_expires_at", _Time),
    sa.Column("disputes", sa.Text),
    sa.Column("owed_held_minor", sa.BigInteger, nullable=False),
    sa.Column("owed_captured_minor", sa.BigInteger, nullable=False),
    sa.Column("owed_returned_minor", sa.BigInteger, nullable=False),
    sa.Column("hold_due_at", _Time),
    sa.Column("hold_questions", sa.Integer, nullable=False),
    sa.Column("created_at", _Time, nullable=False, server_default=sa.func.now()),
    sa.Column("updated_at", _Time, nullable=False, server_default=sa.func.now()),
)

operations: Final = sa.Table(
    "operations",
    metadata,
    sa.Column("payment_id", _Uuid, primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("idempotency_key", _Key, unique=True),
    sa.Column("fingerprint", sa.LargeBinary, nullable=False),
    sa.Column("content", sa.Text, nullable=False),
    sa.Column("state", sa.Text, nullable=False),
    sa.Column("amount_minor", sa.BigInteger),
    sa.Column("gateway", _Key),
    sa.Column("reference", _Key),
    sa.Column("attempts", sa.Integer, nullable=False),
    sa.Column("lease_token", sa.BigInteger, nullable=False),
    sa.Column("is_leased", sa.Boolean, nullable=False),
    sa.Column("due_at", _Time),
    sa.Column("dispatched_at", _Time),
    sa.Column("replays_due", sa.Integer, nullable=False),
    sa.Column("result", sa.Text),
    sa.Column("traceparent", sa.Text),
    sa.Column("created_at", _Time, nullable=False, server_default=sa.func.now()),
    sa.Column("settled_at", _Time),
)

ledger: Final = sa.Table(
    "ledger",
    metadata,
    sa.Column("payment_id", _Uuid, primary_key=True),
    sa.Column("payment_seq", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("debit", sa.Text, nullable=False),
    sa.Column("credit", sa.Text, nullable=False),
    sa.Column("amount_minor", sa.BigInteger, nullable=False),
    sa.Column("currency", sa.Text, nullable=False),
    sa.Column("booked_at", _Time, nullable=False, server_default=sa.func.now()),
)

# Partitioned by the UTC day of `created_at`; a partitioned log has no key that spans its partitions.
outbox: Final = sa.Table(
    "outbox",
    metadata,
    sa.Column("id", _Uuid, nullable=False),
    sa.Column("aggregatetype", sa.Text, nullable=False),
    sa.Column("aggregateid", sa.Text, nullable=False),
    sa.Column("type", sa.String(255), nullable=False),
    sa.Column("payload", sa.Text, nullable=False),
    sa.Column("payment_seq", sa.Integer, nullable=False),
    sa.Column("source", sa.Text, nullable=False),
    sa.Column("specversion", sa.Text, nullable=False),
    sa.Column("occurred_at", sa.Text, nullable=False),
    sa.Column("traceparent", sa.Text),
    sa.Column("created_at", _Time, nullable=False, server_default=sa.func.now()),
    sa.Column("position", sa.BigInteger),
    sa.Column("xact", sa.BigInteger),
)

inbox: Final = sa.Table(
    "inbox",
    metadata,
    sa.Column("id", sa.BigInteger, sa.Identity(always=True), primary_key=True),
    sa.Column("gateway", _Key, nullable=False),
    sa.Column("event_id", _Key, nullable=False),
    sa.Column("type", sa.Text, nullable=False),
    sa.Column("payment_id", _Uuid),
    sa.Column("operation_number", sa.Integer),
    sa.Column("content", sa.Text, nullable=False),
    sa.Column("body", sa.LargeBinary, nullable=False),
    sa.Column("received_at", _Time, nullable=False, server_default=sa.func.now()),
    sa.Column("due_at", _Time),
    sa.Column("applied_at", _Time),
)
