"""A disk that grew, at the receiver: each instant has the size it had, whatever is done later."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from journal_model import GROUP, SOURCE, START, Journal, Record, small_segments
from serving import tool
from test_forks import succeed
from test_thinning import STEP, aligned, sealed, thin_all

from blockrepl import limits
from blockrepl.errors import PeerError, PointError, StateError
from blockrepl.formats.frame import FrameKind, RecordKind
from blockrepl.formats.marks import GrowMark
from blockrepl.formats.messages import AttachDisk
from blockrepl.model.points import Instant, Point
from blockrepl.model.retention import Kept, Stretch, advance
from blockrepl.storage import durable as durables
from blockrepl.storage.check import check_replica
from blockrepl.storage.history import ReplicaHistory
from blockrepl.storage.retained import raise_floor, remove_leftovers, replace
from blockrepl.storage.retention_worker import Order, work
from blockrepl.units import KIB, MIB, format_instant
from blockrepl.views.view import View

SIZES = {"root": 320 * KIB, "data": 800 * KIB + 512}
GROWN = 1 * MIB + 300 * KIB


@pytest.fixture
def journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Journal]:
    small_segments(monkeypatch)
    made = Journal(tmp_path / "home", SIZES)
    yield made
    made.close()


def base_bytes(journal: Journal, disk: str) -> int:
    return (journal.directory / "base" / f"{disk}.img").stat().st_size


def check(journal: Journal, kept: Kept | None = None, floor_ns: int = START + 10) -> int:
    """Every instant that is left has the bytes it had, and as many; how many there are."""
    shown = 0
    with ReplicaHistory(journal.directory) as history:
        state = history.state()
        for stamp, contents in journal.model.states():
            if stamp < floor_ns or (kept is not None and kept.before(stamp) != stamp):
                continue
            view = View(history, stamp, state)
            for disk, content in contents.items():
                assert view.disk(disk).size_bytes == len(content), (disk, stamp)
                assert view.read(disk, 0, 2 * len(content)) == content, (disk, stamp)
            shown += 1
    return shown


def grown_twice(journal: Journal) -> list[int]:
    """Some history, with two growths of one disk; their instants."""
    journal.run(60)
    instants = [journal.grow("data", 900 * KIB)]
    journal.run(60)
    instants.append(journal.grow("data", GROWN))
    journal.write("data", GROWN - 4096, b"z" * 4096)
    journal.run(60)
    return instants


def fold_past(journal: Journal, floor_ns: int) -> None:
    """As the receiver does, with the worker's own code."""
    rows = sealed(journal)
    catalog = journal.replica.catalog
    raise_floor(catalog, floor_ns)
    done = work(Order(directory=journal.directory, operation="fold", floor_ns=floor_ns))
    replace(catalog, [row for row in rows if row.number in done.old], [], floor_ns)
    remove_leftovers(catalog, journal.directory / "segments")


def test_each_instant_has_the_size_it_had(journal: Journal) -> None:
    # Guards sized_at in State.disks_at: instants before would end in zeros, or later ones lack it.
    first, _ = grown_twice(journal)
    assert check(journal) > 150
    journal.close()
    journal.open()
    assert check(journal) > 150
    assert base_bytes(journal, "data") == SIZES["data"]  # the base is the floor's
    with ReplicaHistory(journal.directory) as history:
        state = history.state()
        sizes = [View(history, at, state).disk("data").size_bytes for at in (first - 1, first)]
        assert sizes == [SIZES["data"], 900 * KIB]
    assert check_replica(journal.directory) == []


def test_thinning_and_folding_go_past_a_growth(journal: Journal) -> None:
    # Guards grow_images: the base would stay as short as it was; and the floor's size in
    # check_files.
    first, second = grown_twice(journal)
    begin, end = aligned(START), aligned(journal.stamp - STEP)
    kept = advance(Kept(), [Stretch(begin, end, STEP)], [first - 1, first, second], 0)
    thin_all(journal, kept)
    assert check(journal, kept) > 5
    fold_past(journal, first - 1)
    assert base_bytes(journal, "data") == SIZES["data"]
    fold_past(journal, first)
    assert base_bytes(journal, "data") == 900 * KIB
    assert check_replica(journal.directory) == []
    fold_past(journal, journal.stamp)
    assert base_bytes(journal, "data") == GROWN
    assert check(journal, kept, journal.stamp) == 1
    assert check_replica(journal.directory) == []


def test_a_fold_that_broke_off_around_the_growth_is_done_again(journal: Journal) -> None:
    # Guards `least` in check_files: an image that is yet to be enlarged would be called lost.
    grown_twice(journal)
    sealed(journal)
    raise_floor(journal.replica.catalog, journal.stamp)
    assert check_replica(journal.directory) == []
    work(Order(directory=journal.directory, operation="fold", floor_ns=journal.stamp))
    assert check_replica(journal.directory) == []  # enlarged, not catalogued
    assert check(journal, floor_ns=journal.stamp) == 1
    fold_past(journal, journal.stamp)
    assert check(journal, floor_ns=journal.stamp) == 1
    assert base_bytes(journal, "data") == GROWN


def test_a_growth_that_only_the_journal_knows_is_found_again(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Guards GrowMark in history._apply and in Replica._apply: the records behind it would be cut.
    journal.run(20)
    journal.grow("data", GROWN, commit=False)
    with monkeypatch.context() as patch:
        patch.setattr(type(journal.replica), "_write_catalog", lambda self: None)
        journal.put(
            [Record(journal.tick(), "data", GROWN - 512, 512, RecordKind.WRITE, b"e" * 512)]
        )
        (journal.directory / durables.FILE_NAME).unlink()
        assert check(journal) == 21  # as a reader finds it after a power cut
        journal.close()
    journal.open()
    assert check(journal) == 21
    (row,) = journal.replica.catalog.growths()
    assert (row.before_bytes, row.at_ns) == (SIZES["data"], journal.model.growths[0][0])


def test_a_disk_may_grow_before_its_first_sync_is_done(tmp_path: Path) -> None:
    # Guards `image.grow` in Replica._write_base and Replica._grow: base frames would not fit.
    journal = Journal(tmp_path / "home", SIZES, sync=False)
    journal.first_sync("root")
    start = Record(journal.stamp, "data", 0, 512, RecordKind.WRITE, b"s" * 512)
    journal._frame(FrameKind.BASE, "data", [start], number=0)
    journal.replica.commit()
    journal.grow("data", GROWN, commit=False)
    piece = Record(journal.stamp, "data", GROWN - 4096, 4096, RecordKind.WRITE, b"n" * 4096)
    journal._frame(FrameKind.BASE, "data", [piece], number=0)
    journal.replica.commit()
    assert base_bytes(journal, "data") == GROWN
    assert check_replica(journal.directory) == []
    journal.grow("data", GROWN + MIB)  # and once more, with nothing behind it
    assert base_bytes(journal, "data") == GROWN + MIB
    journal.tick()
    journal.first_sync("data")
    size = GROWN + MIB
    synced, content = journal.model.base["data"], bytearray(size)
    content[:512] = b"s" * 512
    content[GROWN - 4096 : GROWN] = b"n" * 4096
    content[size // 4 : size // 4 + size // 3] = synced[size // 4 : size // 4 + size // 3]
    journal.model.base["data"] = bytes(content)
    journal.run(20)
    assert check(journal, floor_ns=journal.model.records[0].stamp) == 20
    journal.close()


@pytest.mark.parametrize(
    ("size", "told"),
    [
        (SIZES["data"], "cannot grow to"),
        (512, "cannot grow to"),
        (limits.DISK_BYTES_MAX + 512, "DISK_BYTES_MAX"),
    ],
)
def test_a_size_that_cannot_be_is_refused_with_the_limits_name(
    journal: Journal, size: int, told: str
) -> None:
    # Guards check_growth.
    with pytest.raises(PeerError, match=told):
        journal.grow("data", size)
    assert journal.replica.catalog.growths() == []


def test_growing_is_refused_too_often_and_beneath_the_watermark(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("blockrepl.storage.admission.DISK_GROWTHS_MAX", 2)
    past = GrowMark(disk=journal.ids["data"], at_ns=journal.stamp, size_bytes=GROWN)
    with pytest.raises(PeerError, match="before the watermark"):
        journal.mark(past)
    journal._number -= 1
    size = SIZES["data"]
    journal.grow("data", size + 512, commit=False)
    journal.grow("data", size + 1024)
    with pytest.raises(PeerError, match="DISK_GROWTHS_MAX"):
        journal.grow("data", size + 2048)


def test_records_in_what_is_new_come_after_the_mark(journal: Journal) -> None:
    # Guards _grown_disk in Replica.append.
    journal.tick()
    beyond = Record(journal.stamp, "data", GROWN - 512, 512, RecordKind.WRITE, b"b" * 512)
    with pytest.raises(PeerError, match="beyond the end"):
        journal.put([beyond], model=False)
    journal._number -= 1
    journal.grow("data", GROWN, commit=False)
    journal.put([Record(journal.tick(), *_fields(beyond))])
    assert check(journal, floor_ns=journal.stamp) == 1


def _fields(record: Record) -> tuple[str, int, int, RecordKind, bytes]:
    return record.disk, record.offset, record.length, record.kind, record.data


def test_what_a_failed_commit_forgets_is_the_growth_too(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Guards that a staged size goes with what was staged: the source attaches again, and says it.
    journal.grow("data", GROWN, commit=False)
    journal.replica._forget_staged()
    journal._number -= 1
    beyond = Record(journal.tick(), "data", GROWN - 512, 512, RecordKind.WRITE, b"b" * 512)
    with pytest.raises(PeerError, match="beyond the end"):
        journal.put([beyond], model=False)


@pytest.mark.parametrize("given", [GROWN, SIZES["data"], GROWN + MIB])
def test_a_source_may_name_a_size_of_before_or_of_after(journal: Journal, given: int) -> None:
    # Guards `before` in attachment._check_same: a source with a spool from before could never come.
    journal.grow("data", GROWN)
    answer = _attach(journal, given)
    assert answer == GROWN
    with pytest.raises(StateError, match="the source says"):
        _attach(journal, 512)


def _attach(journal: Journal, size: int) -> int | None:
    disks = [
        AttachDisk(id=journal.ids["root"], name="root", size_bytes=SIZES["root"]),
        AttachDisk(id=journal.ids["data"], name="data", size_bytes=size),
    ]
    return journal.replica.attach(SOURCE, disks).disks[1].size_bytes


def test_a_last_region_that_was_short_is_to_be_proven_again(journal: Journal) -> None:
    # Guards Proofs.grown: zeros that nobody has looked at would count as proven.
    disk, proofs = journal.ids["data"].bytes, journal.replica.proofs
    journal.grow("data", MIB + 512)
    proofs.prove(disk, MIB + 512, 0, MIB + 512, journal.stamp)
    assert proofs.proven(disk, MIB + 512).is_whole
    journal.grow("data", 3 * MIB)
    assert proofs.proven(disk, 3 * MIB).covered_bytes == MIB
    journal.close()
    journal.open()
    assert journal.replica.proofs.proven(disk, 3 * MIB).covered_bytes == MIB


@pytest.mark.parametrize("options", [(), ("--compare",)])
def test_a_difference_over_a_growth_makes_the_one_of_the_other(
    journal: Journal, tmp_path: Path, options: tuple[str, ...]
) -> None:
    # Guards `inside` in diff, and the zeros that `compare` adds to the smaller one.
    first, second = grown_twice(journal)
    for here, there in ((first - 1, journal.stamp), (journal.stamp, first - 1)):
        points = [format_instant(each) for each in (here, there)]
        image, patch = tmp_path / f"{here}.img", tmp_path / f"{here}.qcow2"
        succeed(journal, "export", GROUP, "data", image, f"--at={points[0]}")
        assert image.stat().st_size == len(journal.model.at(here)["data"])
        answer = json.loads(
            succeed(journal, "diff", GROUP, *points, "--disk=data", f"--patch={patch}", "--json")
            if not options
            else succeed(journal, "diff", GROUP, *points, "--disk=data", *options, "--json")
        )
        (disk,) = answer["disks"]
        wanted = bytes(journal.model.at(there)["data"])
        assert (disk["before_bytes"], disk["size_bytes"]) == (image.stat().st_size, len(wanted))
        ends = [one["offset"] + one["length"] for one in disk["ranges"]]
        assert max(ends) <= len(wanted)
        assert all(one["length"] > 0 for one in disk["ranges"])
        if options:
            content = bytearray(journal.model.at(here)["data"].ljust(len(wanted), b"\0"))
            del content[len(wanted) :]
            for one in disk["ranges"]:
                place = slice(one["offset"], one["offset"] + one["length"])
                content[place] = wanted[place]
            assert content == wanted
        else:
            tool("qemu-img", "rebase", "-u", "-F", "raw", "-b", image, patch)
            target = tmp_path / f"{here}-after.img"
            tool("qemu-img", "convert", "-O", "raw", patch, target)
            assert target.read_bytes() == wanted
    text = succeed(journal, "diff", GROUP, format_instant(second - 1), format_instant(second))
    assert "its size goes from 921600 to 1355776 bytes" in text


def test_a_named_fork_has_the_size_of_its_instant(journal: Journal) -> None:
    first, _ = grown_twice(journal)
    for name, at_ns in (("old", first - 1), ("new", journal.stamp)):
        succeed(journal, "fork", "create", GROUP, name, f"--at={format_instant(at_ns)}")
        image = journal.directory / "forks" / name / "data.img"
        assert image.stat().st_size == len(journal.model.at(at_ns)["data"])
    assert check_replica(journal.directory) == []


def test_points_beside_a_growth_are_refused_as_ever(journal: Journal) -> None:
    grown_twice(journal)
    with ReplicaHistory(journal.directory) as history, pytest.raises(PointError):
        history.resolve(Point("x", Instant(START - 1)), journal.stamp, history.state())


def test_a_catalog_that_contradicts_itself_about_sizes_is_told(journal: Journal) -> None:
    # Guards the growths in check_catalog.
    grown_twice(journal)
    journal.replica.catalog.change("UPDATE growths SET at_ns = 0 WHERE before_bytes = ?", 900 * KIB)
    (finding,) = check_replica(journal.directory)
    assert finding.code == "catalog"
    assert "cannot have grown" in finding.what
