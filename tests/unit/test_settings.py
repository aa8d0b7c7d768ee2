"""What the environment says is checked at the start, not by the server that it would disturb."""

from datetime import timedelta

import pytest
from pydantic import ValidationError

from app.settings import Settings


@pytest.mark.parametrize("name", ["Payments-Relay", "", "a" * 64, "relay\n", "rélay"])
def test_what_cannot_name_a_slot_is_refused(name: str) -> None:
    with pytest.raises(ValidationError, match="is no name for a slot: lower-case letters"):
        Settings(relay_slot=name)


def test_what_is_stuck_is_looked_at_every_five_minutes_and_an_hour_behind_at_most() -> None:
    settings = Settings()
    assert settings.reconcile_interval_seconds == 300
    assert settings.retry.cut_off.total_seconds() == 3600
    assert Settings(reconcile_cut_off_seconds=600).retry.cut_off.total_seconds() == 600


def test_rounds_that_are_further_apart_than_the_cut_off_are_refused() -> None:
    with pytest.raises(ValidationError, match="reconcile_interval_seconds is more than reconcile_cut_off_seconds"):
        Settings(reconcile_interval_seconds=601, reconcile_cut_off_seconds=600)


def test_a_gateways_own_pace_goes_before_the_one_for_all() -> None:
    settings = Settings(gateway_questions_per_second={"paypal": 5})
    assert settings.questions_per_second_of("paypal") == 5
    assert settings.questions_per_second_of("stripe") == settings.gateway_questions_per_second_default


def test_what_can_name_a_slot_is_taken() -> None:
    assert Settings(relay_slot="payments_relay_2").relay_slot == "payments_relay_2"


def test_a_payer_at_stripe_has_a_day_unless_told_otherwise_and_less_than_the_deadline_for_review() -> None:
    assert Settings().stripe_action_window == timedelta(days=1)
    for seconds in (1_799, 7 * 86_400):
        with pytest.raises(ValidationError, match="stripe_action_window_seconds"):
            Settings(stripe_action_window_seconds=seconds)
    with pytest.raises(ValidationError, match="is not less than review_pending_after_seconds"):
        Settings(stripe_action_window_seconds=7_200, review_pending_after_seconds=7_200)
    others = Settings(gateways=["momo"], default_gateway="momo", review_pending_after_seconds=7_200)
    assert others.review_pending_after_seconds == 7_200
