"""What a person's finding does to an operation whose provider will never give evidence."""

from dataclasses import replace

from domain.accept import begin_waiting
from domain.amounts import fits
from domain.decision import Ruling
from domain.draft import Draft
from domain.events import Event, Replay
from domain.operations import NotExecuted, Operation, OperationState, Succeeded
from domain.settle import settle_outcome


def rule(draft: Draft, given: Ruling) -> None:
    """End an operation that needs review as the person found. For any other, only the provider's evidence counts.

    It ends as on the provider's word, with the amount that the person found moved, so a later word of the provider is
    handled as late news. It stays in review if the amounts have no room for that. A ruling on an operation that a
    worker holds is stale: that worker may just have sent it again.
    """
    operation = draft.under_way(given.operation_number)
    if operation is None or operation.state is not OperationState.NEEDS_REVIEW or operation.is_held(draft.now):
        draft.is_stale = True
        return
    found = _as_found(operation, given.outcome)
    settle_outcome(draft, found if fits(draft, found) else operation, given.outcome)
    draft.events = [_with_evidence(each, operation, given.evidence) for each in draft.events]
    begin_waiting(draft)


def _as_found(operation: Operation, outcome: Succeeded | NotExecuted) -> Operation:
    """The operation with the amount that it moved, where that differs from the amount asked for."""
    if not isinstance(outcome, Succeeded) or outcome.amount_minor is None:
        return operation
    return replace(operation, amount_minor=outcome.amount_minor)


def _with_evidence(event: Event | Replay, operation: Operation, evidence: str) -> Event | Replay:
    if isinstance(event, Replay) or event.operation_number != operation.number:
        return event
    return event._replace(evidence=evidence, reference=event.reference or operation.reference)
