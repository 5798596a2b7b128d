"""The timeline's sums, against the records themselves: read from the files by nothing but formats/.

A record is counted once, in its interval, whatever was kept, merged, thinned, damaged or replaced.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from journal_model import GROUP, Journal, small_segments
from test_merging import reopen, settle
from test_thinning import aligned, thin_all
from test_view import flip

from blockrepl.errors import PeerError
from blockrepl.formats import frame as frames
from blockrepl.formats import segment as segments
from blockrepl.formats import statistics as forms
from blockrepl.formats.frame import FrameKind, RecordKind
from blockrepl.model import block_sample, timeline
from blockrepl.model.retention import Kept, Stretch
from blockrepl.model.timeline import SUMS
from blockrepl.storage import statistics
from blockrepl.storage.history import ReplicaHistory
from blockrepl.storage.segment_reader import SegmentReader
from blockrepl.storage.statistics import Activity, activity
from blockrepl.units import KIB, MIB

SIZES = {"root": 320 * KIB, "data": 3 * MIB + 512}
BLOCK = block_sample.BLOCK_BYTES
_NAMES = {
    RecordKind.WRITE: ("writes", "written_bytes"),
    RecordKind.ZERO: ("zeros", "zeroed_bytes"),
    RecordKind.TRIM: ("trims", "trimmed_bytes"),
    RecordKind.FLUSH: ("flushes", ""),
}


@pytest.fixture
def journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Journal]:
    small_segments(monkeypatch, 16 * KIB)
    made = Journal(tmp_path / "home", SIZES, seed=7)
    made.run(150)
    made.gap_and_resync("data")
    made.run(150)
    yield made
    made.close()


@dataclass(frozen=True)
class Written:
    """A frame with its records, as they lie in a segment file."""

    kind: FrameKind
    disk: bytes
    stored_bytes: int
    records: list[tuple[int, int, int, int]]  # stamp, offset, length, kind


def read_frames(journal: Journal) -> list[Written]:
    found = []
    for row in journal.replica.catalog.segments():
        name = segments.file_name(row.number, row.generation)
        data = (journal.directory / "segments" / name).read_bytes()
        at = segments.HEADER_BYTES
        while data[at : at + 4] == frames.MAGIC:
            header = frames.decode_header(data[at:])
            body = data[at + frames.HEADER_BYTES : at + header.frame_bytes]
            columns = frames.parse_columns(header, body)
            records = zip(
                columns.stamps.tolist(),
                columns.offsets.tolist(),
                columns.lengths.tolist(),
                (columns.kinds & 0x7F).tolist(),
                strict=True,
            )
            stored = len(body) - header.blocks_offset
            found.append(Written(header.kind, header.disk, stored, list(records)))
            at += header.frame_bytes
    return [one for one in found if one.records]


def expected(
    written: list[Written], disks: set[bytes], edges: list[int]
) -> tuple[list[dict[str, int]], list[float]]:
    """The sums of each interval, and about what it stores."""
    sums = []
    shares = []
    for after, upto in pairwise(edges):
        one, blocks, stored = dict.fromkeys(SUMS, 0), set(), 0.0
        for frame in (each for each in written if each.disk in disks):
            inside = [record for record in frame.records if after < record[0] <= upto]
            for _stamp, offset, length, kind in inside:
                if kind != RecordKind.FLUSH:
                    last = offset + length - 1
                    blocks |= {(frame.disk, at) for at in range(offset // BLOCK, last // BLOCK + 1)}
                count, size = _NAMES[RecordKind(kind)]
                if frame.kind == FrameKind.SYNC:
                    one["resynced_bytes"] += length
                    continue
                one[count] += 1
                if size:
                    one[size] += length
            payload = sum(each[2] for each in frame.records if each[3] == RecordKind.WRITE)
            mine = sum(each[2] for each in inside if each[3] == RecordKind.WRITE)
            if payload and frame.kind != FrameKind.SYNC:
                stored += frame.stored_bytes * mine / payload
        sums.append(one | {"changed_bytes": len(blocks) * BLOCK})
        shares.append(stored)
    return sums, shares


def look(journal: Journal, names: tuple[str, ...], after: int, upto: int, count: int) -> Activity:
    with ReplicaHistory.open(journal.home, GROUP) as history:
        disks = [journal.ids[name].bytes for name in names]
        return activity(history, disks, after, upto, count)


def check(journal: Journal, seed: int = 1) -> None:
    """Windows of all lengths, divided finely and not at all, of one disk and of both."""
    chance = random.Random(seed)
    written = read_frames(journal)
    stamps = sorted({record[0] for frame in written for record in frame.records})
    windows = [(stamps[0] - 1, stamps[-1], 1), (stamps[0] - 1, stamps[-1], 60)]
    windows.append((stamps[40] - 1, stamps[40], 50))  # a nanosecond
    for _ in range(8):
        after, upto = sorted(chance.sample(stamps, 2))
        windows.append((after, upto, chance.choice([2, 7, 40, 200])))
    for after, upto, count in windows:
        names = chance.choice([("root",), ("data",), ("root", "data")])
        found = look(journal, names, after, upto, count)
        edges = found.bins.edges.tolist()
        assert (edges[0], edges[-1], len(edges) - 1) == (after, upto, min(count, upto - after))
        sums, shares = expected(written, {journal.ids[name].bytes for name in names}, edges)
        told = found.bins.sums | {"changed_bytes": found.bins.changed_bytes()}
        assert found.bins.changed_is_exact().all()
        assert found.damaged == []
        for at, (one, share) in enumerate(zip(sums, shares, strict=True)):
            assert abs(int(told["stored_bytes"][at]) - share) <= len(written), at
            del one["stored_bytes"]
            assert {name: int(told[name][at]) for name in one} == one, at
    total = look(journal, ("root", "data"), stamps[0] - 1, stamps[-1], 33).bins.sums
    stored = sum(one.stored_bytes for one in written if one.kind != FrameKind.SYNC)
    assert int(total["stored_bytes"].sum()) == stored  # nothing is lost by rounding


def kept(journal: Journal) -> list[Path]:
    return sorted((journal.directory / "statistics").glob("*"))


def sealed_names(journal: Journal) -> list[str]:
    return [
        segments.file_name(row.number, row.generation) + ".stats"
        for row in journal.replica.catalog.segments()
        if row.sealed
    ]


def test_sums_are_those_of_the_records(journal: Journal) -> None:
    """Guards the frames of several intervals in `Bins.add`: counted whole, sums are of others.

    Guards `is_sync` there: what is sent again after a gap is no guest's write.
    """
    records = [record for frame in read_frames(journal) for record in frame.records]
    assert {kind for *_, kind in records} == set(RecordKind)
    assert any(frame.kind == FrameKind.SYNC for frame in read_frames(journal))
    lost = 1  # of the gap
    assert len(records) == len(journal.model.records) - lost + 1
    check(journal)
    assert [path.name for path in kept(journal)] == sealed_names(journal) != []
    check(journal, seed=2)  # by what was kept


def test_sums_are_the_same_of_merged_and_thinned_segments(journal: Journal) -> None:
    """Guards the generation in the name of what is kept: it would be of what is no more."""
    reopen(journal)
    check(journal)
    before = kept(journal)
    settle(journal)
    assert list((journal.directory / "index").glob("*"))
    check(journal)
    assert kept(journal) == before
    edge = aligned(journal.model.records[200].stamp)
    count = len(read_frames(journal))
    thin_all(journal, Kept((Stretch(0, edge, 20_000),)))
    assert len(read_frames(journal)) != count
    check(journal)
    assert [path.name for path in kept(journal)] == sealed_names(journal)
    assert any("-1.seg" in path.name for path in kept(journal))


def test_of_sealed_segments_in_one_interval_no_frame_is_read_again(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards `forms.decode` in `_statistics`: ten thousand segments are drawn in seconds."""
    read: list[int] = []
    body_start = SegmentReader.body_start

    def counted(self: SegmentReader, ordinal: int, **options: Any) -> Any:
        read.append(self.number)
        return body_start(self, ordinal, **options)

    monkeypatch.setattr(SegmentReader, "body_start", counted)
    reopen(journal)
    last = journal.stamp
    look(journal, tuple(SIZES), 1, last, 1)
    everything = len(read)
    read.clear()
    look(journal, tuple(SIZES), 1, last, 1)
    newest = max(row.number for row in journal.replica.catalog.segments())
    assert set(read) <= {newest}
    read.clear()
    look(journal, tuple(SIZES), 1, last, 8)
    assert len(read) <= everything // 4
    shutil.rmtree(journal.directory / "statistics")
    read.clear()
    look(journal, tuple(SIZES), 1, last, 1)
    assert len(read) == everything


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def _flip(path: Path) -> None:
    flip(path, path.stat().st_size // 2)


def _of_another(path: Path) -> None:
    other = next(one for one in sorted(path.parent.iterdir()) if one != path)
    shutil.copy(other, path)


@pytest.mark.parametrize("spoil", [_cut, _flip, _of_another, Path.unlink])
def test_what_was_kept_and_is_not_true_is_made_again(
    journal: Journal, spoil: Callable[[Path], None]
) -> None:
    """Guards the digest, and the segment's making and size, in formats/statistics.py."""
    look(journal, tuple(SIZES), 1, journal.stamp, 10)
    path = kept(journal)[1]
    true = path.read_bytes()
    spoil(path)
    check(journal)
    assert path.read_bytes() == true


def test_without_room_for_statistics_they_are_made_each_time(journal: Journal) -> None:
    (journal.directory / "statistics").write_text("no directory")
    check(journal)


def test_segments_that_retention_replaces_meanwhile_are_looked_at_again(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards the second look in `activity`: half of it would be of what is no more."""
    edge = aligned(journal.model.records[200].stamp)
    reopen(journal)
    last = journal.stamp
    made = statistics._made
    thinned: list[bool] = []

    def thin_after_the_second(segment: SegmentReader) -> Any:
        if segment.number == 3 and not thinned:
            thinned.append(True)
            thin_all(journal, Kept((Stretch(0, edge, 20_000),)))
        return made(segment)

    monkeypatch.setattr(statistics, "_made", thin_after_the_second)
    found = look(journal, tuple(SIZES), 1, last, 1)
    assert thinned
    disks = {identity.bytes for identity in journal.ids.values()}
    [sums], _ = expected(read_frames(journal), disks, [1, last])
    assert int(found.bins.sums["writes"][0]) == sums["writes"]
    assert int(found.bins.changed_bytes()[0]) == sums["changed_bytes"]


def test_damage_is_told_and_the_rest_is_counted(journal: Journal) -> None:
    """Guards `errors` in `_made`: what could not be read must not be kept as nothing."""
    reopen(journal)
    first, second, *_ = [row for row in journal.replica.catalog.segments() if row.sealed]
    directory = journal.directory / "segments"
    everything = look(journal, tuple(SIZES), 1, journal.stamp, 1).bins.sums["writes"][0]
    shutil.rmtree(journal.directory / "statistics")
    flip(directory / segments.file_name(first.number), segments.HEADER_BYTES + 150)
    (directory / segments.file_name(second.number)).unlink()
    for _ in range(2):
        found = look(journal, tuple(SIZES), 1, journal.stamp, 1)
        assert 0 < found.bins.sums["writes"][0] < everything
        told = [(one.from_ns, one.to_ns) for one in found.damaged]
        assert told == [(row.first_stamp, row.last_stamp) for row in (first, second)]
    assert not any(path.name.startswith(f"{first.number:012d}") for path in kept(journal))


def test_statistics_of_segments_that_are_no_more_go(journal: Journal) -> None:
    look(journal, tuple(SIZES), 1, journal.stamp, 1)
    path = kept(journal)[0]
    path.with_name("000000999999-3.seg.stats").write_bytes(b"x")
    look(journal, tuple(SIZES), 1, journal.stamp, 1)
    assert [one.name for one in kept(journal)] == sealed_names(journal)


def test_what_is_kept_has_no_byte_that_may_be_another(journal: Journal) -> None:
    look(journal, tuple(SIZES), 1, journal.stamp, 1)
    data = bytearray(kept(journal)[0].read_bytes())
    row = next(row for row in journal.replica.catalog.segments() if row.sealed)
    forms.decode(bytes(data), row.created_ns, row.bytes)
    with pytest.raises(PeerError, match="another segment"):
        forms.decode(bytes(data), row.created_ns, row.bytes + 1)
    for at in range(len(data)):
        data[at] ^= 0x10
        with pytest.raises(PeerError):
            forms.decode(bytes(data), row.created_ns, row.bytes)
        data[at] ^= 0x10
    for size in range(0, len(data), 7):
        with pytest.raises(PeerError):
            forms.decode(bytes(data[:size]), row.created_ns, row.bytes)
    assert forms.HEADER.size == 40
    assert "header      40 bytes" in (forms.__doc__ or "")


# --- the sample


@pytest.mark.parametrize("seed", range(10))
def test_a_coarser_sample_is_a_part_of_the_finer_one(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards `_chosen` against `stand`: samples of two levels could not be united."""
    chance = np.random.default_rng(seed)
    starts = chance.integers(0, 1 << 24, 40).astype(np.uint64)
    ends = starts + chance.integers(0, 1 << 20, 40).astype(np.uint64)
    level, _, all_blocks = block_sample.touched(starts, ends)
    assert level == 0
    one_by_one = {
        block
        for start, end in zip(starts.tolist(), ends.tolist(), strict=True)
        for block in range(start // BLOCK, (end - 1) // BLOCK + 1)
        if end > start
    }
    assert set(all_blocks.tolist()) == one_by_one
    monkeypatch.setattr(block_sample, "GROUPS_MAX", 400)
    level, owners, blocks = block_sample.touched(starts, ends)
    assert level > 2
    finer = np.unique(all_blocks)
    assert np.unique(blocks).tolist() == finer[block_sample.stand(finer, 0, level)].tolist()
    assert (blocks >= starts[owners] // np.uint64(BLOCK)).all()
    # Of what is whole neighbourhoods there is no error.
    whole = np.array([0], np.uint64), np.array([BLOCK << (level + 5)], np.uint64)
    assert len(np.unique(block_sample.touched(*whole)[2])) << level >= 1 << (level + 4)


def test_what_is_estimated_is_near_what_is_true() -> None:
    """Guards the level in `Distinct.bytes`, and that samples are united at the coarsest."""
    chance = np.random.default_rng(3)
    distinct, true = block_sample.Distinct(), np.zeros(1 << 26, bool)
    for _ in range(30):
        blocks = chance.integers(0, 1 << 26, 40_000).astype(np.uint64)
        true[blocks] = True
        level = int(chance.integers(0, 4))
        distinct.add(blocks[block_sample.stand(blocks, 0, level)], level)
    assert distinct.bytes == pytest.approx(int(true.sum()) * BLOCK, rel=0.05)
    assert distinct.level > 3


def test_a_sample_is_small_however_often_a_block_is_written() -> None:
    """Guards SLOTS: the blocks that every frame writes would crowd out all others."""
    chance = np.random.default_rng(4)
    hot = chance.integers(0, 1 << 22, 60)
    parts = []
    for frame in range(2000):
        offsets = np.append(hot, chance.integers(0, 1 << 22)).astype(np.uint64)
        parts.append(
            frames.Columns(
                np.full(61, frame + 1, np.uint64),
                offsets * np.uint64(BLOCK),
                np.full(61, BLOCK, np.uint32),
                np.zeros(61, np.uint8),
            )
        )
    disk = bytes(16)
    made = timeline.summarise(list(range(2000)), [1] * 2000, [disk] * 2000, [100] * 2000, parts)
    assert made.level <= 2
    assert timeline.SAMPLE_MAX // 4 < len(made.sample_blocks) <= timeline.SAMPLE_MAX
    bins = timeline.Bins(timeline.edges(0, 2000, 1), [disk])
    assert bins.add(made) == []
    true = len({int(offset) for part in parts for offset in part.offsets.tolist()})
    assert int(bins.changed_bytes()[0]) == pytest.approx(true * BLOCK, rel=0.1)
    assert not bins.changed_is_exact().any()
