"""Refunds and captures made in the provider's dashboard count once, in any order; our own are never counted twice."""

from dataclasses import replace
from datetime import timedelta
from itertools import permutations
from typing import Any

import pytest

from domain.commands import OperationKind
from domain.decision import Decision
from domain.notices import Dispute, DisputeStage, External
from domain.operations import Declined, DeclineReason, NotExecuted, Outcome, Pending, Succeeded, Unknown
from tests.support.provider import CAPABILITIES
from tests.support.service import QUICK_RETRY, rules
from tests.support.story import Story

CAPTURE = OperationKind.CAPTURE
RETURNED = Succeeded("re_portal", 4_000)
CAME_BACK = Declined(DeclineReason.REFUND_FAILED, None, "re_portal")
OWN = "ref_2"
"""The provider's reference of our own refund."""


def story() -> Story:
    return Story(rules(replace(QUICK_RETRY, review_after=timedelta(minutes=10))))


def paid() -> Story:
    told = story()
    told.does("charge")
    return told


def paid_twice() -> Story:
    """The first attempt was paid after the second one, so that its amount is owed to the payer."""
    told = story()
    told.send("charge", "first")
    told.answer(Declined(DeclineReason.OTHER, None, "ref_1"))
    told.does("charge", "second")
    told.hear(Succeeded("ref_1", 10_000), 1)
    return told


def sums(told: Story) -> tuple[int, int, int]:
    """What is owed, what was refunded, and what our commands may still refund."""
    assert told.payment is not None
    return told.payment.owed_minor, told.payment.refunded_minor, told.payment.refundable_minor


def held(*, multi_capture: bool = False) -> Story:
    told = Story(rules(gateways={"books": replace(CAPABILITIES, multi_capture=multi_capture)}))
    told.does("authorize")
    return told


# --- refunds ----------------------------------------------------------------------------------------------------------


def test_a_refund_counts_once_however_often_it_is_told() -> None:
    told = paid()
    for _ in range(3):
        told.hear_external(RETURNED, 4_000)
    assert told.kinds == ["captured", "refunded_externally"]
    assert told.amounts() == (10_000, 10_000, 0, 4_000)
    assert (told.last.amount_minor, told.last.reference) == (4_000, "re_portal")
    assert (told.last.command, told.last.idempotency_key, told.last.fingerprint) == (None, None, None)
    assert told.last.snapshot.status == "partially_refunded"
    assert told.state(2) == "succeeded"


def test_two_refunds_of_the_same_amount_are_two() -> None:
    told = paid()
    told.hear_external(RETURNED, 4_000)
    told.hear_external(Succeeded("re_other", 4_000), 4_000)
    assert told.amounts() == (10_000, 10_000, 0, 8_000)


def test_an_externally_refunded_amount_cannot_be_refunded_again() -> None:
    told = paid()
    told.hear_external(RETURNED, 4_000)
    told.send("refund", "too much", amount_minor=6_001)
    assert told.last.kind == "command_rejected"
    told.does("refund", "the rest", amount_minor=6_000)
    assert told.amounts() == (10_000, 10_000, 0, 10_000)


def test_a_refund_that_came_back_is_taken_back_and_any_order_of_the_news_ends_the_same() -> None:
    news: list[Outcome] = [RETURNED, RETURNED, CAME_BACK, CAME_BACK, Pending("re_portal")]
    for order in set(permutations(news)):
        told = paid()
        for each in order:
            assert not told.hear_external(each, 4_000).disagrees
        assert told.amounts() == (10_000, 10_000, 0, 0)
        assert told.kinds[-1] == "refund_failed"
        assert told.kinds.count("refund_failed") == 1
        assert told.state(2) == "declined"


@pytest.mark.parametrize("amount", [10_001, 0, -1])
def test_an_external_refund_of_an_impossible_amount_changes_nothing(amount: int) -> None:
    told = paid()
    assert told.hear_external(RETURNED, amount).disagrees
    assert told.kinds == ["captured"]


def test_another_currency_gateway_or_attempt_changes_nothing_and_is_for_a_person() -> None:
    told = paid()
    assert told.hear_external(RETURNED, 4_000, currency="EUR").disagrees
    assert told.hear_external(RETURNED, 4_000, gateway="other").disagrees
    assert told.hear_external(RETURNED, 4_000, gateway_payment_id="another attempt's").disagrees
    assert told.kinds == ["captured"]
    told.hear_external(RETURNED, 4_000, currency="USD", gateway_payment_id=None)
    assert told.kinds == ["captured", "refunded_externally"]


def test_a_refund_of_another_attempts_payment_reduces_what_is_owed() -> None:
    """docs/operations/reconciliation.md says to return what is owed in the provider's dashboard."""
    told = paid_twice()
    told.hear_external(RETURNED, 4_000, gateway_payment_id="ref_1")
    assert sums(told) == (6_000, 4_000, 10_000)
    told.hear_external(Succeeded("re_rest", 6_000), 6_000, gateway_payment_id="ref_1")
    assert sums(told) == (0, 10_000, 10_000)
    assert told.hear_external(Succeeded("re_more", 1), 1, gateway_payment_id="ref_1").disagrees
    told.hear_external(CAME_BACK, 4_000, gateway_payment_id="ref_1")
    assert sums(told) == (4_000, 6_000, 10_000)


def test_a_refund_of_another_attempt_is_no_part_of_the_current_ones_capture() -> None:
    """Our capture's request stays the same at every try, and the hold stays a hold."""
    told = story()
    told.send("charge", "first")
    told.answer(Declined(DeclineReason.OTHER, None, "ref_1"))
    told.does("authorize", "second")
    told.hear(Succeeded("ref_1", 10_000), 1)
    told.send("capture", "third")
    told.answer(Unknown())
    told.hear_external(RETURNED, 10_000, gateway_payment_id="ref_1")
    assert told.last.snapshot.status == "authorized"
    assert told.claim().captured_minor == 0
    told.answer(Succeeded("ref_3", 10_000))
    assert sums(told) == (0, 10_000, 10_000)
    assert told.last.snapshot.status == "partially_refunded"


def test_an_external_refund_of_a_twice_paid_payment_must_name_its_attempt() -> None:
    told = paid_twice()
    assert told.hear_external(RETURNED, 4_000, gateway_payment_id=None).disagrees
    assert not told.hear_external(RETURNED, 4_000, gateway_payment_id="ref_2").disagrees
    assert sums(told) == (10_000, 4_000, 6_000)


def test_an_amount_lost_in_a_dispute_is_not_refunded_again() -> None:
    told = paid()
    told.hear(dispute=Dispute("dp_1", DisputeStage.LOST, 7_000, "USD", "fraudulent"), operation_number=None)
    assert told.hear_external(RETURNED, 4_000).disagrees
    assert told.amounts() == (10_000, 10_000, 0, 0)
    told.hear_external(Succeeded("re_rest", 3_000), 3_000)
    assert told.amounts() == (10_000, 10_000, 0, 3_000)


def reversed_(told: Story, amount: int, outcome: Outcome = RETURNED, **facts: Any) -> Decision:
    """The provider reports that it returned this amount to the payer itself."""
    moved_at = facts.pop("moved_at", told.now)
    given = External(OperationKind.REFUND, amount, moved_at, is_reversal=True)
    return told.hear_external(outcome, external=given, **facts)


def test_a_reversal_that_no_dispute_accounts_for_waits_for_one_and_is_then_for_a_person() -> None:
    told = paid()
    made_at = told.now
    assert reversed_(told, 4_000).is_postponed
    told.now = made_at + timedelta(minutes=11)
    late = reversed_(told, 4_000, moved_at=made_at)
    assert (late.is_postponed, late.disagrees) == (False, True)
    assert reversed_(told, 4_000, moved_at=None).disagrees
    assert told.kinds == ["captured"]
    assert told.amounts() == (10_000, 10_000, 0, 0)


@pytest.mark.parametrize("stage", [DisputeStage.OPENED, DisputeStage.LOST])
def test_a_reversal_of_what_a_dispute_took_counts_once_in_either_order(stage: DisputeStage) -> None:
    told = paid()
    assert reversed_(told, 4_000).is_postponed
    told.hear(dispute=Dispute("dp_1", stage, 4_000, "USD", "fraudulent"), operation_number=None)
    for _ in range(2):
        heard = reversed_(told, 4_000)
        assert (heard.is_postponed, heard.disagrees) == (False, False)
    assert told.payment is not None
    assert (told.payment.disputed_minor, told.payment.refunded_minor) == (4_000, 0)


@pytest.mark.parametrize(
    ("taken", "amount", "currency"), [(3_999, 4_000, "USD"), (4_000, 4_000, "EUR"), (None, 4_000, "USD")]
)
def test_a_reversal_beyond_what_disputes_took_is_for_a_person(taken: int | None, amount: int, currency: str) -> None:
    told = paid()
    stage, disputed = (DisputeStage.LOST, taken) if taken is not None else (DisputeStage.WON, 4_000)
    told.hear(dispute=Dispute("dp_1", stage, disputed, "USD", "fraudulent"), operation_number=None)
    assert reversed_(told, amount, currency=currency, moved_at=None).disagrees
    assert told.payment is not None
    assert told.payment.refunded_minor == 0


def test_a_reversal_that_failed_is_no_news_and_one_that_is_pending_is_as_good_as_made() -> None:
    told = paid()
    failed = reversed_(told, 4_000, CAME_BACK, moved_at=None)
    assert (failed.disagrees, failed.is_postponed) == (False, False)
    assert reversed_(told, 4_000, Pending("re_portal"), moved_at=None).disagrees
    assert told.kinds == ["captured"]


def test_a_reversal_is_no_refund_of_ours_that_is_under_way() -> None:
    told = paid()
    told.send("refund", "ours", amount_minor=4_000)
    assert reversed_(told, 4_000, moved_at=None).disagrees


# --- our own refunds, reported without our marks ----------------------------------------------------------------------


@pytest.mark.parametrize("first", [None, Unknown("timeout")], ids=["in flight", "in doubt"])
def test_an_external_refund_that_may_be_ours_waits_for_our_answer_and_counts_once(first: Outcome | None) -> None:
    told = paid()
    told.send("refund", amount_minor=4_000)
    if first is not None:
        told.answer(first)
        told.claim()
    unmarked = Succeeded(OWN, 4_000)
    assert told.hear_external(unmarked, 4_000).is_postponed
    assert told.hear_external(replace(CAME_BACK, reference=OWN), 4_000).is_postponed
    told.answer(unmarked)
    assert not told.hear_external(unmarked, 4_000).disagrees
    assert told.kinds.count("refunded") == 1
    assert "refunded_externally" not in told.kinds
    assert told.amounts() == (10_000, 10_000, 0, 4_000)
    told.hear_external(replace(CAME_BACK, reference=OWN), 4_000)
    assert told.amounts() == (10_000, 10_000, 0, 0)


def test_our_own_that_the_provider_called_pending_is_ended_by_it() -> None:
    told = paid()
    told.send("refund", amount_minor=4_000)
    told.answer(Pending(OWN))
    told.hear_external(Succeeded(OWN, 4_000), 4_000)
    assert told.kinds == ["captured", "pending", "refunded"]
    assert told.amounts() == (10_000, 10_000, 0, 4_000)


def test_an_external_refund_may_be_one_that_a_person_ruled_done_without_its_id() -> None:
    told = paid()
    told.send("refund", amount_minor=4_000)
    told.wait(minutes=11)
    told.answer(Unknown("timeout"))
    told.rule(Succeeded(""), 2)
    assert told.kinds[-1] == "refunded"
    assert told.hear_external(RETURNED, 4_000).disagrees
    assert told.amounts() == (10_000, 10_000, 0, 4_000)


# --- while an operation of ours is under way --------------------------------------------------------------------------


def test_a_refund_beside_our_own_that_is_pending_counts_at_once_if_there_is_room_for_both() -> None:
    told = paid()
    told.send("refund", amount_minor=4_000)
    told.answer(Pending(OWN))
    told.hear_external(Succeeded("re_portal", 6_000), 6_000)
    told.claim()
    told.answer(Succeeded(OWN, 4_000))
    assert told.kinds == ["captured", "pending", "refunded_externally", "refunded"]
    assert told.amounts() == (10_000, 10_000, 0, 10_000)


@pytest.mark.parametrize("is_ours_done", [True, False])
def test_an_external_refund_without_room_beside_ours_waits_for_our_outcome(*, is_ours_done: bool) -> None:
    told = paid()
    told.send("refund", amount_minor=4_000)
    told.answer(Pending(OWN))
    theirs = Succeeded("re_portal", 7_000)
    assert told.hear_external(theirs, 7_000).is_postponed
    assert told.amounts() == (10_000, 10_000, 0, 0)
    told.claim()
    told.answer(Succeeded(OWN, 4_000) if is_ours_done else replace(CAME_BACK, reference=OWN))
    assert told.hear_external(theirs, 7_000).disagrees == is_ours_done
    assert told.amounts() == (10_000, 10_000, 0, 4_000 if is_ours_done else 7_000)


def test_a_refund_of_a_charge_that_we_do_not_know_to_be_paid_waits_for_its_answer() -> None:
    told = story()
    told.send("charge")
    told.answer(Pending("ref_1"))
    assert told.hear_external(RETURNED, 4_000).is_postponed
    told.hear(Succeeded("ref_1", 10_000))
    told.hear_external(RETURNED, 4_000)
    assert told.kinds == ["pending", "captured", "refunded_externally"]


def test_news_in_the_wrong_order_is_put_off_for_a_while_and_then_for_a_person() -> None:
    told = held()
    refund = External(OperationKind.REFUND, 4_000, told.now)
    assert told.hear_external(RETURNED, external=refund).is_postponed
    told.hear_external(Succeeded("ch_1", 10_000), 10_000, CAPTURE)
    told.hear_external(RETURNED, external=refund)
    assert told.kinds == ["authorized", "captured_externally", "refunded_externally"]
    too_much = External(OperationKind.REFUND, 6_001, told.now)
    assert told.hear_external(Succeeded("re_2"), external=too_much).is_postponed
    told.wait(seconds=QUICK_RETRY.review_after.total_seconds())
    assert told.hear_external(Succeeded("re_2"), external=too_much).disagrees


# --- captures ---------------------------------------------------------------------------------------------------------


def test_a_capture_counts_once_and_releases_the_rest_where_the_first_one_is_the_only_one() -> None:
    told = held()
    for _ in range(2):
        told.hear_external(Succeeded("ch_1", 4_000), 4_000, CAPTURE)
    assert told.kinds == ["authorized", "captured_externally"]
    assert told.amounts() == (10_000, 4_000, 6_000, 0)
    told.send("capture")
    assert told.last.kind == "command_rejected"


def test_captures_of_one_hold_add_up_where_there_may_be_several() -> None:
    told = held(multi_capture=True)
    told.does("capture", amount_minor=3_000)
    told.hear_external(Succeeded("cap_1", 4_000), 4_000, CAPTURE)
    assert told.hear_external(Succeeded("cap_2", 3_001), 3_001, CAPTURE).disagrees
    told.hear_external(Succeeded("cap_2", 3_000), 3_000, CAPTURE)
    assert told.amounts() == (10_000, 10_000, 0, 0)
    told.hear_external(RETURNED, 10_000)
    assert told.last.snapshot.status == "refunded"


def test_the_last_capture_releases_the_rest_though_there_might_have_been_several() -> None:
    told = held(multi_capture=True)
    last = External(CAPTURE, 4_000, is_final=True)
    told.hear_external(Succeeded("cap_1", 4_000), external=last, kind=CAPTURE)
    assert told.amounts() == (10_000, 4_000, 6_000, 0)
    assert told.last.snapshot.status == "captured"


@pytest.mark.parametrize("kind", ["capture", "void"])
def test_a_capture_beside_our_own_capture_or_void_waits_for_its_outcome(kind: str) -> None:
    told = held()
    told.send(kind)
    assert told.hear_external(Succeeded("ref_2", 10_000), 10_000, CAPTURE).is_postponed
    told.answer(Succeeded("ref_2", 10_000))
    assert told.hear_external(Succeeded("ref_2", 10_000), 10_000, CAPTURE).disagrees == (kind == "void")
    assert told.amounts() == ((10_000, 10_000, 0, 0) if kind == "capture" else (10_000, 0, 10_000, 0))


def test_a_capture_changes_no_request_of_ours_that_may_be_repeated() -> None:
    told = held(multi_capture=True)
    told.send("capture", amount_minor=3_000)
    told.answer(Pending("ref_2"))
    before = told.requests[-1]
    assert told.hear_external(Succeeded("cap_1", 7_000), 7_000, CAPTURE).is_postponed
    again = told.claim()
    assert (again.is_final, again.captured_minor) == (before.is_final, before.captured_minor) == (False, 0)
    told.answer(Succeeded("ref_2", 3_000))
    told.hear_external(Succeeded("cap_1", 7_000), 7_000, CAPTURE)
    assert told.amounts() == (10_000, 10_000, 0, 0)


def test_a_capture_that_was_refused_there_is_no_news() -> None:
    told = held()
    assert not told.hear_external(Declined(DeclineReason.OTHER, None, "cap_1"), 4_000, CAPTURE).disagrees
    assert told.kinds == ["authorized"]


def test_a_hold_of_which_nothing_is_left_cannot_have_been_captured() -> None:
    told = held()
    told.does("void")
    assert told.hear_external(Succeeded("ch_1", 10_000), 10_000, CAPTURE).disagrees
    assert told.amounts() == (10_000, 0, 10_000, 0)


# --- reports that come after we counted or ruled otherwise ------------------------------------------------------------


def in_doubt_and_ruled_out(amount: int) -> Story:
    """A refund in doubt; a person then ruled that it was not made."""
    told = Story(rules(replace(QUICK_RETRY, review_after=timedelta(0))))
    told.does("charge")
    told.send("refund", "first", amount_minor=amount)
    told.wait(hours=1)
    told.answer(Unknown())
    told.rule(NotExecuted("nothing there"), 2)
    return told


def test_a_refund_that_was_counted_as_somebody_elses_is_not_counted_again_under_our_mark() -> None:
    told = in_doubt_and_ruled_out(4_000)
    told.hear_external(RETURNED, 4_000)
    known = tuple(told.operations.values())
    assert told.hear(RETURNED, 2, known=known).disagrees
    assert told.amounts() == (10_000, 10_000, 0, 4_000)


def test_late_news_does_not_take_what_is_reserved_and_waits_for_its_end() -> None:
    told = in_doubt_and_ruled_out(6_000)
    told.send("refund", "second", amount_minor=6_000)
    assert told.hear(Succeeded("re_1", 6_000), 2).is_postponed
    told.answer(Declined(DeclineReason.REFUND_FAILED, None, "re_2"))
    assert not told.hear(Succeeded("re_1", 6_000), 2).is_postponed
    assert told.amounts() == (10_000, 10_000, 0, 6_000)


# --- captures reported only as a sum, with our last one's mark --------------------------------------------------------


def in_parts() -> Story:
    """A hold that allows several captures, of which we made two, 5,000 in all."""
    told = held(multi_capture=True)
    told.does("capture", "first", amount_minor=2_000)
    told.does("capture", "second", amount_minor=3_000)
    return told


def closed(told: Story, minor: int, number: int = 3, **facts: Any) -> Decision:
    """The provider reports the hold as closed with this sum captured; `number` is our last capture."""
    given: dict[str, Any] = {"gateway_payment_id": "ref_1", "captured_minor": minor} | facts
    return told.hear(Succeeded("ref_1"), number, **given)


def test_an_external_capture_beside_our_partial_ones_counts_once() -> None:
    told = in_parts()
    for _ in range(2):
        assert not closed(told, 10_000).disagrees
    assert told.kinds == ["authorized", "captured", "captured", "captured_externally"]
    assert (told.last.amount_minor, told.last.command) == (5_000, None)
    assert told.amounts() == (10_000, 10_000, 0, 0)


def test_a_last_external_capture_releases_the_rest() -> None:
    told = in_parts()
    closed(told, 9_000)
    assert told.amounts() == (10_000, 9_000, 1_000, 0)


def test_a_sum_that_is_ours_alone_is_no_contradiction_before_our_answer_or_after_it() -> None:
    told = held(multi_capture=True)
    told.does("capture", "first", amount_minor=2_000)
    told.send("capture", "second", amount_minor=3_000)
    assert not closed(told, 5_000).disagrees
    told.answer()
    told.send("refund", amount_minor=1_000)
    assert not closed(told, 5_000).is_postponed
    assert told.kinds == ["authorized", "captured", "captured"]


def test_news_of_both_before_our_own_answer_is_of_both_and_what_waited_is_decided_after_it() -> None:
    told = held(multi_capture=True)
    told.does("capture", "first", amount_minor=2_000)
    told.send("capture", "second", amount_minor=3_000)
    told.send("capture", "third", amount_minor=1_000)
    assert not closed(told, 10_000).disagrees
    assert told.kinds[-3:] == ["captured", "captured_externally", "command_rejected"]
    assert told.amounts() == (10_000, 10_000, 0, 0)
    assert told.answer(Succeeded("ref_1")).is_stale


@pytest.mark.parametrize("kind", ["capture", "void"])
def test_beside_our_own_that_is_under_way_it_waits_for_that_ones_outcome(kind: str) -> None:
    told = in_parts()
    told.send(kind)
    assert closed(told, 10_000).is_postponed
    told.answer(NotExecuted("it is closed"))
    assert not closed(told, 10_000).disagrees
    assert told.amounts() == (10_000, 10_000, 0, 0)


def test_an_external_capture_of_a_voided_rest_disagrees() -> None:
    told = in_parts()
    told.does("void")
    assert closed(told, 10_000).disagrees
    assert told.amounts() == (10_000, 5_000, 5_000, 0)


def test_more_than_the_only_capture_took_is_for_a_person() -> None:
    told = held()
    told.send("capture", "too much", amount_minor=10_001)
    told.does("capture", amount_minor=3_000)
    assert not closed(told, 3_000).disagrees
    assert closed(told, 10_000).disagrees
    assert told.amounts() == (10_000, 3_000, 7_000, 0)


def test_more_than_the_hold_has_room_for_is_no_word_to_be_believed_about_our_own() -> None:
    told = held(multi_capture=True)
    told.send("capture", amount_minor=2_000)
    assert told.hear(Succeeded("ref_1", 10_001), 2, gateway_payment_id="ref_1", captured_minor=10_001).disagrees
    assert told.kinds == ["authorized", "needs_review"]


def test_a_notice_that_contradicts_our_capture_books_no_external_capture_either() -> None:
    told = held()
    told.send("capture", amount_minor=2_000)
    assert told.hear(Succeeded("ref_1", 10_000), 2, gateway_payment_id="ref_1", captured_minor=10_000).disagrees
    assert told.kinds == ["authorized", "needs_review"]
    told.answer(Succeeded("ref_1", 2_000))
    assert told.hear(Succeeded("ref_1", 10_000), 2, gateway_payment_id="ref_1", captured_minor=10_000).disagrees
    assert told.amounts() == (10_000, 2_000, 8_000, 0)


@pytest.mark.parametrize("is_answered", [True, False])
def test_of_what_is_told_of_our_first_part_only_as_much_as_we_asked_for_is_ours(*, is_answered: bool) -> None:
    told = held(multi_capture=True)
    told.send("capture", amount_minor=2_000)
    if is_answered:
        told.answer()
    first = Succeeded("ref_1", 10_000)
    assert not told.hear(first, 2, gateway_payment_id="ref_1", captured_minor=10_000).disagrees
    assert told.kinds == ["authorized", "captured", "captured_externally"]
    assert told.amounts() == (10_000, 10_000, 0, 0)


def test_an_external_capture_beside_a_refused_void_needs_a_person() -> None:
    told = held(multi_capture=True)
    told.send("void")
    told.answer(NotExecuted("refused"))
    assert told.hear(Succeeded("ref_1", 4_000), 2, gateway_payment_id="ref_1", captured_minor=4_000).disagrees
    assert told.amounts() == (10_000, 0, 0, 0)


def test_our_own_that_was_called_not_executed_counts_before_what_others_captured() -> None:
    told = held(multi_capture=True)
    told.send("capture", amount_minor=2_000)
    told.answer(NotExecuted("refused"))
    assert not closed(told, 10_000, 2).disagrees
    assert told.kinds[-2:] == ["late_success", "captured_externally"]
    assert told.last.amount_minor == 8_000
    assert told.amounts() == (10_000, 10_000, 0, 0)


def test_a_sum_of_another_attempt_or_currency_is_for_a_person() -> None:
    told = in_parts()
    assert closed(told, 5_000, gateway_payment_id="another attempt's").disagrees
    assert closed(told, 10_000, currency="EUR").disagrees
    assert told.amounts() == (10_000, 5_000, 0, 0)
