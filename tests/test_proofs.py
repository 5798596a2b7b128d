"""Proofs and mismatches in the catalog: against a model, over restarts, and in old catalogs."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from blockrepl.errors import StorageError
from blockrepl.limits import REGION_BYTES
from blockrepl.storage import proofs as proofs_module
from blockrepl.storage.catalog import Catalog, CheckpointRow, DiskRow, SourceRow
from blockrepl.storage.proofs import CHUNK_REGIONS, Mismatch, Proofs, Proven

SOURCE, DISK, OTHER = b"s" * 16, b"d" * 16, b"e" * 16
REGIONS = 7
SIZE = REGIONS * REGION_BYTES - 4096  # the last region is short


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[Catalog]:
    catalog = made(tmp_path)
    yield catalog
    catalog.close()


def made(directory: Path) -> Catalog:
    catalog = Catalog.create(directory / "catalog.sqlite", "web", bytes(16), 7)
    catalog.put_source(SourceRow(SOURCE, 0, 0))
    catalog.add_disk(DiskRow(DISK, "root", SIZE, SOURCE, ready_ns=1))
    catalog.add_disk(DiskRow(OTHER, "data", SIZE, SOURCE, ready_ns=1))
    return catalog


EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("prove"), st.integers(0, SIZE), st.integers(1, SIZE)),
        st.tuples(st.just("differ"), st.integers(0, SIZE - 1), st.integers(1, REGION_BYTES)),
        st.tuples(st.just("write"), st.just(0), st.just(0)),
        st.tuples(st.just("reopen"), st.just(0), st.just(0)),
    ),
    max_size=12,
)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(events=EVENTS, chunk=st.sampled_from([1, 3, CHUNK_REGIONS]))
def test_what_is_proven_is_what_a_list_of_stamps_says(
    events: list[tuple[str, int, int]],
    chunk: int,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    monkeypatch.setattr(proofs_module, "CHUNK_REGIONS", chunk)
    catalog = made(tmp_path_factory.mktemp("proofs"))
    proofs = Proofs(catalog)
    model = [0] * REGIONS
    for stamp, (what, offset, length) in enumerate(events, 100):
        length = min(length, SIZE - offset)
        end = offset + length
        match what:
            case "prove":
                proofs.prove(DISK, SIZE, offset, length, stamp)
                for region in range(REGIONS):
                    first = region * REGION_BYTES
                    if offset <= first and end >= min(first + REGION_BYTES, SIZE) > offset:
                        model[region] = stamp
            case "differ":
                proofs.differ(DISK, offset, length, stamp)
                for region in range(offset // REGION_BYTES, -(-end // REGION_BYTES)):
                    model[region] = 0
            case "write":
                proofs.write()
            case "reopen":
                proofs.write()
                catalog.close()
                catalog = Catalog.open(catalog.path)
                proofs = Proofs(catalog)
        for after in (0, 50, 102, stamp):
            assert proofs.proven_since(DISK, SIZE, after) == sum(
                size_of(region) for region, at in enumerate(model) if at > after
            )
        proven = proofs.proven(DISK, SIZE)
        assert proven.covered_bytes == sum(size_of(r) for r, at in enumerate(model) if at)
        assert proven.oldest_ns == min(filter(None, model), default=None)
        assert proven.is_whole == all(model)
        assert proofs.proven(OTHER, SIZE) == Proven(0, None, False, 0)
    catalog.close()


def size_of(region: int) -> int:
    return min(REGION_BYTES, SIZE - region * REGION_BYTES)


def test_proofs_are_not_written_before_they_are_told_to(catalog: Catalog) -> None:
    proofs = Proofs(catalog)
    proofs.prove(DISK, SIZE, 0, SIZE, 9)
    reader = Catalog.open_readonly(catalog.path)
    assert Proofs(reader).proven(DISK, SIZE).covered_bytes == 0
    proofs.write()
    assert Proofs(reader).proven(DISK, SIZE) == Proven(SIZE, 9, True, 0)
    reader.close()


def test_chunks_that_wait_to_be_written_are_bounded(
    catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proofs_module, "CHUNK_REGIONS", 1)
    monkeypatch.setattr(proofs_module, "CHUNKS_MAX", 3)
    proofs = Proofs(catalog)
    for region in range(6):
        proofs.prove(DISK, SIZE, region * REGION_BYTES, REGION_BYTES, 9)
        assert len(proofs._waiting) < 3
    reader = Catalog.open_readonly(catalog.path)  # nothing can be written through it
    proofs = Proofs(reader)
    proofs.prove(DISK, SIZE, 0, 2 * REGION_BYTES, 9)
    with pytest.raises(StorageError):
        proofs.write()
    assert len(proofs._waiting) == 2  # tried again
    with pytest.raises(StorageError):
        proofs.prove(DISK, SIZE, 0, SIZE, 9)
    assert not proofs._waiting  # forgotten: memory stays bounded
    reader.close()


def test_a_mismatch_is_one_row_until_its_range_is_proven_again(catalog: Catalog) -> None:
    proofs = Proofs(catalog)
    proofs.prove(DISK, SIZE, 0, SIZE, 9)
    proofs.differ(DISK, 65536, 131072, 10)
    reader = Catalog.open_readonly(catalog.path)  # a crash now loses nothing of it
    assert Proofs(reader).mismatches(DISK) == [Mismatch(DISK, 65536, 131072, 10)]
    assert Proofs(reader).proven(DISK, SIZE) == Proven(SIZE - REGION_BYTES, 9, False, 1)
    reader.close()
    proofs.differ(DISK, 65536, 65536, 11)  # found again: part of what is known
    proofs.differ(OTHER, 0, 65536, 11)
    assert len(proofs.mismatches(DISK)) == 1
    proofs.prove(DISK, SIZE, 0, REGION_BYTES, 12)
    assert proofs.mismatches(DISK) == []
    assert proofs.mismatches(DISK, healed_too=True) == [Mismatch(DISK, 65536, 131072, 10, 12)]
    assert proofs.mismatches(DISK, healed_too=True, after_ns=10) == []
    assert len(proofs.mismatches(OTHER)) == 1
    proofs.differ(DISK, 65536, 65536, 13)  # and once more
    assert proofs.mismatches(DISK) == [Mismatch(DISK, 65536, 65536, 13)]


def test_no_gap_of_anything_else_heals_a_mismatch(catalog: Catalog) -> None:
    # Guards set_consistent: the end of a short gap (a full ring) hid that a region was still wrong.
    proofs = Proofs(catalog)
    proofs.differ(DISK, 2 * REGION_BYTES, 65536, 10)
    catalog.begin_gap(DISK, 11)
    catalog.set_consistent(DISK, 12)
    proofs.prove(DISK, SIZE, 0, 2 * REGION_BYTES, 13)
    proofs.prove(DISK, SIZE, 3 * REGION_BYTES, REGION_BYTES, 13)
    assert proofs.mismatches(DISK) == [Mismatch(DISK, 2 * REGION_BYTES, 65536, 10)]


def test_a_mismatch_of_many_regions_is_healed_when_all_of_them_are_proven(catalog: Catalog) -> None:
    proofs = Proofs(catalog)
    start, length = REGION_BYTES - 512, 2 * REGION_BYTES  # in four regions
    proofs.differ(DISK, start, length, 10, 9)
    proofs.prove(DISK, SIZE, 0, SIZE, 10)  # no later than it was found
    proofs.prove(DISK, SIZE, 0, SIZE, 8)
    proofs.prove(DISK, SIZE, 2 * REGION_BYTES, REGION_BYTES, 15)
    proofs.prove(DISK, SIZE, 0, REGION_BYTES + 4096, 13)
    assert len(proofs.mismatches(DISK)) == 1
    proofs.write()
    catalog.close()
    catalog = Catalog.open(catalog.path)
    proofs = Proofs(catalog)
    proofs.prove(DISK, SIZE, REGION_BYTES, REGION_BYTES, 14)
    assert proofs.mismatches(DISK, healed_too=True) == [Mismatch(DISK, start, length, 10, 15, 9)]
    catalog.close()


def test_a_mismatch_at_the_end_of_a_disk_that_has_grown_is_healed_by_its_proof(
    catalog: Catalog,
) -> None:
    proofs = Proofs(catalog)
    last = (REGIONS - 1) * REGION_BYTES
    proofs.differ(DISK, last, SIZE - last, 10)
    grown = catalog.grow(DISK, SIZE + 4096, 11)
    assert grown == SIZE
    proofs.grown(DISK, SIZE)
    proofs.prove(DISK, SIZE + 4096, last, SIZE - last, 12)  # sent before it grew: of a part
    assert len(proofs.mismatches(DISK)) == 1
    proofs.prove(DISK, SIZE + 4096, last, REGION_BYTES, 13)
    assert proofs.mismatches(DISK) == []


def test_mismatches_are_bounded_the_oldest_healed_go_first(
    catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proofs_module, "MISMATCHES_MAX", 3)
    proofs = Proofs(catalog)
    proofs.differ(DISK, 0, 10, 5)
    proofs.differ(OTHER, 0, 10, 6)
    proofs.prove(OTHER, SIZE, 0, SIZE, 7)
    proofs.differ(DISK, 100, 10, 8)
    proofs.differ(DISK, 200, 10, 9)
    assert [m.start for m in proofs.mismatches(DISK)] == [0, 100, 200]
    assert proofs.mismatches(OTHER, healed_too=True) == []


# Copied from the first release's source: it must not follow the code.
VERSION_1 = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
CREATE TABLE sources (
    id TEXT PRIMARY KEY, last_number INTEGER NOT NULL, watermark INTEGER NOT NULL) STRICT;
CREATE TABLE disks (
    id TEXT PRIMARY KEY, name TEXT NOT NULL UNIQUE, size_bytes INTEGER NOT NULL,
    source TEXT NOT NULL REFERENCES sources (id), ready_ns INTEGER,
    epoch INTEGER NOT NULL, ring_id INTEGER NOT NULL, next_sequence INTEGER NOT NULL,
    removed_ns INTEGER) STRICT;
CREATE TABLE gaps (
    disk TEXT NOT NULL REFERENCES disks (id), from_ns INTEGER NOT NULL, to_ns INTEGER,
    PRIMARY KEY (disk, from_ns)) STRICT;
CREATE TABLE checkpoints (
    name TEXT PRIMARY KEY, at_ns INTEGER NOT NULL, kind TEXT NOT NULL,
    kept INTEGER NOT NULL) STRICT;
CREATE INDEX checkpoints_by_instant ON checkpoints (at_ns);
CREATE TABLE segments (
    number INTEGER PRIMARY KEY, created_ns INTEGER NOT NULL, first_stamp INTEGER NOT NULL,
    last_stamp INTEGER NOT NULL, sealed INTEGER NOT NULL, bytes INTEGER NOT NULL,
    frames INTEGER NOT NULL) STRICT;
"""


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A catalog as version 1 made and left it."""
    path = tmp_path / "old.sqlite"
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.executescript(
        f"BEGIN IMMEDIATE; {VERSION_1} PRAGMA user_version = 1;"
        f"INSERT INTO meta VALUES ('group_name', 'web'), ('group_id', '{bytes(16).hex()}'), "
        "('created_ns', '7');"
        f"INSERT INTO sources VALUES ('{SOURCE.hex()}', 3, 9);"
        f"INSERT INTO disks VALUES ('{DISK.hex()}', 'root', {SIZE}, '{SOURCE.hex()}', 1, 1, 0, 0, "
        "NULL); INSERT INTO checkpoints VALUES ('a', 5, 'crash', 1); COMMIT;"
    )
    connection.close()
    return path


def test_a_catalog_of_version_1_is_upgraded_and_nothing_in_it_is_lost(old: Path) -> None:
    catalog = Catalog.open(old)
    assert catalog.checkpoints() == [CheckpointRow("a", 5, "crash", True)]
    assert catalog.sources() == [SourceRow(SOURCE, 3, 9)]
    proofs = Proofs(catalog)
    proofs.prove(DISK, SIZE, 0, SIZE, 9)
    proofs.differ(DISK, 0, 512, 10)
    proofs.prove(DISK, SIZE, 0, REGION_BYTES, 11)
    proofs.write()
    catalog.close()
    again = Catalog.open(old)
    assert Proofs(again).proven(DISK, SIZE) == Proven(SIZE, 9, True, 0)
    assert again.checkpoints() == [CheckpointRow("a", 5, "crash", True)]
    again.close()


def test_a_catalog_of_version_1_can_be_read_as_it_is(old: Path) -> None:
    reader = Catalog.open_readonly(old)
    assert reader.checkpoints() == [CheckpointRow("a", 5, "crash", True)]
    assert Proofs(reader).proven(DISK, SIZE) == Proven(0, None, False, 0)
    assert Proofs(reader).proven_since(DISK, SIZE, 0) == 0
    assert Proofs(reader).mismatches(DISK) == []
    reader.close()


def test_an_upgrade_that_fails_leaves_version_1(old: Path) -> None:
    # One of the tables is there already, of whatever making: the second statement fails.
    connection = sqlite3.connect(old)
    connection.execute("CREATE TABLE mismatches (x INTEGER) STRICT")
    connection.close()
    with pytest.raises(StorageError):
        Catalog.open(old)
    reader = Catalog.open_readonly(old)
    assert reader.version == 1
    assert not reader.rows("SELECT 1 FROM sqlite_master WHERE name = 'proofs'")
    reader.close()
