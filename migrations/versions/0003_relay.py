"""What the relay needs beyond the slot: an order to read the outbox by, its own progress, and a quarantine.

On a busy table: the new columns of `outbox` have no value in old rows, so that nothing is rewritten; their index is
built while readers and writers wait, some seconds a million retained events. Backward: drops them, and what lies in
quarantine.
"""

from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

ORDER = """
-- `xact` tells which rows nobody can slip in front of any more; `position` is taken while the payment is locked, so
-- that it has the order of `payment_seq`.
CREATE SEQUENCE outbox_position;
ALTER TABLE outbox ADD COLUMN position bigint, ADD COLUMN xact bigint;
ALTER TABLE outbox ALTER COLUMN position SET DEFAULT nextval('outbox_position'),
                   ALTER COLUMN xact SET DEFAULT (pg_current_xact_id()::text::bigint);
CREATE INDEX outbox_xact ON outbox (xact);
"""

# Off unless a polling relay runs: every NOTIFY takes a lock of the whole database at commit.
NOTIFY = """
CREATE FUNCTION outbox_notify() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_notify('payments_outbox', '');
    RETURN NULL;
END
$$;
CREATE TRIGGER outbox_notify AFTER INSERT ON outbox FOR EACH STATEMENT EXECUTE FUNCTION outbox_notify();
ALTER TABLE outbox DISABLE TRIGGER outbox_notify;
"""

PROGRESS = """
ALTER TABLE relay_slots
    ADD COLUMN source          text NOT NULL DEFAULT 'wal'
                               CONSTRAINT relay_slots_source CHECK (source IN ('wal', 'poll')),
    -- The slot is never confirmed beyond this; a slot that stands further on was moved by somebody else.
    ADD COLUMN confirmed_lsn   pg_lsn,
    -- Every event of a transaction below this is on the topic.
    ADD COLUMN published_below bigint NOT NULL DEFAULT 0,
    -- A poll that is in the middle of the transactions up to `window_end`, in the order of `position`.
    ADD COLUMN window_end      bigint,
    ADD COLUMN window_position bigint NOT NULL DEFAULT 0,
    ADD COLUMN gap             text,
    ADD COLUMN repair          text CONSTRAINT relay_slots_repair CHECK (repair IN ('unproven', 'everything', 'adopt')),
    ADD COLUMN repaired_events bigint NOT NULL DEFAULT 0,
    ADD COLUMN updated_at      timestamptz NOT NULL DEFAULT now();
UPDATE relay_slots AS r SET confirmed_lsn = s.confirmed_flush_lsn
  FROM pg_replication_slots AS s WHERE s.slot_name::text = r.slot_name;
"""

QUARANTINE = """
CREATE TABLE relay_quarantine (
    number         bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    slot_name      text    NOT NULL,
    id             uuid    NOT NULL,
    aggregateid    text    NOT NULL,
    type           text    NOT NULL,
    payload        text    NOT NULL,
    payment_seq    integer NOT NULL,
    source         text    NOT NULL,
    specversion    text    NOT NULL,
    occurred_at    text    NOT NULL,
    traceparent    text,
    state          text    NOT NULL
                   CONSTRAINT relay_quarantine_state CHECK (state IN ('refused', 'waiting', 'retry', 'dropped')),
    reason         text,
    quarantined_at timestamptz NOT NULL DEFAULT now(),
    dropped_because text,
    CONSTRAINT relay_quarantine_event UNIQUE (slot_name, id)
);
"""


def upgrade() -> None:
    for statement in (ORDER, NOTIFY, PROGRESS, QUARANTINE):
        op.execute(statement)


def downgrade() -> None:
    op.execute("DROP TABLE relay_quarantine")
    op.execute(
        "ALTER TABLE relay_slots DROP COLUMN source, DROP COLUMN confirmed_lsn, DROP COLUMN published_below,"
        " DROP COLUMN window_end, DROP COLUMN window_position, DROP COLUMN gap, DROP COLUMN repair,"
        " DROP COLUMN repaired_events, DROP COLUMN updated_at"
    )
    op.execute("DROP TRIGGER outbox_notify ON outbox")
    op.execute("DROP FUNCTION outbox_notify")
    op.execute("ALTER TABLE outbox DROP COLUMN xact, DROP COLUMN position")
    op.execute("DROP SEQUENCE outbox_position")
