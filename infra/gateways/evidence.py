"""What an answer proves: nothing if it cannot be read; if a refusal alone proves nothing, a status query decides."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

from domain.errors import GatewayContractBroken, GatewayError, OutcomeUnknown
from domain.operations import GatewayRequest, Outcome, Unknown

P = ParamSpec("P")
T = TypeVar("T")

Status = Callable[[GatewayRequest], Awaitable[Outcome]]


def understood(gateway: str, read: Callable[P, T], *answer: P.args, **options: P.kwargs) -> T:
    """What `read` returns for an answer of this gateway's provider.

    Raises:
        GatewayContractBroken: a field is missing or has an unexpected type.
    """
    try:
        return read(*answer, **options)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise GatewayContractBroken(gateway, f"the answer has an unexpected shape ({type(error).__name__})") from error


@dataclass(frozen=True, slots=True)
class Look:
    """The refusal alone proves nothing: query the status, and use `otherwise` if that shows no evidence either."""

    otherwise: Outcome | GatewayError


Translation = Outcome | GatewayError | Look
"""What a refusal means: an outcome of the operation, an error that says what the caller may do, or a query first."""


async def conclude(
    translation: Translation, request: GatewayRequest, *, status: Status, refused: Exception, facts: str
) -> Outcome:
    """The outcome of a call that `refused` ended; `facts` is what may be logged of it.

    Raises:
        OutcomeUnknown: the status query failed, which proves nothing.
        GatewayError: the translation, or its `otherwise` if the query showed no evidence.
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
