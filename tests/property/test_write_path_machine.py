"""No sequence of deliveries, answers, crashes and clocks breaks a promise of the write path on a real Postgres.

The long run is `PAYMENTS_TEST_SCHEDULES=300 pytest --timeout 4000 tests/property/test_write_path_machine.py`, with that
many schedules for each gateway, at two or three a second.
"""

import asyncio
import json
from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import Any, ClassVar
from uuid import UUID

import asyncpg
import pytest
from uuid_utils.compat import uuid7

from domain.decision import Input
from domain.events import FINAL_EVENTS
from domain.ledger import Account, Transfer
from domain.operations import GatewayRequest, Operation
from domain.payment import Payment
from domain.rules import Rules
from handlers.sweep import _request
from handlers.write_path import WritePath
from infra.postgres.pool import create_pool
from infra.postgres.statements import OPERATION_COLUMNS, PAYMENT_COLUMNS
from infra.postgres.store import PostgresStore, _operation, _payment
from tests.property.machine import GATEWAYS, PaymentMachine, Shell, machine_of, run_schedules, schedules_asked_for
from tests.support.memory import START, Told
from tests.support.service import NoHint, WrongHint

REJECTED = "payment.command_rejected.v1"
FINAL = {f"payment.{kind}.v1" for kind in FINAL_EVENTS}


class PostgresShell:
    """The write path on the test's own database, whose tables are emptied for each example."""

    def __init__(self, given: Rules, loop: asyncio.AbstractEventLoop, pool: Any, observer: asyncpg.Connection) -> None:
        self.now = START
        self._rules = given
        self._loop = loop
        self._store = PostgresStore(pool)
        self._observer = observer
        self._is_forgetful = True
        self._paths = [self._path(WrongHint()), self._path(NoHint())]
        self._run(observer.execute("SET session_replication_role = replica"))
        self._run(observer.execute("TRUNCATE payments, operations, outbox, ledger"))

    def apply(self, inputs: list[Input]) -> list[GatewayRequest]:
        """Apply, alternating between a hint that all keys are new and no hint."""
        self._paths.reverse()
        applied = self._run(self._paths[0].apply(inputs))
        assert not applied.refused, applied.refused
        return list(applied.requests)

    def claim(self, payment_id: UUID, number: int) -> list[GatewayRequest]:
        """Make the operation due, and claim it as the sweep does."""
        due = "UPDATE operations SET due_at = now() - interval '1 s' WHERE payment_id = $1 AND number = $2"
        not_due = "UPDATE operations SET due_at = now() + interval '1 h' WHERE due_at IS NOT NULL"
        self._run(self._observer.execute(not_due))
        self._run(self._observer.execute(due, payment_id, number))
        claimed = self._run(
            self._store.claim_due(limit=5, lease=timedelta(seconds=60), rooms=dict.fromkeys(GATEWAYS, 5))
        )
        assert [(operation.payment_id, operation.number) for _, operation in claimed] == [(payment_id, number)]
        return [request for each in claimed if (request := _request(*each))]

    def pass_time(self, duration: timedelta) -> None:
        """Move the worker's clock forward."""
        self.now += duration

    def operations(self) -> list[Operation]:
        """All operations, including those that have ended."""
        rows = self._fetch(f"SELECT {OPERATION_COLUMNS} FROM operations ORDER BY payment_id, number")
        return [_operation(row) for row in rows]

    def told(self) -> list[Told]:
        """The outbox in the order of the table."""
        return [_told(row["payload"]) for row in self._fetch("SELECT payload FROM outbox ORDER BY id")]

    def transfers(self) -> list[Transfer]:
        """The ledger."""
        rows = self._fetch("SELECT payment_id, payment_seq, debit, credit, amount_minor, currency FROM ledger")
        return [
            Transfer(payment_id, seq, Account(debit), Account(credit), amount_minor, currency)
            for payment_id, seq, debit, credit, amount_minor, currency in rows
        ]

    def found_payments(self) -> dict[UUID, Payment]:
        """All payments with their open operations."""
        still_open = [each for each in self.operations() if each.is_open]
        rows = self._fetch(f"SELECT {PAYMENT_COLUMNS} FROM payments")
        payments = {}
        for row in rows:
            own = tuple(each for each in still_open if each.payment_id == row["payment_id"])
            assert row["open_operations"] == len(own)
            payments[row["payment_id"]] = _payment(row, own)
        return payments

    def _clock(self) -> datetime:
        return self.now

    def _path(self, hint: Any) -> WritePath:
        return WritePath(store=self._store, rules=self._rules, clock=self._clock, new_id=uuid7, recent=hint)

    def _fetch(self, query: str) -> list[Any]:
        return list(self._run(self._observer.fetch(query)))

    def _run(self, coroutine: Any) -> Any:
        return self._loop.run_until_complete(coroutine)


def _told(payload: str) -> Told:
    event = json.loads(payload)
    return Told(
        UUID(event["payment_id"]),
        event["payment_seq"],
        event["type"].split(".")[1],
        event["idempotency_key"],
        event["operation_number"],
        event["replayed"],
        event["type"] in FINAL,
        event.get("reason") if event["type"] == REJECTED else None,
    )


@pytest.fixture
def shells(postgres_url: str) -> Iterator[type[PaymentMachine]]:
    """A machine class that works on this test's database."""
    loop = asyncio.new_event_loop()
    pool = loop.run_until_complete(create_pool(postgres_url, size=2))
    observer = loop.run_until_complete(asyncpg.connect(postgres_url))

    class WritePathMachine(PaymentMachine):
        """The write path and Postgres."""

        around: ClassVar[tuple[Any, ...]] = (loop, pool, observer)

        def new_shell(self, given: Rules) -> Shell:
            return PostgresShell(given, *self.around)

    yield WritePathMachine
    loop.run_until_complete(observer.close())
    loop.run_until_complete(pool.close())
    loop.close()


@pytest.mark.parametrize("gateway", GATEWAYS)
def test_no_sequence_breaks_a_promise_of_the_write_path(shells: type[PaymentMachine], gateway: str) -> None:
    run_schedules(machine_of(shells, gateway), schedules=schedules_asked_for(8), steps=25)
