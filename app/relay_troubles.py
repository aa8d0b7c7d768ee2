"""What is wrong with the relays of a database, and what to do about each: the last lines of `payments relay status`."""

from typing import Final

from infra.relay.gaps import advice_on
from infra.relay.status import Overview, RelayStatus

LAG_SECONDS_MAX = 60.0
HELD_FOR_NOBODY = 64 * 1024 * 1024
"""Bytes of log that an inactive slot may keep before it is worth a person's look."""
HELD_BY_A_TRANSACTION: Final = 1024 * 1024 * 1024
"""Bytes of log that a slot may keep though its relay has read them: before the alert `SlotRetainsLog` calls."""
END_THE_TRANSACTION: Final = (
    "a transaction that has written something and has not ended holds it, in any database of the server. End it; it is"
    " named by SELECT pid, datname, xact_start, query FROM pg_stat_activity WHERE backend_xid IS NOT NULL ORDER BY"
    " xact_start, or by SELECT * FROM pg_prepared_xacts"
)


def troubles_of(overview: Overview) -> list[str]:
    """What a person should look at, each with what to do."""
    troubles = []
    for relay in overview.relays:
        troubles += _troubles_of(relay)
    troubles += _rivals_of(overview.relays)
    is_anyone_there = overview.relays or overview.starting or any(each.is_active for each in overview.strangers)
    if overview.last_event_at is not None and not is_anyone_there:
        troubles.append("events are written, and no relay has ever run here: start one, `payments relay`")
    for stranger in overview.strangers:
        if not stranger.is_active and (stranger.retained_bytes or 0) > HELD_FOR_NOBODY:
            kept = in_bytes(stranger.retained_bytes)
            troubles.append(
                f"slot {stranger.slot} keeps {kept} of log and nobody reads it: if its reader is off for good,"
                f" SELECT pg_drop_replication_slot('{stranger.slot}')"
            )
    return troubles


def _troubles_of(relay: RelayStatus) -> list[str]:
    found = []
    if relay.gap is not None:
        found.append(f"{relay.slot} stands still: {relay.gap}; events may be missing: {advice_on(relay.gap)}")
    elif relay.is_anothers:
        found.append(
            f"{relay.slot}: somebody else reads from its slot (Debezium?), and publishes, if it is meant to; to come"
            " back: docs/operations/hand-over-to-debezium.md"
        )
    elif relay.source == "wal" and "lost" in relay.slot_state:
        found.append(f"{relay.slot}: its slot is lost, and no relay is active: start one, which will tell of a gap")
    elif not relay.is_running:
        kept = f" and its slot keeps {in_bytes(relay.retained_bytes)} of log" if relay.retained_bytes else ""
        found.append(
            f"{relay.slot}: no relay is active{kept}: start one; one that runs says in its log (`relay session ended`)"
            f" and at /health/ready what keeps it, Kafka perhaps; if it is off for good, {_farewell(relay)}"
        )
    elif relay.source == "wal" and "inactive" in relay.slot_state:
        found.append(
            f"{relay.slot}: its relay reads nothing: it starts, or catches up, or cannot; then its log (`relay session"
            " ended`) and its /health/ready say why"
        )
    if relay.source == "wal" and "unreserved" in relay.slot_state:
        advice = f"; {END_THE_TRANSACTION}" if _is_held_though_read(relay) else ", or have it read at once"
        found.append(
            f"{relay.slot}: at the next checkpoint the server removes log that its slot needs: raise"
            f" max_slot_wal_keep_size (ALTER SYSTEM SET …, SELECT pg_reload_conf()){advice}"
        )
    elif _is_held_though_read(relay) and (relay.retained_bytes or 0) > HELD_BY_A_TRANSACTION:
        kept = in_bytes(relay.retained_bytes)
        found.append(
            f"{relay.slot}: its slot keeps {kept} of log that its relay has read; if that lasts, {END_THE_TRANSACTION}"
        )
    if relay.source == "poll" and relay.slot_state != "none":
        kept = "is lost" if "lost" in relay.slot_state else f"keeps {in_bytes(relay.retained_bytes)} of log for nobody"
        found.append(
            f"{relay.slot}: it polls, and the slot that it had before {kept}: if it polls for good, SELECT"
            f" pg_drop_replication_slot('{relay.slot}'), since old partitions of the outbox are kept for it"
        )
    if relay.lag_seconds > LAG_SECONDS_MAX:
        standbys = ", and each standby that synchronized_standby_slots names" if relay.source == "wal" else ""
        found.append(
            f"{relay.slot}: the oldest unpublished event waits for {relay.lag_seconds:.0f} s: is Kafka there{standbys}?"
        )
    if waiting := sum(relay.quarantine[state] for state in ("refused", "waiting", "retrying")):
        found.append(f"{relay.slot}: {waiting} events in quarantine: `payments relay quarantine list`")
    return found


def _is_held_though_read(relay: RelayStatus) -> bool:
    """Whether most of the log that its slot keeps is read and published."""
    lag, kept = relay.lag_bytes or 0, relay.retained_bytes or 0
    return relay.source == "wal" and relay.is_running and lag < kept / 2


def _farewell(relay: RelayStatus) -> str:
    """What a relay leaves behind, and whoever keeps the outbox goes by."""
    row = f"DELETE FROM relay_slots WHERE slot_name = '{relay.slot}'"  # noqa: S608 - for a person to read
    return row if relay.slot_state == "none" else f"SELECT pg_drop_replication_slot('{relay.slot}') and {row}"


def _rivals_of(relays: list[RelayStatus]) -> list[str]:
    """Those who run and publish to one topic under several names, each all there is."""
    by_topic: dict[str, list[str]] = {}
    for relay in relays:
        if relay.is_running and relay.topic is not None:
            by_topic.setdefault(relay.topic, []).append(relay.slot)
    return [
        f"{' and '.join(slots)} publish to {topic}, each all events: PAYMENTS_RELAY_SLOT names one of them by mistake?"
        " stop that one"
        for topic, slots in by_topic.items()
        if len(slots) > 1
    ]


def in_bytes(count: int | None) -> str:
    """A size as a person reads it."""
    size = float(count or 0)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
