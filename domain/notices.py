"""What a provider reports without being asked: a verified webhook, and why one is refused."""

from collections.abc import Mapping
from datetime import datetime
from enum import StrEnum
from typing import Final, NamedTuple, Protocol
from uuid import UUID

from domain.commands import OperationKind
from domain.operations import Outcome

BODY_BYTES_MAX = 262_144
"""No provider sends a larger one; it is refused unread."""


class DisputeStage(StrEnum):
    """The stage of a dispute. `LOST` is final: the money is gone."""

    OPENED = "opened"
    WON = "won"
    LOST = "lost"


class Dispute(NamedTuple):
    """A payer's bank takes `amount_minor` back, or gives it back to us."""

    dispute_id: str
    stage: DisputeStage
    amount_minor: int
    currency: str
    reason: str | None = None


class External(NamedTuple):
    """A refund or capture that somebody made in the provider's dashboard. `moved_at` is when the provider began it.

    `is_final` means of a capture that it leaves nothing to capture: the rest of the hold was let go.
    `is_reversal` means of a refund that the provider itself made it, and may report it as a dispute as well.
    """

    kind: OperationKind
    amount_minor: int
    moved_at: datetime | None = None
    is_final: bool = False
    is_reversal: bool = False


class WebhookRequest(NamedTuple):
    """An HTTP request as it came. `query` is the raw query string, `headers` have lower-case names."""

    method: str
    query: str
    headers: Mapping[str, str]
    body: bytes
    received_at: datetime


OWN_ANSWER: Final = "answer"
"""The type of a notice that no provider sent: an answer to our own call, received after its operation's end."""


class Notice(NamedTuple):
    """A verified message of a provider: which operation or payment it is about, and what it says about that.

    The operation is named by our own marks, which the provider returns, (`payment_id`, `operation_number`); where a
    message carries none (disputes), `gateway_payment_id` is the provider's payment, as in `Payment.gateway_payment_id`.
    `outcome` is evidence about that operation, as strong as the answer to a status query. A message with neither
    `outcome` nor `dispute` says nothing about money: it is stored and ignored. `currency` is the outcome's.
    `is_ripe` means that a waiting operation should be resumed now, since the payer consented.
    `external` is set where money moved without a mark of ours. Then `outcome` has the provider's id of the movement,
    and `gateway_payment_id` is the provider's payment it belongs to, where the message names it.
    `captured_minor` is the total captured of `gateway_payment_id`, by anyone, once it is final; None where the message
    does not say.
    """

    gateway: str
    event_id: str
    type: str
    payment_id: UUID | None = None
    operation_number: int | None = None
    gateway_payment_id: str | None = None
    outcome: Outcome | None = None
    currency: str | None = None
    dispute: Dispute | None = None
    is_ripe: bool = False
    external: External | None = None
    captured_minor: int | None = None

    @property
    def is_about_nothing(self) -> bool:
        """Whether it says nothing about money."""
        return self.outcome is None and self.dispute is None and not self.is_ripe


class Verdict(StrEnum):
    """What became of a webhook, from which each provider's answer follows."""

    STORED = "stored"
    DUPLICATE = "duplicate"
    ALREADY_FINAL = "already_final"
    """Stored; its operation had already ended."""
    AMOUNT_DIFFERS = "amount_differs"
    """Stored, for a person to look at: it names another amount or currency than ours."""
    UNKNOWN_PAYMENT = "unknown_payment"
    FORGED = "forged"
    STALE = "stale"
    MALFORMED = "malformed"
    TOO_LARGE = "too_large"
    UNAVAILABLE = "unavailable"
    """Could not be stored or verified now: the provider should send it again."""


class WebhookRefused(Exception):
    """A webhook that changes nothing. The detail is for our log, never for the sender."""

    def __init__(self, verdict: Verdict, detail: str) -> None:
        super().__init__(f"{verdict}: {detail}")
        self.verdict = verdict
        self.detail = detail


class WebhookAnswer(NamedTuple):
    """The HTTP answer that the provider demands."""

    status: int
    body: bytes = b""
    content_type: str = "text/plain"


class WebhookReader(Protocol):
    """One provider's webhooks: how they are verified, read and answered."""

    @property
    def gateway(self) -> str: ...

    async def read(self, request: WebhookRequest) -> Notice:
        """Verify the signature over the raw request, in constant time, then read it.

        The signed text, which is kept as evidence, is the body, or the query string of a request without a body.

        Raises:
            WebhookRefused: FORGED, STALE, MALFORMED, or UNAVAILABLE where verification itself could not be done.
        """
        ...

    def answer(self, verdict: Verdict, request: WebhookRequest) -> WebhookAnswer: ...

    async def close(self) -> None:
        """Close its connections, if it has any."""
        ...
