"""What was returned of other attempts' money is kept apart from the refunds of the attempt that a payment refers to.

On a busy table: adds a column with a constant default and replaces CHECK constraints unvalidated first; by
`migrations.steps`, so that no table is read under a lock. Workers of the release before wait, and lose nothing, until
they are replaced. Backward: takes what was returned of other attempts for refunds of the payment's own; payments are
read through under a lock.
"""

from alembic import op

from migrations import steps

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None

AMOUNTS = (
    "amount_minor, authorized_minor, captured_minor, released_minor, refunded_minor, disputed_minor,"
    " reserved_capture_minor, reserved_refund_minor, owed_held_minor, owed_captured_minor, open_operations"
)


def upgrade() -> None:
    steps.change("ALTER TABLE payments ADD COLUMN IF NOT EXISTS owed_returned_minor bigint NOT NULL DEFAULT 0")
    steps.constrain(
        "payments",
        {
            "payments_amounts_not_negative": f"least({AMOUNTS}, owed_returned_minor) >= 0",
            "payments_refunded_within_captured": "refunded_minor - owed_returned_minor + reserved_refund_minor"
            " + owed_captured_minor <= captured_minor",
            "payments_returned_within_owed": "owed_returned_minor <= least(owed_captured_minor, refunded_minor)",
        },
    )
    op.execute("ALTER TYPE payment_row ADD ATTRIBUTE owed_returned_minor bigint")


def downgrade() -> None:
    # Between the two no constraint holds: what is returned counts as a refund only when it is owed no more.
    op.execute(
        "ALTER TABLE payments DROP CONSTRAINT payments_returned_within_owed,"
        " DROP CONSTRAINT payments_refunded_within_captured"
    )
    op.execute(
        "UPDATE payments SET owed_captured_minor = owed_captured_minor - owed_returned_minor"
        " WHERE owed_returned_minor <> 0"
    )
    steps.constrain_at_once(
        "payments",
        {
            "payments_amounts_not_negative": f"least({AMOUNTS}) >= 0",
            "payments_refunded_within_captured": "refunded_minor + reserved_refund_minor + owed_captured_minor"
            " <= captured_minor",
        },
    )
    op.execute("ALTER TYPE payment_row DROP ATTRIBUTE owed_returned_minor")
    op.execute("ALTER TABLE payments DROP COLUMN owed_returned_minor")
