"""${message}.

On a busy table: say what this locks and for how long; `migrations.steps` has what needs to lock nobody out. Backward: say what is lost.
"""

from alembic import op

revision = "${up_revision}"
down_revision = ${repr(down_revision)}
branch_labels = None
depends_on = None


def upgrade() -> None:
    ${upgrades if upgrades else "..."}


def downgrade() -> None:
    ${downgrades if downgrades else "..."}
