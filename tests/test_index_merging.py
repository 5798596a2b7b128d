"""The receiver's background merging: it does what there is to do, and ends when it is told to."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio
from journal_model import GROUP, Journal, small_segments
from test_view import flip

from blockrepl.errors import StorageError
from blockrepl.formats import segment as segments
from blockrepl.formats import statistics as forms
from blockrepl.model import levels
from blockrepl.services import index_merging
from blockrepl.services.index_merging import IndexMerging
from blockrepl.storage.history import ReplicaHistory
from blockrepl.storage.merging import Merger
from blockrepl.storage.statistics import StatisticsMaker
from blockrepl.units import KIB
from blockrepl.views.view import View


@pytest.fixture
def journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    small_segments(monkeypatch, 4 * KIB)
    monkeypatch.setattr(levels, "FANOUT", 2)
    journal = Journal(tmp_path / "home", {"root": 128 * KIB})
    journal.run(60, batch=4)
    journal.close()
    journal.open()
    yield journal
    journal.close()


def merging_of(journal: Journal) -> IndexMerging:
    committers: Any = {GROUP: SimpleNamespace(replica=journal.replica)}
    return IndexMerging(committers)


def merged_files(journal: Journal) -> list[str]:
    return sorted(path.name for path in (journal.directory / "index").iterdir())


async def test_it_merges_what_was_sealed_and_then_looks_no_more(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Merger.step
    settled = trio.Event()

    def watched(self: Merger, *arguments: Any) -> bool:
        did = step(self, *arguments)
        if not did:
            trio.from_thread.run_sync(settled.set)
        return did

    monkeypatch.setattr(Merger, "step", watched)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(merging_of(journal).run)
        await settled.wait()
        nursery.cancel_scope.cancel()
    assert merged_files(journal)
    with ReplicaHistory.open(journal.home, GROUP) as replica:
        view = View(replica, journal.stamp, replica.state())
        assert view.read("root", 0, 128 * KIB) == journal.model.at(journal.stamp)["root"]
        assert replica.index.merged()


async def test_the_statistics_of_what_was_sealed_are_made_then(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards `statistics.make` in _look: the first timeline of a long history takes minutes.

    Guards `_drop_others` in `make`: they would gather as retention writes segments anew.
    Guards `_damaged` in storage/statistics.py: what cannot be made is not tried for ever.
    """
    make = StatisticsMaker.make
    settled = trio.Event()
    monkeypatch.setattr(index_merging, "_pause", lambda _seconds: None)
    rows = [row for row in journal.replica.catalog.segments() if row.sealed]
    flip(journal.directory / "segments" / segments.file_name(rows[2].number), 64 + 150)
    (journal.directory / "statistics").mkdir()
    (journal.directory / "statistics" / "000000999999-3.seg.stats").touch()
    tried: list[int] = []

    def watched(self: StatisticsMaker, rows: Any, pause: Any) -> None:
        for _ in range(2):
            make(self, rows, lambda _seconds: tried.append(1))
        trio.from_thread.run_sync(settled.set)

    monkeypatch.setattr(StatisticsMaker, "make", watched)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(merging_of(journal).run)
        await settled.wait()
        nursery.cancel_scope.cancel()
    made = {path.name for path in (journal.directory / "statistics").iterdir()}
    whole = [row for row in rows if row != rows[2]]
    assert made == {segments.file_name(row.number) + ".stats" for row in whole}
    assert len(tried) == len(rows)
    for row in whole:
        data = (journal.directory / "statistics" / f"{row.number:012d}.seg.stats").read_bytes()
        assert len(forms.decode(data, row.created_ns, row.bytes).frames)


async def test_a_merge_at_work_ends_at_once_when_it_is_cancelled(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards _pause: a merge of many millions would hold up the receiver's end for minutes."""
    at_work = trio.Event()
    pause = index_merging._pause

    def slow(_worked_seconds: float) -> None:
        trio.from_thread.run_sync(at_work.set)
        pause(1e6)

    monkeypatch.setattr(index_merging, "_pause", slow)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(merging_of(journal).run)
        await at_work.wait()
        nursery.cancel_scope.cancel()
    assert merged_files(journal) == []


async def test_what_cannot_be_written_is_told_once_and_tried_again(
    journal: Journal, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    enough = trio.Event()
    tries = 0

    def step(*_arguments: object) -> bool:
        nonlocal tries
        tries += 1
        if tries == 3:
            trio.from_thread.run_sync(enough.set)
        raise StorageError("no room for the index", code="full")

    monkeypatch.setattr(Merger, "step", step)
    monkeypatch.setattr(index_merging, "LOOK_SECONDS", 0.0)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(merging_of(journal).run)
        await enough.wait()
        nursery.cancel_scope.cancel()
    assert [record.message for record in caplog.records] == [
        "group web: its index is not merged: no room for the index"
    ]


async def test_a_defect_is_told_once_with_its_traceback_and_tried_again(
    journal: Journal, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # Guards "except Exception" in _look: it ended the receiver, for all its groups.
    enough = trio.Event()
    tries = 0

    def step(*_arguments: object) -> bool:
        nonlocal tries
        tries += 1
        if tries == 3:
            trio.from_thread.run_sync(enough.set)
        raise ZeroDivisionError

    monkeypatch.setattr(Merger, "step", step)
    monkeypatch.setattr(index_merging, "LOOK_SECONDS", 0.0)
    monkeypatch.setattr(index_merging, "LOOK_ANYWAY_SECONDS", 0.001)
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(merging_of(journal).run)
            await enough.wait()
            nursery.cancel_scope.cancel()
    (record,) = caplog.records
    assert record.message == "group web: its index is not merged: a defect of ours"
    assert record.exc_info
