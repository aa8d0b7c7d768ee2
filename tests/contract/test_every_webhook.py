"""Every gateway's webhooks, signed and sent over HTTP: however they come, or if they do not, the end is the same.

The simulators send them to the service's own endpoint. From there they go through the inbox of a real Postgres and the
write path, alongside the API's answers, as in production. A new gateway is included by its line in
`tests/contract/providers.py`.
"""

import asyncio
import socket
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple
from uuid import UUID

import asyncpg
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from app import wiring
from app.settings import Settings
from app.webhooks import WebhookService
from domain.commands import OperationKind
from domain.operations import OPEN, RequiresAction
from domain.settle import SUCCESS_EVENTS
from handlers import metrics
from infra.postgres.pool import create_pool
from tests.contract.providers import PROVIDERS, Provider
from tests.support.service import InProcessWorker, delivery, events_of, new_payment_id, running_worker
from tests.support.site import Site, running_site
from tests.support.waiting import until
from tests.support.webhooks import applying

AUTHORIZE, CHARGE, CAPTURE, VOID, REFUND = OperationKind
MOVING = (CHARGE, CAPTURE, REFUND)
ON_THE_WAY = ("requires_action", "pending", "needs_review")
"""Events that do not end a command."""
BEFORE: Mapping[OperationKind, Sequence[OperationKind]] = {CAPTURE: (AUTHORIZE,), REFUND: (CHARGE,)}
STORIES = ((CHARGE, REFUND), (AUTHORIZE, CAPTURE, REFUND), (AUTHORIZE, VOID))

Story = Sequence[OperationKind]


class Manner(NamedTuple):
    """How webhooks come. `is_asked`: the sweep also queries what waits, so that no webhook is needed."""

    webhooks: Mapping[str, float] = MappingProxyType({})
    is_asked: bool = False
    fault: str | None = None
    """The fault that each operation's request meets."""
    refusals: int = 0
    """How many webhooks are answered with a 503 before one is taken."""


MANNERS = {
    "as they should": Manner(),
    "never": Manner({"lost": 1}, is_asked=True),
    "late": Manner({"delay_seconds": 1.5}, is_asked=True),
    "twice": Manner({"doubled": 1}),
    "in another order": Manner({"reordered": 1}),
    "before the answer": Manner(is_asked=True, fault="webhook_first"),
    "at the second attempt": Manner(refusals=2),
    "badly, and answers are lost": Manner(
        {"doubled": 1, "reordered": 1, "delay_seconds": 0.1}, is_asked=True, fault="cut_after", refusals=2
    ),
}


@dataclass
class Shop:
    """A worker with one provider and its webhooks. `pays_late`: the payer pays only while a query is under way."""

    provider: Provider
    worker: InProcessWorker
    database: "asyncpg.Pool[asyncpg.Record]"
    url: str
    pays_late: bool = False
    paid: set[UUID] = field(default_factory=set)

    def offers(self, story: Story) -> bool:
        known = self.worker.write_path._rules.gateways[self.provider.name]
        return known.operations.issuperset(story)

    async def live(self, story: Story, fault: str | None = None) -> UUID:
        """Play a payment with these operations, each sent when the one before has ended."""
        payment_id = new_payment_id()
        for number, kind in enumerate(story, start=1):
            await self.does(payment_id, number, kind, fault)
        return payment_id

    async def does(self, payment_id: UUID, number: int, kind: OperationKind, fault: str | None = None) -> None:
        """Run one operation from its command to its end."""
        if fault == "webhook_first":
            self.provider.fault(fault, None, payment_id, times=None, seconds=1)
        elif fault is not None:
            self.provider.fault(fault, self.provider.fails(kind) or "read", payment_id)
        await self.worker.accept(delivery(kind.value, payment_id, f"{payment_id}:{number}", **self.fields(kind)))
        await until(lambda: self.has_ended(payment_id, number))

    def fields(self, kind: OperationKind) -> dict[str, Any]:
        if kind not in (AUTHORIZE, CHARGE):
            return {}
        amount = self.provider.amount
        own = {"amount_minor": amount.minor, "currency": amount.currency}
        return own | {"payment_method": self.provider.payment_method}

    async def has_ended(self, payment_id: UUID, number: int) -> bool:
        """Whether the operation has ended or needs review. If it waits for its payer, the payer pays."""
        state = await self.state(payment_id, number)
        if state == "requires_action" and payment_id not in self.paid:
            await self._pay(payment_id)
        return state not in OPEN - {"needs_review"}

    async def state(self, payment_id: UUID, number: int) -> str:
        query = "SELECT state FROM operations WHERE payment_id = $1 AND number = $2"
        return str(await self.database.fetchval(query, payment_id, number))

    async def _pay(self, payment_id: UUID) -> None:
        self.paid.add(payment_id)
        if self.pays_late:
            await until(lambda: self._is_asked_about(payment_id))
        self.provider.pay(await self.asked(payment_id))

    async def asked(self, payment_id: UUID) -> RequiresAction:
        """The last action that the payer was asked for."""
        *_, told = [each for each in await self.events(payment_id) if "action" in each]
        return RequiresAction(told["provider_reference"], told["action"]["type"], told["action"]["url"])

    async def is_abandoned(self, payment_id: UUID, number: int, kind: OperationKind, fault: str | None) -> None:
        """Run one operation whose payer does not come, to its end. `fault` hits our cancellation, if we cancel it."""
        await self.worker.accept(delivery(kind.value, payment_id, f"{payment_id}:{number}", **self.fields(kind)))

        async def is_awaited() -> bool:
            return await self.state(payment_id, number) == "requires_action"

        async def has_expired() -> bool:
            await self.ask_again()
            return await self.state(payment_id, number) == "expired"

        await until(is_awaited)
        if fault is not None:
            self.provider.fault(fault, "cancel", payment_id)
        self.provider.abandon(await self.asked(payment_id))
        await until(has_expired)

    async def _is_asked_about(self, payment_id: UUID) -> bool:
        query = "SELECT bool_or(is_leased) FROM operations WHERE payment_id = $1"
        return bool(await self.database.fetchval(query, payment_id))

    async def events(self, payment_id: UUID) -> list[dict[str, Any]]:
        return await events_of(self.url, payment_id)

    async def ask_again(self) -> None:
        """Make every operation that will be queried due now, and sweep."""
        await self.database.execute("UPDATE operations SET due_at = now() WHERE due_at IS NOT NULL")
        await self.worker.sweep.sweep_once()
        await self.worker.idle()

    async def kinds(self, payment_id: UUID) -> list[str]:
        return [each["type"].split(".")[1] for each in await self.events(payment_id)]

    async def quiet(self) -> None:
        """Wait until all the provider's webhooks are delivered and applied."""

        async def is_quiet() -> bool:
            waiting = await self.database.fetchval("SELECT count(*) FROM inbox WHERE applied_at IS NULL")
            return not (waiting or self.provider.webhooks_under_way() or self.worker.dispatcher.waiting)

        await until(is_quiet)
        await self.worker.idle()

    async def check(self, payment_id: UUID, story: Story) -> None:
        """Check that every operation succeeded once, and that our books match the provider's, with no other amount."""
        query = """SELECT authorized_minor - captured_minor - released_minor, captured_minor, refunded_minor
                     FROM payments WHERE payment_id = $1"""
        ours = await self.database.fetchrow(query, payment_id)
        assert ours is not None
        assert tuple(ours) == self.provider.effect(payment_id)
        assert await self._ledger(payment_id) == [self.provider.amount.minor] * len(set(story) & set(MOVING))
        ends = Counter(each for each in await self.kinds(payment_id) if each not in ON_THE_WAY)
        assert ends == Counter(str(SUCCESS_EVENTS[kind]) for kind in story)

    async def _ledger(self, payment_id: UUID) -> list[int]:
        rows = await self.database.fetch("SELECT amount_minor FROM ledger WHERE payment_id = $1", payment_id)
        return [row["amount_minor"] for row in rows]


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with running_site() as site:
        yield site


@pytest.fixture(params=PROVIDERS)
def provider(request: pytest.FixtureRequest, site: Site) -> Iterator[Provider]:
    provider = PROVIDERS[request.param](str(site.http.base_url), site.http)
    provider.send_webhooks()
    yield provider
    provider.heal()
    provider.reset()


@asynccontextmanager
async def trading(site: Site, provider: Provider, postgres_url: str, manner: Manner) -> AsyncIterator[Shop]:
    """The whole service except Kafka."""
    settings = site.settings(
        provider.name, postgres_url=postgres_url, retry_first_delay_seconds=0.2, retry_delay_max_seconds=0.5
    )
    gateways = wiring.create_gateways(settings)
    gateway, rules = gateways[provider.name], wiring.create_rules(settings, gateways)
    database = await create_pool(postgres_url, size=2)
    async with (
        receiving(settings, site.port, manner.refusals),
        running_worker(postgres_url, gateway, sweeping=manner.is_asked, given=rules) as worker,
        applying(postgres_url, worker),
    ):
        provider.send_webhooks(**manner.webhooks)
        try:
            yield Shop(provider, worker, database, postgres_url, pays_late=manner.fault == "webhook_first")
        finally:
            database.terminate()
            await gateway.close()


class Refusing:
    """An app that answers the first `refusals` requests with a 503."""

    def __init__(self, app: ASGIApp, refusals: int) -> None:
        self._app = app
        self._refusals = refusals

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._refusals -= 1
        await (self._app if self._refusals < 0 else Response(status_code=503))(scope, receive, send)


@asynccontextmanager
async def receiving(settings: Settings, port: int, refusals: int) -> AsyncIterator[None]:
    """The webhook endpoint on this port; it refuses the first `refusals` requests."""
    service = WebhookService(settings)
    with socket.create_server(("127.0.0.1", port)) as listener:
        app = Refusing(Starlette(routes=service.routes()), refusals)
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off"))
        storing, serving = asyncio.create_task(service.run()), asyncio.create_task(server.serve(sockets=[listener]))

        async def is_ready() -> bool:
            return server.started and await service.checks()["webhooks"]() is None

        await until(is_ready)
        try:
            yield
        finally:
            server.should_exit = True
            await serving
            storing.cancel()
            await asyncio.gather(storing, return_exceptions=True)


def disagreements(provider: Provider) -> float:
    return float(metrics.NOTICES_DISAGREEING.labels(provider.name)._value.get())


@pytest.mark.parametrize("manner", MANNERS)
async def test_however_webhooks_come_all_ends_well_once_and_the_books_agree(
    site: Site, provider: Provider, postgres_url: str, manner: str
) -> None:
    given = MANNERS[manner]
    before, stale = disagreements(provider), metrics.STALE_ANSWERS._value.get()
    async with trading(site, provider, postgres_url, given) as shop:
        stories = [each for each in STORIES if shop.offers(each)]
        payments = await asyncio.gather(*(shop.live(each, given.fault) for each in stories))
        await shop.quiet()
        for payment_id, story in zip(payments, stories, strict=True):
            await shop.check(payment_id, story)
            assert "needs_review" not in await shop.kinds(payment_id)
        heard = await shop.database.fetchval("SELECT count(*) FROM inbox")
        assert bool(heard) == (manner != "never")
    assert disagreements(provider) == before
    if given.fault == "webhook_first":
        assert metrics.STALE_ANSWERS._value.get() > stale, "no webhook was faster than the answer"


@pytest.mark.parametrize("manner", MANNERS)
async def test_an_abandoned_payment_expires_once_and_can_be_tried_again_however_webhooks_come(
    site: Site, provider: Provider, postgres_url: str, manner: str
) -> None:
    if not provider.tells_of_abandoned:
        pytest.skip("no payer is awaited, or nobody tells that it was in vain")
    given, stale = MANNERS[manner], metrics.STALE_ANSWERS._value.get()
    async with trading(site, provider, postgres_url, given) as shop:
        payment_id = new_payment_id()
        await shop.is_abandoned(payment_id, 1, CHARGE, given.fault)
        await shop.quiet()
        assert await shop.kinds(payment_id) == ["requires_action", "expired"]
        assert provider.effect(payment_id) == (0, 0, 0)
        await shop.does(payment_id, 2, CHARGE)
        await shop.quiet()
        assert await shop.kinds(payment_id) == ["requires_action", "expired", "requires_action", "captured"]
        assert provider.effect(payment_id) == (0, provider.amount.minor, 0)
    if given.fault == "webhook_first" and provider.name == "stripe":
        assert metrics.STALE_ANSWERS._value.get() > stale, "no webhook was faster than the answer"


@pytest.mark.parametrize("kind", [AUTHORIZE, CHARGE, CAPTURE, REFUND])
async def test_a_webhook_of_another_amount_is_for_a_person_and_ends_nothing(
    site: Site, provider: Provider, postgres_url: str, kind: OperationKind
) -> None:
    if kind not in provider.tells:
        pytest.skip("its webhooks tell no amount of that")
    before = BEFORE.get(kind, ())
    async with trading(site, provider, postgres_url, Manner()) as shop:
        payment_id = await shop.live(before)
        await shop.quiet()
        provider.send_webhooks(amount_off_by=1)
        await shop.does(payment_id, len(before) + 1, kind, "webhook_first")
        await shop.worker.idle()
        assert "needs_review" in await shop.kinds(payment_id)
        await shop.ask_again()
        await shop.check(payment_id, (*before, kind))
        assert (await shop.kinds(payment_id))[-2:] == ["needs_review", SUCCESS_EVENTS[kind]]


async def test_a_late_webhook_of_another_amount_changes_nothing_and_is_counted(
    site: Site, provider: Provider, postgres_url: str
) -> None:
    before = disagreements(provider)
    async with trading(site, provider, postgres_url, Manner({"delay_seconds": 3, "amount_off_by": 1}, True)) as shop:
        stories = [each for each in STORIES if shop.offers(each)]
        payments = await asyncio.gather(*map(shop.live, stories))
        told = sum(kind in provider.tells for story in stories for kind in story)

        async def are_counted() -> bool:
            return disagreements(provider) == before + told

        await until(are_counted)
        for payment_id, story in zip(payments, stories, strict=True):
            await shop.check(payment_id, story)
            assert "needs_review" not in await shop.kinds(payment_id)
