"""No row is in a state that nobody ever looks at: what is under way is due some time, and at a gateway.

On a busy table: adds CHECK constraints unvalidated first; by `migrations.steps`, so that no table is read under a lock.
Workers of the release before write nothing that these refuse. A row that does not pass ends it with the constraint's
name; by its condition the row is found, and until that is mended nothing else can be written to it. Backward: drops
them.
"""

from typing import Final

from alembic import op

from migrations import steps

revision = "0017"
down_revision = "0016"
branch_labels = None
depends_on = None

CHECKS: Final = {
    "operations": {
        "operations_due_at_a_gateway": "due_at IS NULL OR gateway IS NOT NULL",
        "operations_under_way_are_due": "state NOT IN ('dispatched', 'pending', 'indeterminate', 'needs_review')"
        " OR due_at IS NOT NULL",
        "operations_leased_have_end_and_token": "NOT is_leased OR (due_at IS NOT NULL AND lease_token > 0)",
        "operations_amount_not_negative": "amount_minor >= 0",
    },
    "payments": {"payments_gateway_payment_has_gateway": "gateway_payment_id IS NULL OR gateway IS NOT NULL"},
}


def upgrade() -> None:
    for table, checks in CHECKS.items():
        steps.constrain(table, checks)


def downgrade() -> None:
    for table, checks in CHECKS.items():
        op.execute(f"ALTER TABLE {table} " + ", ".join(f"DROP CONSTRAINT {name}" for name in checks))
