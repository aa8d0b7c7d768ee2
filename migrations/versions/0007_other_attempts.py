"""What other attempts hold is kept apart from the attempt that captures and refunds refer to; attempts have an index.

On a busy table: adds two columns with a constant default and replaces CHECK constraints unvalidated first, so that no
table is read under a lock. Making the index has writers wait, about a second for a million operations: made beforehand
by hand, CONCURRENTLY and under its name, it is left as it is. Workers of the release before wait, and lose nothing,
until they are replaced. Payments that were paid twice before keep their sums. Backward: forgets what is owed.
"""

from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

AMOUNTS = (
    "amount_minor, authorized_minor, captured_minor, released_minor, refunded_minor, disputed_minor,"
    " reserved_capture_minor, reserved_refund_minor, open_operations"
)


def _constrain(amounts: str, held: str, captured: str) -> None:
    for name, check in (
        ("payments_amounts_not_negative", f"least({amounts}) >= 0"),
        ("payments_captured_within_authorized", f"captured_minor + released_minor + {held} <= authorized_minor"),
        ("payments_refunded_within_captured", f"refunded_minor + {captured} <= captured_minor"),
    ):
        op.execute(f"ALTER TABLE payments DROP CONSTRAINT {name}")
        op.execute(f"ALTER TABLE payments ADD CONSTRAINT {name} CHECK ({check}) NOT VALID")
        op.execute(f"ALTER TABLE payments VALIDATE CONSTRAINT {name}")


def upgrade() -> None:
    for name in ("owed_held_minor", "owed_captured_minor"):
        op.execute(f"ALTER TABLE payments ADD COLUMN {name} bigint NOT NULL DEFAULT 0")
        op.execute(f"ALTER TYPE payment_row ADD ATTRIBUTE {name} bigint")
    _constrain(
        f"{AMOUNTS}, owed_held_minor, owed_captured_minor",
        "reserved_capture_minor + owed_held_minor",
        "reserved_refund_minor + owed_captured_minor",
    )
    op.execute(
        "CREATE INDEX IF NOT EXISTS operations_attempt ON operations (reference, gateway)"
        " WHERE kind IN ('authorize', 'charge')"
    )


def downgrade() -> None:
    op.execute("DROP INDEX operations_attempt")
    _constrain(AMOUNTS, "reserved_capture_minor", "reserved_refund_minor")
    for name in ("owed_captured_minor", "owed_held_minor"):
        op.execute(f"ALTER TYPE payment_row DROP ATTRIBUTE {name}")
        op.execute(f"ALTER TABLE payments DROP COLUMN {name}")
