"""Runs one command or one sweep through the write path and its gateway, and kills its own process at a boundary.

Run as `python -m tests.support.crashing_operation`, with the command and the boundary as JSON on standard input. The
boundaries are put around the service's parts from the outside; the service itself knows nothing of them.
"""

import asyncio
import json
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from typing import Any
from uuid import UUID

import httpx

from domain.decision import Answer
from domain.operations import GatewayRequest, Outcome
from handlers.write_path import WritePath
from tests.contract.providers import PROVIDERS
from tests.support.service import delivery, running_worker

BOUNDARIES = ("after accept", "before call", "after call", "before outcome", "after outcome")


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _mine_gateway(gateway: Any, boundary: str) -> None:
    for name in ("authorize", "charge", "capture", "void", "refund", "resume"):
        setattr(gateway, name, _mined(getattr(gateway, name), boundary))


def _mined(
    call: Callable[[GatewayRequest], Awaitable[Outcome]], boundary: str
) -> Callable[[GatewayRequest], Awaitable[Outcome]]:
    async def mined(request: GatewayRequest) -> Outcome:
        if boundary == "before call":
            _die()
        outcome = await call(request)
        if boundary == "after call":
            _die()
        return outcome

    return mined


def _mine_write_path(boundary: str) -> None:
    original = WritePath.apply

    async def apply(self: WritePath, inputs: Any) -> Any:
        is_outcome = bool(inputs) and isinstance(inputs[0], Answer)
        if is_outcome and boundary == "before outcome":
            _die()
        applied = await original(self, inputs)
        if boundary == ("after outcome" if is_outcome else "after accept"):
            _die()
        return applied

    setattr(WritePath, "apply", apply)  # noqa: B010 - a method is replaced on purpose


async def main() -> None:
    """Run the command given on standard input, or a sweep if it has none."""
    given = json.load(sys.stdin)
    with httpx.Client(base_url=given["sandbox_url"]) as http:
        gateway = PROVIDERS[given["provider"]](given["sandbox_url"], http).gateway()
    _mine_gateway(gateway, given["boundary"])
    _mine_write_path(given["boundary"])
    async with running_worker(given["postgres_url"], gateway) as worker:
        if "kind" in given:
            payment_id = UUID(given["payment_id"])
            await worker.accept(delivery(given["kind"], payment_id, given["key"], **given["fields"]))
        else:
            await worker.sweep.sweep_once()
        await worker.idle()


if __name__ == "__main__":
    asyncio.run(main())
