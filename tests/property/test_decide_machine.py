"""No sequence of deliveries, answers, webhooks, crashes and clocks breaks a promise of `decide`.

`PAYMENTS_TEST_SCHEDULES=10000 pytest --timeout 4000 tests/property/test_decide_machine.py` is the long run;
`--hypothesis-seed` repeats one.
"""

import os

from hypothesis import HealthCheck, Phase, settings

from tests.property.machine import PaymentMachine, Shell
from tests.support.memory import MemoryShell


class DecideMachine(PaymentMachine):
    """`decide` alone."""

    def new_shell(self) -> Shell:
        return MemoryShell()


TestDecideMachine = DecideMachine.TestCase
TestDecideMachine.settings = settings(
    max_examples=int(os.environ.get("PAYMENTS_TEST_SCHEDULES", "150")),
    stateful_step_count=40,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
