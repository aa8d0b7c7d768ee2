"""A function by which one statement refuses its own work, unless it wrote every row that it was meant to write.

On a busy table: creates a function; nothing to lock. Backward: drops it.
"""

from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

REQUIRE_ROWS = """
CREATE FUNCTION require_rows(written bigint[], expected bigint[]) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    IF written IS DISTINCT FROM expected THEN
        RAISE EXCEPTION 'wrote % of % rows', written, expected USING ERRCODE = 'serialization_failure';
    END IF;
END
$$
"""


def upgrade() -> None:
    op.execute(REQUIRE_ROWS)


def downgrade() -> None:
    op.execute("DROP FUNCTION require_rows")
