"""The acknowledged prefix of the log: how far the slot may advance without losing an event."""

from collections import deque

from infra.relay.event import Group

TIDY_ABOVE = 10_000
"""At least so many groups are kept before complete ones are removed."""


class Prefix:
    """Transactions in the order of the log.

    Acknowledgements arrive out of order across partitions, so the position moves past a group only if nothing in it or
    before it is missing, and only to a COMMIT's end: resuming within a transaction would lose its first events.
    """

    def __init__(self) -> None:
        self._groups: deque[Group] = deque()
        self._lsn = 0
        self._tidy_above = TIDY_ABOVE

    def begin(self, committed_at_us: int) -> Group:
        """Begin the next group in the log; it blocks the position until `end_lsn` is known and nothing is missing."""
        group = Group(committed_at_us)
        self._groups.append(group)
        return group

    def advance(self, wal_end: int) -> int:
        """The position up to which everything is acknowledged; never moves back.

        With none of our events in progress that is `wal_end`, as far as the server has read, so that an idle slot does
        not retain the log of other tables.
        """
        while self._groups and self._groups[0].end_lsn is not None and not self._groups[0].missing:
            self._lsn = max(self._lsn, self._groups.popleft().end_lsn or 0)
        if not self._groups:
            self._lsn = max(self._lsn, wal_end)
        elif len(self._groups) > self._tidy_above:
            self._forget_complete()
        return self._lsn

    def _forget_complete(self) -> None:
        """Remove complete groups, which pile up behind one that waits long; only the last group's end matters."""
        last = self._groups[-1]
        self._groups = deque(each for each in self._groups if each.missing or each.end_lsn is None or each is last)
        self._tidy_above = TIDY_ABOVE + 2 * len(self._groups)

    @property
    def is_empty(self) -> bool:
        """Whether nothing that was read is still in progress."""
        return not self._groups

    @property
    def oldest_commit_us(self) -> int | None:
        """Commit time of the oldest group's first transaction, in µs since 2000-01-01 UTC; None without groups."""
        return self._groups[0].committed_at_us if self._groups else None
