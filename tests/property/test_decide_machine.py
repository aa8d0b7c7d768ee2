"""No sequence of deliveries, answers, webhooks, crashes and clocks breaks a promise of `decide`, at any gateway.

The long run is `PAYMENTS_TEST_SCHEDULES=10000 pytest --timeout 4000 tests/property/test_decide_machine.py`, with that
many schedules for each gateway. `--hypothesis-seed` repeats a run, `-k momo` selects a gateway.
"""

import pytest

from domain.operations import Succeeded
from domain.rules import Rules
from tests.property.machine import GATEWAYS, PaymentMachine, Shell, machine_of, run_schedules, schedules_asked_for
from tests.support.memory import MemoryShell


class DecideMachine(PaymentMachine):
    """`decide` in memory, without a database."""

    def new_shell(self, given: Rules) -> Shell:
        self.memory = MemoryShell(given)
        return self.memory

    def teardown(self) -> None:
        """A webhook that disagrees is not applied again, so none about a dashboard movement may disagree."""
        super().teardown()
        acts = {each.reference for each in self.provider.external}
        heard = [each.notice.outcome for each in self.memory.disagreeing if each.notice.external is not None]
        assert not [each for each in heard if isinstance(each, Succeeded) and each.reference in acts]


@pytest.mark.parametrize("gateway", GATEWAYS)
def test_no_sequence_breaks_a_promise_of_decide(gateway: str) -> None:
    run_schedules(machine_of(DecideMachine, gateway), schedules=schedules_asked_for(75), steps=40)
