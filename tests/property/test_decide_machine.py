"""No sequence of deliveries, answers, crashes and clocks breaks a promise of `decide`."""

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
