"""An authorization whose hold has ended is `lapsed`: its end, told again, is not taken for that of another attempt's.

On a busy table: replaces two CHECK constraints unvalidated first; by `migrations.steps`, so that no table is read under
a lock. Workers of the release before cannot read what has become `lapsed`: its command, should it be delivered again,
they park as `cannot_be_processed`, and `payments dlq retry` answers it once they are replaced. Backward: calls it
`succeeded` again; operations are read through under a lock.
"""

from alembic import op

from migrations import steps

revision = "0014"
down_revision = "0013"
branch_labels = None
depends_on = None

STATES = (
    "'received', 'rejected', 'dispatched', 'requires_action', 'pending', 'indeterminate', 'needs_review', 'succeeded',"
    " 'declined', 'not_executed', 'expired'"
)
ENDED = "'rejected', 'succeeded', 'declined', 'not_executed', 'expired'"


def _checks(states: str, ended: str) -> dict[str, str]:
    return {
        "operations_state_known": f"state IN ({states})",
        "operations_final_has_result": f"state NOT IN ({ended}) OR (result IS NOT NULL AND due_at IS NULL)",
    }


def upgrade() -> None:
    steps.constrain("operations", _checks(f"{STATES}, 'lapsed'", f"{ENDED}, 'lapsed'"))


def downgrade() -> None:
    op.execute("UPDATE operations SET state = 'succeeded' WHERE state = 'lapsed'")
    steps.constrain_at_once("operations", _checks(STATES, ENDED))
