"""What every simulator is told below `/_sandbox`: fault rules, a latency, a reset; what a fault makes of an answer."""

from collections.abc import Callable, Collection
from typing import Final, Protocol

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from infra.sandbox.connections import HalfAnswer, NoAnswer
from infra.sandbox.faults import Action, Fault, Faults

GARBLED: Final = (Action.GARBAGE, Action.ERROR_AFTER)
"""Where the provider has no error of its own to tell after an execution, a proxy's page stands for both."""
NOT_A_RULE: Final = (TypeError, ValueError, AttributeError)


class Simulator(Protocol):
    """As far as it is controlled here."""

    faults: Faults
    latency_seconds: float

    def reset(self) -> None:
        """Forget everything but the latency and where webhooks go."""


def control_routes(own: str, simulator_of: Callable[[Request], Simulator]) -> list[Route]:
    """`faults` (POST adds a rule, DELETE clears them), `latency` and `reset` below the path `own`."""

    async def add_fault(request: Request) -> Response:
        rules = simulator_of(request).faults.rules
        try:
            rules.append(Fault.from_json(await request.json()))
        except NOT_A_RULE as error:
            return JSONResponse({"error": str(error), "actions": [action.value for action in Action]}, 400)
        return JSONResponse({"faults": len(rules)})

    async def clear_faults(request: Request) -> Response:
        simulator_of(request).faults.rules.clear()
        return JSONResponse({"faults": 0})

    async def set_latency(request: Request) -> Response:
        milliseconds = float((await request.json())["latency_ms"])
        simulator_of(request).latency_seconds = milliseconds / 1000
        return JSONResponse({"latency_ms": milliseconds})

    async def reset(request: Request) -> Response:
        simulator_of(request).reset()
        return JSONResponse({"reset": True})

    return [
        Route(f"{own}/faults", add_fault, methods=["POST"]),
        Route(f"{own}/faults", clear_faults, methods=["DELETE"]),
        Route(f"{own}/latency", set_latency, methods=["POST"]),
        Route(f"{own}/reset", reset, methods=["POST"]),
    ]


def spoiled(fault: Fault | None, response: Response, *, garbled: Collection[Action] = (Action.GARBAGE,)) -> Response:
    """What arrives of the answer to a request that was executed; a proxy's page instead for the actions `garbled`."""
    match fault.action if fault else None:
        case Action.CUT_AFTER:
            return NoAnswer()
        case Action.HANG:
            return NoAnswer(is_hanging=True)
        case Action.TRUNCATED:
            return HalfAnswer(response)
        case action if action in garbled:
            return Response("<html>Bad gateway</html>", 502, media_type="text/html")
        case _:
            return response
