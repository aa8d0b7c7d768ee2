"""No sequence of deliveries, answers, webhooks, crashes and clocks breaks a promise of `decide`, at any gateway.

`PAYMENTS_TEST_SCHEDULES=10000 pytest --timeout 4000 tests/property/test_decide_machine.py` is the long run, so many for
each gateway; `--hypothesis-seed` repeats one, `-k momo` chooses a gateway.
"""

import pytest

from domain.rules import Rules
from tests.property.machine import GATEWAYS, PaymentMachine, Shell, machine_of, run_schedules, schedules_asked_for
from tests.support.memory import MemoryShell


class DecideMachine(PaymentMachine):
    """`decide` alone."""

    def new_shell(self, given: Rules) -> Shell:
        return MemoryShell(given)


@pytest.mark.parametrize("gateway", GATEWAYS)
def test_no_sequence_breaks_a_promise_of_decide(gateway: str) -> None:
    run_schedules(machine_of(DecideMachine, gateway), schedules=schedules_asked_for(75), steps=40)
