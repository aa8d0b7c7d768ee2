"""Faults that a simulator injects: by rule, or by the name of a payment method, so that a demo needs no rules."""

import random
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final


class Action(StrEnum):
    """What goes wrong. `before` means that the request is not executed, `after` that it is."""

    DECLINE = "decline"
    """The payer or the issuer declines, with reason `code`. On the payer's page, `operation` is `confirm`."""
    CONFLICT = "409"
    RATE_LIMIT = "429"
    UNAVAILABLE = "503"
    """Before execution, and not remembered under the key: the answer of a proxy in front of the provider."""
    ERROR_BEFORE = "500_before"
    """Remembered under the key, like every result once execution has begun."""
    ERROR_AFTER = "500_after"
    SLOW = "slow"
    """Executed and answered `seconds` after it arrived."""
    CUT_BEFORE = "cut_before"
    CUT_AFTER = "cut_after"
    TRUNCATED = "truncated"
    GARBAGE = "garbage"
    """Executed, but the answer is a proxy's HTML page."""
    HANG = "hang"
    """Executed, and never answered."""
    WEBHOOK_FIRST = "webhook_first"
    """Executed, and answered a moment after a webhook was accepted; without one, after `seconds`."""
    LAG = "lag"
    """A read is answered with the state at the time of the rule; the rule ends `seconds` after that time."""


@dataclass(frozen=True, slots=True)
class Call:
    """The properties of a request that rules match: `operation` is create, confirm, capture, cancel, refund or read."""

    operation: str
    path: str
    key: str | None = None
    payment_method: str | None = None
    payment_id: str | None = None


@dataclass(slots=True)
class Fault:
    """A rule: which requests it matches (None matches all), how often it applies, and what it does."""

    action: Action
    operation: str | None = None
    path: str | None = None
    payment_method: str | None = None
    payment_id: str | None = None
    key_prefix: str | None = None
    rate: float = 1.0
    times: int | None = None
    seconds: float = 2.0
    code: str = "generic_decline"
    retry_after_seconds: int | None = None
    """The `Retry-After` of a 429 or 503; None sends none.

    PayPal's page on rate limits says to heed it if it is present; Stripe does not promise it.
    """
    given_at: float = field(default_factory=time.monotonic, init=False)
    before: Any = field(default=None, init=False)
    """The books at the time of the rule, for a read that lags."""

    @classmethod
    def from_json(cls, given: Mapping[str, Any]) -> "Fault":
        """Raises ValueError or TypeError if it is not a valid rule."""
        return cls(**{**given, "action": Action(str(given.get("action")))})

    def matches(self, call: Call) -> bool:
        wanted = (
            (self.operation, call.operation),
            (self.payment_method, call.payment_method),
            (self.payment_id, call.payment_id),
        )
        return (
            all(want is None or want == got for want, got in wanted)
            and (self.path is None or call.path.startswith(self.path))
            and (self.key_prefix is None or (call.key or "").startswith(self.key_prefix))
            and (self.action is not Action.LAG or self._may_lag(call))
        )

    def _may_lag(self, call: Call) -> bool:
        return call.operation == "read" and time.monotonic() - self.given_at <= self.seconds

    def strikes(self) -> bool:
        """Whether the rule applies this time; if so, counts the use."""
        if self.times == 0 or (self.rate < 1 and random.random() >= self.rate):  # noqa: S311 - a fault, not a secret
            return False
        if self.times is not None:
            self.times -= 1
        return True


FIRST_ATTEMPT: Final = {
    "pm_sandbox_slow": Fault(Action.SLOW),
    "pm_sandbox_lost_answer": Fault(Action.CUT_AFTER),
    "pm_sandbox_lost_request": Fault(Action.CUT_BEFORE),
    "pm_sandbox_500": Fault(Action.ERROR_AFTER),
    "pm_sandbox_429": Fault(Action.RATE_LIMIT),
}
"""Payment methods whose authorization or charge fails this way at the first attempt of each key."""


@dataclass(slots=True)
class Faults:
    """The active rules, in the order given: the first that matches applies."""

    rules: list[Fault] = field(default_factory=list)
    seen: set[str] = field(default_factory=set)
    """Keys whose first attempt has failed because of its payment method."""

    def pick(self, call: Call) -> Fault | None:
        """The fault for this call, if any; counts the use."""
        return self._rule(call) or self._by_payment_method(call)

    def decline(self, call: Call) -> Fault | None:
        """The same, but only a decline, for a payer who decides on a page: no request of the merchant can fail then."""
        return self._rule(call, frozenset({Action.DECLINE}))

    def _rule(self, call: Call, actions: Collection[Action] = frozenset(Action)) -> Fault | None:
        given = (rule for rule in self.rules if rule.action in actions)
        return next((rule for rule in given if rule.matches(call) and rule.strikes()), None)

    def _by_payment_method(self, call: Call) -> Fault | None:
        fault = FIRST_ATTEMPT.get(call.payment_method or "")
        if fault is None or call.operation not in ("create", "confirm") or call.key in self.seen:
            return None
        if call.key is not None:
            self.seen.add(call.key)
        return fault
