"""The catalog's rows, its rules about gaps and its refusal of what it does not know."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from blockrepl.errors import DamageError, StateError, StorageError
from blockrepl.storage.catalog import (
    Catalog,
    CheckpointRow,
    DiskRow,
    GapRow,
    SegmentRow,
    SourceRow,
)

GROUP, SOURCE, DISK = bytes(range(16)), b"s" * 16, b"d" * 16


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[Catalog]:
    catalog = Catalog.create(tmp_path / "catalog.sqlite", "web", GROUP, 7)
    catalog.put_source(SourceRow(SOURCE, 0, 0))
    catalog.add_disk(DiskRow(DISK, "root", 1 << 30, SOURCE))
    yield catalog
    catalog.close()


def test_what_was_written_is_read_by_another_connection_at_once(catalog: Catalog) -> None:
    reader = Catalog.open_readonly(catalog.path)
    assert (reader.group_name, reader.group_id, reader.created_ns) == ("web", GROUP, 7)
    catalog.put_source(SourceRow(SOURCE, 5, 99))
    catalog.set_position(DISK, (1 << 64) - 3, 12)
    catalog.put_segment(SegmentRow(1, 1, 2, 3, False, 100, 4))
    catalog.put_segment(SegmentRow(1, 1, 2, 3, True, 120, 4))
    assert reader.sources() == [SourceRow(SOURCE, 5, 99)]
    assert reader.segments() == [SegmentRow(1, 1, 2, 3, True, 120, 4)]
    assert reader.disks() == [
        DiskRow(DISK, "root", 1 << 30, SOURCE, None, 1, (1 << 64) - 3, 12, None)
    ]
    with pytest.raises(StorageError):
        reader.put_source(SourceRow(SOURCE, 6, 99))
    reader.close()


def test_a_reader_opens_after_the_writer_has_gone(catalog: Catalog) -> None:
    catalog.close()
    reader = Catalog.open_readonly(catalog.path)
    assert len(reader.disks()) == 1
    reader.close()


def test_a_snapshot_does_not_move(catalog: Catalog) -> None:
    reader = Catalog.open_readonly(catalog.path)
    with reader.snapshot():
        assert reader.sources()[0].last_number == 0
        catalog.put_source(SourceRow(SOURCE, 5, 99))
        assert reader.sources()[0].last_number == 0
    assert reader.sources()[0].last_number == 5
    reader.close()


def test_the_first_consistent_mark_is_the_floor_and_later_ones_end_gaps(catalog: Catalog) -> None:
    assert not catalog.begin_gap(DISK, 5)  # nothing to interrupt before the first sync
    catalog.set_consistent(DISK, 10)
    assert catalog.disks()[0].ready_ns == 10
    assert catalog.begin_gap(DISK, 20)
    assert not catalog.begin_gap(DISK, 25)
    assert catalog.gaps() == [GapRow(DISK, 20, None)]
    assert catalog.disks()[0].epoch == 2
    catalog.set_consistent(DISK, 30)
    assert catalog.gaps() == [GapRow(DISK, 20, 30)]
    catalog.set_consistent(DISK, 40)
    assert catalog.gaps() == [GapRow(DISK, 20, 30)]
    assert catalog.disks()[0].ready_ns == 10
    assert catalog.begin_gap(DISK, 50)
    assert catalog.disks()[0].epoch == 3


def test_the_older_of_two_checkpoints_of_a_name_stays(catalog: Catalog) -> None:
    first = CheckpointRow("before", 10, "crash", True)
    assert catalog.add_checkpoint(first)
    assert not catalog.add_checkpoint(CheckpointRow("before", 20, "crash", False))
    assert catalog.checkpoints() == [first]
    assert catalog.checkpoint("before") == first
    assert catalog.checkpoint("after") is None
    assert catalog.remove_checkpoint("before")
    assert not catalog.remove_checkpoint("before")


def test_a_failed_transaction_changes_nothing(catalog: Catalog) -> None:
    def change() -> None:
        with catalog.transaction():
            catalog.put_source(SourceRow(SOURCE, 9, 9))
            catalog.add_disk(DiskRow(b"e" * 16, "root", 512, SOURCE))  # the name is taken

    with pytest.raises(StorageError):
        change()
    assert catalog.sources() == [SourceRow(SOURCE, 0, 0)]


def test_another_version_a_missing_and_a_damaged_file_are_refused(
    catalog: Catalog, tmp_path: Path
) -> None:
    catalog.close()
    with pytest.raises(StateError) as missing:
        Catalog.open(tmp_path / "none.sqlite")
    assert missing.value.code == "no-catalog"
    (tmp_path / "noise").write_bytes(b"x" * 4096)
    with pytest.raises(DamageError):
        Catalog.open_readonly(tmp_path / "noise")
    connection = sqlite3.connect(catalog.path)
    connection.execute("PRAGMA user_version = 9")
    connection.close()
    for open_it in (Catalog.open, Catalog.open_readonly):
        with pytest.raises(StateError) as other:
            open_it(catalog.path)
        assert other.value.code == "catalog-version"
