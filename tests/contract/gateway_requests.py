"""Gateway requests as the dispatcher builds them."""

from datetime import UTC, datetime
from typing import Any
from uuid import UUID, uuid4

from domain.commands import OperationKind
from domain.errors import GatewayUnreachable, OutcomeUnknown
from domain.money import Money
from domain.operations import GatewayRequest, OperationState, Outcome, Succeeded, Unknown, Unreachable
from domain.ports import Gateway

AMOUNT = Money(1250, "USD")


def a_request(
    kind: OperationKind = OperationKind.CHARGE,
    *,
    payment_id: UUID | None = None,
    number: int = 1,
    amount: Money = AMOUNT,
    payment_method: str | None = "pm_card_visa",
    **fields: Any,
) -> GatewayRequest:
    payment_id = payment_id or uuid4()
    return GatewayRequest(
        kind=kind,
        payment_id=payment_id,
        operation_number=number,
        provider_key=f"{payment_id}:{number}",
        gateway="stripe",
        amount=amount,
        payment_method=payment_method,
        order_id="order-7",
        first_dispatched_at=datetime.now(UTC),
        **fields,
    )


def follow_up(
    opened: GatewayRequest, reference: str, kind: OperationKind, *, number: int = 2, **fields: Any
) -> GatewayRequest:
    """A later operation on the payment that `opened` created as `reference`."""
    given: dict[str, Any] = {
        "kind": kind,
        "operation_number": number,
        "provider_key": f"{opened.payment_id}:{number}",
        "gateway_payment_id": reference,
        "reference": None,
        "payment_method": None,
    }
    return opened._replace(**(given | fields))


def in_doubt(request: GatewayRequest, **fields: Any) -> GatewayRequest:
    """The same request at its next attempt, after the answer to an earlier one was lost."""
    return request._replace(state=OperationState.INDETERMINATE, attempts=request.attempts + 1, **fields)


async def run(gateway: Gateway, request: GatewayRequest) -> Outcome:
    """Execute as the dispatcher does, with errors as outcomes."""
    try:
        return await getattr(gateway, request.kind.value)(request)  # type: ignore[no-any-return]
    except GatewayUnreachable as error:
        return Unreachable(error.message)
    except OutcomeUnknown as error:
        return Unknown(error.message)


async def opened(
    gateway: Gateway, kind: OperationKind = OperationKind.AUTHORIZE, **fields: Any
) -> tuple[GatewayRequest, str]:
    """A successful authorization or charge, and the provider's id of it."""
    request = a_request(kind, **fields)
    outcome = await run(gateway, request)
    assert isinstance(outcome, Succeeded), outcome
    return request, outcome.reference
