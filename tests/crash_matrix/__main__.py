"""`make crash-matrix`: every boundary of every operation at every provider, and the table of what came of it."""

import os
import sys
from collections import defaultdict
from pathlib import Path

import pytest
from rich import box
from rich.console import Console
from rich.table import Column, Table

MATRIX = Path(__file__).parents[1] / "fault" / "test_crash_matrix.py"


class Results:
    """A pytest plugin: what became of each case, as it ends."""

    def __init__(self) -> None:
        self.outcomes: dict[str, dict[str, str]] = defaultdict(dict)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.failed:
            case = report.nodeid.partition("[")[2].rstrip("]")
            operation, _, boundary = case.rpartition("-")
            self.outcomes[operation][boundary] = "once" if report.passed else "FAILED"

    def table(self) -> Table:
        # Not before pytest has begun: it wants to be the first to import what its plugins rewrite.
        from tests.support.crashing_operation import BOUNDARIES

        table = Table(Column("operation", no_wrap=True), *BOUNDARIES, box=box.SIMPLE_HEAD, pad_edge=False)
        table.title = "SIGKILL at …, and its effect"
        for operation, by_boundary in self.outcomes.items():
            table.add_row(operation, *(by_boundary.get(each, "") for each in BOUNDARIES))
        return table


def main() -> int:
    """Run all of it; the exit code is pytest's."""
    os.environ["PAYMENTS_TEST_CRASH_MATRIX"] = "all"
    results = Results()
    code = pytest.main([str(MATRIX), "-q"], plugins=[results])
    Console().print(results.table())
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
