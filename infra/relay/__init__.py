"""The relay: publishes every committed outbox row to Kafka, at least once, in order per payment."""

from infra.relay.config import RelayConfig as RelayConfig
from infra.relay.health import RelayHealth as RelayHealth
from infra.relay.relay import Relay as Relay
