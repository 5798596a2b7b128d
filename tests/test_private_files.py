"""What guests wrote is nobody else's to read, wherever a home or a replica of it is put."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from journal_model import START, Journal, small_segments
from test_spool import begun
from test_thinning import STEP, aligned, thin_all

from blockrepl.formats.segment import file_name
from blockrepl.model import levels
from blockrepl.model.retention import Kept, Stretch, advance
from blockrepl.storage.forks import create
from blockrepl.storage.history import ReplicaHistory
from blockrepl.storage.home import Home
from blockrepl.storage.merging import Merger
from blockrepl.storage.segment_reader import Known
from blockrepl.storage.source import SourceDisks
from blockrepl.storage.statistics import activity
from blockrepl.units import KIB, MIB


@pytest.fixture(autouse=True)
def _usual_umask() -> Iterator[None]:
    """What most shells have: it takes nothing from a file's readers."""
    before = os.umask(0o022)
    yield
    os.umask(before)


def open_to_others(below: Path) -> list[str]:
    """The directory itself and all in it that its group or others may use in any way."""
    paths = [below, *below.rglob("*")]
    return sorted(
        str(path.relative_to(below.parent)) for path in paths if path.stat().st_mode & 0o077
    )


def test_nothing_of_a_replica_is_open_to_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_segments(monkeypatch)
    monkeypatch.setattr(levels, "FANOUT", 2)
    home = Home(tmp_path / "home")
    home.path.mkdir(mode=0o755)  # one that somebody made before keeps its mode
    journal = Journal(home.path, {"root": 320 * KIB})
    journal.run(300)
    kept = advance(Kept(), [Stretch(aligned(START), aligned(journal.stamp) - STEP, STEP)], [], 0)
    thin_all(journal, kept)
    rows = journal.replica.catalog.segments()
    known = {row.number: Known.of(row) for row in rows}
    merger = Merger(journal.directory, journal.replica.group_id)
    while merger.step(known, lambda _seconds: None):
        pass
    with ReplicaHistory(journal.directory) as history:
        fork = create(history, None, journal.stamp)
        activity(history, [journal.ids["root"].bytes], START, journal.stamp, 4)
    files = {str(path.relative_to(journal.directory)) for path in journal.directory.rglob("*")}
    rewritten = [file_name(row.number, row.generation) for row in rows if row.generation]
    assert rewritten
    assert files >= {f"segments/{name}" for name in rewritten}
    assert files >= {"catalog.sqlite", "catalog.sqlite-wal", "durable", "base/root.img"}
    assert any((journal.directory / "index").iterdir())
    assert any((journal.directory / "statistics").iterdir())
    assert open_to_others(home.replicas) == []
    fork.close()
    journal.close()
    assert open_to_others(home.replicas) == []


def test_nothing_of_a_source_is_open_to_others(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    home.path.mkdir(mode=0o755)
    home = Home.create(home.path)
    disks = SourceDisks(home)
    disks.add("d1", tmp_path / "d1.img", "g", create_bytes=MIB, ring_bytes=16 * MIB)
    spool = begun(home.source_directory, 1, 9)
    spool.close()
    assert any(path.suffix == ".frames" for path in spool.directory.iterdir())
    assert open_to_others(home.source_directory) == []
