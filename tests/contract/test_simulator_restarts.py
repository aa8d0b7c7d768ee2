"""A simulator that is killed goes on where it stopped, with its books, keys and webhooks that were not accepted."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from subprocess import Popen
from threading import Thread
from typing import Any

import httpx
import pytest

from app import wiring
from app.up import simulated
from domain.commands import OperationKind
from domain.notices import WebhookReader, WebhookRequest
from domain.operations import GatewayRequest, OperationState, Succeeded
from infra.local.server import free_port
from tests.contract.providers import PROVIDERS, Provider
from tests.contract.test_every_gateway import Till
from tests.support.sandbox import start_sandbox
from tests.support.site import Site
from tests.support.waiting import until

AUTHORIZE, CHARGE, CAPTURE, _VOID, REFUND = OperationKind
STORIES = ((CHARGE, REFUND), (AUTHORIZE, CAPTURE))


class Listener(BaseHTTPRequestHandler):
    """Receives webhooks; answers with a 503 while its `Mailbox` is closed. VNPay requires the answer's text."""

    server: "Mailbox"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        headers = {name.lower(): value for name, value in self.headers.items()}
        query = self.path.partition("?")[2]
        self.server.received.append(WebhookRequest(self.command, query, headers, body, datetime.now(UTC)))
        answer = b'{"RspCode": "00"}'
        self.send_response(200 if self.server.is_open else 503)
        self.send_header("content-length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    do_GET = do_POST

    def log_message(self, *_: object) -> None:
        """Nothing is printed."""


class Mailbox(ThreadingHTTPServer):
    """Keeps all webhooks that came, accepted or not."""

    def __init__(self, port: int) -> None:
        super().__init__(("127.0.0.1", port), Listener)
        self.is_open = True
        self.received: list[WebhookRequest] = []

    async def heard(self, reader: WebhookReader) -> Counter[str]:
        """How often each event came, by its id. Fails if a webhook is not signed as the provider signs."""
        return Counter([(await reader.read(each)).event_id for each in self.received])


@dataclass
class Killable:
    """The simulators, which can be killed and started again at the same address, and the gateway of one of them."""

    site: Site
    name: str
    state_file: Path
    _running: list[Popen[bytes]] = field(default_factory=list)

    def start(self) -> None:
        url = f"http://127.0.0.1:{self.site.port}/webhooks"
        port, environment = self.site.http.base_url.port, self.site.environment
        assert port is not None, "a free one was taken"
        self._running.append(start_sandbox(port, self.state_file, webhooks_to=url, environment=environment))

    def kill(self) -> None:
        """Kill the simulators, as if in the middle of writing a line to each of their files."""
        process = self._running.pop()
        process.kill()
        process.wait(10)
        for journal in self.state_file.parent.iterdir():
            with journal.open("a") as file:
                file.write('{"cut sh')

    def stop(self) -> None:
        for process in self._running:
            process.terminate()
            process.wait(10)

    def settings(self) -> Any:
        return self.site.settings(self.name.partition(",")[0])

    def provider(self) -> Provider:
        return PROVIDERS[self.name](str(self.site.http.base_url), self.site.http)

    def till(self) -> Till:
        """The provider's gateway with new connections."""
        [gateway] = wiring.create_gateways(self.settings()).values()
        return Till(self.provider(), gateway)

    def reader(self) -> WebhookReader:
        [reader] = wiring.create_webhook_readers(self.settings()).values()
        return reader

    def totals(self) -> Any:
        return self.site.http.get("/_sandbox/all").raise_for_status().json()


@pytest.fixture
def mailbox() -> Iterator[Mailbox]:
    with Mailbox(free_port()) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@contextmanager
def simulators(name: str, mailbox: Mailbox, state_file: Path) -> Iterator[Killable]:
    url, own = f"http://127.0.0.1:{free_port()}", f"http://127.0.0.1:{mailbox.server_port}"
    with httpx.Client(base_url=url, timeout=10) as http:
        running = Killable(Site(http, mailbox.server_port, simulated(url, own)), name, state_file)
        running.start()
        try:
            yield running
        finally:
            running.stop()


async def lived(till: Till, story: Sequence[OperationKind]) -> list[GatewayRequest]:
    """Run a payment of these two operations; return their requests with the provider's references."""
    opening = till.a(story[0])
    opened = await till.finish(opening)
    assert isinstance(opened, Succeeded), opened
    then = till.follow_up(opening, opened.reference, story[1])
    done = await till.finish(then)
    assert isinstance(done, Succeeded), done
    return [opening._replace(reference=opened.reference), then._replace(reference=done.reference)]


async def asked_again(till: Till, request: GatewayRequest) -> None:
    """Repeat the request with its key if the provider knows keys; otherwise query it."""
    state = OperationState.DISPATCHED if till.knows_keys else OperationState.PENDING
    outcome = await till.finish(request._replace(state=state, attempts=1))
    assert isinstance(outcome, Succeeded), outcome
    assert outcome.reference == request.reference


@pytest.mark.parametrize("name", ["stripe", "paypal", "vnpay", "momo"])
async def test_a_killed_simulator_remembers_money_keys_and_what_it_has_to_tell(
    name: str, mailbox: Mailbox, tmp_path: Path
) -> None:
    with simulators(name, mailbox, tmp_path / "books.jsonl") as running:
        till, reader, provider = running.till(), running.reader(), running.provider()

        async def is_all_told() -> bool:
            return provider.webhooks_under_way() == 0

        async def is_all_refused() -> bool:
            return len(await mailbox.heard(reader)) == provider.webhooks_under_way() > 0

        await lived(till, STORIES[0])
        await until(is_all_told)
        mailbox.received.clear()
        mailbox.is_open = False
        offered = [each for each in STORIES if till.gateway.capabilities.operations.issuperset(each)]
        requests = [request for story in offered for request in await lived(till, story)]
        await until(is_all_refused)
        owed, books = set(await mailbox.heard(reader)), running.totals()
        effects = [till.effect(each) for each in requests]
        await till.gateway.close()
        await reader.close()
        running.kill()
        mailbox.received.clear()
        mailbox.is_open = True

        running.start()
        till, reader = running.till(), running.reader()
        for request in requests:
            if request.kind is not AUTHORIZE:  # MoMo's answer for it is about the capture by now
                await asked_again(till, request)
        assert running.totals() == books
        assert [till.effect(each) for each in requests] == effects
        await until(is_all_told)
        assert await mailbox.heard(reader) == Counter(owed)
        await till.gateway.close()
        await reader.close()
