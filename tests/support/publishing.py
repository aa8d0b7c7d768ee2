"""Flushes a publisher."""

import asyncio

from infra.relay.publish.publisher import Publisher


async def flush(publisher: Publisher) -> None:
    """Flush, including partitions whose producers are being replaced."""
    await publisher.flush()
    while publisher._producers.renewals:
        await asyncio.gather(*publisher._producers.renewals)
        await publisher.flush()
