"""A person may rule only on what needs review; a ruling counts like the provider's word, never against the amounts."""

from dataclasses import replace
from datetime import timedelta

import pytest

from domain.commands import OperationKind
from domain.operations import Declined, DeclineReason, NotExecuted, OperationState, Pending, Succeeded, Unknown
from tests.support.service import QUICK_RETRY, rules
from tests.support.story import Story

NOT_DONE = NotExecuted("a person found that the provider did not execute it")


def story() -> Story:
    return Story(rules(replace(QUICK_RETRY, review_after=timedelta(minutes=10))))


def refund_in_review() -> Story:
    told = story()
    told.does("charge")
    told.send("refund")
    told.answer(Unknown("lost"))
    told.wait(hours=1)
    told.claim()
    told.answer(Unknown("no evidence"))
    assert told.kinds[-1] == "needs_review"
    return told


def test_a_refund_that_was_found_done_is_refunded_and_says_how_that_is_known() -> None:
    told = refund_in_review()
    told.rule(Succeeded(""), 2, "VNPay portal, 14333333")
    assert (told.last.kind, told.last.evidence, told.last.reference) == ("refunded", "VNPay portal, 14333333", None)
    assert told.last.snapshot.refunded_minor == 10_000
    assert told.rule(Succeeded(""), 2).is_stale


def test_a_refund_that_was_found_missing_is_rejected_and_may_be_sent_again() -> None:
    told = refund_in_review()
    told.rule(NOT_DONE, 2)
    assert (told.last.kind, told.last.evidence) == ("command_rejected", "seen in the portal")
    told.does("refund", "again")
    assert told.last.kind == "refunded"
    assert told.last.evidence is None


def test_a_refund_queued_behind_a_ruling_carries_no_evidence() -> None:
    told = refund_in_review()
    told.send("refund", "second")
    told.rule(NOT_DONE, 2)
    assert told.requests[-1].operation_number == 3
    told.answer()
    assert (told.last.kind, told.last.evidence) == ("refunded", None)


def test_the_providers_word_counts_after_a_ruling_as_well() -> None:
    told = refund_in_review()
    told.rule(Succeeded("ref_2"), 2)
    told.hear(Declined(DeclineReason.REFUND_FAILED, None, "ref_2"), 2)
    assert told.last.kind == "refund_failed"


@pytest.mark.parametrize("answer", [None, Unknown("lost"), Pending("ref_1")], ids=str)
def test_of_what_needs_no_review_nobody_decides(answer: Unknown | Pending | None) -> None:
    told = story()
    told.send("charge")
    if answer is not None:
        told.answer(answer)
    kinds = list(told.kinds)
    for outcome in (Succeeded("ref"), NOT_DONE):
        assert told.rule(outcome).is_stale
    told.claim()
    told.answer()
    assert told.rule(NOT_DONE).is_stale
    assert told.rule(NOT_DONE, 7).is_stale
    assert told.kinds == [*kinds, "captured"]


def test_while_a_worker_sends_it_again_nobody_decides_and_its_answer_counts() -> None:
    told = refund_in_review()
    request = told.claim()
    assert (request.kind, request.state) == (OperationKind.REFUND, OperationState.NEEDS_REVIEW)
    assert told.rule(NOT_DONE, 2).is_stale
    told.answer()
    assert told.last.kind == "refunded"


def test_an_answer_that_comes_after_the_ruling_is_stale() -> None:
    told = refund_in_review()
    told.claim()
    told.wait(seconds=told.rules.retry.lease.total_seconds())
    told.rule(NOT_DONE, 2)
    assert told.last.kind == "command_rejected"
    assert told.answer(Unknown()).is_stale


def moved_another_amount(first: str, kind: str, moved: int) -> Story:
    told = story()
    told.does(first)
    told.send(kind, amount_minor=9_000)
    told.answer(Succeeded("ref_2", moved))
    assert told.kinds[-1] == "needs_review"
    return told


@pytest.mark.parametrize(("first", "kind"), [("charge", "refund"), ("authorize", "capture")])
def test_another_amount_that_a_person_found_is_booked_as_ruled(first: str, kind: str) -> None:
    told = moved_another_amount(first, kind, 8_000)
    told.rule(Succeeded("ref_2", 8_000), 2)
    assert (told.last.amount_minor, told.transfers[-1].amount_minor) == (8_000, 8_000)
    snapshot = told.last.snapshot
    assert (snapshot.refunded_minor if kind == "refund" else snapshot.captured_minor) == 8_000
    kinds = list(told.kinds)
    told.hear(Succeeded("ref_2", 8_000), 2)
    assert told.kinds == kinds, "the provider says the same once more"


@pytest.mark.parametrize(("first", "kind"), [("charge", "refund"), ("authorize", "capture")])
def test_more_than_there_is_room_for_is_not_booked_whoever_found_it(first: str, kind: str) -> None:
    told = moved_another_amount(first, kind, 12_000)
    told.rule(Succeeded("ref_2", 12_000), 2)
    assert (told.kinds[-1], told.operations[2].amount_minor) == ("needs_review", 9_000)


def test_a_charge_of_less_is_paid_with_less() -> None:
    told = story()
    told.send("charge")
    told.answer(Succeeded("ref_1", 7_000))
    told.rule(Succeeded("ref_1", 7_000))
    assert (told.last.kind, told.last.amount_minor, told.last.snapshot.captured_minor) == ("captured", 7_000, 7_000)
    told.does("refund", amount_minor=7_000)
    assert told.last.snapshot.status == "refunded"
