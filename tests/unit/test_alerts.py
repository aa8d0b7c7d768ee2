"""Every alert uses metrics and labels that exist, and links to a runbook section that exists."""

import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import REGISTRY

from app import clock, health, maintenance, slots
from handlers import metrics
from infra.relay import metrics as relay_metrics

DEFINING = (clock, health, maintenance, slots, metrics, relay_metrics)
"""The modules that define the metrics."""
ROOT = Path(__file__).resolve().parents[2]
ALERTS: list[dict[str, Any]] = yaml.safe_load((ROOT / "deploy/prometheus/alerts.yml").read_text())["groups"][0]["rules"]
OF_THE_PAGE = {"payments_process_up"}
"""`payments http` adds this series when it is scraped (app/peers.py)."""


def metric_names() -> set[str]:
    families = list(REGISTRY.collect())
    return {each.name for each in families} | {f"{each.name}_total" for each in families if each.type == "counter"}


def anchor(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert["alert"])
def test_an_alert_is_about_metrics_that_exist(alert: dict[str, Any]) -> None:
    named = set(re.findall(r"payments_\w+", alert["expr"]))
    assert named
    assert named <= metric_names() | OF_THE_PAGE


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert["alert"])
def test_every_label_an_alert_selects_by_exists_on_its_metric(alert: dict[str, Any]) -> None:
    """A selector with an unknown label matches no series, so its alert would never fire."""
    known: dict[str, Any] = REGISTRY._names_to_collectors
    for name, selectors in re.findall(r"(payments_\w+)\{([^}]*)\}", alert["expr"]):
        assert set(re.findall(r"(\w+)[=!]", selectors)) <= set(known[name]._labelnames)


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert["alert"])
def test_an_alert_leads_to_what_to_do(alert: dict[str, Any]) -> None:
    path, _, part = alert["annotations"]["runbook"].partition("#")
    text = (ROOT / path).read_text(encoding="utf-8")
    assert path.startswith("docs/operations/")
    assert part in [anchor(line.lstrip("# ")) for line in text.splitlines() if line.startswith("#")]


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert["alert"])
def test_the_runbook_section_of_an_alert_names_the_alert(alert: dict[str, Any]) -> None:
    path, _, part = alert["annotations"]["runbook"].partition("#")
    sections = re.split(r"^#+ ", (ROOT / path).read_text(encoding="utf-8"), flags=re.MULTILINE)
    section = next(each for each in sections if anchor(each.partition("\n")[0]) == part)
    assert f"`{alert['alert']}`" in section


@cache
def begun_at_zero() -> frozenset[str]:
    """The metrics that a new process exports as 0. A subprocess shows them: other tests have counted in this one."""
    names = ", ".join(module.__name__ for module in DEFINING)
    code = f"import {names}, prometheus_client; handlers.metrics.expect(['instant']); "
    code += "print(prometheus_client.generate_latest().decode())"
    page = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return frozenset(re.split(r"[ {]", line)[0] for line in page.splitlines() if line.endswith(" 0.0"))


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert["alert"])
def test_an_increase_rule_sees_the_first_count_of_a_series(alert: dict[str, Any]) -> None:
    """A series whose first sample is 12 shows no increase: it must begin at 0, or the rule must look for new series.

    `offset` alone would not do: after a gap in scraping, every series would look new one offset later.
    """
    begun = begun_at_zero()
    expr = " ".join(alert["expr"].split())
    for name, labels, window in re.findall(r"increase\((\w+)(\{[^}]*\})?\[(\w+)\]\)", expr):
        is_new = f"({name}{labels} unless last_over_time({name}{labels}[{window}] offset {window}))"
        assert name in begun or is_new in expr


def test_processes_are_missed_also_where_nobody_is_left_to_tell_of_them() -> None:
    """Without `payments http` no process has a series, and a comparison with no series never fires."""
    exprs = {alert["alert"]: alert["expr"] for alert in ALERTS}
    assert "absent(payments_process_up)" in exprs["ProcessAway"]
    assert "vector(" not in exprs["NoRelayActive"], "it would call for a relay that may be well"


def test_somebody_is_called_when_nothing_can_be_saved_and_it_does_not_heal() -> None:
    """A worker that postpones its batches for ever is up, and no other metric shows it."""
    paging = [alert["expr"] for alert in ALERTS if alert["labels"]["severity"] == "page"]
    assert any("payments_batches_postponed_total" in expr for expr in paging)


def test_a_process_that_is_not_ready_pages_even_without_traffic() -> None:
    """Without traffic, no other metric shows that Postgres or Kafka is frozen."""
    paging = [alert["expr"] for alert in ALERTS if alert["labels"]["severity"] == "page"]
    assert any("payments_ready" in expr for expr in paging)


def test_somebody_is_called_before_a_slot_that_nobody_reads_is_lost() -> None:
    """`payments http` exports this, since the relay may be gone. Half of what the slot may keep leaves time to act."""
    (kept_gb,) = re.findall(r"max_slot_wal_keep_size=(\d+)GB", (ROOT / "docker-compose.yml").read_text("utf-8"))
    (alert,) = [each for each in ALERTS if "payments_slot_retained_bytes" in each["expr"]]
    assert alert["labels"]["severity"] == "page"
    assert float(alert["expr"].rpartition(">")[2]) <= float(kept_gb) * 1e9 / 2
