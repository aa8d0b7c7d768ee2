"""`payments reconcile --as`: a person ends an operation that needs review and whose provider never gives evidence.

It goes through the write path, like a provider's answer. The event and the stored result contain the evidence.
"""

import asyncio
import getpass
import json
from datetime import datetime
from typing import Final, NamedTuple
from uuid import UUID

import structlog

from app import wiring
from app.client import minor_units
from app.command_line import confirm
from app.console import new_console, print_json, safe_text
from app.one_shot import CONNECTIONS, one_shot_worker
from app.settings import Settings
from domain.commands import OperationKind
from domain.decision import Ruling
from domain.money import Money
from domain.operations import NotExecuted, Operation, OperationState, Succeeded, describe
from domain.payment import Payment
from domain.requests import OPENING
from handlers.messages.card_numbers import holds_card_number
from handlers.reconcile import Asker
from infra.postgres.store import PostgresStore

log = structlog.get_logger(__name__)

SUCCEEDED: Final = "succeeded"
NOT_EXECUTED: Final = "not-executed"
EVIDENCE_MAX: Final = 500
"""Characters: room to say where to look, not what is found there."""


class RulingRefused(ValueError):
    """Nothing was changed; the message says why."""


class Finding(NamedTuple):
    """What a person found out about an operation. `verdict` is `succeeded` or `not-executed`."""

    payment_id: UUID
    number: int
    verdict: str
    evidence: str
    reference: str | None = None
    amount: str | None = None
    """What the operation moved, if not the requested amount: like 12.50, in the payment's currency."""


def rule(settings: Settings, finding: Finding, *, yes: bool, as_json: bool) -> int:
    """End the operation as found, print its final event, and return the exit code.

    Prints on stderr what will be booked, and asks for confirmation unless `yes`.

    Raises:
        RulingRefused: the operation does not need review, or the finding is impossible.
        AmountUnusable: the amount cannot be read.
        typer.Abort: the answer was no; nothing was changed.
    """
    if finding.verdict not in (SUCCEEDED, NOT_EXECUTED):
        raise RulingRefused(f"--as is {SUCCEEDED} or {NOT_EXECUTED}")
    finding = finding._replace(evidence=_usable(finding.evidence))
    result = asyncio.run(_rule(settings, finding, yes=yes))
    if as_json:
        print_json(json.loads(result))
    else:
        done = f"operation {finding.number} is {finding.verdict}: {json.loads(result)['type']} is on its way."
        new_console().print(f"{finding.payment_id}  {done}", soft_wrap=True)
    return 0


def _usable(evidence: str) -> str:
    evidence = evidence.strip()
    if not evidence or len(evidence) > EVIDENCE_MAX or not evidence.isprintable():
        raise RulingRefused(f"--evidence says in one line of up to {EVIDENCE_MAX} characters how you know")
    if holds_card_number(evidence):
        raise RulingRefused("--evidence is published, and may not hold a card number")
    return evidence


async def _rule(settings: Settings, finding: Finding, *, yes: bool) -> str:
    async with wiring.connected(settings, connections=CONNECTIONS) as (gateways, _, store):
        payment, operation = await _load(store, finding)
        outcome = _outcome(payment, operation, finding, now=store.now())
        new_console(to_stderr=True).print(_in_words(payment, operation, outcome), soft_wrap=True)
        if not yes:
            confirm("Go on?")
        if isinstance(outcome, NotExecuted):  # Only now, because people take their time to answer.
            await _look_again(Asker(gateways, wiring.create_paces(settings, gateways)), payment, operation)
        async with one_shot_worker(settings, store, gateways, lambda found: None) as worker:
            given = Ruling(finding.payment_id, finding.number, outcome, finding.evidence)
            applied = await worker.write_path.apply([given])
            for refused in applied.refused:
                raise RulingRefused(f"nothing was changed: {refused.error}")
            # Operations that waited for this one go on at once.
            worker.submit(applied.requests)
            await worker.wait_until_idle()
        _, operation = await _load(store, finding)
        result = _result(operation, finding.evidence)
    log.warning(
        "a person decided an outcome",
        payment=str(finding.payment_id),
        operation=finding.number,
        outcome=finding.verdict,
        evidence=finding.evidence,
        reference=finding.reference,
        amount_minor=outcome.amount_minor if isinstance(outcome, Succeeded) else None,
        user=_user(),
    )
    return result


async def _look_again(asker: Asker, payment: Payment, operation: Operation) -> None:
    """Ask the provider once more: operations in review are sent again at times, perhaps after the person looked.

    Raises:
        RulingRefused: the provider shows the operation as executed.
    """
    answer = await asker.ask(payment, operation)
    outcome = answer.outcome
    if isinstance(outcome, Succeeded):
        raise RulingRefused(
            f"the provider shows it by now: {describe(outcome)}. "
            f"`payments reconcile --now --payment {payment.payment_id}` applies that"
        )
    word = describe(outcome) if outcome else answer.why_not
    new_console(to_stderr=True).print(safe_text(f"The provider, asked once more: {word}."), soft_wrap=True)


async def _load(store: PostgresStore, finding: Finding) -> tuple[Payment, Operation]:
    payment_id, number = finding.payment_id, finding.number
    async with store.begin() as transaction:
        payments = await transaction.lock_payments([payment_id])
        operations = await transaction.operations_at([(payment_id, number)])
    if not operations:
        raise RulingRefused(f"payment {payment_id} has no operation {number}: payments show {payment_id}")
    return payments[payment_id], operations[payment_id, number]


def _in_words(payment: Payment, operation: Operation, outcome: Succeeded | NotExecuted) -> str:
    """What will be booked, and the requested amount if that differs."""
    asked = _asked(payment, operation)
    place = f"{payment.payment_id}  {operation.kind} {operation.number} at {operation.gateway}"
    if isinstance(outcome, NotExecuted):
        return f"{place}: nothing will be booked of the {asked} that was asked for."
    if operation.kind is OperationKind.VOID:
        return f"{place}: what it was sent to release or cancel counts as that, and no money is booked."
    moved = asked if outcome.amount_minor is None else Money(outcome.amount_minor, asked.currency)
    return f"{place}: {moved} will be booked" + ("." if moved == asked else f", and {asked} was asked for.")


def _asked(payment: Payment, operation: Operation) -> Money:
    assert payment.currency is not None, "a payment with a dispatched operation has a currency"
    assert operation.amount_minor is not None, "a dispatched operation has an amount"
    return Money(operation.amount_minor, payment.currency)


def _outcome(payment: Payment, operation: Operation, finding: Finding, *, now: datetime) -> Succeeded | NotExecuted:
    if operation.state is not OperationState.NEEDS_REVIEW:
        raise RulingRefused(
            f"operation {operation.number} is {operation.state}: a person decides only what is "
            f"{OperationState.NEEDS_REVIEW}; of all else the provider's word is awaited, or was heard"
        )
    if operation.is_held(now):
        raise RulingRefused(
            f"operation {operation.number} is being sent or asked about just now, so that what you found may be old "
            "news: look again in a minute"
        )
    if finding.verdict == NOT_EXECUTED:
        if finding.reference is not None:
            raise RulingRefused("--reference is the provider's id of what succeeded; what was not executed has none")
        if finding.amount is not None:
            raise RulingRefused("--amount is what was moved by what succeeded; what was not executed moved nothing")
        return NotExecuted("a person found that the provider did not execute it")
    known = finding.reference or operation.reference
    if known is None and operation.kind in OPENING:
        raise RulingRefused(
            f"a {operation.kind} that succeeded needs --reference, the provider's id of the payment: captures and "
            "refunds name it"
        )
    return Succeeded(known or "", _moved_minor(payment, operation, finding.amount))


def _moved_minor(payment: Payment, operation: Operation, amount: str | None) -> int | None:
    if amount is None:
        return None
    if operation.kind is OperationKind.VOID:
        raise RulingRefused("--amount is not for a void: it releases all that is held")
    asked = _asked(payment, operation)
    moved = Money(minor_units(amount, asked.currency), asked.currency)
    # Somebody may have captured or refunded more in the provider's dashboard; the payment's amounts limit those.
    if operation.kind in OPENING and moved.minor > asked.minor:
        raise RulingRefused(
            f"--amount says {moved}, and {asked} was asked for: no provider takes more from a payer than was asked for"
        )
    return moved.minor


def _result(operation: Operation, evidence: str) -> str:
    """The final event that the ruling led to.

    Raises:
        RulingRefused: it led to no final event.
    """
    final = (operation.result or "null").split("\n")[0]
    if (json.loads(final) or {}).get("evidence") == evidence:
        return final
    if operation.state is OperationState.NEEDS_REVIEW:
        raise RulingRefused(
            "nothing was changed: the payment's amounts leave no room for it (see payments show), so something "
            "else is wrong, too"
        )
    raise RulingRefused(f"nothing was changed by this: meanwhile the provider's word came, and it is {operation.state}")


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "unknown"
