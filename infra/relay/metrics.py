"""The relay's metrics."""

from prometheus_client import Counter, Gauge

EVENTS = Counter("payments_relay_events_total", "Outbox events acknowledged by Kafka")
LAG_SECONDS = Gauge(
    "payments_relay_lag_seconds",
    "Age of the oldest commit read and not yet acknowledged, or for how long one that was not read is waited for, or 0",
)
LAG_BYTES = Gauge("payments_relay_lag_bytes", "Log between the slot's confirmed position and the end of the log")
UNACKNOWLEDGED = Gauge("payments_relay_unacknowledged", "Events read and not yet acknowledged by Kafka")
RECONNECTS = Counter("payments_relay_reconnects_total", "Sessions that an error ended, by whose it was", ["server"])
RESCANNED = Counter("payments_relay_rescanned_total", "Events published from the table because their slot was new")
REFUSED = Counter(
    "payments_relay_refused_total", "Events that Kafka refused for good; their payments are in quarantine"
)
QUARANTINED = Gauge(
    "payments_relay_quarantined_events", "Events in quarantine: refused by Kafka, or waiting behind one"
)
GAP = Gauge("payments_relay_gap", "1 while the relay stands still since events may be missing, else 0")
RETAINED_BYTES = Gauge("payments_relay_retained_bytes", "Log that the server keeps because of the slot", ["slot"])
STATE = Gauge("payments_relay_state", "1 for the state that this relay is in, 0 for the others", ["state"])


def forget_backlog() -> None:
    """What a leader shows of what waits; who was one must not go on showing it."""
    for gauge in (LAG_SECONDS, LAG_BYTES, QUARANTINED):
        gauge.set(0)
    RETAINED_BYTES.clear()
