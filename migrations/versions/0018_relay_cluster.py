"""A relay remembers the Kafka cluster that it published to: another one behind the same address lacks those events.

On a busy table: `relay_slots` has a row a relay; nothing to lock. A relay from before takes its cluster as it is.
Backward: the column goes.
"""

from alembic import op

revision = "0018"
down_revision = "0017"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("ALTER TABLE relay_slots ADD COLUMN kafka_cluster text")


def downgrade() -> None:
    op.execute("ALTER TABLE relay_slots DROP COLUMN kafka_cluster")
