"""Has a publisher send all that it can."""

import asyncio

from infra.relay.publisher import Publisher


async def flush(publisher: Publisher) -> None:
    """Also of the lanes whose producers are made anew."""
    await publisher.flush()
    while renewals := [lane.renewal for lane in publisher._lanes if lane.renewal is not None]:
        await asyncio.gather(*renewals)
        await publisher.flush()
