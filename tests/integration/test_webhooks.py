"""Webhooks from the wire to the payment, on a real Postgres: stored before they are answered, and applied once."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import asyncpg
import httpx
import pytest
import stripe
from pydantic import SecretStr
from starlette.applications import Starlette
from structlog.testing import capture_logs

from app import webhooks
from app.settings import Settings
from app.webhooks import WebhookService
from domain.commands import OperationKind
from domain.decision import Notified
from domain.notices import BODY_BYTES_MAX, Notice, WebhookRequest
from domain.operations import Declined, DeclineReason, GatewayRequest, NotExecuted, Outcome, RequiresAction, Succeeded
from domain.ports import Accepted, Received, Stuck
from handlers import metrics
from handlers.webhooks import Webhooks
from infra.gateways.stripe_webhooks import StripeWebhooks
from infra.postgres.inbox import PostgresInbox, forget_applied
from infra.postgres.pool import create_pool
from infra.postgres.store import PostgresStore
from infra.sandbox.momo import IPN
from tests.support.provider import BookkeepingGateway
from tests.support.service import delivery, events_of, new_payment_id, running_worker, value
from tests.support.waiting import until
from tests.support.webhooks import SECRET, SHOP, applied, applying, kinds, served


class StripeBooks(BookkeepingGateway):
    """The bookkeeping provider by another name, so that Stripe's webhooks are about its payments."""

    name = "stripe"


def waits(request: GatewayRequest) -> Outcome | None:
    return RequiresAction(f"pi_{request.payment_id}", "redirect_to_url", "https://bank.invalid")


@asynccontextmanager
async def receiving(postgres_url: str) -> AsyncIterator[httpx.AsyncClient]:
    settings = Settings(postgres_url=postgres_url, stripe_webhook_secrets=[SECRET], stripe_return_url=SHOP)
    service = WebhookService(settings)
    running = asyncio.create_task(service.run())
    transport = httpx.ASGITransport(app=Starlette(routes=service.routes()))
    async with httpx.AsyncClient(transport=transport, base_url="http://payments.test") as client:

        async def is_ready() -> bool:
            return await service.checks()["webhooks"]() is None

        await until(is_ready)
        yield client
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


def event(payment_id: UUID, event_id: str = "evt_1", *, number: int = 1, **fields: Any) -> dict[str, Any]:
    intent = {
        "id": f"pi_{payment_id}",
        "object": "payment_intent",
        "amount_capturable": 0,
        "amount_received": 10_000,
        "currency": "usd",
        "capture_method": "automatic",
        "status": "succeeded",
        "metadata": {"payment_id": str(payment_id), "operation_number": str(number)},
        "latest_charge": None,
    }
    return {
        "id": event_id,
        "object": "event",
        "type": "payment_intent.succeeded",
        "data": {"object": intent | fields},
    }


async def send(client: httpx.AsyncClient, event: dict[str, Any] | bytes, *, secret: str = SECRET) -> int:
    body = event.decode() if isinstance(event, bytes) else json.dumps(event)
    header = stripe.WebhookSignature.generate_signature_header(body, secret, timestamp=int(time.time()))
    answer = await client.post("/webhooks/stripe", content=body, headers={"stripe-signature": header})
    return answer.status_code


async def test_a_payment_that_waits_for_its_payer_is_captured_by_the_webhook_once(postgres_url: str) -> None:
    payment_id, gateway = new_payment_id(), StripeBooks()
    gateway.outcome = waits
    async with running_worker(postgres_url, gateway) as worker, receiving(postgres_url) as client:
        await worker.accept(delivery("charge", payment_id, "charge"))
        await worker.idle()
        async with applying(postgres_url, worker):
            answers = await asyncio.gather(*(send(client, event(payment_id)) for _ in range(10)))
            assert set(answers) == {200}
            assert await send(client, event(payment_id, "evt_2")) == 200
            await until(lambda: applied(postgres_url))
            assert await send(client, event(payment_id)) == 200
    assert await kinds(postgres_url, payment_id) == ["requires_action", "captured"]
    assert await value(postgres_url, "SELECT count(*) FROM inbox") == 2
    assert await value(postgres_url, "SELECT sum(amount_minor) FROM ledger") == 10_000


async def test_it_is_on_disk_before_it_is_answered_and_applied_when_a_worker_comes(postgres_url: str) -> None:
    payment_id, gateway = new_payment_id(), StripeBooks()
    gateway.outcome = waits
    async with running_worker(postgres_url, gateway) as worker, receiving(postgres_url) as client:
        await worker.accept(delivery("charge", payment_id, "charge"))
        await worker.idle()
        assert await send(client, event(payment_id)) == 200
        assert await value(postgres_url, "SELECT count(*) FROM inbox WHERE applied_at IS NULL") == 1
        assert json.loads(await value(postgres_url, "SELECT convert_from(body, 'UTF8') FROM inbox"))["id"] == "evt_1"
        async with applying(postgres_url, worker):
            await until(lambda: applied(postgres_url))
    assert await kinds(postgres_url, payment_id) == ["requires_action", "captured"]


async def test_forged_malformed_huge_or_unknown_webhooks_are_refused_and_change_nothing(postgres_url: str) -> None:
    payment_id, gateway = new_payment_id(), StripeBooks()
    gateway.outcome = waits
    async with running_worker(postgres_url, gateway) as worker, receiving(postgres_url) as client:
        await worker.accept(delivery("charge", payment_id, "charge"))
        await worker.idle()
        assert await send(client, event(payment_id), secret="whsec_other") == 400
        assert await send(client, b"not json") == 400
        assert await send(client, b"x" * (BODY_BYTES_MAX + 1)) == 413
        assert await send(client, event(new_payment_id())) == 404
        assert await send(client, event(payment_id, number=7)) == 404
        assert (await client.post("/webhooks/nobody")).status_code == 404
        assert (await client.post("/webhooks/stripe")).status_code == 400
    assert await value(postgres_url, "SELECT count(*) FROM inbox") == 0
    assert await kinds(postgres_url, payment_id) == ["requires_action"]


@pytest.mark.parametrize(
    "strange",
    [{"id": "evt_\x00"}, {"id": "evt_\ud800"}, {"type": "\ud800"}, {"metadata": {"operation_number": "9" * 10}}],
)
async def test_a_webhook_that_postgres_cannot_store_is_refused_alone_and_its_batch_is_stored(
    postgres_url: str, strange: dict[str, Any]
) -> None:
    payment_id, gateway = new_payment_id(), StripeBooks()
    gateway.outcome = waits
    marks: dict[str, Any] = {
        "metadata": {"payment_id": str(payment_id), **strange.pop("metadata", {"operation_number": "1"})}
    }
    async with running_worker(postgres_url, gateway) as worker, receiving(postgres_url) as client:
        await worker.accept(delivery("charge", payment_id, "charge"))
        await worker.idle()
        events = [event(payment_id, f"evt_{number}") for number in range(8)]
        events[5] = event(payment_id, "evt_strange", **marks) | strange
        answers = await asyncio.gather(*(send(client, each) for each in events))
    assert answers == [200] * 5 + [400] + [200] * 2
    assert await value(postgres_url, "SELECT count(*) FROM inbox") == 7


async def test_a_body_that_does_not_come_whole_is_given_up_and_its_connection_closed(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhooks, "BODY_SECONDS", 0.2)
    given = Settings(postgres_url=postgres_url, stripe_webhook_secrets=[SECRET], stripe_return_url=SHOP)
    service = WebhookService(given)
    async with served(Starlette(routes=service.routes())) as url:
        reader, writer = await asyncio.open_connection("127.0.0.1", httpx.URL(url).port)
        writer.write(b"POST /webhooks/stripe HTTP/1.1\r\nHost: payments\r\nContent-Length: 1000\r\n\r\n{")
        async with asyncio.timeout(5):
            answer = await reader.read()
        writer.close()
        await writer.wait_closed()
    assert answer.startswith(b"HTTP/1.1 408 ")


async def test_a_client_that_hangs_up_mid_request_is_not_logged_as_a_forger(postgres_url: str) -> None:
    given = Settings(postgres_url=postgres_url, stripe_webhook_secrets=[SECRET], stripe_return_url=SHOP)
    service = WebhookService(given)
    async with served(Starlette(routes=service.routes())) as url:
        with capture_logs() as logs:
            _, writer = await asyncio.open_connection("127.0.0.1", httpx.URL(url).port)
            writer.write(b"POST /webhooks/stripe HTTP/1.1\r\nHost: payments\r\nContent-Length: 1000\r\n\r\n{")
            await writer.drain()
            writer.close()
            await writer.wait_closed()
            await asyncio.sleep(0.5)
    assert not logs


async def test_webhooks_that_wait_when_the_process_ends_are_answered_503() -> None:
    reached = asyncio.Event()

    async def accept(received: Sequence[Received]) -> list[Accepted]:
        reached.set()
        await asyncio.Event().wait()
        return []

    received = Webhooks(readers={"stripe": StripeWebhooks([SecretStr(SECRET)])}, accept=accept)
    storing = asyncio.create_task(received.run())
    first = asyncio.create_task(received.receive("stripe", signed(event(new_payment_id()))))
    await reached.wait()
    second = asyncio.create_task(received.receive("stripe", signed(event(new_payment_id()))))
    await asyncio.sleep(0)
    storing.cancel()
    await asyncio.gather(storing, return_exceptions=True)
    async with asyncio.timeout(5):
        answers = [await first, await second, await received.receive("stripe", signed(event(new_payment_id())))]
    assert [each.status for each in answers] == [503, 503, 503]


def signed(event: dict[str, Any]) -> WebhookRequest:
    body = json.dumps(event)
    header = stripe.WebhookSignature.generate_signature_header(body, SECRET, timestamp=int(time.time()))
    return WebhookRequest("POST", "", {"stripe-signature": header}, body.encode(), datetime.now(UTC))


async def test_a_provider_can_tell_nothing_of_another_providers_payment(postgres_url: str) -> None:
    payment_id, gateway = new_payment_id(), BookkeepingGateway()
    gateway.outcome = waits
    async with running_worker(postgres_url, gateway) as worker, receiving(postgres_url) as client:
        await worker.accept(delivery("charge", payment_id, "charge"))
        await worker.idle()
        assert await send(client, event(payment_id)) == 404
    assert await kinds(postgres_url, payment_id) == ["requires_action"]


async def test_a_webhook_of_an_earlier_attempts_gateway_counts_after_another_was_tried(
    postgres_url: str,
) -> None:
    payment_id, gateway = new_payment_id(), StripeBooks()
    gateway.outcome = waits
    async with running_worker(postgres_url, gateway) as worker, receiving(postgres_url) as client:
        await worker.accept(delivery("charge", payment_id, "charge"))
        await worker.idle()
        await value(postgres_url, "UPDATE payments SET gateway = 'other'")
        async with applying(postgres_url, worker):
            assert await send(client, event(payment_id)) == 200
            await until(lambda: applied(postgres_url))
    assert await kinds(postgres_url, payment_id) == ["requires_action", "captured"]
    assert await value(postgres_url, "SELECT gateway FROM payments") == "stripe"


async def test_a_webhook_without_an_operation_is_accepted_from_any_gateway_the_payment_was_tried_at(
    postgres_url: str,
) -> None:
    payment_id, gateway = new_payment_id(), StripeBooks()
    async with running_worker(postgres_url, gateway) as worker:
        await worker.accept(delivery("charge", payment_id, "charge"))
        await worker.idle()
    await value(postgres_url, "UPDATE payments SET gateway = 'other'")
    plain = Received("stripe", "evt_1", "dispute", "{}", b"", payment_id)
    given = [
        plain,
        plain._replace(gateway="momo"),
        plain._replace(event_id="evt_2", operation_number=1),
        plain._replace(gateway="momo", event_id="evt_2", operation_number=1),
        plain._replace(event_id="evt_3", operation_number=2),
        plain._replace(event_id="evt_4", payment_id=None, gateway_payment_id=f"ref_{payment_id}:1"),
        plain._replace(gateway="other", event_id="evt_5", payment_id=None, gateway_payment_id=f"ref_{payment_id}:1"),
    ]
    pool = await create_pool(postgres_url, size=1)
    accepted = await PostgresInbox(pool).accept(given)
    pool.terminate()
    assert [each.payment_id is not None for each in accepted] == [True, False, True, False, False, True, False]
    assert [each.is_new for each in accepted] == [each.payment_id is not None for each in accepted]
    assert await value(postgres_url, "SELECT count(*) FROM inbox") == 3


async def test_processes_that_get_the_same_events_at_once_do_not_wait_for_each_other_in_a_circle(
    postgres_url: str,
) -> None:
    payment_id, gateway = new_payment_id(), StripeBooks()
    async with running_worker(postgres_url, gateway) as worker:
        await worker.accept(delivery("charge", payment_id, "charge"))
        await worker.idle()
    pool = await create_pool(postgres_url, size=3)
    inbox = PostgresInbox(pool)
    for turn in range(20):
        given = [Received("stripe", f"evt_{turn}_{number}", "", "{}", b"", payment_id, 1) for number in range(200)]
        found = await asyncio.gather(*(inbox.accept(each) for each in (given, given[::-1], given[100:] + given[:100])))
        assert sum(each.is_new for one in found for each in one) == 200
    pool.terminate()


async def test_another_amount_or_currency_is_for_a_person_and_what_is_unknown_is_kept(postgres_url: str) -> None:
    payments = [new_payment_id() for _ in range(2)]
    gateway = StripeBooks()
    gateway.outcome = waits
    async with running_worker(postgres_url, gateway) as worker, receiving(postgres_url) as client:
        for each in payments:
            await worker.accept(delivery("charge", each, f"charge-{each}"))
        await worker.idle()
        async with applying(postgres_url, worker):
            assert await send(client, event(payments[0], "evt_1", amount_received=9_999)) == 200
            assert await send(client, event(payments[1], "evt_2", currency="eur")) == 200
            unknown = event(payments[0], "evt_3") | {"type": "payment_intent.of_tomorrow"}
            assert await send(client, unknown) == 200
            await until(lambda: applied(postgres_url))
    for each in payments:
        assert await kinds(postgres_url, each) == ["requires_action", "needs_review"]
    assert await value(postgres_url, "SELECT count(*) FROM ledger") == 0
    assert await value(postgres_url, "SELECT count(*) FROM inbox") == 3


async def test_a_webhook_that_contradicts_a_captured_payment_changes_nothing_and_is_counted(postgres_url: str) -> None:
    payment_id, gateway = new_payment_id(), StripeBooks()
    async with running_worker(postgres_url, gateway) as worker, receiving(postgres_url) as client:
        await worker.accept(delivery("charge", payment_id, "charge"))
        await worker.idle()
        before = metrics.NOTICES_DISAGREEING.labels("stripe")._value.get()
        with capture_logs() as logs:
            async with applying(postgres_url, worker):
                assert await send(client, event(payment_id, amount_received=9_999)) == 200
                await until(lambda: applied(postgres_url))
        assert metrics.NOTICES_DISAGREEING.labels("stripe")._value.get() == before + 1
        assert [each["event"] for each in logs if each["log_level"] == "error"] == ["webhook contradicts what is known"]
    assert await kinds(postgres_url, payment_id) == ["captured"]


async def test_a_dispute_finds_its_payment_by_the_providers_id(postgres_url: str) -> None:
    payment_id, gateway = new_payment_id(), StripeBooks()
    async with running_worker(postgres_url, gateway) as worker, receiving(postgres_url) as client:
        await worker.accept(delivery("charge", payment_id, "charge"))
        await worker.idle()
        dispute = {"id": "dp_1", "amount": 4_000, "currency": "usd", "payment_intent": f"ref_{payment_id}:1"}
        async with applying(postgres_url, worker):
            for number, status in enumerate(("needs_response", "under_review", "lost", "needs_response")):
                told = {"id": f"evt_{number}", "object": "event", "type": "charge.dispute.updated"}
                assert await send(client, told | {"data": {"object": dispute | {"status": status}}}) == 200
            await until(lambda: applied(postgres_url))
            await worker.accept(delivery("refund", payment_id, "refund", amount_minor=7_000))
            await worker.idle()
    assert await kinds(postgres_url, payment_id) == [
        "captured", "dispute_opened", "dispute_closed", "command_rejected",
    ]  # fmt: skip
    assert await value(postgres_url, "SELECT disputed_minor FROM payments") == 4_000


def declines_the_first(request: GatewayRequest) -> Outcome:
    if request.operation_number == 1:
        return Declined(DeclineReason.AUTHENTICATION_FAILED, "authentication_failed", "pi_first")
    return Succeeded("pi_second", request.amount.minor)


async def test_a_dispute_of_an_attempt_that_was_paid_late_finds_its_payment(postgres_url: str) -> None:
    payment_id, gateway = new_payment_id(), StripeBooks()
    gateway.outcome = declines_the_first
    async with running_worker(postgres_url, gateway) as worker, receiving(postgres_url) as client:
        for key in ("first", "second"):
            await worker.accept(delivery("charge", payment_id, key))
            await worker.idle()
        async with applying(postgres_url, worker):
            assert await send(client, event(payment_id, "evt_late", id="pi_first")) == 200
            await until(lambda: applied(postgres_url))
            dispute = {"id": "dp_1", "amount": 10_000, "currency": "usd", "payment_intent": "pi_first"}
            told = {"id": "evt_dispute", "object": "event", "type": "charge.dispute.closed"}
            assert await send(client, told | {"data": {"object": dispute | {"status": "lost"}}}) == 200
            await until(lambda: applied(postgres_url))
    assert await kinds(postgres_url, payment_id) == ["declined", "captured", "late_success", "dispute_closed"]
    assert await value(postgres_url, "SELECT disputed_minor FROM payments") == 10_000


async def test_applied_webhooks_are_forgotten_after_their_retention_and_no_others(postgres_url: str) -> None:
    connection = await asyncpg.connect(postgres_url)
    await connection.execute(
        """INSERT INTO inbox (gateway, event_id, type, content, body, received_at, due_at, applied_at)
           SELECT 'stripe', 'evt_' || n, 't', '{}', '', now() - interval '37 days' * (n <= 12000)::integer,
                  CASE WHEN n % 10 = 0 THEN now() END,
                  CASE WHEN n % 10 <> 0 THEN now() - interval '36 days' * (n <= 12000)::integer END
             FROM generate_series(1, 12500) AS n"""
    )
    assert await forget_applied(postgres_url, older_than=timedelta(days=35)) == 10_800
    assert await forget_applied(postgres_url, older_than=timedelta(days=35)) == 0
    left = await connection.fetchrow("SELECT count(*) FILTER (WHERE due_at IS NULL), count(*) FROM inbox")
    await connection.close()
    assert left is not None
    assert tuple(left) == (450, 1_700)


async def test_webhooks_are_forgotten_whatever_stands_before_them_and_was_never_applied(postgres_url: str) -> None:
    connection = await asyncpg.connect(postgres_url)
    await connection.execute(
        """INSERT INTO inbox (gateway, event_id, type, content, body, received_at, due_at, applied_at)
           SELECT 'stripe', 'evt_' || n, 't', '{}', '', now() - interval '37 days',
                  CASE WHEN n <= 11000 THEN now() END, CASE WHEN n > 11000 THEN now() - interval '36 days' END
             FROM generate_series(1, 11001) AS n"""
    )
    await connection.close()
    assert await forget_applied(postgres_url, older_than=timedelta(days=35)) == 1


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 100_000,
        json.dumps(dict.fromkeys(IPN.split(), "x") | {"signature": "\ud800"}).encode(),
        json.dumps(dict.fromkeys(IPN.split(), "\ud800") | {"signature": "x"}).encode(),
    ],
    ids=["deep", "signature", "text"],
)
async def test_a_webhook_that_cannot_be_parsed_or_encoded_is_answered_400(body: bytes) -> None:
    own = {"momo_partner_code": "x", "momo_access_key": "x", "momo_secret_key": "x"}
    own |= {"momo_redirect_url": SHOP, "momo_ipn_url": SHOP}
    settings = Settings(gateways=["momo"], default_gateway="momo", **own)  # type: ignore[arg-type]
    transport = httpx.ASGITransport(app=Starlette(routes=WebhookService(settings).routes()))
    async with httpx.AsyncClient(transport=transport, base_url="http://payments.test") as client:
        assert (await client.post("/webhooks/momo", content=body)).status_code == 400


async def test_while_postgres_is_away_the_provider_is_asked_to_send_again() -> None:
    away = "postgresql://127.0.0.1:1/none"
    service = WebhookService(Settings(postgres_url=away, stripe_webhook_secrets=[SECRET], stripe_return_url=SHOP))
    running = asyncio.create_task(service.run())
    transport = httpx.ASGITransport(app=Starlette(routes=service.routes()))
    async with httpx.AsyncClient(transport=transport, base_url="http://payments.test") as client:
        assert await send(client, event(new_payment_id())) == 503
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running


def refunded(
    payment_id: UUID, event_id: str, *, refund: str, amount: int = 4_000, seconds_ago: int = 0
) -> dict[str, Any]:
    """A webhook about a refund without a mark of ours."""
    given = {"id": refund, "object": "refund", "amount": amount, "currency": "usd", "status": "succeeded"}
    given |= {
        "payment_intent": f"ref_{payment_id}:1",
        "created": int(time.time()) - seconds_ago,
        "balance_transaction": "txn_1",
    }
    return {"id": event_id, "object": "event", "type": "refund.created", "data": {"object": given | {"metadata": {}}}}


async def stuck_webhooks(postgres_url: str) -> Stuck:
    pool = await create_pool(postgres_url, size=1)
    found = (await PostgresStore(pool).stuck())["webhook"]
    pool.terminate()
    return found


async def test_a_refund_without_a_mark_that_may_be_ours_waits_and_is_counted_once(postgres_url: str) -> None:
    payment_id, gateway = new_payment_id(), StripeBooks()
    gateway.lose_answer = lambda request: request.kind is OperationKind.REFUND
    ours = f"ref_{payment_id}:2"
    async with running_worker(postgres_url, gateway) as worker, receiving(postgres_url) as client:
        await worker.accept(delivery("charge", payment_id, "charge"))
        await worker.idle()
        await worker.accept(delivery("refund", payment_id, "refund", amount_minor=4_000))
        await worker.idle()
        async with applying(postgres_url, worker) as applier:
            before = metrics.NOTICES_POSTPONED._value.get()
            assert await send(client, refunded(payment_id, "evt_1", refund=ours)) == 200

            async def is_put_off() -> bool:
                return bool(metrics.NOTICES_POSTPONED._value.get() > before)

            await until(is_put_off)
            assert await kinds(postgres_url, payment_id) == ["captured", "pending"]
            assert not await applied(postgres_url)
            await value(postgres_url, "UPDATE inbox SET received_at = now() - interval '2 hours' RETURNING 1")
            waits = await stuck_webhooks(postgres_url)
            assert (waits.number, waits.overdue_seconds) == (1, 0)
            assert 7_200 <= waits.oldest_seconds < 7_230, "however often it was put off"
            gateway.lose_answer = lambda request: False
            await value(postgres_url, "UPDATE operations SET due_at = now() WHERE due_at IS NOT NULL RETURNING 1")
            await worker.sweep.sweep_once()
            await worker.idle()
            await value(postgres_url, "UPDATE inbox SET due_at = now() WHERE due_at IS NOT NULL RETURNING 1")
            applier.arrived.set()
            await until(lambda: applied(postgres_url))
    assert (await stuck_webhooks(postgres_url)).oldest_seconds == 0
    assert await kinds(postgres_url, payment_id) == ["captured", "pending", "refunded"]
    assert await value(postgres_url, "SELECT refunded_minor FROM payments") == 4_000
    assert await value(postgres_url, "SELECT count(*) FROM operations") == 2


async def test_a_refund_that_was_found_not_made_and_then_told_twice_differently_counts_once(postgres_url: str) -> None:
    """The refund first comes without our mark, as if somebody else had made it, and then with it."""
    payment_id, gateway = new_payment_id(), StripeBooks()
    gateway.outcome = lambda request: NotExecuted("not there") if request.kind is OperationKind.REFUND else None
    async with running_worker(postgres_url, gateway) as worker, receiving(postgres_url) as client:
        await worker.accept(delivery("charge", payment_id, "charge"))
        await worker.idle()
        await worker.accept(delivery("refund", payment_id, "refund", amount_minor=4_000))
        await worker.idle()
        before = metrics.NOTICES_DISAGREEING.labels("stripe")._value.get()
        async with applying(postgres_url, worker):
            assert await send(client, refunded(payment_id, "evt_1", refund="re_1")) == 200
            await until(lambda: applied(postgres_url))
            marked = refunded(payment_id, "evt_2", refund="re_1")
            marked["data"]["object"]["metadata"] = {"payment_id": str(payment_id), "operation_number": "2"}
            assert await send(client, marked) == 200
            await until(lambda: applied(postgres_url))
    assert await kinds(postgres_url, payment_id) == ["captured", "command_rejected", "refunded_externally"]
    assert await value(postgres_url, "SELECT refunded_minor FROM payments") == 4_000
    assert metrics.NOTICES_DISAGREEING.labels("stripe")._value.get() == before + 1


async def test_a_refund_reported_many_times_is_counted_once(postgres_url: str) -> None:
    payment_id, gateway = new_payment_id(), StripeBooks()
    async with running_worker(postgres_url, gateway) as worker, receiving(postgres_url) as client:
        await worker.accept(delivery("charge", payment_id, "charge"))
        await worker.idle()
        for number in range(5):
            assert await send(client, refunded(payment_id, f"evt_{number}", refund="re_portal")) == 200
        async with applying(postgres_url, worker):
            await until(lambda: applied(postgres_url))
            assert await send(client, refunded(payment_id, "evt_late", refund="re_portal")) == 200
            before = metrics.NOTICES_DISAGREEING.labels("stripe")._value.get()
            too_much = refunded(payment_id, "evt_too_much", refund="re_other", amount=6_001, seconds_ago=7_200)
            assert await send(client, too_much) == 200
            await until(lambda: applied(postgres_url))
            assert metrics.NOTICES_DISAGREEING.labels("stripe")._value.get() == before + 1
            assert await send(client, refunded(new_payment_id(), "evt_of_nobody", refund="re_nobodys")) == 404
    assert await kinds(postgres_url, payment_id) == ["captured", "refunded_externally"]
    assert await value(postgres_url, "SELECT refunded_minor FROM payments") == 4_000


async def test_a_command_that_comes_again_after_a_late_success_is_not_told_that_it_was_declined_and_no_more(
    postgres_url: str,
) -> None:
    payment_id, gateway = new_payment_id(), StripeBooks()
    gateway.outcome = lambda request: Declined(DeclineReason.OTHER, None, f"pi_{payment_id}")
    async with running_worker(postgres_url, gateway) as worker, receiving(postgres_url) as client:
        charge = delivery("charge", payment_id, "charge")
        await worker.accept(charge)
        await worker.idle()
        async with applying(postgres_url, worker):
            assert await send(client, event(payment_id)) == 200
            await until(lambda: applied(postgres_url))
        for _ in range(2):
            await worker.accept(charge)
    told = [
        (each["type"].split(".")[1], each["payment_seq"], each["replayed"])
        for each in await events_of(postgres_url, payment_id)
    ]
    assert told == [
        ("declined", 1, False), ("declined", 1, True), ("declined", 1, True),
        ("late_success", 2, False), ("late_success", 2, True), ("late_success", 2, True),
    ]  # fmt: skip


async def test_a_refund_that_comes_again_after_it_failed_is_told_so(postgres_url: str) -> None:
    payment_id, gateway = new_payment_id(), StripeBooks()
    async with running_worker(postgres_url, gateway) as worker:
        await worker.accept(delivery("charge", payment_id, "charge"))
        refund = delivery("refund", payment_id, "refund", amount_minor=4_000)
        await worker.accept(refund)
        await worker.idle()
        failed = Declined(DeclineReason.REFUND_FAILED, None, "re_1")
        await worker.write_path.apply(
            [Notified(None, payment_id, Notice("stripe", "", "", payment_id, 2, outcome=failed))]
        )
        await worker.accept(refund)
    told = [(each["type"].split(".")[1], each["replayed"]) for each in await events_of(postgres_url, payment_id)]
    assert told == [
        ("captured", False), ("refunded", False), ("refunded", True), ("refund_failed", False), ("refund_failed", True),
    ]  # fmt: skip
