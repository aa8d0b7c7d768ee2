"""Why a relay stands still, and what a person does about it (docs/operations/relay.md)."""

from collections.abc import Iterable
from typing import Final

ANOTHER_SERVER: Final = "this is another Postgres server than before"
SLOT_MISSING: Final = "the slot has disappeared"
SLOT_LOST: Final = "the server has removed log that the slot needed"
SLOT_AHEAD: Final = "the slot stands further on than this relay ever confirmed"
NOT_IN_PUBLICATION: Final = "the publication does not have the outbox's inserts"
PUBLICATION_CHANGED: Final = "the publication was changed or made anew since"
KAFKA_LOST: Final = "Kafka has lost events that it had acknowledged"
_AND: Final = "; and "
_ANOTHER_TOPIC: Final = "the events before went to topic"
_ANOTHER_CLUSTER: Final = "the events before went to Kafka cluster"

_REPAIR: Final = "`payments relay repair` publishes what has no proof of publication"
_ADOPT_LOSS: Final = "`payments relay adopt` only if the earlier events are there as well, or nobody needs them"
_EVERYTHING: Final = "`payments relay repair --everything` publishes all that is retained there"


def another_topic(before: str, now: str) -> str:
    """The reason for a changed topic."""
    return f"{_ANOTHER_TOPIC} {before}, and this relay is to publish to {now}"


def another_cluster(before: str, now: str) -> str:
    """The reason for brokers of another cluster, by the clusters' ids."""
    return f"{_ANOTHER_CLUSTER} {before}, and this relay's brokers are of {now}"


def lost_by_kafka(topic: str, partition: int, offset: int, acknowledged: int) -> str:
    """The reason for an event that got an offset which is not above the last acknowledged one of its partition."""
    return (
        f"{KAFKA_LOST}: partition {partition} of {topic} goes on at offset {offset}, although {acknowledged} was"
        " acknowledged before (the topic was made anew, or a replica without these events became leader)"
    )


def lost_before(gap: str | None) -> str | None:
    """The recorded reason that Kafka has lost events, if it is in this gap: nothing brings them back by itself."""
    return next((each for each in (gap or "").split(_AND) if each.startswith(KAFKA_LOST)), None)


def gap_of(reasons: Iterable[str | None]) -> str | None:
    """All reasons in one text: a person who settles one must know of the others. None without any."""
    return _AND.join(filter(None, reasons)) or None


def is_about_destination(gap: str) -> bool:
    """Whether another topic or Kafka cluster, or one that has lost events, is among the reasons."""
    return any(reason in gap for reason in (_ANOTHER_TOPIC, _ANOTHER_CLUSTER, KAFKA_LOST))


def setting_behind(gap: str) -> str:
    """The settings that name the other topic, or the brokers of the other cluster, or both; empty if neither is."""
    settings = {_ANOTHER_TOPIC: "PAYMENTS_EVENTS_TOPIC", _ANOTHER_CLUSTER: "PAYMENTS_KAFKA_BOOTSTRAP"}
    return " and ".join(setting for reason, setting in settings.items() if reason in gap)


def advice_on(gap: str) -> str:
    """What the operator can do about this gap."""
    if is_about_destination(gap):
        return _advice_on_destination(gap)
    if NOT_IN_PUBLICATION in gap:
        return f"make the publication whole (docs/operations/relay.md, A gap, has the statements); then {_REPAIR}"
    if gap == SLOT_AHEAD:
        return f"if Debezium moved it, `payments relay adopt`; otherwise {_REPAIR}"
    if gap == ANOTHER_SERVER:
        return f"if its address is right, {_REPAIR}"
    return _REPAIR


def _advice_on_destination(gap: str) -> str:
    """Adopting a new destination while there are other reasons would skip what the slot has passed."""
    others = gap_of(each for each in gap.split(_AND) if not is_about_destination(each))
    if not setting_behind(gap):
        return _EVERYTHING if others is not None else f"{_EVERYTHING}; {_ADOPT_LOSS}"
    back = f"set {setting_behind(gap)} back"
    if others is not None:
        only = "An intended change can be adopted once it is the only reason"
        return f"{back}, and start the relay again; {advice_on(others)}. {only}; or {_EVERYTHING}"
    if _ANOTHER_CLUSTER in gap:
        return f"if that is a mistake, {back}; if Kafka's data are lost, {_EVERYTHING}; {_ADOPT_LOSS}"
    return f"{back}; if the change is intended, `payments relay adopt`, or {_EVERYTHING}"
