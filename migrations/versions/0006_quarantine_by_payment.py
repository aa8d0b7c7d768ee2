"""Quarantined events are found by their payment: a retry of many went through all of them for each.

On a busy table: the relay waits while the index is made, milliseconds for thousands of rows. Backward: drops it.
"""

from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("CREATE INDEX relay_quarantine_payment ON relay_quarantine (slot_name, aggregateid)")


def downgrade() -> None:
    op.execute("DROP INDEX relay_quarantine_payment")
