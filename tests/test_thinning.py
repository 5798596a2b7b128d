"""Thinning and folding: every point that is left shows what it showed, and others are refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from journal_model import GROUP, START, Journal, Record, small_segments
from test_view import find, flip

from blockrepl.errors import DamageError, PointError
from blockrepl.formats.frame import RecordKind
from blockrepl.formats.segment import file_name
from blockrepl.model.points import Instant, Point
from blockrepl.model.retention import Kept, Stretch, advance
from blockrepl.storage import retained
from blockrepl.storage.catalog import Catalog, SegmentRow
from blockrepl.storage.content import ContentReader, Window
from blockrepl.storage.folding import fold, fold_most, foldable
from blockrepl.storage.history import ReplicaHistory
from blockrepl.storage.retained import (
    fold_due,
    raise_floor,
    read_kept,
    remove_leftovers,
    replace,
    thin_to,
)
from blockrepl.storage.thinning import asked_at, thin
from blockrepl.units import KIB
from blockrepl.views.view import View

SIZES = {"root": 320 * KIB, "data": 800 * KIB + 512}
STEP = 20_000  # ns; the journal's records are about 1000 apart


@pytest.fixture
def journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Journal]:
    small_segments(monkeypatch)
    made = Journal(tmp_path / "home", SIZES)
    yield made
    made.close()


def sealed(journal: Journal) -> list[SegmentRow]:
    """Everything but the open segment sealed and catalogued."""
    journal.close()
    journal.open()
    return [row for row in journal.replica.catalog.segments() if row.sealed]


def thin_all(journal: Journal, kept: Kept, *, step_ns: int = STEP) -> None:
    """Thin the sealed segments as the receiver does, some at a time."""
    rows = sealed(journal)
    catalog, directory = journal.replica.catalog, journal.directory / "segments"
    thin_to(catalog, kept)
    edge = kept.stretches[-1].to_ns
    rows = [row for row in rows if row.last_stamp <= edge]
    for first in range(0, len(rows), 3):
        old = rows[first : first + 3]
        new = thin(directory, catalog.group_id, old, kept, step_ns=step_ns)
        replace(catalog, old, new, None)
    remove_leftovers(catalog, directory)


def fold_all(journal: Journal, floor_ns: int) -> int:
    """Fold as the receiver does; how many segments went."""
    sealed(journal)
    catalog = journal.replica.catalog
    raise_floor(catalog, floor_ns)
    assert fold_due(catalog) == floor_ns
    with ReplicaHistory(journal.directory) as history:
        state = history.state()
        rows = foldable(history, state, floor_ns)
        fold(history, state, floor_ns)
    replace(catalog, rows, [], floor_ns)
    remove_leftovers(catalog, journal.directory / "segments")
    assert fold_due(catalog) is None
    return len(rows)


def check(journal: Journal, kept: Kept, floor_ns: int = 0) -> tuple[int, int]:
    """Every state of the model is what its point shows, or refused; how many of each."""
    shown = refused = 0
    with ReplicaHistory(journal.directory) as history:
        state = history.state()
        for stamp, content in _asked(journal, kept):
            is_left = stamp >= floor_ns and kept.before(stamp) == stamp
            if not is_left:
                with pytest.raises(PointError):
                    history.resolve(Point("x", Instant(stamp)), stamp, state)
                refused += 1
                continue
            history.resolve(Point("x", Instant(stamp)), stamp, state)
            view = View(history, stamp, state)
            for disk, size in SIZES.items():
                assert view.read(disk, 0, size) == content[disk], (disk, stamp)
            shown += 1
    return shown, refused


def _asked(journal: Journal, kept: Kept) -> Iterator[tuple[int, dict[str, bytearray]]]:
    """Every record's instant, and the kept ones between."""
    stamps = {stamp for stamp, _ in journal.model.states()}
    for one in kept.stretches:
        stamps |= set(range(one.from_ns + one.step_ns, one.to_ns + 1, one.step_ns))
    stamps |= set(kept.instants)
    for stamp in sorted(stamps):
        if stamp > START + 10 and not any(a <= stamp < b for a, b in journal.model.hidden):
            yield stamp, journal.model.at(stamp)


def aligned(at_ns: int, step_ns: int = STEP) -> int:
    return at_ns - at_ns % step_ns


def test_each_stamp_is_next_asked_for_at_the_first_kept_instant_after_it() -> None:
    # Guards "instants" in asked_at: what a pin shows would be thrown away.
    kept = Kept((Stretch(0, 60, 10), Stretch(60, 120, 20)), (33, 95))
    stamps = np.arange(0, 200, dtype=np.uint64)
    expected = [kept.after(int(stamp)) for stamp in stamps]
    assert asked_at(kept, stamps).tolist() == expected


def test_thinned_history_shows_the_same_at_every_point_that_is_left(journal: Journal) -> None:
    journal.run(150)
    journal.gap_and_resync("root")
    journal.run(150)
    begin, end = aligned(START), aligned(journal.stamp - STEP)
    pinned = [record.stamp for record in journal.model.records[40:200:50]]
    kept = advance(Kept(), [Stretch(begin, end, STEP)], pinned, 0)
    assert len(kept.instants) >= 3
    before = sum(row.bytes for row in sealed(journal))
    thin_all(journal, kept)
    assert sum(row.bytes for row in sealed(journal)) < before
    shown, refused = check(journal, kept)
    assert shown > 15
    assert refused > 200
    assert read_kept(journal.replica.catalog) == kept


def test_a_disk_whose_records_are_all_empty_is_thinned_like_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Guards "max(1," in _survivors: a guest's empty trim at 0 ended all thinning of the group.
    small_segments(monkeypatch)
    journal = Journal(tmp_path / "home", SIZES)
    journal.put([Record(journal.tick(), "data", 0, 0, RecordKind.TRIM)])
    for _ in range(200):
        journal.write("root", journal.random.randrange(64) * 4096, journal.random.randbytes(4096))
    stamps = [stamp for stamp, _ in journal.model.states()]
    kept = Kept((Stretch(START, stamps[len(stamps) * 3 // 4], STEP),))
    thin_all(journal, kept)
    assert check(journal, kept)[0] > 0
    journal.close()


def test_what_was_thinned_is_thinned_again_for_a_coarser_rung(journal: Journal) -> None:
    journal.run(300)
    begin, end = aligned(START), aligned(journal.stamp - STEP)
    kept = advance(Kept(), [Stretch(begin, end, STEP)], [], 0)
    thin_all(journal, kept)
    middle = aligned((START + end) // 2, 4 * STEP)
    kept = advance(kept, [Stretch(begin, middle, 4 * STEP), Stretch(middle, end, STEP)], [], 0)
    thin_all(journal, kept, step_ns=4 * STEP)
    assert check(journal, kept)[0] > 8
    assert {row.generation for row in sealed(journal)} >= {2}


def test_a_view_that_is_open_goes_on_while_its_segments_are_written_anew(journal: Journal) -> None:
    # Guards GoneError in View.read: the view would fail, or read a place of another file.
    journal.run(200)
    end = aligned(journal.stamp - STEP)
    at = end - 3 * STEP
    expected = journal.model.at(at)
    with ReplicaHistory(journal.directory) as history:
        view = View(history, at, history.state())
        half = SIZES["data"] // 2
        first = view.read("data", 0, half)
        kept = advance(Kept(), [Stretch(aligned(START), end, STEP)], [], 0)
        thin_all(journal, kept)
        history.files.close()
        assert view.read("data", 0, half) == first == expected["data"][:half]
        assert view.read("data", half, SIZES["data"]) == expected["data"][half:]
        assert view.read("root", 0, SIZES["root"]) == expected["root"]


@pytest.mark.parametrize("call", ["read", "extents"])
def test_a_read_goes_on_while_its_segments_are_written_anew_more_than_once(
    journal: Journal, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    # Guards the bounded loop in View: a pass of retention replaces batch after batch.
    journal.run(200)
    end = aligned(journal.stamp, 4 * STEP)
    assert end > START + STEP
    expected = journal.model.at(end)
    left = [STEP, 2 * STEP, 4 * STEP]
    with ReplicaHistory(journal.directory) as history:
        view = View(history, end, history.state())

        def thin_more() -> None:
            if left:
                step = left.pop(0)
                thin_all(journal, Kept((Stretch(aligned(START), end, step),)), step_ns=step)
                history.files.close()

        look_again = View._look_again

        def thinned_once_more(self: View) -> None:
            look_again(self)
            thin_more()

        monkeypatch.setattr(View, "_look_again", thinned_once_more)
        extents = view.extents("data", 0, SIZES["data"])
        view.read("data", 0, SIZES["data"])
        thin_more()
        if call == "read":
            assert view.read("data", 0, SIZES["data"]) == expected["data"]
        else:
            view._windows.clear()  # else they answer by themselves
            assert view.extents("data", 0, SIZES["data"]) == extents
        assert left == []


def test_what_was_resolved_before_others_looked_again_is_not_kept(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Guards the number of clearings in View._resolve: all readers would meet the old window.
    journal.run(200)
    end = aligned(journal.stamp - STEP)
    expected = journal.model.at(end)
    resolve = ContentReader.resolve
    with ReplicaHistory(journal.directory) as history:
        view = View(history, end, history.state())

        def slow(self: ContentReader, *arguments: Any) -> Window:
            window = resolve(self, *arguments)
            monkeypatch.setattr(ContentReader, "resolve", resolve)
            thin_all(journal, Kept((Stretch(aligned(START), end, STEP),)))
            history.files.close()
            view._look_again()  # as another reader does meanwhile
            return window

        monkeypatch.setattr(ContentReader, "resolve", slow)
        view._window(view.disk("data"), 0, True)
        with monkeypatch.context() as patch:
            patch.setattr(View, "_look_again", lambda _self: pytest.fail("met an old window"))
            assert view.read("data", 0, SIZES["data"]) == expected["data"]


def test_folded_history_shows_the_same_from_the_floor_on(journal: Journal) -> None:
    journal.run(150)
    journal.gap_and_resync("data")
    journal.run(150)
    floor = journal.model.records[170].stamp
    assert fold_all(journal, floor) > 1
    shown, refused = check(journal, Kept(), floor)
    assert shown > 100
    assert refused > 100
    floor = journal.model.records[250].stamp
    assert fold_all(journal, floor) > 1
    assert check(journal, Kept(), floor)[0] > 30


def test_a_fold_that_broke_off_half_way_harms_nothing_and_is_done_again(journal: Journal) -> None:
    journal.run(200)
    sealed(journal)
    floor = journal.model.records[150].stamp
    catalog = journal.replica.catalog
    raise_floor(catalog, floor)

    class Broken(Exception):
        pass

    for after in (0, 3):
        left = after

        def pace(_size: int) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise Broken

        with ReplicaHistory(journal.directory) as history, pytest.raises(Broken):
            fold(history, history.state(), floor, pace=pace)
        assert check(journal, Kept(), floor)[0] > 30
    assert fold_all(journal, floor) > 1
    assert check(journal, Kept(), floor)[0] > 30


def test_thinning_that_broke_off_at_any_step_leaves_the_old_segments(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal.run(120)
    rows = sealed(journal)[:3]
    end = aligned(rows[-1].last_stamp + STEP)
    kept = advance(Kept(), [Stretch(aligned(START), end, STEP)], [], 0)
    catalog, directory = journal.replica.catalog, journal.directory / "segments"
    thin_to(catalog, kept)

    class Broken(Exception):
        pass

    for after in range(2):
        left = after

        def pace(_size: int) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise Broken

        with pytest.raises(Broken):
            thin(directory, catalog.group_id, rows, kept, step_ns=STEP, pace=pace)
        assert not list(directory.glob("*-*.seg"))  # of its room the journal may be in want
        check(journal, kept)
    new = thin(directory, catalog.group_id, rows, kept, step_ns=STEP)
    check(journal, kept)  # written, not yet catalogued
    replace(catalog, rows, new, None)
    check(journal, kept)  # catalogued, the old files still there
    journal.close()
    journal.open()  # a restart between the two
    check(journal, kept)
    remove_leftovers(catalog := journal.replica.catalog, directory)
    check(journal, kept)
    named = {row.number for row in catalog.segments()}
    assert {int(path.stem.partition("-")[0]) for path in directory.glob("*.seg")} == named


def test_nothing_that_becomes_history_meanwhile_is_removed(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Guards the order in remove_leftovers, and that it forgets what it has removed alone.
    journal.run(400)
    rows, directory = sealed(journal), journal.directory / "segments"
    catalog = journal.replica.catalog
    kept = advance(Kept(), [Stretch(0, aligned(rows[-1].last_stamp), STEP)], [], 0)
    thin_to(catalog, kept)
    new = thin(directory, catalog.group_id, rows[:3], kept, step_ns=STEP)

    class Directory(type(directory)):  # type: ignore[misc]
        def glob(self, pattern: str) -> Iterator[Path]:
            found = list(super().glob(pattern))
            replace(catalog, rows[:3], new, None)
            return iter(found)

    def sync(_directory: Path) -> None:
        folded = catalog.segments()[0]
        replace(catalog, [folded], [folded], None)

    monkeypatch.setattr(retained, "sync_directory", sync)
    remove_leftovers(catalog, Directory(directory))
    assert all((directory / file_name(row.number, row.generation)).exists() for row in new)
    assert not any((directory / file_name(row.number, 0)).exists() for row in rows[:3])
    assert retained.leftovers(catalog) == {file_name(new[0].number, new[0].generation)}


def test_folded_segments_are_gone_for_good_before_they_are_forgotten(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Guards remove_leftovers' sync: some of them came back with a power cut, and hid newer ones.
    journal.run(400)
    directory = journal.directory / "segments"
    synced: list[tuple[set[str], set[str]]] = []
    monkeypatch.setattr(
        retained,
        "sync_directory",
        lambda path: synced.append(
            (retained.leftovers(journal.replica.catalog), {one.name for one in path.iterdir()})
        ),
    )
    assert fold_all(journal, aligned(journal.stamp)) > 1
    ((left, there),) = synced
    assert len(left) > 1
    assert not left & there
    assert there == {path.name for path in directory.iterdir()}


def test_a_segment_of_a_disk_that_is_not_synced_is_not_folded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_segments(monkeypatch)
    journal = Journal(tmp_path / "home", SIZES, sync=False)
    journal.first_sync("root")
    journal.run(100)
    sealed(journal)
    with ReplicaHistory(journal.directory) as history:
        assert foldable(history, history.state(), journal.stamp) == []
    journal.close()


def test_a_segment_with_records_older_than_those_before_it_is_not_folded_without_them(
    journal: Journal,
) -> None:
    # Guards "oldest_behind" in foldable: the late record would show over the base.
    journal.run(100)
    late = journal.model.records[5]
    journal.late(late)
    journal.replica.commit()
    journal.run(60)
    rows = sealed(journal)
    with ReplicaHistory(journal.directory) as history:
        found = foldable(history, history.state(), rows[-1].last_stamp)
    assert len(rows) > len(found)
    assert all(row.last_stamp <= late.stamp for row in found)


@pytest.mark.parametrize("damage", ["block", "frame", "file"])
def test_what_lies_before_damage_is_folded_and_the_damage_is_told(
    journal: Journal, damage: str
) -> None:
    # Guards fold_most: a block that could not be read ended all folding of its group, for good.
    for number in range(160):
        data = journal.random.randbytes(4096)
        journal.write(list(SIZES)[number % 2], number // 2 * 4096, data)
    records = journal.model.records
    floor_ns, bad = records[150].stamp, records[80]
    rows = sealed(journal)
    (row,) = [one for one in rows if one.first_stamp <= bad.stamp <= one.last_stamp]
    path = journal.directory / "segments" / file_name(row.number, 0)
    place = find(path, bad.data)
    assert rows.index(row) > 1
    if damage == "file":
        path.unlink()
    else:
        header = path.read_bytes().rfind(b"BRF1", 0, place)
        flip(path, place + 100 if damage == "block" else header + 70)
    catalog = journal.replica.catalog
    raise_floor(catalog, floor_ns)
    for expected in (rows.index(row), 0):
        with ReplicaHistory(journal.directory) as history:
            found, error = fold_most(history, history.state(), floor_ns)
        assert isinstance(error, DamageError)
        assert path.name in str(error)
        assert len(found) == expected
        assert found == rows[: len(found)]
        replace(catalog, found, [], None)
        remove_leftovers(catalog, journal.directory / "segments")
        assert fold_due(catalog) == floor_ns
    with ReplicaHistory(journal.directory) as history:
        for one in records[150:]:
            view = View(history, one.stamp, history.state())
            content = journal.model.at(one.stamp)
            if damage == "block":
                for disk, size in SIZES.items():
                    begin, end = (bad.offset, bad.offset + 4096) if disk == bad.disk else (0, 0)
                    assert view.read(disk, 0, begin) == content[disk][:begin]
                    assert view.read(disk, end, size - end) == content[disk][end:]
            with pytest.raises(DamageError):
                view.read(bad.disk, bad.offset, 4096)


def test_an_older_catalog_has_nothing_thinned(journal: Journal) -> None:
    journal.close()
    catalog = Catalog.open(journal.directory / "catalog.sqlite")
    assert read_kept(catalog) == Kept()
    assert catalog.group_name == GROUP
    catalog.close()
    journal.open()
