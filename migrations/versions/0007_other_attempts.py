"""What other attempts hold is kept apart from the attempt that captures and refunds refer to; attempts have an index.

On a busy table: adds two columns with a constant default, replaces CHECK constraints unvalidated first and makes the
index CONCURRENTLY; by `migrations.steps`, so that no table is read under a lock. Workers of the release before wait,
and lose nothing, until they are replaced. Payments that were paid twice before keep their sums. Backward: forgets what
is owed; payments are read through under a lock.
"""

from alembic import op

from migrations import steps

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

OWED = ("owed_held_minor", "owed_captured_minor")
AMOUNTS = (
    "amount_minor, authorized_minor, captured_minor, released_minor, refunded_minor, disputed_minor,"
    " reserved_capture_minor, reserved_refund_minor, open_operations"
)


def _checks(amounts: str, held: str, captured: str) -> dict[str, str]:
    return {
        "payments_amounts_not_negative": f"least({amounts}) >= 0",
        "payments_captured_within_authorized": f"captured_minor + released_minor + {held} <= authorized_minor",
        "payments_refunded_within_captured": f"refunded_minor + {captured} <= captured_minor",
    }


def upgrade() -> None:
    for name in OWED:
        steps.change(f"ALTER TABLE payments ADD COLUMN IF NOT EXISTS {name} bigint NOT NULL DEFAULT 0")
    checks = _checks(
        f"{AMOUNTS}, owed_held_minor, owed_captured_minor",
        "reserved_capture_minor + owed_held_minor",
        "reserved_refund_minor + owed_captured_minor",
    )
    steps.constrain("payments", checks)
    steps.make_index("operations_attempt", "operations (reference, gateway) WHERE kind IN ('authorize', 'charge')")
    for name in OWED:
        op.execute(f"ALTER TYPE payment_row ADD ATTRIBUTE {name} bigint")


def downgrade() -> None:
    op.execute("DROP INDEX operations_attempt")
    steps.constrain_at_once("payments", _checks(AMOUNTS, "reserved_capture_minor", "reserved_refund_minor"))
    for name in OWED:
        op.execute(f"ALTER TYPE payment_row DROP ATTRIBUTE {name}")
        op.execute(f"ALTER TABLE payments DROP COLUMN {name}")
