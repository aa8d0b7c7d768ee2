"""The simulators with an address to which they send webhooks, and the settings of a service that listens there."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from app.settings import Settings
from app.up import simulated
from infra.local.server import free_port
from tests.support.sandbox import running_sandbox


@dataclass
class Site:
    """`http` is for the simulators' own pages; they send webhooks to `port` of this machine."""

    http: httpx.Client
    port: int
    environment: dict[str, str]

    def settings(self, gateway: str, **more: Any) -> Settings:
        """The settings of a service that uses only this gateway."""
        with pytest.MonkeyPatch.context() as patch:
            for name, value in self.environment.items():
                patch.setenv(name, value)
            return Settings(gateways=[gateway], default_gateway=gateway, **more)


@contextmanager
def running_site() -> Iterator[Site]:
    """The simulators, until the block ends."""
    port, simulator = free_port(), free_port()
    own = f"http://127.0.0.1:{port}"
    environment = simulated(f"http://127.0.0.1:{simulator}", own)
    with (
        running_sandbox(simulator, webhooks_to=f"{own}/webhooks", environment=environment) as url,
        httpx.Client(base_url=url, timeout=10) as http,
    ):
        yield Site(http, port, environment)
