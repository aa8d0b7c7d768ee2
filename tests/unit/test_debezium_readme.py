"""deploy/debezium/README.md lists every variable and jar that Kafka Connect needs."""

import re

from infra.local.connect import ARTIFACTS, SHIPPED

README = (SHIPPED / "README.md").read_text()


def test_every_variable_that_the_files_read_is_told_beside_its_file() -> None:
    for name in ("worker", "connector"):
        read = set(re.findall(r"\$\{env:(\w+)\}", (SHIPPED / f"{name}.properties").read_text()))
        rows = [line for line in README.splitlines() if f" | {name} | " in line]
        told = {variable for row in rows for variable in re.findall(r"`([A-Z_]+)`", row.split(" | ")[0])}
        assert told == read


def test_the_jars_that_are_told_are_those_that_are_run_here() -> None:
    for artifact in ARTIFACTS.split("+"):
        group, name, version = artifact.split(":")
        (row,) = [line for line in README.splitlines() if line.startswith(f"| `{group}:") and f"{name}`" in line]
        assert f"| {version}" in row
