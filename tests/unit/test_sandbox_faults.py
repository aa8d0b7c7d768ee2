"""Fault rules of the simulators: what they match, and when they end."""

import pytest

from infra.sandbox.faults import Action, Call, Fault, Faults

READ = Call("read", "/status", payment_id="p1")
CREATE = Call("create", "/payments", payment_id="p1")


def rules(*given: Fault) -> Faults:
    return Faults(rules=list(given))


def test_a_lag_strikes_reads_only_and_ends_with_its_time() -> None:
    assert rules(Fault(Action.LAG)).pick(CREATE) is None
    assert rules(Fault(Action.LAG)).pick(READ) is not None
    assert rules(Fault(Action.LAG, seconds=-1)).pick(READ) is None


def test_a_rule_strikes_so_many_times_and_then_the_next_one_does() -> None:
    faults = rules(Fault(Action.HANG, times=2), Fault(Action.SLOW))
    assert [fault.action for _ in range(3) if (fault := faults.pick(CREATE))] == [
        Action.HANG, Action.HANG, Action.SLOW,
    ]  # fmt: skip


def test_a_rule_that_never_strikes_is_not_used_up() -> None:
    faults = rules(Fault(Action.HANG, rate=0, times=1))
    assert faults.pick(CREATE) is None
    assert faults.rules[0].times == 1


def test_on_a_page_only_declines_count() -> None:
    faults = rules(Fault(Action.CUT_AFTER, times=1), Fault(Action.DECLINE, operation="confirm", code="51"))
    declined = faults.decline(Call("confirm", "/pay", payment_id="p1"))
    assert declined is not None
    assert declined.code == "51"
    assert faults.rules[0].times == 1


@pytest.mark.parametrize("given", [{"action": "none"}, {}, {"action": "lag", "before": {}}, {"action": "lag", "x": 1}])
def test_an_invalid_fault_rule_is_refused(given: dict[str, object]) -> None:
    with pytest.raises((TypeError, ValueError)):
        Fault.from_json(given)
