"""Holds have a time at which they are asked about next, and what is due is found gateway by gateway.

On a busy table: adds a column without a default and one with a constant, so that no table is rewritten, and makes
indexes CONCURRENTLY; by `migrations.steps`, so that no table is read under a lock. Workers of the release before find
what is due more slowly, and ask about holds at every round, until they are replaced. Backward: forgets when holds were
asked about; makes an index while operations are not written.
"""

from alembic import op

from migrations import steps

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None

# The later of the hold's end and the next question: a new hold's end counts, whatever was asked about an earlier one.
# By the amounts, so that whatever is held is found, under every status; they change where the status, which stands in
# an index anyway, changes with them.
HOLDS = """
    payments (greatest(hold_due_at, authorization_expires_at)) WHERE authorized_minor > captured_minor + released_minor
"""
# A gateway that may not be asked now, however much of it is due, stands in no other's way.
DUE = "operations (gateway, due_at) WHERE due_at IS NOT NULL"


def upgrade() -> None:
    steps.change(
        "ALTER TABLE payments ADD COLUMN IF NOT EXISTS hold_due_at timestamptz,"
        " ADD COLUMN IF NOT EXISTS hold_questions integer NOT NULL DEFAULT 0"
    )
    steps.make_index("payments_hold_due", HOLDS)
    steps.make_index("operations_due_by_gateway", DUE)
    steps.drop_index("operations_due")


def downgrade() -> None:
    op.execute("CREATE INDEX operations_due ON operations (due_at) WHERE due_at IS NOT NULL")
    op.execute("DROP INDEX operations_due_by_gateway")
    op.execute("DROP INDEX payments_hold_due")
    op.execute("ALTER TABLE payments DROP COLUMN hold_due_at, DROP COLUMN hold_questions")
