"""Webhooks are stored before they are answered; disputes; operations that expire.

On a busy table: adds a column without a default and replaces two CHECK constraints unvalidated first; by
`migrations.steps`, so that no table is read under a lock. Workers of the release before wait, and lose nothing, until
they are replaced. Backward: drops the inbox and what is known of disputes; refuses while an operation is `expired`;
operations are read through under a lock.
"""

from alembic import op

from migrations import steps

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

INBOX = """
CREATE TABLE inbox (
    id               bigint GENERATED ALWAYS AS IDENTITY,
    gateway          text    NOT NULL,
    event_id         text    NOT NULL,
    type             text    NOT NULL,
    payment_id       uuid,
    operation_number integer,
    content          text    NOT NULL,
    body             bytea   NOT NULL,
    received_at      timestamptz NOT NULL DEFAULT now(),
    due_at           timestamptz,
    applied_at       timestamptz,
    CONSTRAINT inbox_pkey PRIMARY KEY (id),
    CONSTRAINT inbox_event_key UNIQUE (gateway, event_id),
    CONSTRAINT inbox_due_until_applied CHECK ((due_at IS NULL) = (applied_at IS NOT NULL))
);
CREATE INDEX inbox_due ON inbox (due_at) WHERE due_at IS NOT NULL;
CREATE INDEX inbox_payment ON inbox (payment_id, id) WHERE payment_id IS NOT NULL
"""

STATES = (
    "'received', 'rejected', 'dispatched', 'requires_action', 'pending', 'indeterminate', 'needs_review', 'succeeded',"
    " 'declined', 'not_executed'"
)
ENDED = "'rejected', 'succeeded', 'declined', 'not_executed'"


def _checks(states: str, ended: str) -> dict[str, str]:
    return {
        "operations_state_known": f"state IN ({states})",
        "operations_final_has_result": f"state NOT IN ({ended}) OR (result IS NOT NULL AND due_at IS NULL)",
    }


def upgrade() -> None:
    steps.change("ALTER TABLE payments ADD COLUMN IF NOT EXISTS disputes text")
    steps.constrain("operations", _checks(f"{STATES}, 'expired'", f"{ENDED}, 'expired'"))
    op.execute(INBOX)
    op.execute("ALTER TYPE payment_row ADD ATTRIBUTE disputes text")


def downgrade() -> None:
    steps.constrain_at_once("operations", _checks(STATES, ENDED))
    op.execute("ALTER TYPE payment_row DROP ATTRIBUTE disputes")
    op.execute("ALTER TABLE payments DROP COLUMN disputes")
    op.execute("DROP TABLE inbox")
