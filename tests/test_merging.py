"""Merged runs: views stay true at every stage of merging, whatever is damaged, stale or killed."""

from __future__ import annotations

import contextlib
import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from journal_model import GROUP, Journal, Record, small_segments

from blockrepl.errors import DamageError
from blockrepl.formats import run as run_format
from blockrepl.formats.frame import RecordKind
from blockrepl.formats.merged_run import MergedName
from blockrepl.formats.run import Run, RunEncoder
from blockrepl.model import levels
from blockrepl.storage import merged_runs, merging, runs
from blockrepl.storage.history import ReplicaHistory
from blockrepl.storage.merging import Merger
from blockrepl.storage.reading import Cache
from blockrepl.storage.segment_reader import Known
from blockrepl.units import KIB
from blockrepl.views.view import View

SIZES = {"root": 192 * KIB, "data": 96 * KIB}


def no_pause(_seconds: float) -> None:
    pass


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    small_segments(monkeypatch, 4 * KIB)
    monkeypatch.setattr(levels, "FANOUT", 2)
    monkeypatch.setattr(run_format, "CHUNK_ENTRIES", 2)
    monkeypatch.setattr(runs, "STREAM_ENTRIES", 4)


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    journal = Journal(tmp_path / "home", SIZES)
    yield journal
    journal.close()


def grow(journal: Journal, records: int) -> None:
    journal.run(records, batch=4)
    reopen(journal)


def reopen(journal: Journal) -> None:
    """All but the newest segment are sealed and catalogued then."""
    journal.close()
    journal.open()


def merger(journal: Journal) -> Merger:
    return Merger(journal.directory, journal.replica.group_id)


def known(journal: Journal) -> dict[int, Known]:
    return {row.number: Known.of(row) for row in journal.replica.catalog.segments()}


def settle(journal: Journal) -> None:
    worker = merger(journal)
    while worker.step(known(journal), no_pause):
        pass


def index_files(journal: Journal) -> list[Path]:
    return sorted((journal.directory / "index").iterdir())


def contents(replica: ReplicaHistory, stamp: int) -> dict[str, bytearray]:
    view = View(replica, stamp, replica.state())
    return {name: view.read(name, 0, size) for name, size in SIZES.items()}


def check(journal: Journal, replica: ReplicaHistory, stamps: int = 4) -> None:
    """Views at the newest and some random instants are what the model says."""
    chosen = journal.random.sample([record.stamp for record in journal.model.records], stamps)
    for stamp in (journal.stamp, *chosen):
        if not any(first <= stamp < last for first, last in journal.model.hidden):
            assert contents(replica, stamp) == journal.model.at(stamp), stamp


def check_fresh(journal: Journal, stamps: int = 4) -> list[MergedName]:
    with ReplicaHistory.open(journal.home, GROUP) as replica:
        check(journal, replica, stamps)
        return replica.index.merged()


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_views_are_true_at_every_stage_of_merging(tmp_path: Path, seed: int) -> None:
    journal = Journal(tmp_path / "home", SIZES, seed)
    stages = 0
    with ReplicaHistory.open(journal.home, GROUP) as replica:  # stays open through all of it
        for turn in range(4):
            grow(journal, 60)
            if turn == 1:
                journal.gap_and_resync("root")
            worker = merger(journal)
            while worker.step(known(journal), no_pause):
                stages += 1
                if stages % 4 == 0:
                    check(journal, replica, 1)
                    check_fresh(journal, 1)
            check(journal, replica)
            used = check_fresh(journal)
            assert used
            # Whatever a reader has had open, it comes to use the same runs.
            assert replica.index.merged() == used
        sealed = [row for row in journal.replica.catalog.segments() if row.sealed]
        covered = sum(name.last - name.first + 1 for name in used)
        assert len(sealed) > 30
        assert len(sealed) - covered + len(used) <= 2 * levels.LEVELS + len(sealed) // 16
    assert stages > 30
    assert [MergedName.parse(path.name) for path in index_files(journal)] == used
    journal.close()


def test_records_of_one_instant_keep_their_order_across_merged_segments(journal: Journal) -> None:
    """Guards the tie order (stamp, segment, frame, position) in Run.oldest_first."""
    at = journal.tick()
    for number in range(24):
        data = bytes([number + 1]) * 8192
        journal.late(Record(at, "root", number % 3 * 4096, 8192, RecordKind.WRITE, data))
        if number % 2:
            journal.replica.commit()
        journal.write("data", 0, os.urandom(9000))
    reopen(journal)
    check_fresh(journal)
    settle(journal)
    assert len(check_fresh(journal)) >= 1
    with ReplicaHistory.open(journal.home, GROUP) as replica:
        assert contents(replica, at)["root"] == journal.model.at(at)["root"]


def test_long_entries_are_found_beyond_the_start_of_a_window(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("blockrepl.formats.run.LONG_BYTES", 4096)
    monkeypatch.setattr(runs, "LONG_BYTES", 4096)
    journal = Journal(tmp_path / "home", SIZES)
    for _ in range(3):
        journal.put([Record(journal.tick(), "root", 0, 190 * KIB, RecordKind.TRIM)])
        journal.run(30)
    reopen(journal)
    settle(journal)
    with ReplicaHistory.open(journal.home, GROUP) as replica:
        for record in journal.model.records[::9]:
            view = View(replica, record.stamp, replica.state())
            truth = journal.model.at(record.stamp)["root"]
            at = journal.random.randrange(150 * KIB)
            window = view._content.resolve(view.disk("root").id, at, at + 4096, record.stamp)
            found = bytearray(4096)
            view._content.read_into(view.disk("root").image, window, at, memoryview(found))
            assert found == truth[at : at + 4096]
        assert replica.index.merged()
    journal.close()


# --- damage


def damages(path: Path) -> Iterator[str]:
    """Damage a file in many ways, one after the other; it is whole again at the end."""
    whole = path.read_bytes()
    places = [3, 20, 45, *range(60, len(whole) - 4, max(1, len(whole) // 12)), len(whole) - 3]
    for place in places:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x21]) + whole[place + 1 :])
        yield f"byte {place}"
    for size in (0, 30, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        yield f"{size} bytes"
    path.unlink()
    yield "missing"
    path.write_bytes(whole)


def test_whatever_is_damaged_in_a_merged_run_views_stay_true(
    journal: Journal, caplog: pytest.LogCaptureFixture
) -> None:
    grow(journal, 70)
    settle(journal)
    caplog.clear()
    path = max(index_files(journal), key=lambda path: path.stat().st_size)
    name = MergedName.parse(path.name)
    told = 0
    for damage in damages(path):
        used = check_fresh(journal, 2)
        told += len(caplog.records)
        assert name not in used or "byte" in damage, damage  # some bytes no lookup needs
        assert len(caplog.records) <= 1, damage
        caplog.clear()
    assert told > 8


def test_a_damaged_run_is_made_again(journal: Journal, caplog: pytest.LogCaptureFixture) -> None:
    """Guards Merger._prove: without it, lookups would do without that run for ever."""
    grow(journal, 70)
    settle(journal)
    files = {path.name: path.read_bytes() for path in index_files(journal)}
    for path in index_files(journal):
        data = bytearray(path.read_bytes())
        data[len(data) // 3] ^= 1
        path.write_bytes(data)
    settle(journal)
    assert {path.name: path.read_bytes() for path in index_files(journal)} == files
    assert any("made again" in record.message for record in caplog.records)
    for path in index_files(journal):
        path.unlink()
    settle(journal)
    assert {path.name: path.read_bytes() for path in index_files(journal)} == files
    check_fresh(journal)


def test_a_damaged_input_is_made_again_and_the_merge_after_it(journal: Journal) -> None:
    grow(journal, 70)
    worker = merger(journal)
    while not index_files_or_none(journal):
        assert worker.step(known(journal), no_pause)
    path = index_files(journal)[0]
    path.write_bytes(path.read_bytes()[:-60] + bytes(60))
    settle(journal)
    expected = [path.name for path in index_files(journal)]
    check_fresh(journal)
    for each in index_files(journal):
        each.unlink()
    settle(journal)
    assert [path.name for path in index_files(journal)] == expected


def index_files_or_none(journal: Journal) -> list[Path]:
    with contextlib.suppress(FileNotFoundError):
        return index_files(journal)
    return []


def test_a_stale_run_is_not_used(journal: Journal) -> None:
    """Guards merged_runs.is_true: the run of a segment that has changed since shows its past."""
    grow(journal, 70)
    settle(journal)
    used = check_fresh(journal)
    # As after a rewrite: the catalog has another segment of that number.
    catalog = journal.replica.catalog
    number = used[0].first + 1
    catalog.change("UPDATE segments SET created_ns = created_ns + 1 WHERE number = ?", number)
    with ReplicaHistory.open(journal.home, GROUP) as replica:
        replica.refresh(replica.state())
        assert used[0] not in replica.index.merged()
        assert set(used[1:]) <= set(replica.index.merged())
        # The file is not the one that the catalog knows: no view of its records, rather than one
        # through an index that may be another's.
        with pytest.raises(DamageError, match="not the segment that the catalog knows"):
            contents(replica, journal.stamp)
    catalog.change("UPDATE segments SET created_ns = created_ns - 1 WHERE number = ?", number)


def test_a_run_does_not_stand_in_for_a_segment_it_does_not_have(journal: Journal) -> None:
    """Guards the count in is_true: a segment between two others, unknown to the run, would hide."""
    grow(journal, 70)
    sealed = merged_runs.identities(known(journal))
    numbers = sorted(sealed)[:3]
    name = MergedName.of([sealed[numbers[0]], sealed[numbers[2]]])
    assert not merged_runs.is_true(name, known(journal), list(sealed.values()))
    # Nor for one that is not sealed: nobody knows yet what it will hold.
    still_open = {**known(journal), numbers[1]: Known(100, 1, 1)}
    assert not merged_runs.is_true(
        name, still_open, list(merged_runs.identities(still_open).values())
    )
    whole = MergedName.of([sealed[number] for number in numbers])
    assert merged_runs.is_true(whole, known(journal), list(sealed.values()))


def test_a_missing_segment_leaves_readable_what_is_elsewhere(journal: Journal) -> None:
    grow(journal, 70)
    settle(journal)
    used = check_fresh(journal)
    path = journal.directory / "segments" / f"{used[0].first:012d}.seg"
    path.rename(journal.home / "elsewhere")
    truth = journal.model.at(journal.stamp)["root"]
    whole = 0
    with ReplicaHistory.open(journal.home, GROUP) as replica:
        view = View(replica, journal.stamp, replica.state())
        for at in range(0, SIZES["root"], 512):
            try:
                assert view.read("root", at, 512) == truth[at : at + 512]
                whole += 1
            except DamageError as error:
                assert "missing" in str(error)  # noqa: PT017
    assert whole > SIZES["root"] // 512 // 2
    (journal.home / "elsewhere").rename(path)


@pytest.mark.parametrize("fault", ["newest", "twice", "column", "order"])
def test_a_merge_that_would_be_wrong_is_never_named(
    journal: Journal, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """Guards the account in merging._write_disk."""
    grow(journal, 70)
    in_order = merging._in_order

    def faulty(streams: Any, account: Any) -> Iterator[Run]:
        for run in in_order(streams, account):
            count = len(run)
            newest = int(run.stamps.argmax())
            if fault == "newest":
                yield run.take(np.arange(count) != newest)
            elif fault == "twice":
                yield run.take(np.minimum(np.arange(count + 1), count - 1))
            elif fault == "column":
                run.frames[newest] ^= 1
                yield run
            else:
                yield run.take(np.arange(count)[::-1])

    monkeypatch.setattr(merging, "_in_order", faulty)
    settle(journal)
    assert index_files(journal) == []
    assert check_fresh(journal) == []


# --- killed


STEPS = {
    "half written": (os, "fdatasync", 1),
    "renamed": (merging, "sync_directory", 1),
    "the second renamed": (merging, "sync_directory", 2),
    "synced": (os, "replace", 2),
    "the last one synced": (os, "replace", 3),
    "dropping": (Path, "unlink", 2),
}


@pytest.mark.parametrize("step", STEPS)
def test_killed_between_the_steps_of_a_merge(journal: Journal, step: str) -> None:
    grow(journal, 70)
    place, function, count = STEPS[step]
    child = os.fork()
    if child == 0:
        _die_at(journal, place, function, count)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    check_fresh(journal)
    settle(journal)
    check_fresh(journal)
    files = {path.name: path.read_bytes() for path in index_files(journal)}
    for path in index_files(journal):
        path.unlink()
    settle(journal)
    assert {path.name: path.read_bytes() for path in index_files(journal)} == files


def _die_at(journal: Journal, place: Any, function: str, count: int) -> None:
    """In a child: merge, and be killed when a function is called for the count-th time."""
    original = getattr(place, function)
    calls = 0

    def call(*arguments: object, **options: object) -> object:
        nonlocal calls
        calls += 1
        if calls == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **options)

    setattr(place, function, call)
    try:
        settle(journal)
    finally:
        os._exit(3)


# --- bounds


def test_a_merge_holds_a_bounded_number_of_entries_however_they_lie(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards STREAM_ENTRIES: a place that is written over and over has no ranges to cut it into."""
    monkeypatch.setattr(run_format, "CHUNK_ENTRIES", 256)
    monkeypatch.setattr(runs, "STREAM_ENTRIES", 1024)
    monkeypatch.setattr(levels, "FANOUT", 4)
    small_segments(monkeypatch, 64 * KIB)
    journal = Journal(tmp_path / "home", SIZES)
    for _ in range(60):
        same = [Record(journal.tick(), "root", 4096, 8, RecordKind.WRITE, bytes(8))] * 800
        journal.put(same, model=False)
    reopen(journal)
    most = 0
    add = RunEncoder.add

    def counted(self: Any, run: Run, *, is_long: bool) -> bytes:
        nonlocal most
        most = max(most, len(run))
        return add(self, run, is_long=is_long)

    monkeypatch.setattr(RunEncoder, "add", counted)
    settle(journal)
    assert index_files(journal)
    assert 0 < most <= 4 * 1024
    journal.close()


def test_merging_leaves_room_for_the_journal(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    grow(journal, 70)
    monkeypatch.setattr(merging, "FREE_BYTES_MIN", 1 << 60)
    assert not merger(journal).step(known(journal), no_pause)
    assert index_files_or_none(journal) == []


def test_a_merge_that_is_stopped_leaves_nothing(journal: Journal) -> None:
    grow(journal, 70)

    def stop(_seconds: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merger(journal).step(known(journal), stop)
    assert index_files(journal) == []


def test_directories_of_runs_stay_under_their_limit(journal: Journal) -> None:
    rng = random.Random(1)
    cache: Cache[tuple[Path, bytes], runs.Directory] = Cache(10_000, runs.Directory.cost)
    columns: list[Any] = [np.zeros(50, np.uint64)] * 7
    for _ in range(50):
        cache.put((Path(str(rng.random())), b"d"), runs.Directory(*columns))
    assert len(cache._values) == 10_000 // runs.Directory(*columns).cost()
