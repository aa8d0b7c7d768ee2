"""What the relay shows of itself."""

from prometheus_client import Counter, Gauge

EVENTS = Counter("payments_relay_events_total", "Outbox events acknowledged by Kafka")
LAG_SECONDS = Gauge("payments_relay_lag_seconds", "Age of the oldest commit not yet acknowledged, or 0")
LAG_BYTES = Gauge("payments_relay_lag_bytes", "Log between the slot's position and the end of the log")
UNACKNOWLEDGED = Gauge("payments_relay_unacknowledged", "Events handed to Kafka and not acknowledged")
SESSIONS = Counter("payments_relay_sessions_total", "Sessions that ended, by what ended them", ["cause"])
RESCANNED = Counter("payments_relay_rescanned_total", "Events published from the table because their slot was new")
ACTIVE = Gauge("payments_relay_active", "1 while this relay publishes, 0 while it stands by or reconnects")
