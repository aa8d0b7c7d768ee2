"""SIGKILL at each boundary of each operation at each provider: one effect, one result, and no failure from a timeout.

By default only a sample runs, one boundary of each operation; `make crash-matrix` runs all and prints the table.
`test_worker_crashes.py` covers the boundaries around Kafka's offsets.
"""

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from typing import Any
from uuid import UUID

import httpx
import pytest

from domain.commands import OperationKind
from domain.operations import RequiresAction
from domain.rules import RetryPolicy
from tests.contract.providers import PROVIDERS, Provider
from tests.support.crashing_operation import BOUNDARIES
from tests.support.sandbox import CHECKOUT, running_sandbox
from tests.support.service import (
    InProcessWorker,
    delivery,
    events_of,
    new_payment_id,
    rules,
    running_worker,
    until_settled,
    value,
)

AUTHORIZE, CHARGE, CAPTURE, VOID, REFUND = OperationKind
RESULTS = {AUTHORIZE: "authorized", CHARGE: "captured", CAPTURE: "captured", VOID: "voided", REFUND: "refunded"}
RETRY = RetryPolicy(
    lease=timedelta(seconds=1),
    first_delay=timedelta(milliseconds=100),
    delay_max=timedelta(milliseconds=300),
    poll_interval=timedelta(milliseconds=200),
)
NEVER_AGAIN = {("vnpay", REFUND): BOUNDARIES[:2]}
"""VNPay has no idempotency keys, so a refund that may have been sent is never sent again. After a crash at these
boundaries nothing was sent, but the service cannot know that, so the refund stays open."""


def offered(name: str) -> tuple[OperationKind, ...]:
    """The operations tried at a provider; a variant with a payer differs from the plain one only in how it opens."""
    if "," in name:
        return (AUTHORIZE, CHARGE)
    return (CHARGE, REFUND) if name == "vnpay" else tuple(OperationKind)


def cases() -> Iterator[tuple[str, OperationKind, str]]:
    is_all = os.environ.get("PAYMENTS_TEST_CRASH_MATRIX") == "all"
    number = 0
    for name in PROVIDERS:
        for kind in offered(name):
            for boundary in BOUNDARIES if is_all else (BOUNDARIES[number % len(BOUNDARIES)],):
                yield name, kind, boundary
            number += 1


@pytest.fixture(scope="module")
def sandbox_url() -> Iterator[str]:
    with running_sandbox() as url:
        yield url


def fields(provider: Provider, kind: OperationKind) -> dict[str, Any]:
    if kind not in (AUTHORIZE, CHARGE):
        return {}
    amount = provider.amount
    return {
        "amount_minor": amount.minor,
        "currency": amount.currency,
        "payment_method": provider.payment_method,
        "gateway": provider.gateway().name,
    }


async def live_on(url: str, worker: InProcessWorker, provider: Provider, payment_id: UUID, *, seconds: float) -> bool:
    """Let service and payer continue until no operation is open; False if one is still open when the time is up."""
    paid: set[str] = set()
    try:
        async with asyncio.timeout(seconds):
            while await value(url, "SELECT open_operations FROM payments WHERE payment_id = $1", payment_id) != 0:
                for event in await events_of(url, payment_id):
                    reference = event["provider_reference"]
                    if event["type"] == "payment.requires_action.v1" and reference not in paid:
                        paid.add(reference)
                        action = RequiresAction(reference, "redirect", event["action"]["url"])
                        await asyncio.to_thread(provider.pay, action)
                await asyncio.sleep(0.05)
    except TimeoutError:
        return False
    return True


async def crash(given: dict[str, Any]) -> None:
    """Run this in a process that kills itself at the given boundary."""
    crashed = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-m", "tests.support.crashing_operation"],
        input=json.dumps(given).encode(),
        cwd=CHECKOUT,
        timeout=60,
    )
    assert crashed.returncode == -signal.SIGKILL


@pytest.mark.parametrize(("name", "kind", "boundary"), list(cases()))
async def test_a_crash_causes_nothing_twice_and_loses_nothing(
    postgres_url: str, sandbox_url: str, name: str, kind: OperationKind, boundary: str
) -> None:
    with httpx.Client(base_url=sandbox_url, timeout=10) as http:
        provider = PROVIDERS[name](sandbox_url, http)
        gateway = provider.gateway()
        given = rules(RETRY, gateways={gateway.name: gateway.capabilities}, default_gateway=gateway.name)
        payment_id = new_payment_id()
        async with running_worker(postgres_url, gateway, sweeping=True, given=given) as worker:
            opening = CHARGE if kind is REFUND else AUTHORIZE
            if kind not in (AUTHORIZE, CHARGE):
                await worker.accept(delivery(opening, payment_id, "opening", **fields(provider, opening)))
                assert await live_on(postgres_url, worker, provider, payment_id, seconds=20)
            await worker.idle()
        command = {"kind": kind, "payment_id": str(payment_id), "key": "crashed", "fields": fields(provider, kind)}
        where = {"provider": name, "sandbox_url": sandbox_url, "postgres_url": postgres_url, "boundary": boundary}
        await crash(command | where)

        async with running_worker(postgres_url, gateway, sweeping=True, given=given) as worker:
            # Kafka delivers the command again: its offset was never committed.
            await worker.accept(delivery(kind, payment_id, "crashed", **fields(provider, kind)))
            is_doubtful = boundary in NEVER_AGAIN.get((name, kind), ())
            has_ended = await live_on(postgres_url, worker, provider, payment_id, seconds=3 if is_doubtful else 20)
        await gateway.close()

        told = [each for each in await events_of(postgres_url, payment_id) if each["idempotency_key"] == "crashed"]
        finals = [each["type"].split(".")[1] for each in told if not each["replayed"] and each["type"] not in OPEN]
        held, captured, refunded = provider.effect(payment_id)
        if is_doubtful:
            assert (has_ended, finals, refunded) == (False, [], 0)
            return
        assert has_ended
        assert finals == [RESULTS[kind]]
        whole = provider.amount.minor
        effects = {AUTHORIZE: (whole, 0, 0), VOID: (0, 0, 0), REFUND: (0, whole, whole)}
        assert (held, captured, refunded) == effects.get(kind, (0, whole, 0))
        row = "SELECT (captured_minor, refunded_minor) FROM payments WHERE payment_id = $1"
        assert await value(postgres_url, row, payment_id) == (captured, refunded)


@pytest.mark.parametrize(
    "boundary", [pytest.param(each, id=f"stripe-abandoned-{each}") for each in BOUNDARIES if each != "after accept"]
)
async def test_a_crash_while_what_a_payer_abandoned_is_canceled_ends_it_once(
    postgres_url: str, sandbox_url: str, boundary: str
) -> None:
    name, payment_id = "stripe, 3-D Secure", new_payment_id()
    with httpx.Client(base_url=sandbox_url, timeout=10) as http:
        provider = PROVIDERS[name](sandbox_url, http)
        gateway = provider.gateway()
        given = rules(RETRY, gateways={gateway.name: gateway.capabilities}, default_gateway=gateway.name)
        async with running_worker(postgres_url, gateway, given=given) as worker:
            await worker.accept(delivery(CHARGE, payment_id, "abandoned", **fields(provider, CHARGE)))
            await worker.idle()
        (told,) = await events_of(postgres_url, payment_id)
        await asyncio.to_thread(provider.abandon, RequiresAction(told["provider_reference"], "redirect"))
        await value(postgres_url, "UPDATE operations SET due_at = now()")
        where = {"provider": name, "sandbox_url": sandbox_url, "postgres_url": postgres_url}
        await crash(where | {"boundary": boundary})

        async with running_worker(postgres_url, gateway, sweeping=True, given=given):
            await until_settled(postgres_url)
        await gateway.close()
        kinds = [each["type"].split(".")[1] for each in await events_of(postgres_url, payment_id)]
        assert kinds == ["requires_action", "expired"]
        assert provider.effect(payment_id) == (0, 0, 0)


OPEN = frozenset({"payment.requires_action.v1", "payment.pending.v1", "payment.needs_review.v1"})
