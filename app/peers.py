"""Readiness and metrics of the worker and the relay, as the HTTP process fetches them.

The metrics page has our own metrics and theirs, each with a `process` label. Promises: a peer that is down, slow or
unreadable costs at most `PEER_TIMEOUT_SECONDS` and shows as `payments_process_up{process="…"} 0`; the page itself never
fails for it.
"""

import asyncio
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Final

import httpx
from prometheus_client import REGISTRY, CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from app.health import CHECK_TIMEOUT_SECONDS, Checks

PEER_TIMEOUT_SECONDS: Final = 1.0
PEER_READY_SECONDS: Final = CHECK_TIMEOUT_SECONDS + 1
"""A little more than the other process needs to report a check of its own that timed out."""
OWN_PROCESS: Final = "http"

Families = list[Metric]
Peers = Mapping[str, str]
"""The name of a process, and the base URL of its own HTTP."""


def peer_client() -> httpx.AsyncClient:
    """One client for all requests to peers: each new one reads the system's certificates. Callers set timeouts."""
    alone = httpx.Limits(max_keepalive_connections=0)  # The peer may close a kept connection just as it is used.
    return httpx.AsyncClient(timeout=None, trust_env=False, limits=alone)  # noqa: S113 - as said


def peer_checks(peers: Peers, client: httpx.AsyncClient) -> Checks:
    """One check for each other process, which asks it whether it is ready."""
    return {name: partial(_check_peer, client, _base(url)) for name, url in peers.items()}


def _base(url: str) -> str:
    return url.removesuffix("/").removesuffix("/metrics")


async def _check_peer(client: httpx.AsyncClient, url: str) -> str | None:
    answer = await client.get(f"{url}/health/ready")
    if answer.is_success:
        return None
    parts = answer.json()["parts"].items()
    return "; ".join(f"{part}: {state}" for part, state in parts if state != "ready") or "not ready"


class MetricsPage:
    """Gathers the metrics of this process and its peers."""

    def __init__(self, peers: Peers, client: httpx.AsyncClient) -> None:
        self._peers = dict(peers)
        self._client = client

    async def text(self) -> bytes:
        """Everything in Prometheus's text format."""
        found = await asyncio.gather(*(self._of_peer(url) for url in self._peers.values()))
        by_process = dict(zip(self._peers, found, strict=True))
        labelled = [labelled_families(families or [], process) for process, families in by_process.items()]
        own = labelled_families(REGISTRY.collect(), OWN_PROCESS)
        return as_text([*merged([own, *labelled]), _up(by_process)])

    async def _of_peer(self, url: str) -> Families | None:
        """The peer's metrics; None if it returned none that can be parsed."""
        try:
            async with asyncio.timeout(PEER_TIMEOUT_SECONDS):
                answer = await self._client.get(f"{_base(url)}/metrics")
            return list(text_string_to_metric_families(answer.raise_for_status().text))
        except (httpx.HTTPError, httpx.InvalidURL, TimeoutError, ValueError):
            return None


def labelled_families(families: Iterable[Metric], process: str) -> Families:
    """Copies of the families whose samples carry the name of their process."""
    return [_labelled(family, process) for family in families]


def merged(groups: Iterable[Families]) -> Families:
    """Merge families of the same name, as the text format requires, in alphabetical order."""
    families: dict[str, Metric] = {}
    for family in (family for group in groups for family in group):
        families.setdefault(family.name, _empty(family)).samples.extend(family.samples)
    return [families[name] for name in sorted(families)]


def as_text(families: Families) -> bytes:
    """The families in Prometheus's text format."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Fixed(families))
    return generate_latest(registry)


def _labelled(family: Metric, process: str) -> Metric:
    copy = _empty(family)
    copy.samples = [sample._replace(labels={**sample.labels, "process": process}) for sample in family.samples]
    return copy


def _empty(family: Metric) -> Metric:
    return Metric(family.name, family.documentation, family.type, family.unit)


def _up(by_process: Mapping[str, Families | None]) -> Metric:
    up = GaugeMetricFamily("payments_process_up", "1 where the process gave its metrics just now", labels=["process"])
    for process, families in {OWN_PROCESS: [], **by_process}.items():
        up.add_metric([process], 0 if families is None else 1)
    return up


class _Fixed(Collector):
    """A collector of metrics that were collected before."""

    def __init__(self, families: Families) -> None:
        self._families = families

    def collect(self) -> Families:
        return self._families
