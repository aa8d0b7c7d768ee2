"""Whether a process can do its work: its parts are asked at once, and none may keep the answer waiting."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Final

import httpx

CHECK_TIMEOUT_SECONDS: Final = 2.0

Check = Callable[[], Awaitable[str | None]]
"""None where the part is ready, otherwise why it is not, in words that may be shown."""
Checks = Mapping[str, Check]


def peer_checks(peers: Mapping[str, str]) -> Checks:
    """One check for each other process, by the base URL of its own HTTP: it is asked whether it is ready."""
    return {name: partial(_check_peer, url.removesuffix("/").removesuffix("/metrics")) for name, url in peers.items()}


async def _check_peer(url: str) -> str | None:
    async with httpx.AsyncClient(timeout=CHECK_TIMEOUT_SECONDS, trust_env=False) as client:
        answer = await client.get(f"{url}/health/ready")
    if answer.is_success:
        return None
    parts = answer.json()["parts"].items()
    return "; ".join(f"{part}: {state}" for part, state in parts if state != "ready") or "not ready"


async def troubles(checks: Checks, *, timeout_seconds: float = CHECK_TIMEOUT_SECONDS) -> dict[str, str]:
    """The parts that are not ready, and why; empty where all are. Takes `timeout_seconds` at most."""
    found = await asyncio.gather(*(_trouble(check, timeout_seconds) for check in checks.values()))
    return {name: trouble for name, trouble in zip(checks, found, strict=True) if trouble}


async def _trouble(check: Check, timeout_seconds: float) -> str | None:
    try:
        async with asyncio.timeout(timeout_seconds):
            return await check()
    except TimeoutError:
        return f"no answer within {timeout_seconds:g} s"
    except Exception as error:  # A check that breaks says that its part is not ready, whatever the error.
        # Only the kind of error is shown: its message may hold a password from a URL.
        return f"check failed: {type(error).__name__}"
