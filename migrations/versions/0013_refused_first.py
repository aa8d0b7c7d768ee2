"""What was refused at the door, and so was never executed, is found without reading past all else that is due.

On a busy table: an index of a handful of rows, over a table that is read for it, CONCURRENTLY. Workers of the release
before work on as they did. Backward: drops the index.
"""

from alembic import op

from migrations import steps

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None

# An operation is inserted leased and, where its first attempt has an end, leaves this state: only the refused enter.
REFUSED = "operations (gateway, due_at) WHERE state = 'dispatched' AND NOT is_leased"


def upgrade() -> None:
    steps.make_index("operations_refused", REFUSED)


def downgrade() -> None:
    op.execute("DROP INDEX operations_refused")
