"""What the environment says is checked at the start, not by the server that it would disturb."""

from datetime import timedelta

import pytest
from pydantic import ValidationError

from app.processes import relay_config
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


@pytest.mark.parametrize("url", ["", "payments", "postgres://u:s3cret@h/payments", "postgresql:/u:s3cret@h/payments"])
def test_what_is_no_databases_url_is_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(ValidationError, match=r"write it like postgresql://") as refusal:
        Settings(postgres_url=url)
    assert "s3cret" not in str(refusal.value.errors(include_input=False))


@pytest.mark.parametrize("brokers", ["", "host:", "host:port", "host:70000", "http://host:9092", "a:9092,,b:9092"])
def test_what_cannot_name_brokers_is_refused(brokers: str) -> None:
    with pytest.raises(ValidationError, match="is no broker; write them like host:9092"):
        Settings(kafka_bootstrap=brokers)


@pytest.mark.parametrize("brokers", ["host", "127.0.0.1:9092", "a:9092, b:9092", "[::1]:9092"])
def test_what_names_brokers_is_taken(brokers: str) -> None:
    assert Settings(kafka_bootstrap=brokers).kafka_bootstrap == brokers


@pytest.mark.parametrize("port", [-1, 0, 65_536])
def test_a_port_that_cannot_be_is_refused(port: int) -> None:
    with pytest.raises(ValidationError, match="relay_port"):
        Settings(relay_port=port)


def test_a_relay_is_kept_from_its_compiled_loop_by_the_environment_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PAYMENTS_RELAY_NATIVE", raising=False)
    assert relay_config(Settings()).is_native
    monkeypatch.setenv("PAYMENTS_RELAY_NATIVE", "false")
    assert not relay_config(Settings()).is_native
