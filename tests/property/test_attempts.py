"""Several attempts of one payment hold money at once; no attempt is asked for money that another one holds."""

from collections import Counter
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from domain.commands import OperationKind
from domain.events import PaymentStatus
from domain.operations import Declined, DeclineReason, Expired, GatewayRequest, Succeeded
from tests.support.provider import CAPABILITIES
from tests.support.service import rules
from tests.support.story import Story

openings = st.tuples(st.sampled_from(["authorize", "charge"]), st.sampled_from([40, 100]))
steps = st.tuples(
    st.sampled_from(["paid late", "paid late", "capture", "refund", "void", "lapse"]),
    st.integers(0, 3),
    st.sampled_from([None, None, 10, 40, 100]),
)


class Provider:
    """The amounts that each provider payment holds, has captured and has refunded."""

    def __init__(self) -> None:
        self.held: Counter[str] = Counter()
        self.taken: Counter[str] = Counter()
        self.returned: Counter[str] = Counter()

    def open(self, kind: OperationKind, reference: str, amount: int) -> None:
        (self.taken if kind is OperationKind.CHARGE else self.held)[reference] += amount

    def execute(self, request: GatewayRequest, *, keeps_rest: bool) -> None:
        reference, amount = request.gateway_payment_id or "", request.amount.minor
        match request.kind:
            case OperationKind.CAPTURE:
                assert request.captured_minor == self.taken[reference]
                assert request.is_final == (amount == self.held[reference])
                self.taken[reference] += amount
                self.held[reference] = self.held[reference] - amount if keeps_rest else 0
                assert self.held[reference] >= 0, "captured what another attempt holds"
            case OperationKind.VOID:
                assert amount == self.held[reference], "released what another attempt holds"
                self.held[reference] = 0
            case _:
                self.returned[reference] += amount
                assert self.returned[reference] <= self.taken[reference], "returned what another attempt took"


@settings(max_examples=300, deadline=None)
@given(st.lists(openings, min_size=1, max_size=3), openings, st.lists(steps, max_size=10), st.booleans())
def test_each_attempt_is_asked_for_no_more_than_it_holds(
    refused: list[tuple[str, int]],
    paid: tuple[str, int],
    then: list[tuple[str, int, int | None]],
    multi_capture: bool,
) -> None:
    told = Story(rules(gateways={"books": replace(CAPABILITIES, multi_capture=multi_capture)}))
    provider = Provider()
    for number, (kind, asked) in enumerate(refused, start=1):
        told.send(kind, f"refused-{number}", amount_minor=asked, currency="USD")
        told.answer(Declined(DeclineReason.OTHER, None, f"ref_{number}"))
    told.does(paid[0], "paid", amount_minor=paid[1], currency="USD")
    _opened(provider, told, len(refused) + 1)
    for step in then:
        _do(told, provider, *step)
        payment = told.payment
        assert payment is not None
        held = payment.authorized_minor - payment.captured_minor - payment.released_minor
        assert held == provider.held.total()
        assert payment.captured_minor == provider.taken.total()
        assert payment.refunded_minor == provider.returned.total()
        assert payment.capturable_minor == provider.held[payment.gateway_payment_id or ""]


def _do(told: Story, provider: Provider, step: str, which: int, amount: int | None) -> None:
    assert told.payment is not None
    match step:
        case "paid late":
            declined = [each for each in told.operations.values() if each.state == "declined"]
            if declined and told.payment.status is not PaymentStatus.CANCELED:
                number = declined[which % len(declined)].number
                told.hear(Succeeded(f"ref_{number}"), number)
                _opened(provider, told, number)
        case "lapse":
            holds = [number for number in told.operations if provider.held[f"ref_{number}"]]
            if holds:
                number = holds[which % len(holds)]
                told.hear(Expired(f"ref_{number}"), number)
                provider.held[f"ref_{number}"] = 0
        case _:
            before = len(told.requests)
            told.send(
                step,
                f"key-{len(told.operations)}",
                **({} if amount is None or step == "void" else {"amount_minor": amount}),
            )
            for request in told.requests[before:]:
                keeps_rest = told.rules.gateways[request.gateway].multi_capture
                provider.execute(request, keeps_rest=keeps_rest)
                told.answer()


def _opened(provider: Provider, told: Story, number: int) -> None:
    operation = told.operations[number]
    provider.open(operation.kind, f"ref_{number}", operation.amount_minor or 0)
