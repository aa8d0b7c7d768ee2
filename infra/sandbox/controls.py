"""The controls of every simulator below `/_sandbox`: fault rules, webhook manners, a latency, a reset.

Also how a fault changes a request and its answer.
"""

import asyncio
from collections.abc import Callable, Collection
from dataclasses import asdict
from typing import Any, Final, Protocol, TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from infra.sandbox.connections import HalfAnswer, LaterAnswer, NoAnswer
from infra.sandbox.faults import Action, Fault, Faults
from infra.sandbox.webhooks import WebhookSender

GARBLED: Final = (Action.GARBAGE, Action.ERROR_AFTER)
"""For a provider that has no error answer of its own after an execution: both are a proxy's page."""
T = TypeVar("T")

NOT_A_RULE: Final = (TypeError, ValueError, AttributeError)


class Simulator(Protocol):
    """The part of a simulator that is controlled here."""

    faults: Faults
    latency_seconds: float

    @property
    def sender(self) -> WebhookSender: ...

    def snapshot(self) -> Any:
        """A copy of the present books, for reads to answer from later."""

    def reset(self) -> None:
        """Forget everything but the latency, and where and how webhooks are sent."""


def control_routes(own: str, simulator_of: Callable[[Request], Simulator]) -> list[Route]:
    """`faults` (POST adds a rule, DELETE clears them), `manners`, `latency` and `reset` below the path `own`.

    `manners` say how webhooks are sent. POST sets them; a value that is not given is reset to correct behaviour. GET
    shows them, and how many webhooks were sent, were accepted and are under way.
    """

    async def add_fault(request: Request) -> Response:
        simulator = simulator_of(request)
        rules = simulator.faults.rules
        try:
            rule = Fault.from_json(await request.json())
        except NOT_A_RULE as error:
            return JSONResponse({"error": str(error), "actions": [action.value for action in Action]}, 400)
        if rule.action is Action.LAG:
            rule.before = simulator.snapshot()
        rules.append(rule)
        return JSONResponse({"faults": len(rules)})

    async def set_manners(request: Request) -> Response:
        try:
            simulator_of(request).sender.behave(await request.json())
        except NOT_A_RULE as error:
            return JSONResponse({"error": str(error)}, 400)
        return await show_manners(request)

    async def show_manners(request: Request) -> Response:
        sender = simulator_of(request).sender
        counts = {"sent": sender.sent, "accepted": sender.accepted, "under_way": sender.under_way}
        return JSONResponse(asdict(sender.manners) | counts)

    async def clear_faults(request: Request) -> Response:
        simulator_of(request).faults.rules.clear()
        return JSONResponse({"faults": 0})

    async def set_latency(request: Request) -> Response:
        milliseconds = float((await request.json())["latency_ms"])
        simulator_of(request).latency_seconds = milliseconds / 1000
        return JSONResponse({"latency_ms": milliseconds})

    async def reset(request: Request) -> Response:
        await simulator_of(request).sender.give_up()
        simulator_of(request).reset()
        return JSONResponse({"reset": True})

    return [
        Route(f"{own}/faults", add_fault, methods=["POST"]),
        Route(f"{own}/faults", clear_faults, methods=["DELETE"]),
        Route(f"{own}/manners", set_manners, methods=["POST"]),
        Route(f"{own}/manners", show_manners, methods=["GET"]),
        Route(f"{own}/latency", set_latency, methods=["POST"]),
        Route(f"{own}/reset", reset, methods=["POST"]),
    ]


def asking_to_rest(fault: Fault | None, refusal: Response) -> Response:
    """The refusal, with a `Retry-After` if the rule gives one."""
    if fault is not None and fault.retry_after_seconds is not None:
        refusal.headers["Retry-After"] = str(fault.retry_after_seconds)
    return refusal


async def hold_up(fault: Fault | None) -> None:
    """Delay a request before it is executed, if that is the fault."""
    if fault is not None and fault.action is Action.SLOW:
        await asyncio.sleep(fault.seconds)


def known_to_reads(fault: Fault | None, books: T) -> T:
    """The books that a read answers from: the present ones, or for `LAG` those of the time of the rule."""
    if fault is None or fault.action is not Action.LAG:
        return books
    before: T = fault.before
    return before


def spoiled(
    fault: Fault | None,
    response: Response,
    sender: WebhookSender,
    *,
    garbled: Collection[Action] = (Action.GARBAGE,),
) -> Response:
    """The answer to an executed request, as the fault lets it arrive; for the actions `garbled`, a proxy's page."""
    match fault.action if fault else None:
        case Action.CUT_AFTER:
            return NoAnswer()
        case Action.WEBHOOK_FIRST:
            assert fault is not None, "the action is the fault's"
            return LaterAnswer(response, sender.until_heard(sender.accepted, fault.seconds))
        case Action.HANG:
            return NoAnswer(is_hanging=True)
        case Action.TRUNCATED:
            return HalfAnswer(response)
        case action if action in garbled:
            return Response("<html>Bad gateway</html>", 502, media_type="text/html")
        case _:
            return response
