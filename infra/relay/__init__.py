"""Publishes the outbox from Postgres' write-ahead log (docs/decisions/0002)."""

from infra.relay.relay import Relay as Relay
from infra.relay.relay import RelayConfig as RelayConfig
