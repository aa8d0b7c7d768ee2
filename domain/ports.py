"""What the use cases need from the outside, as Protocols; `infra` fits them by shape and inherits nothing."""

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

    Each method executes or re-executes one operation at most once per `request.provider_key` (where
    `idempotency_retention` is zero only if it is called once), and returns the provider's word on it. No database
    transaction may be open while it runs.

    Raises:
        GatewayUnreachable: proof that this attempt was not executed.
        OutcomeUnknown: sent, but no readable answer; repeat with the same key or ask `status`.
    """

    @property
    def name(self) -> str: ...
    @property
    def capabilities(self) -> Capabilities: ...

    async def authorize(self, request: GatewayRequest) -> Outcome: ...
    async def charge(self, request: GatewayRequest) -> Outcome: ...
    async def capture(self, request: GatewayRequest) -> Outcome: ...
    async def void(self, request: GatewayRequest) -> Outcome: ...
    async def refund(self, request: GatewayRequest) -> Outcome: ...

    async def resume(self, request: GatewayRequest) -> Outcome:
        """Go on with an operation that the provider has: it waits for the payer, or is being processed.

        For most it is `status`. Where the payer's consent is not yet the payment (PayPal), this executes what was
        consented to, at most once for `request.provider_key`. Where the provider would wait for its payer for ever
        (Stripe), this ends what was abandoned, and tells what the provider says of it then.
        """
        ...

    async def status(self, request: GatewayRequest) -> Outcome:
        """What became of the operation, without causing anything. No trace of it is `Unknown`, not `NotExecuted`."""
        ...

    async def close(self) -> None: ...


@runtime_checkable
class Resting(Protocol):
    """A gateway that notices when its provider asks for fewer requests: 429, 503 with a time, or a word of its own."""

    def rests_seconds(self) -> float:
        """For how long the provider should not be asked anything that can wait; 0 for not at all."""
        ...


class Connections(NamedTuple):
    """Those that a gateway holds open to its provider, of at most `limit` in this process.

    One is in use from the beginning of a call, connecting included, and idle while it is kept for the next one.
    """

    in_use: int
    idle: int
    limit: int


@runtime_checkable
class Pooled(Protocol):
    """A gateway that calls its provider over connections of its own."""

    def connections(self) -> Connections:
        """As they are now; cheap enough for every look at the metrics."""
        ...


class Statement(NamedTuple):
    """One payment as its provider lists it, in our minor units; `payment_id` is our mark, None where it has none."""

    gateway_payment_id: str
    payment_id: UUID | None
    currency: str
    captured_minor: int
    refunded_minor: int


class Movement(NamedTuple):
    """Money that a provider took for us or returned, as it lists it, in our minor units. `reference` is the movement's.

    `payment_id` and `operation_number` are our marks. Without a number no operation of ours is known to have caused it:
    somebody else did, at the provider's pages.
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
    """Places in the inbox that are applied by this."""


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
        """The store's clock, by which leases and the age of calls are told: all processes share it."""
        ...

    def begin(self) -> AbstractAsyncContextManager[WriteTransaction]: ...

    async def save(self, changes: Changes) -> None:
        """Write changes that were decided without a look at the stored rows: all of them, or nothing.

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
        """Take over operations that are due: raise their lease token and return them with their payments.

        Of one payment, or of all; per gateway at most `limit` or its entry in `rooms`, half of it the newest
        not executed yet. `rooms` has the caller's gateways; of others: what nobody claimed for hours.
        An operation whose lease ran out without an answer comes back `indeterminate`.
        """
        ...

    async def make_due(self, payment_id: UUID | None) -> int:
        """Have operations that wait for their next attempt claimed at once: of one payment, or of all."""
        ...

    async def in_doubt(self) -> Mapping[OperationState, tuple[int, float]]:
        """How many operations are in doubt, by state, and for how many seconds the oldest was under way."""
        ...

    async def stuck(self) -> Mapping[str, "Stuck"]:
        """What there is of each subject: `operation` (nobody is working on it just now), `hold` (past its end) and
        `webhook` (in the inbox, and not applied)."""
        ...

    async def claim_holds(
        self, payment_id: UUID | None = None, *, limit: int, first_delay: timedelta, delay_max: timedelta
    ) -> list["LapsedHold"]:
        """Take holds past their end that are to be asked about now, with nothing under way: of one payment, or of all.

        Each is due again after `first_delay`, doubled with every question up to `delay_max`, less a spread.
        """
        ...

    async def find_lapsed_holds(
        self, payment_id: UUID | None = None, *, after: "Place | None" = None, limit: int
    ) -> list["LapsedHold"]:
        """Holds past their end that hold money still, with nothing under way, soonest due first. Claims none."""
        ...

    async def make_holds_due(self, payment_id: UUID | None = None) -> int:
        """Have holds past their end asked about at once, however lately they were; how many there are."""
        ...

    async def renew(self, held: Sequence["HeldLease"], *, lease: timedelta) -> list["HeldLease"]:
        """Start these leases anew, except those that were taken over; which of them run."""
        ...


Place = tuple[datetime, UUID]
"""Where a list of holds goes on: when the last one is due, and its payment's id."""


class Stuck(NamedTuple):
    """How many, for how many seconds the oldest has been, and for how many one has been due at most."""

    number: int
    oldest_seconds: float
    overdue_seconds: float


class LapsedHold(NamedTuple):
    """A hold past its end, and when it is to be asked about next."""

    payment: Payment
    operation: Operation
    due_at: datetime


class Received(NamedTuple):
    """A verified webhook for the inbox. `content` is what it says, `body` the request's own body.

    The payment is named by our id or, where the message has only the provider's, by `gateway_payment_id`. What
    `is_about_nothing` (an event type that we do not know) is stored, and never applied.
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
    """What the inbox knows of a webhook: the payment, None if there is none here; whether its event is new; and where
    the operation stood that it names."""

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
    """Where webhooks wait, safely, until they are applied. Every method raises StoreUnavailable when it is away."""

    async def accept(self, received: Sequence[Received]) -> list[Accepted]:
        """Store each event once, if its payment exists here and is of its gateway; on disk when this returns."""
        ...

    async def claim(self, *, limit: int, lease: timedelta) -> list[StoredNotice]:
        """Take over notices that are due, oldest first."""
        ...


class HeldLease(NamedTuple):
    """An operation that a worker holds, and the token by which it does."""

    payment_id: UUID
    operation_number: int
    lease_token: int


class RecentKeys(Protocol):
    """A hint whether idempotency keys are new; never the truth."""

    async def are_new(self, idempotency_keys: Sequence[str]) -> bool:
        """Note the keys; True if all of them seem to be new, False otherwise and when nobody can tell."""
        ...


class DeadLetters(Protocol):
    """Where messages go that cannot be processed: kept whole, with the reason."""

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
