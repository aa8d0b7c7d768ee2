"""The relay's pure parts: the decoder, the acknowledged prefix, the partitioner and the headers."""

import struct

import pytest
from aiokafka.partitioner import murmur2 as aiokafka_murmur2
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.relay.errors import ColumnMissing
from infra.relay.partitions import murmur2, partition_of
from infra.relay.pgoutput import OUTBOX_COLUMNS, OutboxEvent, RowReader, read_begin, read_commit
from infra.relay.prefix import Prefix
from infra.relay.publisher import headers_of

# From a real Debezium on Java's client, with eight partitions.
JAVA_PARTITIONS = {
    "pay_0001": 1,
    "pay_0002": 5,
    "pay_0005": 4,
    "pay_0006": 3,
    "pay_0007": 2,
    "pay_0008": 0,
    "pay_0013": 7,
    "pay_Đ4": 2,
}
EVENT = OutboxEvent(b"id", b"pay", b"type", b"{}", b"7", b"/payments", b"1.0", b"now", b"00-trace")


def relation(number: int, columns: list[str]) -> bytes:
    described = b"".join(b"\0" + name.encode() + b"\0" + struct.pack(">ii", 25, -1) for name in columns)
    return struct.pack(">cI", b"R", number) + b"public\0outbox\0d" + struct.pack(">H", len(columns)) + described


def insert(number: int, values: list[bytes | None]) -> bytes:
    parts = [b"n" if value is None else b"t" + struct.pack(">i", len(value)) + value for value in values]
    return struct.pack(">cIcH", b"I", number, b"N", len(values)) + b"".join(parts)


def reader(columns: list[str]) -> RowReader:
    rows = RowReader()
    rows.learn(relation(5, columns))
    return rows


@pytest.mark.parametrize("columns", [list(OUTBOX_COLUMNS), [*reversed(OUTBOX_COLUMNS)], ["new", *OUTBOX_COLUMNS, "x"]])
def test_columns_are_found_by_name_in_any_order_and_others_are_ignored(columns: list[str]) -> None:
    values = [EVENT._asdict().get(name, b"other") for name in columns]
    assert reader(columns).read(insert(5, values)) == EVENT


def test_null_at_the_end_of_a_row_is_none() -> None:
    assert reader([*OUTBOX_COLUMNS]).read(insert(5, [*EVENT[:-1], None])) == EVENT._replace(traceparent=None)


def test_a_table_that_was_announced_anew_is_read_by_its_new_columns() -> None:
    rows = reader([*OUTBOX_COLUMNS])
    rows.learn(relation(5, ["added", *OUTBOX_COLUMNS]))
    assert rows.read(insert(5, [b"added", *EVENT])) == EVENT


def test_a_table_without_a_needed_column_is_refused() -> None:
    with pytest.raises(ColumnMissing, match="traceparent"):
        reader([*OUTBOX_COLUMNS[:-1]])


def test_rows_of_another_table_are_skipped() -> None:
    rows = reader([*OUTBOX_COLUMNS])
    rows.learn(relation(6, ["id"]).replace(b"outbox", b"others"))
    assert rows.read(insert(6, [b"1"])) is None
    assert rows.read(insert(5, [*EVENT])) == EVENT


def texts(sizes: st.SearchStrategy[int]) -> st.SearchStrategy[bytes]:
    """What Postgres can store: no NUL, and lengths whose own bytes look like the beginning of a column."""
    letters = st.binary(max_size=8).map(lambda some: some.replace(b"\0", b"t"))
    return st.builds(lambda some, size: (some * size)[:size], letters.filter(bool), sizes)


LENGTHS = st.one_of(st.integers(0, 300), st.sampled_from([0x74, 0x7400, 0x7474, 0xFFFF, 0x10000, 0x740000, 0x740074]))


@given(
    st.permutations([*OUTBOX_COLUMNS, "other"]),
    st.dictionaries(st.sampled_from(OUTBOX_COLUMNS), st.one_of(st.none(), texts(LENGTHS)), max_size=4),
)
@settings(deadline=None)
def test_any_row_is_read_as_it_was_written(columns: list[str], odd: dict[str, bytes | None]) -> None:
    event = OutboxEvent(**(EVENT._asdict() | odd))
    values = [event._asdict().get(name, b"other") for name in columns]
    assert reader(columns).read(insert(5, values)) == event


def test_begin_and_commit_tell_the_time_and_where_to_resume() -> None:
    assert read_begin(struct.pack(">cqqI", b"B", 111, 222, 3)) == 222
    assert read_commit(struct.pack(">cBqqq", b"C", 0, 111, 222, 333)) == 222


@pytest.mark.parametrize(("key", "partition"), JAVA_PARTITIONS.items())
def test_keys_go_where_javas_client_sends_them(key: str, partition: int) -> None:
    assert partition_of(key.encode(), 8) == partition


@given(st.binary(max_size=100))
def test_murmur2_is_the_one_of_aiokafkas_producers(key: bytes) -> None:
    assert murmur2(key) == aiokafka_murmur2(key)


def test_headers_come_in_debeziums_order_and_a_null_stays_a_header() -> None:
    assert headers_of(EVENT._replace(traceparent=None)) == [
        ("id", b"id"),
        ("ce_id", b"id"),
        ("ce_type", b"type"),
        ("ce_source", b"/payments"),
        ("ce_time", b"now"),
        ("ce_specversion", b"1.0"),
        ("payment_seq", b"7"),
        ("traceparent", None),
    ]


def test_the_position_moves_only_past_transactions_before_which_nothing_is_missing() -> None:
    prefix = Prefix()
    groups = [prefix.begin(committed_at_us=number) for number in (1, 2, 3)]
    for group, end_lsn in zip(groups, (100, 200, 300), strict=True):
        group.missing, group.end_lsn = 2, end_lsn
    groups[2].missing = 0
    groups[1].missing = 0
    assert prefix.advance(wal_end=900) == 0
    groups[0].missing = 1
    assert prefix.advance(wal_end=900) == 0
    assert prefix.oldest_commit_us == 1
    groups[0].missing = 0
    assert prefix.advance(wal_end=0) == 300
    assert prefix.oldest_commit_us is None


def test_a_transaction_whose_commit_was_not_read_holds_the_position_even_when_all_of_it_is_acknowledged() -> None:
    prefix = Prefix()
    prefix.begin(committed_at_us=1).end_lsn = 100
    unfinished = prefix.begin(committed_at_us=2)
    assert prefix.advance(wal_end=900) == 100
    unfinished.end_lsn = 200
    assert prefix.advance(wal_end=0) == 200


def test_with_nothing_under_way_the_position_follows_the_log_and_never_moves_back() -> None:
    prefix = Prefix()
    assert prefix.advance(wal_end=500) == 500
    assert prefix.advance(wal_end=400) == 500
    prefix.begin(committed_at_us=1).end_lsn = 450
    assert prefix.advance(wal_end=0) == 500


@given(st.permutations(range(12)), st.lists(st.integers(1, 4), min_size=12, max_size=12))
def test_in_any_order_of_acknowledgements_the_position_is_the_complete_prefix(
    order: list[int], sizes: list[int]
) -> None:
    prefix = Prefix()
    groups = [prefix.begin(committed_at_us=number) for number in range(12)]
    for number, group in enumerate(groups):
        group.missing, group.end_lsn = sizes[number], (number + 1) * 10
    for number in order:
        groups[number].missing = 0
        complete = next((place for place, group in enumerate(groups) if group.missing), len(groups))
        assert prefix.advance(wal_end=0) == complete * 10
