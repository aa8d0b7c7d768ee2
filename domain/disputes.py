"""What became of each dispute of a payment, in the one text column that keeps it.

Providers report one dispute many times and in any order, so each is remembered by its id: a stage is entered once, and
nothing follows the last one.
"""

import json
from typing import Final

from domain.notices import Dispute, DisputeStage

_RANK = {DisputeStage.OPENED: 1, DisputeStage.WON: 2, DisputeStage.LOST: 2}
ENDS: Final = (DisputeStage.WON, DisputeStage.LOST)


def stages(kept: str | None) -> dict[str, tuple[DisputeStage, int]]:
    """Stage and disputed amount, by the provider's id of the dispute."""
    known = json.loads(kept) if kept else {}
    return {each: (DisputeStage(stage), amount) for each, (stage, amount) in known.items()}


def is_news(kept: str | None, dispute: Dispute) -> bool:
    """Whether this stage is new and does not come after a later one."""
    stage, _ = stages(kept).get(dispute.dispute_id, (None, 0))
    return stage is None or _RANK[stage] < _RANK[dispute.stage]


def contradicts(kept: str | None, dispute: Dispute) -> bool:
    """Whether the dispute ended differently before, or with another amount lost, as after an appeal.

    Neither message shows which of them is the later, so neither can be taken for the truth.
    """
    stage, amount = stages(kept).get(dispute.dispute_id, (None, 0))
    if dispute.stage not in ENDS or stage not in ENDS:
        return False
    return stage is not dispute.stage or (stage is DisputeStage.LOST and amount != dispute.amount_minor)


def disputed(kept: str | None, dispute_id: str) -> int:
    """How much this dispute has taken back so far."""
    _, amount = stages(kept).get(dispute_id, (None, 0))
    return amount


def remember(kept: str | None, dispute_id: str, stage: DisputeStage, amount_minor: int) -> str:
    """`kept` with the new stage."""
    known = stages(kept) | {dispute_id: (stage, amount_minor)}
    return json.dumps(known, separators=(",", ":"))
