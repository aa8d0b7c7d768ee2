"""What `decide` takes and returns: a delivery, an answer, a notice or a ruling in, a decision out."""

from collections.abc import Sequence
from typing import NamedTuple
from uuid import UUID

from domain.commands import AnyCommand
from domain.events import Event, Replay
from domain.ledger import Transfer
from domain.notices import Notice
from domain.operations import GatewayRequest, NotExecuted, Operation, Outcome, Succeeded
from domain.payment import Payment


class Delivery(NamedTuple):
    """A command as it came from the topic, and what is stored under its idempotency key, if anything."""

    command: AnyCommand
    stored: Operation | None = None

    @property
    def payment_id(self) -> UUID:
        return self.command.payment_id


class Answer(NamedTuple):
    """The outcome of one gateway call. `lease_token` proves that the caller still held the operation.

    Without that proof the answer is stale, unless it says that money moved. If it comes after the operation's end, the
    write path applies it as a `Notified` without a row in the inbox.
    `was_stuck`: the operation had been taken over; for the metric of what reconciliation healed.
    """

    payment_id: UUID
    operation_number: int
    lease_token: int
    outcome: Outcome
    was_stuck: bool = False


class Notified(NamedTuple):
    """A verified webhook about this payment, and the operation that it names, if any, as it is stored.

    `notice_id` is its row in the inbox: it is applied once, in the transaction that saves what it changed. It is None
    where there was no webhook, but an answer (to a status query or an earlier call) about an operation that has ended.
    `known` has all of the payment's operations of that kind, open or ended, where the notice carries no mark of ours
    (`Notice.external`) or is a late success; for the end of a hold it has the payment's voids.
    """

    notice_id: int | None
    payment_id: UUID
    notice: Notice
    operation: Operation | None = None
    known: Sequence[Operation] = ()


class Ruling(NamedTuple):
    """What a person found out about an operation that needs review, where its provider will never say.

    `evidence` says how they know; the event that ends the operation repeats it.
    """

    payment_id: UUID
    operation_number: int
    outcome: Succeeded | NotExecuted
    evidence: str


Input = Delivery | Answer | Notified | Ruling


class Decision(NamedTuple):
    """What an input does. `operations` are the new and changed ones; `requests` go to the gateway after the commit.

    Three inputs change nothing. `is_stale`: an answer whose lease was taken over or whose operation has ended, or a
    ruling where none is needed. `disagrees`: a provider's word that contradicts its earlier one, so that a person must
    look. `is_postponed`: a word that cannot be understood before the operation under way has its outcome; it is to be
    given again later.
    """

    payment: Payment
    events: Sequence[Event | Replay] = ()
    operations: Sequence[Operation] = ()
    requests: Sequence[GatewayRequest] = ()
    transfers: Sequence[Transfer] = ()
    is_stale: bool = False
    disagrees: bool = False
    is_postponed: bool = False
