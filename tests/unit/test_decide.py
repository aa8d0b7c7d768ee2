"""What `decide` does to one payment, input by input. It is pure, so every test passes values and compares values."""

from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from domain.accept import QUEUE_MAX, REPLAYS_DUE_MAX
from domain.capabilities import AmountLimits, Capabilities
from domain.commands import NO_METADATA, OperationKind, RejectionReason, UnacceptableCommand
from domain.decide import decide
from domain.decision import Answer, Delivery
from domain.events import Event, EventKind
from domain.operations import (
    Declined,
    DeclineReason,
    Expired,
    NotExecuted,
    OperationState,
    Outcome,
    Pending,
    RequiresAction,
    Succeeded,
    Unknown,
    Unreachable,
)
from domain.requests import OPENING
from domain.settle import ENDINGS
from tests.support.provider import CAPABILITIES
from tests.support.service import QUICK_RETRY, delivery, new_payment_id, rules
from tests.support.story import START, Story

NO = Declined(DeclineReason.INSUFFICIENT_FUNDS, "insufficient_funds")
RETRY = replace(QUICK_RETRY, review_after=timedelta(minutes=10), give_up_after=timedelta(minutes=5))


def told(*steps: Callable[[Story], object]) -> Story:
    story = Story(rules(RETRY))
    for step in steps:
        step(story)
    return story


def nothing(story: Story) -> None:
    """No payment at all."""


def processing(story: Story) -> None:
    story.send("charge", "first")


def declined(story: Story) -> None:
    story.send("charge", "first")
    story.answer(NO)


def authorized(story: Story) -> None:
    story.does("authorize", "first")


def partly_captured(story: Story) -> None:
    authorized(story)
    story.does("capture", "part", amount_minor=4_000)


def captured(story: Story) -> None:
    story.does("charge", "first")


def partly_refunded(story: Story) -> None:
    captured(story)
    story.does("refund", "part", amount_minor=4_000)


def refunded(story: Story) -> None:
    captured(story)
    story.does("refund", "all")


def voided(story: Story) -> None:
    authorized(story)
    story.does("void", "released")


def reviewed(story: Story) -> None:
    story.send("charge", "first")
    story.answer(Unknown())
    story.wait(hours=1)
    story.claim()
    story.answer(Unknown())


EXISTS, NOT_FOUND, STATE = "payment_already_exists", "payment_not_found", "invalid_state"
TOO_MUCH = "amount_exceeds_refundable"
OK, WAITS = "ok", "waits"
TABLE: dict[Callable[[Story], None], tuple[str, ...]] = {
    # state:        authorize charge   capture    void       refund
    nothing:        (OK,      OK,      NOT_FOUND, NOT_FOUND, NOT_FOUND),
    processing:     (WAITS,   WAITS,   WAITS,     WAITS,     WAITS),
    reviewed:       (WAITS,   WAITS,   WAITS,     WAITS,     WAITS),
    declined:       (OK,      OK,      STATE,     STATE,     STATE),
    authorized:     (EXISTS,  EXISTS,  OK,        OK,        STATE),
    partly_captured: (EXISTS, EXISTS,  OK,        OK,        OK),
    captured:       (EXISTS,  EXISTS,  STATE,     STATE,     OK),
    partly_refunded: (EXISTS, EXISTS,  STATE,     STATE,     OK),
    refunded:       (EXISTS,  EXISTS,  STATE,     STATE,     TOO_MUCH),
    voided:         (EXISTS,  EXISTS,  STATE,     STATE,     STATE),
}  # fmt: skip
CELLS = [
    pytest.param(state, kind, expected, id=f"{kind}-{state.__name__}")
    for state, row in TABLE.items()
    for kind, expected in zip(("authorize", "charge", "capture", "void", "refund"), row, strict=True)
]


@pytest.mark.parametrize(("state", "kind", "expected"), CELLS)
def test_each_kind_of_command_is_accepted_or_refused_by_the_state_of_its_payment(
    state: Callable[[Story], None], kind: str, expected: str
) -> None:
    story = told(state)
    decision = story.send(kind, "tested")
    if expected == OK:
        assert [request.kind for request in decision.requests] == [kind]
        assert decision.events == []
    elif expected == WAITS:
        assert (decision.requests, decision.events) == ([], [])
        assert [operation.state for operation in decision.operations] == ["received"]
    else:
        assert story.last.kind == "command_rejected"
        assert story.last.rejection is not None
        assert story.last.rejection.reason == expected
        assert decision.requests == []
        assert story.state(story.last.operation_number or 0) == "rejected"


def _rejection(story: Story) -> tuple[str, tuple[str, ...]]:
    assert story.last.rejection is not None, story.last
    return story.last.rejection.reason.value, story.last.rejection.fields


ACROSS: dict[str, tuple[Callable[[Story], None], str, dict[str, object], str, str]] = {
    "currency of a capture": (authorized, "capture", {"currency": "EUR"}, "currency_mismatch", "currency"),
    "currency of a retry": (declined, "charge", {"currency": "EUR"}, "currency_mismatch", "currency"),
    "capture above the hold": (
        authorized, "capture", {"amount_minor": 10_001}, "amount_exceeds_capturable", "amount_minor",
    ),
    "capture above the rest": (
        partly_captured, "capture", {"amount_minor": 6_001}, "amount_exceeds_capturable", "amount_minor",
    ),
    "refund above the rest": (
        partly_refunded, "refund", {"amount_minor": 6_001}, "amount_exceeds_refundable", "amount_minor",
    ),
    "expired": (nothing, "charge", {"expires_at": "2030-01-01T00:00:00Z"}, "command_expired", "expires_at"),
    "unknown gateway": (nothing, "charge", {"gateway": "nobody"}, "unknown_gateway", "gateway"),
}  # fmt: skip


@pytest.mark.parametrize("name", ACROSS)
def test_a_command_that_does_not_fit_its_payment_is_refused_and_names_the_field(name: str) -> None:
    state, kind, fields, reason, field = ACROSS[name]
    story = told(state)
    decision = story.send(kind, "tested", **fields)
    assert _rejection(story) == (reason, (field,))
    assert (decision.requests, decision.transfers) == ([], [])


@pytest.mark.parametrize("amount", [None, 1])
def test_a_refusal_with_nothing_left_says_so_without_an_amount(amount: int | None) -> None:
    for state, kind, reason in ((refunded, "refund", TOO_MUCH), (captured, "capture", STATE)):
        story = told(state)
        story.send(kind, "tested", **({} if amount is None else {"amount_minor": amount}))
        assert story.last.rejection is not None
        assert story.last.rejection.message.endswith(f"nothing is left to {kind}")
        assert story.last.rejection.reason == reason


OWN: dict[str, tuple[Callable[[Story], None], str, dict[str, Any], str | None]] = {
    "another one's": (captured, "refund", {"amount_minor": 5_000, "currency": "JPY"}, "JPY"),
    "the payment's": (captured, "refund", {"amount_minor": 10_001, "currency": "USD"}, "USD"),
    "none": (captured, "refund", {"amount_minor": 10_001}, "USD"),
    "none, of no payment": (nothing, "refund", {"amount_minor": 10_001}, None),
    "that of a new payment": (nothing, "charge", {"currency": "JPY", "gateway": "nobody"}, "JPY"),
    "that of a payment that exists": (captured, "charge", {"currency": "JPY"}, "JPY"),
    "another one's under the same key": (captured, "charge", {"currency": "JPY", "key": "first"}, "JPY"),
    "unreadable": (captured, "charge", {"currency": "JPY!", "amount_minor": 1}, "USD"),
    "another one's, beside what is unreadable": (captured, "charge", {"currency": "JPY", "metadata": 1}, "JPY"),
}


@pytest.mark.parametrize("named", OWN)
def test_a_refused_command_is_told_with_the_currency_that_it_named_and_otherwise_the_payments(named: str) -> None:
    state, kind, fields, currency = OWN[named]
    story = told(state)
    story.send(kind, **{"key": "tested"} | fields)
    assert (story.last.kind, story.last.currency) == ("command_rejected", currency)
    assert story.last.snapshot.currency == (None if state is nothing else "USD")


@pytest.mark.parametrize(
    ("amount", "reason"),
    [(99, "amount_below_minimum"), (100, None), (500, None), (501, "amount_above_maximum")],
)
@pytest.mark.parametrize("kind", ["authorize", "charge"])
def test_limits_are_inclusive_and_hold_for_what_opens_a_payment(kind: str, amount: int, reason: str | None) -> None:
    limits = {("books", "USD"): AmountLimits(minimum_minor=100, maximum_minor=500)}
    story = Story(rules(limits=limits))
    decision = story.send(kind, amount_minor=amount)
    if reason is None:
        assert len(decision.requests) == 1
    else:
        assert _rejection(story) == (reason, ("amount_minor",))


def test_a_currency_that_is_not_accepted_here_is_refused() -> None:
    story = Story(rules(currencies=frozenset({"EUR"})))
    story.send("charge")
    assert _rejection(story) == ("unknown_currency", ("currency",))


UNSUPPORTED: dict[str, tuple[Capabilities, str, dict[str, Any], str]] = {
    "kind": (replace(CAPABILITIES, operations=frozenset({OperationKind.AUTHORIZE})), "charge", {}, "type"),
    "currency": (replace(CAPABILITIES, currencies=frozenset({"EUR"})), "charge", {}, "currency"),
    "a payer who is away": (
        replace(CAPABILITIES, off_session=False), "charge", {"off_session": True}, "off_session",
    ),
    "partial capture": (
        replace(CAPABILITIES, partial_capture=False), "capture", {"amount_minor": 1}, "amount_minor",
    ),
    "partial refund": (
        replace(CAPABILITIES, partial_refund=False), "refund", {"amount_minor": 1}, "amount_minor",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_an_operation_that_the_gateway_does_not_declare_is_refused_up_front(name: str) -> None:
    capabilities, kind, fields, field = UNSUPPORTED[name]
    story = Story(rules(gateways={"books": capabilities}))
    if kind != "charge":
        story.does("charge" if kind == "refund" else "authorize", "first")
    decision = story.send(kind, "tested", **fields)
    assert _rejection(story) == ("unsupported_by_gateway", (field,))
    assert decision.requests == []


# --- amounts ----------------------------------------------------------------------------------------------------------


def test_partial_captures_add_up_and_the_last_one_takes_what_is_left() -> None:
    story = told(authorized)
    story.send("capture", "part", amount_minor=4_000)
    assert story.requests[-1].is_final is False
    story.answer()
    assert story.last.snapshot.status == "partially_captured"
    story.send("capture", "rest")
    assert (story.requests[-1].amount.minor, story.requests[-1].is_final) == (6_000, True)
    story.answer()
    assert story.amounts() == (10_000, 10_000, 0, 0)
    assert story.last.snapshot.status == "captured"


def test_a_capture_in_part_releases_the_rest_where_a_gateway_captures_once() -> None:
    story = Story(rules(gateways={"books": replace(CAPABILITIES, multi_capture=False)}))
    story.does("authorize")
    story.does("capture", amount_minor=4_000)
    assert story.amounts() == (10_000, 4_000, 6_000, 0)
    assert story.last.snapshot.status == "captured"
    story.send("capture", "again")
    assert _rejection(story)[0] == STATE


def test_a_capture_at_a_gateway_that_was_removed_meanwhile_counts_and_releases_nothing() -> None:
    story = Story(rules(gateways={"books": replace(CAPABILITIES, multi_capture=False)}))
    story.does("authorize")
    story.send("capture", amount_minor=4_000)
    story.rules = rules(gateways={"other": CAPABILITIES}, default_gateway="other")
    story.answer()
    assert story.amounts() == (10_000, 4_000, 0, 0)
    story.send("capture", "again")
    assert _rejection(story) == ("unknown_gateway", ("gateway",))


def test_a_void_after_a_partial_capture_releases_the_rest_and_keeps_the_captured_refundable() -> None:
    story = told(partly_captured)
    story.send("void")
    assert story.requests[-1].amount.minor == 6_000
    story.answer()
    assert story.amounts() == (10_000, 4_000, 6_000, 0)
    story.does("refund")
    assert story.amounts() == (10_000, 4_000, 6_000, 4_000)
    assert story.last.snapshot.status == "refunded"


def test_an_amount_under_way_is_reserved_until_its_outcome_and_free_again_after_a_decline() -> None:
    story = told(captured)
    story.send("refund", "a", amount_minor=6_000)
    story.send("refund", "b", amount_minor=6_000)
    assert story.payment is not None
    assert story.payment.refundable_minor == 4_000
    story.answer(NO)
    assert story.requests[-1].operation_number == 3
    story.answer()
    assert story.amounts() == (10_000, 10_000, 0, 6_000)


def test_only_what_moves_money_is_booked_and_each_booking_names_its_event() -> None:
    story = told(partly_captured)
    story.does("void")
    story.does("refund", amount_minor=1_000)
    assert [(each.payment_seq, each.debit.value, each.credit.value, each.amount_minor) for each in story.transfers] == [
        (2, "gateway_clearing", "customer_sales", 4_000),
        (4, "customer_refunds", "gateway_clearing", 1_000),
    ]


# --- order ------------------------------------------------------------------------------------------------------------


def test_commands_that_arrive_back_to_back_run_one_at_a_time_in_the_order_accepted() -> None:
    story = told()
    story.send("authorize")
    story.send("capture", amount_minor=7_000)
    story.send("refund", amount_minor=2_000)
    assert [request.kind.value for request in story.requests] == ["authorize"]
    for _ in range(3):
        story.answer()
    assert [request.kind.value for request in story.requests] == ["authorize", "capture", "refund"]
    assert story.kinds == ["authorized", "captured", "refunded"]
    assert story.amounts() == (10_000, 7_000, 0, 2_000)


def test_a_queued_command_that_became_invalid_is_rejected_and_the_next_begins_in_the_same_decision() -> None:
    story = told()
    story.send("charge", "a")
    story.send("capture", "b")
    story.send("refund", "c")
    decision = story.answer()
    assert story.kinds == ["captured", "command_rejected"]
    assert [request.operation_number for request in decision.requests] == [3]


def test_a_waiting_command_that_expires_before_its_turn_is_refused() -> None:
    story = told(authorized)
    story.send("capture", "a", amount_minor=1_000)
    story.send("capture", "b", expires_at="2030-01-01T00:01:00Z")
    story.wait(minutes=1)
    story.answer()
    assert _rejection(story) == ("command_expired", ("expires_at",))


def test_a_payment_can_be_tried_again_after_a_decline_with_another_provider_key() -> None:
    story = told(declined)
    assert (story.last.kind, story.last.snapshot.status) == ("declined", "failed")
    story.does("charge", "second", payment_method="pm_card_mastercard")
    assert story.kinds == ["declined", "captured"]
    first, second = story.requests
    assert first.provider_key != second.provider_key
    assert story.amounts() == (10_000, 10_000, 0, 0)


def test_doubt_holds_the_payment_so_that_no_second_charge_can_begin() -> None:
    story = told(reviewed)
    decision = story.send("charge", "second")
    assert decision.requests == []
    story.claim()
    story.answer()
    assert story.kinds == ["pending", "needs_review", "captured", "command_rejected"]
    assert _rejection(story)[0] == EXISTS


# --- answers ----------------------------------------------------------------------------------------------------------


def test_a_lost_answer_is_told_once_however_often_it_is_lost() -> None:
    story = told(processing)
    for _ in range(5):
        story.answer(Unknown())
        story.claim()
    assert story.kinds == ["pending"]
    assert story.last.pending_cause == "outcome_unknown"
    assert story.last.snapshot.has_indeterminate
    assert len({request.provider_key for request in story.requests}) == 1
    assert [request.attempts for request in story.requests] == [1, 2, 3, 4, 5, 6]
    story.answer()
    assert story.kinds == ["pending", "captured"]
    assert not story.last.snapshot.has_indeterminate


@pytest.mark.parametrize("is_late", [False, True])
def test_doubt_is_reviewed_only_past_its_deadline(is_late: bool) -> None:
    story = told(processing)
    story.answer(Unknown())
    story.claim()
    story.now = START + RETRY.review_after + timedelta(microseconds=int(is_late))
    story.answer(Unknown())
    assert story.kinds == ["pending", "needs_review"] if is_late else ["pending"]
    assert story.state(1) == ("needs_review" if is_late else "indeterminate")


@pytest.mark.parametrize(
    ("outcome", "kind", "state"),
    [
        (Succeeded("ref", 10_000), "captured", "succeeded"),
        (NO, "declined", "declined"),
        (NotExecuted("no trace, and the key is void"), "command_rejected", "not_executed"),
        (RequiresAction("ref", "redirect", "https://example.invalid"), "requires_action", "requires_action"),
        (Pending("ref"), "pending", "pending"),
    ],
    ids=lambda each: type(each).__name__ if not isinstance(each, str) else "",
)
@pytest.mark.parametrize("given", [processing, reviewed], ids=["at once", "after review"])
def test_evidence_is_accepted_at_any_time(
    given: Callable[[Story], None], outcome: Outcome, kind: str, state: str
) -> None:
    story = told(given)
    if given is reviewed:
        story.wait(days=3)
        story.claim()
    story.answer(outcome)
    assert (story.last.kind, story.state(1)) == (kind, state)


@pytest.mark.parametrize("outcome", [Unknown(), Unreachable("refused")], ids=["unknown", "unreachable"])
def test_time_alone_ends_nothing_that_may_have_been_executed(outcome: Outcome) -> None:
    story = told(processing)
    story.answer(Unknown())
    for _ in range(50):
        story.claim()
        story.wait(days=1)
        story.answer(outcome)
    assert story.state(1) == "needs_review"
    assert story.kinds == ["pending", "needs_review"]


@pytest.mark.parametrize("outcome", [Unknown(), Pending("ref"), Unreachable()], ids=lambda each: type(each).__name__)
def test_a_stuck_operation_is_due_again_within_the_cut_off_whatever_its_state(outcome: Outcome) -> None:
    patient, day = replace(RETRY, review_poll_interval=timedelta(days=1), cut_off=timedelta(hours=1)), timedelta(days=1)
    story = Story(rules(replace(patient, delay_max=day, poll_interval=day, give_up_after=30 * day)))
    story.send("charge")
    for _ in range(40):
        story.answer(outcome)
        operation = story.operations[1]
        assert operation.due_at is not None
        assert timedelta(0) < operation.due_at - story.now <= timedelta(hours=1)
        story.wait(hours=5)
        story.claim()


def test_not_executed_follows_when_every_attempt_is_proven_not_to_have_reached_the_provider() -> None:
    story = told(processing)
    story.answer(Unreachable("connection refused"))
    story.claim()
    story.now = START + RETRY.give_up_after
    story.answer(Unreachable("connection refused"))
    assert (story.state(1), story.kinds) == ("dispatched", [])
    story.claim()
    story.now = START + RETRY.give_up_after + timedelta(microseconds=1)
    story.answer(Unreachable("connection refused"))
    assert story.state(1) == "not_executed"
    assert _rejection(story)[0] == "gateway_unavailable"
    assert story.last.snapshot.status == "failed"


def test_an_attempt_whose_worker_died_is_not_proven_so_unreachable_afterwards_ends_nothing() -> None:
    story = told(processing)
    request = story.claim()  # the lease expired without an answer
    assert request.state == "indeterminate"
    story.wait(days=1)
    story.answer(Unreachable("connection refused"))
    assert story.state(1) == "needs_review"


def test_a_retry_after_an_unreachable_provider_stays_provable() -> None:
    story = told(processing)
    story.answer(Unreachable())
    assert story.claim().state == "dispatched"


@pytest.mark.parametrize("kind", ["charge", "authorize", "capture", "void", "refund"])
def test_a_provider_that_moved_another_amount_than_asked_is_reviewed_and_nothing_is_booked(kind: str) -> None:
    story = told(authorized if kind in ("capture", "void") else captured if kind == "refund" else nothing)
    before = story.amounts() if story.payment else (0, 0, 0, 0)
    story.send(kind, "tested")
    decision = story.answer(Succeeded("ref", 9_999))
    assert (story.last.kind, decision.transfers) == ("needs_review", [])
    assert story.amounts() == before
    assert story.last.snapshot.has_indeterminate


@pytest.mark.parametrize(
    ("outcome", "events"),
    [(Pending("ref"), ["pending"]), (RequiresAction("ref", "redirect"), ["requires_action"])],
    ids=["pending", "requires_action"],
)
def test_an_open_outcome_is_published_once_and_survives_lost_answers(outcome: Outcome, events: list[str]) -> None:
    story = told(processing)
    for lost in (outcome, outcome, Unknown(), Unreachable(), outcome):
        story.answer(lost)
        story.claim()
    assert story.kinds == events
    assert story.requests[-1].reference == "ref"
    story.answer()
    assert story.kinds == [*events, "captured"]


@pytest.mark.parametrize("outcome", [Pending("ref"), RequiresAction("ref", "redirect")], ids=["pending", "waiting"])
def test_an_open_operation_that_the_provider_no_longer_knows_is_reviewed_past_its_deadline(outcome: Outcome) -> None:
    story = told(processing)
    story.answer(outcome)
    story.claim()
    story.now = START + RETRY.review_pending_after
    story.answer(Unknown())
    assert len(story.kinds) == 1
    story.claim()
    story.answer(Unknown())
    assert story.kinds[1:] == ["needs_review"]
    assert story.claim().reference == "ref"


def test_an_answer_with_an_old_token_changes_nothing_and_the_new_holder_s_counts() -> None:
    story = told(processing)
    old = story.requests[-1].lease_token
    story.claim()
    before = story.payment
    decision = story.answer(NO, token=old)
    assert decision.is_stale
    assert (decision.events, decision.operations, decision.requests, decision.transfers) == ([], (), [], [])
    assert story.payment is before
    story.answer()
    assert story.kinds == ["captured"]


@pytest.mark.parametrize(
    "outcome",
    [
        NO,
        NotExecuted("refused"),
        Expired("ref_1"),
        Pending("ref_1"),
        RequiresAction("ref_1", "redirect"),
        Unreachable(),
        Unknown(),
    ],
    ids=lambda outcome: type(outcome).__name__,
)
def test_a_late_answer_other_than_success_changes_nothing(outcome: Outcome) -> None:
    """Another worker has taken the operation over and may have had it executed since."""
    story = told(processing)
    old = story.requests[-1].lease_token
    story.claim()
    assert story.answer(outcome, token=old).is_stale
    story.answer()
    assert story.kinds == ["captured"]


@pytest.mark.parametrize("meanwhile", [None, Unknown(), Pending("ref_2")], ids=str)
def test_that_money_moved_is_true_whoever_holds_the_operation_and_is_told_once(
    meanwhile: Unknown | Pending | None,
) -> None:
    story = told(captured)
    story.send("refund")
    story.send("refund", "second")
    late = Answer(story.payment_id, 2, story.requests[-1].lease_token, Succeeded("refund_2", 10_000))
    story.claim()
    if meanwhile is not None:
        story.answer(meanwhile)
    story.give(late)
    assert story.kinds[-2:] == ["refunded", "command_rejected"], "what waited for it goes on"
    assert story.operations[2].reference == "refund_2"
    kinds = list(story.kinds)
    assert story.answer().is_stale, "the new holder's answer"
    assert story.give(late).is_stale
    assert story.kinds == kinds
    assert story.amounts() == (10_000, 10_000, 0, 10_000)


def test_of_another_amount_a_late_one_is_believed_no_more_than_others() -> None:
    story = told(processing)
    old = story.requests[-1].lease_token
    story.claim()
    story.answer(Succeeded("ref_1", 1), token=old)
    assert story.kinds == ["needs_review"]
    story.answer()
    assert story.kinds == ["needs_review", "captured"]


def test_the_late_success_of_a_void_is_of_what_there_was_to_cancel_then_and_changes_nothing() -> None:
    story = told(authorized)
    story.send("void")
    old = story.requests[-1].lease_token
    story.claim()
    assert story.answer(token=old).is_stale
    story.answer()
    assert story.kinds == ["authorized", "voided"]


def test_an_answer_to_an_operation_that_has_ended_is_stale() -> None:
    story = told(captured)
    assert story.answer(NO).is_stale
    assert story.amounts() == (10_000, 10_000, 0, 0)


# --- idempotency ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", [captured, declined], ids=["succeeded", "declined"])
def test_a_repeated_command_gets_its_stored_result_again_and_nothing_else_happens(
    state: Callable[[Story], None],
) -> None:
    story = told(state)
    seq = story.payment.last_seq if story.payment else 0
    decision = story.send("charge", "first")
    assert [type(event).__name__ for event in decision.events] == ["Replay"]
    assert story.replays[-1].result == story.last.kind.value
    assert (decision.operations, decision.requests, decision.payment.last_seq) == ((), [], seq)


def test_a_rejection_is_remembered_and_replayed_although_it_would_be_accepted_by_now() -> None:
    story = told()
    story.send("refund", "early")
    story.does("charge")
    decision = story.send("refund", "early")
    assert decision.requests == []
    assert story.replays[-1].result == "command_rejected"


def test_deliveries_while_a_command_is_open_are_each_owed_the_result() -> None:
    story = told(authorized)
    story.send("capture", "a", amount_minor=1_000)
    story.send("capture", "b")
    for key, fields in (("a", {"amount_minor": 1_000}), ("b", {}), ("b", {})):
        decision = story.send("capture", key, **fields)
        assert (decision.events, decision.requests) == ([], [])
    story.answer()
    assert story.last.replays_due == 1
    story.answer()
    assert story.last.replays_due == 2
    assert len(story.replays) == 3


def test_a_command_that_is_repeated_without_end_is_owed_no_more_than_can_be_saved() -> None:
    story = told(processing)
    for _ in range(REPLAYS_DUE_MAX + 5):
        story.send("charge", "first")
    story.answer()
    assert story.last.replays_due == REPLAYS_DUE_MAX


def test_all_commands_of_a_payment_together_are_owed_no_more_replays_than_can_be_saved() -> None:
    story = told(processing)
    story.send("capture", "second")
    for _ in range(REPLAYS_DUE_MAX - 5):
        story.send("charge", "first")
    for _ in range(10):
        story.send("capture", "second")
    assert story.payment is not None
    assert sum(each.replays_due for each in story.payment.operations) == REPLAYS_DUE_MAX


def test_commands_beyond_a_full_queue_are_rejected_and_a_void_still_cancels_what_waits_for_the_payer() -> None:
    story = Story()
    story.send("charge", "first")
    story.answer(RequiresAction("pi_1", "redirect", "https://example.org"))
    for number in range(QUEUE_MAX):
        assert not story.send("capture", f"waits-{number}").events
    story.send("capture", "one-too-many")
    assert story.last.rejection is not None
    assert story.last.rejection.reason is RejectionReason.INVALID_STATE
    assert not story.send("capture", "waits-0").events, "a repeated command is owed its result as before"
    assert story.send("void", "cancel").requests


@pytest.mark.parametrize("state", [processing, captured], ids=["open", "ended"])
def test_the_same_key_with_other_content_is_a_conflict_that_is_not_remembered(state: Callable[[Story], None]) -> None:
    story = told(state)
    for _ in range(2):
        decision = story.send("charge", "first", amount_minor=9_000)
        assert _rejection(story) == ("idempotency_conflict", ("idempotency_key",))
        assert story.last.operation_number is None
        assert story.last.rejection is not None
        assert f"the charge of payment {story.payment_id}" in story.last.rejection.message
        assert (decision.operations, decision.requests) == ((), [])
    assert len(story.operations) == 1


def test_a_command_with_an_unacceptable_field_is_rejected_and_remembered_under_its_key() -> None:
    story = told(processing)
    bad = delivery("charge", story.payment_id, "bad", amount_minor=-1)
    assert isinstance(bad.command, UnacceptableCommand)
    decision = story.deliver(bad)
    assert story.last.kind == "command_rejected"
    assert [operation.state for operation in decision.operations] == ["rejected"]
    story.deliver(bad)
    assert len(story.replays) == 1


def test_a_command_without_a_usable_key_is_rejected_and_leaves_no_operation() -> None:
    story = told()
    bad = delivery("charge", story.payment_id, "")
    assert isinstance(bad.command, UnacceptableCommand)
    decision = story.deliver(Delivery(bad.command))
    assert (decision.operations, story.kinds) == ((), ["command_rejected"])


# --- events -----------------------------------------------------------------------------------------------------------


def test_payment_seq_counts_every_event_from_one_without_a_gap() -> None:
    story = told()
    story.send("refund", "too early")
    story.send("charge", "a")
    story.send("charge", "a", amount_minor=1)
    story.answer(Unknown())
    story.claim()
    story.answer(NO)
    story.does("charge", "b")
    story.send("charge", "b")
    story.does("refund", "c", amount_minor=1)
    assert [event.payment_seq for event in story.events] == list(range(1, len(story.events) + 1))
    assert story.kinds == [
        "command_rejected", "command_rejected", "pending", "declined", "captured", "refunded",
    ]  # fmt: skip


def test_a_snapshot_shows_the_payment_right_after_its_event() -> None:
    story = told(authorized)
    story.send("capture", "a", amount_minor=4_000)
    story.send("capture", "b", amount_minor=4_000)
    story.send("capture", "c", amount_minor=4_000)
    story.answer()
    assert (story.last.snapshot.captured_minor, story.last.snapshot.status) == (4_000, "partially_captured")
    story.answer()
    captured_event, rejected_event = story.events[-2:]
    assert captured_event.snapshot.captured_minor == rejected_event.snapshot.captured_minor == 8_000
    assert rejected_event.rejection is not None
    assert rejected_event.rejection.reason is RejectionReason.AMOUNT_EXCEEDS_CAPTURABLE


def test_a_request_carries_all_that_a_gateway_needs_and_is_the_same_at_each_attempt() -> None:
    story = told()
    story.send("charge", metadata={"channel": "web"})
    first = story.requests[-1]
    assert (first.provider_key, first.payment_method) == (f"{story.payment_id}:1", "pm_card_visa")
    assert first.metadata == {"channel": "web"} != NO_METADATA
    again = story.claim()
    assert again._replace(state=first.state, attempts=first.attempts, lease_token=first.lease_token) == first


def test_a_doubt_that_a_sweep_began_is_announced_when_the_next_answer_is_lost_too() -> None:
    """The sweep marks a dead worker's operation as indeterminate without an event; an event must follow in the end."""
    payment = decide(None, delivery("charge", new_payment_id(), "key"), now=START, rules=rules()).payment
    taken_over = payment.operations[0].copy()
    taken_over.state, taken_over.lease_token = OperationState.INDETERMINATE, 2
    payment.operations = (taken_over,)
    lost = Answer(payment.payment_id, 1, 2, Unknown("lost"))
    first = decide(payment, lost, now=START, rules=rules())
    assert [event.kind for event in first.events if isinstance(event, Event)] == [EventKind.PENDING]
    assert decide(first.payment, lost, now=START, rules=rules()).events == []


# --- how a command ends -----------------------------------------------------------------------------------------------


BEFORE: dict[OperationKind, Callable[[Story], None]] = {
    OperationKind.AUTHORIZE: nothing,
    OperationKind.CHARGE: nothing,
    OperationKind.CAPTURE: authorized,
    OperationKind.VOID: authorized,
    OperationKind.REFUND: captured,
}


@pytest.mark.parametrize("kind", OperationKind)
def test_a_command_may_end_in_just_the_events_that_its_kind_is_said_to_end_in(kind: OperationKind) -> None:
    ends = set()
    for outcome in (
        None,
        NO,
        Expired("ref"),
        NotExecuted("refused"),
        Pending("ref"),
        Unknown(),
        RequiresAction("r", ""),
    ):
        story = told(BEFORE[kind])
        story.send(kind, "tested")
        story.answer(outcome)
        ends |= {story.last.kind} if story.last.is_final else set()
    assert ends == set(ENDINGS[kind])


@pytest.mark.parametrize("kind", [kind for kind in OperationKind if kind not in OPENING])
def test_an_operation_without_a_payer_does_not_expire_and_is_reviewed_instead(
    kind: OperationKind,
) -> None:
    story = told(BEFORE[kind])
    story.send(kind, "tested")
    story.answer(Expired("ref"))
    assert (story.last.kind, story.last.snapshot.status) == ("needs_review", story.events[0].snapshot.status)
    story.claim()
    story.answer()
    assert story.last.kind == ENDINGS[kind][0]


@pytest.mark.parametrize("outcome", [Pending("ref_1"), RequiresAction("ref_1", "redirect")], ids=["pending", "waiting"])
def test_an_operation_that_stays_open_is_reviewed_past_its_deadline(outcome: Outcome) -> None:
    story = told(processing)
    story.answer(outcome)
    story.now = START + RETRY.review_pending_after
    story.claim()
    story.now = START + RETRY.review_pending_after
    story.answer(outcome)
    assert len(story.kinds) == 1
    story.claim()
    story.answer(outcome)
    assert story.kinds[1:] == ["needs_review"]


def test_an_operation_in_review_stays_there_after_a_lost_answer() -> None:
    story = Story(rules(replace(RETRY, review_after=timedelta(hours=1))))
    story.send("charge")
    story.answer(Succeeded("ref_1", 9_999))
    assert story.state(1) == "needs_review"
    story.claim()
    story.answer(Unknown())
    assert (story.state(1), story.kinds) == ("needs_review", ["needs_review"])


def test_an_operation_in_review_is_queried_at_its_own_interval() -> None:
    story = told(processing)
    story.answer(Succeeded("ref_1", 9_999))
    assert story.operations[1].due_at == story.now + RETRY.review_poll_interval


def test_the_limits_are_those_of_the_gateway_that_the_command_names() -> None:
    small = replace(CAPABILITIES, limits={"USD": AmountLimits(1, 100)})
    story = Story(rules(RETRY, gateways={"books": CAPABILITIES, "small": small}))
    story.send("charge", gateway="small", amount_minor=101)
    assert story.requests == []
    assert story.last.rejection is not None
    assert story.last.rejection.reason == "amount_above_maximum"


def test_a_voided_waiting_payment_is_declined_as_canceled() -> None:
    story = told(processing)
    story.answer(RequiresAction("ref_1", "redirect"))
    story.send("void")
    story.answer()
    assert [each.decline_reason for each in story.events if each.kind == "declined"] == [DeclineReason.CANCELED]


def test_an_event_tells_what_the_provider_said_and_of_which_command() -> None:
    story = told(processing)
    story.answer(Declined(DeclineReason.CARD_EXPIRED, "x", "r"))
    found = story.last
    assert (found.decline_reason, found.decline_code, found.reference) == (DeclineReason.CARD_EXPIRED, "x", "r")
    story = told()
    story.send("refund", "early", amount_minor=5)
    assert (story.last.idempotency_key, story.last.amount_minor, bool(story.last.fingerprint)) == ("early", 5, True)
