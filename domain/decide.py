"""`decide`: what an input does to a payment. Pure: no database, no Kafka, no clock, same input same decision.

Operations of one payment run one at a time, in the order accepted: what arrives meanwhile waits as `received` and is
decided as soon as the operation before it has its outcome. `accept.py` has what a command does, `settle.py` what a
gateway's answer does, `apply_notice.py` what a webhook does and `ruling.py` what a person's finding does. They share
`draft.py`, `amounts.py`, `holds.py` and `voids.py`.
"""

from datetime import datetime
from typing import assert_never

from domain.accept import accept, repeat
from domain.apply_notice import apply_notice
from domain.decision import Answer, Decision, Delivery, Input, Notified, Ruling
from domain.draft import Draft
from domain.holds import doubt_hold
from domain.payment import Payment
from domain.rules import Rules
from domain.ruling import rule
from domain.settle import settle


def decide(payment: Payment | None, given: Input, *, now: datetime, rules: Rules) -> Decision:
    """What this input does to this payment: new state, events, operations, gateway requests, ledger transfers.

    A refusal is also a decision: its event is `command_rejected`. An input that was applied before changes nothing,
    except that a repeated command is owed its stored result again.
    """
    draft = Draft(payment.copy() if payment else Payment(given.payment_id), now, rules)
    match given:
        case Delivery():
            if given.stored is None:
                accept(draft, given.command)
            else:
                repeat(draft, given.command, given.stored)
        case Answer():
            settle(draft, given)
            doubt_hold(draft, given.outcome)
        case Notified():
            apply_notice(draft, given)
        case Ruling():
            rule(draft, given)
        case _:
            assert_never(given)
    return draft.decision()
