"""Where a relay begins. The common cases are tested one by one; what must always hold, over every combination."""

from dataclasses import replace
from itertools import product
from typing import Final, Literal, get_args

import pytest

from infra.kafka.access import KafkaAccess
from infra.relay.config import RelayConfig
from infra.relay.progress.beginning import Adopt, CatchUp, GoOn, LogState, Publication, Refuse, decide_beginning
from infra.relay.progress.checkpoint import Checkpoint, Repair
from infra.relay.progress.gaps import (
    ANOTHER_SERVER,
    NOT_IN_PUBLICATION,
    PUBLICATION_CHANGED,
    SLOT_AHEAD,
    SLOT_LOST,
    SLOT_MISSING,
    advice_on,
    lost_by_kafka,
)
from infra.relay.progress.snapshot import NOTHING, Snapshot

HERE: Final = "1"
WAL: Final = RelayConfig(postgres_url="", kafka=KafkaAccess(""), topic="events")
POLL: Final = replace(WAL, source="poll")
PROVEN: Final = Snapshot.read("7:9:8")
LEFT: Final = Checkpoint(
    system_identifier=HERE,
    source="wal",
    confirmed_lsn=100,
    published_below=7,
    window_begin=str(PROVEN),
    window_end=None,
    window_position=0,
    repair=None,
    gap=None,
    publication="1",
    topic="events",
    kafka_cluster=None,
)
FOUND: Final = LogState("reserved", 100, Publication(is_whole=True, version="1"))
GO_ON: Final = GoOn(LEFT, PROVEN)
ANOTHER_TOPIC: Final = "the events before went to topic other, and this relay is to publish to events"


@pytest.mark.parametrize("config", [WAL, POLL], ids=["wal", "poll"])
def test_a_first_start_publishes_all_that_is_there(config: RelayConfig) -> None:
    assert decide_beginning(None, HERE, config, FOUND) == CatchUp("first start", NOTHING)


@pytest.mark.parametrize(
    ("found", "doubt"),
    [
        (FOUND, None),
        (FOUND._replace(position=90), None),
        (FOUND._replace(position=101), SLOT_AHEAD),
        (FOUND._replace(slot_state="missing", position=0), SLOT_MISSING),
        (FOUND._replace(slot_state="lost"), SLOT_LOST),
        (FOUND._replace(publication=Publication(is_whole=False, version="1")), NOT_IN_PUBLICATION),
        (FOUND._replace(publication=Publication(is_whole=True, version="2")), PUBLICATION_CHANGED),
    ],
    ids=str,
)
def test_a_log_reader_resumes_only_where_the_log_is_as_it_was_left(found: LogState, doubt: str | None) -> None:
    assert decide_beginning(LEFT, HERE, WAL, found) == (Refuse(doubt, PROVEN) if doubt else GO_ON)


@pytest.mark.parametrize("told", [NOT_IN_PUBLICATION, PUBLICATION_CHANGED])
def test_a_publication_gap_remains_until_a_repair(told: str) -> None:
    checkpoint = replace(LEFT, gap=told)
    assert decide_beginning(checkpoint, HERE, WAL, FOUND) == Refuse(told, PROVEN)
    assert decide_beginning(replace(checkpoint, repair="adopt"), HERE, WAL, FOUND) == Refuse(told, PROVEN)
    assert decide_beginning(replace(checkpoint, repair="unproven"), HERE, WAL, FOUND) == CatchUp("repair", PROVEN)


def test_another_source_begins_behind_what_the_one_before_has_proven() -> None:
    missed = FOUND._replace(position=900, publication=Publication(is_whole=True, version="2"))
    from_poll = replace(LEFT, source="poll")
    assert decide_beginning(from_poll, HERE, WAL, missed) == CatchUp("another source", PROVEN)
    assert decide_beginning(LEFT, HERE, POLL, None) == CatchUp("another source", PROVEN)
    elsewhere = replace(from_poll, topic="other")
    assert decide_beginning(elsewhere, HERE, WAL, missed) == Refuse(ANOTHER_TOPIC, PROVEN)
    assert decide_beginning(replace(elsewhere, repair="adopt"), HERE, WAL, missed) == CatchUp("adopted", PROVEN)


@pytest.mark.parametrize(
    ("checkpoint", "found"),
    [
        (LEFT, FOUND._replace(position=101)),
        (replace(LEFT, topic="other"), FOUND),
        (replace(LEFT, system_identifier="2"), FOUND._replace(position=900)),
    ],
    ids=["the slot was moved", "another topic", "an upgraded server"],
)
def test_a_single_gap_reason_can_be_adopted(checkpoint: Checkpoint, found: LogState) -> None:
    assert isinstance(decide_beginning(checkpoint, HERE, WAL, found), Refuse)
    assert isinstance(decide_beginning(replace(checkpoint, repair="adopt"), HERE, WAL, found), Adopt)


def test_a_poll_adopts_a_topic_and_nothing_of_another_server() -> None:
    checkpoint = replace(LEFT, source="poll", topic="other", repair="adopt")
    assert decide_beginning(checkpoint, HERE, POLL, None) == CatchUp("adopted", PROVEN)
    moved = replace(checkpoint, system_identifier="2", topic="events")
    assert decide_beginning(moved, HERE, POLL, None) == Refuse(ANOTHER_SERVER, NOTHING)


@pytest.mark.parametrize(("config", "found"), [(WAL, FOUND), (POLL, None)], ids=["wal", "poll"])
def test_events_that_kafka_has_lost_stay_a_gap_until_all_are_published_or_somebody_lets_them_go(
    config: RelayConfig, found: LogState | None
) -> None:
    lost = lost_by_kafka("events", 3, 0, 41)
    checkpoint = replace(LEFT, source=config.source, gap=lost, acknowledged_offsets=[9, -1, 5, 41])
    for repair in (None, "unproven"):
        assert decide_beginning(replace(checkpoint, repair=repair), HERE, config, found) == Refuse(lost, NOTHING)
    adopted = replace(checkpoint, repair="adopt")
    assert isinstance(decide_beginning(adopted, HERE, config, found), Adopt if found else CatchUp)
    everything = replace(checkpoint, repair="everything")
    assert decide_beginning(everything, HERE, config, found) == CatchUp("repair", NOTHING)

    assert checkpoint.offsets_to_exceed(config) == [9, -1, 5, 41]
    assert adopted.offsets_to_exceed(config) == everything.offsets_to_exceed(config) == []
    assert replace(checkpoint, topic="other").offsets_to_exceed(config) == []
    assert LEFT.offsets_to_exceed(config) == []


def test_lost_events_beside_another_gap_are_not_adopted() -> None:
    lost = lost_by_kafka("events", 3, 0, 41)
    checkpoint = replace(LEFT, gap=lost, repair="adopt")
    beginning = decide_beginning(checkpoint, HERE, WAL, FOUND._replace(position=101))
    assert beginning == Refuse(f"{lost}; and {SLOT_AHEAD}", NOTHING)
    assert advice_on(beginning.gap).startswith("`payments relay repair --everything`")
    assert "adopt" not in advice_on(beginning.gap)


Source = Literal["wal", "poll"]


def test_whatever_it_finds_it_skips_nothing_that_nobody_has_looked_at() -> None:
    repairs: tuple[Repair | None, ...] = (None, *get_args(Repair))
    sources: tuple[Source, ...] = get_args(Source)
    states = [
        FOUND._replace(slot_state=state, position=at) for state in ("reserved", "missing", "lost") for at in (100, 101)
    ]
    publications = [Publication(is_whole, version) for is_whole in (True, False) for version in ("1", "2")]
    everything = product(sources, sources, repairs, (HERE, "2"), ("events", "other"), states, publications)
    for before, now, repair, system, topic, state, publication in everything:
        checkpoint = replace(LEFT, source=before, repair=repair, system_identifier=system, topic=topic)
        found = state._replace(publication=publication) if now == "wal" else None
        beginning = decide_beginning(checkpoint, HERE, replace(WAL, source=now), found)
        is_log_as_left = now == "poll" or (found == FOUND)
        match beginning:
            case GoOn():
                assert (before, system, topic, is_log_as_left) == (now, HERE, "events", True)
            case Adopt():
                is_here = system == HERE
                assert (repair, state.slot_state) == ("adopt", "reserved")
                assert [not is_here, topic != "events", is_here and state.position > 100].count(True) <= 1
                assert not is_here or publication == FOUND.publication
            case CatchUp(published=published, is_moved=is_moved):
                assert is_moved == (system != HERE)
                assert published == (NOTHING if is_moved or repair == "everything" else PROVEN)
                assert topic == "events" or repair in ("everything", "adopt")
            case Refuse():
                assert repair != "everything"
