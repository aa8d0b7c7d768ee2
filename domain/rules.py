"""The facts beyond a payment that a decision needs, read from settings once and passed in as values."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from uuid import UUID

from domain.capabilities import AmountLimits, Capabilities


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """When an operation without a final outcome is checked again: delays since its last try, deadlines since dispatch.

    `lease` must be longer than any gateway's own timeout, or two workers will call for one operation (harmless, since
    both send the same provider key, but wasteful).
    """

    lease: timedelta = timedelta(seconds=60)
    first_delay: timedelta = timedelta(seconds=1)
    delay_max: timedelta = timedelta(minutes=5)
    poll_interval: timedelta = timedelta(minutes=5)
    review_after: timedelta = timedelta(hours=1)
    review_pending_after: timedelta = timedelta(days=7)
    """For operations that the provider calls pending, or that wait for the payer."""
    review_poll_interval: timedelta = timedelta(minutes=15)
    give_up_after: timedelta = timedelta(minutes=15)
    """Only for operations whose every attempt is proven not to have been executed."""
    cut_off: timedelta = timedelta(hours=1)
    """The longest wait of anything stuck for its next check, unless its provider refuses to be asked sooner."""
    hold_end_unknown_after: timedelta = timedelta(days=7)
    """How long after it came about a hold is first asked about, if its provider does not say when it ends."""

    def delay(self, attempts: int, payment_id: UUID) -> timedelta:
        """How long to wait after so many attempts: doubled with each, up to `delay_max`, but never beyond the cut-off.

        It is up to a quarter shorter or longer, always by the same share for the same payment, so that payments that
        failed together are not all retried together.
        """
        doubled = min(self.delay_max, self.first_delay * 2.0 ** min(max(attempts - 1, 0), 20))
        return self.within_cut_off(doubled * (0.75 + (payment_id.int % 1024) / 2048))

    def within_cut_off(self, delay: timedelta) -> timedelta:
        """`delay`, but no more than the cut-off."""
        return min(delay, self.cut_off)


def not_before(delay: timedelta, least: timedelta, payment_id: UUID) -> timedelta:
    """`delay`, but no less than `least`, and then spread upwards by up to a quarter."""
    return max(delay, least * (1 + (payment_id.int % 1024) / 4096))


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What this installation accepts."""

    currencies: frozenset[str]
    gateways: Mapping[str, Capabilities]
    default_gateway: str
    limits: Mapping[tuple[str, str], AmountLimits] = field(default_factory=dict)
    """By (gateway, currency); a missing pair has the gateway's own limits."""
    retry: RetryPolicy = RetryPolicy()
