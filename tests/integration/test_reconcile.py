"""Reconciliation on a real Postgres: only the provider's word ends anything, and holds end when it says so."""

import asyncio
import json
import os
import subprocess
import sys
import time
from datetime import timedelta
from typing import Any

import pytest

from app import reconcile_command
from app.reconcile_command import reconcile
from app.ruling_command import Finding, RulingRefused, rule
from app.settings import Settings
from domain.commands import OperationKind
from domain.operations import Expired, GatewayRequest, Outcome, Succeeded, Unknown
from handlers.pace import Pace
from handlers.reconcile import Asker, Reconciler
from infra.postgres.store import PostgresStore, create_pool
from tests.support.provider import BookkeepingGateway
from tests.support.service import delivery, events_of, new_payment_id, running_worker, value


class Instant(BookkeepingGateway):
    name = "instant"


def asker_of(gateway: BookkeepingGateway) -> Asker:
    return Asker({gateway.name: gateway}, {gateway.name: Pace(time.monotonic, gateway)})


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
            asker=asker_of(gateway),
            write_path=worker.write_path,
            interval=timedelta(seconds=60),
            cut_off=timedelta(hours=1),
        )
        assert await reconciler.reconcile_holds() == 0
        # Another attempt was paid before, at another gateway: a hold is asked about at its own.
        another = "gateway = 'other', authorized_minor = 2 * authorized_minor, owed_held_minor = authorized_minor"
        await value(postgres_url, f"UPDATE payments SET authorization_expires_at = now(), {another} RETURNING 1")
        asked: list[GatewayRequest] = []

        async def status(request: GatewayRequest) -> Outcome:
            asked.append(request)
            return word

        gateway.status = status  # type: ignore[method-assign]
        assert await reconciler.reconcile_holds() == 1
        await reconciler.reconcile_holds_now()
        pool.terminate()
    assert asked[0].kind is OperationKind.AUTHORIZE
    assert asked[0].reference == f"ref_{payment_id}:1"
    kinds = [each["type"] for each in await events_of(postgres_url, payment_id)]
    released = ["payment.authorization_expired.v1"] if isinstance(word, Expired) else []
    assert kinds == ["payment.authorized.v1", *released]


def here(postgres_url: str, redis_url: str) -> Settings:
    return Settings(postgres_url=postgres_url, redis_url=redis_url, gateways=["instant"], default_gateway="instant")


async def test_a_dry_run_tells_of_what_crashed_and_not_of_what_is_being_worked_on(
    postgres_url: str, redis_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    crashed, at_work = new_payment_id(), new_payment_id()
    await in_doubt(postgres_url, crashed, at_work)
    leased = "UPDATE operations SET state = 'dispatched', is_leased = true, due_at = now() + $2 WHERE payment_id = $1"
    await value(postgres_url, leased, crashed, timedelta(seconds=-1))
    await value(postgres_url, leased, at_work, timedelta(minutes=1))
    told = await run(here(postgres_url, redis_url), capsys, dry_run=True)
    assert [(each["payment_id"], each["state"]) for each in told] == [(str(crashed), "dispatched")]


async def test_holds_past_their_end_are_asked_about_at_once_and_in_a_dry_run_too(
    postgres_url: str, redis_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    payments = [new_payment_id(), new_payment_id()]
    async with running_worker(postgres_url, Instant()) as worker:
        await worker.accept(*(delivery("authorize", each, f"key-{each}") for each in payments))
        await worker.idle()
    await value(postgres_url, "UPDATE payments SET authorization_expires_at = now() - interval '5 hours'")
    settings = here(postgres_url, redis_url)
    for dry_run in (True, False):
        told = await run(settings, capsys, dry_run=dry_run)
        assert {each["payment_id"] for each in told} == {str(each) for each in payments}
        assert {(each["operation"], each["state"], each["age"]) for each in told} == {
            ("authorize 1", "a hold past its end", "5 h")
        }
        (told,) = await run(settings, capsys, dry_run=dry_run, payment=payments[0])
        assert told["payment_id"] == str(payments[0])


async def test_a_dry_run_that_leaves_something_out_says_so(
    postgres_url: str, redis_url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reconcile_command, "ASKED_MAX", 2)
    await in_doubt(postgres_url, *(new_payment_id() for _ in range(3)))
    settings = here(postgres_url, redis_url)
    await asyncio.to_thread(reconcile, settings, None, dry_run=True, as_json=True)
    told = capsys.readouterr()
    assert len(json.loads(told.out)) == 2
    assert "the first 2 of 3" in told.err


async def test_a_narrow_screen_does_not_break_the_providers_word(
    postgres_url: str, redis_url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    payment = new_payment_id()
    await in_doubt(postgres_url, payment)
    await asyncio.to_thread(reconcile, here(postgres_url, redis_url), None, dry_run=True, as_json=False)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{payment}  charge 1 at instant, USD 100.00, indeterminate")
    assert lines[1].startswith("    the provider says: succeeded (reference ")


async def in_review(postgres_url: str) -> Any:
    """A payment whose refund's answer was lost, that its provider gives no evidence of, and that a person must see."""
    gateway, payment = Instant(), new_payment_id()
    async with running_worker(postgres_url, gateway) as worker:
        await worker.accept(delivery("charge", payment, f"charge-{payment}"))
        await worker.idle()
        gateway.outcome = lambda request: Unknown("lost")
        given = delivery("refund", payment, f"refund-{payment}"), delivery("refund", payment, f"later-{payment}")
        await worker.accept(*given)
        await worker.idle()
    await value(postgres_url, "UPDATE operations SET state = 'needs_review' WHERE number = 2")
    return payment


@pytest.mark.parametrize(
    ("verdict", "ends"), [("succeeded", ["refunded", "command_rejected"]), ("not-executed", ["command_rejected"])]
)
async def test_a_person_ends_what_the_provider_gives_no_evidence_of(
    postgres_url: str, redis_url: str, verdict: str, ends: list[str]
) -> None:
    payment, evidence = await in_review(postgres_url), "VNPay portal, refund 14333333"
    command = [sys.executable, "-m", "app.cli", "reconcile", "--payment", str(payment), "--operation", "2"]
    command += ["--as", verdict, "--evidence", evidence, "--json"]
    instant = {"PAYMENTS_GATEWAYS": '["instant"]', "PAYMENTS_DEFAULT_GATEWAY": "instant"}
    servers = {"PAYMENTS_POSTGRES_URL": postgres_url, "PAYMENTS_REDIS_URL": redis_url}
    done = await asyncio.to_thread(
        subprocess.run, command, env=os.environ | servers | instant, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    event = json.loads(done.stdout)
    assert (event["operation_number"], event["evidence"]) == (2, evidence)
    logged = [json.loads(line) for line in done.stderr.splitlines()]
    (record,) = [each for each in logged if each["event"] == "a person decided an outcome"]
    assert (record["payment"], record["outcome"], record["evidence"]) == (str(payment), verdict, evidence)

    events = [each for each in await events_of(postgres_url, payment) if each["operation_number"] != 1]
    finals = [each["type"].split(".")[1] for each in events if each["type"] != "payment.pending.v1"]
    # What waited was decided by it: refused where nothing is left, carried out otherwise.
    assert finals == (ends if verdict == "succeeded" else [*ends, "refunded"])
    assert [each.get("evidence") for each in events if each["payment_seq"] == event["payment_seq"]] == [evidence]
    kept = await value(postgres_url, "SELECT result::jsonb->>'evidence' FROM operations WHERE number = 2")
    assert kept == evidence
    assert await value(postgres_url, "SELECT refunded_minor FROM payments") == 10_000
    with pytest.raises(RulingRefused, match="a person decides only what is needs_review"):
        await asyncio.to_thread(
            rule, here(postgres_url, redis_url), Finding(payment, 2, verdict, evidence), as_json=True
        )


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"number": 1}, "operation 1 is succeeded"),
        ({"number": 9}, "has no operation 9"),
        ({"verdict": "declined"}, "--as is succeeded or not-executed"),
        ({"evidence": " "}, "how you know"),
        ({"evidence": "card 4111 1111 1111 1111"}, "card number"),
    ],
)
async def test_a_ruling_that_cannot_be_is_refused_and_changes_nothing(
    postgres_url: str, redis_url: str, given: dict[str, Any], why: str
) -> None:
    payment = await in_review(postgres_url)
    before = await events_of(postgres_url, payment)
    finding = Finding(payment, 2, "succeeded", "the portal")._replace(**given)
    with pytest.raises(RulingRefused, match=why):
        await asyncio.to_thread(rule, here(postgres_url, redis_url), finding, as_json=True)
    assert await events_of(postgres_url, payment) == before


async def test_a_charge_that_is_found_done_needs_the_providers_id(postgres_url: str, redis_url: str) -> None:
    payment = new_payment_id()
    await in_doubt(postgres_url, payment)
    await value(postgres_url, "UPDATE operations SET state = 'needs_review'")
    finding, settings = Finding(payment, 1, "succeeded", "the portal"), here(postgres_url, redis_url)
    with pytest.raises(RulingRefused, match="--reference"):
        await asyncio.to_thread(rule, settings, finding, as_json=True)
    assert await asyncio.to_thread(rule, settings, finding._replace(reference="pay_77"), as_json=True) == 0
    assert await value(postgres_url, "SELECT gateway_payment_id FROM payments") == "pay_77"
