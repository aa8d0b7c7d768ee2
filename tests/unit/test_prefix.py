"""The acknowledged prefix: how far the slot may move."""

from hypothesis import given
from hypothesis import strategies as st

from infra.relay.wal.prefix import TIDY_ABOVE, Prefix


def test_the_position_moves_only_past_transactions_before_which_nothing_is_missing() -> None:
    prefix = Prefix()
    groups = [prefix.begin(committed_at_us=number) for number in (1, 2, 3)]
    for group, end_lsn in zip(groups, (100, 200, 300), strict=True):
        group.missing, group.end_lsn = 2, end_lsn
    groups[2].missing = 0
    groups[1].missing = 0
    assert prefix.advance(wal_end=900) == 0
    groups[0].missing = 1
    assert prefix.advance(wal_end=900) == 0
    assert prefix.oldest_commit_us == 1
    groups[0].missing = 0
    assert prefix.advance(wal_end=0) == 300
    assert prefix.oldest_commit_us is None


def test_a_transaction_whose_commit_was_not_read_holds_the_position_even_when_all_of_it_is_acknowledged() -> None:
    prefix = Prefix()
    prefix.begin(committed_at_us=1).end_lsn = 100
    unfinished = prefix.begin(committed_at_us=2)
    assert prefix.advance(wal_end=900) == 100
    unfinished.end_lsn = 200
    assert prefix.advance(wal_end=0) == 200


def test_with_nothing_under_way_the_position_follows_the_log_and_never_moves_back() -> None:
    prefix = Prefix()
    assert prefix.advance(wal_end=500) == 500
    assert prefix.advance(wal_end=400) == 500
    prefix.begin(committed_at_us=1).end_lsn = 450
    assert prefix.advance(wal_end=0) == 500


@given(st.permutations(range(12)), st.lists(st.integers(1, 4), min_size=12, max_size=12))
def test_in_any_order_of_acknowledgements_the_position_is_the_complete_prefix(
    order: list[int], sizes: list[int]
) -> None:
    prefix = Prefix()
    groups = [prefix.begin(committed_at_us=number) for number in range(12)]
    for number, group in enumerate(groups):
        group.missing, group.end_lsn = sizes[number], (number + 1) * 10
    for number in order:
        groups[number].missing = 0
        complete = next((place for place, group in enumerate(groups) if group.missing), len(groups))
        assert prefix.advance(wal_end=0) == complete * 10


def test_it_does_not_keep_what_is_complete_behind_a_transaction_that_waits_for_long() -> None:
    prefix = Prefix()
    stuck = prefix.begin(1)
    stuck.missing, stuck.end_lsn = 1, 10
    for lsn in range(20, 500_000, 2):
        prefix.begin(2).end_lsn = lsn
        if not lsn % 1000:
            assert prefix.advance(wal_end=lsn) == 0
    assert len(prefix._groups) < 2 * TIDY_ABOVE
    late = prefix.begin(3)
    late.missing, late.end_lsn = 1, 500_000
    stuck.missing = 0
    assert prefix.advance(wal_end=600_000) == 499_998
    late.missing = 0
    assert prefix.advance(wal_end=500_000) == 500_000
