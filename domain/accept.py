"""What a command does to a payment: it is refused, begun, or kept until the operation under way has its outcome."""

from typing import Final, assert_never

from domain.commands import AnyCommand, Command, OperationKind, Rejection, RejectionReason, UnacceptableCommand
from domain.draft import Draft
from domain.events import Replay
from domain.operations import Operation, OperationState
from domain.refusals import amount_of, gateway_of, refusal_of
from domain.requests import gateway_request

QUEUE_MAX: Final = 100
"""Commands that one payment may have waiting. All of them are read and written with it, and decided together once the
operation before them ends: thousands would hold up every other payment of their worker meanwhile."""

REPLAYS_DUE_MAX: Final = 1_000
"""Over all open operations of a payment. Replays are published in one transaction, with the result: a producer that
repeats a command for a day, while the payer is awaited, would make that transaction too large to be saved."""


def accept(draft: Draft, command: AnyCommand) -> None:
    """Decide a command whose key was never seen."""
    if command.idempotency_key is None:
        assert isinstance(command, UnacceptableCommand), "an acceptable command has a key"
        draft.publish_rejection(command, command.rejection, None)
        return
    operation = _receive(draft, command)
    if isinstance(command, UnacceptableCommand):
        _reject(draft, operation, command, command.rejection)
    elif _may_begin(draft, command):
        _begin(draft, operation, command)
    elif sum(each.state is OperationState.RECEIVED for each in draft.payment.operations) >= QUEUE_MAX:
        message = (
            f"{QUEUE_MAX} commands of this payment wait already; send it again, under a new key, once they have ended"
        )
        _reject(draft, operation, command, Rejection(RejectionReason.INVALID_STATE, message, ("payment_id",)))
    else:
        draft.keep(operation)


def repeat(draft: Draft, command: AnyCommand, stored: Operation) -> None:
    """Answer a command whose key was seen: its stored result again, or a conflict if it asks for something else."""
    if stored.fingerprint != command.fingerprint:
        message = (
            f"this idempotency key was already used for another command, the {stored.kind} of payment "
            f"{stored.payment_id}; that command stands and has, or will have, its own result. To run this one as well, "
            "send it under a new key"
        )
        refused = Rejection(RejectionReason.IDEMPOTENCY_CONFLICT, message, ("idempotency_key",))
        draft.publish_rejection(command, refused, None)
    elif stored.result is not None:
        draft.events.append(Replay(stored.payment_id, stored.result, command.traceparent))
    elif sum(each.replays_due for each in draft.payment.operations) < REPLAYS_DUE_MAX:
        operation = stored.copy()
        operation.replays_due += 1
        draft.keep(operation)


def _may_begin(draft: Draft, command: Command) -> bool:
    """Whether nothing else is under way, or only an opening that waits for the payer, which this would cancel."""
    if draft.payment.under_way is None:
        return True
    waiting = draft.payment.waiting_for_payer
    if waiting is None or waiting.is_leased or draft.payment.is_cancelling:
        return False
    gateway = draft.rules.gateways.get(waiting.gateway or "")
    return command.kind is OperationKind.VOID and gateway is not None and gateway.cancel_waiting


def _receive(draft: Draft, command: AnyCommand) -> Operation:
    draft.payment.last_operation += 1
    return Operation(
        payment_id=command.payment_id,
        number=draft.payment.last_operation,
        kind=command.kind,
        idempotency_key=command.idempotency_key,
        fingerprint=command.fingerprint,
        content=command.content,
        state=OperationState.RECEIVED,
        traceparent=command.traceparent,
        command=command if isinstance(command, Command) else None,
    )


def _begin(draft: Draft, operation: Operation, command: Command) -> None:
    """Decide a command whose turn it is: refuse it, or reserve its amount and hand it to the gateway."""
    refused = refusal_of(command, draft.payment, now=draft.now, rules=draft.rules)
    if refused is not None:
        _reject(draft, operation, command, refused)
        return
    amount = amount_of(command, draft.payment)
    gateway = gateway_of(command, draft.payment, draft.rules)
    operation = operation.copy()
    operation.state = OperationState.DISPATCHED
    operation.amount_minor = amount
    operation.gateway = gateway
    operation.attempts = 1
    operation.lease_token += 1
    operation.is_leased = True
    operation.due_at = draft.now + draft.rules.retry.lease
    operation.dispatched_at = draft.now
    waiting = draft.payment.waiting_for_payer
    if command.kind is OperationKind.VOID:
        operation.reference = draft.payment.gateway_payment_id if waiting is None else waiting.reference
    if waiting is not None:
        _stop_asking(draft, waiting)
    _reserve(draft, command, amount, gateway)
    draft.keep(operation)
    draft.requests.append(gateway_request(draft.payment, operation, command))


def _reserve(draft: Draft, command: Command, amount: int, gateway: str | None) -> None:
    payment = draft.payment
    match command.kind:
        case OperationKind.AUTHORIZE | OperationKind.CHARGE:
            payment.order_id = command.order_id
            payment.customer_id = command.customer_id
            payment.gateway = gateway
            payment.currency = command.currency
            payment.amount_minor = amount
        case OperationKind.VOID if payment.waiting_for_payer is not None:
            pass  # The waiting opening holds nothing yet, and another opening's hold is not meant.
        case OperationKind.CAPTURE | OperationKind.VOID:
            payment.reserved_capture_minor = min(amount, payment.capturable_minor)
        case OperationKind.REFUND:
            payment.reserved_refund_minor = amount
        case _:
            assert_never(command.kind)


def _stop_asking(draft: Draft, waiting: Operation) -> None:
    """Do not ask about the opening that waits while it is being cancelled: asking could execute it."""
    waiting = waiting.copy()
    waiting.due_at = None
    draft.keep(waiting)


def _reject(draft: Draft, operation: Operation, command: AnyCommand, rejection: Rejection) -> None:
    operation = operation.copy()
    operation.state = OperationState.REJECTED
    draft.keep(operation)
    draft.publish_rejection(command, rejection, operation)


def begin_waiting(draft: Draft) -> None:
    """Decide the commands that waited, until one of them is under way."""
    for operation in draft.payment.operations:
        if operation.state is OperationState.RECEIVED:
            assert operation.command is not None, "a waiting operation is loaded with its command"
            if _may_begin(draft, operation.command):
                _begin(draft, operation, operation.command)
