"""Webhooks are stored before they are answered; disputes; operations that expire.

On a busy table: adds a column without a default and replaces two CHECK constraints unvalidated first, so that no table
is read under a lock. Workers of the release before wait, and lose nothing, until they are replaced. Backward: drops the
inbox and what is known of disputes; refuses while an operation is `expired`.
"""

from alembic import op

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


def _constrain(states: str, ended: str) -> None:
    for name, check in (
        ("operations_state_known", f"state IN ({states})"),
        ("operations_final_has_result", f"state NOT IN ({ended}) OR (result IS NOT NULL AND due_at IS NULL)"),
    ):
        op.execute(f"ALTER TABLE operations DROP CONSTRAINT {name}")
        op.execute(f"ALTER TABLE operations ADD CONSTRAINT {name} CHECK ({check}) NOT VALID")
        op.execute(f"ALTER TABLE operations VALIDATE CONSTRAINT {name}")


def upgrade() -> None:
    op.execute(INBOX)
    op.execute("ALTER TABLE payments ADD COLUMN disputes text")
    op.execute("ALTER TYPE payment_row ADD ATTRIBUTE disputes text")
    _constrain(f"{STATES}, 'expired'", f"{ENDED}, 'expired'")


def downgrade() -> None:
    _constrain(STATES, ENDED)
    op.execute("ALTER TYPE payment_row DROP ATTRIBUTE disputes")
    op.execute("ALTER TABLE payments DROP COLUMN disputes")
    op.execute("DROP TABLE inbox")
