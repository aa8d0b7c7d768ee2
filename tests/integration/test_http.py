"""The HTTP process: health that names the failing part, one page of metrics, and a document that needs no network."""

import asyncio
import re
import sys
from collections.abc import Awaitable, Callable
from functools import partial

import httpx
import pytest
import yaml
from prometheus_client import REGISTRY
from prometheus_client.parser import text_string_to_metric_families
from starlette.applications import Starlette
from starlette.types import ASGIApp

from app.health import CHECK_TIMEOUT_SECONDS, Checks, create_process_app, troubles
from app.http import CONTENT_SECURITY_POLICY, STATIC_DIR, create_http_app
from app.peers import Peers
from app.process import REQUESTS_END_WITHIN
from infra.local.server import free_port
from tests.support.webhooks import served

NO_CHECKS: Checks = {}
NO_PEERS: Peers = {}
ABSOLUTE_URL = re.compile(r"""(?:src|href|action)\s*=\s*["']?(?:[a-z]+:)?//|url\(\s*["']?(?:[a-z]+:)?//|@import""")


async def ready() -> str | None:
    return None


async def away() -> str | None:
    return "connection refused"


async def broken() -> str | None:
    raise OSError("postgresql://user:secret@host")


async def silent() -> str | None:
    await asyncio.Event().wait()
    return None


async def stubborn() -> str | None:
    """Like a query to a frozen Postgres: it takes long to cancel."""
    try:
        return await silent()
    finally:
        await asyncio.sleep(5)


async def get(app: Starlette, path: str) -> httpx.Response:
    client = httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://payments")
    async with app.router.lifespan_context(app), client:
        return await client.get(path)


def up(text: str) -> dict[str, float]:
    """Each process, and whether the page reports it as up."""
    families = {family.name: family for family in text_string_to_metric_families(text)}
    return {sample.labels["process"]: sample.value for sample in families["payments_process_up"].samples}


async def test_liveness_asks_no_part() -> None:
    answer = await get(create_http_app(checks={"postgres": silent}, peers=NO_PEERS), "/health/live")
    assert answer.status_code == 200


async def test_readiness_is_200_when_every_part_is_ready() -> None:
    answer = await get(create_process_app(checks={"postgres": ready, "kafka": ready}), "/health/ready")
    assert (answer.status_code, answer.json()) == (
        200,
        {"ready": True, "parts": {"postgres": "ready", "kafka": "ready"}},
    )


async def test_readiness_names_the_part_that_is_not_ready() -> None:
    answer = await get(create_http_app(checks={"postgres": ready, "kafka": away}, peers=NO_PEERS), "/health/ready")
    assert answer.status_code == 503
    assert answer.json() == {"ready": False, "parts": {"postgres": "ready", "kafka": "connection refused"}}


async def test_a_check_that_breaks_shows_no_secret() -> None:
    answer = await get(create_http_app(checks={"postgres": broken}, peers=NO_PEERS), "/health/ready")
    assert answer.json()["parts"] == {"postgres": "check failed: OSError"}


async def test_a_check_that_a_library_cancels_is_a_part_that_is_not_ready() -> None:
    async def cancelled() -> str | None:
        raise asyncio.CancelledError

    assert await troubles({"kafka": cancelled, "postgres": ready}) == {
        "kafka": "check failed: it was cancelled by a library"
    }


async def test_silent_parts_are_given_up_together() -> None:
    async with asyncio.timeout(2):
        found = await troubles({str(n): (silent, stubborn)[n % 2] for n in range(50)}, timeout_seconds=0.1)
    assert set(found.values()) == {"no answer within 0.1 s"}


@pytest.mark.parametrize(
    "create", [create_process_app, partial(create_http_app, peers={"worker": "http://127.0.0.1:9"})]
)
async def test_metrics_say_which_part_is_not_ready_though_nobody_asks(
    monkeypatch: pytest.MonkeyPatch, create: Callable[..., Starlette]
) -> None:
    monkeypatch.setattr("app.health.WATCH_SECONDS", 0.01)
    is_there = False

    async def kafka() -> str | None:
        return None if is_there else "the broker does not answer"

    app = create(checks={"postgres": ready, "kafka": kafka})
    async with app.router.lifespan_context(app):
        await until_told({"postgres": 1, "kafka": 0})
        is_there = True
        await until_told({"postgres": 1, "kafka": 1})


async def until_told(parts: dict[str, float]) -> None:
    async with asyncio.timeout(5):
        while {part: REGISTRY.get_sample_value("payments_ready", {"part": part}) for part in parts} != parts:
            await asyncio.sleep(0.01)


async def test_metrics_of_a_peer_carry_its_name() -> None:
    async with served(create_process_app(checks=NO_CHECKS)) as url:
        answer = await get(create_http_app(checks=NO_CHECKS, peers={"worker": url}), "/metrics")
    assert up(answer.text) == {"http": 1, "worker": 1}
    families = [family.name for family in text_string_to_metric_families(answer.text)]
    assert len(families) == len(set(families)), "each family stands once, with the samples of all processes"
    info = next(each for each in text_string_to_metric_families(answer.text) if each.name == "python_info")
    assert {sample.labels["process"] for sample in info.samples} == {"http", "worker"}


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "no url at all", "http://[::1"])
async def test_a_peer_that_is_down_is_told_and_harms_nothing(url: str) -> None:
    answer = await get(create_http_app(checks=NO_CHECKS, peers={"relay": url}), "/metrics")
    assert answer.status_code == 200
    assert up(answer.text) == {"http": 1, "relay": 0}


@pytest.mark.parametrize("body", [b"\xff not metrics", b"payments_total{ 1", b"<html>"])
async def test_a_peer_that_answers_nonsense_is_told_and_harms_nothing(body: bytes) -> None:
    async with served(_answering(body)) as url:
        answer = await get(create_http_app(checks=NO_CHECKS, peers={"relay": url}), "/metrics")
    assert up(answer.text) == {"http": 1, "relay": 0}


async def test_a_request_that_never_comes_whole_does_not_hold_up_the_end_of_the_process() -> None:
    port = free_port()
    waiting = "async def app(scope, receive, send):\n    while (await receive())['type'] == 'http.request': pass\n"
    run = f"run(lambda stop: stop.wait(), create_app=lambda: app, host='127.0.0.1', port={port})"
    program = f"{waiting}from app.process import run\n{run}"
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", program)
    try:
        writer = await connected(port)
        writer.write(b"POST / HTTP/1.1\r\nHost: payments\r\nContent-Length: 1000\r\n\r\n{")
        await asyncio.sleep(0.5)
        process.terminate()
        async with asyncio.timeout(REQUESTS_END_WITHIN + 10):
            assert await process.wait() == 0
        writer.close()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def connected(port: int) -> asyncio.StreamWriter:
    async with asyncio.timeout(20):
        while True:
            try:
                return (await asyncio.open_connection("127.0.0.1", port))[1]
            except OSError:
                await asyncio.sleep(0.05)


def _answering(body: bytes) -> ASGIApp:
    async def app(scope: object, receive: object, send: Callable[[dict[str, object]], Awaitable[None]]) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": body})

    return app


@pytest.mark.parametrize("path", ["/", "/asyncapi"])
async def test_a_page_and_what_it_loads_come_from_this_process(path: str) -> None:
    app = create_http_app(checks=NO_CHECKS, peers=NO_PEERS)
    page = await get(app, path)
    without_document = re.sub(r'<script id="document".*?</script>', "", page.text, flags=re.DOTALL)
    assert page.status_code == 200
    assert not ABSOLUTE_URL.search(without_document)
    for reference in re.findall(r'(?:src|href)="(/[^"]*)"', without_document):
        if not reference.startswith("/health"):
            assert (await get(app, reference)).status_code == 200, reference


async def test_the_page_may_not_fetch_from_other_hosts() -> None:
    page = await get(create_http_app(checks=NO_CHECKS, peers=NO_PEERS), "/asyncapi")
    policy = page.headers["content-security-policy"]
    assert policy == CONTENT_SECURITY_POLICY
    assert policy.startswith("default-src 'none';")
    assert not re.search(r"https?:|//|\*", policy)
    assert not ABSOLUTE_URL.search((STATIC_DIR / "asyncapi" / "asyncapi-react.css").read_text(encoding="utf-8"))


async def test_the_vendored_files_come_with_their_licences() -> None:
    names = {path.name for path in (STATIC_DIR / "asyncapi").iterdir()}
    assert {"LICENSE", "asyncapi-react.js.LICENSE.txt"} <= names


async def test_the_document_is_served_as_yaml_and_json() -> None:
    app = create_http_app(checks=NO_CHECKS, peers=NO_PEERS)
    as_yaml, as_json = await get(app, "/asyncapi.yaml"), await get(app, "/asyncapi.json")
    assert yaml.safe_load(as_yaml.text) == as_json.json()
    assert as_json.json()["asyncapi"].startswith("3.")


async def test_the_http_process_says_which_other_process_is_not_ready() -> None:
    peers = {"worker": "http://127.0.0.1:9"}
    answer = await get(create_http_app(checks={"postgres": ready}, peers=peers), "/health/ready")
    assert answer.status_code == 503
    assert answer.json()["parts"] == {"postgres": "ready", "worker": "check failed: ConnectError"}


async def test_the_http_process_hears_what_another_waits_for_in_vain() -> None:
    async with served(create_process_app(checks={"postgres": silent})) as url:
        answer = await get(create_http_app(checks=NO_CHECKS, peers={"worker": url}), "/health/ready")
    assert answer.json()["parts"] == {"worker": f"postgres: no answer within {CHECK_TIMEOUT_SECONDS:g} s"}
