"""Reconciliation on a real Postgres: only the provider's word ends anything, and holds end when it says so."""

import asyncio
import json
from datetime import timedelta
from typing import Any

import pytest

from app.reconcile_command import reconcile
from app.settings import Settings
from domain.commands import OperationKind
from domain.operations import Expired, GatewayRequest, Outcome, Succeeded, Unknown
from handlers.reconcile import Reconciler
from infra.postgres.store import PostgresStore, create_pool
from tests.support.provider import BookkeepingGateway
from tests.support.service import delivery, events_of, new_payment_id, running_worker, value


class Instant(BookkeepingGateway):
    name = "instant"


async def in_doubt(postgres_url: str, *payments: Any) -> None:
    """Charges whose answers are lost, and whose next attempt is an hour away."""
    gateway = Instant()
    gateway.outcome = lambda request: Unknown("lost")
    async with running_worker(postgres_url, gateway) as worker:
        await worker.accept(*(delivery("charge", each, f"key-{each}") for each in payments))
        await worker.idle()
    await value(postgres_url, "UPDATE operations SET due_at = now() + interval '1 hour' RETURNING 1")


async def run(settings: Settings, capsys: pytest.CaptureFixture[str], *, dry_run: bool, payment: Any = None) -> Any:
    assert await asyncio.to_thread(reconcile, settings, payment, dry_run=dry_run, as_json=True) == 0
    return json.loads(capsys.readouterr().out)


async def test_a_dry_run_tells_and_changes_nothing_and_then_it_is_applied(
    postgres_url: str, redis_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    payments = [new_payment_id() for _ in range(3)]
    await in_doubt(postgres_url, *payments)
    settings = Settings(postgres_url=postgres_url, redis_url=redis_url, gateways=["instant"], default_gateway="instant")
    told = await run(settings, capsys, dry_run=True)
    assert {each["payment_id"] for each in told} == {str(each) for each in payments}
    assert {each["state"] for each in told} == {"indeterminate"}
    assert all(each["answer"].startswith("succeeded") for each in told)
    assert await value(postgres_url, "SELECT count(*) FROM operations WHERE state = 'indeterminate'") == 3

    told = await run(settings, capsys, dry_run=False, payment=payments[0])
    assert [each["payment_id"] for each in told] == [str(payments[0])]
    assert await value(postgres_url, "SELECT count(*) FROM operations WHERE state = 'indeterminate'") == 2
    assert len(await run(settings, capsys, dry_run=False)) == 2
    assert await value(postgres_url, "SELECT count(*) FROM payments WHERE status = 'captured'") == 3
    assert await run(settings, capsys, dry_run=False) == []


@pytest.mark.parametrize("word", [Expired("ref", "automatic"), Succeeded("ref"), Unknown()], ids=str)
async def test_a_hold_past_its_end_is_released_on_the_providers_word_only(postgres_url: str, word: Outcome) -> None:
    gateway, payment_id = BookkeepingGateway(), new_payment_id()
    async with running_worker(postgres_url, gateway) as worker:
        await worker.accept(delivery("authorize", payment_id, "authorize"))
        await worker.idle()
        pool = await create_pool(postgres_url, size=1)
        reconciler = Reconciler(
            store=PostgresStore(pool),
            gateways={"books": gateway},
            write_path=worker.write_path,
            interval=timedelta(seconds=60),
        )
        assert await reconciler.reconcile_holds() == 0
        # Another attempt may have been paid since, at another gateway: a hold is asked about at its own.
        await value(postgres_url, "UPDATE payments SET authorization_expires_at = now(), gateway = 'other' RETURNING 1")
        asked: list[GatewayRequest] = []

        async def status(request: GatewayRequest) -> Outcome:
            asked.append(request)
            return word

        gateway.status = status  # type: ignore[method-assign]
        assert await reconciler.reconcile_holds() == 1
        await reconciler.reconcile_holds()
        pool.terminate()
    assert asked[0].kind is OperationKind.AUTHORIZE
    assert asked[0].reference == f"ref_{payment_id}:1"
    kinds = [each["type"] for each in await events_of(postgres_url, payment_id)]
    released = ["payment.authorization_expired.v1"] if isinstance(word, Expired) else []
    assert kinds == ["payment.authorized.v1", *released]
