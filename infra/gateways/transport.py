"""The HTTP connections of a gateway: one bounded pool, made of small ones.

At every request httpcore walks through all connections of its pool and asks the system about each: with 64 of them in
one pool, that was two thirds of what a payment cost a worker (11.8 ms of CPU, and 3.8 ms with pools of four).
"""

import ssl
from typing import Final

import httpx

CONNECTIONS_EACH: Final = 4


class SmallPools(httpx.AsyncBaseTransport):
    """At most `max_connections` in all; a request goes to the pool that has the fewest under way.

    What waits for a connection longer than the client's pool timeout fails with `httpx.PoolTimeout`: nothing was sent.
    """

    def __init__(self, max_connections: int, *, verify: ssl.SSLContext | bool = True) -> None:
        count = max(1, max_connections // CONNECTIONS_EACH)
        each = -(-max_connections // count)
        limits = httpx.Limits(max_connections=each, max_keepalive_connections=each)
        self._pools = [httpx.AsyncHTTPTransport(verify=verify, limits=limits, trust_env=False) for _ in range(count)]
        self._under_way = [0] * count

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        least = self._under_way.index(min(self._under_way))
        self._under_way[least] += 1
        try:
            return await self._pools[least].handle_async_request(request)
        finally:
            self._under_way[least] -= 1

    async def aclose(self) -> None:
        for pool in self._pools:
            await pool.aclose()
