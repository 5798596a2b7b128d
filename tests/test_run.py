"""The index run: tables as told, round trips, damage, and entries that lead to their payload."""

from __future__ import annotations

import contextlib
import re
from typing import Any

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from blockrepl.errors import PeerError
from blockrepl.formats import run as runs
from blockrepl.formats._pack import pack, unpack_into
from blockrepl.formats.frame import FUA, KIND_MASK, Columns, RecordKind
from blockrepl.formats.run import COLUMNS, DIRECTORY, LONG_BYTES, Run

Row = tuple[int, int, int, int, int, int, int]
ROWS = st.lists(
    st.tuples(
        st.integers(0, (1 << 63) - 1),
        st.integers(0, (1 << 64) - 1),
        st.sampled_from([1, 512, 4096, LONG_BYTES, LONG_BYTES + 1, (1 << 32) - 1]),
        st.integers(0, (1 << 32) - 1),
        st.integers(0, (1 << 32) - 1),
        st.integers(0, (1 << 32) - 1),
        st.integers(0, 2),
    ),
    max_size=30,
)


def from_rows(rows: list[Row]) -> Run:
    return Run(
        *(np.array([row[i] for row in rows], dtype) for i, dtype in enumerate(COLUMNS.values()))
    )


def rows_of(run: Run) -> list[Row]:
    columns = [getattr(run, name).tolist() for name in COLUMNS]
    return list(zip(*columns, strict=True))


def table(heading: str) -> list[tuple[int, int, str]]:
    """(offset, size, name) of the rows of the docstring's table with that heading."""
    text = re.split(r"^======  .*\n", (runs.__doc__ or "").split(heading)[1], flags=re.MULTILINE)[1]
    found = re.findall(r"^(\d+) +(\d+) +(\w+)", text, re.MULTILINE)
    return [(int(place), int(size), name) for place, size, name in found]


def test_the_docstrings_tables_are_the_layout() -> None:
    told = re.findall(r"^([a-z]+) +u(\d+) ", runs.__doc__ or "", re.MULTILINE)
    assert {name: int(bits) for name, bits in told} == {
        name: np.dtype(dtype).itemsize * 8 for name, dtype in COLUMNS.items()
    }
    assert [name for name, _ in told] == list(COLUMNS)
    assert DIRECTORY.fields is not None
    assert table("size  directory entry") == [
        (field[1], field[0].itemsize, name) for name, field in DIRECTORY.fields.items()
    ]
    assert table("size  column header") == [(0, 8, "base"), (8, 1, "shift"), (9, 1, "width")]
    assert runs.COLUMN_HEADER.pack(0x0807060504030201, 9, 10) == bytes(range(1, 11))


def test_a_chunk_is_headers_columns_and_tail() -> None:
    data = runs.encode_chunk(
        from_rows([(4096, 7, 512, 3, 2, 0, 0), (4096 * 6, 9, 512, 3, 2, 0, 0)])
    )
    headers, rest = data[:70], data[70:]
    assert headers[:20] == (4096).to_bytes(8, "little") + bytes([12, 3]) + bytes([7]) + bytes(
        7
    ) + bytes([1, 1])
    # starts: 0 and 5 in three bits each; stamps: 0 and 1 in one bit each; all else is one value.
    assert rest == bytes([0b101000, 0b10]) + bytes(runs.TAIL_BYTES)


@settings(deadline=None)
@given(st.lists(st.integers(0, (1 << 64) - 1), max_size=70), st.integers(0, 63))
def test_every_column_comes_back_whatever_its_width(values: list[int], shift: int) -> None:
    column = np.array(values, np.uint64) >> np.uint64(shift) << np.uint64(shift)
    base, by, width, data = pack(column)
    target: Any = np.zeros(len(values) + 2, np.uint64)
    unpack_into(b"x" + data + bytes(9), 1, len(values), base, by, width, target, 2)
    assert target[2:].tolist() == column.tolist()


@pytest.mark.parametrize(
    ("count", "shift", "width", "place"),
    [(4, 0, 64, 0), (100, 0, 1, 0), (1, 64, 1, 0), (1, 0, 65, 0), (1, 0, 1, 3), (-1, 0, 1, 0)],
)
def test_a_column_that_leads_out_is_refused(count: int, shift: int, width: int, place: int) -> None:
    target = np.zeros(3, np.uint64)
    with pytest.raises(ValueError, match="column"):
        unpack_into(bytes(30), 0, count, 0, shift, width, target, place)


@settings(deadline=None)
@given(ROWS)
def test_a_run_comes_back_short_entries_first_each_part_by_start(rows: list[Row]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "CHUNK_ENTRIES", 4)
        data, encoder = runs.encode_run(from_rows(rows), 100)
    found: list[Row] = []
    long_chunks = 0
    for chunk in runs.decode_directory(encoder.directory().tobytes()):
        at, size = int(chunk["offset"]) - 100, int(chunk["bytes"])
        stored = data[at : at + size]
        assert xxhash.xxh3_64_intdigest(stored) == int(chunk["digest"])
        part = runs.empty(int(chunk["count"]))
        runs.decode_chunk(memoryview(stored), int(chunk["count"]), part, 0)
        mine = rows_of(part)
        assert int(chunk["first_start"]) == mine[0][0] == min(row[0] for row in mine)
        assert int(chunk["last_end"]) == max(row[0] + row[2] for row in mine)
        assert int(chunk["first_stamp"]) == min(row[1] for row in mine)
        assert int(chunk["last_stamp"]) == max(row[1] for row in mine)
        assert len({row[2] > LONG_BYTES for row in mine}) == 1
        long_chunks += mine[0][2] > LONG_BYTES
        found += mine
    assert encoder.long_chunks == long_chunks
    assert encoder.end == 100 + len(data)
    assert found == sorted(rows, key=lambda row: (row[2] > LONG_BYTES, row[0], row[1], *row[3:6]))


@given(ROWS)
def test_the_newest_of_an_instant_comes_last(rows: list[Row]) -> None:
    found = rows_of(from_rows(rows).oldest_first())
    keys = [(row[1], *row[3:6]) for row in found]
    assert keys == sorted(keys)
    assert sorted(found) == sorted(rows)


@given(ROWS, ROWS)
def test_runs_concatenate(first: list[Row], second: list[Row]) -> None:
    joined = runs.concatenate([from_rows(first), from_rows(second)])
    assert rows_of(joined) == first + second
    assert len(runs.concatenate([])) == 0


def test_every_other_size_of_a_chunk_is_refused() -> None:
    rows: list[Row] = [(n * 4096, n * 977, 4096, n, n % 5, n * 512, 0) for n in range(20)]
    data = runs.encode_chunk(from_rows(rows))
    for size in range(len(data)):
        with pytest.raises(PeerError):
            runs.decode_chunk(data[:size], 20, runs.empty(20), 0)
    for wrong in (data + b"x", data):
        with pytest.raises(PeerError):
            runs.decode_chunk(wrong, 20 if wrong != data else 12, runs.empty(20), 0)


@settings(deadline=None)
@given(st.binary(max_size=200), st.integers(0, 64))
def test_garbage_is_refused_or_read_never_anything_else(data: bytes, count: int) -> None:
    with contextlib.suppress(PeerError):
        runs.decode_chunk(data, count, runs.empty(count), 0)


def test_a_directory_of_another_size_is_refused() -> None:
    with pytest.raises(PeerError):
        runs.decode_directory(bytes(DIRECTORY.itemsize + 1))


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
            expected.append((offset, stamp, length, 9, 5, position if is_write else None, plain))
        position += length if is_write else 0
    halves = np.arange(len(records)) < len(records) // 2
    parts = [
        Columns(columns.stamps[w], columns.offsets[w], columns.lengths[w], columns.kinds[w])
        for w in (halves, ~halves)
    ]
    # Frames together are as each alone.
    each = [runs.from_frames([part], [7 + n], 9) for n, part in enumerate(parts)]
    assert rows_of(runs.from_frames(parts, [7, 8], 9)) == rows_of(runs.concatenate(each))
    found = [
        (*row[:5], row[5] if row[6] == RecordKind.WRITE else None, row[6])
        for row in rows_of(runs.from_frames([columns], [5], 9))
    ]
    assert found == expected
