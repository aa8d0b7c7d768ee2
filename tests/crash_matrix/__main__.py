"""`make crash-matrix`: runs the whole crash matrix (tests/fault/test_crash_matrix.py) and prints a table of results."""

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
    """A pytest plugin that collects the result of each case."""

    def __init__(self) -> None:
        self.outcomes: dict[str, dict[str, str]] = defaultdict(dict)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.failed:
            case = report.nodeid.partition("[")[2].rstrip("]")
            operation, _, boundary = case.rpartition("-")
            self.outcomes[operation][boundary] = "once" if report.passed else "FAILED"

    def table(self) -> Table:
        # Imported here, not at the top: pytest rewrites assertions only in modules that nobody imported before it.
        from tests.support.crashing_operation import BOUNDARIES

        table = Table(Column("operation", no_wrap=True), *BOUNDARIES, box=box.SIMPLE_HEAD, pad_edge=False)
        table.title = "SIGKILL at …, and its effect"
        for operation, by_boundary in self.outcomes.items():
            table.add_row(operation, *(by_boundary.get(each, "") for each in BOUNDARIES))
        return table


def main() -> int:
    """Run the whole matrix and return pytest's exit code."""
    os.environ["PAYMENTS_TEST_CRASH_MATRIX"] = "all"
    results = Results()
    code = pytest.main([str(MATRIX), "-q"], plugins=[results])
    Console().print(results.table())
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
