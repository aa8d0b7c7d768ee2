"""The simulators' webhook sender: however many webhooks wait, the HTTP client gets only a few at a time."""

import asyncio

import httpx

from infra.sandbox.webhooks import CONNECTIONS, Outgoing, WebhookSender


async def test_webhooks_that_wait_for_a_connection_wait_outside_of_the_client() -> None:
    at_once, most = 0, 0

    async def receive(_: httpx.Request) -> httpx.Response:
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        await asyncio.sleep(0)
        at_once -= 1
        return httpx.Response(200)

    sender = WebhookSender(_http=httpx.AsyncClient(transport=httpx.MockTransport(receive)))
    for _ in range(200):
        sender.send(Outgoing("http://shop.invalid/webhooks"))
    async with asyncio.timeout(10):
        while sender.accepted < 200:
            await asyncio.sleep(0.01)
    await sender.close()
    assert most == CONNECTIONS
