"""What the use cases need from the outside, as Protocols; `infra` matches them structurally, without inheritance."""

from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import NamedTuple, Protocol, runtime_checkable
from uuid import UUID

from domain.capabilities import Capabilities
from domain.commands import OperationKind
from domain.ledger import Transfer
from domain.operations import GatewayRequest, Operation, OperationState, Outcome
from domain.payment import Payment

Clock = Callable[[], datetime]
"""The current time, timezone-aware UTC."""


class Gateway(Protocol):
    """Our adapter of one provider.

    Each method has the provider execute one operation at most once per `request.provider_key`, however often it is
    called (at a provider without idempotency keys, whose `idempotency_retention` is zero, only if it is called once),
    and returns the provider's word on it. Amounts are in minor units. No database transaction may be open meanwhile.

    Raises:
        GatewayUnreachable: proof that this attempt was not executed.
        OutcomeUnknown: sent, but no readable answer; repeat with the same key or ask `status`.
    """

    @property
    def name(self) -> str: ...
    @property
    def capabilities(self) -> Capabilities: ...

    async def authorize(self, request: GatewayRequest) -> Outcome:
        """Hold `request.amount` for a later capture."""
        ...

    async def charge(self, request: GatewayRequest) -> Outcome:
        """Take `request.amount` from the payer at once."""
        ...

    async def capture(self, request: GatewayRequest) -> Outcome:
        """Take `request.amount` of the hold `request.gateway_payment_id`."""
        ...

    async def void(self, request: GatewayRequest) -> Outcome:
        """Release the rest of the hold `request.gateway_payment_id`, or cancel it while it waits for its payer."""
        ...

    async def refund(self, request: GatewayRequest) -> Outcome:
        """Return `request.amount` of what was captured of `request.gateway_payment_id`."""
        ...

    async def resume(self, request: GatewayRequest) -> Outcome:
        """Go on with an operation that waits for its payer, or that the provider is processing.

        For most providers this is `status`. Where the payer's consent is not yet the payment (PayPal), it executes what
        the payer consented to, at most once per `request.provider_key`. Where the provider would wait for the payer for
        ever (Stripe), it ends an abandoned operation and returns the provider's word after that.
        """
        ...

    async def status(self, request: GatewayRequest) -> Outcome:
        """Query what became of the operation; causes nothing. No trace of it is `Unknown`, not `NotExecuted`."""
        ...

    async def close(self) -> None: ...


@runtime_checkable
class Resting(Protocol):
    """A gateway that notices when its provider asks for fewer requests: a 429, a 503 with a time, or its own code."""

    def rests_seconds(self) -> float:
        """How long the provider should be spared requests that can wait, in seconds; 0 if it need not be."""
        ...


class Connections(NamedTuple):
    """The connections that a gateway holds open to its provider, at most `limit` in this process.

    A connection is in use from the beginning of a call, connecting included, and idle while it is kept for the next.
    """

    in_use: int
    idle: int
    limit: int


@runtime_checkable
class Pooled(Protocol):
    """A gateway that calls its provider over connections of its own."""

    def connections(self) -> Connections:
        """The connections as they are now; cheap enough for every scrape of the metrics."""
        ...


class Statement(NamedTuple):
    """One payment as its provider lists it, in our minor units; `payment_id` is our mark, None where it has none."""

    gateway_payment_id: str
    payment_id: UUID | None
    currency: str
    captured_minor: int
    refunded_minor: int


class Movement(NamedTuple):
    """Money that a provider took for us or returned, as it lists it, in our minor units.

    `reference` is the provider's id of the movement; `payment_id` and `operation_number` are our marks. A movement
    without a number was not caused by an operation of ours, but by somebody in the provider's dashboard.
    """

    reference: str
    moved_at: datetime
    is_refund: bool
    currency: str
    amount_minor: int
    payment_id: UUID | None = None
    operation_number: int | None = None


@runtime_checkable
class Movements(Protocol):
    """A gateway whose provider lists each capture and refund, for a comparison of whole days (`Listing.MOVEMENTS`)."""

    def movements(self, since: datetime, until: datetime) -> AsyncIterator[Movement]:
        """Every capture and refund that the provider made from `since` until before `until`.

        Raises:
            GatewayError: the list could not be read to its end.
        """
        ...


@runtime_checkable
class Statements(Protocol):
    """A gateway whose provider lists its payments, for a comparison of whole days (`Listing.PAYMENTS`)."""

    def statements(self, since: datetime, until: datetime) -> AsyncIterator[Statement]:
        """Every payment that the provider created from `since` until before `until`.

        Raises:
            GatewayError: the list could not be read to its end.
        """
        ...


class OutboxRow(NamedTuple):
    """One event on its way to subscribers. `payload` is the exact text of the message."""

    id: UUID
    payment_id: UUID
    type: str
    payload: str
    payment_seq: int
    occurred_at: str
    traceparent: str | None


class Changes(NamedTuple):
    """All that one batch of inputs changed; saved by a handful of set-based statements.

    `new_*` rows must not exist yet, the others must still be as they were read: otherwise `ConcurrentUpdate`.
    """

    new_payments: Sequence[Payment]
    payments: Sequence[Payment]
    new_operations: Sequence[Operation]
    operations: Sequence[Operation]
    transfers: Sequence[Transfer]
    outbox: Sequence[OutboxRow]
    decided_at: datetime
    notices: Sequence[int] = ()
    """The ids of the inbox rows that these changes apply."""


class WriteTransaction(Protocol):
    """The one write transaction. Leaving its block commits, raising rolls back."""

    async def lock_payments(self, payment_ids: Iterable[UUID]) -> dict[UUID, Payment]:
        """The payments that exist, each with its open operations, locked in ascending order of id."""
        ...

    async def find_operations(self, idempotency_keys: Iterable[str]) -> dict[str, Operation]:
        """The operations that were accepted under these keys."""
        ...

    async def operations_at(self, places: Iterable[tuple[UUID, int]]) -> dict[tuple[UUID, int], Operation]:
        """The operations that exist at these payments and numbers, whether open or ended."""
        ...

    async def operations_of_kind(
        self, places: Iterable[tuple[UUID, OperationKind]]
    ) -> dict[tuple[UUID, OperationKind], list[Operation]]:
        """All operations of these payments and kinds, whether open or ended, in the order accepted."""
        ...

    async def save(self, changes: Changes) -> None:
        """Write it all.

        Raises:
            ConcurrentUpdate: a new row exists already, or a fenced row moved on.
            InputRefusedByStore: a constraint refused a row.
        """
        ...


class PaymentStore(Protocol):
    """Where payments live. Every method but `now` raises StoreUnavailable when Postgres is away."""

    @property
    def now(self) -> Clock:
        """The store's clock, which all processes share: leases and the age of calls are measured by it."""
        ...

    def begin(self) -> AbstractAsyncContextManager[WriteTransaction]:
        """Open the one write transaction of a batch; leaving the block commits, raising rolls back."""
        ...

    async def save(self, changes: Changes) -> None:
        """Write changes that were decided without reading the stored rows: all of them, or nothing.

        Raises:
            ConcurrentUpdate: a row is not as the changes assume.
            InputRefusedByStore: a constraint refused a row.
        """
        ...

    def in_transaction(self) -> bool:
        """Whether the current task has a write transaction open."""
        ...

    async def claim_due(
        self, *, limit: int, lease: timedelta, rooms: Mapping[str, int], payment_id: UUID | None = None
    ) -> list[tuple[Payment, Operation]]:
        """Take over due operations, of one payment or of all: raise their lease token, return them with their payments.

        At most `limit` per gateway, or its entry in `rooms`: half of them the newest not executed yet, the rest the
        oldest due. Gateways missing from `rooms` are left to workers that have them, unless nobody has claimed their
        operations for hours. An operation whose lease ran out without an answer comes back `indeterminate`.
        """
        ...

    async def make_due(self, payment_id: UUID | None) -> int:
        """Make operations that wait for their next attempt due now, of one payment or of all; returns how many."""
        ...

    async def in_doubt(self) -> Mapping[OperationState, tuple[int, float]]:
        """By state: how many operations are in doubt, and for how many seconds the oldest has been under way."""
        ...

    async def stuck(self) -> Mapping[str, "Stuck"]:
        """What is stuck, by subject: `operation` (no worker has it), `hold` (past its end), `webhook` (not applied)."""
        ...

    async def claim_holds(
        self, payment_id: UUID | None = None, *, limit: int, first_delay: timedelta, delay_max: timedelta
    ) -> list["LapsedHold"]:
        """Claim the holds past their end that are due for a query, with nothing under way: of one payment, or of all.

        Each is due again after `first_delay`, doubled with every query up to `delay_max`, less a random part.
        """
        ...

    async def find_lapsed_holds(
        self, payment_id: UUID | None = None, *, after: "Place | None" = None, limit: int
    ) -> list["LapsedHold"]:
        """Holds past their end that still hold money, with nothing under way, soonest due first. Claims none."""
        ...

    async def make_holds_due(self, payment_id: UUID | None = None) -> int:
        """Make holds past their end due for a query now, however recent their last one; returns how many."""
        ...

    async def renew(self, held: Sequence["HeldLease"], *, lease: timedelta) -> list["HeldLease"]:
        """Extend these leases; returns those that are still held, without the ones that were taken over."""
        ...


Place = tuple[datetime, UUID]
"""The cursor of a list of holds: when the last one is due, and its payment's id."""


class Stuck(NamedTuple):
    """How many are stuck, for how long the oldest has been, and by how much the most overdue one is, in seconds."""

    number: int
    oldest_seconds: float
    overdue_seconds: float


class LapsedHold(NamedTuple):
    """A hold past its end, and when it is due for its next query."""

    payment: Payment
    operation: Operation
    due_at: datetime


class Received(NamedTuple):
    """A verified webhook for the inbox. `content` is the notice read from it, `body` the request's own body.

    The payment is named by our id or, where the message has only the provider's, by `gateway_payment_id`. A webhook
    that `is_about_nothing` (an event type that we do not know) is stored, and never applied.
    """

    gateway: str
    event_id: str
    type: str
    content: str
    body: bytes
    payment_id: UUID | None = None
    operation_number: int | None = None
    gateway_payment_id: str | None = None
    is_about_nothing: bool = False


class Accepted(NamedTuple):
    """What the inbox knows of a webhook: its payment, None if unknown here; whether its event is new; and the state
    that the operation it names was in."""

    payment_id: UUID | None
    is_new: bool
    currency: str | None = None
    state: OperationState | None = None
    amount_minor: int | None = None


class StoredNotice(NamedTuple):
    """A webhook in the inbox, about a payment that exists."""

    notice_id: int
    payment_id: UUID
    gateway: str
    event_id: str
    type: str
    operation_number: int | None
    content: str


class Inbox(Protocol):
    """Where webhooks are stored until they are applied. Every method raises StoreUnavailable when it is away."""

    async def accept(self, received: Sequence[Received]) -> list[Accepted]:
        """Store each event once, if its payment exists here and is of its gateway; on disk when this returns."""
        ...

    async def claim(self, *, limit: int, lease: timedelta) -> list[StoredNotice]:
        """Take over notices that are due, oldest first."""
        ...


class HeldLease(NamedTuple):
    """An operation that a worker holds, and its lease token."""

    payment_id: UUID
    operation_number: int
    lease_token: int


class RecentKeys(Protocol):
    """A hint whether idempotency keys are new; never relied upon."""

    async def are_new(self, idempotency_keys: Sequence[str]) -> bool:
        """Remember the keys; True if all of them seem to be new, False otherwise and when that is not known."""
        ...


class DeadLetters(Protocol):
    """Where messages that cannot be processed are kept whole, with the reason."""

    async def park(self, letters: Sequence["DeadLetter"]) -> None:
        """Return only when the broker has acknowledged all of them."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadLetter:
    """An original message, byte for byte, and why it was parked."""

    value: bytes | None
    key: bytes | None
    headers: Sequence[tuple[str, bytes]]
    topic: str
    partition: int
    offset: int
    reason: str
    detail: str
