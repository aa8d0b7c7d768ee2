"""Postgres, Kafka or the relay is killed under load, or Valkey is unreachable: each charge happens once, is recorded,
and gets its result."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from uuid import UUID, uuid4

import asyncpg
import pytest

from infra.local import EmbeddedKafka, EmbeddedPostgres
from tests.fault.conftest import Service
from tests.support.service import body
from tests.support.topic import assert_first_deliveries_are_gap_free, bodies, finals, read_until, send

COMMANDS = 300
AWAY_SECONDS = 10


def charges(payments: list[UUID]) -> list[tuple[bytes | None, bytes | None]]:
    return [(str(each).encode(), body("charge", each, f"charge-{each}")) for each in payments]


async def all_results(service: Service, payments: list[UUID]) -> None:
    """Check that every charge is executed once and recorded, and that its result is on the topic, in order."""
    keys = {f"charge-{each}" for each in payments}
    records = await read_until(
        service.kafka_bootstrap, service.events, lambda seen: keys <= finals(seen), timeout_seconds=120
    )
    executed = await asyncio.to_thread(lambda: service.processes.books()["executed_charges"])
    assert executed == {str(each): 1 for each in payments}
    assert {event["type"] for event in bodies(records)} <= {"payment.captured.v1", "payment.pending.v1"}
    assert_first_deliveries_are_gap_free(records)
    connection = await asyncpg.connect(service.postgres_url)
    recorded = await connection.fetchval("SELECT count(*) FROM payments WHERE status = 'captured'")
    booked = await connection.fetchval("SELECT sum(amount_minor) FROM ledger")
    await connection.close()
    assert (recorded, booked) == (len(payments), 10_000 * len(payments))


async def send_with_trouble(service: Service, payments: list[UUID], trouble: Callable[[], Awaitable[None]]) -> None:
    """Send half of the commands; once results arrive, cause the trouble; then send the other half."""
    half = len(payments) // 2
    await send(service.kafka_bootstrap, service.commands, *charges(payments[:half]))
    await read_until(service.kafka_bootstrap, service.events, lambda seen: len(finals(seen)) > 5)
    await trouble()
    await send(service.kafka_bootstrap, service.commands, *charges(payments[half:]))


async def test_postgres_away_for_ten_seconds_leaves_no_charge_unrecorded(
    own_service: Service, own_postgres: EmbeddedPostgres
) -> None:
    payments = [uuid4() for _ in range(COMMANDS)]

    async def trouble() -> None:
        await asyncio.to_thread(own_postgres.kill)
        back = time.monotonic() + AWAY_SECONDS
        await send(own_service.kafka_bootstrap, own_service.commands, *charges(payments[:50]))
        while time.monotonic() < back:
            await asyncio.sleep(0.2)
        await asyncio.to_thread(own_postgres.start)

    await send_with_trouble(own_service, payments, trouble)
    await all_results(own_service, payments)


async def test_kafka_killed_and_restarted_with_its_data_loses_nothing(
    own_service: Service, own_kafka: EmbeddedKafka
) -> None:
    payments = [uuid4() for _ in range(COMMANDS)]

    async def trouble() -> None:
        await asyncio.to_thread(own_kafka.kill)
        await asyncio.to_thread(own_kafka.start)

    await send_with_trouble(own_service, payments, trouble)
    await all_results(own_service, payments)


async def test_a_relay_killed_three_times_repeats_but_skips_nothing(service: Service) -> None:
    payments = [uuid4() for _ in range(COMMANDS)]
    service.processes.worker()

    async def trouble() -> None:
        for _ in range(3):
            relays = [each for each in service.processes.running() if "relay" in list(each.args)]  # type: ignore[arg-type]
            relays[-1].kill()
            service.processes.relay()
            seen = await read_until(service.kafka_bootstrap, service.events, bool)
            assert seen

    await send_with_trouble(service, payments, trouble)
    await all_results(service, payments)


@pytest.mark.parametrize("redis_url", ["redis://127.0.0.1:1/0"], ids=["nobody there"])
async def test_without_valkey_all_results_are_the_same(service: Service, redis_url: str) -> None:
    payments = [uuid4() for _ in range(COMMANDS)]
    service.processes.worker()
    twice = charges(payments) + charges(payments[:20])
    await send(service.kafka_bootstrap, service.commands, *twice)
    await all_results(service, payments)
    replayed = await read_until(
        service.kafka_bootstrap,
        service.events,
        lambda seen: sum(event["replayed"] for event in bodies(seen)) >= 20,
    )
    assert sum(event["replayed"] for event in bodies(replayed)) == 20
