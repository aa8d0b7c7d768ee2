"""The state machine's provider: its books, its idempotency keys and the capabilities that it declares."""

from collections import Counter
from typing import NamedTuple
from uuid import UUID

from domain.capabilities import AmountLimits, Capabilities
from domain.commands import OperationKind
from domain.operations import (
    Declined,
    DeclineReason,
    GatewayRequest,
    NotExecuted,
    OperationState,
    Outcome,
    Pending,
    RequiresAction,
    Succeeded,
    Unknown,
)


class Provider:
    """Executes each key at most once.

    A request for money that it does not have, or for something that it cannot do, fails the test.
    """

    def __init__(self, capabilities: Capabilities) -> None:
        self.capabilities = capabilities
        self.is_sure = False
        """Whether no request is on its way any more, so that the lack of a trace proves that it was not executed."""
        self.known: dict[str, Outcome] = {}
        self.moved: dict[str, tuple[OperationKind, UUID, int]] = {}
        self.said: list[tuple[GatewayRequest, Outcome]] = []
        """All outcomes that it reported. Webhooks repeat them at any time, in any order, any number of times."""
        self.external: list[Movement] = []
        """What somebody did in its dashboard."""
        self._asked: dict[str, GatewayRequest] = {}
        self._let_go: Counter[UUID] = Counter()

    def tell(self, request: GatewayRequest) -> Outcome:
        """Answer a query; nothing is executed."""
        nothing = NotExecuted("no trace of it, nor will there be") if self.is_sure else Unknown("no trace of it")
        return self.known.get(request.provider_key, nothing)

    def receive(self, request: GatewayRequest, verdict: str) -> Outcome:
        """Answer a call. A repeated key gets the first answer, whatever the verdict."""
        key = request.provider_key
        self._must_be_the_same(request)
        self._must_be_possible(request)
        assert key not in self.known or self.capabilities.idempotency_retention, "sent again where keys mean nothing"
        if key not in self.known:
            self._know(request, self._decide(request, verdict))
        return self.known[key]

    def _know(self, request: GatewayRequest, outcome: Outcome) -> None:
        self.known[request.provider_key] = outcome
        if isinstance(outcome, Succeeded | Declined | RequiresAction | Pending):
            self.said.append((request, outcome))

    def resolve(self, key: str, *, is_success: bool) -> None:
        """End an operation that was pending or was answered with a wrong amount."""
        request, reference = self._asked[key], f"ref-{key}"
        if is_success or key in self.moved:
            self._know(request, self._execute(request) if key not in self.moved else self._success(request))
        else:
            self._know(request, Declined(DeclineReason.OTHER, reference=reference))

    def move_externally(self, payment_id: UUID, kind: OperationKind, percent: int) -> None:
        """Somebody refunds or captures a part of what is left, in the provider's dashboard."""
        left = self.left(payment_id, kind)
        amount = left if not self.capabilities.partial_capture else max(1, left * percent // 100)
        reference = f"portal-{len(self.external)}"
        self.external.append(Movement(payment_id, kind, amount, reference))
        self.moved[reference] = (kind, payment_id, amount)
        self._let_go_of_the_rest(payment_id, kind)

    @property
    def movable(self) -> list[tuple[UUID, OperationKind]]:
        """The payments of which somebody could still capture or refund something."""
        paid = sorted({of for _, of, _ in self.moved.values()})
        kinds = (OperationKind.CAPTURE, OperationKind.REFUND)
        return [(of, kind) for of in paid for kind in kinds if self.left(of, kind) > 0]

    def executed(self, *kinds: OperationKind) -> list[tuple[GatewayRequest, Succeeded]]:
        """The reported successes of operations of these kinds."""
        return [(request, told) for request, told in self.said if request.kind in kinds and isinstance(told, Succeeded)]

    def opened(self, payment_id: UUID) -> str:
        """The provider's id of the payment."""
        return next(f"ref-{key}" for key, (kind, of, _) in self.moved.items() if of == payment_id and is_opening(kind))

    def left(self, payment_id: UUID, kind: OperationKind) -> int:
        """The amount that can still be refunded or captured."""
        taken = self.total(payment_id, OperationKind.CAPTURE, OperationKind.CHARGE)
        if kind is OperationKind.REFUND:
            return taken - self.total(payment_id, OperationKind.REFUND)
        return self.total(payment_id, OperationKind.AUTHORIZE, OperationKind.CHARGE) - taken - self.released(payment_id)

    def _was_touched(self, payment_id: UUID) -> bool:
        return any(each.payment_id == payment_id for each in self.external)

    @property
    def unresolved(self) -> list[str]:
        """Keys whose answer is not final."""
        return [key for key, outcome in self.known.items() if not self._is_last_word(key, outcome)]

    def total(self, payment_id: UUID, *kinds: OperationKind) -> int:
        """The sum that operations of these kinds really moved."""
        return sum(amount for kind, of, amount in self.moved.values() if of == payment_id and kind in kinds)

    def released(self, payment_id: UUID) -> int:
        """The amount that is no longer held and was not captured: voided, or left over by the only capture."""
        return self.total(payment_id, OperationKind.VOID) + self._let_go[payment_id]

    def _is_last_word(self, key: str, outcome: Outcome) -> bool:
        if isinstance(outcome, Succeeded):
            return outcome.amount_minor == self._asked[key].amount.minor
        return isinstance(outcome, Declined | NotExecuted)

    def _must_be_the_same(self, request: GatewayRequest) -> None:
        """A repeated key with other parameters is an error at every provider."""
        plain = request._replace(state=OperationState.DISPATCHED, attempts=1, lease_token=1, reference=None)
        plain = plain._replace(first_dispatched_at=None)
        assert self._asked.setdefault(request.provider_key, plain) == plain, "same key, other request"

    def _must_be_possible(self, request: GatewayRequest) -> None:
        assert request.kind in self.capabilities.operations, "it cannot do that at all"
        assert request.amount.currency in self.capabilities.currencies, "it does not take that currency"
        if request.provider_key in self.known:
            return
        if is_opening(request.kind):
            limits = self.capabilities.limits.get(request.amount.currency, AmountLimits())
            assert limits.minimum_minor <= request.amount.minor <= limits.maximum_minor, "beyond its limits"
        else:
            self._must_be_a_possible_part(request)

    def _must_be_a_possible_part(self, request: GatewayRequest) -> None:
        if self._was_touched(request.payment_id):
            return  # We may not have known of the dashboard's movement when we sent this.
        held = self.total(request.payment_id, OperationKind.AUTHORIZE)
        taken = self.total(request.payment_id, OperationKind.CAPTURE, OperationKind.CHARGE)
        match request.kind:
            case OperationKind.CAPTURE:
                assert self.capabilities.partial_capture or request.amount.minor == held, "it cannot capture in part"
                assert self.capabilities.multi_capture or not taken, "it cannot capture twice"
            case OperationKind.REFUND:
                assert self.capabilities.partial_refund or request.amount.minor == taken, "it cannot refund in part"
            case _:
                assert self.capabilities.cancel_waiting or held, "it cannot cancel what waits for its payer"

    def _decide(self, request: GatewayRequest, verdict: str) -> Outcome:
        reference, amount = f"ref-{request.provider_key}", request.amount.minor
        is_opening = request.kind in (OperationKind.AUTHORIZE, OperationKind.CHARGE)
        match verdict:
            case "decline":
                return Declined(DeclineReason.REFUSED_BY_ISSUER, "do_not_honor", reference)
            case "refuse":
                return NotExecuted("a parameter was refused")
            case "action" if is_opening:
                return RequiresAction(reference, "redirect_to_url", "https://bank.example")
            case "pending" | "action":
                return Pending(reference)
            case _:
                outcome = self._execute(request)
                is_lie = verdict == "other amount" and isinstance(outcome, Succeeded)
                return Succeeded(reference, amount + 1) if is_lie else outcome

    def _execute(self, request: GatewayRequest) -> Outcome:
        """Execute the request. A void of a payment that waits for its payer ends it, and releases nothing."""
        held = self.total(request.payment_id, OperationKind.AUTHORIZE, OperationKind.CHARGE)
        if request.kind is OperationKind.VOID and not held:
            self._cancel_opening(request.payment_id)
            self.moved[request.provider_key] = (request.kind, request.payment_id, 0)
        elif request.kind is OperationKind.VOID and self.total(request.payment_id, OperationKind.CHARGE):
            return NotExecuted("it is paid")
        elif self._was_touched(request.payment_id) and request.amount.minor > self.left(
            request.payment_id, request.kind
        ):
            return NotExecuted("somebody has taken or returned it in the provider's dashboard")
        else:
            self._move(request)
        return self._success(request)

    def _success(self, request: GatewayRequest) -> Outcome:
        return Succeeded(f"ref-{request.provider_key}", request.amount.minor)

    def _cancel_opening(self, payment_id: UUID) -> None:
        for key, request in self._asked.items():
            if request.payment_id == payment_id and is_opening(request.kind) and key not in self.moved:
                self._know(request, Declined(DeclineReason.CANCELED, reference=f"ref-{key}"))

    def _let_go_of_the_rest(self, payment_id: UUID, kind: OperationKind) -> None:
        if kind is OperationKind.CAPTURE and not self.capabilities.multi_capture:
            self._let_go[payment_id] += self.left(payment_id, kind)

    def _move(self, request: GatewayRequest) -> None:
        self.moved[request.provider_key] = (request.kind, request.payment_id, request.amount.minor)
        held = self.total(request.payment_id, OperationKind.AUTHORIZE, OperationKind.CHARGE)
        taken = self.total(request.payment_id, OperationKind.CAPTURE, OperationKind.CHARGE)
        assert held >= taken + self.released(request.payment_id), "captured more than was held"
        self._let_go_of_the_rest(request.payment_id, request.kind)
        assert taken >= self.total(request.payment_id, OperationKind.REFUND), "refunded more than was captured"
        openings = [kind for kind, of, _ in self.moved.values() if of == request.payment_id and is_opening(kind)]
        assert len(openings) <= 1, "charged twice"


class Movement(NamedTuple):
    """Money that moved without us."""

    payment_id: UUID
    kind: OperationKind
    amount_minor: int
    reference: str


def is_opening(kind: OperationKind) -> bool:
    """Whether it begins a payment."""
    return kind in (OperationKind.AUTHORIZE, OperationKind.CHARGE)
