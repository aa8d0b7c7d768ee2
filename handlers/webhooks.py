"""Webhooks: verified, stored, and only then answered as the provider demands; the workers apply them later.

Webhooks that arrive together are stored together, in one statement.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Final, NamedTuple

import structlog

from domain.errors import InputRefusedByStore, StoreUnavailable
from domain.notices import BODY_BYTES_MAX, Notice, Verdict, WebhookAnswer, WebhookReader, WebhookRefused, WebhookRequest
from domain.operations import OPEN, Succeeded
from domain.ports import Accepted, Received
from handlers import metrics
from handlers.messages.notices import write_notice

log = structlog.get_logger(__name__)

BATCH_MAX: Final = 200
GATHER_SECONDS: Final = 0.002
ENDED: Final = "this process ends"


Accept = Callable[[Sequence[Received]], Awaitable[list[Accepted]]]
"""`domain.ports.Inbox.accept`."""


class _Waiting(NamedTuple):
    notice: Notice
    received: Received
    verdict: "asyncio.Future[Verdict]"


class Webhooks:
    """Receives the webhooks of every gateway that sends any. `run` must be running at the same time."""

    def __init__(self, *, readers: Mapping[str, WebhookReader], accept: Accept) -> None:
        self._readers = readers
        self._accept_all = accept
        self._waiting: list[_Waiting] = []
        self._arrived = asyncio.Event()
        self._has_ended = False

    @property
    def gateways(self) -> frozenset[str]:
        """The gateways whose webhooks are received here."""
        return frozenset(self._readers)

    async def receive(self, gateway: str, request: WebhookRequest) -> WebhookAnswer:
        """Store a genuine webhook, and return the answer for its sender. Nothing else changes here."""
        reader = self._readers[gateway]
        verdict = await self._verdict(reader, request)
        metrics.WEBHOOKS.labels(gateway, verdict.value).inc()
        return reader.answer(verdict, request)

    async def _verdict(self, reader: WebhookReader, request: WebhookRequest) -> Verdict:
        if len(request.body) > BODY_BYTES_MAX or len(request.query) > BODY_BYTES_MAX:
            return Verdict.TOO_LARGE
        try:
            notice = await reader.read(request)
            # `WebhookReader.read` promises that this is what it verified.
            return await self._store(notice, request.body or request.query.encode())
        except WebhookRefused as refused:
            log.warning("webhook refused", gateway=reader.gateway, verdict=refused.verdict, detail=refused.detail)
            return refused.verdict
        except (ValueError, RecursionError) as error:
            # Text that no parser or encoder accepts. Its content is not logged: anybody may have sent it.
            log.warning(
                "webhook refused", gateway=reader.gateway, verdict=Verdict.MALFORMED, error=type(error).__name__
            )
            return Verdict.MALFORMED
        except StoreUnavailable as error:
            log.warning("webhook not stored", gateway=reader.gateway, error=str(error))
            return Verdict.UNAVAILABLE

    async def _store(self, notice: Notice, body: bytes) -> Verdict:
        if self._has_ended:
            raise StoreUnavailable(ENDED)
        waiting = _Waiting(notice, _received(notice, body), asyncio.get_running_loop().create_future())
        self._waiting.append(waiting)
        self._arrived.set()
        return await waiting.verdict

    async def run(self) -> None:
        """Store what arrives, until cancelled. Senders that wait then, or come later, are told to send again."""
        batch: list[_Waiting] = []
        try:
            while True:
                await self._arrived.wait()
                await asyncio.sleep(GATHER_SECONDS)
                batch, self._waiting = self._waiting[:BATCH_MAX], self._waiting[BATCH_MAX:]
                if not self._waiting:
                    self._arrived.clear()
                await self._accept(batch)
        finally:
            self._has_ended = True
            _fail(batch + self._waiting, StoreUnavailable(ENDED))

    async def _accept(self, batch: list[_Waiting]) -> None:
        try:
            accepted = await self._accept_all([each.received for each in batch])
        except InputRefusedByStore as error:
            await self._part(batch, error)
            return
        except Exception as error:
            # Whatever the error is, the senders are told to send again: nothing was answered as stored.
            _fail(batch, StoreUnavailable(str(error)))
            return
        for each, known in zip(batch, accepted, strict=True):
            if not each.verdict.done():
                each.verdict.set_result(_judge(each.notice, known))

    async def _part(self, batch: list[_Waiting], error: InputRefusedByStore) -> None:
        """Find the webhook that cannot be stored by bisection, as the write path does: its neighbours are stored."""
        if len(batch) == 1:
            _fail(
                batch,
                WebhookRefused(Verdict.MALFORMED, f"signed, but cannot be stored ({type(error.__cause__).__name__})"),
            )
            return
        middle = len(batch) // 2
        await self._accept(batch[:middle])
        await self._accept(batch[middle:])


def _fail(batch: list[_Waiting], error: Exception) -> None:
    for each in batch:
        if not each.verdict.done():
            each.verdict.set_exception(error)


def _received(notice: Notice, body: bytes) -> Received:
    return Received(
        gateway=notice.gateway,
        event_id=notice.event_id,
        type=notice.type,
        content=write_notice(notice),
        body=body,
        payment_id=notice.payment_id,
        operation_number=notice.operation_number,
        gateway_payment_id=notice.gateway_payment_id,
        is_about_nothing=notice.is_about_nothing,
    )


def _judge(notice: Notice, known: Accepted) -> Verdict:
    if notice.is_about_nothing:
        return Verdict.STORED if known.is_new else Verdict.DUPLICATE
    if known.payment_id is None:
        return Verdict.UNKNOWN_PAYMENT
    if _differs(notice, known):
        return Verdict.AMOUNT_DIFFERS
    if not known.is_new:
        return Verdict.DUPLICATE
    return Verdict.STORED if known.state is None or known.state in OPEN else Verdict.ALREADY_FINAL


def _differs(notice: Notice, known: Accepted) -> bool:
    """Whether the notice reports a success in another amount or currency than ours."""
    outcome = notice.outcome
    if not isinstance(outcome, Succeeded) or known.amount_minor is None:
        return False
    amount, currency = outcome.amount_minor, notice.currency
    return amount not in (None, known.amount_minor) or currency not in (None, known.currency)
