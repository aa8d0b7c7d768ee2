"""Which payments a process takes as known without asking Postgres: new ones, and those whose only operation it sent."""

from datetime import UTC, datetime

import pytest

from domain.decide import decide
from domain.decision import Answer, Delivery, Input
from domain.operations import Unknown
from domain.payment import Payment
from handlers.at_hand import CAPACITY, AtHand
from tests.support.service import delivery, new_payment_id, rules

NOW = datetime(2026, 1, 31, 12, tzinfo=UTC)


def after(payment: Payment | None, given: Input) -> Payment:
    return decide(payment, given, now=NOW, rules=rules()).payment


def sent() -> Payment:
    """A payment whose charge was handed to the gateway."""
    return after(None, delivery("charge", new_payment_id(), "charge"))


def answer(payment: Payment, *, token: int = 1) -> Answer:
    return Answer(payment.payment_id, 1, token, Unknown("lost"))


@pytest.fixture
def at_hand() -> AtHand:
    return AtHand()


def note(at_hand: AtHand, *payments: Payment) -> None:
    at_hand.note([each.payment_id for each in payments], payments)


def test_an_opening_command_is_assumed_to_create_a_new_payment(at_hand: AtHand) -> None:
    payment_id = new_payment_id()
    batch = [delivery("authorize", payment_id, "a"), delivery("capture", payment_id, "c")]
    assert at_hand.assume(batch) == {}


@pytest.mark.parametrize("kind", ["capture", "void", "refund"])
def test_a_command_on_an_existing_payment_needs_a_read(at_hand: AtHand, kind: str) -> None:
    opened = delivery("charge", new_payment_id(), "charge")
    assert at_hand.assume([opened, delivery(kind, new_payment_id(), "key")]) is None


def test_an_answer_finds_the_payment_as_it_was_committed(at_hand: AtHand) -> None:
    payments = [sent(), sent()]
    note(at_hand, *payments)
    assert at_hand.assume([answer(each) for each in payments]) == {each.payment_id: each for each in payments}


def test_an_answer_to_somebody_elses_attempt_has_to_look(at_hand: AtHand) -> None:
    payment = sent()
    note(at_hand, payment)
    assert at_hand.assume([answer(payment, token=2)]) is None
    assert at_hand.assume([answer(sent())]) is None


def test_two_answers_for_one_payment_have_to_look(at_hand: AtHand) -> None:
    payment = sent()
    note(at_hand, payment)
    assert at_hand.assume([answer(payment), answer(payment)]) is None


def test_another_command_for_a_payment_at_hand_has_to_look(at_hand: AtHand) -> None:
    payment = sent()
    note(at_hand, payment)
    assert at_hand.assume([delivery("charge", payment.payment_id, "other")]) is None


def test_a_payment_with_a_command_that_waits_is_not_at_hand(at_hand: AtHand) -> None:
    payment = sent()
    note(at_hand, payment)
    note(at_hand, after(payment, delivery("refund", payment.payment_id, "refund")))
    assert at_hand.assume([answer(payment)]) is None


def test_a_payment_in_doubt_is_not_at_hand_since_sweeps_of_others_look_after_it(at_hand: AtHand) -> None:
    payment = sent()
    note(at_hand, payment)
    note(at_hand, after(payment, answer(payment)))
    assert at_hand.assume([answer(payment)]) is None


def test_payments_left_at_hand_are_dropped_once_there_are_too_many(at_hand: AtHand) -> None:
    one = sent()
    for _ in range(CAPACITY + 2):
        other = one.copy()
        other.payment_id = new_payment_id()
        at_hand.note([], [other])
    assert len(at_hand._payments) == 1


def test_nothing_is_assumed_of_a_mixed_batch_of_strangers(at_hand: AtHand) -> None:
    batch: list[Delivery | Answer] = [delivery("charge", new_payment_id(), "key"), answer(sent())]
    assert at_hand.assume(batch) is None
