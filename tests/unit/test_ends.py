"""However a batch or a process ends, saved requests are sent and started calls are waited for."""

import asyncio
import time
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any
from unittest.mock import AsyncMock, Mock, create_autospec
from uuid import UUID, uuid4

import pytest
from aiokafka.errors import IllegalStateError
from structlog.testing import capture_logs

from app.loops import Loops
from app.wiring import Calling
from domain.commands import OperationKind
from domain.decision import Answer, Input
from domain.errors import StoreUnavailable
from domain.notices import Notice
from domain.operations import GatewayRequest, Outcome, Succeeded, Unreachable
from domain.ports import Inbox, RecentKeys, StoredNotice
from domain.rules import Rules
from handlers import consumer
from handlers.apply_notices import NoticeApplier
from handlers.consumer import CommandConsumer
from handlers.dispatch import PROCESS_ENDS, Dispatcher
from handlers.leases import Leases
from handlers.messages.notices import write_notice
from handlers.pace import Pace
from handlers.settle import Settler
from handlers.write_path import Applied, SavedInPart, WritePath
from tests.support.dispatching import FAST, NOW, NoStore, ScriptedGateway, request
from tests.support.service import body

POISON = uuid4()
"""The payment of the input that Postgres refuses."""


def answer(payment_id: UUID | None = None) -> Answer:
    return Answer(payment_id or uuid4(), 1, 1, Succeeded("ref"))


class HalfSaving(WritePath):
    """Postgres refuses a batch with POISON in it, is away for one call once the first half is saved, and then back."""

    def __init__(self) -> None:
        super().__init__(
            store=Mock(),
            rules=create_autospec(Rules),
            clock=lambda: NOW,
            new_id=uuid4,
            recent=create_autospec(RecentKeys),
        )
        self.saved: list[Input] = []
        self.begun: list[GatewayRequest] = []
        self.is_away = False

    async def _apply_whole(self, inputs: Sequence[Input]) -> list[GatewayRequest]:
        if self.is_away:
            self.is_away = False
            raise StoreUnavailable("Postgres is away")
        if any(each.payment_id == POISON for each in inputs):
            raise ValueError("a row that no constraint takes")
        self.saved += inputs
        self.is_away = len(self.saved) == 2
        self.begun += (requests := [request() for _ in inputs])
        return requests


BATCH = [answer(), answer(), answer(), answer(POISON)]


async def test_a_partly_saved_batch_raises_with_the_requests_already_saved() -> None:
    path = HalfSaving()
    with pytest.raises(SavedInPart) as part:
        await path.apply(BATCH)
    assert (part.value.requests, len(path.saved)) == (path.begun, 2)


async def test_a_consumer_sends_it() -> None:
    path, sent = HalfSaving(), list[GatewayRequest]()
    dispatcher = create_autospec(Dispatcher, instance=True)
    dispatcher.submit.side_effect = sent.extend
    reads = CommandConsumer(
        write_path=path, dispatcher=dispatcher, dead_letters=Mock(), backlog=Mock(), retries_before_parking=0
    )
    values = [body("charge", each, f"key of {each}") for each in (uuid4(), uuid4(), uuid4(), POISON)]
    message: Any = Mock(raw_message=[SimpleNamespace(value=each, headers=()) for each in values], nack=AsyncMock())
    await reads._on_batch(message)
    assert sent == path.begun
    message.nack.assert_awaited_once()


async def test_a_settler_sends_it_and_goes_on_trying() -> None:
    path, sent = HalfSaving(), list[GatewayRequest]()
    settler = Settler(write_path=path, submit=sent.extend, leases=create_autospec(Leases, instance=True))
    for each in BATCH:
        settler.add(each)
    await settler.settle_some()
    assert sent == path.begun
    assert {each for each in path.saved if isinstance(each, Answer)} == set(BATCH[:-1])


async def test_a_notice_applier_sends_it() -> None:
    begun, sent = [request()], list[GatewayRequest]()
    path = create_autospec(WritePath, instance=True)
    path.apply.side_effect = SavedInPart(begun, StoreUnavailable("Postgres is away"))
    inbox = create_autospec(Inbox, instance=True)
    content = write_notice(Notice("stripe", "evt_1", "any"))
    inbox.claim.return_value = [StoredNotice(1, uuid4(), "stripe", "evt_1", "any", None, content)]
    with pytest.raises(StoreUnavailable):
        await NoticeApplier(inbox=inbox, write_path=path, submit=sent.extend).apply_once()
    assert sent == begun


class FollowedUp:
    """A worker's dispatcher and settler; saving the answer to a payment's first operation starts its second."""

    def __init__(self, takes_seconds: float) -> None:
        async def take(_: GatewayRequest) -> Outcome:
            await asyncio.sleep(takes_seconds)
            return Succeeded("x")

        self.gateway = ScriptedGateway(take)
        self.leases = leases = Leases(store=NoStore(), lease=timedelta(seconds=60))  # type: ignore[arg-type]
        self.dispatcher = Dispatcher(
            gateways={"books": self.gateway},
            limits={"books": 8},
            store=NoStore(),  # type: ignore[arg-type]
            clock=lambda: datetime.now(UTC),
            leases=leases,
            paces={"books": Pace(time.monotonic, self.gateway, FAST)},
        )
        self.path = create_autospec(WritePath, instance=True)
        self.path.apply.side_effect = self._apply
        self.saved: list[tuple[int, Outcome]] = []
        self.settler = Settler(write_path=self.path, submit=self.dispatcher.submit, leases=leases)
        self.dispatcher.on_answer = self.settler.add

    async def _apply(self, answers: Sequence[Answer]) -> Applied:
        await asyncio.sleep(0.01)
        self.saved += [(each.operation_number, each.outcome) for each in answers]
        first = [each for each in answers if each.operation_number == 1]
        return Applied([request(payment_id=each.payment_id, operation_number=2) for each in first])

    async def shut_down(self) -> None:
        """Shut down the way a worker does."""
        intakes: Any = {name: AsyncMock() for name in ("sweep", "applier", "consumer")}
        loops = Loops(Calling(self.dispatcher, self.settler, self.leases), **intakes)
        loops.begin(asyncio.sleep(60))
        self.dispatcher.submit([request(kind=OperationKind.AUTHORIZE)])
        await asyncio.sleep(0.02)
        await loops.end(AsyncMock())


async def test_a_call_that_begins_while_a_worker_ends_is_waited_for() -> None:
    worker = FollowedUp(takes_seconds=0.1)
    await worker.shut_down()
    assert worker.saved == [(1, Succeeded("x")), (2, Succeeded("x"))]
    assert worker.dispatcher.waiting == 0


async def test_a_request_submitted_after_the_drain_time_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.loops.DRAIN_SECONDS", 0.05)
    worker = FollowedUp(takes_seconds=60)
    await worker.shut_down()
    assert worker.saved == [], "its call outlasts the time"
    worker.dispatcher.submit([request()])
    (given,) = worker.settler._pending
    assert given.outcome == Unreachable(PROCESS_ENDS)


async def test_a_worker_ends_in_good_order_though_postgres_is_away_and_tells_how_many_answers_it_leaves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("app.loops.DRAIN_SECONDS", 0.05)
    worker = FollowedUp(takes_seconds=0)
    worker.path.apply.side_effect = StoreUnavailable("Postgres is away")
    worker.dispatcher.submit([request(), request()])
    with capture_logs() as logs:
        await worker.shut_down()
    told = [each for each in logs if each["event"] == "answers left unsaved; their leases run out"]
    assert [(each["log_level"], each["answers"]) for each in told] == [("warning", 3)]


async def test_a_worker_ends_in_time_though_postgres_answers_neither_a_save_nor_its_cancellation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("app.loops.DRAIN_SECONDS", 0.05)
    worker, thaw = FollowedUp(takes_seconds=0), asyncio.Event()

    async def hang(_: object) -> Applied:
        try:
            await asyncio.sleep(60)
        finally:
            await thaw.wait()  # As asyncpg waits for the server at the end of a transaction.
        return Applied()

    worker.path.apply.side_effect = hang
    with capture_logs() as logs:
        async with asyncio.timeout(5):
            await worker.shut_down()
    assert "answers left unsaved; their leases run out" in [each["event"] for each in logs]
    thaw.set()


async def test_a_settler_that_is_cancelled_keeps_what_it_was_saving_before_what_came_since() -> None:
    path, started = create_autospec(WritePath, instance=True), asyncio.Event()

    async def hang(_: object) -> None:
        started.set()
        await asyncio.Event().wait()

    path.apply.side_effect = hang
    leases = create_autospec(Leases, instance=True)
    settler, first, later = Settler(write_path=path, submit=Mock(), leases=leases), answer(), answer()
    settler.add(first)
    running = asyncio.create_task(settler.settle_some())
    await started.wait()
    settler.add(later)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert (settler._pending, settler.waiting) == ([first, later], 2)
    leases.release.assert_not_called()


async def test_a_batch_of_which_a_partition_has_moved_is_postponed_without_an_error() -> None:
    write_path = create_autospec(WritePath, instance=True)
    write_path.apply.side_effect = StoreUnavailable("away")
    reading = consumer.CommandConsumer(
        write_path=write_path, dispatcher=Mock(), dead_letters=Mock(), backlog=Mock(), retries_before_parking=0
    )
    reading._retry = Mock(next_seconds=lambda: 0.0)
    nack = AsyncMock(side_effect=IllegalStateError("No current assignment for partition"))
    await reading.on_batch(Mock(raw_message=(), nack=nack))
    nack.assert_awaited_once()
