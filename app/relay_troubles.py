"""What is wrong with a database's relays, and what to do about it: the last lines of `payments relay status`."""

from typing import Final

from infra.relay.progress.gaps import advice_on
from infra.relay.status import Overview, RelayStatus

LAG_SECONDS_MAX = 60.0
HELD_FOR_NOBODY = 64 * 1024 * 1024
"""Bytes of log that an inactive slot may keep before a person should look at it."""
HELD_BY_A_TRANSACTION: Final = 1024 * 1024 * 1024
"""Bytes of log that a slot may keep although its relay has read them; reached before the alert `SlotRetainsLog`."""
END_THE_TRANSACTION: Final = (
    "an open transaction that has written something holds it, in any database of the server. End that transaction; find"
    " it with SELECT pid, datname, xact_start, query FROM pg_stat_activity WHERE backend_xid IS NOT NULL ORDER BY"
    " xact_start, or with SELECT * FROM pg_prepared_xacts"
)


def troubles_of(overview: Overview) -> list[str]:
    """Everything that a person should look at, each with what to do."""
    troubles = []
    for relay in overview.relays:
        troubles += _troubles_of(relay)
    troubles += _rivals_of(overview.relays)
    is_anyone_there = overview.relays or overview.starting or any(each.is_active for each in overview.strangers)
    if overview.last_event_at is not None and not is_anyone_there:
        troubles.append("events are being written, but no relay has ever run here: start one with `payments relay`")
    for stranger in overview.strangers:
        if not stranger.is_active and (stranger.retained_bytes or 0) > HELD_FOR_NOBODY:
            kept = in_bytes(stranger.retained_bytes)
            troubles.append(
                f"slot {stranger.slot} keeps {kept} of log and nobody reads it: if its reader is off for good,"
                f" SELECT pg_drop_replication_slot('{stranger.slot}')"
            )
    return troubles


def _troubles_of(relay: RelayStatus) -> list[str]:
    about = (_about_activity, _about_retained_log, _about_old_slot, _about_lag, _about_quarantine)
    return [trouble for find in about if (trouble := find(relay)) is not None]


def _about_activity(relay: RelayStatus) -> str | None:
    if relay.gap is not None:
        return f"{relay.slot} stands still: {relay.gap}; events may be missing: {advice_on(relay.gap)}"
    if relay.is_anothers:
        return (
            f"{relay.slot}: somebody else reads from its slot (Debezium?), and publishes in its place, if that is"
            " intended; to come back: docs/operations/hand-over-to-debezium.md"
        )
    if relay.source == "wal" and "lost" in relay.slot_state:
        return f"{relay.slot}: its slot is lost, and no relay is active: start one, which will report a gap"
    if not relay.is_running:
        kept = f" and its slot keeps {in_bytes(relay.retained_bytes)} of log" if relay.retained_bytes else ""
        return (
            f"{relay.slot}: no relay is active{kept}: start one; if one is running, its log (`relay session ended`) and"
            f" /health/ready say what stops it, Kafka perhaps; if it is off for good, {_farewell(relay)}"
        )
    if relay.source == "wal" and "inactive" in relay.slot_state:
        return (
            f"{relay.slot}: its relay reads nothing: it is starting, is catching up, or cannot read; then its log"
            " (`relay session ended`) and /health/ready say why"
        )
    return None


def _about_retained_log(relay: RelayStatus) -> str | None:
    if relay.source == "wal" and "unreserved" in relay.slot_state:
        advice = f"; {END_THE_TRANSACTION}" if _is_held_though_read(relay) else ", or have the log read at once"
        return (
            f"{relay.slot}: at the next checkpoint the server removes log that its slot needs: raise"
            f" max_slot_wal_keep_size (ALTER SYSTEM SET …, SELECT pg_reload_conf()){advice}"
        )
    if _is_held_though_read(relay) and (relay.retained_bytes or 0) > HELD_BY_A_TRANSACTION:
        kept = in_bytes(relay.retained_bytes)
        return (
            f"{relay.slot}: its slot keeps {kept} of log that its relay has read; if that lasts, {END_THE_TRANSACTION}"
        )
    return None


def _about_old_slot(relay: RelayStatus) -> str | None:
    if relay.source != "poll" or relay.slot_state == "none":
        return None
    kept = "is lost" if "lost" in relay.slot_state else f"keeps {in_bytes(relay.retained_bytes)} of log for nobody"
    return (
        f"{relay.slot}: it polls, and the slot that it had before {kept}: if it polls for good, SELECT"
        f" pg_drop_replication_slot('{relay.slot}'), since old partitions of the outbox are kept for it"
    )


def _about_lag(relay: RelayStatus) -> str | None:
    if relay.lag_seconds <= LAG_SECONDS_MAX:
        return None
    servers = " and each standby that synchronized_standby_slots names" if relay.source == "wal" else ""
    return (
        f"{relay.slot}: the oldest unpublished event has waited for {relay.lag_seconds:.0f} s: check that"
        f" Kafka{servers} can be reached"
    )


def _about_quarantine(relay: RelayStatus) -> str | None:
    waiting = sum(relay.quarantine[state] for state in ("refused", "waiting", "retrying"))
    return f"{relay.slot}: {waiting} events in quarantine: `payments relay quarantine list`" if waiting else None


def _is_held_though_read(relay: RelayStatus) -> bool:
    """Whether most of the log that the relay's slot keeps is already read and published."""
    lag, kept = relay.lag_bytes or 0, relay.retained_bytes or 0
    return relay.source == "wal" and relay.is_running and lag < kept / 2


def _farewell(relay: RelayStatus) -> str:
    """The statements that remove what a relay leaves behind, for which the outbox's partitions are kept."""
    row = f"DELETE FROM relay_slots WHERE slot_name = '{relay.slot}'"  # noqa: S608 - for a person to read
    return row if relay.slot_state == "none" else f"SELECT pg_drop_replication_slot('{relay.slot}') and {row}"


def _rivals_of(relays: list[RelayStatus]) -> list[str]:
    """Relays with different names that run and publish to the same topic: each publishes every event."""
    by_topic: dict[str, list[str]] = {}
    for relay in relays:
        if relay.is_running and relay.topic is not None:
            by_topic.setdefault(relay.topic, []).append(relay.slot)
    return [
        f"{' and '.join(slots)} publish to {topic}, each all events: if PAYMENTS_RELAY_SLOT names one of them by"
        " mistake, stop that one"
        for topic, slots in by_topic.items()
        if len(slots) > 1
    ]


def in_bytes(count: int | None) -> str:
    """A size in bytes, formatted for people."""
    size = float(count or 0)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
