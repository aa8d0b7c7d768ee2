"""Comparing books movement by movement finds every difference on either side, and none that the day's edge explains."""

from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest

from app.differences import Booked, Difference, of_movements
from domain.ports import Movement

PAYMENT_ID = UUID("0192f0c1-2d5e-7cc0-8a11-5f1de2f6a001")
START = datetime(2026, 11, 22, tzinfo=UTC)
NOON, END = START + timedelta(hours=12), START + timedelta(days=1)


def booked(number: int = 1, **fields: Any) -> Booked:
    plain = Booked(
        PAYMENT_ID, number, is_refund=False, state="succeeded", is_open=False, currency="USD", amount_minor=1_000,
        reference=None, dispatched_at=NOON, settled_at=NOON,
    )  # fmt: skip
    return plain._replace(**fields)


def moved(number: int | None = 1, **fields: Any) -> Movement:
    return Movement(f"T{number}", NOON, False, "USD", 1_000, PAYMENT_ID, number)._replace(**fields)


def compared(ours: list[Booked], theirs: list[Movement], *, known: list[Booked] | None = None) -> list[Difference]:
    return of_movements(ours, ours if known is None else known, theirs, start=START, end=END)


def told(found: list[Difference]) -> list[tuple[str, str, str]]:
    return [(each.what, each.ours, each.theirs) for each in found]


def test_equal_books_have_no_differences() -> None:
    refund = {"is_refund": True}
    assert compared([booked(1), booked(2, **refund)], [moved(1), moved(2, **refund)]) == []


def test_a_movement_missing_on_either_side_is_a_difference() -> None:
    found = compared([booked(1)], [moved(2)])
    assert told(found) == [("not in our books", "", "USD 10.00"), ("not at the provider", "captured USD 10.00", "")]


def test_an_amount_or_currency_that_is_another() -> None:
    assert told(compared([booked()], [moved(amount_minor=999)])) == [("captured", "USD 10.00", "USD 9.99")]
    assert told(compared([booked()], [moved(currency="EUR")])) == [("captured", "USD 10.00", "EUR 10.00")]


def test_an_operation_that_moved_money_twice_is_a_difference() -> None:
    twice = [moved(), moved(reference="T9", moved_at=NOON + timedelta(minutes=1))]
    [found] = compared([booked()], twice)
    assert (found.what, found.provider_reference, found.payment_id) == ("captured twice", "T9", str(PAYMENT_ID))
    assert "owed back" in found.likely_cause


def test_the_second_of_two_counts_on_its_own_day_though_the_first_was_on_another() -> None:
    twice = [moved(moved_at=START - timedelta(minutes=1)), moved(reference="T9")]
    assert told(compared([booked()], twice)) == [("captured twice", "USD 10.00", "USD 10.00")]


@pytest.mark.parametrize(
    ("state", "is_open", "is_refund", "cause"),
    [
        ("indeterminate", True, False, "still open"),
        ("declined", False, False, "came after all"),
        ("declined", False, True, "came back"),
    ],
)
def test_money_that_moved_though_we_did_not_book_it(state: str, is_open: bool, is_refund: bool, cause: str) -> None:
    known = [booked(state=state, is_open=is_open, is_refund=is_refund)]
    [found] = compared([], [moved(is_refund=is_refund)], known=known)
    assert (found.ours, found.theirs) == (state, "USD 10.00")
    assert cause in found.likely_cause


def test_a_movement_without_our_number_is_known_by_its_own_id() -> None:
    refund = booked(2, is_refund=True, reference="T9")
    assert compared([refund], [moved(None, is_refund=True, reference="T9")]) == []
    [found] = compared([], [moved(None, is_refund=True, reference="T8")], known=[refund])
    assert "dashboard" in found.likely_cause


def test_a_mark_of_another_kind_of_operation_is_not_believed() -> None:
    assert told(compared([], [moved(is_refund=True)], known=[booked()])) == [("not in our books", "", "USD 10.00")]


@pytest.mark.parametrize("at", [START - timedelta(seconds=1), END, END + timedelta(minutes=4)])
def test_a_movement_at_the_edge_of_the_day_is_matched_and_never_reported_as_missing(at: datetime) -> None:
    assert compared([booked()], [moved(moved_at=at)]) == []
    assert compared([], [moved(7, moved_at=at)]) == []


def test_a_movement_matches_an_operation_settled_on_another_day() -> None:
    late = booked(settled_at=END + timedelta(hours=5))
    assert compared([], [moved()], known=[late]) == []


def test_a_just_settled_operation_is_reported_as_perhaps_not_listed_yet() -> None:
    [fresh] = compared([booked(settled_at=datetime.now(UTC))], [])
    [old] = compared([booked()], [])
    assert "not listed yet" in fresh.likely_cause
    assert "not listed yet" not in old.likely_cause
