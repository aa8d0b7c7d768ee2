"""Where a relay begins that has become the active one: decided by its checkpoint and by what it finds on the server.

Both sources ask here, and carry it out.
"""

from collections.abc import Iterator
from typing import Final, NamedTuple

import psycopg

from infra.relay.config import RelayConfig
from infra.relay.gaps import (
    ANOTHER_SERVER,
    NOT_IN_PUBLICATION,
    PUBLICATION_CHANGED,
    SLOT_AHEAD,
    SLOT_LOST,
    SLOT_MISSING,
    gap_of,
)
from infra.relay.progress import (
    Checkpoint,
    find_checkpoint,
    forget_future_transactions,
    move_here,
    refuse_gap,
    trust_checkpoint,
)
from infra.relay.snapshot import NOTHING, Snapshot

GONE: Final = {"missing": SLOT_MISSING, "lost": SLOT_LOST}
"""The states of a slot that nobody can read from."""
LEFT_OUT: Final = (NOT_IN_PUBLICATION, PUBLICATION_CHANGED)


class Publication(NamedTuple):
    """Whether it has all of the outbox's inserts, and what changes with whatever is done to it."""

    is_whole: bool
    version: str | None

    def doubt_since(self, version: str | None) -> str | None:
        """Why the log may be without some events, where it was of this version before."""
        if not self.is_whole:
            return NOT_IN_PUBLICATION
        return None if self.version == version else PUBLICATION_CHANGED


class LogState(NamedTuple):
    """What who reads the log finds."""

    slot_state: str
    """The slot's `wal_status`, or `missing`."""
    position: int
    publication: Publication


class CatchUp(NamedTuple):
    """Publish what is retained and not in `published`, then go on; `is_moved` where that was on another server."""

    reason: str
    published: Snapshot
    is_moved: bool = False


class Adopt(NamedTuple):
    """Where the slot stands, all before it is published: an operator said so."""

    published: Snapshot


class GoOn(NamedTuple):
    """All is as it was left."""

    checkpoint: Checkpoint
    published: Snapshot


class Refuse(NamedTuple):
    """Events may be missing, or would go to the wrong topic: an operator is to decide."""

    gap: str
    published: Snapshot


async def find_beginning(
    leader: psycopg.AsyncConnection, config: RelayConfig, system: str, state: LogState | None = None
) -> CatchUp | Adopt | GoOn:
    """Decide, and write down what is the same for both sources. `state` is for who reads the log.

    Raises:
        GapFound: it is refused.
    """
    checkpoint = await find_checkpoint(leader, config.slot)
    beginning = decide_beginning(checkpoint, system, config, state)
    match beginning:
        case Refuse(gap, published):
            # It must not wait for a slot that somebody makes later: nobody published up to where that one stands.
            is_asked = checkpoint is not None and checkpoint.repair == "adopt"
            await refuse_gap(leader, config.slot, gap, published, withdraws_adopt=is_asked)
        case GoOn():
            await trust_checkpoint(leader, config)
        case CatchUp(is_moved=True):
            await move_here(leader, config.slot)
        case _ if checkpoint is None or isinstance(beginning, Adopt):
            await forget_future_transactions(leader)
    return beginning


def decide_beginning(
    checkpoint: Checkpoint | None, system: str, config: RelayConfig, state: LogState | None
) -> CatchUp | Adopt | GoOn | Refuse:
    """What an operator asked for goes before doubts, and they before a change of source."""
    if checkpoint is None:
        return CatchUp("first start", NOTHING)
    if checkpoint.source == "poll":
        state = None  # What a slot of ours has passed since, or was not given, the poll has published.
    published, is_moved = checkpoint.published_on(system), checkpoint.system_identifier != system
    destination = checkpoint.another_destination(config)
    doubts = list(filter(None, _doubts(checkpoint, destination, state, is_moved=is_moved)))
    match checkpoint.repair:
        case "everything":
            return CatchUp("repair", NOTHING, is_moved)
        case "unproven":
            return Refuse(destination, published) if destination else CatchUp("repair", published, is_moved)
        case "adopt" if _may_adopt(state, doubts):
            return CatchUp("adopted", published) if state is None else Adopt(published)
    if (gap := gap_of(doubts)) is not None:
        return Refuse(gap, published)
    return GoOn(checkpoint, published) if checkpoint.source == config.source else CatchUp("another source", published)


def _doubts(
    checkpoint: Checkpoint, destination: str | None, state: LogState | None, *, is_moved: bool
) -> Iterator[str | None]:
    """On another server slot and publication are others anyway."""
    yield ANOTHER_SERVER if is_moved else None
    yield destination
    if state is not None and not is_moved:
        yield _doubt_about_slot(checkpoint, state)
        yield _doubt_about_publication(checkpoint, state)


def _doubt_about_slot(checkpoint: Checkpoint, state: LogState) -> str | None:
    is_ahead = checkpoint.confirmed_lsn is not None and state.position > checkpoint.confirmed_lsn
    return GONE.get(state.slot_state, SLOT_AHEAD if is_ahead else None)


def _doubt_about_publication(checkpoint: Checkpoint, state: LogState) -> str | None:
    """What was told of it before stays true: being whole again brings nothing back."""
    recorded = (each for each in LEFT_OUT if each in (checkpoint.gap or ""))
    return next(recorded, state.publication.doubt_since(checkpoint.publication or state.publication.version))


def _may_adopt(state: LogState | None, doubts: list[str]) -> bool:
    """A new topic, or what somebody else read from the slot; not both in one, or who means the topic skips the rest.

    What the publication left out, who read the slot lacks, too. Without a slot, what is published is known by ids of
    transactions, which mean nothing on another server.
    """
    if state is None:
        return ANOTHER_SERVER not in doubts
    return state.slot_state not in GONE and len(doubts) < 2 and not set(doubts) & set(LEFT_OUT)
