"""Which transactions had ended at a moment, as Postgres tells it: the relay's measure of what is published."""

from collections.abc import Iterable
from typing import Any, Final, NamedTuple, Self

UNPROVEN: Final = """
    (o.xact >= %(below)s AND NOT pg_visible_in_snapshot(o.xact::text::xid8, %(published)s)
     OR o.xact IS NULL AND %(below)s <= 1)
"""
"""Of rows `o` of the outbox, with the values of `Snapshot.proof`. Rows from before 0003 have no transaction id."""


class Snapshot(NamedTuple):
    """All below `below` had ended, and those below `end` that are not `open`."""

    below: int
    end: int
    open: frozenset[int]

    @classmethod
    def read(cls, text: str) -> Self:
        """From Postgres's own form, `xmin:xmax:xip,…`."""
        below, end, open_ = text.split(":")
        return cls(int(below), int(end), frozenset(map(int, filter(None, open_.split(",")))))

    @classmethod
    def of_all_below(cls, transaction: int) -> Self:
        """As if just those had ended."""
        return cls(max(transaction, 1), max(transaction, 1), frozenset())

    def __str__(self) -> str:
        return f"{self.below}:{self.end}:{','.join(map(str, sorted(self.open)))}"

    @property
    def proof(self) -> dict[str, Any]:
        """Values for `UNPROVEN`."""
        return {"below": self.below, "published": str(self)}

    def unseen(self, xids: Iterable[int]) -> list[int]:
        """Of recent transactions, known by the lower 32 bits of their ids, those that it does not take for ended."""
        end, open_ = self.end % 2**32, {each % 2**32 for each in self.open}
        return [xid for xid in xids if xid in open_ or (xid - end) % 2**32 < 2**31]

    def until(self, later: "Snapshot", position: int) -> dict[str, Any]:
        """Values for a poll's window: what `later` sees and this does not, behind `position`."""
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
