"""Retry times are bounded, grow, and are spread."""

from datetime import timedelta
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from domain.rules import RetryPolicy

POLICY = RetryPolicy()


@given(attempts=st.integers(0, 10_000), payment=st.integers(0, 2**128 - 1))
def test_a_delay_is_never_zero_and_never_much_above_its_bound(attempts: int, payment: int) -> None:
    delay = POLICY.delay(attempts, UUID(int=payment))
    assert POLICY.first_delay * 0.75 <= delay <= POLICY.delay_max * 1.25


@pytest.mark.parametrize("attempts", range(1, 8))
def test_a_delay_doubles_with_each_attempt_until_its_bound(attempts: int) -> None:
    payment_id = UUID(int=512)
    assert POLICY.delay(attempts, payment_id) == POLICY.first_delay * 2 ** (attempts - 1)
    assert POLICY.delay(60, payment_id) == POLICY.delay_max


@given(attempts=st.integers(0, 10_000), payment=st.integers(0, 2**128 - 1), hours=st.integers(1, 100))
def test_no_delay_is_more_than_the_cut_off_however_long_the_others_may_be(
    attempts: int, payment: int, hours: int
) -> None:
    patient = RetryPolicy(delay_max=timedelta(hours=hours), review_poll_interval=timedelta(hours=hours))
    assert patient.delay(attempts, UUID(int=payment)) <= timedelta(hours=1)
    assert patient.within_cut_off(patient.review_poll_interval) == timedelta(hours=1)


def test_delays_of_different_payments_are_spread() -> None:
    delays = {POLICY.delay(5, UUID(int=number)) for number in range(1024)}
    assert len(delays) == 1024
    assert max(delays) - min(delays) == timedelta(seconds=16) * 1023 / 2048


def test_a_lease_outlasts_the_first_retries_and_doubt_is_reviewed_before_keys_are_forgotten() -> None:
    assert POLICY.lease > POLICY.first_delay
    assert POLICY.review_after < timedelta(hours=23)
    assert POLICY.give_up_after < POLICY.review_after
