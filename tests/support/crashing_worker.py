"""A worker that kills itself, as if by `kill -9`, at the boundary that `CRASH_AT` names.

The boundaries are put around the worker from the outside; the service itself knows nothing of them.
"""

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from typing import Any

from app.settings import Settings
from app.worker import Worker
from domain.decision import Delivery
from handlers.offsets import Offsets
from handlers.write_path import WritePath
from infra.gateways.stripe import StripeGateway

BOUNDARIES = ("after accept", "before call", "after charge", "after outcome", "before offset")


def _die_at(boundary: str) -> None:
    if os.environ["CRASH_AT"] == boundary:
        os.kill(os.getpid(), signal.SIGKILL)


def _wrap(owner: type, name: str, before: Callable[..., None], after: Callable[..., None]) -> None:
    original: Callable[..., Awaitable[Any]] = getattr(owner, name)

    async def wrapped(self: Any, *arguments: Any) -> Any:
        before(self, *arguments)
        result = await original(self, *arguments)
        after(self, *arguments)
        return result

    setattr(owner, name, wrapped)


def _nothing(*_: Any) -> None:
    return


def _after_apply(_: WritePath, inputs: list[Any]) -> None:
    if inputs:
        _die_at("after accept" if isinstance(inputs[0], Delivery) else "after outcome")


def _before_commit(offsets: Offsets) -> None:
    if offsets._next:
        _die_at("before offset")


def main() -> None:
    """Run the worker until it reaches the boundary named by `CRASH_AT`."""
    _wrap(WritePath, "apply", _nothing, _after_apply)
    _wrap(StripeGateway, "charge", lambda *_: _die_at("before call"), lambda *_: _die_at("after charge"))
    _wrap(Offsets, "commit", _before_commit, _nothing)
    asyncio.run(Worker(Settings()).run(asyncio.Event()))


if __name__ == "__main__":
    main()
