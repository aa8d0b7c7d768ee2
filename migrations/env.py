"""Alembic's entry: runs the migrations over the connection that `infra.postgres.migrate` hands in.

Each version has a transaction of its own: what one has locked, the next one does not hold.
"""

from alembic import context

connection = context.config.attributes["connection"]
context.configure(connection=connection, transactional_ddl=True, transaction_per_migration=True)
with context.begin_transaction():
    context.run_migrations()
