"""A relay remembers the publication as it was: what is committed while the outbox is left out of it is not in the log.

On a busy table: `relay_slots` has a row a relay; nothing to lock. A relay from before takes the publication as it is.
Backward: the column goes.
"""

from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("ALTER TABLE relay_slots ADD COLUMN publication text")


def downgrade() -> None:
    op.execute("ALTER TABLE relay_slots DROP COLUMN publication")
