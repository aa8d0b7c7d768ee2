"""Keys are compared by their bytes, whatever the operating system sorts by; and what has settled is vacuumed in time.

On a busy table: no table is rewritten, but the indexes on these columns are made anew while nobody reads or writes it:
with 2 million rows in each 5 s of `operations`, then 2 s of `payments` and 4 s of `inbox`, and in proportion. Of many
millions choose a quiet hour. What waits for longer than its connection lets it (30 s) is postponed as if Postgres were
away, and goes on afterwards; nothing is lost. Two rows of one key, which an order that has changed may have let in, end
it with that key. Backward: the same, by the database's own order.
"""

from typing import Final

from alembic import op

from migrations import steps

revision = "0016"
down_revision = "0015"
branch_labels = None
depends_on = None

# Under a unique index whose order has changed below it (a standby on another operating system, a new image of Postgres)
# a key that is there is not found, and a command that comes again moves money again.
KEYS: Final = {
    "operations": ("idempotency_key", "reference", "gateway"),
    "payments": ("gateway_payment_id", "gateway"),
    "inbox": ("event_id", "gateway"),
}
# What is settled leaves the index of what is due, and whoever claims walks past it until it is vacuumed. A fifth of the
# table, after which Postgres would do so, grows with the table; and of few dead rows it would spare the indexes.
VACUUM: Final = {
    "autovacuum_vacuum_scale_factor": "0",
    "autovacuum_vacuum_threshold": "200000",
    "vacuum_index_cleanup": "on",
}
VACUUMED: Final = ("operations", "inbox")


def upgrade() -> None:
    for table, columns in KEYS.items():
        steps.change(_compare(table, columns, "C"))
        steps.gather_statistics(table, columns)
    for table in VACUUMED:
        settings = ", ".join(f"{name} = {value}" for name, value in VACUUM.items())
        steps.change(f"ALTER TABLE {table} SET ({settings})")


def downgrade() -> None:
    for table in VACUUMED:
        op.execute(f"ALTER TABLE {table} RESET ({', '.join(VACUUM)})")
    for table, columns in KEYS.items():
        op.execute(_compare(table, columns, "default"))


def _compare(table: str, columns: tuple[str, ...], collation: str) -> str:
    parts = (f'ALTER COLUMN {name} TYPE text COLLATE "{collation}"' for name in columns)
    return f"ALTER TABLE {table} {', '.join(parts)}"
