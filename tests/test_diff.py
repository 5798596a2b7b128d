"""What was written between two instants, against the model's records; patches that QEMU applies."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from journal_model import GROUP, Journal, Record, small_segments
from serving import tool
from test_forks import at, fail, pinned, succeed
from test_fuse import blockrepl
from test_thinning import STEP, aligned, thin_all
from test_view import find, flip, segments_of

from blockrepl.formats import qcow2
from blockrepl.formats.frame import RecordKind
from blockrepl.model import ranges
from blockrepl.model.retention import Kept, Stretch
from blockrepl.storage.history import ReplicaHistory
from blockrepl.storage.segment_reader import SegmentReader
from blockrepl.units import GIB, KIB, MIB, format_instant
from blockrepl.views import diff as diffs

SIZES = {"root": 3 * MIB + 512, "data": 256 * KIB}


@pytest.fixture
def journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Journal]:
    small_segments(monkeypatch)
    made = Journal(tmp_path / "home", SIZES)
    made.run(120)
    yield made
    made.close()


def diff(journal: Journal, first: int, second: int, *options: str) -> dict[str, Any]:
    instants = [format_instant(each) for each in (first, second)]
    found: dict[str, Any] = json.loads(
        succeed(journal, "diff", GROUP, *instants, "--json", *options)
    )
    return found


def bytes_written(journal: Journal, after: int, upto: int) -> dict[str, np.ndarray]:
    """A byte per byte of each disk: written in between, by the model's records."""
    found = {name: np.zeros(size, bool) for name, size in SIZES.items()}
    for record in journal.model.records:
        if after < record.stamp <= upto and record.kind != RecordKind.FLUSH:
            found[record.disk][record.offset : record.offset + record.length] = True
    return found


def bytes_told(answer: dict[str, Any]) -> dict[str, np.ndarray]:
    found = {name: np.zeros(size, bool) for name, size in SIZES.items()}
    for disk in answer["disks"]:
        reached = -1
        for each in disk["ranges"]:
            assert each["offset"] > reached  # ascending, disjoint, not touching
            reached = each["offset"] + each["length"]
            found[disk["disk"]][each["offset"] : reached] = True
        assert disk["changed_bytes"] == int(found[disk["disk"]].sum())
    return found


@pytest.mark.parametrize("seed", range(20))
def test_a_union_is_what_painting_the_ranges_gives(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranges, "GATHERED_MAX", 10)
    chance = np.random.default_rng(seed)
    painted, union = np.zeros(300, bool), ranges.Union()
    for _ in range(6):
        starts = chance.integers(0, 290, 5).astype(np.uint64)
        ends = starts + chance.integers(0, 10, 5).astype(np.uint64)
        union.add(starts, ends)
        for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
            painted[start:end] = True
    again = np.zeros(300, bool)
    reached = -1
    for start, end in zip(*(each.tolist() for each in union.result()), strict=True):
        assert reached < start < end
        again[start:end], reached = True, end
    assert (again == painted).all()


def test_a_diff_lists_what_was_written_in_between_in_both_directions(journal: Journal) -> None:
    """Guards `records` in storage/changes.py: trims and zeros are changes, flushes are not."""
    stamps = [record.stamp for record in journal.model.records]
    kinds = {record.kind for record in journal.model.records[20:90]}
    assert kinds == set(RecordKind)
    for first, second in (
        (stamps[20], stamps[89]),
        (stamps[89], stamps[20]),
        (stamps[50], stamps[51]),
    ):
        answer = diff(journal, first, second)
        wanted = bytes_written(journal, min(first, second), max(first, second))
        told = bytes_told(answer)
        for name in SIZES:
            assert (told[name] == wanted[name]).all(), name
        assert sum(disk["records"] for disk in answer["disks"]) == sum(
            record.kind != RecordKind.FLUSH
            and min(first, second) < record.stamp <= max(first, second)
            for record in journal.model.records
        )
    answer = diff(journal, stamps[30], stamps[30])
    assert [disk["changed_bytes"] for disk in answer["disks"]] == [0, 0]
    assert pinned(journal) == []


def test_compared_only_what_differs_is_left(journal: Journal) -> None:
    same = journal.model.at(journal.stamp)["root"]
    first = journal.stamp
    journal.write("root", 8192, bytes(same[8192:16384]))
    changed = bytearray(same[32768:40960])
    changed[3000] ^= 1
    journal.write("root", 32768, bytes(changed))
    told = diff(journal, first, journal.stamp, "--disk=root")
    assert told["disks"][0]["changed_bytes"] == 16384
    [root] = diff(journal, first, journal.stamp, "--disk=root", "--compare")["disks"]
    assert root["ranges"] == [{"offset": 32768 + 3000 // 512 * 512, "length": 512}]


def test_only_frames_of_the_interval_are_read(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards the choice of frames in `places`: the time grows with what changed."""
    read: list[int] = []
    columns = SegmentReader.columns

    def counted(self: SegmentReader, ordinal: int) -> Any:
        read.append(self.number)
        return columns(self, ordinal)

    stamps = [record.stamp for record in journal.model.records]
    with ReplicaHistory.open(journal.home, GROUP) as history:
        state = history.state()
        history.refresh(state)
        monkeypatch.setattr(SegmentReader, "columns", counted)
        diffs.diff(history, state, stamps[60], stamps[61])
        assert 1 <= len(read) <= 2
        read.clear()
        diffs.diff(history, state, stamps[0], stamps[-1])
        assert len(read) >= 10


def test_history_that_retention_has_thinned_is_compared_too(journal: Journal) -> None:
    """Guards the place in `places`: the number of a segment written anew finds none."""
    first, second = aligned(journal.stamp) - 4 * STEP, aligned(journal.stamp) - 2 * STEP
    before, after = (journal.model.at(each)["root"] for each in (first, second))
    thin_all(journal, Kept((Stretch(aligned(journal.model.records[0].stamp), second, STEP),)))
    assert any(row.generation for row in journal.replica.catalog.segments())
    told = bytes_told(diff(journal, first, second))
    written = bytes_written(journal, first, second)
    for name in SIZES:
        assert (told[name] == written[name]).all(), name
    compared = bytes_told(diff(journal, first, second, "--disk=root", "--compare"))["root"]
    differs = np.frombuffer(before, np.uint8) != np.frombuffer(after, np.uint8)
    assert differs.any()
    assert compared[differs].all()


def test_segments_that_retention_replaces_meanwhile_are_looked_at_again(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards the second look in `changed_ranges`."""
    first, second = aligned(journal.stamp) - 4 * STEP, aligned(journal.stamp) - 2 * STEP
    columns = SegmentReader.columns
    thinned: list[bool] = []
    with ReplicaHistory.open(journal.home, GROUP) as history:

        def thin_before_the_first(self: SegmentReader, ordinal: int) -> Any:
            if not thinned:
                thinned.append(True)
                begin = aligned(journal.model.records[0].stamp)
                thin_all(journal, Kept((Stretch(begin, second, STEP),)))
                history.files.close()
            return columns(self, ordinal)

        state = history.state()
        monkeypatch.setattr(SegmentReader, "columns", thin_before_the_first)
        found = diffs.diff(history, state, first, second)
    assert thinned
    written = bytes_written(journal, first, second)
    assert {disk.name: disk.changed_bytes for disk in found} == {
        name: int(written[name].sum()) for name in SIZES
    }


def apply(patch: Path, image: Path) -> None:
    tool("qemu-img", "check", "-q", patch)
    tool("qemu-img", "rebase", "-u", "-F", "raw", "-b", image, patch)
    tool("qemu-img", "commit", "-q", patch)


@pytest.mark.parametrize(("first", "second"), [(20, 100), (100, 20)])
def test_a_patch_makes_the_one_instant_of_the_other(
    journal: Journal, tmp_path: Path, first: int, second: int
) -> None:
    stamps = [journal.model.records[place].stamp for place in (first, second)]
    patch, image = tmp_path / "root.qcow2", tmp_path / "root.img"
    image.write_bytes(journal.model.at(stamps[0])["root"])
    answer = diff(journal, stamps[0], stamps[1], "--disk=root", "--patch", str(patch))
    assert answer["patch"] == str(patch)
    apply(patch, image)
    assert image.read_bytes() == journal.model.at(stamps[1])["root"]


def test_a_patch_of_a_large_disk_is_as_large_as_its_changes(tmp_path: Path) -> None:
    size = 3 * GIB + 512
    journal = Journal(tmp_path / "home", {"root": size}, sync=False)
    journal.mark(_consistent(journal))
    journal.replica.commit()
    journal.write("root", 0, b"old" * 1000)
    first = journal.stamp
    chance, written = random.Random(1), []
    journal.model.records.clear()  # the model would hold the disk's bytes
    for offset in (5000, GIB - 10, 2 * GIB + 7, size - 512):
        data = chance.randbytes(512)
        record = Record(journal.tick(), "root", offset, 512, RecordKind.WRITE, data)
        journal.put([record], model=False)
        written.append((offset, data))
    trim = Record(journal.tick(), "root", 0, 4096, RecordKind.TRIM)
    journal.put([trim], model=False)
    patch, image = tmp_path / "p.qcow2", tmp_path / "root.img"
    instants = [format_instant(each) for each in (first, journal.stamp)]
    succeed(journal, "diff", GROUP, *instants, "--patch", patch)
    assert patch.stat().st_size < 20 * qcow2.CLUSTER_BYTES
    with image.open("wb") as file:
        file.truncate(size)
        file.write(b"old" * 1000)
    apply(patch, image)
    with image.open("rb") as file:
        assert file.read(5000) == bytes(5000)
        for offset, data in written:
            file.seek(offset)
            assert file.read(512) == data
    journal.close()


def _consistent(journal: Journal) -> Any:
    from blockrepl.formats.marks import ConsistentMark

    return ConsistentMark(disk=journal.ids["root"], at_ns=journal.stamp)


def test_damage_in_between_is_told_and_elsewhere_does_not_matter(journal: Journal) -> None:
    stamps = [record.stamp for record in journal.model.records]
    bad = journal.write("root", 4096, journal.random.randbytes(8192))
    path = segments_of(journal)[-1]
    place = find(path, bad.stamp.to_bytes(8, "little"))
    flip(path, place)
    instants = [format_instant(each) for each in (stamps[100], journal.stamp)]
    done = blockrepl(journal, "diff", GROUP, *instants)
    assert done.returncode == 1
    assert "damaged at offset" in done.stderr.splitlines()[-1]
    assert diff(journal, stamps[10], stamps[40])["disks"]


@pytest.mark.parametrize(
    ("arguments", "status", "told"),
    [
        (["latest~3", "latest", "--disk=nope"], 1, "disks there: data, root"),
        (["latest~3", "latest", "--patch=p.qcow2"], 2, "--disk: data, root"),
        (["latest~3", "latest", "--disk=root", "--patch=missing/p"], 1, "mkdir"),
        (["-1000d", "latest"], 1, "before the floor"),
        (["??", "latest"], 2, "neither a time nor a name"),
    ],
)
def test_what_cannot_be_compared_is_one_line(
    journal: Journal,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    status: int,
    told: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert told in fail(journal, "diff", GROUP, *arguments, status=status)
    assert not (tmp_path / "p.qcow2").exists()


def test_people_read_sums_and_the_first_ranges(journal: Journal) -> None:
    _, option = at(journal, 20)
    said = succeed(journal, "diff", GROUP, option.removeprefix("--at="), "latest").splitlines()
    assert said[0].startswith(f"{GROUP} from 2027-")
    assert "ranges" in said[2]
    assert "records" in said[2]
