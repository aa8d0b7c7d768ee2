"""What a webhook does to a payment: it counts once, in any order, and never overrides better evidence."""

from dataclasses import replace
from datetime import timedelta
from itertools import permutations
from typing import Any

import pytest

from domain.commands import OperationKind
from domain.notices import Dispute, DisputeStage
from domain.operations import (
    Declined,
    DeclineReason,
    Expired,
    NotExecuted,
    Outcome,
    Pending,
    RequiresAction,
    Succeeded,
    Unknown,
    Unreachable,
)
from domain.rules import RetryPolicy
from tests.support.provider import CAPABILITIES
from tests.support.service import QUICK_RETRY, rules
from tests.support.story import Story

PAID = Succeeded("ref_1", 10_000)
NO = Declined(DeclineReason.REFUSED_BY_ISSUER, "do_not_honor", "ref_1")
GONE = Expired("ref_1", "canceled")
ACTION = RequiresAction("ref_1", "redirect", "https://bank.invalid/1")
REFUND_FAILED = Declined(DeclineReason.REFUND_FAILED, None, "ref_2")
WITHOUT_VOID = CAPABILITIES.operations - {OperationKind.VOID}


def story() -> Story:
    return Story(rules(replace(QUICK_RETRY, review_after=timedelta(minutes=10))))


def waiting(kind: str = "charge") -> Story:
    told = story()
    told.send(kind, "first")
    told.answer(ACTION)
    return told


@pytest.mark.parametrize("outcome", [PAID, NO, GONE], ids=lambda each: type(each).__name__)
def test_a_webhook_before_the_answer_decides_and_the_answer_is_stale(outcome: Outcome) -> None:
    told = story()
    told.send("charge")
    told.hear(outcome)
    kinds = list(told.kinds)
    assert told.answer().is_stale
    told.hear(outcome)
    assert told.kinds == kinds
    assert len(kinds) == 1


@pytest.mark.parametrize("outcome", [ACTION, Pending("ref_1")], ids=lambda each: type(each).__name__)
def test_a_notice_that_is_not_final_changes_nothing_while_the_answer_is_awaited(outcome: Outcome) -> None:
    told = story()
    told.send("charge")
    told.hear(outcome)
    assert told.kinds == []
    told.answer()
    told.hear(outcome)
    assert told.kinds == ["captured"]


def test_a_webhook_for_another_amount_or_currency_is_for_a_person_to_look_at() -> None:
    for outcome, currency in ((Succeeded("ref_1", 9_999), None), (PAID, "EUR")):
        told = waiting()
        told.hear(outcome, currency=currency)
        assert told.state(1) == "needs_review"
        assert told.kinds[-1] == "needs_review"
        assert told.amounts() == (0, 0, 0, 0)
        told.hear(PAID, currency="USD")
        assert told.kinds[-1] == "captured"


def test_once_it_is_paid_another_amount_is_reported_and_changes_nothing() -> None:
    told = story()
    told.does("charge")
    assert told.hear(Succeeded("ref_1", 1)).disagrees
    assert told.hear(PAID, currency="EUR").disagrees
    assert not told.hear(PAID, currency="USD").disagrees
    assert not told.hear(NO).disagrees
    assert told.kinds == ["captured"]


@pytest.mark.parametrize("kind", ["authorize", "charge"])
def test_a_second_payment_with_the_same_marks_is_for_a_person(kind: str) -> None:
    told = story()
    told.send(kind)
    told.answer(PAID)
    assert not told.hear(PAID).disagrees
    assert told.hear(replace(PAID, reference="ref_other")).disagrees, "the provider has taken it twice"
    assert len(told.kinds) == 1


@pytest.mark.parametrize("ended", [NO, GONE, NotExecuted("refused")], ids=lambda each: type(each).__name__)
def test_money_that_was_called_off_and_came_counts_and_is_told(ended: Outcome) -> None:
    told = story()
    told.send("charge")
    told.answer(ended)
    told.hear(PAID)
    told.hear(PAID)
    assert told.kinds[1:] == ["late_success"]
    assert (told.last.told_before, told.last.owed_minor) == (told.events[0].kind.value, 0) or isinstance(
        ended, NotExecuted
    )
    assert told.amounts() == (10_000, 10_000, 0, 0)
    told.does("refund")
    assert told.kinds[-1] == "refunded"


def paid_late_beside(kind: str) -> Story:
    told = story()
    told.send("charge", "first")
    told.answer(NO)
    told.does(kind, "second")
    told.hear(PAID, 1)
    return told


def test_money_that_came_twice_is_owed_back() -> None:
    told = paid_late_beside("charge")
    assert told.last.kind == "late_success"
    assert (told.last.owed_minor, told.last.snapshot.owed_minor) == (10_000, 10_000)
    assert told.amounts() == (20_000, 20_000, 0, 0)
    told.does("refund")
    assert told.last.snapshot.owed_minor == 10_000, "a command returns what the other attempt has taken"
    told.send("refund", "again")
    assert told.last.rejection is not None
    assert "10000 were taken by another attempt" in told.last.rejection.message


def test_an_abandoned_action_expires_and_another_attempt_may_follow() -> None:
    told = waiting()
    told.claim()
    told.answer(Expired("ref_1", "15"))
    assert told.last.kind == "expired"
    assert told.last.is_final
    assert told.last.snapshot.status == "expired"
    told.does("charge", "again")
    assert told.last.kind == "captured"


@pytest.mark.parametrize("times", [1, 2])
def test_the_news_that_an_abandoned_action_was_canceled_may_come_before_the_answer_to_that(times: int) -> None:
    told = waiting()
    told.claim()
    for _ in range(times):
        told.hear(GONE, 1)
    assert told.answer(GONE).is_stale
    told.does("charge", "again")
    told.hear(GONE, 1)
    assert told.kinds == ["requires_action", "expired", "captured"]


def test_a_void_that_waited_while_an_abandoned_action_was_canceled_has_nothing_to_release() -> None:
    told = waiting()
    told.claim()
    told.send("void")
    told.answer(GONE)
    told.hear(GONE, 1)
    assert told.kinds == ["requires_action", "expired", "command_rejected"]
    assert told.last.snapshot.status == "expired"


def test_a_void_ends_what_was_canceled_as_abandoned_while_nobody_had_heard_of_that() -> None:
    told = waiting()
    told.claim()
    told.answer(Unknown("the answer was lost"))
    told.send("void")
    told.hear(GONE, 1)
    told.answer(Succeeded("ref_1"))
    assert told.kinds == ["requires_action", "declined", "voided"]
    assert told.last.snapshot.status == "canceled"


@pytest.mark.parametrize("is_told_first", [True, False])
def test_a_hold_that_the_payer_consented_to_while_it_was_canceled_is_released_in_any_order(
    *, is_told_first: bool
) -> None:
    told = waiting("authorize")
    told.claim()
    if is_told_first:
        told.hear(PAID, 1)
    told.answer(GONE)
    if not is_told_first:
        told.hear(PAID, 1)
    told.hear(GONE, 1)
    middle = ["authorized"] if is_told_first else ["expired", "late_success"]
    assert told.kinds == ["requires_action", *middle, "authorization_expired"]
    assert told.amounts() == (10_000, 0, 10_000, 0)


def test_an_operation_waiting_for_its_payer_is_queried_every_five_minutes() -> None:
    told = Story(rules(RetryPolicy(delay_max=timedelta(hours=1))))
    told.send("charge")
    told.answer(ACTION)
    for _ in range(20):
        told.claim()
        told.answer(ACTION)
    due_at = told.operations[1].due_at
    assert due_at is not None
    assert due_at - told.now == told.rules.retry.poll_interval == timedelta(minutes=5)


def test_consent_of_the_payer_sends_the_operation_on_at_once_and_only_once() -> None:
    told = waiting()
    before = len(told.requests)
    told.hear(is_ripe=True)
    told.hear(is_ripe=True)
    assert len(told.requests) == before + 1
    assert told.requests[-1].state == "requires_action"
    told.answer()
    assert told.kinds == ["requires_action", "captured"]


# --- a void while the operation waits for the payer -------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["charge", "authorize"])
def test_a_void_cancels_what_waits_for_the_payer(kind: str) -> None:
    told = waiting(kind)
    told.send("void")
    assert told.requests[-1].kind == "void"
    assert told.requests[-1].gateway_payment_id == "ref_1"
    told.answer(Succeeded("ref_1"))
    assert told.kinds == ["requires_action", "declined", "voided"]
    assert told.last.snapshot.status == "canceled"
    assert told.amounts() == (0, 0, 0, 0)


def test_a_void_waits_for_a_question_that_is_under_way() -> None:
    told = waiting()
    told.claim()
    told.send("void")
    assert told.requests[-1].kind == "charge"
    told.answer(ACTION)
    assert told.requests[-1].kind == "void"


def test_while_it_is_being_cancelled_nobody_asks_and_so_executes_it() -> None:
    told = waiting()
    told.send("void")
    assert told.operations[1].due_at is None
    told.hear(is_ripe=True)
    assert told.requests[-1].kind == "void"
    told.answer(NotExecuted("it is being processed"))
    assert told.operations[1].due_at is not None
    assert told.kinds == ["requires_action", "command_rejected"]


def test_a_void_that_comes_too_late_is_refused_and_the_payment_counts() -> None:
    told = waiting()
    told.send("void")
    told.hear(PAID, 1)
    told.answer(NotExecuted("it is paid"))
    assert told.kinds == ["requires_action", "captured", "command_rejected"]


def test_the_news_that_it_is_canceled_may_come_before_the_voids_own_answer() -> None:
    told = waiting()
    told.send("void")
    told.hear(GONE, 1)
    told.answer(Succeeded("ref_1"))
    assert told.kinds == ["requires_action", "declined", "voided"]
    assert told.last.snapshot.status == "canceled"


def test_a_hold_that_came_about_while_it_was_being_cancelled_is_released_by_it() -> None:
    told = waiting("authorize")
    told.send("void")
    told.hear(PAID, 1)
    told.answer(Succeeded("ref_1"))
    assert told.kinds == ["requires_action", "authorized", "voided"]
    assert told.amounts() == (10_000, 0, 10_000, 0)


def test_a_capture_that_waits_behind_it_is_refused_once_it_is_cancelled() -> None:
    told = waiting("authorize")
    told.send("capture")
    told.send("void")
    told.answer(Succeeded("ref_1"))
    assert told.kinds == ["requires_action", "declined", "voided", "command_rejected"]


def test_a_void_of_an_uncancellable_authorization_waits_and_then_releases_the_hold() -> None:
    gateways = {"books": replace(CAPABILITIES, cancel_waiting=False)}
    told = Story(rules(gateways=gateways))
    told.send("authorize")
    told.answer(ACTION)
    told.send("void")
    assert told.state(2) == "received"
    told.hear(PAID)
    told.answer()
    assert told.kinds == ["requires_action", "authorized", "voided"]
    assert told.amounts() == (10_000, 0, 10_000, 0)


@pytest.mark.parametrize(
    ("gateway", "reason"), [({}, "invalid_state"), ({"operations": WITHOUT_VOID}, "unsupported_by_gateway")]
)
def test_an_uncancellable_charge_that_is_paid_stays_captured(gateway: Any, reason: str) -> None:
    told = Story(rules(gateways={"books": replace(CAPABILITIES, cancel_waiting=False, **gateway)}))
    told.send("charge")
    told.answer(ACTION)
    told.send("void")
    told.hear(PAID)
    assert told.kinds == ["requires_action", "captured", "command_rejected"]
    assert told.last.rejection is not None
    assert told.last.rejection.reason == reason
    assert told.amounts() == (10_000, 10_000, 0, 0)


# --- several attempts -------------------------------------------------------------------------------------------------

SECOND = RequiresAction("ref_2", "redirect", "https://bank.invalid/2")


def declined_then_waiting(second: str = "authorize") -> Story:
    """An attempt was declined; a second one waits for the payer."""
    told = story()
    told.send("authorize", "first")
    told.answer(NO)
    told.send(second, "second")
    told.answer(SECOND)
    return told


def tried_twice(kind: str = "charge", **first: Any) -> Story:
    """Declined at one gateway; a second attempt at another gateway waits for the payer; then the first one is paid."""
    gateways = {"books": replace(CAPABILITIES, **first), "other": CAPABILITIES}
    told = Story(rules(gateways=gateways))
    told.send(kind, "first")
    told.answer(NO)
    told.send(kind, "second", gateway="other")
    told.answer(SECOND)
    told.hear(PAID, 1)
    assert told.kinds == ["declined", "requires_action", "late_success"]
    return told


def test_captures_and_refunds_are_of_the_attempt_that_was_paid_first() -> None:
    told = tried_twice()
    told.claim()
    told.answer(SECOND)
    told.send("refund")
    told.hear(Expired("ref_2"), 2)
    assert (told.requests[-1].kind, told.requests[-1].gateway) == ("refund", "books")
    assert told.requests[-1].gateway_payment_id == "ref_1"


def test_money_that_comes_twice_is_owed_back_whichever_attempt_comes_last() -> None:
    told = tried_twice()
    told.hear(Succeeded("ref_2", 10_000), 2)
    assert (told.last.kind, told.last.owed_minor) == ("captured", 10_000)
    assert told.amounts() == (20_000, 20_000, 0, 0)
    assert (told.last.snapshot.gateway, told.last.snapshot.gateway_payment_id) == ("books", "ref_1")


@pytest.mark.parametrize("kind", ["charge", "authorize"])
def test_a_void_cancels_the_attempt_that_waits_and_leaves_the_paid_one_alone(kind: str) -> None:
    told = tried_twice(kind, operations=CAPABILITIES.operations - {OperationKind.VOID})
    before = told.amounts()
    told.send("void")
    assert (told.requests[-1].gateway, told.requests[-1].gateway_payment_id) == ("other", "ref_2")
    told.answer(Succeeded("ref_2"))
    assert told.kinds[-2:] == ["declined", "voided"]
    assert told.amounts() == before


@pytest.mark.parametrize("end", [replace(GONE, reference="ref_2"), replace(NO, reference="ref_2")], ids=["gone", "no"])
def test_a_void_ends_with_what_it_was_to_cancel_where_another_attempt_is_paid(end: Outcome) -> None:
    told = tried_twice("authorize")
    told.send("void")
    told.hear(end, 2)
    assert told.kinds[-2:] == ["declined", "voided"]
    assert told.answer(Succeeded("ref_2")).is_stale
    assert told.amounts() == (10_000, 0, 0, 0)
    told.does("void", "of the hold")
    assert (told.requests[-1].gateway, told.requests[-1].gateway_payment_id) == ("books", "ref_1")
    assert told.amounts() == (10_000, 0, 10_000, 0)


def test_commands_queued_behind_an_empty_void_continue_after_a_late_payment() -> None:
    told = declined_then_waiting("charge")
    told.send("void")
    told.send("refund", "late")
    told.hear(Expired("ref_2"), 2)
    told.hear(PAID, 1)
    assert told.kinds[-3:] == ["late_success", "voided", "command_rejected"]


def test_a_void_that_had_no_hold_to_release_releases_no_other_attempts() -> None:
    told = declined_then_waiting()
    told.send("void")
    told.hear(NO, 2)
    told.hear(PAID, 1)
    assert told.kinds[-2:] == ["late_success", "voided"]
    assert told.answer(Succeeded("ref_2")).is_stale
    assert told.amounts() == (10_000, 0, 0, 0)


@pytest.mark.parametrize("lost", [Unreachable("429"), Unknown("lost")], ids=["not sent", "in doubt"])
def test_a_void_is_of_the_attempt_that_it_was_sent_to_cancel_at_every_attempt(lost: Outcome) -> None:
    told = tried_twice("authorize")
    told.send("void")
    told.answer(lost)
    again = told.claim()
    assert (again.gateway, again.gateway_payment_id, again.reference) == ("other", "ref_2", None)
    told.answer(Succeeded("ref_2"))
    assert told.kinds[-2:] == ["declined", "voided"]
    assert told.amounts() == (10_000, 0, 0, 0)


def test_a_void_that_a_person_is_to_look_at_is_sent_again_and_not_only_asked_about() -> None:
    """In review, a request with its own reference is only queried; the id of what a void cancels is not one."""
    told = tried_twice("authorize")
    told.send("void")
    told.answer(Succeeded("ref_2", 1))
    again = told.claim()
    assert (again.state, again.gateway_payment_id, again.reference) == ("needs_review", "ref_2", None)


def test_a_void_in_doubt_of_a_charge_that_is_paid_meanwhile_is_not_sent_to_another_attempts_hold() -> None:
    told = declined_then_waiting("charge")
    told.hear(PAID, 1)
    told.send("void")
    told.answer(Unknown("lost"))
    told.hear(Succeeded("ref_2", 10_000), 2)
    assert told.claim().gateway_payment_id == "ref_2"


def test_a_void_releases_what_it_cancels_though_that_was_declined_and_then_paid() -> None:
    told = story()
    told.send("authorize")
    told.answer(ACTION)
    told.send("void")
    told.answer(Unreachable("429"))
    told.hear(NO, 1)
    told.hear(PAID, 1)
    assert told.claim().gateway_payment_id == "ref_1"
    told.answer(Succeeded("ref_1"))
    assert (told.last.kind, told.last.snapshot.status) == ("voided", "canceled")
    assert told.amounts() == (10_000, 0, 10_000, 0)


def test_an_operation_whose_void_was_declined_is_claimed_again() -> None:
    told = story()
    told.send("authorize")
    told.answer(ACTION)
    told.send("void")
    told.answer(replace(NO, reference=None))
    assert told.kinds == ["requires_action", "declined"]
    assert told.claim().operation_number == 1


def test_a_hold_that_comes_late_beside_a_voided_attempt_is_held_until_its_provider_says_otherwise() -> None:
    told = declined_then_waiting()
    told.does("void")
    told.hear(PAID, 1)
    assert (told.last.kind, told.last.snapshot.status) == ("late_success", "authorized")
    assert told.payment is not None
    assert told.payment.authorization_expires_at == told.now, "it is to be asked about at once"
    told.learn(Declined(DeclineReason.CANCELED, None, "ref_1"), 1)
    assert (told.last.kind, told.last.snapshot.status) == ("authorization_expired", "canceled")
    assert told.amounts() == (10_000, 0, 10_000, 0)


def test_a_refund_beside_what_another_attempt_took_is_told_of_that() -> None:
    told = paid_late_beside("authorize")
    told.send("refund")
    assert (told.last.snapshot.captured_minor, told.last.snapshot.owed_minor) == (10_000, 10_000)
    assert told.last.rejection is not None
    assert "void what is held; 10000 were taken by another attempt" in told.last.rejection.message


def test_a_void_of_what_was_paid_meanwhile_releases_that_and_not_what_was_paid_first() -> None:
    told = tried_twice("authorize")
    told.send("void")
    told.hear(Succeeded("ref_2", 10_000), 2)
    assert (told.last.kind, told.last.owed_minor) == ("authorized", 10_000)
    again = told.claim()
    assert (again.gateway, again.gateway_payment_id) == ("other", "ref_2")
    told.answer(Succeeded("ref_2"))
    assert told.amounts() == (20_000, 0, 10_000, 0)
    told.does("capture")
    assert (told.requests[-1].gateway_payment_id, told.requests[-1].amount.minor) == ("ref_1", 10_000)
    assert told.amounts() == (20_000, 10_000, 10_000, 0)


def paid_twice(first: str, second: str) -> Story:
    """A declined attempt, then a successful one; then the declined one is paid as well."""
    told = story()
    told.send(first, "first")
    told.answer(NO)
    told.does(second, "second")
    told.hear(PAID, 1)
    assert (told.last.kind, told.last.owed_minor) == ("late_success", 10_000)
    return told


def test_a_void_releases_what_its_attempt_holds_and_no_other_attempts_hold() -> None:
    told = paid_twice("authorize", "authorize")
    told.does("void")
    assert (told.requests[-1].gateway_payment_id, told.requests[-1].amount.minor) == ("ref_2", 10_000)
    assert told.amounts() == (20_000, 0, 10_000, 0)
    told.send("void", "again")
    assert told.kinds[-2:] == ["voided", "command_rejected"]
    told.hear(GONE, 1)
    assert (told.last.kind, told.last.snapshot.status) == ("authorization_expired", "canceled")
    assert told.amounts() == (20_000, 0, 20_000, 0)


@pytest.mark.parametrize("first", ["authorize", "charge"])
def test_a_capture_is_of_what_its_attempt_holds_and_knows_what_was_captured_of_that(first: str) -> None:
    told = paid_twice(first, "authorize")
    told.does("capture")
    request = told.requests[-1]
    assert (request.amount.minor, request.captured_minor, request.is_final) == (10_000, 0, True)
    told.send("capture", "again")
    assert told.last.kind == "command_rejected"


def test_a_refund_is_of_what_its_attempt_took() -> None:
    told = paid_twice("charge", "charge")
    told.does("refund")
    assert (told.requests[-1].gateway_payment_id, told.requests[-1].amount.minor) == ("ref_2", 10_000)
    assert told.requests[-1].captured_minor == 10_000
    told.send("refund", "again", amount_minor=1)
    assert told.last.kind == "command_rejected"
    told = paid_twice("charge", "authorize")
    told.send("refund")
    assert told.last.kind == "command_rejected"


def held_and_let_go_in_the_wrong_order() -> Story:
    """We hear that a hold is over before we hear that it existed; a second attempt waits for the payer."""
    told = waiting("authorize")
    told.hear(GONE, 1)
    told.send("authorize", "second")
    told.answer(SECOND)
    return told


def test_the_end_of_one_attempts_hold_is_not_that_of_anothers() -> None:
    told = held_and_let_go_in_the_wrong_order()
    told.hear(Succeeded("ref_2", 10_000), 2)
    told.hear(PAID, 1)
    assert told.kinds[-2:] == ["late_success", "authorization_expired"]
    assert told.amounts() == (20_000, 0, 10_000, 0)
    assert told.events[-2].owed_minor == 0
    told.does("capture")
    assert (told.requests[-1].gateway_payment_id, told.requests[-1].amount.minor) == ("ref_2", 10_000)


@pytest.mark.parametrize("end", [Expired("ref_1"), Declined(DeclineReason.CANCELED, None, "ref_1")], ids=str)
def test_the_end_of_a_hold_that_is_told_twice_is_not_that_of_another_late_hold(end: Outcome) -> None:
    told = story()
    for key in ("first", "second"):
        told.send("authorize", key)
        told.answer(NO)
    told.does("authorize", "third")
    told.hear(PAID, 1)
    told.hear(Succeeded("ref_2", 10_000), 2)
    for _ in range(2):
        told.learn(end, 1)
    assert (told.last.kind, told.amounts()) == ("authorization_expired", (30_000, 0, 10_000, 0))
    assert told.payment is not None
    assert told.payment.owed_held_minor == 10_000, "that of the second is held still"


@pytest.mark.parametrize("end", [Expired("ref_3"), Declined(DeclineReason.CANCELED, None, "ref_3")], ids=str)
def test_the_end_of_a_hold_that_we_voided_is_not_that_of_another_late_hold(end: Outcome) -> None:
    told = story()
    for key in ("first", "second"):
        told.send("authorize", key)
        told.answer(NO)
    told.does("authorize", "third")
    told.send("void")
    told.answer(Succeeded("void_at_the_provider"))
    told.hear(PAID, 1)
    told.hear(Succeeded("ref_2", 10_000), 2)
    told.learn(end, 3)
    assert (told.last.kind, told.amounts()) == ("late_success", (30_000, 0, 10_000, 0))
    told.learn(Expired("ref_2"), 2)
    assert (told.last.kind, told.amounts()) == ("authorization_expired", (30_000, 0, 20_000, 0))


def test_a_hold_that_is_gone_already_does_not_stand_in_the_way_of_the_next_one() -> None:
    told = held_and_let_go_in_the_wrong_order()
    told.hear(PAID, 1)
    told.hear(Succeeded("ref_2", 10_000), 2)
    assert (told.last.kind, told.last.owed_minor) == ("authorized", 0)
    assert told.last.snapshot.gateway_payment_id == "ref_2"


@pytest.mark.parametrize("kind", ["charge", "authorize"])
@pytest.mark.parametrize("days", [2, 9, None])
def test_the_earliest_end_of_the_open_holds_is_when_they_are_asked_about(kind: str, days: int | None) -> None:
    told = story()
    told.send("authorize", "first")
    told.answer(NO)
    told.send(kind, "second")
    own = told.now + timedelta(days=5)
    told.answer(Succeeded("ref_2", 10_000, own if kind == "authorize" else None))
    assert told.last.expires_at == (own if kind == "authorize" else None)
    end = None if days is None else told.now + timedelta(days=days)
    told.hear(Succeeded("ref_1", 10_000, end))
    assert told.last.expires_at == end
    assert told.payment is not None
    unknown = told.now + told.rules.retry.hold_end_unknown_after
    assert told.payment.authorization_expires_at == min(end or unknown, own if kind == "authorize" else end or unknown)


def test_a_late_success_for_which_there_is_no_room_is_reported() -> None:
    told = story()
    told.does("authorize")
    told.send("capture")
    told.answer(NotExecuted("refused"))
    told.does("void")
    assert told.hear(Succeeded("ref_2", 10_000), 2).disagrees
    assert told.amounts() == (10_000, 0, 10_000, 0)


# --- holds and refunds that end by themselves -------------------------------------------------------------------------


def test_a_hold_that_the_provider_let_go_cannot_be_captured_any_more() -> None:
    told = story()
    told.does("authorize")
    told.does("capture", amount_minor=4_000)
    told.hear(GONE, 1)
    told.hear(GONE, 1)
    assert told.kinds == ["authorized", "captured", "authorization_expired"]
    assert told.amounts() == (10_000, 4_000, 6_000, 0)


@pytest.mark.parametrize("is_hold_gone", [True, False])
def test_a_capture_that_failed_since_the_hold_is_gone_leads_to_a_question_about_it(*, is_hold_gone: bool) -> None:
    told = story()
    told.does("authorize")
    told.send("capture")
    told.answer(NotExecuted("it was released", "1003", is_hold_gone))
    assert told.payment is not None
    end_unknown = told.now + told.rules.retry.hold_end_unknown_after
    assert told.payment.authorization_expires_at == (told.now if is_hold_gone else end_unknown)
    assert (told.kinds, told.amounts()) == (["authorized", "command_rejected"], (10_000, 0, 0, 0))
    told.learn(Expired("ref_1", "1003"))
    assert told.kinds[-1] == "authorization_expired"


def test_an_old_refusal_does_not_end_a_hold_and_the_answer_to_a_question_does() -> None:
    told = story()
    told.does("authorize")
    told.hear(Declined(DeclineReason.CANCELED, "1006", "ref_1"), 1)
    assert told.kinds == ["authorized"]
    told.learn(Declined(DeclineReason.CANCELED, "automatic", "ref_1"))
    assert told.kinds == ["authorized", "authorization_expired"]


def test_our_own_capture_under_way_is_not_taken_for_the_end_of_the_hold() -> None:
    told = story()
    told.does("authorize")
    told.send("capture", amount_minor=4_000)
    told.hear(GONE, 1)
    told.answer()
    assert told.amounts() == (10_000, 4_000, 0, 0)


def test_a_refund_that_came_back_is_owed_again_and_books_are_even() -> None:
    told = story()
    told.does("charge")
    told.does("refund", amount_minor=4_000)
    told.hear(REFUND_FAILED, 2)
    told.hear(REFUND_FAILED, 2)
    told.hear(Succeeded("ref_2", 4_000), 2)
    assert told.kinds == ["captured", "refunded", "refund_failed"]
    assert told.amounts() == (10_000, 10_000, 0, 0)
    told.does("refund", "again", amount_minor=10_000)
    assert told.last.kind == "refunded"


def test_a_refund_that_was_executed_twice_is_for_a_person_to_look_at() -> None:
    told = story()
    told.does("charge")
    told.does("refund", amount_minor=4_000)
    assert not told.hear(Succeeded("ref_2", 4_000), 2).disagrees
    assert not told.hear(Succeeded("", 4_000), 2).disagrees
    assert told.hear(Succeeded("ref_other", 4_000), 2).disagrees
    assert told.amounts() == (10_000, 10_000, 0, 4_000)


# --- disputes ---------------------------------------------------------------------------------------------------------


def dispute(stage: DisputeStage, amount: int = 10_000) -> dict[str, Any]:
    return {"dispute": Dispute("dp_1", stage, amount, "USD", "fraudulent"), "operation_number": None}


def test_disputed_money_cannot_be_refunded_until_it_is_won_back() -> None:
    told = story()
    told.does("charge")
    told.hear(**dispute(DisputeStage.OPENED, 6_000))
    told.send("refund", "too much", amount_minor=5_000)
    assert told.last.kind == "command_rejected"
    told.hear(**dispute(DisputeStage.WON, 6_000))
    told.does("refund", "now", amount_minor=5_000)
    assert told.kinds == ["captured", "dispute_opened", "command_rejected", "dispute_closed", "refunded"]


def test_nothing_is_refunded_where_a_dispute_took_more_than_was_left() -> None:
    told = story()
    told.does("charge")
    told.does("refund", "part", amount_minor=4_000)
    told.hear(**dispute(DisputeStage.OPENED, 10_000))
    decision = told.send("refund", "all that remains")
    assert (told.last.kind, decision.requests) == ("command_rejected", [])


def test_a_dispute_in_a_foreign_currency_is_reported() -> None:
    told = story()
    told.does("charge")
    strange = dispute(DisputeStage.OPENED)["dispute"]._replace(currency="EUR")
    assert told.hear(dispute=strange).disagrees
    assert told.kinds == ["captured"]


@pytest.mark.parametrize("end", [DisputeStage.WON, DisputeStage.LOST])
def test_a_dispute_ends_the_same_in_whatever_order_it_is_told(end: DisputeStage) -> None:
    ends = set()
    for order in permutations([DisputeStage.OPENED, end, DisputeStage.OPENED, end]):
        told = story()
        told.does("charge")
        for stage in order:
            told.hear(**dispute(stage))
        assert told.payment is not None
        ends.add((told.payment.disputed_minor, told.payment.disputes, told.kinds[-1]))
    assert len(ends) == 1


@pytest.mark.parametrize("lost_minor", [4_000, 6_000, 10_000])
def test_a_dispute_takes_what_it_ended_with_and_not_what_it_began_with(lost_minor: int) -> None:
    told = story()
    told.does("charge")
    told.hear(**dispute(DisputeStage.OPENED, 6_000))
    told.hear(**dispute(DisputeStage.LOST, lost_minor))
    told.hear(**dispute(DisputeStage.OPENED, 6_000))
    assert told.payment is not None
    assert told.payment.disputed_minor == lost_minor
    assert told.last.amount_minor == lost_minor
    balance = sum(
        each.amount_minor if each.debit == "customer_disputes" else -each.amount_minor
        for each in told.transfers
        if "customer_disputes" in (each.debit, each.credit)
    )
    assert balance == lost_minor


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (dispute(DisputeStage.WON), dispute(DisputeStage.LOST)),
        (dispute(DisputeStage.LOST), dispute(DisputeStage.WON)),
        (dispute(DisputeStage.LOST), dispute(DisputeStage.LOST, 4_000)),
    ],
)
def test_a_dispute_that_ends_a_second_time_and_otherwise_is_for_a_person(
    first: dict[str, Any], second: dict[str, Any]
) -> None:
    told = story()
    told.does("charge")
    told.hear(**dispute(DisputeStage.OPENED))
    assert not told.hear(**first).disagrees
    assert not told.hear(**first).disagrees
    assert told.payment is not None
    before = told.payment.disputed_minor
    assert told.hear(**second).disagrees
    assert told.payment.disputed_minor == before
    assert told.kinds == ["captured", "dispute_opened", "dispute_closed"]


# --- any order --------------------------------------------------------------------------------------------------------

SCENARIOS = {
    "paid": ("charge", [ACTION, Pending("ref_1"), PAID]),
    "declined": ("charge", [ACTION, NO]),
    "declined, then paid with another card": ("charge", [NO, ACTION, PAID]),
    "held": ("authorize", [ACTION, PAID]),
    "held, then let go": ("authorize", [ACTION, PAID, GONE]),
}


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_any_order_any_number_of_times_before_or_after_the_answer_ends_the_same(scenario: str) -> None:
    kind, news = SCENARIOS[scenario]
    ends = set()
    for order in permutations([*news, news[-1], "answer"]):
        told = story()
        told.send(kind)
        for each in order:
            if each == "answer":
                told.answer(ACTION)
            else:
                told.hear(each)  # type: ignore[arg-type]  # "answer" is handled above
        ends.add((told.amounts(), told.payment.status if told.payment else None, told.state(1)))
    assert len(ends) == 1, ends


@pytest.mark.parametrize(("opening", "kind", "place"), [("charge", "refund", 3), ("authorize", "capture", 1)])
def test_a_late_success_of_all_that_there_is_counts(opening: str, kind: str, place: int) -> None:
    told = story()
    told.does(opening)
    told.send(kind)
    told.answer(NotExecuted("no"))
    assert not told.hear(Succeeded("ref_2", 10_000), 2).is_postponed
    assert told.amounts()[place] == 10_000


@pytest.mark.parametrize(("kind", "place"), [("capture", 1), ("void", 2)])
def test_a_late_success_waits_for_what_has_set_the_hold_aside(kind: str, place: int) -> None:
    told = story()
    told.does("authorize")
    told.send(kind, "a")
    told.answer(NotExecuted("no"))
    told.send("capture", "b")
    assert told.hear(Succeeded("ref_2", 10_000), 2).is_postponed
    assert told.amounts()[place] == 0


def test_a_refund_that_came_back_is_booked_on_the_accounts_that_it_was_booked_on() -> None:
    told = story()
    told.does("charge")
    told.does("refund")
    told.hear(REFUND_FAILED, 2)
    last = told.transfers[-1]
    assert (last.debit, last.credit, last.amount_minor) == ("gateway_clearing", "customer_refunds", 10_000)


def test_an_operation_resumed_after_the_payers_consent_gets_a_new_lease() -> None:
    told = story()
    told.send("charge")
    told.answer(ACTION)
    told.wait(minutes=1)
    told.hear(is_ripe=True)
    operation = told.operations[1]
    assert operation.is_leased
    assert operation.due_at == told.now + told.rules.retry.lease
    assert operation.attempts == told.requests[-1].attempts == 2
