"""Alembic's entry point: runs the migrations on the connection that `infra.postgres.migrate` passes in.

Each version has its own transaction, so that the locks of one end before the next begins.
"""

from alembic import context

connection = context.config.attributes["connection"]
context.configure(connection=connection, transactional_ddl=True, transaction_per_migration=True)
with context.begin_transaction():
    context.run_migrations()
