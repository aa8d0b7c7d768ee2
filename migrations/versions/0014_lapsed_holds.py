"""An authorization whose hold has ended is `lapsed`: its end, told again, is not taken for that of another attempt's.

On a busy table: replaces two CHECK constraints, for which the operations are read through while writers wait. Workers
of the release before wait with what has become `lapsed`, and lose nothing, until they are replaced. Backward: calls it
`succeeded` again.
"""

from alembic import op

revision = "0014"
down_revision = "0013"
branch_labels = None
depends_on = None

STATES = (
    "'received', 'rejected', 'dispatched', 'requires_action', 'pending', 'indeterminate', 'needs_review', 'succeeded',"
    " 'declined', 'not_executed', 'expired'"
)
ENDED = "'rejected', 'succeeded', 'declined', 'not_executed', 'expired'"


def _constrain(states: str, ended: str) -> None:
    for name, check in (
        ("operations_state_known", f"state IN ({states})"),
        ("operations_final_has_result", f"state NOT IN ({ended}) OR (result IS NOT NULL AND due_at IS NULL)"),
    ):
        op.execute(f"ALTER TABLE operations DROP CONSTRAINT {name}")
        op.execute(f"ALTER TABLE operations ADD CONSTRAINT {name} CHECK ({check})")


def upgrade() -> None:
    _constrain(f"{STATES}, 'lapsed'", f"{ENDED}, 'lapsed'")


def downgrade() -> None:
    op.execute("UPDATE operations SET state = 'succeeded' WHERE state = 'lapsed'")
    _constrain(STATES, ENDED)
