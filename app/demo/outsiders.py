"""The demo's third parties, beside the order service and us: payers, a payer's bank, and a forger of webhooks."""

import asyncio
import json
import random
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Final

import httpx

from app.client import EventBody
from app.demo.orders import ABANDONED, DISPUTED, REDIRECT_REFUSED, REFUSED_BY_PAYER, Planned

HESITATION_SECONDS: Final = (0.2, 1.0)
DISPUTE_SECONDS: Final = 0.5
FORGED: Final = {"id": "evt_forged", "object": "event", "type": "payment_intent.succeeded", "data": {"object": {}}}


class Outsiders:
    """React to the events that concern them, once to each, in background tasks."""

    def __init__(self, simulator_url: str, http_url: str, planned: Iterable[Planned]) -> None:
        self.disputes_opened = 0
        self.disputes_closed = 0
        self.forged_answers: list[int] = []
        self._simulator_url = simulator_url
        self._http_url = http_url
        self._stories = {str(each.payment_id): each.story for each in planned}
        self._client = httpx.AsyncClient(timeout=10.0, trust_env=False)
        self._tasks: set[asyncio.Task[None]] = set()
        self._seen: set[str] = set()
        self._expected_ends = 0

    @property
    def are_done(self) -> bool:
        """Whether their tasks have ended and the end of every dispute has been reported."""
        return not self._tasks and self.disputes_closed >= self._expected_ends

    def hear(self, event: EventBody) -> None:
        """React to an event, if it concerns one of them."""
        if event["event_id"] in self._seen or event["payment_id"] not in self._stories:
            return
        self._seen.add(event["event_id"])
        match event["type"].split(".")[1]:
            case "requires_action" if self._stories[event["payment_id"]] != ABANDONED:
                self._start(self._authenticate, event)
            case "captured" if self._stories[event["payment_id"]] == DISPUTED:
                self._expected_ends += 1
                self._start(self._dispute, event)
            case "dispute_opened":
                self.disputes_opened += 1
            case "dispute_closed":
                self.disputes_closed += 1

    async def forge(self) -> None:
        """Send a webhook that claims a payment succeeded, signed without the secret."""
        forged = json.dumps(FORGED | {"data": {"object": {"metadata": {"payment_id": next(iter(self._stories))}}}})
        headers = {"stripe-signature": "t=1700000000,v1=" + "0" * 64}
        answer = await self._client.post(f"{self._http_url}/webhooks/stripe", content=forged, headers=headers)
        self.forged_answers.append(answer.status_code)

    async def close(self) -> None:
        """Cancel the reactions that have not happened yet."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._client.aclose()

    def _start(self, act: Callable[[EventBody], Awaitable[None]], event: EventBody) -> None:
        task = asyncio.ensure_future(act(event))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _authenticate(self, event: EventBody) -> None:
        """The payer decides on the page of the bank or wallet."""
        await asyncio.sleep(random.uniform(*HESITATION_SECONDS))  # noqa: S311 - no secret
        does_consent = self._stories[event["payment_id"]] not in (REFUSED_BY_PAYER, REDIRECT_REFUSED)
        url = httpx.URL(event["action"]["url"])
        if event["payment"]["gateway"] == "paypal":
            answer = "approve" if does_consent else "deny"
            await self._post(f"paypal/orders/{url.params['token']}/{answer}")
        else:
            chosen = url.copy_add_param("success", str(does_consent).lower())
            (await self._client.post(chosen)).raise_for_status()

    async def _dispute(self, event: EventBody) -> None:
        """The payer's bank takes the money back; then the dispute is won or lost."""
        intent = event["payment"]["gateway_payment_id"]
        dispute = await self._post(f"payment_intents/{intent}/dispute")
        await asyncio.sleep(DISPUTE_SECONDS)
        end = "won" if int(event["payment_id"][-1], 16) % 2 else "lost"
        await self._post(f"disputes/{dispute['id']}/close?status={end}")

    async def _post(self, path: str) -> dict[str, Any]:
        answer = await self._client.post(f"{self._simulator_url}/_sandbox/{path}")
        return dict(answer.raise_for_status().json())
