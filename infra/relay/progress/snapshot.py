"""Postgres snapshots: which transactions had ended at a moment. The relay uses them to record what is published."""

from collections.abc import Iterable
from typing import Any, Final, NamedTuple, Self

UNPROVEN: Final = """
    (o.xact >= %(below)s AND NOT pg_visible_in_snapshot(o.xact::text::xid8, %(published)s)
     OR o.xact IS NULL AND %(below)s <= 1)
"""
"""SQL condition on rows `o` of the outbox, with the values of `Snapshot.proof`. Rows from before migration 0003 have no
transaction id."""


class Snapshot(NamedTuple):
    """All transactions below `below` had ended, and those below `end` that are not in `open`."""

    below: int
    end: int
    open: frozenset[int]

    @classmethod
    def read(cls, text: str) -> Self:
        """Parse Postgres's text form, `xmin:xmax:xip,…`."""
        below, end, open_ = text.split(":")
        return cls(int(below), int(end), frozenset(map(int, filter(None, open_.split(",")))))

    @classmethod
    def of_all_below(cls, transaction: int) -> Self:
        """A snapshot in which exactly the transactions below this one have ended."""
        return cls(max(transaction, 1), max(transaction, 1), frozenset())

    def __str__(self) -> str:
        return f"{self.below}:{self.end}:{','.join(map(str, sorted(self.open)))}"

    @property
    def proof(self) -> dict[str, Any]:
        """Parameters for `UNPROVEN`."""
        return {"below": self.below, "published": str(self)}

    def unseen(self, xids: Iterable[int]) -> list[int]:
        """Those of these recent transactions, given by the lower 32 bits of their ids, that had not ended in it."""
        end, open_ = self.end % 2**32, {each % 2**32 for each in self.open}
        return [xid for xid in xids if xid in open_ or (xid - end) % 2**32 < 2**31]

    def until(self, later: "Snapshot", position: int) -> dict[str, Any]:
        """Parameters for a poll's window: rows that `later` sees and this does not, after `position`."""
        late = self.open - later.open
        return {
            "first": self.end,
            "end": later.end,
            "open": list(later.open),
            "late": list(late),
            "oldest": min(late, default=self.end),
            "position": position,
        }


NOTHING: Final = Snapshot.of_all_below(0)
