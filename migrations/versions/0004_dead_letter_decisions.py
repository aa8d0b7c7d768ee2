"""What was decided about dead letters; the letters themselves stay on their topic.

On a busy table: creates a new one; nothing to lock. Backward: drops it; every letter counts as open again.
"""

from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

DECISIONS = """
CREATE TABLE dead_letter_decisions (
    topic      text    NOT NULL,
    "partition" integer NOT NULL,
    "offset"   bigint  NOT NULL,
    decision   text    NOT NULL CONSTRAINT dead_letter_decisions_known CHECK (decision IN ('retried', 'dropped')),
    why        text    NOT NULL DEFAULT '',
    decided_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT dead_letter_decisions_pkey PRIMARY KEY (topic, "partition", "offset")
)
"""


def upgrade() -> None:
    op.execute(DECISIONS)


def downgrade() -> None:
    op.execute("DROP TABLE dead_letter_decisions")
