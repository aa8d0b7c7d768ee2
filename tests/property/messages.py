"""A story of one payment at a provider's simulator: what its API answered, and the webhooks that it sent about it.

`Recorder.record` plays the story once, in order, with the real gateway. `tests.property.test_provider_messages` replays
the recorded answers and webhooks in other orders. The service's own reader reads each webhook as it came over the wire,
including its signature.
"""

import asyncio
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from uuid import UUID

from app import wiring
from app.settings import Settings
from domain.commands import OperationKind
from domain.decision import Answer, Delivery, Notified
from domain.notices import Notice, WebhookReader, WebhookRequest
from domain.operations import GatewayRequest, OperationState, Outcome, RequiresAction
from domain.ports import Gateway
from domain.rules import Rules
from tests.contract.providers import Provider
from tests.support.memory import MemoryShell
from tests.support.service import delivery, new_payment_id


class Post:
    """Where the simulators send webhooks; accepts and keeps all of them."""

    def __init__(self) -> None:
        self.received: list[WebhookRequest] = []

    def take(self) -> list[WebhookRequest]:
        """Take the webhooks that came since the last call."""
        taken, self.received = self.received, []
        return taken


@contextmanager
def open_post(port: int) -> Iterator[Post]:
    """Listen on this port until the block ends."""
    post = Post()

    class Handler(BaseHTTPRequestHandler):
        def _accept(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            headers = {name.lower(): value for name, value in self.headers.items()}
            query = self.path.partition("?")[2]
            post.received.append(WebhookRequest(self.command, query, headers, body, datetime.now(UTC)))
            answer = json.dumps({"RspCode": "00"}).encode()  # VNPay reads the body, the others the status
            self.send_response(200)
            self.send_header("content-length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        do_GET = do_POST = _accept

        def log_message(self, *_: Any) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        yield post
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@dataclass
class Call:
    """What the API answers, and the webhooks that the call causes if it is the first one to get through."""

    outcome: Outcome
    told: list[Notice]


@dataclass
class Step:
    """One of our operations, or an event from outside. `payer`: the webhooks once the payer has acted, if one has to.

    Until the payer has acted the API answers with `first`, from then on with `then`. An event from outside has neither.
    """

    name: str
    command: Delivery | None = None
    first: Call | None = None
    payer: list[Notice] | None = None
    then: Call | None = None
    outside: list[Notice] = field(default_factory=list)

    def told(self) -> list[Notice]:
        """All webhooks about this step."""
        calls = [call.told for call in (self.first, self.then) if call is not None]
        return [notice for told in (*calls, self.payer or [], self.outside) for notice in told]


@dataclass
class Recording:
    """A story as it was played in order, and its end."""

    rules: Rules
    payment_id: UUID
    steps: list[Step]
    end: Any


def end_of(shell: MemoryShell) -> Any:
    """The part of the final state that must not depend on the order."""
    (payment,) = shell.payments.values()
    amounts = ("authorized", "captured", "released", "refunded", "disputed", "reserved_capture", "reserved_refund")
    accounts: dict[str, int] = {}
    for transfer in shell.booked:
        accounts[transfer.debit] = accounts.get(transfer.debit, 0) + transfer.amount_minor
        accounts[transfer.credit] = accounts.get(transfer.credit, 0) - transfer.amount_minor
    return {
        "amounts": {name: getattr(payment, f"{name}_minor") for name in amounts},
        "status": payment.status,
        "disputes": payment.disputes,
        "operations": {number: str(each.state) for (_, number), each in sorted(shell.all_operations.items())},
        "accounts": {name: balance for name, balance in sorted(accounts.items()) if balance},
    }


def heard(shell: MemoryShell, payment_id: UUID, notice: Notice) -> list[GatewayRequest] | None:
    """Apply a webhook. None if it would be refused because its payment cannot be found yet."""
    if notice.payment_id is None and not _names(shell, payment_id, notice.gateway_payment_id):
        return None
    return shell.apply([Notified(1, payment_id, notice)])


def _names(shell: MemoryShell, payment_id: UUID, reference: str | None) -> bool:
    own = [each.reference for each in shell.all_operations.values()]
    return reference is not None and reference in (shell.payments[payment_id].gateway_payment_id, *own)


@dataclass
class Recorder:
    """Plays a story at one provider, whose webhooks arrive at `post`."""

    provider: Provider
    gateway: Gateway
    reader: WebhookReader
    post: Post
    rules: Rules

    async def record(self, story: Sequence[str]) -> Recording:
        shell, payment_id, steps = MemoryShell(self.rules), new_payment_id(), []
        for number, name in enumerate(story, start=1):
            step = Step(name)
            steps.append(step)
            if name in self.provider.outside:
                reference = shell.payments[payment_id].gateway_payment_id
                assert reference is not None, "there is a payment"
                self.provider.happens(name, reference)
                step.outside = await self._told(shell, payment_id)
            else:
                await self._operation(shell, payment_id, number, step)
        self._check(shell, payment_id, steps)
        return Recording(self.rules, payment_id, steps, end_of(shell))

    def _check(self, shell: MemoryShell, payment_id: UUID, steps: list[Step]) -> None:
        """Check that the story is worth replaying: it ended as in the provider's books, and webhooks reported it."""
        assert not [each for each in shell.all_operations.values() if each.is_open]
        payment = shell.payments[payment_id]
        held = payment.authorized_minor - payment.captured_minor - payment.released_minor
        assert (held, payment.captured_minor, payment.refunded_minor) == self.provider.effect(payment_id)
        for step in steps:
            told = [each for each in step.told() if each.outcome is not None or each.dispute is not None]
            assert told or step.name not in {*self.provider.tells, *self.provider.outside}, f"nobody told of {step}"

    async def _operation(self, shell: MemoryShell, payment_id: UUID, number: int, step: Step) -> None:
        kind, _, payer = step.name.partition(" ")
        step.command = self._command(OperationKind(kind), payment_id, number, is_refused=payer == "refused")
        (request,) = shell.apply([step.command])
        step.first = await self._call(shell, request)
        outcome = step.first.outcome
        if isinstance(outcome, RequiresAction):
            act = {"refused": self.provider.refuse, "abandoned": self.provider.abandon}.get(payer, self.provider.pay)
            act(outcome)
            step.payer = await self._told(shell, payment_id)
            if shell.all_operations[payment_id, number].is_open:
                (request,) = shell.claim(payment_id, number)
            asked = request._replace(state=OperationState.REQUIRES_ACTION, reference=outcome.reference)
            step.then = await self._call(shell, asked)

    def _command(self, kind: OperationKind, payment_id: UUID, number: int, *, is_refused: bool) -> Delivery:
        provider, fields = self.provider, {}
        if kind in (OperationKind.AUTHORIZE, OperationKind.CHARGE):
            method = (provider.declined_method if is_refused else None) or provider.payment_method
            money = {"amount_minor": provider.amount.minor, "currency": provider.amount.currency}
            fields = {**money, "payment_method": method}
        return delivery(kind.value, payment_id, f"key-{number}", **fields)

    async def _call(self, shell: MemoryShell, request: GatewayRequest) -> Call:
        method = "resume" if request.state is OperationState.REQUIRES_ACTION else request.kind.value
        outcome: Outcome = await getattr(self.gateway, method)(request)
        shell.apply([Answer(request.payment_id, request.operation_number, request.lease_token, outcome)])
        return Call(outcome, await self._told(shell, request.payment_id))

    async def _told(self, shell: MemoryShell, payment_id: UUID) -> list[Notice]:
        """The provider's webhooks about what has just happened, applied at once, in order."""
        while self.provider.webhooks_under_way():
            await asyncio.sleep(0.005)
        notices = [await self.reader.read(each) for each in self.post.take()]
        for notice in notices:
            heard(shell, payment_id, notice)
        return notices


def recorder_of(settings: Settings, provider: Provider, post: Post) -> Recorder:
    """A recorder built from the service's own gateway, reader and rules."""
    gateways, readers = wiring.create_gateways(settings), wiring.create_webhook_readers(settings)
    rules = wiring.create_rules(settings, gateways)
    return Recorder(provider, gateways[provider.name], readers[provider.name], post, rules)
