"""The demo's orders: a seeded, realistic stream of commands, each with the result that it must have.

The seed decides the orders. Payment ids and idempotency keys are new in every run, so runs do not affect each other.
"""

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final
from uuid import UUID, uuid4

from app.client import outgoing
from domain.commands import OperationKind

ORDERS_PER_SECOND: Final = 45.0
FOLLOW_UP_SECONDS: Final = 0.4

CURRENCIES: Final = {"USD": 45, "EUR": 30, "GBP": 10, "JPY": 10, "KWD": 5}
"""Each currency's weight. Stripe counts these in ISO 4217 minor units, as we do, so the sums compare directly."""
PAYPAL_CURRENCIES: Final = {"USD": 50, "EUR": 40, "JPY": 10}
DONG: Final = {"VND": 1}
SMALLEST: Final = {"KWD": 10, "VND": 1_000}
"""Amounts are multiples of this: Stripe takes three-decimal currencies in steps of ten; nobody pays single dong."""
LARGE: Final = {"VND": 20}
DECLINING_CARDS: Final = (
    "pm_card_visa_chargeDeclined",
    "pm_card_visa_chargeDeclinedInsufficientFunds",
    "pm_card_chargeDeclinedExpiredCard",
    "pm_card_chargeDeclinedIncorrectCvc",
    "pm_card_radarBlock",
)
UNREADABLE: Final = (b"\xff\xfe not text", b'{"type": "payment.charge.v1"', b'{"type": "payment.gift.v1"}', b"[]")


@dataclass(slots=True, eq=False)
class Planned:
    """One command, how often it is delivered, and the result that it must have."""

    command_id: UUID
    kind: OperationKind
    payment_id: UUID
    story: str
    expected: str
    deliveries: int = 0


@dataclass(frozen=True, slots=True)
class Sending:
    """One message at its time (seconds from the start). `planned` is None for an unreadable message."""

    at: float
    payment_id: UUID
    value: bytes
    planned: Planned | None


@dataclass(slots=True)
class Order:
    """One customer's order: a payment and the messages about it."""

    random: random.Random
    at: float
    story: str
    payment_id: UUID = field(default_factory=uuid4)
    sendings: list[Sending] = field(default_factory=list)
    currency: str = ""
    amount: int = 0
    gateway: str | None = None

    def __post_init__(self) -> None:
        self.pay_through(None, CURRENCIES)

    def pay_through(self, gateway: str | None, currencies: Mapping[str, int]) -> None:
        """Choose the gateway (None is the default one), one of these currencies, and a new amount."""
        self.gateway = gateway
        self.currency = self.random.choices(list(currencies), list(currencies.values()))[0]
        step = SMALLEST.get(self.currency, 1)
        scale = LARGE.get(self.currency, 1)
        self.amount = step * round(scale * (self.random.lognormvariate(8.2, 0.8) + 500) / step)

    def part(self) -> int:
        """An amount between a fifth and half of the whole."""
        step = SMALLEST.get(self.currency, 1)
        return step * int(self.amount * self.random.uniform(0.2, 0.5) / step)

    def open(self, kind: OperationKind, expected: str, payment_method: str = "pm_card_visa") -> Planned:
        """A charge or an authorization."""
        fields = {
            "amount_minor": self.amount,
            "currency": self.currency,
            "order_id": f"order-{str(self.payment_id)[:8]}",
            "customer_id": f"customer-{self.random.randrange(200)}",
            "payment_method": payment_method,
            "gateway": self.gateway,
        }
        return self.send(kind, expected, fields)

    def send(
        self, kind: OperationKind, expected: str, fields: dict[str, Any] | None = None, *, key: str | None = None
    ) -> Planned:
        command = outgoing(kind, self.payment_id, key or f"{kind}-{uuid4()}", fields or {})
        planned = Planned(command.command_id, kind, self.payment_id, self.story, expected)
        self.deliver(planned, command.value)
        return planned

    def deliver(self, planned: Planned | None, value: bytes) -> None:
        """Send the message a little after the previous one."""
        if planned is not None:
            planned.deliveries += 1
        self.sendings.append(Sending(self.at, self.payment_id, value, planned))
        self.at += self.random.uniform(0.0, FOLLOW_UP_SECONDS)


def charge(order: Order) -> None:
    order.open(OperationKind.CHARGE, "captured")


def charge_and_refund_parts(order: Order) -> None:
    order.open(OperationKind.CHARGE, "captured")
    for _ in range(order.random.choice((1, 1, 2))):
        order.send(OperationKind.REFUND, "refunded", {"amount_minor": order.part(), "currency": order.currency})


def charge_and_refund_all(order: Order) -> None:
    order.open(OperationKind.CHARGE, "captured")
    order.send(OperationKind.REFUND, "refunded")


def authorize_and_capture_twice(order: Order) -> None:
    order.open(OperationKind.AUTHORIZE, "authorized")
    order.send(OperationKind.CAPTURE, "captured", {"amount_minor": order.part(), "currency": order.currency})
    rest = None if order.random.random() < 0.5 else order.part()
    order.send(OperationKind.CAPTURE, "captured", {"amount_minor": rest})


def authorize_and_void(order: Order) -> None:
    order.open(OperationKind.AUTHORIZE, "authorized")
    order.send(OperationKind.VOID, "voided")


def declined_card(order: Order) -> None:
    kind = order.random.choice((OperationKind.CHARGE, OperationKind.AUTHORIZE))
    order.open(kind, "declined", order.random.choice(DECLINING_CARDS))


def refund_too_much(order: Order) -> None:
    order.open(OperationKind.CHARGE, "captured")
    order.send(OperationKind.REFUND, "command_rejected", {"amount_minor": order.amount * 2, "currency": order.currency})


def delivered_again(order: Order) -> None:
    planned = order.open(OperationKind.CHARGE, "captured")
    for _ in range(order.random.choice((1, 1, 2))):
        order.deliver(planned, order.sendings[0].value)


def same_key_other_content(order: Order) -> None:
    key = f"charge-{uuid4()}"
    fields = {
        "amount_minor": order.amount,
        "currency": order.currency,
        "order_id": f"order-{str(order.payment_id)[:8]}",
        "payment_method": "pm_card_visa",
    }
    order.send(OperationKind.CHARGE, "captured", fields, key=key)
    order.send(OperationKind.CHARGE, "command_rejected", fields | {"amount_minor": order.amount + 100}, key=key)


def unreadable(order: Order) -> None:
    order.deliver(None, order.random.choice(UNREADABLE))


def with_method(payment_method: str) -> Callable[[Order], None]:
    """A charge with a payment method that makes the simulator cause a fault or ask for 3-D Secure."""

    def tell(order: Order) -> None:
        order.open(OperationKind.CHARGE, "captured", payment_method)

    return tell


def voided_while_awaited(order: Order) -> None:
    order.open(OperationKind.CHARGE, "declined", "pm_card_threeDSecure2Required")
    order.send(OperationKind.VOID, "voided")


def refused_by_payer(order: Order) -> None:
    order.open(OperationKind.CHARGE, "declined", "pm_card_threeDSecure2Required")


def paypal_wallet(order: Order) -> None:
    order.pay_through("paypal", PAYPAL_CURRENCIES)
    order.open(OperationKind.CHARGE, "captured", "wallet")
    order.send(OperationKind.REFUND, "refunded", {"amount_minor": order.part(), "currency": order.currency})


def paypal_vaulted(order: Order) -> None:
    order.pay_through("paypal", {"USD": 1, "EUR": 1})
    order.open(OperationKind.AUTHORIZE, "authorized", "vault:good")
    order.send(OperationKind.CAPTURE, "captured", {"amount_minor": order.part(), "currency": order.currency})
    order.send(OperationKind.VOID, "voided")


def vnpay_paid(order: Order) -> None:
    """No refund: VNPay has no idempotency keys, so a refund that the crash interrupts would wait for a person."""
    order.pay_through("vnpay", DONG)
    order.open(OperationKind.CHARGE, "captured", "bank")


def momo_paid(order: Order) -> None:
    order.pay_through("momo", DONG)
    order.open(OperationKind.CHARGE, "captured", "wallet")
    order.send(OperationKind.REFUND, "refunded", {"amount_minor": order.part(), "currency": order.currency})


def momo_held(order: Order) -> None:
    order.pay_through("momo", DONG)
    order.open(OperationKind.AUTHORIZE, "authorized", "wallet")
    order.send(order.random.choice((OperationKind.CAPTURE, OperationKind.VOID)), "captured")
    planned = order.sendings[-1].planned
    assert planned is not None, "a command was planned"
    planned.expected = "captured" if planned.kind is OperationKind.CAPTURE else "voided"


def redirect_refused(order: Order) -> None:
    order.pay_through(order.random.choice(("vnpay", "momo")), DONG)
    order.open(OperationKind.CHARGE, "declined", "wallet")


def unsupported(order: Order) -> None:
    order.pay_through("vnpay", DONG)
    order.open(OperationKind.AUTHORIZE, "command_rejected", "bank")


Story = Callable[[Order], None]

REDIRECT_REFUSED: Final = "VNPay or MoMo, refused by the payer"
AUTHENTICATED: Final = "3-D Secure, passed by the payer"
REFUSED_BY_PAYER: Final = "3-D Secure, failed by the payer"
ABANDONED: Final = "3-D Secure, voided before the payer acted"
DISPUTED: Final = "charged, then disputed by the payer's bank"

STORIES: Final[dict[str, tuple[int, Story]]] = {
    "charged": (36, charge),
    "charged, then refunded in parts": (13, charge_and_refund_parts),
    "charged, then refunded": (4, charge_and_refund_all),
    "authorized, captured in two parts": (13, authorize_and_capture_twice),
    "authorized, then voided": (6, authorize_and_void),
    "card declined": (8, declined_card),
    "refund of more than was paid": (2, refund_too_much),
    "command delivered two or three times": (6, delivered_again),
    "same idempotency key, different content": (2, same_key_other_content),
    "answer lost after the provider charged": (3, with_method("pm_sandbox_lost_answer")),
    "request lost before the provider": (2, with_method("pm_sandbox_lost_request")),
    "provider fails (500) after charging": (1, with_method("pm_sandbox_500")),
    "provider busy (429)": (1, with_method("pm_sandbox_429")),
    "provider slow (2 s)": (2, with_method("pm_sandbox_slow")),
    "unreadable message": (1, unreadable),
    AUTHENTICATED: (4, with_method("pm_card_threeDSecure2Required")),
    REFUSED_BY_PAYER: (2, refused_by_payer),
    ABANDONED: (2, voided_while_awaited),
    DISPUTED: (2, charge),
    "PayPal, approved, refunded in part": (5, paypal_wallet),
    "PayPal, vaulted: part captured, rest voided": (3, paypal_vaulted),
    "VNPay, paid": (4, vnpay_paid),
    "MoMo, paid and refunded in part": (4, momo_paid),
    "MoMo, authorized, then captured or voided": (3, momo_held),
    REDIRECT_REFUSED: (2, redirect_refused),
    "VNPay, authorization (unsupported)": (1, unsupported),
}
"""What can happen to an order, and its weight."""

TROUBLED: Final = tuple(STORIES)[6:]
"""The stories in the table of faults and special cases: all but the six everyday ones."""
DELAYED: Final = frozenset((*tuple(STORIES)[9:14], *tuple(STORIES)[15:]))
"""Stories left out of the undisturbed latencies: those with a fault that takes time, and all from 3-D Secure on."""


def stream(count: int, seed: int) -> list[Sending]:
    """All messages of `count` orders, sorted by time. With 26 orders or more, each story occurs at least once."""
    source = random.Random(seed)  # noqa: S311 - a repeatable stream, no secret
    sendings = [sending for order in _orders(count, source) for sending in order.sendings]
    return sorted(sendings, key=lambda sending: sending.at)


def _orders(count: int, source: random.Random) -> Iterator[Order]:
    names = list(STORIES)
    weights = [weight for weight, _ in STORIES.values()]
    chosen = [*names, *source.choices(names, weights, k=max(0, count - len(names)))][:count]
    source.shuffle(chosen)
    for number, name in enumerate(chosen):
        order = Order(source, number / ORDERS_PER_SECOND, name)
        STORIES[name][1](order)
        yield order
