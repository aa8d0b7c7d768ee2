"""Metrics and logs of a saved batch: duplicates, operations that were healed, contradictions with the books."""

from collections.abc import Iterable, Sequence, Set
from datetime import datetime

import structlog

from domain.decision import Answer, Decision, Input, Notified
from domain.events import Event
from domain.holds import is_end_of_hold
from domain.operations import IN_DOUBT, UNDER_WAY, Operation, OperationState, Succeeded
from domain.payment import Payment
from handlers import metrics

log = structlog.get_logger(__name__)


class BatchCounts:
    """Collected while a batch is decided. Counts of a batch that is not saved are discarded with it."""

    def __init__(self) -> None:
        self.duplicates = 0
        self._stale = 0
        self._postponed = 0
        self._disagreeing: list[Notified] = []
        self._contradicted: list[Operation] = []
        self._healed: list[tuple[Operation, str]] = []

    def note(self, given: Input, decision: Decision, before: Payment | None) -> None:
        """Note one decision; `before` is the payment as it was before it."""
        if decision.is_postponed:
            self._note_postponed(given)
            return
        if decision.disagrees and isinstance(given, Notified) and given.notice_id is not None:
            self._disagreeing.append(given)
        if decision.is_stale:
            self._stale += 1
        else:
            self._note_reconciled(given, decision, before)

    def _note_postponed(self, given: Input) -> None:
        self._postponed += 1
        if isinstance(given, Notified) and given.notice_id is None and given.operation is not None:
            self._contradicted.append(given.operation)  # It does not wait in the inbox, so a person must look.

    def _note_reconciled(self, given: Input, decision: Decision, before: Payment | None) -> None:
        """Note stuck operations that this decision ended, and answers that contradict what is booked."""
        was_stuck = isinstance(given, Answer) and given.was_stuck
        if was_stuck or (before is not None and before.has_indeterminate):
            ended = [each for each in decision.operations if not each.is_open and _was(UNDER_WAY, before, each)]
            self._healed += [(each, each.state.value) for each in ended if was_stuck or _was(IN_DOUBT, before, each)]
        if isinstance(given, Answer) and isinstance(given.outcome, Succeeded):
            self._contradicted += [each for each in decision.operations if each.state is OperationState.NEEDS_REVIEW]
        if isinstance(given, Notified) and given.notice_id is None and given.operation is not None:
            word = "hold_released" if is_end_of_hold(given.operation, given.notice.outcome) else "late_success"
            self._healed += [(given.operation, word)] if decision.events else []
            self._contradicted += [given.operation] if decision.disagrees else []

    def report(
        self, *, notices: Sequence[int], events: Iterable[Event], operations: Iterable[Operation], decided_at: datetime
    ) -> None:
        """Count what was saved. Never raises: after the commit, an error would make the batch look refused."""
        try:
            metrics.NOTICES_APPLIED.inc(len(notices))
            self._count()
            for event in events:
                metrics.results(event.command, event.kind).inc()
            for operation in operations:
                _time(operation, decided_at)
        except Exception:
            log.exception("a saved batch was not counted")

    def _count(self) -> None:
        metrics.DUPLICATES.inc(self.duplicates)
        metrics.STALE_ANSWERS.inc(self._stale)
        metrics.NOTICES_POSTPONED.inc(self._postponed)
        for operation, state in self._healed:
            metrics.HEALED.labels(operation.gateway or "", state).inc()
        for operation in self._contradicted:
            metrics.DISAGREEING.labels(operation.gateway or "").inc()
            log.error("provider's answer contradicts what is booked", key=operation.provider_key)
        for given in self._disagreeing:
            metrics.NOTICES_DISAGREEING.labels(given.notice.gateway).inc()
            log.error(
                "webhook contradicts what is known", payment=str(given.payment_id), event_id=given.notice.event_id
            )


def _time(operation: Operation, decided_at: datetime) -> None:
    if operation.result is not None and operation.dispatched_at is not None and not operation.is_external:
        metrics.result_seconds(operation.kind).observe((decided_at - operation.dispatched_at).total_seconds())


def _was(states: Set[OperationState], payment: Payment | None, operation: Operation) -> bool:
    before = payment.operations if payment else ()
    return any(each.number == operation.number and each.state in states for each in before)
