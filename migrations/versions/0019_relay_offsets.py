"""A relay remembers the last offset that Kafka acknowledged in each partition: below it, events are lost.

On a busy table: `relay_slots` has a row a relay; nothing to lock. A relay from before remembers from its next save on.
Backward: the column goes.
"""

from alembic import op

revision = "0019"
down_revision = "0018"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("ALTER TABLE relay_slots ADD COLUMN acknowledged_offsets bigint[]")


def downgrade() -> None:
    op.execute("ALTER TABLE relay_slots DROP COLUMN acknowledged_offsets")
