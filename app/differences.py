"""Where a day's books and the provider's own list differ, both ways, and why they may.

Two ways to look, as providers list differently: payment by payment, with what became of each until now; or movement by
movement, each capture and refund by itself.
"""

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Final, NamedTuple
from uuid import UUID

from domain.money import Money
from domain.ports import Movement, Statement

LISTED_WITHIN: Final = timedelta(hours=3)
"""After this time a provider lists every movement (PayPal's Transaction Search is the slowest)."""


class Difference(NamedTuple):
    """One difference between the books. Amounts are ours and theirs; empty if one side does not know it."""

    provider_reference: str
    payment_id: str | None
    what: str
    ours: str
    theirs: str
    likely_cause: str


# --- payment by payment -----------------------------------------------------------------------------------------------


def of_payments(ours: Mapping[str, Any], theirs: Mapping[str, Statement]) -> list[Difference]:
    """Rows of our payments and the provider's statements of them, by the provider's id."""
    return [each for key in sorted(ours.keys() | theirs.keys()) for each in _of_payment(key, ours, theirs)]


def _of_payment(key: str, ours: Mapping[str, Any], theirs: Mapping[str, Statement]) -> list[Difference]:
    own, other = ours.get(key), theirs.get(key)
    if own is None:
        assert other is not None, "one of the two knows it"
        return [_unknown_here(other)] if other.captured_minor else []
    payment_id = str(own["payment_id"])
    if other is None:
        return [Difference(key, payment_id, "not at the provider", "", "", "another account, or another day there")]
    found = []
    for what, mine, yours in (
        ("captured", own["captured_minor"], other.captured_minor),
        ("refunded", own["refunded_minor"], other.refunded_minor),
    ):
        if mine != yours or own["currency"] != other.currency:
            amounts = str(Money(mine, own["currency"])), str(Money(yours, other.currency))
            found.append(Difference(key, payment_id, what, *amounts, _cause(own["open_state"], what, mine, yours)))
    return found


def _unknown_here(other: Statement) -> Difference:
    marked = str(other.payment_id) if other.payment_id else None
    cause = "an answer that was lost: see whether it is open" if marked else "not made by this service"
    theirs = str(Money(other.captured_minor, other.currency))
    return Difference(other.gateway_payment_id, marked, "not in our books", "", theirs, cause)


def _cause(open_state: str | None, what: str, mine: int, yours: int) -> str:
    if open_state is not None:
        return _still_open(open_state)
    if what == "refunded" and yours > mine:
        return "a refund made in the provider's dashboard whose webhook did not come or fit, or not settled there yet"
    return "changed outside of this service"


def _still_open(state: str) -> str:
    return f"an operation is still open ({state}): `payments reconcile --now`"


# --- movement by movement ---------------------------------------------------------------------------------------------


class Booked(NamedTuple):
    """One of our charges, captures or refunds. `reference` is the provider's id of it, where that is known."""

    payment_id: UUID
    number: int
    is_refund: bool
    state: str
    is_open: bool
    currency: str
    amount_minor: int
    reference: str | None
    dispatched_at: datetime
    settled_at: datetime | None


Known = Mapping[tuple[UUID, int] | str, Booked]
"""Our operations, by payment and number and by the provider's id."""


def of_movements(
    of_day: Sequence[Booked], known: Iterable[Booked], theirs: Sequence[Movement], *, start: datetime, end: datetime
) -> list[Difference]:
    """What we booked on the day, and what the provider moved on it, each held against all that the other side has.

    `known` are all of our operations on payments that the provider's list names, `theirs` reaches beyond the day.
    """
    every = _by_name([*known, *of_day])
    matched: dict[tuple[UUID, int], Movement] = {}
    found: list[Difference] = []
    for each in sorted(theirs, key=lambda movement: (movement.moved_at, movement.reference)):
        booked = _booked(each, every)
        is_again = booked is not None and matched.setdefault((booked.payment_id, booked.number), each) is not each
        if start <= each.moved_at < end:
            found += _of_movement(each, booked, is_again=is_again)
    missing = (each for each in of_day if (each.payment_id, each.number) not in matched)
    return found + [_not_listed(each) for each in missing]


def _by_name(booked: Iterable[Booked]) -> Known:
    known: dict[tuple[UUID, int] | str, Booked] = {}
    for each in booked:
        known[each.payment_id, each.number] = each
        if each.reference is not None:
            known[each.reference] = each
    return known


def _booked(movement: Movement, known: Known) -> Booked | None:
    """Our operation that caused the movement, if there is one of that kind."""
    found = known.get(movement.reference)
    if movement.payment_id is not None and movement.operation_number is not None:
        found = known.get((movement.payment_id, movement.operation_number), found)
    return found if found is not None and found.is_refund == movement.is_refund else None


def _of_movement(movement: Movement, booked: Booked | None, *, is_again: bool) -> list[Difference]:
    what, theirs = _what(movement.is_refund), str(Money(movement.amount_minor, movement.currency))
    if booked is None:
        marked = str(movement.payment_id) if movement.payment_id else None
        return [Difference(movement.reference, marked, "not in our books", "", theirs, _why_unknown(movement))]
    payment_id, ours = str(booked.payment_id), str(Money(booked.amount_minor, booked.currency))
    if is_again:
        cause = "executed twice: one of them is owed back"
        return [Difference(movement.reference, payment_id, f"{what} twice", ours, theirs, cause)]
    if booked.state != "succeeded":
        return [Difference(movement.reference, payment_id, what, booked.state, theirs, _why_not_booked(booked))]
    if ours != theirs:
        cause = "changed outside of this service"
        return [Difference(movement.reference, payment_id, what, ours, theirs, cause)]
    return []


def _what(is_refund: bool) -> str:
    return "refunded" if is_refund else "captured"


def _why_unknown(movement: Movement) -> str:
    if movement.payment_id is None:
        return "not made by this service"
    if movement.operation_number is None:
        what = "refund" if movement.is_refund else "payment"
        return f"a {what} made in the provider's dashboard, whose webhook did not come or did not fit"
    return "made by another installation with this account"


def _why_not_booked(booked: Booked) -> str:
    if booked.is_open:
        return _still_open(booked.state)
    if booked.is_refund:
        return "a refund that came back, or that the provider called failed before"
    return "money that came after all: its webhook was not received"


def _not_listed(booked: Booked) -> Difference:
    is_recent = booked.settled_at is not None and datetime.now(UTC) - booked.settled_at < LISTED_WITHIN
    cause = "perhaps not listed yet: look again in three hours" if is_recent else "another account, or undone there"
    ours = f"{_what(booked.is_refund)} {Money(booked.amount_minor, booked.currency)}"
    reference, payment_id = booked.reference or "", str(booked.payment_id)
    return Difference(reference, payment_id, "not at the provider", ours, "", cause)
