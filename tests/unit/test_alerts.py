"""The alerts are about metrics that exist, and lead to a page that does."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import REGISTRY

from app import clock, maintenance, slots
from handlers import metrics as service_metrics
from infra.relay import metrics as relay_metrics

DEFINING = (clock, maintenance, slots, service_metrics, relay_metrics)
"""Read for the metrics that they define."""
ROOT = Path(__file__).resolve().parents[2]
ALERTS: list[dict[str, Any]] = yaml.safe_load((ROOT / "deploy/prometheus/alerts.yml").read_text())["groups"][0]["rules"]
OF_THE_PAGE = {"payments_process_up"}
"""Made by `payments http` as it is asked (app/peers.py)."""


def metric_names() -> set[str]:
    families = list(REGISTRY.collect())
    return {each.name for each in families} | {f"{each.name}_total" for each in families if each.type == "counter"}


def anchor(heading: str) -> str:
    """As GitHub makes it of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert["alert"])
def test_an_alert_is_about_metrics_that_exist(alert: dict[str, Any]) -> None:
    named = set(re.findall(r"payments_\w+", alert["expr"]))
    assert named
    assert named <= metric_names() | OF_THE_PAGE


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert["alert"])
def test_an_alert_leads_to_what_to_do(alert: dict[str, Any]) -> None:
    path, _, part = alert["annotations"]["runbook"].partition("#")
    text = (ROOT / path).read_text(encoding="utf-8")
    headings = [line.lstrip("# ") for line in text.splitlines() if line.startswith("#")]
    assert not part or part in map(anchor, headings)
    assert path.startswith("docs/operations/")
    assert part or alert["alert"] in text or path != "docs/operations/reconciliation.md"


def test_somebody_is_called_when_nothing_can_be_saved_and_it_does_not_heal() -> None:
    """A worker that postpones its batches for ever is up, and has nothing else to tell of it."""
    paging = [alert["expr"] for alert in ALERTS if alert["labels"]["severity"] == "page"]
    assert any("payments_batches_postponed_total" in expr for expr in paging)
