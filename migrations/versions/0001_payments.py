"""Payments, operations, ledger and outbox.

On a busy table: creates only new objects; nothing to lock. Backward: drops them, with all payments.
"""

from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

PAYMENTS = """
CREATE TABLE payments (
    id                       bigint GENERATED ALWAYS AS IDENTITY,
    payment_id               uuid   NOT NULL,
    order_id                 text,
    customer_id              text,
    gateway                  text,
    gateway_payment_id       text,
    currency                 text,
    amount_minor             bigint NOT NULL DEFAULT 0,
    authorized_minor         bigint NOT NULL DEFAULT 0,
    captured_minor           bigint NOT NULL DEFAULT 0,
    released_minor           bigint NOT NULL DEFAULT 0,
    refunded_minor           bigint NOT NULL DEFAULT 0,
    disputed_minor           bigint NOT NULL DEFAULT 0,
    reserved_capture_minor   bigint NOT NULL DEFAULT 0,
    reserved_refund_minor    bigint NOT NULL DEFAULT 0,
    status                   text   NOT NULL,
    has_indeterminate        boolean NOT NULL DEFAULT false,
    open_operations          integer NOT NULL DEFAULT 0,
    last_operation           integer NOT NULL DEFAULT 0,
    last_seq                 integer NOT NULL DEFAULT 0,
    version                  bigint NOT NULL DEFAULT 1,
    authorization_expires_at timestamptz,
    created_at               timestamptz NOT NULL DEFAULT now(),
    updated_at               timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT payments_pkey PRIMARY KEY (id),
    CONSTRAINT payments_payment_id_key UNIQUE (payment_id),
    CONSTRAINT payments_status_known CHECK (status IN ('created', 'requires_action', 'processing', 'authorized',
        'partially_captured', 'captured', 'partially_refunded', 'refunded', 'canceled', 'expired', 'failed')),
    CONSTRAINT payments_amounts_not_negative CHECK (least(amount_minor, authorized_minor, captured_minor,
        released_minor, refunded_minor, disputed_minor, reserved_capture_minor, reserved_refund_minor, open_operations
        ) >= 0),
    CONSTRAINT payments_captured_within_authorized
        CHECK (captured_minor + released_minor + reserved_capture_minor <= authorized_minor),
    CONSTRAINT payments_refunded_within_captured CHECK (refunded_minor + reserved_refund_minor <= captured_minor),
    CONSTRAINT payments_amounts_have_currency CHECK (currency IS NOT NULL OR authorized_minor = 0)
) WITH (fillfactor = 70)
"""

OPERATIONS = """
CREATE TABLE operations (
    payment_id      uuid    NOT NULL,
    number          integer NOT NULL,
    kind            text    NOT NULL,
    idempotency_key text,
    fingerprint     bytea   NOT NULL,
    content         text    NOT NULL,
    state           text    NOT NULL,
    amount_minor    bigint,
    gateway         text,
    reference       text,
    attempts        integer NOT NULL DEFAULT 0,
    lease_token     bigint  NOT NULL DEFAULT 0,
    is_leased       boolean NOT NULL DEFAULT false,
    due_at          timestamptz,
    dispatched_at   timestamptz,
    replays_due     integer NOT NULL DEFAULT 0,
    result          text,
    traceparent     text,
    created_at      timestamptz NOT NULL DEFAULT now(),
    settled_at      timestamptz,
    CONSTRAINT operations_pkey PRIMARY KEY (payment_id, number),
    CONSTRAINT operations_idempotency_key_key UNIQUE (idempotency_key),
    CONSTRAINT operations_kind_known CHECK (kind IN ('authorize', 'charge', 'capture', 'void', 'refund')),
    CONSTRAINT operations_state_known CHECK (state IN ('received', 'rejected', 'dispatched', 'requires_action',
        'pending', 'indeterminate', 'needs_review', 'succeeded', 'declined', 'not_executed')),
    CONSTRAINT operations_final_has_result CHECK (state NOT IN ('rejected', 'succeeded', 'declined', 'not_executed')
        OR (result IS NOT NULL AND due_at IS NULL))
) WITH (fillfactor = 70)
"""

LEDGER = """
CREATE TABLE ledger (
    payment_id   uuid    NOT NULL,
    payment_seq  integer NOT NULL,
    debit        text    NOT NULL,
    credit       text    NOT NULL,
    amount_minor bigint  NOT NULL,
    currency     text    NOT NULL,
    booked_at    timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT ledger_pkey PRIMARY KEY (payment_id, payment_seq),
    CONSTRAINT ledger_amount_positive CHECK (amount_minor > 0),
    CONSTRAINT ledger_accounts_differ CHECK (debit <> credit)
);
CREATE VIEW ledger_postings AS
    SELECT payment_id, payment_seq, debit AS account, amount_minor, currency, booked_at FROM ledger
    UNION ALL
    SELECT payment_id, payment_seq, credit, -amount_minor, currency, booked_at FROM ledger;
CREATE FUNCTION ledger_is_append_only() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'the ledger is append-only: book a reversal instead of %', TG_OP
        USING ERRCODE = 'restrict_violation';
END $$;
CREATE TRIGGER ledger_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON ledger
    FOR EACH STATEMENT EXECUTE FUNCTION ledger_is_append_only();
"""

OUTBOX = """
CREATE TABLE outbox (
    id             uuid    NOT NULL,
    aggregatetype  text    NOT NULL DEFAULT 'payment',
    aggregateid    text    NOT NULL,
    type           varchar(255) NOT NULL,
    payload        text    NOT NULL CONSTRAINT outbox_payload_is_json CHECK (payload IS JSON),
    payment_seq    integer NOT NULL,
    source         text    NOT NULL DEFAULT '/payments',
    specversion    text    NOT NULL DEFAULT '1.0',
    occurred_at    text    NOT NULL,
    traceparent    text,
    created_at     timestamptz NOT NULL DEFAULT now()
) PARTITION BY RANGE (created_at);
-- The safety net: without a partition for the day, rows land here instead of failing a payment.
CREATE TABLE outbox_default PARTITION OF outbox DEFAULT;
CREATE INDEX outbox_aggregate ON outbox (aggregateid, payment_seq);
CREATE PUBLICATION payments_outbox FOR TABLE outbox WITH (publish = 'insert', publish_via_partition_root = true);
-- Which slot has published every row that was committed before the slot existed.
CREATE TABLE relay_slots (
    slot_name         text PRIMARY KEY,
    system_identifier text NOT NULL,
    caught_up_at      timestamptz NOT NULL DEFAULT now()
);
"""

# What the write path sends: one array of rows a statement, instead of one array a column.
ROWS = """
CREATE TYPE payment_row AS (
    payment_id uuid, order_id text, customer_id text, gateway text, gateway_payment_id text, currency text,
    amount_minor bigint, authorized_minor bigint, captured_minor bigint, released_minor bigint, refunded_minor bigint,
    disputed_minor bigint, reserved_capture_minor bigint, reserved_refund_minor bigint, status text,
    has_indeterminate boolean, last_operation integer, last_seq integer, version bigint,
    authorization_expires_at timestamptz, open_operations integer
);
CREATE TYPE operation_row AS (
    payment_id uuid, number integer, kind text, idempotency_key text, fingerprint bytea, content text, state text,
    amount_minor bigint, gateway text, reference text, attempts integer, lease_token bigint, is_leased boolean,
    due_at timestamptz, dispatched_at timestamptz, replays_due integer, result text, traceparent text
);
CREATE TYPE operation_change AS (
    payment_id uuid, number integer, state text, amount_minor bigint, gateway text, reference text, attempts integer,
    lease_token bigint, is_leased boolean, due_at timestamptz, dispatched_at timestamptz, replays_due integer,
    result text
);
CREATE TYPE transfer_row AS (
    payment_id uuid, payment_seq integer, debit text, credit text, amount_minor bigint, currency text
);
CREATE TYPE outbox_row AS (
    id uuid, aggregateid text, type text, payload text, payment_seq integer, occurred_at text, traceparent text
);
"""

INDEXES = (
    "CREATE INDEX payments_order_id ON payments (order_id, id)",
    "CREATE INDEX payments_customer_id ON payments (customer_id, id)",
    "CREATE INDEX payments_status ON payments (status, id)",
    "CREATE UNIQUE INDEX payments_gateway_payment_id ON payments (gateway_payment_id, gateway)"
    " WHERE gateway_payment_id IS NOT NULL",
    "CREATE INDEX payments_created_at ON payments USING brin (created_at)",
    # By status alone, not by the amounts: a column named in an index, even in its WHERE, makes its updates dearer.
    "CREATE INDEX payments_pending_captures ON payments (authorization_expires_at, id)"
    " WHERE status IN ('authorized', 'partially_captured')",
    # What the sweep looks for: a handful of rows among millions, since a final operation is due never.
    "CREATE INDEX operations_due ON operations (due_at) WHERE due_at IS NOT NULL",
    "CREATE INDEX operations_in_doubt ON operations (dispatched_at) WHERE state IN ('indeterminate', 'needs_review')",
)


def upgrade() -> None:
    for statement in (PAYMENTS, OPERATIONS, LEDGER, OUTBOX, ROWS, *INDEXES):
        op.execute(statement)


def downgrade() -> None:
    op.execute("DROP PUBLICATION payments_outbox")
    op.execute("DROP VIEW ledger_postings")
    op.execute("DROP TABLE relay_slots, outbox, ledger, operations, payments")
    op.execute("DROP TYPE payment_row, operation_row, operation_change, transfer_row, outbox_row")
    op.execute("DROP FUNCTION ledger_is_append_only")
