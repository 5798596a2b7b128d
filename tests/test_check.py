"""A check finds just what is damaged: each kind of damage is planted, and views are the witness.

What a finding calls lost must fail to read, and everything else must read as the model has it.
"""

from __future__ import annotations

import bisect
import copy
import json
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
from journal_model import GROUP, START, Journal, small_segments
from test_merging import settle
from test_thinning import STEP, aligned, fold_all, thin_all

from blockrepl.errors import DamageError
from blockrepl.formats import frame as frames
from blockrepl.formats import segment as segments
from blockrepl.formats.merged_run import MergedName
from blockrepl.formats.run import concatenate
from blockrepl.formats.segment import Contents
from blockrepl.model import levels
from blockrepl.model.retention import Kept, Stretch, advance
from blockrepl.storage import forks, segment_writer
from blockrepl.storage.check import bytes_to_check, check_replica
from blockrepl.storage.check_findings import SEVERITIES, Finding
from blockrepl.storage.history import ReplicaHistory
from blockrepl.storage.home import Home
from blockrepl.storage.merged_runs import MergedFile
from blockrepl.storage.merging import write_merged
from blockrepl.storage.overlay import create_overlay
from blockrepl.storage.reading import ReadFiles
from blockrepl.storage.repair import repair
from blockrepl.storage.runs import MemoryRun, directory_cache
from blockrepl.units import KIB
from blockrepl.views.fork import WritableView
from blockrepl.views.view import View

SIZES = {"root": 320 * KIB, "data": 800 * KIB + 512}
LATEST = (1 << 63) - 1


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Journal:
    """A store of some sealed segments and an open one, closed."""
    with pytest.MonkeyPatch.context() as patch:
        small_segments(patch)
        made = Journal(tmp_path_factory.mktemp("template") / "home", SIZES)
        made.run(100)
        made.gap_and_resync("root")
        made.run(220)
        made.checkpoint("here")
        made.close()
    return made


@pytest.fixture
def journal(template: Journal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Journal:
    small_segments(monkeypatch)
    monkeypatch.setattr(levels, "FANOUT", 2)
    made = copy.copy(template)
    made.home = tmp_path / "home"
    shutil.copytree(template.home, made.home)
    made.directory = Home(made.home).replica_directory(GROUP)
    made.model, made.random = copy.deepcopy((template.model, template.random))
    return made


def reopened(journal: Journal) -> Journal:
    journal.open()
    return journal


def sealed(journal: Journal) -> list[Path]:
    return sorted((journal.directory / "segments").glob("*.seg"))[:-1]


def newest(journal: Journal) -> Path:
    return sorted((journal.directory / "segments").glob("*.seg"))[-1]


def contents_of(path: Path) -> tuple[segments.Trailer, Contents]:
    data = path.read_bytes()
    trailer = segments.decode_trailer(data[-segments.TRAILER_BYTES :])
    assert trailer is not None
    begin = trailer.contents_offset
    return trailer, segments.decode_contents(trailer, data[begin : begin + trailer.contents_bytes])


def frames_of(path: Path) -> list[tuple[int, frames.FrameHeader]]:
    """Offset and header of each frame."""
    data, at, found = path.read_bytes(), segments.HEADER_BYTES, []
    while data[at : at + 4] == frames.MAGIC:
        header = frames.decode_header(data[at:])
        found.append((at, header))
        at += header.frame_bytes
    return found


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 0x10]))


def check(journal: Journal) -> list[Finding]:
    done: list[int] = []
    found = check_replica(journal.directory, done.append)
    assert done == sorted(done)
    return found


def is_lost(journal: Journal, findings: list[Finding], *, step: int = 5) -> None:
    """What the findings call lost is what views cannot show, and nothing else."""
    lost = [one for one in findings if one.severity == "lost" and one.ranges]
    edges = {one.from_ns for one in lost} | {one.to_ns for one in lost}
    states = [stamp for stamp, _ in journal.model.states()]
    asked = set(states[::step]) | {states[-1]}
    for edge in edges:
        place = bisect.bisect_left(states, edge) if edge is not None else len(states)
        asked |= set(states[max(0, place - 1) : place + 1])
    with ReplicaHistory.open(journal.home, GROUP) as history:
        state = history.state()
        for stamp in sorted(asked):
            view, model = View(history, stamp, state), journal.model.at(stamp)
            for disk, size in SIZES.items():
                now = [
                    one
                    for one in lost
                    if one.disk == disk and (one.from_ns or 0) <= stamp < (one.to_ns or LATEST)
                ]
                ranges = sorted({each for one in now for each in one.ranges})
                for one in now:
                    assert not all(reads(view, disk, each) for each in one.ranges), (one, stamp)
                at = 0
                for first, last in [*ranges, (size, size)]:
                    if first > at:
                        assert view.read(disk, at, first - at) == model[disk][at:first], stamp
                    at = max(at, last)


def reads(view: View, disk: str, piece: tuple[int, int]) -> bool:
    try:
        view.read(disk, piece[0], piece[1] - piece[0])
    except DamageError:
        return False
    return True


def codes(findings: list[Finding]) -> list[str]:
    return [one.code for one in findings]


# --- nothing is wrong


def test_nothing_is_found_in_a_store_that_is_whole(journal: Journal) -> None:
    assert len(sealed(journal)) > 3
    assert check(journal) == []


def test_nothing_is_found_after_thinning_folding_merging_and_with_forks(journal: Journal) -> None:
    reopened(journal)
    end = aligned(journal.model.records[250].stamp)
    begin = aligned(journal.model.hidden[0][1] + STEP)
    kept = advance(Kept(), [Stretch(begin, end, STEP)], [], 0)
    thin_all(journal, kept)
    fold_all(journal, journal.model.records[90].stamp)
    settle(journal)
    with ReplicaHistory(journal.directory) as history:
        at = journal.model.records[300].stamp
        fork = forks.create(history, "trial", at)
        view = View(history, at, history.state())
        written = WritableView(view, forks.open_overlays(fork.directory, fork.fork))
        written.write("root", 4096, b"x" * 10_000)
        written.close()
        fork.close()
    journal.close()
    assert check(journal) == []
    assert {path.suffix for path in (journal.directory / "index").iterdir()} == {".run"}


def test_nothing_is_found_in_a_store_whose_receiver_was_killed(journal: Journal) -> None:
    # Guards "sealed and" in SegmentCheck._find_contents: what the catalog does not say yet is none.
    reopened(journal).run(150)
    killed = copy.copy(journal)
    killed.directory = journal.home / "replicas" / "killed"
    shutil.copytree(journal.directory, killed.directory)
    journal.close()
    assert check(killed) == []


# --- primary data


@pytest.mark.parametrize("number", [0, 2, -1])
def test_a_damaged_block_costs_what_was_written_with_it_until_that_is_covered(
    journal: Journal, number: int
) -> None:
    # Guards "later" in check_losses._covered_at, and the clipping in check_segment._in_block.
    path = sealed(journal)[number]
    at, header = max(frames_of(path), key=lambda each: each[1].payload_bytes)
    flip(path, at + frames.HEADER_BYTES + header.body_bytes - 3)
    findings = check(journal)
    assert codes(findings) == ["block"]
    (one,) = findings
    assert one.offset is not None
    assert at < one.offset < at + header.frame_bytes
    assert one.file == f"segments/{path.name}"
    assert header.first_stamp <= (one.from_ns or 0) <= header.last_stamp
    is_lost(journal, findings)
    repair(journal.directory, findings)
    assert check(journal) == findings


def test_a_damaged_frame_of_a_sealed_segment_costs_its_records_which_the_index_names(
    journal: Journal,
) -> None:
    # Guards "_from_index" in check_segment: whole disks would be called lost.
    first, second = sealed(journal)[1], sealed(journal)[3]
    at, columns_of = next(one for one in frames_of(first)[2:] if one[1].payload_bytes)
    flip(first, at + frames.HEADER_BYTES + 9)  # its columns
    header_at, header_of = next(one for one in frames_of(second)[2:] if one[1].payload_bytes)
    flip(second, header_at + 30)
    findings = check(journal)
    assert codes(findings) == ["frame", "frame"]
    assert [one.offset for one in findings] == [at, header_at]
    assert [one.from_ns for one in findings] == [columns_of.first_stamp, header_of.first_stamp]
    is_lost(journal, findings)
    repair(journal.directory, findings)
    assert check(journal) == findings


def test_a_damaged_header_in_the_open_segment_costs_all_from_there_on(journal: Journal) -> None:
    found = frames_of(newest(journal))
    at, _ = found[len(found) // 2]
    flip(newest(journal), at + 100)
    findings = check(journal)
    assert codes(findings) == ["frames", "frames"]
    assert {one.disk for one in findings} == set(SIZES)
    assert {one.to_ns for one in findings} == {None}
    before = found[len(found) // 2 - 1][1].watermark
    assert {one.from_ns for one in findings} == {before + 1}
    assert [one.ranges for one in findings] == [[(0, SIZES[one.disk or ""])] for one in findings]


@pytest.mark.parametrize("merged", [False, True])
def test_of_a_missing_segment_all_before_it_stays_and_what_is_lost_is_named(
    journal: Journal, merged: bool
) -> None:
    # Guards "_from_merged" in check_losses: with an index, only what the segment held is lost.
    if merged:
        settle(reopened(journal))
        journal.close()
    path = sealed(journal)[2]
    with ReplicaHistory(journal.directory) as history:
        row = history.catalog.segments()[2]
    path.rename(journal.home / "elsewhere")
    findings = check(journal)
    assert set(codes(findings)) == {"segment-missing"}
    assert {one.disk for one in findings} == set(SIZES)
    if merged:
        is_lost(journal, findings)
        assert any(one.to_ns is not None or len(one.ranges) > 1 for one in findings)
    else:
        assert {one.from_ns for one in findings} == {row.first_stamp}
        before = max(r.stamp for r in journal.model.records if r.stamp < row.first_stamp)
        with ReplicaHistory(journal.directory) as history:
            view = View(history, before, history.state())
            for disk, size in SIZES.items():
                assert view.read(disk, 0, size) == journal.model.at(before)[disk]
    repair(journal.directory, findings)
    assert check(journal) == findings
    (journal.home / "elsewhere").rename(path)


def test_a_file_in_the_place_of_another_segment_is_told(journal: Journal) -> None:
    shutil.copy(sealed(journal)[1], sealed(journal)[2])
    findings = check(journal)
    assert set(codes(findings)) == {"segment"}
    assert "another segment" in findings[0].what


def test_acknowledged_frames_that_are_nowhere_are_told(journal: Journal) -> None:
    # Guards "newest.number < row.last_number" in check_catalog.Numbers.
    with sqlite3.connect(journal.directory / "catalog.sqlite") as catalog:
        catalog.execute("UPDATE sources SET last_number = last_number + 2")
    catalog.close()
    findings = check(journal)
    assert set(codes(findings)) == {"numbers"}
    assert {one.disk for one in findings} == set(SIZES)
    assert {one.from_ns for one in findings} == {journal.stamp + 1}


def _short(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(200 * KIB)


@pytest.mark.parametrize(
    ("plant", "from_byte"),
    [(Path.unlink, 0), (_short, 200 * KIB), (lambda p: (p.unlink(), p.mkdir()), 0)],
)
def test_a_base_image_that_is_not_what_it_should_be_is_told(
    journal: Journal, plant: Callable[[Path], object], from_byte: int
) -> None:
    plant(journal.directory / "base" / "root.img")
    (one,) = check(journal)
    assert (one.code, one.disk, one.severity) == ("base", "root", "lost")
    assert one.ranges == [(from_byte, SIZES["root"])]
    assert one.from_ns == START


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE gaps SET to_ns = from_ns - 1",
        "INSERT INTO thinned VALUES (100, 50, 10)",
        "INSERT INTO kept_instants VALUES (5)",
        "UPDATE checkpoints SET at_ns = 5",
        f"INSERT INTO folds VALUES ({START * 2})",
        "UPDATE segments SET first_stamp = last_stamp + 1 WHERE number = 2",
        "INSERT INTO meta VALUES ('retention', '{')",
        "UPDATE disks SET size_bytes = 1000 WHERE name = 'root'",
        f"INSERT INTO gaps VALUES ('nobody', {START}, NULL)",
        f"UPDATE sources SET watermark = {START}",
    ],
)
def test_a_catalog_that_contradicts_itself_or_the_frames_is_told(
    journal: Journal, statement: str
) -> None:
    with sqlite3.connect(journal.directory / "catalog.sqlite") as catalog:
        catalog.execute(statement)
    catalog.close()
    findings = check(journal)
    assert codes(findings) == ["catalog"], findings
    assert findings[0].severity == "lost"


def test_a_catalog_that_sqlite_calls_damaged_is_told(journal: Journal) -> None:
    path = journal.directory / "catalog.sqlite"
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(b"\xff" * 20_000)
    findings = check(journal)
    assert findings
    assert set(codes(findings)) == {"catalog"}
    path.unlink()
    findings = check(journal)
    assert codes(findings) == ["catalog"]
    before = sorted(journal.directory.rglob("*"))
    repair(journal.directory, findings)
    assert sorted(journal.directory.rglob("*")) == before
    shutil.rmtree(journal.directory / "segments")
    assert codes(check(journal)) == ["unfinished"]


def test_a_damaged_fork_is_told(journal: Journal) -> None:
    made = journal.directory / "forks" / "trial"
    made.mkdir(parents=True)
    (made / "fork.json").write_text("{")
    (one,) = check(journal)
    assert (one.code, one.file) == ("fork", "forks/trial/fork.json")
    fork = {"name": "trial", "at_ns": START, "created_ns": 1, "size_limit_bytes": None}
    fork |= {"expires_ns": None, "disks": [{"name": "root", "size_bytes": SIZES["root"]}]}
    (made / "fork.json").write_text(json.dumps(fork))
    create_overlay(made, "root", SIZES["root"])
    assert check(journal) == []
    flip(made / "root.map", 9)
    (one,) = check(journal)
    assert (one.code, one.disk, one.file) == ("fork", "root", "forks/trial/root.map")


# --- what is derived


def _run_chunk(path: Path) -> int:
    return contents_of(path)[1].frames_end + 12


def _directory(path: Path) -> int:
    return contents_of(path)[1].runs[0].directory_offset + 5


PLANTS: dict[str, tuple[str, Callable[[Path], int]]] = {
    "segment header": ("segment-header", lambda path: 20),
    "chunk of a run": ("index", _run_chunk),
    "directory of a run": ("index", _directory),
    "frame table": ("frame-table", lambda path: contents_of(path)[1].frame_table_offset + 3),
    "contents": ("seal", lambda path: contents_of(path)[0].contents_offset + 30),
    "trailer": ("seal", lambda path: path.stat().st_size - 20),
}


@pytest.mark.parametrize("what", PLANTS)
def test_what_is_derived_in_a_sealed_segment_is_told_and_made_again(
    journal: Journal, what: str
) -> None:
    # Guards the row of _write_anew: frames, stamps and numbers must be what they were.
    code, place = PLANTS[what]
    path = sealed(journal)[2]
    flip(path, place(path))
    findings = check(journal)
    assert codes(findings) == [code]
    assert findings[0].file == f"segments/{path.name}"
    assert findings[0].severity == "derived"
    repair(journal.directory, findings)
    assert findings[0].repaired
    assert not path.exists()
    assert check(journal) == []
    is_lost(journal, [])
    reopened(journal).run(20)
    journal.close()
    assert check(journal) == []


def test_bytes_missing_behind_the_frames_are_told_and_made_again(journal: Journal) -> None:
    path = sealed(journal)[2]
    with path.open("r+b") as file:
        file.truncate(contents_of(path)[1].frames_end + 7)
    findings = check(journal)
    assert codes(findings) == ["seal"]
    repair(journal.directory, findings)
    assert check(journal) == []
    is_lost(journal, [])


def test_an_index_that_is_not_that_of_the_frames_is_told_and_made_again(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Guards _agrees in check_segment: every digest of this index is right.
    reopened(journal)
    wrong = int(newest(journal).stem)
    real = segment_writer._runs
    monkeypatch.setattr(
        segment_writer,
        "_runs",
        lambda segment: {
            disk: run.take(slice(0, len(run) - (segment.number == wrong)))
            for disk, run in real(segment).items()
        },
    )
    journal.run(80)
    journal.close()
    findings = check(journal)
    assert codes(findings) == ["index-differs"]
    monkeypatch.undo()
    repair(journal.directory, findings)
    assert check(journal) == []
    is_lost(journal, [])


def test_a_lossy_segment_keeps_its_damaged_index_and_says_why(journal: Journal) -> None:
    path = sealed(journal)[2]
    at, header = next(one for one in frames_of(path)[2:] if one[1].payload_bytes)
    flip(path, at + header.frame_bytes - 1)
    flip(path, contents_of(path)[1].frame_table_offset + 3)
    findings = check(journal)
    assert sorted(codes(findings)) == ["block", "frame-table"]
    before = path.read_bytes()
    repair(journal.directory, findings)
    assert path.read_bytes() == before
    assert "frames of it are lost" in next(f.what for f in findings if f.code == "frame-table")
    is_lost(journal, findings)


@pytest.mark.parametrize("offset", [5, 60, 3000, -10, -70])
def test_a_damaged_merged_run_is_told_and_removed(journal: Journal, offset: int) -> None:
    settle(reopened(journal))
    journal.close()
    path = max((journal.directory / "index").iterdir(), key=lambda each: each.stat().st_size)
    flip(path, offset % path.stat().st_size)
    findings = check(journal)
    assert codes(findings) == ["merged-run"]
    assert findings[0].file == f"index/{path.name}"
    repair(journal.directory, findings)
    assert not path.exists()
    assert check(journal) == []
    is_lost(journal, [], step=40)


def test_a_merged_run_that_is_not_the_index_of_the_frames_is_told_and_removed(
    journal: Journal,
) -> None:
    # Guards "expected != found" in check._check_merged: every digest of this run is right.
    settle(reopened(journal))
    group = journal.replica.group_id
    journal.close()
    path = min((journal.directory / "index").iterdir())
    name = MergedName.parse(path.name)
    assert name is not None
    files = ReadFiles()
    file = MergedFile(path.parent, name, group, files, directory_cache())
    inputs = {}
    for disk in file.entries():
        run = file.run(disk)
        assert run is not None
        entries = concatenate([*run.stream(is_long=False), *run.stream(is_long=True)])
        inputs[disk] = [MemoryRun(entries.take(slice(1, None)))]
    files.close()
    path.unlink()
    write_merged(path, name, group, [inputs], lambda _seconds: None)
    findings = check(journal)
    assert codes(findings) == ["merged-run"]
    assert "not the index" in findings[0].what
    repair(journal.directory, findings)
    assert check(journal) == []


def test_a_durable_record_that_is_not_true_is_told_and_made_again(journal: Journal) -> None:
    flip(journal.directory / "durable", 20)
    findings = check(journal)
    assert codes(findings) == ["durable-record"]
    repair(journal.directory, findings)
    assert findings[0].repaired
    assert check(journal) == []


# --- what is left over


def _torn(journal: Journal) -> None:
    at, _ = frames_of(newest(journal))[-1]
    frame = newest(journal).read_bytes()[at:]
    with newest(journal).open("ab") as file:
        file.write(frame[: len(frame) // 2])


LEFT: dict[str, tuple[str, Callable[[Journal], object]]] = {
    "half a frame": ("torn-tail", _torn),
    "a segment written anew": (
        "unfinished",
        lambda j: shutil.copy(sealed(j)[0], j.directory / "segments" / "000000000001-1.seg"),
    ),
    "a segment just begun": (
        "unfinished",
        lambda j: (j.directory / "segments" / "000000000099.seg").write_bytes(b"BRSEG"),
    ),
    "half a merged run": (
        "unfinished",
        lambda j: _file(j, "index/000000000001-000000000002-0000000000000000.tmp"),
    ),
    "a stale merged run": (
        "stale-index",
        lambda j: _file(j, "index/000000000001-000000000002-0000000000000000.run"),
    ),
    "a fork being made": ("unfinished", lambda j: _file(j, "forks/.new-abc/fork.json")),
    "a pin of nobody": ("void-pin", lambda j: _file(j, "pins/0011")),
    "a pin that was being made": ("void-pin", lambda j: _file(j, "pins/.0011")),
}


def _file(journal: Journal, name: str) -> None:
    path = journal.directory / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"{}")


@pytest.mark.parametrize("what", LEFT)
def test_what_a_crash_has_left_is_told_and_removed(journal: Journal, what: str) -> None:
    code, plant = LEFT[what]
    plant(journal)
    findings = check(journal)
    assert codes(findings) == [code]
    assert findings[0].severity == "leftover"
    repair(journal.directory, findings)
    assert findings[0].repaired
    assert check(journal) == []
    is_lost(journal, [], step=40)


def test_files_that_are_none_of_ours_are_told_and_never_touched(journal: Journal) -> None:
    paths = [
        journal.directory / "notes.txt",
        journal.directory / "segments" / "000000000002.seg.bak",
        journal.directory / "index" / "README",
    ]
    for path in paths:
        _file(journal, str(path.relative_to(journal.directory)))
    with (journal.directory / "base" / "root.img").open("ab") as file:
        file.write(b"x" * 512)
    findings = check(journal)
    assert codes(findings) == ["unknown"] * 4
    repair(journal.directory, findings)
    assert all(path.exists() for path in paths)


def test_every_flipped_byte_is_found_in_the_part_it_is_in(journal: Journal) -> None:
    """No byte of a sealed segment is beyond the check; each is told once."""
    path = sealed(journal)[1]
    whole, trailer, end = path.read_bytes(), *contents_of(path)
    seen = set()
    for at in {*range(0, len(whole), len(whole) // 60), len(whole) - 1, end.frames_end}:
        flip(path, at)
        findings = check(journal)
        told = {one.code for one in findings}
        assert len(told) == 1, (at, findings)
        severity = "lost" if 64 <= at < end.frames_end else "derived"
        assert {one.severity for one in findings} == {severity}, at
        seen |= told
        path.write_bytes(whole)
    assert seen >= {"block", "index"}
    assert trailer.contents_offset < len(whole)
    assert seen <= SEVERITIES.keys()
    assert bytes_to_check(journal.directory) > len(whole)
