"""Views against a model of byte arrays, while the receiver writes, and over damage."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from journal_model import GROUP, START, Journal, Record, small_segments
from replica_workload import put, start, with_seal

from blockrepl.errors import DamageError, PointError, StateError, StorageError, UsageError
from blockrepl.formats.frame import Columns, RecordKind
from blockrepl.formats.segment import HEADER_BYTES, file_name
from blockrepl.model import points
from blockrepl.storage.durable import FILE_NAME as DURABLE_NAME
from blockrepl.storage.folding import foldable
from blockrepl.storage.history import ReplicaHistory
from blockrepl.storage.segment_reader import Known, SegmentReader
from blockrepl.units import KIB, MIB
from blockrepl.views import view as views
from blockrepl.views.view import View

SIZES = {"root": 96 * KIB, "data": 160 * KIB + 512}


@pytest.fixture
def journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Journal]:
    small_segments(monkeypatch)
    made = Journal(tmp_path / "home", SIZES)
    yield made
    made.close()


@pytest.fixture
def replica(journal: Journal) -> Iterator[ReplicaHistory]:
    with ReplicaHistory.open(journal.home, GROUP) as opened:
        yield opened


def view_at(replica: ReplicaHistory, at_ns: int) -> View:
    return View(replica, at_ns, replica.state())


def content(view: View) -> dict[str, bytes]:
    return {name: bytes(view.read(name, 0, disk.size_bytes)) for name, disk in view.disks.items()}


def resolve(replica: ReplicaHistory, text: str) -> int:
    return replica.resolve(points.parse(text), START + 10**12).at_ns


def segments_of(journal: Journal) -> list[Path]:
    return sorted((journal.directory / "segments").iterdir())


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 0x10]))


def find(path: Path, needle: bytes) -> int:
    place = path.read_bytes().find(needle)
    assert place > 0
    return place


def test_every_point_shows_exactly_the_records_up_to_it(
    journal: Journal, replica: ReplicaHistory
) -> None:
    journal.run(120)
    journal.gap_and_resync("root")
    journal.run(120)
    assert len(segments_of(journal)) > 4
    checked = 0
    for stamp, model in journal.model.states():
        for at in (stamp, stamp + 1 if stamp < journal.stamp else stamp):
            if at != stamp and any(r.stamp == at for r in journal.model.records):
                continue
            view = view_at(replica, at)
            assert content(view) == model, f"at {at - START}"
        checked += 1
    assert checked > 200


def test_any_piece_of_a_view_is_the_piece_of_the_whole(
    journal: Journal, replica: ReplicaHistory
) -> None:
    journal.run(80)
    view = view_at(replica, journal.stamp)
    whole = content(view)
    for _ in range(300):
        name = journal.random.choice(list(SIZES))
        offset = journal.random.randrange(SIZES[name] + 10)
        length = journal.random.randrange(1, 30_000)
        assert view.read(name, offset, length) == whole[name][offset : offset + length]
    for name, size in SIZES.items():
        assert view.read(name, size - 1, 9) == whole[name][-1:]
        assert view.read(name, size, 9) == view.read(name, size + 1, 9) == b""
        with pytest.raises(UsageError, match="beyond the end"):
            view.read_into(name, size - 1, memoryview(bytearray(2)))


def test_extents_cover_the_disk_and_what_they_call_zero_is_zero(
    journal: Journal, replica: ReplicaHistory
) -> None:
    journal.run(60)
    view = view_at(replica, journal.stamp)
    for name, disk in view.disks.items():
        whole = content(view)[name]
        at = 0
        for extent in view.extents(name, 0, disk.size_bytes):
            assert extent.offset == at
            at += extent.length
            if not extent.is_data:
                assert not any(whole[extent.offset : at])
        assert at == disk.size_bytes
        assert any(not extent.is_data for extent in view.extents(name, 0, disk.size_bytes))
        at = 0
        for extent in view.extents(name, 0, disk.size_bytes, grain=4096):
            assert extent.offset == at
            at += extent.length
            if not extent.is_data:
                assert not any(whole[extent.offset : at])
                assert extent.offset % 4096 == 0
                assert at % 4096 == 0 or at == disk.size_bytes
        assert at == disk.size_bytes


def test_small_windows_and_early_dropping_of_what_is_covered_change_nothing(
    journal: Journal, replica: ReplicaHistory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("blockrepl.storage.index.CHUNK_ENTRIES", 5)
    monkeypatch.setattr(views, "WINDOW_ENTRIES_TARGET", 3)
    monkeypatch.setattr(views, "WINDOW_BYTES_MAX", 64 * KIB)
    monkeypatch.setattr(views, "WINDOW_BYTES_MIN", 4 * KIB)
    journal.run(100)
    journal.gap_and_resync("data")
    journal.run(100)
    for stamp, model in list(journal.model.states())[::5]:
        del model
        assert content(view_at(replica, stamp)) == journal.model.at(stamp)


def test_records_longer_than_a_megabyte_are_found_from_any_window(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_segments(monkeypatch, 3 * MIB)
    journal = Journal(tmp_path / "home", {"big": 24 * MIB})
    journal.write("big", MIB, b"x" * 4 * MIB)
    journal.put([Record(journal.tick(), "big", 512, 20 * MIB, RecordKind.TRIM)])
    journal.write("big", 9 * MIB + 7, journal.random.randbytes(3 * MIB))
    journal.put([Record(journal.tick(), "big", 10 * MIB, 5 * MIB, RecordKind.ZERO)])
    monkeypatch.setattr(views, "WINDOW_BYTES_MAX", MIB)
    with ReplicaHistory.open(journal.home, GROUP) as replica:
        for record in journal.model.records:
            assert content(view_at(replica, record.stamp)) == journal.model.at(record.stamp)
    journal.close()


def test_a_view_never_changes_while_more_is_appended_and_sealed(
    journal: Journal, replica: ReplicaHistory
) -> None:
    journal.run(30)
    at = journal.stamp
    view, late = view_at(replica, at), view_at(replica, at)
    before = content(view)
    sealed = len(segments_of(journal))
    journal.run(150)
    newer = view_at(replica, journal.stamp)
    assert len(segments_of(journal)) > sealed + 1
    assert content(newer) == journal.model.at(journal.stamp)
    assert content(view) == before == content(late) == journal.model.at(at)
    journal.close()
    journal.open()
    assert content(view_at(replica, at)) == before


def test_segments_being_sealed_in_the_background_are_read_as_open_ones(
    journal: Journal, replica: ReplicaHistory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "blockrepl.storage.journal.Journal._seal_later", lambda self, segment: segment.close()
    )
    journal.run(250)
    assert len(segments_of(journal)) > 3
    view = view_at(replica, journal.stamp)
    assert content(view) == journal.model.at(journal.stamp)
    assert not any(segment.sealed for segment in replica.index.segments())


def begin_segment(journal: Journal) -> int:
    """Write elsewhere until a segment is begun; the number of the one before."""
    number = journal.replica._journal.segment_number
    while journal.replica._journal.segment_number == number:
        journal.write("data", 64 * KIB, journal.random.randbytes(16 * KIB))
    return number


@pytest.mark.parametrize("is_read_first", [False, True])
def test_an_older_state_that_is_taken_up_later_hides_nothing_newer(
    journal: Journal, replica: ReplicaHistory, is_read_first: bool
) -> None:
    # Guards JournalIndex against going back: the newest segment was dropped, so another thread's
    # view showed older bytes, which stayed in the cache of windows.
    journal.write("root", 0, b"old!" * KIB)
    older = replica.state()
    replica.refresh(older)
    begin_segment(journal)
    journal.write("root", 0, b"new!" * KIB)
    newer = replica.state()
    view = View(replica, newer.latest_ns, newer)
    if is_read_first:
        assert view.read("root", 0, 4) == b"new!"
    View(replica, older.latest_ns, older)
    assert view.read("root", 0, 4 * KIB) == b"new!" * KIB
    assert content(view) == journal.model.at(newer.latest_ns)
    assert older.segments.keys() == newer.segments.keys()  # read anew


def test_what_a_later_durable_record_says_is_there_under_an_earlier_reading_of_the_catalog(
    journal: Journal, replica: ReplicaHistory
) -> None:
    # Guards JournalIndex._position: the record is read first, so another thread's catalog may be
    # newer although its record is older.
    journal.write("root", 0, b"old!" * KIB)
    early = replica.state().durable
    begin_segment(journal)
    journal.write("root", 0, b"new!" * KIB)
    one, other = replica.state(), replica.state()
    other.durable = early
    view = View(replica, one.latest_ns, one)
    replica.refresh(other)
    assert content(view) == journal.model.at(one.latest_ns)


def test_an_older_record_after_a_look_without_one_hides_nothing(
    journal: Journal, replica: ReplicaHistory
) -> None:
    # Guards _position's second half: a reader without a record has looked at all there is.
    journal.write("root", 0, b"old!" * KIB)
    older = replica.state()
    begin_segment(journal)
    journal.write("root", 0, b"new!" * KIB)
    (journal.directory / DURABLE_NAME).unlink()
    newer = replica.state()
    view = View(replica, newer.latest_ns, newer)
    older.reading = newer.reading
    replica.refresh(older)
    assert content(view) == journal.model.at(newer.latest_ns)


@pytest.mark.timeout(20)
def test_a_segment_known_to_be_sealed_may_be_met_again_as_an_open_one(
    journal: Journal, replica: ReplicaHistory
) -> None:
    # Guards SegmentReader.refresh: what had been put off was taken up under its own lock twice.
    journal.write("root", 0, b"old!" * KIB)
    older = replica.state()
    number = begin_segment(journal)
    journal.replica._journal._collect(wait=True)
    journal.write("root", 0, b"new!" * KIB)
    newer = replica.state()
    assert newer.segments[number].sealed
    assert not older.segments[number].sealed
    view = View(replica, newer.latest_ns, newer)
    known = Known.of(older.segments[number])
    replica.index.segment(number).refresh(known, limit=known.bytes)
    View(replica, older.latest_ns, older)
    assert content(view) == journal.model.at(newer.latest_ns)


def test_what_is_sealed_is_read_although_the_durable_record_is_older(
    journal: Journal, replica: ReplicaHistory
) -> None:
    # A sealed segment is durable, and retention may put what the record's segment had into it.
    journal.write("root", 0, b"old!" * KIB)
    early = replica.state().durable
    begin_segment(journal)
    sealed = begin_segment(journal)
    journal.replica._journal._collect(wait=True)
    journal.write("root", 0, b"new!" * KIB)
    state = replica.state()
    state.durable = early
    assert state.segments[sealed].sealed
    replica.refresh(state)
    assert sealed in replica.index
    assert sealed + 1 not in replica.index
    assert not foldable(replica, state, 0)  # nor does a fold trip over the newest


@pytest.mark.parametrize("how", ["missing", "garbled", "contradicting"])
def test_without_a_true_durable_record_the_segments_say_what_there_is(
    journal: Journal, replica: ReplicaHistory, how: str
) -> None:
    journal.run(60)
    begin, end = journal.gap_and_resync("root")
    tagged = journal.checkpoint("late")
    journal.run(10)
    durable = journal.directory / DURABLE_NAME
    if how == "missing":
        durable.unlink()
    elif how == "garbled":
        flip(durable, 20)
    else:
        with segments_of(journal)[-1].open("r+b") as file:
            file.truncate(file.seek(0, os.SEEK_END) - 100)
    state = replica.state()
    history = replica.history(state)
    if how != "contradicting":
        assert state.latest_ns == journal.stamp
    assert tagged <= state.latest_ns <= journal.stamp
    assert [(gap.from_ns, gap.to_ns) for gap in history.gaps] == [(begin, end)]
    assert history.checkpoints == {"late": tagged}
    assert content(View(replica, state.latest_ns, state)) == journal.model.at(state.latest_ns)


def test_marks_that_the_catalog_does_not_know_yet_are_applied_from_the_segments(
    journal: Journal, replica: ReplicaHistory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("blockrepl.storage.replica.Replica._write_catalog", lambda *_: None)
    tagged = journal.checkpoint("uncatalogued")
    begin, end = journal.gap_and_resync("data")
    (journal.directory / DURABLE_NAME).unlink()
    history = replica.history()
    assert history.checkpoints == {"uncatalogued": tagged}
    assert [(gap.from_ns, gap.to_ns) for gap in history.gaps] == [(begin, end)]


def test_a_sealed_segment_that_the_catalog_does_not_know_hides_nothing(
    journal: Journal, replica: ReplicaHistory, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A seal may be durable where the catalog's row of it is not: its frames are read.
    monkeypatch.setattr("blockrepl.storage.replica.Replica._write_catalog", lambda *_: None)
    while len(segments_of(journal)) < 3:
        journal.run(12)
    tagged = journal.checkpoint("uncatalogued")
    journal.replica.error = StorageError("killed", code="fail-stop")  # closed without a word
    journal.replica._journal._collect(wait=True)
    (journal.directory / DURABLE_NAME).unlink()
    with segments_of(journal)[-1].open("r+b") as newest:
        newest.truncate(64)
    state = replica.state()
    before = [record.stamp for record in journal.model.records if record.stamp <= state.latest_ns]
    assert len(before) > 10
    assert tagged > state.latest_ns
    assert content(View(replica, state.latest_ns, state)) == journal.model.at(state.latest_ns)


def test_a_write_that_ends_like_a_seal_hides_nothing(tmp_path: Path) -> None:
    # Guards "if known.sealed" in SegmentReader._take_up: the view showed the base.
    replica, agent = start(tmp_path / "web")
    put(replica, agent.base(0, b"B" * 4096), agent.consistent())
    end = replica.status().journal_bytes
    frame = with_seal(agent, end, HEADER_BYTES)
    put(replica, frame)
    with ReplicaHistory(tmp_path / "web") as history:
        state = history.state()
        shown = View(history, state.latest_ns, state).read("root", 0, 4096)
    assert shown == bytes(frame[1][-4096:])
    replica.close()


def test_a_segment_that_was_being_begun_when_power_went_hides_nothing(
    journal: Journal, replica: ReplicaHistory
) -> None:
    # Guards the "else" in JournalIndex.refresh: recovery removes such a file (R1).
    journal.run(20)
    (journal.directory / DURABLE_NAME).unlink()
    number = int(segments_of(journal)[-1].stem) + 1
    (journal.directory / "segments" / file_name(number)).write_bytes(bytes(64))
    state = replica.state()
    assert state.latest_ns == journal.stamp
    assert content(View(replica, state.latest_ns, state)) == journal.model.at(journal.stamp)


@pytest.mark.parametrize("is_old", [False, True])
def test_a_durable_record_of_an_earlier_boot_is_not_believed(
    journal: Journal, replica: ReplicaHistory, monkeypatch: pytest.MonkeyPatch, is_old: bool
) -> None:
    # Guards _holds: it is never synced, so a power cut may bring back one that says too little.
    journal.run(20)
    path = journal.directory / DURABLE_NAME
    record = path.read_bytes()
    old = journal.stamp
    journal.run(20)
    path.write_bytes(record)
    if is_old:
        monkeypatch.setattr("blockrepl.storage.durable.this_boot", lambda: 1)
    assert replica.state().latest_ns == (journal.stamp if is_old else old)


def test_a_disk_is_in_the_views_from_its_first_sync_on(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "home", SIZES, sync=False)
    with ReplicaHistory.open(journal.home, GROUP) as replica:
        with pytest.raises(PointError, match="first sync"):
            resolve(replica, "latest")
        journal.first_sync("root")
        first = journal.stamp
        journal.write("root", 0, b"a" * 512)
        journal.first_sync("data")
        assert set(view_at(replica, first).disks) == {"root"}
        assert set(view_at(replica, journal.stamp).disks) == {"root", "data"}
        assert resolve(replica, "latest") == journal.stamp
    journal.close()


def test_flush_and_records_back_are_read_from_the_journal(
    journal: Journal, replica: ReplicaHistory
) -> None:
    journal.run(150)
    stamps = sorted(record.stamp for record in journal.model.records)
    flushes = [r.stamp for r in journal.model.records if r.kind == RecordKind.FLUSH]
    assert resolve(replica, "flush") == max(flushes)
    assert resolve(replica, "latest~1") == stamps[-2]
    assert resolve(replica, "latest~100") == stamps[-101]
    assert resolve(replica, "flush~7") == stamps[stamps.index(max(flushes)) - 7]
    with pytest.raises(PointError):
        resolve(replica, "latest~150")
    history = replica.history()
    for at in stamps[::10]:
        assert history.last_flush(at) == max((f for f in flushes if f <= at), default=None)


def test_records_back_reads_the_columns_of_few_frames(
    journal: Journal, replica: ReplicaHistory, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Guards _NewestFrames: all stamps that had been found were sorted anew with each frame, so that
    # a point some millions of records back took hours.
    journal.run(600)
    stamps = sorted(record.stamp for record in journal.model.records)
    read: list[int] = []
    columns = SegmentReader.columns

    def counted(segment: SegmentReader, ordinal: int) -> Columns:
        read.append(ordinal)
        return columns(segment, ordinal)

    monkeypatch.setattr(SegmentReader, "columns", counted)
    history = replica.history()
    for place in (*range(0, 600, 29), 599):
        for at in (stamps[place], stamps[place] + 1):  # inside a frame, as a rule
            for count in {1, 2, place // 3, place - 1, place}:
                if 0 < count <= place:
                    read.clear()
                    assert history.records_back(at, count) == stamps[place - count]
                    assert len(read) <= 8
            read.clear()
            assert history.records_back(at, place + 5_000_000) is None
            assert not read


def test_a_damaged_block_is_an_error_that_names_segment_and_offset(
    journal: Journal, replica: ReplicaHistory, caplog: pytest.LogCaptureFixture
) -> None:
    good = journal.write("root", 0, b"good" * 1024)
    bad = journal.write("root", 4096, journal.random.randbytes(4096))
    journal.run(100)
    journal.put([Record(journal.tick(), "root", 0, SIZES["root"], RecordKind.TRIM)])
    path = segments_of(journal)[0]
    place = find(path, bad.data)
    flip(path, place + 100)
    view = view_at(replica, bad.stamp)
    assert view.read("root", 0, 4096) == good.data
    for _ in range(2):
        with pytest.raises(DamageError) as caught:
            view.read("root", 4096, 4096)
    assert path.name in str(caught.value)
    assert str(place) in str(caught.value)
    assert [r.levelname for r in caplog.records].count("ERROR") == 1
    assert content(view_at(replica, journal.stamp)) == journal.model.at(journal.stamp)


@pytest.mark.parametrize("part", ["columns", "header"])
def test_damage_that_hides_records_refuses_every_point_from_there_on(
    journal: Journal, replica: ReplicaHistory, part: str
) -> None:
    good = journal.write("root", 0, b"good" * 1024)
    bad = journal.write("root", 0, journal.random.randbytes(4096))
    path = segments_of(journal)[-1]
    header = path.read_bytes().rfind(b"BRF1", 0, find(path, bad.data))
    flip(path, header + (150 if part == "columns" else 70))
    with pytest.raises(DamageError, match=str(header)):
        content(view_at(replica, bad.stamp))
    assert content(view_at(replica, good.stamp)) == journal.model.at(good.stamp)


def test_a_damaged_index_is_rebuilt_from_the_frames(
    journal: Journal, caplog: pytest.LogCaptureFixture
) -> None:
    journal.run(300)
    journal.close()
    sealed = segments_of(journal)[:-1]
    with ReplicaHistory.open(journal.home, GROUP) as replica:
        replica.refresh(replica.state())
        contents = [segment._table for segment in replica.index.segments() if segment.sealed]
    assert len(sealed) == len(contents) > 2
    first, second, third = contents[:3]
    assert first is not None
    assert second is not None
    assert third is not None
    flip(sealed[0], first.runs[0].directory_offset - 20)
    flip(sealed[1], second.frame_table_offset + 3)
    flip(sealed[2], sealed[2].stat().st_size - 20)
    with ReplicaHistory.open(journal.home, GROUP) as replica:
        for stamp in [record.stamp for record in journal.model.records][::10]:
            assert content(view_at(replica, stamp)) == journal.model.at(stamp)
    assert len([r for r in caplog.records if "rebuilt" in r.message]) == 2
    journal.open()


def test_a_missing_segment_is_told_and_older_points_stay(
    journal: Journal, replica: ReplicaHistory
) -> None:
    journal.run(300)
    row = replica.catalog.segments()[2]
    segments_of(journal)[2].rename(journal.home / "elsewhere")
    with pytest.raises(DamageError, match="missing"):
        content(view_at(replica, journal.stamp))
    before = max(r.stamp for r in journal.model.records if r.stamp < row.first_stamp)
    assert content(view_at(replica, before)) == journal.model.at(before)
    (journal.home / "elsewhere").rename(journal.directory / "segments" / "000000000003.seg")


def test_a_missing_base_is_an_error_not_zeros(journal: Journal, replica: ReplicaHistory) -> None:
    view = view_at(replica, journal.stamp)
    (journal.directory / "base" / "root.img").rename(journal.home / "elsewhere")
    with pytest.raises(StorageError, match=r"root\.img"):
        view.read("root", 0, 512)
    (journal.home / "elsewhere").rename(journal.directory / "base" / "root.img")


def test_unknown_groups_and_disks_are_told_with_those_that_exist(journal: Journal) -> None:
    with pytest.raises(StateError, match="nope") as caught:
        ReplicaHistory.open(journal.home, "nope")
    assert GROUP in caught.value.hint
    with ReplicaHistory.open(journal.home, GROUP) as replica:
        with pytest.raises(StateError) as caught:
            view_at(replica, journal.stamp).read("nope", 0, 1)
        assert "root" in caught.value.hint
