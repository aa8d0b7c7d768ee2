"""A relay remembers its topic: one that takes over with another would publish the rest where nobody looks for it.

On a busy table: `relay_slots` has a row a relay; nothing to lock. A relay from before takes its topic as it is.
Backward: the column goes. A relay on `wal` now keeps its proof in `window_begin`, which a release from before ignores.
"""

from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("ALTER TABLE relay_slots ADD COLUMN topic text")


def downgrade() -> None:
    op.execute("ALTER TABLE relay_slots DROP COLUMN topic")
