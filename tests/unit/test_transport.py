"""For how long a provider's request for a rest is heeded; connections in use; and what a timeout means."""

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import httpx
import pytest

from domain.errors import GatewayUnreachable, OutcomeUnknown
from domain.ports import Connections
from infra.gateways.transport import REST_SECONDS_MAX, ProviderHttp, Rest
from infra.local.server import free_port


def told(status: int, retry_after: str | None = None) -> httpx.Response:
    return httpx.Response(status, headers={} if retry_after is None else {"retry-after": retry_after})


@pytest.mark.parametrize(
    ("response", "least", "most"),
    [
        (told(429), 1, 1.25),
        (told(429, "30"), 30, 37.5),
        (told(503, "30"), 30, 37.5),
        (told(429, "86400"), REST_SECONDS_MAX, REST_SECONDS_MAX * 1.25),
        (told(429, "0"), 1, 1.25),
        (told(429, "-5"), 1, 1.25),
        (told(429, "soon"), 1, 1.25),
        (told(429, "Wed, 21 Oct 2015 07:28:00 GMT"), 1, 1.25),
        (told(503), 0, 0),
        (told(503, "soon"), 0, 0),
        (told(500, "30"), 0, 0),
        (told(200, "30"), 0, 0),
    ],
)
def test_a_rest_is_as_long_as_is_asked_for_if_that_is_sane(response: httpx.Response, least: float, most: float) -> None:
    rest = Rest(lambda: 1000.0)
    rest.note(response)
    assert least <= rest.seconds() <= most


def test_a_rest_may_be_asked_for_until_a_date() -> None:
    rest = Rest(lambda: 1000.0)
    rest.note(told(429, format_datetime(datetime.now(UTC) + timedelta(seconds=100), usegmt=True)))
    assert 90 <= rest.seconds() <= 125


def test_without_a_time_it_doubles_with_every_refusal_in_a_row_up_to_a_bound() -> None:
    now = 1000.0
    rest = Rest(lambda: now)
    for refusal in range(15):
        rest.note(told(429))
        rest.note(told(429))  # calls that were under way at once count as one refusal
        seconds = min(2.0**refusal, REST_SECONDS_MAX)
        assert seconds <= rest.seconds() <= 1.25 * seconds
        now += rest.seconds()
    rest.note(told(200))
    rest.note(told(429))
    assert rest.seconds() <= 1.25


def test_an_answer_to_what_was_under_way_does_not_end_it() -> None:
    now = 1000.0
    rest = Rest(lambda: now)
    for _ in range(3):
        rest.note(told(429))
        now += rest.seconds()
    rest.note(told(429))
    rest.note(told(200))
    assert rest.seconds() >= 8
    now += rest.seconds()
    rest.note(told(429))
    assert rest.seconds() >= 16


def test_a_wish_in_a_providers_own_words_is_heeded_as_a_429_is() -> None:
    now = 1000.0
    rest = Rest(lambda: now)
    for seconds in (1, 2, 4):
        rest.note(told(200), wants_rest=True)
        assert seconds <= rest.seconds() <= 1.25 * seconds
        now += rest.seconds()


async def test_every_answer_of_a_provider_is_noted() -> None:
    provider = ProviderHttp(
        "acme",
        max_connections=1,
        timeout_seconds=5,
        connect_timeout_seconds=5,
        wants_rest=lambda response: response.status_code == httpx.codes.IM_A_TEAPOT,
    )
    for answer, least in ((told(200), 0), (told(429, "20"), 20), (told(418, "60"), 60)):
        provider._client = httpx.AsyncClient(transport=httpx.MockTransport(lambda _, given=answer: given))
        await provider.request("GET", "http://provider.invalid")
        assert least - 1 <= provider.rest.seconds() <= least * 1.25
        await provider.close()


def test_it_comes_to_its_end_though_payers_are_refused_all_the_time() -> None:
    now = 1000.0
    rest = Rest(lambda: now)
    rest.note(told(429, "60"))
    while rest.seconds():
        now += 1
        if rest.seconds():
            rest.note(told(429, "60"))
    assert REST_SECONDS_MAX <= now - 1000 <= REST_SECONDS_MAX * 1.25 + 1


@pytest.fixture
async def deaf_url() -> AsyncIterator[str]:
    """A server that accepts connections and never answers."""
    gone = asyncio.Event()

    async def hold(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await gone.wait()
        writer.close()

    server = await asyncio.start_server(hold, "127.0.0.1", 0)
    yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    gone.set()
    server.close()


def http(max_connections: int) -> ProviderHttp:
    return ProviderHttp("acme", max_connections=max_connections, timeout_seconds=0.5, connect_timeout_seconds=0.2)


async def test_a_connection_is_in_use_until_its_call_ends_and_no_answer_in_time_is_told_as_that(deaf_url: str) -> None:
    acme = http(8)
    assert acme.connections() == Connections(in_use=0, idle=0, limit=8)
    calls = [asyncio.create_task(acme.request("GET", deaf_url)) for _ in range(3)]
    async with asyncio.timeout(0.5):
        while acme.connections().in_use < 3:
            await asyncio.sleep(0)
    for ended in await asyncio.gather(*calls, return_exceptions=True):
        assert isinstance(ended, OutcomeUnknown)
        assert ended.is_caused_by(TimeoutError)
    assert acme.connections() == Connections(in_use=0, idle=0, limit=8)
    await acme.close()


async def test_a_timed_out_wait_for_a_connection_means_that_nothing_was_sent(deaf_url: str) -> None:
    acme = http(1)
    first = asyncio.create_task(acme.request("GET", deaf_url))
    await asyncio.sleep(0)
    with pytest.raises(GatewayUnreachable) as none_left:
        await acme.request("GET", deaf_url)
    assert none_left.value.is_caused_by(TimeoutError)
    with pytest.raises(OutcomeUnknown):
        await first
    await acme.close()


async def test_a_refused_connection_is_no_time_out() -> None:
    acme = http(1)
    with pytest.raises(GatewayUnreachable) as refused:
        await acme.request("GET", f"http://127.0.0.1:{free_port()}")
    assert not refused.value.is_caused_by(TimeoutError)
    await acme.close()
