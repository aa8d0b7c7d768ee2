"""What the contract suite needs of each provider's simulator: how to pay, its books, and how to make it fail.

A new gateway adds one class here and one line to `PROVIDERS`; the whole suite then tests it.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, ClassVar, Final
from uuid import UUID

import httpx
from pydantic import SecretStr

from domain.commands import OperationKind
from domain.money import Money
from domain.operations import RequiresAction
from domain.ports import Gateway
from infra.gateways.momo import MoMoConfig, MoMoGateway
from infra.gateways.paypal import PayPalConfig, PayPalGateway
from infra.gateways.stripe import StripeConfig, StripeGateway
from infra.gateways.stripe_objects import ACTION_WINDOW
from infra.gateways.vnpay import VNPayConfig, VNPayGateway
from infra.sandbox import momo, vnpay
from tests.contract.paypal import PayPalSandbox

Effect = tuple[int, int, int]
"""What is held, captured and refunded for one of our payments, over all that was executed for it."""

CALLS: Final = {
    OperationKind.AUTHORIZE: "create",
    OperationKind.CHARGE: "create",
    OperationKind.CAPTURE: "capture",
    OperationKind.VOID: "cancel",
    OperationKind.REFUND: "refund",
}
"""The name, in fault rules, of the request that executes each operation."""

AUTHORIZE, CHARGE, CAPTURE, _VOID, REFUND = OperationKind
ON_A_PAGE: Final = {AUTHORIZE: "confirm", CHARGE: "confirm"}
"""The step at which the payer decides, and so at which the payer's side may decline."""


@dataclass
class Provider(ABC):
    """One provider in the sandbox at `url`."""

    url: str
    http: httpx.Client
    name: ClassVar[str]
    """The name of its gateway."""
    tells: ClassVar[frozenset[OperationKind]]
    """The operations whose amount its webhooks report."""
    amount = Money(1250, "USD")
    payment_method = "pm_card_visa"
    declined_method: str | None = None
    own = "/_sandbox"
    declined_at: ClassVar[Mapping[OperationKind, str]] = {AUTHORIZE: "create", CHARGE: "create", REFUND: "refund"}
    """The name, in fault rules, of the step at which an operation may be declined; other operations cannot be."""
    second_call: ClassVar[str | None] = None
    """The name, in fault rules, of our request that executes a payment after the payer consented, if one is needed."""
    remembers_errors = False
    """Whether a key that was answered with a 500 gets that answer from then on, though nothing was executed."""

    limits_before_execution = True
    """Whether a 429 proves that the request was not executed."""

    window: ClassVar[timedelta] = timedelta(0)
    """The age from which an operation may have expired for its payer."""
    tells_of_abandoned = False
    """Whether it may wait for a payer and sends a webhook when the payer has not come in time."""

    outside: ClassVar[frozenset[str]] = frozenset()
    """The events that may happen to a payment there without us and are reported by webhook: see `happens`."""

    @abstractmethod
    def gateway(self, *, timeout_seconds: float = 5) -> Gateway: ...

    @abstractmethod
    def effect(self, payment_id: UUID) -> Effect:
        """The payment's amounts in the provider's own books."""

    def pay(self, action: RequiresAction) -> None:
        """Consent as the payer."""
        assert action.url is not None, "a payer must know where to go"
        self.http.post(httpx.URL(action.url).copy_add_param("success", "true")).raise_for_status()

    def refuse(self, action: RequiresAction) -> None:
        """Refuse as the payer."""
        assert action.url is not None, "a payer must know where to go"
        self.http.post(httpx.URL(action.url).copy_add_param("success", "false")).raise_for_status()

    @abstractmethod
    def abandon(self, action: RequiresAction) -> None:
        """The payer does not come, and the time to do so is over, as far as the provider decides that."""

    def happens(self, event: str, reference: str) -> None:
        """Let an event of `outside` happen to the payment with this reference.

        `dispute`, then `won` or `lost`, concern what was captured; `lapse` concerns a hold.
        """
        raise AssertionError(f"{event} is not in `outside`, so no story of this provider may have it")

    def fails(self, kind: OperationKind) -> str | None:
        """The name, in fault rules, of this operation's request; None if the gateway sends nothing for it."""
        return CALLS[kind]

    def fault(self, action: str, operation: str | None, payment_id: UUID, **rule: Any) -> None:
        """Make the provider fail in this way, once unless `rule` says otherwise."""
        given = {"action": action, "operation": operation, "payment_id": str(payment_id), "times": 1} | rule
        self.http.post(f"{self.own}/faults", json=given).raise_for_status()

    def reset(self) -> None:
        """Make the provider forget everything and drop the webhooks that are on their way."""
        self.http.post(f"{self.own}/reset").raise_for_status()

    def send_webhooks(self, **manners: Any) -> None:
        """Set how webhooks are sent from now on: properly, except for these manners."""
        self.http.post(f"{self.own}/manners", json=manners).raise_for_status()

    def webhooks_under_way(self) -> int:
        return int(self.http.get(f"{self.own}/manners").raise_for_status().json()["under_way"])

    def heal(self) -> None:
        """Remove all faults."""
        self.http.delete(f"{self.own}/faults").raise_for_status()


class Stripe(Provider):
    name = "stripe"
    tells = frozenset({AUTHORIZE, CHARGE, CAPTURE, REFUND})
    outside = frozenset({"dispute", "won", "lost", "lapse"})
    declined_method: str | None = "pm_card_visa_chargeDeclined"
    remembers_errors = True

    def gateway(self, *, timeout_seconds: float = 5) -> Gateway:
        key = SecretStr("sk_test_contract")
        return StripeGateway(StripeConfig(api_key=key, api_base=self.url, timeout_seconds=timeout_seconds))

    def happens(self, event: str, reference: str) -> None:
        intent = f"{self.own}/payment_intents/{reference}"
        if event == "dispute":
            self._dispute = self.http.post(f"{intent}/dispute").raise_for_status().json()["id"]
        elif event == "lapse":
            self.http.post(f"{intent}/expire").raise_for_status()
        else:
            self.http.post(f"{self.own}/disputes/{self._dispute}/close?status={event}").raise_for_status()

    def effect(self, payment_id: UUID) -> Effect:
        answer = self.http.get("/_sandbox/payment_intents", params={"metadata[payment_id]": str(payment_id)})
        intents = answer.raise_for_status().json()["data"]
        names = ("amount_capturable", "amount_received", "refunded")
        held, captured, refunded = (sum(intent[name] for intent in intents) for name in names)
        return held, captured, refunded

    def abandon(self, action: RequiresAction) -> None:
        seconds = int(ACTION_WINDOW.total_seconds())
        self.http.post(f"{self.own}/payment_intents/{action.reference}/age?seconds={seconds}").raise_for_status()


class StripeWithAuthentication(Stripe):
    """Stripe with a card that requires 3-D Secure."""

    tells_of_abandoned = True
    payment_method = "pm_card_threeDSecure2Required"
    declined_method = None
    declined_at: ClassVar = {**Stripe.declined_at, **ON_A_PAGE}


class PayPal(Provider):
    name = "paypal"
    tells = Stripe.tells
    outside = frozenset({"dispute", "won", "lost"})  # a webhook reports a lapsed hold, but not who ended it
    payment_method = "vault:good"
    window = timedelta(hours=4)
    declined_method: str | None = "vault:declined-INSTRUMENT_DECLINED"
    own = "/_sandbox/paypal"
    declined_at: ClassVar = {**Provider.declined_at, CAPTURE: "capture"}
    remembers_errors = True

    def gateway(self, *, timeout_seconds: float = 5) -> Gateway:
        secret = SecretStr("secret")
        config = PayPalConfig(
            client_id="contract", client_secret=secret, api_base=self.url, timeout_seconds=timeout_seconds
        )
        return PayPalGateway(config)

    def happens(self, event: str, reference: str) -> None:
        if event == "dispute":
            unit = PayPalSandbox(self.url, self.http).order(reference)["purchase_units"][0]
            capture = unit["payments"]["captures"][0]["id"]
            self._dispute = self.http.post(f"{self.own}/captures/{capture}/dispute").raise_for_status().json()["id"]
        else:
            self.http.post(f"{self.own}/disputes/{self._dispute}/{event}").raise_for_status()

    def abandon(self, action: RequiresAction) -> None:
        self.http.post(f"{self.own}/orders/{action.reference}/expire").raise_for_status()

    def effect(self, payment_id: UUID) -> Effect:
        found = self.http.get(f"/_sandbox/paypal/payments/{payment_id}").raise_for_status().json()
        return found["held"], found["captured"], found["refunded"]


class PayPalWallet(PayPal):
    """PayPal with a payer who has to approve."""

    payment_method = "wallet"
    declined_method = None
    second_call = "confirm"
    declined_at: ClassVar = {**PayPal.declined_at, **ON_A_PAGE}

    def pay(self, action: RequiresAction) -> None:
        self.http.post(f"/_sandbox/paypal/orders/{action.reference}/approve").raise_for_status()

    def refuse(self, action: RequiresAction) -> None:
        self.http.post(f"/_sandbox/paypal/orders/{action.reference}/deny").raise_for_status()


class VNPay(Provider):
    name = "vnpay"
    tells = frozenset({CHARGE})
    amount = Money(50_000, "VND")
    payment_method = "bank"
    window = timedelta(minutes=31)
    own = "/_sandbox/vnpay"
    limits_before_execution = False  # VNPay does not document its HTTP statuses
    declined_at: ClassVar = {**Provider.declined_at, **ON_A_PAGE}

    def gateway(self, *, timeout_seconds: float = 5) -> Gateway:
        config = VNPayConfig(
            tmn_code=vnpay.TMN_CODE,
            hash_secret=SecretStr(vnpay.SECRET),
            pay_url=f"{self.url}/paymentv2/vpcpay.html",
            api_url=f"{self.url}/merchant_webapi/api/transaction",
            timeout_seconds=timeout_seconds,
            question_interval=timedelta(0),  # the simulator has no minimum between queries
        )
        return VNPayGateway(config)

    def abandon(self, action: RequiresAction) -> None:
        """Nobody opens the page, so VNPay never hears of the payment; the URL itself contains its end."""

    def effect(self, payment_id: UUID) -> Effect:
        found = self.http.get(f"{self.own}/books", params={"payment_id": str(payment_id)}).raise_for_status().json()
        held, captured, refunded = found["effect"]
        return held, captured, refunded

    def fails(self, kind: OperationKind) -> str | None:
        return None if kind is OperationKind.CHARGE else CALLS[kind]


class MoMo(VNPay):
    name = "momo"
    tells = frozenset({AUTHORIZE, CHARGE})
    payment_method = "wallet"
    own = "/_sandbox/momo"
    limits_before_execution = True
    window = timedelta(0)
    tells_of_abandoned = True

    def gateway(self, *, timeout_seconds: float = 5) -> Gateway:
        config = MoMoConfig(
            partner_code=momo.PARTNER,
            access_key=momo.ACCESS,
            secret_key=SecretStr(momo.SECRET),
            api_base=self.url,
            timeout_seconds=timeout_seconds,
        )
        return MoMoGateway(config)

    def abandon(self, action: RequiresAction) -> None:
        self.http.post(f"{self.own}/payments/{action.reference}/decide?code=1005").raise_for_status()

    def fails(self, kind: OperationKind) -> str | None:
        return CALLS[kind]


PROVIDERS: Final[Mapping[str, type[Provider]]] = {
    "stripe": Stripe,
    "stripe, 3-D Secure": StripeWithAuthentication,
    "paypal": PayPal,
    "paypal, wallet": PayPalWallet,
    "vnpay": VNPay,
    "momo": MoMo,
}
