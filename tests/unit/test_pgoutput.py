"""The decoder of pgoutput."""

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.relay.errors import ColumnMissing
from infra.relay.event import OUTBOX_COLUMNS, OutboxEvent
from infra.relay.wal.pgoutput import RowReader, read_begin, read_commit

EVENT = OutboxEvent(b"id", b"pay", b"type", b"{}", b"7", b"/payments", b"1.0", b"now", b"00-trace")


def relation(number: int, columns: list[str]) -> bytes:
    described = b"".join(b"\0" + name.encode() + b"\0" + struct.pack(">ii", 25, -1) for name in columns)
    return struct.pack(">cI", b"R", number) + b"public\0outbox\0d" + struct.pack(">H", len(columns)) + described


def insert(number: int, values: list[bytes | None]) -> bytes:
    parts = [b"n" if value is None else b"t" + struct.pack(">i", len(value)) + value for value in values]
    return struct.pack(">cIcH", b"I", number, b"N", len(values)) + b"".join(parts)


def reader(columns: list[str]) -> RowReader:
    rows = RowReader(5)
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
    rows.learn(relation(6, ["id"]))  # of the same name, in another schema
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
    assert read_begin(struct.pack(">cqqI", b"B", 111, 222, 3)) == (222, 3)
    assert read_commit(struct.pack(">cBqqq", b"C", 0, 111, 222, 333)) == 222
