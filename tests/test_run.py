"""The index run: columns as told, round trips, and entries that say where payload lies."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockrepl.errors import PeerError
from blockrepl.formats import run as runs
from blockrepl.formats.frame import FUA, KIND_MASK, Columns, RecordKind
from blockrepl.formats.run import Run

COLUMNS = ("starts", "stamps", "lengths", "frames", "positions", "kinds")
Row = tuple[int, int, int, int, int, int]
ROWS = st.lists(
    st.tuples(
        st.integers(0, 20),
        st.integers(0, 20),
        st.integers(0, (1 << 32) - 1),
        st.integers(0, 3),
        st.integers(0, 9),
        st.integers(0, 2),
    ),
    max_size=30,
)


def from_rows(rows: list[Row]) -> Run:
    types = (np.uint64, np.uint64, np.uint32, np.uint32, np.uint32, np.uint8)
    return Run(*(np.array([row[i] for row in rows], types[i]) for i in range(6)))  # type: ignore[arg-type]


def rows_of(run: Run) -> list[Row]:
    columns = [getattr(run, name).tolist() for name in COLUMNS]
    return list(zip(*columns, strict=True))


def test_the_docstrings_table_is_the_layout() -> None:
    told = re.findall(r"^(\w+) +u(\d+) ", runs.__doc__ or "", re.MULTILINE)
    assert tuple(name for name, _ in told) == COLUMNS
    run = from_rows([(1, 2, 3, 4, 5, 6), (7, 8, 9, 10, 11, 12)])
    assert [getattr(run, name).itemsize * 8 for name, _ in told] == [int(bits) for _, bits in told]
    assert sum(int(bits) for _, bits in told) == runs.ENTRY_BYTES * 8
    expected = b"".join(
        b"".join(value.to_bytes(int(bits) // 8, "little") for value in column)
        for (_, bits), column in zip(told, zip(*rows_of(run), strict=True), strict=True)
    )
    assert runs.encode_run(run) == expected


@given(ROWS)
def test_a_run_comes_back_as_it_was(rows: list[Row]) -> None:
    data = runs.encode_run(from_rows(rows))
    assert len(data) == len(rows) * runs.ENTRY_BYTES
    assert rows_of(runs.decode_run(data, len(rows))) == rows
    assert rows_of(runs.decode_run(memoryview(data), len(rows))) == rows


@given(ROWS)
def test_sorting_is_by_start_then_stamp_then_place(rows: list[Row]) -> None:
    found = rows_of(from_rows(rows).sorted())
    keys = [(start, stamp, frame, position) for start, stamp, _, frame, position, _ in found]
    assert keys == sorted(keys)
    assert sorted(found) == sorted(rows)


@given(ROWS, ROWS)
def test_runs_concatenate(first: list[Row], second: list[Row]) -> None:
    joined = runs.concatenate([from_rows(first), from_rows(second)])
    assert rows_of(joined) == first + second
    assert [getattr(joined, name).dtype for name in COLUMNS] == [
        getattr(from_rows([]), name).dtype for name in COLUMNS
    ]
    assert len(runs.concatenate([])) == 0


@pytest.mark.parametrize("count", [0, 1, 3, -1, 1 << 62])
def test_a_run_of_another_size_is_refused(count: int) -> None:
    data = runs.encode_run(from_rows([(1, 1, 1, 1, 1, 1)] * 2))
    with pytest.raises(PeerError):
        runs.decode_run(data, count)


@pytest.mark.parametrize("size", range(runs.ENTRY_BYTES))
def test_every_truncation_is_refused(size: int) -> None:
    data = runs.encode_run(from_rows([(1, 1, 1, 1, 1, 1)]))
    with pytest.raises(PeerError):
        runs.decode_run(data[:size], 1)


RECORDS = st.lists(
    st.tuples(
        st.integers(0, 1 << 60),
        st.integers(0, 1 << 16),
        st.sampled_from([kind | fua for kind in RecordKind for fua in (0, FUA)]),
    ),
    min_size=1,
    max_size=40,
)


@given(RECORDS)
def test_an_entry_says_where_its_records_data_lies_and_flushes_have_none(
    records: list[tuple[int, int, int]],
) -> None:
    columns = Columns(
        np.arange(len(records), dtype=np.uint64),
        np.array([r[0] for r in records], np.uint64),
        np.array([r[1] for r in records], np.uint32),
        np.array([r[2] for r in records], np.uint8),
    )
    expected, position = [], 0
    for stamp, (offset, length, kind) in enumerate(records):
        plain = kind & KIND_MASK
        is_write = plain == RecordKind.WRITE
        if plain != RecordKind.FLUSH:
            expected.append((offset, stamp, length, 5, position if is_write else None, plain))
        position += length if is_write else 0
    found = [
        (*row[:4], row[4] if row[5] == RecordKind.WRITE else None, row[5])
        for row in rows_of(runs.from_columns(columns, 5))
    ]
    assert found == expected
