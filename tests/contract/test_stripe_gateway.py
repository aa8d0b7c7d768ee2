"""The Stripe gateway against the Stripe simulator, over HTTP: cards, 3-D Secure, several captures, abandoned payments.

What holds at every provider, under every fault, is in test_every_gateway.py.
"""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import pytest

from domain.commands import OperationKind
from domain.errors import GatewayError, GatewayUnreachable, OutcomeUnknown
from domain.money import Money
from domain.operations import (
    Declined,
    DeclineReason,
    Expired,
    GatewayRequest,
    NotExecuted,
    OperationState,
    Outcome,
    Pending,
    RequiresAction,
    Succeeded,
    Unknown,
    Unreachable,
)
from domain.ports import Gateway
from infra.gateways.stripe_objects import ACTION_WINDOW
from tests.contract.conftest import Simulator
from tests.contract.gateway_requests import a_request, follow_up, in_doubt, opened, run

EFFECTS = {OperationKind.AUTHORIZE: (1250, 0, 0), OperationKind.CHARGE: (0, 1250, 0)}
"""What is held, captured and refunded after one execution of the operation."""

BEFORE = {"cut_before": Unknown, "429": Unreachable, "503": Unknown, "409": Unknown}
AFTER = ["cut_after", "truncated", "garbage", "500_after"]


def effect(simulator: Simulator, request: GatewayRequest) -> tuple[int, int, int]:
    """What the simulator's own books show as held, captured and refunded for this payment, over all its operations."""
    intents = simulator.intents_of(request.payment_id)
    names = ("amount_capturable", "amount_received", "refunded")
    held, captured, refunded = (sum(intent[name] for intent in intents) for name in names)
    return held, captured, refunded


@pytest.mark.parametrize("kind", [OperationKind.AUTHORIZE, OperationKind.CHARGE])
async def test_status_finds_an_opening_by_our_marks_where_its_answer_was_lost(
    gateway: Gateway, simulator: Simulator, kind: OperationKind
) -> None:
    request = a_request(kind)
    simulator.fault("cut_after", operation="create", payment_id=str(request.payment_id), times=1)
    await run(gateway, request)

    assert isinstance(await gateway.status(in_doubt(request)), Succeeded)
    assert effect(simulator, request) == EFFECTS[kind]


@pytest.mark.parametrize(
    ("payment_method", "reason"),
    [
        ("pm_card_visa_chargeDeclined", DeclineReason.REFUSED_BY_ISSUER),
        ("pm_card_visa_chargeDeclinedInsufficientFunds", DeclineReason.INSUFFICIENT_FUNDS),
        ("pm_card_visa_chargeDeclinedStolenCard", DeclineReason.SUSPECTED_FRAUD),
        ("pm_card_chargeDeclinedExpiredCard", DeclineReason.CARD_EXPIRED),
        ("pm_card_chargeDeclinedIncorrectCvc", DeclineReason.INVALID_CARD_DATA),
        ("pm_card_chargeDeclinedProcessingError", DeclineReason.PROCESSING_ERROR),
        ("pm_card_visa_chargeDeclinedVelocityLimitExceeded", DeclineReason.LIMIT_EXCEEDED),
    ],
)
@pytest.mark.parametrize("kind", [OperationKind.AUTHORIZE, OperationKind.CHARGE])
async def test_a_refusal_is_a_value_and_repeating_it_charges_nothing(
    gateway: Gateway, simulator: Simulator, kind: OperationKind, payment_method: str, reason: DeclineReason
) -> None:
    request = a_request(kind, payment_method=payment_method)

    first, second = await run(gateway, request), await run(gateway, in_doubt(request))

    assert isinstance(first, Declined)
    assert first == second
    assert first.reason is reason
    assert first.reference is not None
    assert simulator.executed_charges(request.payment_id) == 0


@pytest.mark.parametrize("kind", [OperationKind.AUTHORIZE, OperationKind.CHARGE])
@pytest.mark.parametrize(("is_successful", "expected"), [("true", Succeeded), ("false", Declined)])
async def test_a_payer_who_must_authenticate_is_asked_and_status_tells_the_end(
    gateway: Gateway, simulator: Simulator, kind: OperationKind, is_successful: str, expected: type[Outcome]
) -> None:
    request = a_request(kind, payment_method="pm_card_threeDSecure2Required")

    asked = await run(gateway, request)
    assert isinstance(asked, RequiresAction)
    assert asked.url is not None
    assert asked.url.startswith(simulator.url)
    known = in_doubt(request, reference=asked.reference)
    assert await gateway.status(known) == asked
    simulator.post(f"payment_intents/{asked.reference}/authenticate?success={is_successful}")

    assert isinstance(await gateway.status(known), expected)
    assert simulator.executed_charges(request.payment_id) == (1 if is_successful == "true" else 0)


@pytest.mark.parametrize("kind", [OperationKind.AUTHORIZE, OperationKind.CHARGE])
@pytest.mark.parametrize("card", ["pm_card_visa", "pm_card_threeDSecure2Required"])
async def test_a_payer_who_is_away_is_not_asked(
    gateway: Gateway, simulator: Simulator, kind: OperationKind, card: str
) -> None:
    request = a_request(kind, payment_method=card, off_session=True)
    outcome = await run(gateway, request)
    if card == "pm_card_visa":
        assert isinstance(outcome, Succeeded)
    else:
        assert isinstance(outcome, Declined)
        assert outcome.reason is DeclineReason.AUTHENTICATION_REQUIRED
    assert simulator.executed_charges(request.payment_id) == (1 if card == "pm_card_visa" else 0)


@pytest.mark.parametrize(("status", "expected"), [("succeeded", Succeeded), ("failed", Declined), ("new", Pending)])
async def test_a_pending_refund_ends_as_the_provider_says(
    gateway: Gateway, simulator: Simulator, status: str, expected: type[Outcome]
) -> None:
    charged = await opened(gateway, OperationKind.CHARGE, payment_method="pm_card_pendingRefund")
    request = follow_up(*charged, OperationKind.REFUND)

    pending = await run(gateway, request)
    assert isinstance(pending, Pending)
    simulator.post(f"refunds/{pending.reference}/settle?status={status}")

    assert isinstance(await gateway.status(in_doubt(request, reference=pending.reference)), expected)


async def test_captures_of_one_hold_are_told_apart(gateway: Gateway, simulator: Simulator) -> None:
    hold = await opened(gateway)
    first = follow_up(*hold, OperationKind.CAPTURE, amount=Money(400, "USD"), is_final=False)
    last = follow_up(*hold, OperationKind.CAPTURE, number=3, amount=Money(850, "USD"))

    assert isinstance(await run(gateway, first), Succeeded)
    assert isinstance(await gateway.status(in_doubt(last)), Unknown)
    simulator.fault("cut_after", operation="capture", times=1)
    assert isinstance(await run(gateway, last), Unknown)

    assert isinstance(await gateway.status(in_doubt(last)), Succeeded)
    assert effect(simulator, last) == (0, 1250, 0)


async def test_a_card_without_several_captures_is_captured_as_a_whole_but_not_in_part(
    gateway: Gateway, simulator: Simulator
) -> None:
    hold = await opened(gateway, payment_method="pm_card_credit_disableEnterpriseCardFeatures")
    part = follow_up(*hold, OperationKind.CAPTURE, amount=Money(400, "USD"), is_final=False)
    whole = follow_up(*hold, OperationKind.CAPTURE, number=3)

    assert isinstance(await run(gateway, part), NotExecuted)
    assert effect(simulator, part) == (1250, 0, 0)
    assert isinstance(await run(gateway, whole), Succeeded)
    assert effect(simulator, whole) == (0, 1250, 0)


@pytest.mark.parametrize("fault", [None, *AFTER])
@pytest.mark.parametrize("captured", [0, 400])
async def test_what_is_left_of_a_hold_can_be_released(
    gateway: Gateway, simulator: Simulator, captured: int, fault: str | None
) -> None:
    hold = await opened(gateway)
    if captured:
        part = Money(captured, "USD")
        await run(gateway, follow_up(*hold, OperationKind.CAPTURE, amount=part, is_final=False))
    request = follow_up(*hold, OperationKind.VOID, number=3, amount=Money(1250 - captured, "USD"))
    if fault is not None:
        simulator.fault(fault, operation="capture" if captured else "cancel", times=1)

    outcomes = [await run(gateway, request), await run(gateway, in_doubt(request))]

    assert isinstance(outcomes[-1], Succeeded)
    assert isinstance(outcomes[0], Unknown if fault else Succeeded)
    assert effect(simulator, request) == (0, captured, 0)


async def test_a_hold_that_expired_cannot_be_captured_and_counts_as_released(
    gateway: Gateway, simulator: Simulator
) -> None:
    hold = await opened(gateway)
    simulator.post(f"payment_intents/{hold[1]}/expire")

    assert isinstance(await run(gateway, follow_up(*hold, OperationKind.CAPTURE)), NotExecuted)
    assert isinstance(await run(gateway, in_doubt(follow_up(*hold, OperationKind.CAPTURE, number=3))), NotExecuted)
    assert isinstance(await run(gateway, follow_up(*hold, OperationKind.VOID, number=4)), Succeeded)


async def test_a_refused_parameter_is_proof_on_the_first_attempt_only(gateway: Gateway) -> None:
    request = a_request(payment_method="pm_unknown")

    assert isinstance(await run(gateway, request), NotExecuted)
    assert isinstance(await run(gateway, in_doubt(request)), Unknown)


async def test_money_beyond_the_hold_or_the_captures_does_not_move(gateway: Gateway, simulator: Simulator) -> None:
    hold, charge = await opened(gateway), await opened(gateway, OperationKind.CHARGE)
    too_much = Money(1251, "USD")

    assert isinstance(await run(gateway, follow_up(*hold, OperationKind.CAPTURE, amount=too_much)), NotExecuted)
    assert isinstance(await run(gateway, follow_up(*charge, OperationKind.REFUND, amount=too_much)), NotExecuted)
    assert effect(simulator, hold[0]) == (1250, 0, 0)
    assert effect(simulator, charge[0]) == (0, 1250, 0)


async def test_several_refunds_add_up_and_a_lost_one_is_found(gateway: Gateway, simulator: Simulator) -> None:
    charge = await opened(gateway, OperationKind.CHARGE)
    requests = [
        follow_up(*charge, OperationKind.REFUND, number=number, amount=Money(amount, "USD"))
        for number, amount in ((2, 300), (3, 950))
    ]
    simulator.fault("cut_after", operation="refund", key_prefix=requests[1].provider_key, times=1)

    outcomes = [await run(gateway, request) for request in requests]

    assert isinstance(outcomes[0], Succeeded)
    assert isinstance(outcomes[1], Unknown)
    found = await gateway.status(in_doubt(requests[1]))
    assert isinstance(found, Succeeded)
    assert (found.amount_minor, found.reference != outcomes[0].reference) == (950, True)
    assert effect(simulator, charge[0]) == (0, 1250, 1250)


@pytest.mark.parametrize(
    ("payment_method", "first"),
    [
        ("pm_sandbox_slow", Succeeded),
        ("pm_sandbox_lost_answer", Unknown),
        ("pm_sandbox_lost_request", Unknown),
        ("pm_sandbox_500", Unknown),
        ("pm_sandbox_429", Unreachable),
    ],
)
async def test_payment_methods_that_misbehave_end_with_one_charge(
    gateway: Gateway, simulator: Simulator, payment_method: str, first: type[Outcome]
) -> None:
    request = a_request(payment_method=payment_method)

    assert isinstance(await run(gateway, request), first)
    assert isinstance(await run(gateway, in_doubt(request)), Succeeded)
    assert simulator.executed_charges(request.payment_id) == 1


async def test_a_release_that_sends_other_parameters_finds_the_effect_of_the_old_one(
    connect: Callable[..., Gateway], gateway: Gateway, simulator: Simulator
) -> None:
    request = a_request()
    simulator.fault("cut_after", payment_id=str(request.payment_id), times=1)
    await run(gateway, request)

    outcome = await run(connect(return_url="https://example.invalid/elsewhere"), in_doubt(request))

    assert isinstance(outcome, Succeeded)
    assert simulator.executed_charges(request.payment_id) == 1


@pytest.mark.parametrize("fault", ["429", "cut_before", "503", "truncated", "garbage"])
async def test_a_question_without_an_answer_is_never_an_outcome(
    gateway: Gateway, simulator: Simulator, fault: str
) -> None:
    request, reference = await opened(gateway, OperationKind.CHARGE)
    simulator.fault(fault, operation="read")

    with pytest.raises(GatewayError):
        await gateway.status(in_doubt(request, reference=reference))
    voided = await run(gateway, follow_up(request, reference, OperationKind.VOID))
    assert isinstance(voided, Unreachable)


# --- operations that a payer has abandoned ----------------------------------------------------------------------------

OPENING = [OperationKind.AUTHORIZE, OperationKind.CHARGE]


def later(passed: timedelta = ACTION_WINDOW + timedelta(seconds=1)) -> Callable[[], datetime]:
    """A clock that is this much ahead of the provider's."""
    return lambda: datetime.now(UTC) + passed


async def waiting(gateway: Gateway, kind: OperationKind = OperationKind.CHARGE) -> GatewayRequest:
    """The request that queries an operation which waits for its payer."""
    request = a_request(kind, payment_method="pm_card_threeDSecure2Required")
    outcome = await run(gateway, request)
    assert isinstance(outcome, RequiresAction)
    return in_doubt(request, reference=outcome.reference)._replace(state=OperationState.REQUIRES_ACTION)


async def resumed(gateway: Gateway, request: GatewayRequest) -> Outcome:
    """Resume the operation as the dispatcher does, with errors as outcomes."""
    try:
        return await gateway.resume(request)
    except GatewayUnreachable as error:
        return Unreachable(error.message)
    except OutcomeUnknown as error:
        return Unknown(error.message)


def statuses(simulator: Simulator, request: GatewayRequest) -> list[str]:
    return [each["status"] for each in simulator.intents_of(request.payment_id)]


@pytest.mark.parametrize("kind", OPENING)
async def test_an_abandoned_intent_is_canceled_after_the_window_and_expired_at_every_query(
    connect: Callable[..., Gateway], gateway: Gateway, simulator: Simulator, kind: OperationKind
) -> None:
    request = await waiting(gateway, kind)
    late, gone = connect(clock=later()), Expired(request.reference, "abandoned")

    assert [await resumed(late, request) for _ in range(2)] == [gone, gone]

    assert await gateway.status(request) == gone
    assert statuses(simulator, request) == ["canceled"]
    assert simulator.http.post(f"/_sandbox/payment_intents/{request.reference}/authenticate?success=true").is_error
    assert effect(simulator, request) == (0, 0, 0)


@pytest.mark.parametrize("window", [ACTION_WINDOW, timedelta(hours=1)], ids=str)
async def test_nothing_is_canceled_before_the_end_that_was_told(
    connect: Callable[..., Gateway], gateway: Gateway, simulator: Simulator, window: timedelta
) -> None:
    request, soon = await waiting(gateway), timedelta(minutes=1)

    early = await resumed(connect(clock=later(window - soon), action_window=window), request)

    assert isinstance(early, RequiresAction)
    assert early.expires_at is not None
    assert abs(early.expires_at - datetime.now(UTC) - window) < soon
    assert statuses(simulator, request) == ["requires_action"]
    assert isinstance(await resumed(connect(clock=later(window + soon), action_window=window), request), Expired)


async def test_a_question_cancels_nothing_however_late_it_is(
    connect: Callable[..., Gateway], gateway: Gateway, simulator: Simulator
) -> None:
    request = await waiting(gateway)

    assert isinstance(await connect(clock=later()).status(request), RequiresAction)
    assert statuses(simulator, request) == ["requires_action"]


@pytest.mark.parametrize("is_successful", [True, False])
@pytest.mark.parametrize("kind", OPENING)
async def test_a_payer_who_came_in_time_is_heard_however_late_it_is_asked(
    connect: Callable[..., Gateway], gateway: Gateway, simulator: Simulator, kind: OperationKind, *, is_successful: bool
) -> None:
    request = await waiting(gateway, kind)
    simulator.post(f"payment_intents/{request.reference}/authenticate?success={str(is_successful).lower()}")

    assert isinstance(await resumed(connect(clock=later()), request), Succeeded if is_successful else Declined)
    assert effect(simulator, request) == (EFFECTS[kind] if is_successful else (0, 0, 0))


async def test_a_payer_who_pays_while_it_is_being_canceled_has_paid(
    connect: Callable[..., Gateway], gateway: Gateway, simulator: Simulator
) -> None:
    request = await waiting(gateway)
    # The first read is outdated: it shows that the payer is still awaited, though the payer has paid.
    simulator.fault("lag", operation="read", payment_id=str(request.payment_id), times=1, seconds=60)
    simulator.post(f"payment_intents/{request.reference}/authenticate?success=true")

    assert await resumed(connect(clock=later()), request) == Succeeded(request.reference or "", 1250)
    assert effect(simulator, request) == EFFECTS[OperationKind.CHARGE]


async def test_a_refusal_to_cancel_alone_ends_nothing(
    connect: Callable[..., Gateway], gateway: Gateway, simulator: Simulator
) -> None:
    request, late = await waiting(gateway), connect(clock=later())
    simulator.fault("lag", operation="read", payment_id=str(request.payment_id), seconds=60)
    simulator.post(f"payment_intents/{request.reference}/authenticate?success=true")

    # Stripe remembers the refusal under the key, and what it shows is still the state from before.
    assert all([isinstance(await resumed(late, request), RequiresAction) for _ in range(2)])
    simulator.http.delete("/_sandbox/faults").raise_for_status()
    assert isinstance(await resumed(late, request), Succeeded)
    assert effect(simulator, request) == EFFECTS[OperationKind.CHARGE]


async def test_a_hold_that_the_payer_consents_to_while_it_is_being_canceled_is_released(
    connect: Callable[..., Gateway], gateway: Gateway, simulator: Simulator
) -> None:
    request = await waiting(gateway, OperationKind.AUTHORIZE)
    simulator.fault("lag", operation="read", payment_id=str(request.payment_id), times=1, seconds=60)
    simulator.post(f"payment_intents/{request.reference}/authenticate?success=true")

    assert isinstance(await resumed(connect(clock=later()), request), Expired)
    assert effect(simulator, request) == (0, 0, 0)


@pytest.mark.parametrize("fault", [*BEFORE, *AFTER, "500_before"])
async def test_a_cancellation_whose_answer_is_lost_ends_nothing_until_stripe_says_more(
    connect: Callable[..., Gateway], gateway: Gateway, simulator: Simulator, fault: str
) -> None:
    request, late = await waiting(gateway), connect(clock=later())
    simulator.fault(fault, operation="cancel", payment_id=str(request.payment_id), times=1)

    lost = await resumed(late, request)
    again = await resumed(late, request)

    assert isinstance(lost, BEFORE.get(fault, Unknown))
    if fault == "500_before":  # remembered under the key: sent again once Stripe has forgotten it
        assert isinstance(again, Unknown)
        again = await resumed(late, request._replace(provider_key=f"{request.provider_key}:forgotten"))
    assert again == Expired(request.reference, "abandoned")
    assert statuses(simulator, request) == ["canceled"]


async def test_a_void_and_the_end_of_the_window_do_not_get_into_each_others_way(
    connect: Callable[..., Gateway], gateway: Gateway, simulator: Simulator
) -> None:
    late = connect(clock=later())
    voided_first, abandoned_first = await waiting(gateway), await waiting(gateway)

    void = follow_up(voided_first, str(voided_first.reference), OperationKind.VOID, state=OperationState.DISPATCHED)
    assert isinstance(await run(late, void), Succeeded)
    assert await resumed(late, voided_first) == Expired(voided_first.reference, "requested_by_customer")

    assert await resumed(late, abandoned_first) == Expired(abandoned_first.reference, "abandoned")
    void = follow_up(abandoned_first, str(abandoned_first.reference), OperationKind.VOID)
    assert isinstance(await run(late, void._replace(state=OperationState.DISPATCHED)), Succeeded)
    for request in (voided_first, abandoned_first):
        assert statuses(simulator, request) == ["canceled"]


async def test_a_cancellation_is_sent_under_one_key_of_its_own(
    connect: Callable[..., Gateway], gateway: Gateway, simulator: Simulator
) -> None:
    request, late = await waiting(gateway), connect(clock=later())
    key = f"{request.provider_key}:abandoned"
    simulator.fault("cut_before", operation="cancel", key_prefix=key, times=2)

    assert all([isinstance(await resumed(late, request), Unknown) for _ in range(2)])
    assert isinstance(await resumed(late, request), Expired)
