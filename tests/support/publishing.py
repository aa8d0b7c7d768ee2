"""Has a publisher send all that it can."""

import asyncio

from infra.relay.publisher import Publisher


async def flush(publisher: Publisher) -> None:
    """Also of the partitions whose producers are replaced."""
    await publisher.flush()
    while publisher._renewals:
        await asyncio.gather(*publisher._renewals)
        await publisher.flush()
