"""The index's parts: lookups in runs, bounded reading, bounded memory, bounded descriptors."""

from __future__ import annotations

import os
import time
from pathlib import Path
from uuid import UUID

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from journal_model import GROUP, Journal, Record, small_segments

from blockrepl.errors import DamageError
from blockrepl.formats import run as run_format
from blockrepl.formats.frame import RecordKind
from blockrepl.formats.run import Run, encode_run
from blockrepl.formats.segment import RunEntry, file_name
from blockrepl.storage import reading, runs
from blockrepl.storage.history import ReplicaHistory
from blockrepl.storage.reading import Cache, ReadFiles
from blockrepl.storage.runs import FileRun, MemoryRun, MendedRun, directory_cache
from blockrepl.storage.segment_reader import Known
from blockrepl.units import KIB, MIB
from blockrepl.views.view import View

ENTRY = st.tuples(
    st.integers(0, 6 * MIB),
    st.integers(1, 5),
    st.sampled_from([1, 512, 4096, MIB, MIB + 1, 3 * MIB]),
)


def run_of(entries: list[tuple[int, int, int]]) -> Run:
    count = len(entries)
    return Run(
        np.array([start for start, _, _ in entries], np.uint64),
        np.array([stamp for _, stamp, _ in entries], np.uint64),
        np.array([length for _, _, length in entries], np.uint32),
        np.ones(count, np.uint32),
        np.arange(count, dtype=np.uint32),
        np.zeros(count, np.uint32),
        np.zeros(count, np.uint8),
    )


def in_file(path: Path, run: Run, rebuilt: list[DamageError]) -> MendedRun:
    data, encoder = encode_run(run, 64)
    directory = encoder.directory().tobytes()
    path.write_bytes(b"x" * 64 + data + directory)
    entry = RunEntry(
        disk=UUID(int=1),
        directory_offset=encoder.end,
        chunks=len(encoder.directory()),
        long_chunks=encoder.long_chunks,
        count=len(run),
        first_stamp=0,
        last_stamp=9,
        digest=xxhash.xxh3_64_intdigest(directory),
    )

    def rebuild(error: DamageError) -> Run:
        rebuilt.append(error)
        return run

    return MendedRun(FileRun(path, entry, ReadFiles(), directory_cache()), rebuild)


@settings(deadline=None, max_examples=60)
@given(st.lists(ENTRY, max_size=200), st.integers(0, 7 * MIB), st.integers(1, 3 * MIB))
def test_a_lookup_finds_what_overlaps_whether_in_memory_or_in_a_file(
    tmp_path_factory: pytest.TempPathFactory,
    entries: list[tuple[int, int, int]],
    first: int,
    size: int,
) -> None:
    run = run_of(entries)
    last, at = first + size, 3
    wanted = sorted(
        (start, stamp, length)
        for start, stamp, length in entries
        if start < last and start + length > first and stamp <= at
    )
    path = tmp_path_factory.getbasetemp() / "run"
    rebuilt: list[DamageError] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_format, "CHUNK_ENTRIES", 4)
        sources = (MemoryRun(run), in_file(path, run, rebuilt))
    for source in sources:
        found = source.overlapping(first, last, at)
        for is_long in (False, True):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(runs, "STREAM_ENTRIES", 1024)
                streamed = [s for part in source.stream(is_long=is_long) for s in part.starts]
            assert streamed == sorted(
                start for start, _, length in entries if (length > MIB) == is_long
            )
        rows = [
            (int(part.starts[i]), int(part.stamps[i]), int(part.lengths[i]))
            for part in found
            for i in range(len(part))
        ]
        assert sorted(rows) == wanted
    assert not rebuilt


def test_every_flipped_byte_of_a_run_is_noticed(tmp_path: Path) -> None:
    """Guards both digests in FileRun: without one, a flipped byte leads elsewhere or nowhere."""
    run = run_of([(4096 * n, n, 4096) for n in range(40)])
    in_file(tmp_path / "run", run, [])
    for place in range(64, (tmp_path / "run").stat().st_size, 3):
        rebuilt: list[DamageError] = []
        source = in_file(tmp_path / "run", run, rebuilt)
        with (tmp_path / "run").open("r+b") as file:
            file.seek(place)
            byte = file.read(1)
            file.seek(place)
            file.write(bytes([byte[0] ^ 1]))
        assert sum(map(len, source.overlapping(0, MIB, 100))) == 40
        assert len(rebuilt) == 1


def test_a_lookup_reads_a_slice_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of([(64 * KIB * n, 1, 4096) for n in range(100_000)])
    source = in_file(tmp_path / "run", run, [])
    source.estimate(0, 1)
    read = 0
    whole = ReadFiles.read

    def counted(self: ReadFiles, path: Path, size: int, offset: int) -> bytes:
        nonlocal read
        read += size
        return whole(self, path, size, offset)

    monkeypatch.setattr(ReadFiles, "read", counted)
    assert sum(map(len, source.overlapping(1024 * MIB, 1088 * MIB, 5))) == 1024
    assert read < 16 * 1024 * 4  # chunks of 1024 entries, and one more at either side


def test_what_arrives_late_with_an_older_stamp_does_not_hide_what_is_newer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_segments(monkeypatch, 1)
    monkeypatch.setattr("blockrepl.storage.index.CHUNK_ENTRIES", 1)
    journal = Journal(tmp_path / "home", {"root": 64 * KIB})
    synced_at = journal.tick()
    newer = journal.write("root", 4096, b"n" * 4096)
    whole = Record(synced_at, "root", 0, 64 * KIB, RecordKind.WRITE, b"o" * 64 * KIB)
    journal.late(whole)
    beside = Record(journal.tick(), "root", 60 * KIB, 512, RecordKind.WRITE, b"b" * 512)
    journal.put([beside])  # in the same segment
    with ReplicaHistory.open(journal.home, GROUP) as replica:
        for at in (synced_at, newer.stamp, journal.stamp):
            view = View(replica, at, replica.state())
            assert view.read("root", 0, 64 * KIB) == journal.model.at(at)["root"]
    journal.close()


def test_opening_a_view_reads_no_payload_and_resolves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_segments(monkeypatch)
    journal = Journal(tmp_path / "home", {"root": 256 * KIB})
    journal.run(300)
    journal.close()
    read = 0
    whole = ReadFiles.read

    def counted(self: ReadFiles, path: Path, size: int, offset: int) -> bytes:
        nonlocal read
        read += size
        return whole(self, path, size, offset)

    monkeypatch.setattr(ReadFiles, "read", counted)
    with ReplicaHistory.open(journal.home, GROUP) as replica:
        View(replica, journal.stamp, replica.state())
    journal_bytes = sum(p.stat().st_size for p in (journal.directory / "segments").iterdir())
    assert journal_bytes > 512 * KIB
    # What is read: of sealed segments the contents, of the open one headers and columns.
    assert read < 3000 * len(list((journal.directory / "segments").iterdir())) + 64 * KIB * 3


def test_a_lookup_beside_a_refresh_sees_all_of_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Guards _Sources: with a segment folded meanwhile, a lookup ended with a KeyError of ours.
    small_segments(monkeypatch)
    journal = Journal(tmp_path / "home", {"root": 256 * KIB})
    journal.run(60)
    disk = journal.ids["root"].bytes
    with ReplicaHistory.open(journal.home, GROUP) as replica:
        state = replica.state()
        replica.refresh(state)
        index = replica.index
        choose, found = index._choose, []

        def look_first() -> None:
            found.append(index.resolve(disk, 0, 256 * KIB, journal.stamp))
            choose()

        monkeypatch.setattr(index, "_choose", look_first)
        left = dict(state.segments)
        gone = left.pop(min(left))
        index.refresh(
            {number: Known.of(row) for number, row in left.items()},
            leftovers={file_name(gone.number, gone.generation)},
        )
        assert len(found) == 1
    journal.close()


def test_a_long_mount_lets_go_of_entries_once_segments_are_sealed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_segments(monkeypatch)
    journal = Journal(tmp_path / "home", {"root": 256 * KIB})
    with ReplicaHistory.open(journal.home, GROUP) as replica:
        for _ in range(20):
            journal.run(20)
            View(replica, journal.stamp, replica.state())
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            journal.run(1)  # its commit notes what has been sealed
            replica.refresh(replica.state())
            if all(segment.sealed for segment in replica.index.segments()[:-1]):
                break
        disk = journal.ids["root"].bytes
        in_memory = [
            segment.number
            for segment in replica.index.segments()
            for run in segment.runs(disk)
            if not isinstance(run, MendedRun)
        ]
        assert len(replica.index.segments()) > 10
        assert set(in_memory) <= {replica.index.segments()[-1].number}
        assert len(in_memory) <= 8
    journal.close()


def test_descriptors_stay_under_their_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_segments(monkeypatch, 16 * KIB)
    monkeypatch.setattr(reading, "OPEN_FILES_MAX", 4)
    monkeypatch.setattr(reading.ReadFiles.__init__, "__defaults__", (4,))
    journal = Journal(tmp_path / "home", {"root": 256 * KIB})
    journal.run(500)
    before = len(os.listdir("/proc/self/fd"))
    with ReplicaHistory.open(journal.home, GROUP) as replica:
        view = View(replica, journal.stamp, replica.state())
        assert view.read("root", 0, 256 * KIB) == journal.model.at(journal.stamp)["root"]
        assert len(replica.index.segments()) > 20
        assert len(os.listdir("/proc/self/fd")) <= before + 4 + 3  # and the catalog's
    journal.close()


def test_a_cache_holds_no_more_than_its_limit() -> None:
    cache: Cache[int, bytes] = Cache(100, len)
    for key in range(50):
        cache.put(key, bytes(30))
        cache.put(key, bytes(20))
        assert cache.get(0) is not None  # the one in use stays
    assert sum(cache.get(key) is not None for key in range(50)) in (4, 5)
