"""Turns a provider's refusal into an outcome. Where the refusal alone proves nothing, a status query decides."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from domain.errors import GatewayError, OutcomeUnknown
from domain.operations import GatewayRequest, Outcome, Unknown

Status = Callable[[GatewayRequest], Awaitable[Outcome]]


@dataclass(frozen=True, slots=True)
class Look:
    """The refusal alone does not tell: look for evidence, and without any take `otherwise`."""

    otherwise: Outcome | GatewayError


Translation = Outcome | GatewayError | Look
"""What a refusal means: it says what became of the operation, or what the caller may do, or to look."""


async def conclude(
    translation: Translation, request: GatewayRequest, *, status: Status, refused: Exception, facts: str
) -> Outcome:
    """The outcome that `refused` comes to; `facts` is what may be told of it.

    Raises:
        OutcomeUnknown: it was looked for evidence in vain: not being able to look is no proof of anything.
        GatewayError: what the translation says, or what it says without evidence.
    """
    if isinstance(translation, Look):
        translation = await _look(translation, request, status, facts)
    if isinstance(translation, GatewayError):
        raise translation from refused
    return translation


async def _look(wanted: Look, request: GatewayRequest, status: Status, facts: str) -> Outcome | GatewayError:
    try:
        found = await status(request)
    except GatewayError as failure:
        raise OutcomeUnknown(request.gateway, f"{facts}; no evidence: {failure.message}") from failure
    return wanted.otherwise if isinstance(found, Unknown) else found
