"""SIGKILL of the worker at every boundary: each payment is charged once, and no result is missing or out of order."""

import asyncio
import signal
from uuid import uuid4

import pytest

from tests.fault.conftest import Service
from tests.support.crashing_worker import BOUNDARIES
from tests.support.service import body
from tests.support.topic import assert_first_deliveries_are_gap_free, bodies, finals, read_until, send

COMMANDS = 20


@pytest.mark.parametrize("boundary", BOUNDARIES)
async def test_a_worker_killed_at_a_boundary_charges_once_and_loses_no_result(service: Service, boundary: str) -> None:
    payments = [uuid4() for _ in range(COMMANDS)]
    charges = [(str(each).encode(), body("charge", each, f"charge-{each}")) for each in payments]
    await send(service.kafka_bootstrap, service.commands, *charges)
    crashing = service.processes.start("crashing", "tests.support.crashing_worker", CRASH_AT=boundary)
    assert await asyncio.to_thread(crashing.wait, 60) == -signal.SIGKILL
    service.processes.worker()
    keys = {f"charge-{each}" for each in payments}
    records = await read_until(service.kafka_bootstrap, service.events, lambda seen: keys <= finals(seen))
    executed = service.processes.books()["executed_charges"]
    assert executed == {str(each): 1 for each in payments}
    firsts = [event for event in bodies(records) if not event["replayed"]]
    captured = {event["payment_id"] for event in firsts if event["type"] == "payment.captured.v1"}
    assert captured == {str(each) for each in payments}
    assert_first_deliveries_are_gap_free(records)
