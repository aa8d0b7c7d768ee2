"""The relay's settings."""

from dataclasses import dataclass
from typing import Literal

from infra.kafka.access import KafkaAccess
from infra.relay.compiled import IS_COMPILED


@dataclass(frozen=True, slots=True, kw_only=True)
class RelayConfig:
    """Settings of one relay; of several relays with the same `slot`, one is active and the others stand by.

    Reading pauses at `unacknowledged_max` events or `unacknowledged_bytes_max` bytes of payload. A payload
    above `message_bytes_max` is not sent at all: its payment goes to quarantine, as if Kafka had refused it for good.
    """

    postgres_url: str
    kafka: KafkaAccess
    topic: str
    kafka_cluster: str | None = None
    """The id of the cluster, filled in once its brokers have reported it; not a setting."""
    slot: str = "payments_relay"
    publication: str = "payments_outbox"
    source: Literal["wal", "poll"] = "wal"
    unacknowledged_max: int = 20_000
    unacknowledged_bytes_max: int = 64 * 1024 * 1024
    message_bytes_max: int = 4 * 1024 * 1024
    is_native: bool = True
    """Whether to use the compiled inner loop, where there is one."""
    feedback_seconds: float = 1.0
    """How often progress is saved, which bounds what a relay repeats after a crash. The slot follows one save later."""
    standby_seconds: float = 0.5
    """How often a standby checks whether it must take over."""
    retry_seconds_max: float = 5.0
    """The longest pause between two sessions."""
    gap_seconds: float = 2.0
    """How often a relay that stopped at a gap checks whether an operator has decided what to do."""
    stalled_seconds: float = 15.0
    """How long Kafka may acknowledge nothing before the relay reports itself not ready."""
    stop_seconds: float = 10.0
    """How long a stop waits for Kafka; the next relay publishes again whatever is unacknowledged by then."""

    @property
    def uses_native(self) -> bool:
        """Whether the compiled inner loop is used."""
        return self.is_native and IS_COMPILED

    @property
    def end_seconds(self) -> float:
        """When a process that was asked to stop exits even if Postgres neither answers nor closes the connection."""
        return self.stop_seconds + 5
