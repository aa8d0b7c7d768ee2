"""A decision about a dead letter tells when that was parked: what is in its place on a topic made anew is another one.

On a busy table: only operators write to it; the column comes at once. What was decided before counts for whatever was
parked until now, and so does what the release before decides from now on. Backward: the column goes.
"""

from alembic import op

revision = "0015"
down_revision = "0014"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("ALTER TABLE dead_letter_decisions ADD COLUMN parked_at timestamptz NOT NULL DEFAULT now()")


def downgrade() -> None:
    op.execute("ALTER TABLE dead_letter_decisions DROP COLUMN parked_at")
