"""What answers prove: nothing if unreadable; where a refusal alone proves nothing, the provider's record decides."""

from typing import Any
from uuid import UUID

import pytest

from domain.commands import OperationKind
from domain.errors import GatewayContractBroken, GatewayError, GatewayUnreachable, OutcomeUnknown
from domain.money import Money
from domain.operations import GatewayRequest, NotExecuted, Outcome, Succeeded, Unknown
from infra.gateways.evidence import Look, Translation, conclude, understood

PAYMENT_ID = UUID("5d2f6a0e-6f0e-4a57-9b1c-1f2d3c4b5a69")
CHARGE = GatewayRequest(
    kind=OperationKind.CHARGE,
    payment_id=PAYMENT_ID,
    operation_number=1,
    provider_key=f"{PAYMENT_ID}:1",
    gateway="paypal",
    amount=Money(1000, "USD"),
)
REFUSED = ValueError("no")
PROOF = NotExecuted("it was not executed")


async def concluded(translation: Translation, found: Outcome | GatewayError) -> Outcome:
    async def status(request: GatewayRequest) -> Outcome:
        if isinstance(found, GatewayError):
            raise found
        return found

    return await conclude(translation, CHARGE, status=status, refused=REFUSED, facts="so they say")


async def test_the_providers_record_outweighs_the_refusal() -> None:
    assert await concluded(Look(PROOF), Succeeded("ref")) == Succeeded("ref")


async def test_without_a_trace_at_the_provider_the_refusal_decides() -> None:
    assert await concluded(Look(PROOF), Unknown("no trace")) == PROOF
    with pytest.raises(OutcomeUnknown) as unknown:
        await concluded(Look(OutcomeUnknown("paypal", "a repeated attempt")), Unknown("no trace"))
    assert unknown.value.__cause__ is REFUSED


async def test_a_refusal_that_tells_it_all_asks_nobody() -> None:
    assert await concluded(PROOF, GatewayUnreachable("paypal", "asked")) == PROOF
    with pytest.raises(GatewayUnreachable):
        await concluded(GatewayUnreachable("paypal", "refused at the door"), Succeeded("ref"))


async def test_not_being_able_to_look_is_no_proof_and_is_told_as_what_it_was() -> None:
    failure = GatewayUnreachable("paypal", "no answer")
    failure.__cause__ = TimeoutError()
    with pytest.raises(OutcomeUnknown, match="so they say; no evidence: no answer") as unknown:
        await concluded(Look(PROOF), failure)
    assert unknown.value.is_caused_by(TimeoutError)


@pytest.mark.parametrize("answer", [{}, {"refunds": []}, {"refunds": {}}, {"refunds": ["no number"]}, None], ids=repr)
def test_an_answer_of_an_unexpected_shape_is_a_broken_contract(answer: Any) -> None:
    with pytest.raises(GatewayContractBroken, match="paypal: the answer has an unexpected shape"):
        understood("paypal", lambda given: int(given["refunds"][0]), answer)
