"""The HTTP of a gateway: one bounded pool, one limit for a whole exchange, and failures told apart by what they prove.

The pool is made of small ones: at every request httpcore walks through all connections of its pool and asks the system
about each: with 64 of them in one pool, that was two thirds of what a payment cost a worker (11.8 ms of CPU, and 3.8
ms with pools of four).
"""

import asyncio
import random
import ssl
import time
from collections.abc import Callable
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Final

import httpx

from domain.errors import GatewayUnreachable, OutcomeUnknown
from domain.ports import Connections

CONNECTIONS_EACH: Final = 4
NOTHING_WAS_SENT: Final = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout, httpx.UnsupportedProtocol)
"""What proves that the provider has not seen the request."""


REST_SECONDS_MAX: Final = 300.0
"""A provider that wants to be left alone for longer is asked once after this, and may say so again."""


class Rest:
    """For how long the provider wants fewer requests, by its own answers: 429, 503 with a time, or words of its own.

    As long as `Retry-After` says; without one a second, doubled with every refusal in a row. Spread upwards, so that
    not all workers are back at once. However often payers are refused meanwhile, it comes to its end, and something is
    asked again.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._since = 0.0
        self._until = 0.0
        self._refusals = 0

    def seconds(self) -> float:
        """What is left of it; 0 when it is over."""
        return max(0.0, self._until - self._clock())

    def note(self, response: httpx.Response, *, wants_rest: bool = False) -> None:
        """Any answer of the provider's; `wants_rest` where it asks for fewer requests in words of its own."""
        told = _retry_after(response)
        is_limited = wants_rest or response.status_code == httpx.codes.TOO_MANY_REQUESTS
        if not is_limited and (told is None or response.status_code != httpx.codes.SERVICE_UNAVAILABLE):
            # What was under way when the rest began is no sign of its end.
            self._refusals = 0 if not self.seconds() else self._refusals
            return
        if not self.seconds():
            self._since, self._refusals = self._clock(), self._refusals + 1
        end = self._clock() + (told or 2.0 ** min(self._refusals - 1, 20))
        seconds = min(REST_SECONDS_MAX, end - self._since)
        self._until = max(self._until, self._since + seconds * random.uniform(1, 1.25))  # noqa: S311 - spreads load


def _retry_after(response: httpx.Response) -> float | None:
    """Seconds, where it names some or a time to come. https://www.rfc-editor.org/rfc/rfc9110#field.retry-after"""
    told = response.headers.get("retry-after", "")
    try:
        seconds = float(told) if told.isdigit() else (parsedate_to_datetime(told) - datetime.now(UTC)).total_seconds()
    except (ValueError, TypeError):
        return None
    return seconds if seconds > 0 else None


class SmallPools(httpx.AsyncBaseTransport):
    """At most `max_connections` in all; a request goes to the pool that has the fewest under way.

    What waits for a connection longer than the client's pool timeout fails with `httpx.PoolTimeout`: nothing was sent.
    """

    def __init__(self, max_connections: int, *, verify: ssl.SSLContext | bool = True) -> None:
        count = max(1, max_connections // CONNECTIONS_EACH)
        each = -(-max_connections // count)
        limits = httpx.Limits(max_connections=each, max_keepalive_connections=each)
        # One for all: to load the authorities takes 20 ms, and each pool would do it anew.
        context = httpx.create_ssl_context(trust_env=False) if verify is True else verify
        self._limit = each * count
        self._pools = [httpx.AsyncHTTPTransport(verify=context, limits=limits, trust_env=False) for _ in range(count)]
        self._under_way = [0] * count

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        least = self._under_way.index(min(self._under_way))
        self._under_way[least] += 1
        try:
            return await self._pools[least].handle_async_request(request)
        except httpx.TimeoutException as error:
            # httpcore takes their cause away, by which `GatewayError.stands_for` knows them behind any library.
            raise error from TimeoutError(str(error))
        finally:
            self._under_way[least] -= 1

    def connections(self) -> Connections:
        """Of all pools together. (httpx shows those of none: httpcore's own list is asked.)"""
        listed = [each for pool in self._pools for each in pool._pool.connections if not each.is_closed()]
        idle = sum(each.is_idle() for each in listed)
        return Connections(len(listed) - idle, idle, self._limit)

    async def aclose(self) -> None:
        for pool in self._pools:
            await pool.aclose()


class PooledClient(httpx.AsyncClient):
    """httpx's client, which shows its pools."""

    def __init__(self, pools: SmallPools, **settings: Any) -> None:
        super().__init__(transport=pools, **settings)
        self.pools = pools


def create_client(
    *,
    max_connections: int,
    timeout_seconds: float,
    connect_timeout_seconds: float,
    base_url: str = "",
    verify: ssl.SSLContext | bool = True,
) -> PooledClient:
    """A client over small pools, deaf to the environment's proxies.

    Waiting for a connection is as short as connecting: it ends before the whole exchange's time does, so it is still
    known that nothing was sent.
    """
    soon = connect_timeout_seconds
    return PooledClient(
        SmallPools(max_connections, verify=verify),
        base_url=base_url,
        timeout=httpx.Timeout(timeout_seconds, connect=soon, pool=soon),
        trust_env=False,
    )


class ProviderHttp:
    """One provider's HTTP. Cancelling our own task passes through every call.

    `wants_rest` says whether an answer asks for fewer requests in words of the provider's own, beside 429 and 503.
    """

    def __init__(
        self,
        gateway: str,
        *,
        max_connections: int,
        timeout_seconds: float,
        connect_timeout_seconds: float,
        base_url: str = "",
        wants_rest: Callable[[httpx.Response], bool] = lambda _: False,
    ) -> None:
        self._gateway = gateway
        self._wants_rest = wants_rest
        self._timeout_seconds = timeout_seconds
        self.rest = Rest()
        client = create_client(
            max_connections=max_connections,
            timeout_seconds=timeout_seconds,
            connect_timeout_seconds=connect_timeout_seconds,
            base_url=base_url,
        )
        self._client: httpx.AsyncClient = client
        self.connections = client.pools.connections

    async def request(self, method: str, url: str, **content: Any) -> httpx.Response:
        """The whole answer, whatever its status. `content` is as `httpx.AsyncClient.request` takes it.

        Raises:
            GatewayUnreachable: nothing was sent.
            OutcomeUnknown: something was, and no whole answer came back in time.
        """
        try:
            # httpx's own limits start anew with every byte: an answer that trickles in would never end.
            async with asyncio.timeout(self._timeout_seconds):
                response = await self._client.request(method, url, **content)
        except TimeoutError as error:
            raise OutcomeUnknown(self._gateway, f"no answer within {self._timeout_seconds} s") from error
        except NOTHING_WAS_SENT as error:
            raise GatewayUnreachable(self._gateway, f"not connected ({type(error).__name__})") from error
        except httpx.HTTPError as error:
            raise OutcomeUnknown(self._gateway, f"the connection failed ({type(error).__name__})") from error
        self.rest.note(response, wants_rest=self._wants_rest(response))
        return response

    async def close(self) -> None:
        await self._client.aclose()
