"""Where a relay begins once it is the active one, decided from its checkpoint and the state of the server.

Both sources ask here, and carry out the decision.
"""

from collections.abc import Iterator
from typing import Final, NamedTuple

import psycopg

from infra.relay.config import RelayConfig
from infra.relay.progress.another_server import forget_future_transactions, move_here
from infra.relay.progress.checkpoint import (
    Checkpoint,
    find_checkpoint,
    refuse_gap,
    trust_checkpoint,
)
from infra.relay.progress.gaps import (
    ANOTHER_SERVER,
    NOT_IN_PUBLICATION,
    PUBLICATION_CHANGED,
    SLOT_AHEAD,
    SLOT_LOST,
    SLOT_MISSING,
    gap_of,
    lost_before,
)
from infra.relay.progress.snapshot import NOTHING, Snapshot

GONE: Final = {"missing": SLOT_MISSING, "lost": SLOT_LOST}
"""The states of a slot that cannot be read from, with the gap that each one means."""
LEFT_OUT: Final = (NOT_IN_PUBLICATION, PUBLICATION_CHANGED)


class Publication(NamedTuple):
    """Whether the publication has all inserts of the outbox, and a version that changes when the publication does."""

    is_whole: bool
    version: str | None

    def doubt_since(self, version: str | None) -> str | None:
        """Why the log may lack some events, if the publication was at `version` before; None if it has all."""
        if not self.is_whole:
            return NOT_IN_PUBLICATION
        return None if self.version == version else PUBLICATION_CHANGED


class LogState(NamedTuple):
    """State of the slot and publication, as the WAL source found them on the server."""

    slot_state: str
    """The slot's `wal_status`, or `missing`."""
    position: int
    publication: Publication


class CatchUp(NamedTuple):
    """Publish the retained events that `published` does not cover, then go on.

    `is_moved`: the checkpoint was written on another server.
    """

    reason: str
    published: Snapshot
    is_moved: bool = False


class Adopt(NamedTuple):
    """Begin at the slot's position: an operator said that everything before it is published."""

    published: Snapshot


class GoOn(NamedTuple):
    """Nothing has changed since the checkpoint was saved."""

    checkpoint: Checkpoint
    published: Snapshot


class Refuse(NamedTuple):
    """Events may be missing, or would go to the wrong topic: an operator must decide."""

    gap: str
    published: Snapshot


async def settle_beginning(
    leader: psycopg.AsyncConnection, config: RelayConfig, system: str, state: LogState | None = None
) -> CatchUp | Adopt | GoOn:
    """Decide where to begin, and save what both sources save alike. `state` is None for a source without a log.

    Raises:
        GapFound: the decision is `Refuse`.
    """
    checkpoint = await find_checkpoint(leader, config.slot)
    beginning = decide_beginning(checkpoint, system, config, state)
    match beginning:
        case Refuse(gap, published):
            # A request to adopt must not stay and apply to a slot created later: nobody published up to that position.
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
    """A requested repair takes precedence over doubts, and doubts over a change of source."""
    if checkpoint is None:
        return CatchUp("first start", NOTHING)
    if checkpoint.source == "poll":
        state = None  # Whatever our slot has passed or missed since then, the poll has published.
    published, is_moved = checkpoint.published_on(system), checkpoint.system_identifier != system
    destination = gap_of((checkpoint.another_destination(config), lost_before(checkpoint.gap)))
    doubts = list(filter(None, _doubts(checkpoint, destination, state, is_moved=is_moved)))
    match checkpoint.repair:
        case "everything":
            return CatchUp("repair", NOTHING, is_moved)
        case "unproven":
            return _refuse(destination, published) if destination else CatchUp("repair", published, is_moved)
        case "adopt" if _may_adopt(state, doubts):
            return CatchUp("adopted", published) if state is None else Adopt(published)
    if (gap := gap_of(doubts)) is not None:
        return _refuse(gap, published)
    return GoOn(checkpoint, published) if checkpoint.source == config.source else CatchUp("another source", published)


def _refuse(gap: str, published: Snapshot) -> Refuse:
    """What Kafka has lost was proven to be published: no proof counts until somebody decides."""
    return Refuse(gap, NOTHING if lost_before(gap) else published)


def _doubts(
    checkpoint: Checkpoint, destination: str | None, state: LogState | None, *, is_moved: bool
) -> Iterator[str | None]:
    """On another server the slot and the publication are different ones anyway, so they are not compared."""
    yield ANOTHER_SERVER if is_moved else None
    yield destination
    if state is not None and not is_moved:
        yield _doubt_about_slot(checkpoint, state)
        yield _doubt_about_publication(checkpoint, state)


def _doubt_about_slot(checkpoint: Checkpoint, state: LogState) -> str | None:
    is_ahead = checkpoint.confirmed_lsn is not None and state.position > checkpoint.confirmed_lsn
    return GONE.get(state.slot_state, SLOT_AHEAD if is_ahead else None)


def _doubt_about_publication(checkpoint: Checkpoint, state: LogState) -> str | None:
    """A recorded gap stays: a publication made whole again does not bring back the events it left out."""
    recorded = (each for each in LEFT_OUT if each in (checkpoint.gap or ""))
    return next(recorded, state.publication.doubt_since(checkpoint.publication or state.publication.version))


def _may_adopt(state: LogState | None, doubts: list[str]) -> bool:
    """Whether adopting is safe: for a new topic, or for what another client read from the slot, but not for both.

    With both, an operator who means only the topic would also skip what the slot has passed. What the publication left
    out never reached the other client either. Without a slot, transaction ids say what is published, and they mean
    nothing on another server.
    """
    if state is None:
        return ANOTHER_SERVER not in doubts
    return state.slot_state not in GONE and len(doubts) < 2 and not set(doubts) & set(LEFT_OUT)
