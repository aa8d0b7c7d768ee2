"""A polling relay goes from snapshot to snapshot, not from one oldest running transaction to the next.

On a busy table: `relay_slots` has a row a relay; nothing to lock. A poll that stood inside a window begins it again.
Backward: the same.
"""

from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute(
        "ALTER TABLE relay_slots ADD COLUMN window_begin pg_snapshot,"
        " ALTER COLUMN window_end TYPE pg_snapshot USING NULL"
    )
    op.execute("UPDATE relay_slots SET window_position = 0")


def downgrade() -> None:
    op.execute("ALTER TABLE relay_slots DROP COLUMN window_begin, ALTER COLUMN window_end TYPE bigint USING NULL")
    op.execute("UPDATE relay_slots SET window_position = 0")
