"""The relay's metrics."""

from prometheus_client import Counter, Gauge

EVENTS = Counter("payments_relay_events_total", "Outbox events acknowledged by Kafka")
LAG_SECONDS = Gauge(
    "payments_relay_lag_seconds",
    "Age of the oldest commit read and not yet acknowledged, or the wait so far for an unread one, or 0",
)
LAG_BYTES = Gauge("payments_relay_lag_bytes", "Log between the slot's confirmed position and the end of the log")
UNACKNOWLEDGED = Gauge("payments_relay_unacknowledged", "Events read and not yet acknowledged by Kafka")
RECONNECTS = Counter(
    "payments_relay_reconnects_total", "Sessions ended by an error, by the server at fault", ["server"]
)
RESCANNED = Counter("payments_relay_rescanned_total", "Events published from the table because their slot was new")
REFUSED = Counter(
    "payments_relay_refused_total", "Events that Kafka refused for good; their payments are in quarantine"
)
QUARANTINED = Gauge(
    "payments_relay_quarantined_events", "Events in quarantine: refused by Kafka, or waiting behind one"
)
GAP = Gauge("payments_relay_gap", "1 while the relay stands still because events may be missing, else 0")
RETAINED_BYTES = Gauge("payments_relay_retained_bytes", "Bytes of log that the server retains for the slot", ["slot"])
STATE = Gauge("payments_relay_state", "1 for the state that this relay is in, 0 for the others", ["state"])


def forget_backlog() -> None:
    """Reset the backlog gauges: only the leader reports them, so a former leader must not keep old values."""
    for gauge in (LAG_SECONDS, LAG_BYTES, QUARANTINED):
        gauge.set(0)
    RETAINED_BYTES.clear()
