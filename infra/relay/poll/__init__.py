"""Events from the outbox table itself, for databases without logical replication."""
