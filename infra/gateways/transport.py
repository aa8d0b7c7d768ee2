"""HTTP for the gateways: bounded connections, one timeout for a whole exchange, and errors that say what they prove.

Connections are split into small pools, because httpcore checks every connection of a pool with a system call at every
request. With 64 connections in one pool, that was two thirds of a worker's CPU time per payment (11.8 ms, against 3.8
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
"""Exceptions that prove that the provider has not seen the request."""


REST_SECONDS_MAX: Final = 300.0
"""If a provider asks for a longer pause, it is tried once after this time, and may ask again."""


class Rest:
    """The pause that a provider asks for: by a 429, by a 503 with `Retry-After`, or in its own way (`wants_rest`).

    It lasts as long as `Retry-After` says; without one, a second, doubled with every refusal in a row. Up to a quarter
    is added at random, so that workers do not all return at once. Refusals during the pause extend it to at most
    `REST_SECONDS_MAX` from its beginning (plus that quarter), so the provider is always tried again.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._since = 0.0
        self._until = 0.0
        self._refusals = 0

    def seconds(self) -> float:
        """Seconds left of the pause; 0 when it is over."""
        return max(0.0, self._until - self._clock())

    def note(self, response: httpx.Response, *, wants_rest: bool = False) -> None:
        """Take account of an answer; `wants_rest` says that it asks for fewer requests in the provider's own way."""
        retry_after = _retry_after(response)
        is_limited = wants_rest or response.status_code == httpx.codes.TOO_MANY_REQUESTS
        if not is_limited and (retry_after is None or response.status_code != httpx.codes.SERVICE_UNAVAILABLE):
            # Answers to requests sent before the pause began do not end it.
            self._refusals = 0 if not self.seconds() else self._refusals
            return
        if not self.seconds():
            self._since, self._refusals = self._clock(), self._refusals + 1
        end = self._clock() + (retry_after or 2.0 ** min(self._refusals - 1, 20))
        seconds = min(REST_SECONDS_MAX, end - self._since)
        self._until = max(self._until, self._since + seconds * random.uniform(1, 1.25))  # noqa: S311 - spreads load


def _retry_after(response: httpx.Response) -> float | None:
    """Seconds to wait, if it names some, or a time in the future. https://www.rfc-editor.org/rfc/rfc9110#field.retry-after"""
    value = response.headers.get("retry-after", "")
    try:
        seconds = (
            float(value) if value.isdigit() else (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds()
        )
    except (ValueError, TypeError):
        return None
    return seconds if seconds > 0 else None


class SmallPools(httpx.AsyncBaseTransport):
    """`max_connections` in all, rounded up to equal pools; a request goes to the pool with the fewest under way.

    A request that waits for a connection longer than the client's pool timeout fails with `httpx.PoolTimeout`: nothing
    was sent.
    """

    def __init__(self, max_connections: int, *, verify: ssl.SSLContext | bool = True) -> None:
        count = max(1, max_connections // CONNECTIONS_EACH)
        each = -(-max_connections // count)
        limits = httpx.Limits(max_connections=each, max_keepalive_connections=each)
        # One context for all pools: loading the certificate authorities takes 20 ms.
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
            # `GatewayError.is_caused_by` recognises a timeout by its cause, which httpcore has removed.
            raise error from TimeoutError(str(error))
        finally:
            self._under_way[least] -= 1

    def connections(self) -> Connections:
        """The connections of all pools together. httpx does not expose them, so this reads httpcore's own list."""
        listed = [each for pool in self._pools for each in pool._pool.connections if not each.is_closed()]
        idle = sum(each.is_idle() for each in listed)
        return Connections(len(listed) - idle, idle, self._limit)

    async def aclose(self) -> None:
        for pool in self._pools:
            await pool.aclose()


class PooledClient(httpx.AsyncClient):
    """An httpx client that exposes its pools."""

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
    """A client over small pools that ignores the environment's proxy settings.

    Waiting for a free connection is limited to the connect timeout. So it ends before the limit of the whole exchange,
    with an error that proves that nothing was sent.
    """
    soon = connect_timeout_seconds
    return PooledClient(
        SmallPools(max_connections, verify=verify),
        base_url=base_url,
        timeout=httpx.Timeout(timeout_seconds, connect=soon, pool=soon),
        trust_env=False,
    )


class ProviderHttp:
    """HTTP to one provider. Cancelling the calling task cancels the request.

    `wants_rest` says whether an answer asks for fewer requests in the provider's own way, besides 429 and 503.
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
        """Send a request; return the whole answer, whatever its status. `content` goes to `httpx.AsyncClient.request`.

        Raises:
            GatewayUnreachable: nothing was sent.
            OutcomeUnknown: the request may have been sent, and no complete answer arrived in time.
        """
        try:
            # httpx's own timeouts restart with every byte: a trickling answer would never time out.
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
