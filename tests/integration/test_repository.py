"""The repository over 100,000 payments: what each finder finds, and the index that it uses."""

import asyncio
import uuid
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine

from domain.errors import ConcurrentUpdate, InputRefusedByStore, StoreUnavailable
from domain.events import PaymentStatus
from domain.operations import OperationState
from domain.payment import Payment
from infra.local import StackUrls, create_database, drop_database
from infra.postgres import repository as module
from infra.postgres.repository import PaymentFilters, PaymentRepository, create_engine
from tests.integration.bulk import PAYMENTS, fill_now, payment_id


@pytest.fixture(scope="module")
def filled_url(stack: StackUrls, migrated_template: str) -> Iterator[str]:
    """A database with 100,000 payments, which no test here may change."""
    url = create_database(stack.postgres_url, f"test_{uuid.uuid4().hex[:12]}", template=migrated_template)
    fill_now(url)
    yield url
    drop_database(url)


@pytest.fixture
async def engine(filled_url: str) -> AsyncIterator[AsyncEngine]:
    engine = create_engine(filled_url)
    yield engine
    await engine.dispose()


@pytest.fixture
def full(engine: AsyncEngine) -> PaymentRepository:
    """The repository over the 100,000 payments."""
    return PaymentRepository(engine)


@pytest.fixture
async def empty(postgres_url: str) -> AsyncIterator[PaymentRepository]:
    """A repository on this test's own empty database."""
    engine = create_engine(postgres_url)
    yield PaymentRepository(engine)
    await engine.dispose()


class Plans:
    """The plans of all queries of an engine, for their actual parameters."""

    def __init__(self, engine: AsyncEngine) -> None:
        self.texts: list[str] = []
        self._engine = engine.sync_engine

    def __enter__(self) -> "Plans":
        sa.event.listen(self._engine, "before_cursor_execute", self._explain)
        return self

    def __exit__(self, *_: object) -> None:
        sa.event.remove(self._engine, "before_cursor_execute", self._explain)

    def _explain(self, _c: object, cursor: Any, statement: str, parameters: Any, *_: object) -> None:
        if statement.startswith("SELECT"):
            cursor.execute(f"EXPLAIN {statement}", parameters)
            self.texts.append("\n".join(row[0] for row in cursor.fetchall()))


FINDERS: dict[str, tuple[str, Any]] = {
    "id": ("payments_pkey", lambda r: r.find_by_id(5000)),
    "payment_id": ("payments_payment_id_key", lambda r: r.find_by_payment_id(payment_id(5000))),
    "gateway_payment_id": ("payments_gateway_payment_id", lambda r: r.find_by_gateway_payment_id("other", "pi_5000")),
    "idempotency_key": ("operations_idempotency_key_key", lambda r: r.find_by_idempotency_key("key-5000")),
    "operations": ("operations_pkey", lambda r: r.operations_of(payment_id(5000))),
    "order": ("payments_order_id", lambda r: r.find_by_order_id("order-1000")),
    "customer": ("payments_customer_id", lambda r: r.find_by_customer_id("customer-7")),
    "status": ("payments_status", lambda r: r.find_by_status(PaymentStatus.FAILED)),
    "filters_none": ("payments_pkey", lambda r: r.find_by_filters(PaymentFilters())),
    "filters_status": (
        "payments_status",
        lambda r: r.find_by_filters(PaymentFilters(status=PaymentStatus.FAILED, gateway="other", currency="EUR")),
    ),
    "filters_created": (
        "payments_created_at",
        lambda r: r.find_by_filters(
            PaymentFilters(
                gateway="other",
                created_since=datetime.now(UTC) - timedelta(days=60, hours=1),
                created_until=datetime.now(UTC) - timedelta(days=60),
            )
        ),
    ),
    "filters_amount": ("payments_pkey", lambda r: r.find_by_filters(PaymentFilters(amount_min=200, amount_max=300))),
    "count_status": ("payments_status", lambda r: r.count_by_filters(PaymentFilters(status=PaymentStatus.AUTHORIZED))),
    "count_created": (
        "payments_created_at",
        lambda r: r.count_by_filters(PaymentFilters(created_since=datetime.now(UTC) - timedelta(hours=1))),
    ),
    "pending_captures": ("payments_pending_captures", lambda r: r.find_pending_captures()),
    "stuck_due": ("operations_due_by_gateway", lambda r: r.find_stuck_payments(timedelta(hours=1))),
    "stuck_in_doubt": ("operations_in_doubt", lambda r: r.find_stuck_payments(timedelta(hours=1))),
}


@pytest.mark.parametrize("name", FINDERS)
async def test_finder_walks_its_index(name: str, engine: AsyncEngine, full: PaymentRepository) -> None:
    index, find = FINDERS[name]
    with Plans(engine) as plans:
        await find(full)
    assert plans.texts
    assert any(f" {index}" in text for text in plans.texts), plans.texts
    for text in plans.texts:
        assert "Seq Scan" not in text, text


async def test_plans_are_made_for_the_values_at_hand(engine: AsyncEngine) -> None:
    """A generic plan for any status would walk the primary key: for a rare status, to the other end of the table."""
    async with engine.connect() as connection:
        assert await connection.scalar(sa.text("SHOW plan_cache_mode")) == "force_custom_plan"


async def test_events_are_found_by_the_index_of_each_partition(postgres_url: str) -> None:
    connection = await asyncpg.connect(postgres_url)
    insert = """INSERT INTO outbox (id, aggregateid, type, payload, payment_seq, occurred_at)
                SELECT gen_random_uuid(), md5('payment-' || n % 500)::uuid::text, 'payment.captured.v1', '{}',
                       10000 - n, n::text FROM generate_series(1, 10000) AS n"""
    await connection.execute(insert)
    await connection.execute("ANALYZE outbox")
    await connection.close()
    engine = create_engine(postgres_url)
    with Plans(engine) as plans:
        events = await PaymentRepository(engine).events_of(payment_id(3))
    await engine.dispose()
    assert "outbox_default_aggregateid_payment_seq_idx" in plans.texts[0]
    assert [each.payment_seq for each in events] == [*range(10000 - 9503, 10000, 500)]
    assert {(each.payment_id, each.payload) for each in events} == {(payment_id(3), "{}")}


async def test_one_payment_is_found_by_each_of_its_names(full: PaymentRepository) -> None:
    record = await full.find_by_payment_id(payment_id(5000))
    assert record is not None
    payment = record.payment
    assert (payment.payment_id, payment.order_id, payment.customer_id) == (payment_id(5000), "order-1666", "customer-0")
    assert (payment.status, payment.amount_minor, payment.captured_minor) == (PaymentStatus.CAPTURED, 100, 100)
    assert (payment.gateway, payment.gateway_payment_id, payment.currency) == ("other", "pi_5000", "USD")
    assert (payment.version, payment.operations) == (1, ())
    assert await full.find_by_id(record.id) == record
    assert await full.find_by_gateway_payment_id("other", "pi_5000") == record
    assert await full.find_by_idempotency_key("key-5000") == record


async def test_an_unknown_name_finds_nothing(full: PaymentRepository) -> None:
    assert await full.find_by_id(10**12) is None
    assert await full.find_by_payment_id(uuid.uuid4()) is None
    assert await full.find_by_gateway_payment_id("stripe", "pi_5000") is None
    assert await full.find_by_idempotency_key("no such key") is None
    assert (await full.find_by_order_id("no such order")).items == ()
    assert await full.events_of(uuid.uuid4()) == ()


async def test_a_payment_comes_with_its_open_operations(full: PaymentRepository) -> None:
    record = await full.find_by_payment_id(payment_id(5098))
    assert record is not None
    (operation,) = record.payment.operations
    assert (operation.number, operation.state) == (1, OperationState.NEEDS_REVIEW)
    assert record.payment.operations == await full.operations_of(payment_id(5098))
    (final,) = await full.operations_of(payment_id(5000))
    assert (final.state, final.idempotency_key, final.result) == (OperationState.SUCCEEDED, "key-5000", "{}")


async def test_pages_follow_each_other_without_gaps(full: PaymentRepository) -> None:
    seen: list[int] = []
    cursor = None
    while True:
        page = await full.find_by_filters(PaymentFilters(status=PaymentStatus.FAILED), limit=200, cursor=cursor)
        assert all(each.payment.status is PaymentStatus.FAILED for each in page.items)
        seen += [each.id for each in page.items]
        cursor = page.next_cursor
        if cursor is None:
            break
    assert seen == sorted(set(seen), reverse=True)
    assert len(seen) == await full.count_by_filters(PaymentFilters(status=PaymentStatus.FAILED)) == PAYMENTS * 3 // 100


async def test_the_last_full_page_leads_nowhere(full: PaymentRepository) -> None:
    first = await full.find_by_customer_id("customer-7", limit=50)
    second = await full.find_by_customer_id("customer-7", limit=50, cursor=first.next_cursor)
    assert (len(first.items), len(second.items)) == (50, 50)
    assert second.next_cursor is None
    assert first.items[-1].id > second.items[0].id


async def test_new_payments_do_not_shift_the_pages(empty: PaymentRepository) -> None:
    old = [await empty.create(Payment(uuid.uuid4(), order_id="o")) for _ in range(4)]
    first = await empty.find_by_order_id("o", limit=2)
    await empty.create(Payment(uuid.uuid4(), order_id="o"))
    second = await empty.find_by_order_id("o", limit=2, cursor=first.next_cursor)
    assert [each.id for each in first.items + second.items] == [each.id for each in reversed(old)]


async def test_pages_have_no_gap_and_no_repeat_while_payments_come_in(empty: PaymentRepository) -> None:
    old = {(await empty.create(Payment(uuid.uuid4(), customer_id="c"))).id for _ in range(30)}
    is_done = asyncio.Event()

    async def come_in() -> int:
        count = 0
        while not is_done.is_set():
            await empty.create(Payment(uuid.uuid4(), customer_id="c"))
            count += 1
        return count

    coming = [asyncio.create_task(come_in()) for _ in range(3)]
    seen: list[int] = []
    cursor = None
    while cursor is not None or not seen:
        page = await empty.find_by_customer_id("c", limit=3, cursor=cursor)
        seen += [each.id for each in page.items]
        cursor = page.next_cursor
    is_done.set()
    assert sum(await asyncio.gather(*coming)) > 0
    assert len(seen) == len(set(seen))
    assert old <= set(seen)


@pytest.mark.parametrize("limit", [0, -1, 201])
async def test_a_page_has_a_bounded_size(full: PaymentRepository, limit: int) -> None:
    with pytest.raises(ValueError, match="a page has 1 to 200"):
        await full.find_by_status(PaymentStatus.FAILED, limit=limit)


@pytest.mark.parametrize("cursor", ["", "!", "AAAA", "__________8", "é", "x" * 100])
async def test_a_foreign_cursor_is_refused(full: PaymentRepository, cursor: str) -> None:
    with pytest.raises(ValueError, match="not a cursor"):
        await full.find_by_status(PaymentStatus.FAILED, cursor=cursor)


async def test_every_filter_filters(full: PaymentRepository) -> None:
    now = datetime.now(UTC)
    filters = PaymentFilters(
        PaymentStatus.CAPTURED, "other", "EUR", 200, 300, now - timedelta(days=60), now - timedelta(days=20)
    )
    page = await full.find_by_filters(filters, limit=200)
    assert page.items
    for record in page.items:
        payment = record.payment
        assert (payment.status, payment.gateway, payment.currency) == (PaymentStatus.CAPTURED, "other", "EUR")
        assert 200 <= payment.amount_minor <= 300
        assert now - timedelta(days=60) <= record.created_at < now - timedelta(days=20)
    everything = await full.count_by_filters(filters)
    for name in ("status", "gateway", "currency", "amount_min", "amount_max", "created_since", "created_until"):
        assert await full.count_by_filters(replace(filters, **{name: None})) > everything, name


async def test_bounds_are_inclusive_but_for_the_end(full: PaymentRepository) -> None:
    assert await full.count_by_filters(PaymentFilters(amount_min=100, amount_max=100)) == PAYMENTS // 5000
    record = await full.find_by_payment_id(payment_id(5000))
    assert record is not None
    at = record.created_at
    assert await full.count_by_filters(PaymentFilters(created_since=at, created_until=at)) == 0
    assert await full.count_by_filters(PaymentFilters(created_since=at, created_until=at + timedelta(seconds=1))) == 1


async def test_pending_captures_come_soonest_first(full: PaymentRepository) -> None:
    found = await full.find_pending_captures(limit=200)
    ends = [each.payment.authorization_expires_at for each in found]
    assert len(found) == 200
    assert ends == sorted(end for end in ends if end)
    assert all(each.payment.capturable_minor > 0 for each in found)
    assert {each.payment.status for each in found} == {PaymentStatus.AUTHORIZED, PaymentStatus.PARTIALLY_CAPTURED}
    assert found[0].payment.payment_id == payment_id(90)


async def test_a_reserved_capture_is_not_pending(empty: PaymentRepository) -> None:
    amounts: dict[str, Any] = {
        "currency": "EUR",
        "amount_minor": 5,
        "authorized_minor": 5,
        "status": PaymentStatus.AUTHORIZED,
    }
    free = await empty.create(Payment(uuid.uuid4(), **amounts))
    await empty.create(Payment(uuid.uuid4(), **amounts, reserved_capture_minor=5))
    assert await empty.find_pending_captures() == (free,)


async def test_stuck_payments_are_the_late_and_the_doubted(full: PaymentRepository) -> None:
    # Payment n was due or dispatched n / 1000 hours ago; every fifth of the open ones needs review.
    found = await full.find_stuck_payments(timedelta(hours=89, minutes=30), limit=200)
    expected = [payment_id(n * 1000 + 98) for n in range(99, -1, -1) if n >= 90 or n % 5 == 0]
    assert [each.payment.payment_id for each in found.items] == expected
    assert {each.payment.operations[0].state for each in found.items} == {
        OperationState.PENDING,
        OperationState.NEEDS_REVIEW,
    }
    assert not found.is_more


async def test_stuck_payments_that_were_left_out_are_told_and_only_those(full: PaymentRepository) -> None:
    count = len((await full.find_stuck_payments(timedelta(0), limit=200)).items)
    exact, fewer = [await full.find_stuck_payments(timedelta(0), limit=limit) for limit in (count, 7)]
    assert (len(exact.items), exact.is_more) == (count, False)
    assert (len(fewer.items), fewer.is_more) == (7, True)


async def test_a_payment_that_needs_review_is_stuck_however_young(full: PaymentRepository) -> None:
    found = await full.find_stuck_payments(timedelta(days=30), limit=200)
    assert [each.payment.payment_id for each in found.items] == [payment_id(n * 1000 + 98) for n in range(95, -1, -5)]


async def test_a_payment_polled_for_long_is_stuck(empty: PaymentRepository, postgres_url: str) -> None:
    """Its next attempt always lies ahead; what counts is when the operation was dispatched."""
    polled, fresh, done = [(await empty.create(Payment(uuid.uuid4()))).payment.payment_id for _ in range(3)]
    connection = await asyncpg.connect(postgres_url)
    insert = """INSERT INTO operations (payment_id, number, kind, fingerprint, content, state, gateway, due_at,
                    dispatched_at, result)
                VALUES ($1, 1, 'charge', '', '', $2, 'stripe', now() + $3::interval, now() - $4::interval, $5)"""
    soon, day, minute = timedelta(seconds=30), timedelta(days=1), timedelta(minutes=1)
    await connection.execute(insert, polled, "pending", soon, day, None)
    await connection.execute(insert, fresh, "pending", soon, minute, None)
    await connection.execute(insert, done, "succeeded", None, day, "{}")
    await connection.close()
    late, every = [await empty.find_stuck_payments(age) for age in (timedelta(hours=1), timedelta(0))]
    assert [each.payment.payment_id for each in late.items] == [polled]
    assert {each.payment.payment_id for each in every.items} == {polled, fresh}


async def test_create_stores_every_field(empty: PaymentRepository) -> None:
    payment = Payment(
        uuid.uuid4(), "order", "customer", "stripe", "pi_1", "EUR", 900, 800, 300, 100, 50, 20, 30, 10,
        PaymentStatus.PARTIALLY_CAPTURED, True, 4, 5, 0, datetime(2030, 1, 2, tzinfo=UTC),
    )  # fmt: skip
    created = await empty.create(payment)
    assert created.payment == replace(payment, version=1)
    assert await empty.find_by_id(created.id) == created


async def test_a_payment_is_created_once(empty: PaymentRepository) -> None:
    payment = Payment(uuid.uuid4(), gateway="stripe", gateway_payment_id="pi_1")
    await empty.create(payment)
    with pytest.raises(module.PaymentExists, match="payments_payment_id_key"):
        await empty.create(Payment(payment.payment_id))
    with pytest.raises(module.GatewayPaymentTaken, match="payments_gateway_payment_id"):
        await empty.create(replace(payment, payment_id=uuid.uuid4()))


def test_errors_say_whether_to_try_again() -> None:
    """The repository and the write path classify the same constraint alike."""
    again = {name for name, error in module.ERROR_OF_CONSTRAINT.items() if issubclass(error, ConcurrentUpdate)}
    assert again == {"payments_payment_id_key"}
    assert all(issubclass(error, ConcurrentUpdate | InputRefusedByStore) for error in ERRORS)


ERRORS = set(module.ERROR_OF_CONSTRAINT.values())


async def test_each_constraint_has_an_error_of_its_own(postgres_url: str) -> None:
    connection = await asyncpg.connect(postgres_url)
    rows = await connection.fetch(
        """SELECT conname AS name FROM pg_constraint WHERE conrelid = 'payments'::regclass AND contype IN ('c', 'u')
           UNION SELECT indexrelid::regclass::text FROM pg_index WHERE indrelid = 'payments'::regclass AND indisunique
           EXCEPT SELECT 'payments_pkey'"""  # the store numbers payments itself
    )
    await connection.close()
    assert {row["name"] for row in rows} == set(module.ERROR_OF_CONSTRAINT)
    assert len(ERRORS) == len(module.ERROR_OF_CONSTRAINT)


async def test_create_leaves_operations_to_the_write_path(full: PaymentRepository, empty: PaymentRepository) -> None:
    record = await full.find_by_payment_id(payment_id(5098))
    assert record is not None
    with pytest.raises(ValueError, match="write path"):
        await empty.create(record.payment)


async def test_update_is_fenced_by_the_version(empty: PaymentRepository) -> None:
    created = await empty.create(Payment(uuid.uuid4()))
    updated = await empty.update(replace(created.payment, order_id="new"))
    assert updated.payment == replace(created.payment, order_id="new", version=2)
    assert (updated.id, updated.created_at) == (created.id, created.created_at)
    assert updated.updated_at > created.updated_at
    with pytest.raises(ConcurrentUpdate, match="is not at version 1"):
        await empty.update(replace(created.payment, order_id="late"))
    assert await empty.find_by_id(created.id) == updated


async def test_update_status_is_fenced_by_the_version(empty: PaymentRepository) -> None:
    created = await empty.create(Payment(uuid.uuid4(), order_id="o"))
    failed = await empty.update_status(created.payment.payment_id, PaymentStatus.FAILED, version=1)
    assert failed.payment == replace(created.payment, status=PaymentStatus.FAILED, version=2)
    with pytest.raises(ConcurrentUpdate):
        await empty.update_status(created.payment.payment_id, PaymentStatus.CANCELED, version=1)
    with pytest.raises(ConcurrentUpdate):
        await empty.update_status(uuid.uuid4(), PaymentStatus.CANCELED, version=1)


async def test_of_many_updates_at_once_one_wins(empty: PaymentRepository) -> None:
    created = await empty.create(Payment(uuid.uuid4()))
    answers = await asyncio.gather(
        *(empty.update(replace(created.payment, order_id=str(n))) for n in range(10)), return_exceptions=True
    )
    assert sum(isinstance(each, ConcurrentUpdate) for each in answers) == 9
    record = await empty.find_by_id(created.id)
    assert record in answers


async def test_an_update_keeps_the_count_of_open_operations(empty: PaymentRepository, postgres_url: str) -> None:
    created = await empty.create(Payment(uuid.uuid4()))
    connection = await asyncpg.connect(postgres_url)
    await connection.execute("UPDATE payments SET open_operations = 3")
    await empty.update(created.payment)
    assert await connection.fetchval("SELECT open_operations FROM payments") == 3
    await connection.close()


PAID = {"authorized_minor": 5, "captured_minor": 5, "currency": "EUR"}


@pytest.mark.parametrize(
    ("error", "bad"),
    [
        (module.AmountNegative, {"amount_minor": -1}),
        (module.CurrencyMissing, {"authorized_minor": 5}),
        (module.GatewayMissing, {"gateway_payment_id": "pi_1"}),
        (module.CapturedBeyondAuthorized, PAID | {"captured_minor": 6}),
        (module.RefundedBeyondCaptured, PAID | {"refunded_minor": 4, "reserved_refund_minor": 2}),
        (InputRefusedByStore, {"amount_minor": 2**63}),
        (InputRefusedByStore, {"order_id": "nul\0"}),
    ],
)
async def test_a_refused_payment_is_refused_for_good(
    empty: PaymentRepository, error: type[Exception], bad: dict[str, Any]
) -> None:
    with pytest.raises(InputRefusedByStore) as refused:
        await empty.create(Payment(uuid.uuid4(), **bad))
    assert type(refused.value) is error


async def test_no_server_is_store_unavailable() -> None:
    engine = create_engine("postgresql://nobody@127.0.0.1:1/none")
    with pytest.raises(StoreUnavailable):
        await PaymentRepository(engine).find_by_id(1)
    await engine.dispose()


@pytest.mark.parametrize(
    "settings", ["sslmode=prefer", "sslmode=disable&application_name=ours", "options=-c%20lock_timeout%3D5s"]
)
async def test_settings_in_a_databases_url_mean_what_they_mean_to_every_other_connection(
    postgres_url: str, settings: str
) -> None:
    engine = create_engine(f"{postgres_url}?{settings}")
    assert await PaymentRepository(engine).find_by_id(1) is None
    async with engine.connect() as connection:
        assert await connection.scalar(sa.text("SHOW plan_cache_mode")) == "force_custom_plan"
        assert await connection.scalar(sa.text("SHOW application_name")) == ("ours" if "ours" in settings else "")
        assert await connection.scalar(sa.text("SHOW lock_timeout")) == ("5s" if "lock" in settings else "0")
    await engine.dispose()


async def test_a_mistake_of_ours_is_not_called_unavailable(postgres_url: str) -> None:
    engine = create_engine(postgres_url + "_none")
    with pytest.raises(sa.exc.DBAPIError, match="does not exist"):
        await PaymentRepository(engine).find_by_id(1)
    await engine.dispose()


async def test_a_cut_connection_is_store_unavailable(postgres_url: str) -> None:
    engine = create_engine(postgres_url)
    killer = await asyncpg.connect(postgres_url)
    blocked = asyncio.create_task(PaymentRepository(engine).find_by_id(1))
    async with killer.transaction():
        await killer.execute("LOCK TABLE payments")
        kill = "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE NOT granted AND relation = 'payments'::regclass"
        while not blocked.done() and not await killer.fetch(kill):
            await asyncio.sleep(0.02)
        with pytest.raises(StoreUnavailable):
            await blocked
    await killer.close()
    assert await PaymentRepository(engine).find_by_id(1) is None
    await engine.dispose()
