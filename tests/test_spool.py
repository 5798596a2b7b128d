"""The spool on the disk: what is in it comes out of it, after whatever a crash left."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from outgoing import DISKS, attached, bytes_of, marked, records

from blockrepl import limits
from blockrepl.errors import DamageError, StorageError
from blockrepl.formats.frame import Buffer
from blockrepl.storage.files import Files
from blockrepl.storage.spool import STATE, Spool, SpoolLimits

BOUNDS = SpoolLimits(1 << 30, 0)
FILE_BYTES = 3000  # some frames of 512 bytes


@pytest.fixture(autouse=True)
def _small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "SPOOL_FILE_BYTES", FILE_BYTES)


class FaultyFiles(Files):
    """Writes that find no room, or all but a part of what they want; knows what was synced."""

    def __init__(self) -> None:
        self.room_bytes = 1 << 60
        self.can_truncate = True
        self.synced: list[str] = []

    def write(self, descriptor: int, buffers: Sequence[Buffer], offset: int) -> int:
        data = b"".join(bytes(buffer) for buffer in buffers)[: self.room_bytes]
        if not data:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.room_bytes -= len(data)
        return super().write(descriptor, [data], offset)

    def truncate(self, descriptor: int, size_bytes: int) -> None:
        if not self.can_truncate:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        super().truncate(descriptor, size_bytes)

    def sync(self, descriptor: int) -> None:
        self.synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        super().sync(descriptor)


def frame(number: int) -> list[Buffer]:
    return list((marked(number)[0] if number % 7 == 0 else records(number, number)).buffers)


def whole(number: int) -> bytes:
    return b"".join(bytes(buffer) for buffer in frame(number))


def begun(directory: Path, first: int, last: int, files: Files | None = None) -> Spool:
    """A spool of frames first..last."""
    spool = Spool(directory / "spool", BOUNDS, files)
    spool.begin(attached(first), DISKS, [frame(first)])
    for number in range(first + 1, last + 1):
        spool.append(frame(number))
    return spool


def reopened(spool: Spool) -> Spool:
    spool.close()
    return Spool.open(spool.directory, BOUNDS)


def rest(spool: Spool) -> list[int]:
    """Numbers of all frames not yet read; each must be what was put in."""
    numbers = []
    while spool.has_unread():
        found = spool.read()
        assert bytes(found.frame) == whole(found.header.number)
        numbers.append(found.header.number)
    return numbers


def test_frames_come_out_as_they_went_in_over_files_and_processes(tmp_path: Path) -> None:
    spool = begun(tmp_path, 5, 30)
    assert len(list(spool.directory.glob("*.frames"))) > 3
    assert rest(spool) == list(range(5, 31))
    again = reopened(spool)
    assert again.is_certain
    assert again.next_number == 31
    assert again.size_bytes == sum(len(whole(number)) for number in range(5, 31))
    assert again.unread_bytes() == again.size_bytes
    again.append(frame(31))
    again.rewind(20)
    assert rest(again) == list(range(20, 32))
    assert again.unread_bytes() == 0
    again.close()


def test_what_is_given_back_is_gone_and_the_rest_is_read_on(tmp_path: Path) -> None:
    spool = begun(tmp_path, 1, 30)
    firsts = [number for number in range(2, 31) if spool.begins_file(number)]
    while spool.read().header.number < firsts[1] - 1:
        pass
    spool.advance(attached(firsts[0]))
    spool.give_back()
    assert spool.unread_bytes() == sum(len(whole(number)) for number in range(firsts[1], 31))
    assert rest(reopened(spool)) == list(range(firsts[0], 31))


@pytest.mark.parametrize("tail", [0, 1, 2])
def test_a_reader_at_the_end_of_a_file_that_is_given_back_goes_on_behind_it(
    tmp_path: Path, tail: int
) -> None:
    # Guards ``if self._read_file < 0`` in Spool.give_back: it read on in the last file, in the
    # middle, and found damage.
    spool = begun(tmp_path, 1, 30)
    firsts = [number for number in range(2, 31) if spool.begins_file(number)]
    large = list(records(31, 31, 20_000).buffers)
    spool.append(large)  # the last file is the largest
    while spool.read().header.number < firsts[tail] - 1:
        pass
    spool.advance(attached(firsts[tail]))
    spool.give_back()
    found = [spool.read().header.number for _ in range(firsts[tail], 32)]
    assert found == list(range(firsts[tail], 32))
    assert not spool.has_unread()
    spool.close()


@pytest.mark.parametrize("step", ["state", "first file"])
def test_a_crash_while_files_are_given_back_loses_nothing(
    tmp_path: Path, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool = begun(tmp_path, 1, 30)
    firsts = [number for number in range(2, 31) if spool.begins_file(number)]
    rest(spool)
    kept = {path.name: path.read_bytes() for path in spool.directory.glob("*.frames")}
    spool.advance(attached(firsts[1]))
    spool.give_back()
    names = sorted(kept)[:2]  # what was removed, of which the crash left some
    for name in names if step == "state" else names[1:]:
        (spool.directory / name).write_bytes(kept[name])
    again = reopened(spool)
    assert again.is_certain
    assert rest(again) == list(range(firsts[1], 31))
    assert len(list(again.directory.glob("*.frames"))) == len(kept) - 2
    again.close()


def test_what_an_earlier_spool_would_have_given_back_is_not_noted(tmp_path: Path) -> None:
    # Guards the look at the files in Spool.advance: the state went back to frames that are not
    # here, and the next start gave up all of them.
    spool = begun(tmp_path, 1, 30)
    spool.clear()
    spool.advance(attached(20))
    spool.give_back()
    spool.begin(attached(31), DISKS, [frame(31), frame(32)])
    spool.advance(attached(20))
    spool.give_back()
    assert rest(reopened(spool)) == [31, 32]
    spool.close()


def test_cleared_it_is_as_never_begun(tmp_path: Path) -> None:
    spool = begun(tmp_path, 1, 30)
    spool.clear()
    assert not spool.is_active
    assert spool.size_bytes == 0
    assert not list(spool.directory.iterdir())
    spool.begin(attached(40), DISKS, [frame(40)])
    assert rest(reopened(spool)) == [40]
    spool.close()


@pytest.mark.parametrize("how", ["no room in a new file", "killed in a new file", "begun empty"])
def test_what_is_swept_is_no_part_of_the_next_spool(tmp_path: Path, how: str) -> None:
    # Guards ``if file.size_bytes`` in Spool.end: the next one begins with the file of that name.
    files = FaultyFiles()
    spool = Spool(tmp_path / "spool", BOUNDS, files)
    spool.begin(attached(1), DISKS, [] if how == "begun empty" else [frame(1)])
    while how != "begun empty" and spool._files[-1].size_bytes < FILE_BYTES:
        spool.append(frame(spool.next_number))
    if how == "no room in a new file":
        files.room_bytes = 0
        with pytest.raises(StorageError):
            spool.append(frame(spool.next_number))
        files.room_bytes = 1 << 60
    elif how == "killed in a new file":
        spool.append(frame(spool.next_number))
        os.truncate(spool._files[-1].path, 100)
        spool = reopened(spool)
    due = spool.next_number
    rest(spool)
    spool.end()
    spool.begin(attached(due), DISKS, [frame(due)])
    spool.sweep()
    assert [path.name for path in spool.directory.glob("*.frames")] == [f"{due:020d}.frames"]
    assert rest(reopened(spool)) == [due]


def test_a_spool_that_cannot_begin_disturbs_no_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Guards the order in Spool.sweep: what it was removing was taken from under it.
    files = FaultyFiles()
    spool = begun(tmp_path, 1, 30, files)
    rest(spool)
    spool.end()
    unlink = Path.unlink

    def unlink_while_one_begins(path: Path, missing_ok: bool = False) -> None:
        monkeypatch.setattr(Path, "unlink", unlink)
        files.room_bytes = 0
        with pytest.raises(StorageError):
            spool.begin(attached(31), DISKS, [frame(31)])
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", unlink_while_one_begins)
    spool.sweep()
    assert not list(spool.directory.iterdir())


def test_nothing_of_a_spool_that_was_cleared_is_swept_later(tmp_path: Path) -> None:
    # Guards given_back.clear() in Spool.clear: the numbers behind it may be any.
    spool = begun(tmp_path, 1, 9)
    rest(spool)
    spool.end()
    spool.clear()
    assert not list(spool.directory.iterdir())
    spool.begin(attached(1), DISKS, [frame(1)])
    spool.sweep()
    assert rest(reopened(spool)) == [1]


def test_files_without_a_state_mean_nothing(tmp_path: Path) -> None:
    # Guards the order in Spool.clear: the state goes first. And the one in begin: it comes last.
    spool = begun(tmp_path, 1, 30)
    (spool.directory / STATE).unlink()
    again = reopened(spool)
    assert not again.is_active
    assert not list(again.directory.iterdir())


def test_a_state_that_does_not_parse_is_none(tmp_path: Path) -> None:
    spool = begun(tmp_path, 1, 9)
    (spool.directory / STATE).write_text("{")
    assert not reopened(spool).is_active


def test_files_of_another_spool_are_no_part_of_this_one(tmp_path: Path) -> None:
    # Guards the unlinking in Spool.begin.
    spool = begun(tmp_path, 20, 25)
    old = sorted(spool.directory.glob("*.frames"))[0]
    content = old.read_bytes()
    spool.clear()
    old.write_bytes(content)  # could not be removed
    spool.begin(attached(10), DISKS, [])
    while spool.next_number < 20:
        spool.append(frame(spool.next_number))
    again = reopened(spool)
    assert again.next_number == 20
    again.close()


# --- crashes


CRASH = settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@CRASH
@given(cut=st.integers(1, 4000))
def test_a_torn_end_costs_the_frames_in_it_alone(tmp_path: Path, cut: int) -> None:
    # Guards the cut in FileRecovery.cut.
    shutil.rmtree(tmp_path / "spool", ignore_errors=True)
    spool = begun(tmp_path, 1, 12)
    last = sorted(spool.directory.glob("*.frames"))[-1]
    first, size = int(last.stem), last.stat().st_size
    end = max(0, size - cut)
    os.truncate(last, end)
    ends = [0]
    for number in range(first, 13):
        ends.append(ends[-1] + len(whole(number)))
    kept = max(i for i, at in enumerate(ends) if at <= end)
    again = reopened(spool)
    assert again.is_certain
    assert again.next_number == first + kept
    again.append(frame(first + kept))
    assert rest(again) == list(range(1, first + kept + 1))
    again.close()


@CRASH
@given(st.data())
def test_damage_anywhere_is_never_delivered_and_no_number_behind_it_is_free(
    tmp_path: Path, data: st.DataObject
) -> None:
    # Guards ``is_damaged`` in FileRecovery.cut: frames behind the damage may have been sent.
    shutil.rmtree(tmp_path / "spool", ignore_errors=True)
    spool = begun(tmp_path, 1, 20)
    spool.close()
    path = data.draw(st.sampled_from(sorted(spool.directory.glob("*.frames"))))
    at = data.draw(st.integers(0, path.stat().st_size - 1))
    content = bytearray(path.read_bytes())
    content[at] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    again = Spool.open(spool.directory, BOUNDS)
    assert again.is_certain == (again.next_number == 21), "numbers behind damage are in doubt"
    found: list[int] = []
    with contextlib.suppress(DamageError):
        while again.has_unread():
            read = again.read()
            assert bytes(read.frame) == whole(read.header.number)
            found.append(read.header.number)
    assert found == list(range(1, len(found) + 1))
    assert len(found) < 20
    again.close()


def bad_sector(monkeypatch: pytest.MonkeyPatch, path: Path, at: int) -> None:
    """That byte of the file cannot be read."""
    pread, preadv = os.pread, os.preadv

    def check(descriptor: int, size_bytes: int, offset: int) -> None:
        is_file = os.readlink(f"/proc/self/fd/{descriptor}") == str(path)
        if is_file and offset <= at < offset + size_bytes:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    def bad_pread(descriptor: int, size_bytes: int, offset: int) -> bytes:
        check(descriptor, size_bytes, offset)
        return pread(descriptor, size_bytes, offset)

    def bad_preadv(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        check(descriptor, sum(len(buffer) for buffer in buffers), offset)
        return preadv(descriptor, buffers, offset)

    monkeypatch.setattr(os, "pread", bad_pread)
    monkeypatch.setattr(os, "preadv", bad_preadv)


@pytest.mark.parametrize("before", [0, 1])  # frames of the file
@pytest.mark.parametrize(("place", "inside"), [(0, 10), (1, 10), (-1, 10), (-1, 150)])
def test_what_cannot_be_read_at_the_start_is_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: int, inside: int, before: int
) -> None:
    # Guards OSError in FileRecovery._true_header and _is_torn: every start of the agent failed, and
    # the group was never attached again.
    spool = begun(tmp_path, 1, 20)
    path = sorted(spool.directory.glob("*.frames"))[place]
    first = int(path.stem)
    at = sum(len(whole(number)) for number in range(first, first + before))
    bad_sector(monkeypatch, path, at + inside)
    again = reopened(spool)
    assert (again.next_number, again.is_certain) == (first + before, False)
    assert rest(again) == list(range(1, first + before))
    again.append(frame(again.next_number))
    monkeypatch.undo()
    monkeypatch.setattr(limits, "SPOOL_FILE_BYTES", FILE_BYTES)
    assert rest(reopened(again)) == list(range(1, first + before + 1))


@pytest.mark.parametrize("how", ["read", "skip"])
def test_content_that_cannot_be_read_later_is_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    # Guards preadv in the ``try`` of Spool.read: each link came to this frame, and none further.
    spool = begun(tmp_path, 1, 20)
    number = 7  # a mark: it is read when others are skipped
    path = [one for one in sorted(spool.directory.glob("*.frames")) if int(one.stem) <= number][-1]
    at = sum(len(whole(one)) for one in range(int(path.stem), number + 1)) - 1
    bad_sector(monkeypatch, path, at)
    again = reopened(spool)
    assert again.is_certain
    next_frame = again.read if how == "read" else again.skip
    for _ in range(1, number):
        next_frame()
    with pytest.raises(DamageError, match=f"frame {number} "):
        next_frame()
    again.close()


@pytest.mark.parametrize("error", [errno.EIO, errno.EMFILE])
def test_a_state_that_lies_on_a_bad_sector_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    # Guards errno.EIO in Spool.open: the group was never attached again. Others may pass.
    spool = begun(tmp_path, 1, 3)
    spool.close()

    def cannot_read(_path: Path) -> bytes:
        raise OSError(error, os.strerror(error))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", cannot_read)
        if error != errno.EIO:
            with pytest.raises(OSError, match="open files"):
                Spool.open(spool.directory, spool.bounds)
        else:
            assert not Spool.open(spool.directory, spool.bounds).is_active
    again = Spool.open(spool.directory, spool.bounds)
    assert again.has_unread() == (error != errno.EIO)
    again.close()


def test_a_file_that_cannot_be_cut_where_it_is_damaged_is_emptied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Guards the ``except`` in spool_recovery._truncated: XFS reads the block that it cuts in
    # two. Left as it is, old frames would follow on new ones at the next start.
    spool = begun(tmp_path, 1, 20)
    path = sorted(spool.directory.glob("*.frames"))[1]
    first = int(path.stem)
    at = len(whole(first))
    ftruncate = os.ftruncate

    def truncate(descriptor: int, size_bytes: int) -> None:
        if size_bytes == at:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        ftruncate(descriptor, size_bytes)

    bad_sector(monkeypatch, path, at)
    monkeypatch.setattr(os, "ftruncate", truncate)
    again = reopened(spool)
    assert (again.next_number, again.is_certain) == (first, False)
    assert path.stat().st_size == 0
    again.append(frame(first))
    assert rest(again) == list(range(1, first + 1))
    again.close()


@CRASH
@given(st.data())
def test_a_file_that_is_missing_ends_the_spool_before_it(
    tmp_path: Path, data: st.DataObject
) -> None:
    shutil.rmtree(tmp_path / "spool", ignore_errors=True)
    spool = begun(tmp_path, 1, 20)
    paths = sorted(spool.directory.glob("*.frames"))
    gone = data.draw(st.sampled_from(paths[:-1]))
    gone.unlink()
    again = reopened(spool)
    assert again.next_number == int(gone.stem)
    assert not again.is_certain
    again.append(frame(int(gone.stem)))  # the first of all may be the one that is gone
    assert rest(again) == list(range(1, int(gone.stem) + 1))
    again.close()


def test_a_spool_whose_only_file_is_missing_is_not_certain(tmp_path: Path) -> None:
    # Guards ``|= not self._files`` in Spool._recover.
    spool = begun(tmp_path, 5, 6)
    [path] = spool.directory.glob("*.frames")
    path.unlink()
    again = reopened(spool)
    assert (again.next_number, again.is_certain) == (5, False)
    again.close()


@CRASH
@given(room=st.integers(0, 3000), can_truncate=st.booleans(), later=st.booleans())
def test_a_frame_that_found_no_room_was_not_added_and_is_added_later(
    tmp_path: Path, room: int, can_truncate: bool, later: bool
) -> None:
    shutil.rmtree(tmp_path / "spool", ignore_errors=True)
    files = FaultyFiles()
    spool = begun(tmp_path, 1, 10, files)
    files.room_bytes, files.can_truncate = room, can_truncate
    while True:
        number = spool.next_number
        try:
            spool.append(frame(number))
        except StorageError:
            break
    assert spool.next_number == number
    if later:
        files.room_bytes = 1 << 60
        spool.append(frame(number))
    again = reopened(spool)
    assert again.is_certain
    assert rest(again) == list(range(1, number + later))
    again.close()


@pytest.mark.parametrize("frames", [0, 1, 5])
def test_a_spool_that_cannot_begin_has_not(tmp_path: Path, frames: int) -> None:
    files = FaultyFiles()
    files.room_bytes = sum(len(whole(number)) for number in range(1, frames + 1)) - 10
    spool = Spool(tmp_path / "spool", BOUNDS, files)
    if frames == 0:
        (tmp_path / "spool").write_bytes(b"")  # not a directory
    with pytest.raises(StorageError):
        spool.begin(attached(1), DISKS, [frame(number) for number in range(1, 10)])
    assert not spool.is_active
    assert spool.next_number == 0
    assert frames == 0 or not list(spool.directory.iterdir())


# --- what a power cut may take


def sync(spool: Spool) -> None:
    what = spool.unsynced()
    spool.sync(what)
    spool.synced(what)


def test_all_that_is_synced_is_there_after_a_power_cut(tmp_path: Path) -> None:
    # Guards _sync_path in Spool.sync, and the one in _write_state: files are removed behind it.
    # Also that `unsynced` names more than the newest file: one may be filled between two syncs.
    files = FaultyFiles()
    spool = begun(tmp_path, 1, 30, files)
    sync(spool)
    names = [path.name for path in sorted(spool.directory.glob("*.frames"))]
    assert len(names) > 2
    assert files.synced == [*names, STATE]
    sync(spool)
    assert len(files.synced) == len(names) + 1  # nothing is new
    spool.append(frame(31))
    files.synced.clear()
    sync(spool)
    (newest,) = files.synced
    assert newest >= names[-1]
    rest(spool)
    files.synced.clear()
    spool.advance(attached(int(names[-1].partition(".")[0])))
    spool.give_back()
    assert files.synced == [f".{STATE}.new"]
    spool.close()


def test_it_begins_without_waiting_for_the_disk_and_is_synced_with_its_directories(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Guards ``durably=False`` in Spool.begin: a disk that others keep busy takes half a second for
    # a sync, in which a ring overflows. And the directories in Spool.sync.
    synced: list[str] = []

    def note(descriptor: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(os, "fdatasync", note)
    spool = Spool(tmp_path / "spools" / "group", BOUNDS)
    for number in (1, 2):
        spool.begin(attached(number), DISKS, [frame(number)])
        spool.append(frame(number + 1))
        assert not synced
        if number == 1:
            spool.clear()
    sync(spool)
    assert {str(tmp_path), str(tmp_path / "spools"), str(spool.directory)} < set(synced)
    spool.close()


def test_a_spool_that_gives_back_before_its_first_sync_is_synced_with_its_directories(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Guards ``and self._state_synced`` in Spool._write_state.
    synced: list[str] = []
    fsync = os.fsync

    def note(descriptor: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    spool = begun(tmp_path, 1, 30)
    spool.advance(attached(next(n for n in range(2, 31) if spool.begins_file(n))))
    spool.give_back()
    monkeypatch.setattr(os, "fsync", note)
    sync(spool)
    assert str(tmp_path) in synced
    assert spool.unsynced().state is None
    spool.close()


def test_what_comes_or_goes_during_a_sync_does_not_count_as_synced(tmp_path: Path) -> None:
    files = FaultyFiles()
    spool = begun(tmp_path, 1, 30, files)
    what = spool.unsynced()
    rest(spool)
    spool.append(frame(31))
    spool.clear()
    spool.begin(attached(31), DISKS, [frame(31)])
    spool.sync(what)  # of files that are gone
    spool.synced(what)
    files.synced.clear()
    sync(spool)
    assert files.synced == [f"{31:020d}.frames", STATE]
    spool.append(frame(32))
    what = spool.unsynced()
    spool.append(frame(33))
    spool.sync(what)
    spool.synced(what)
    assert spool.unsynced().sizes
    spool.close()


def test_of_what_a_power_cut_took_nothing_is_delivered(tmp_path: Path) -> None:
    # Guards ``bodies`` in Spool._recover: only the last file's bodies would be read.
    spool = begun(tmp_path, 1, 30)
    second = sorted(spool.directory.glob("*.frames"))[1]
    path = spool.directory / STATE
    assert spool.state is not None
    path.write_text(spool.state.model_copy(update={"boot_id": "before"}).model_dump_json())
    with second.open("r+b") as file:  # its size was synced, its last block was not
        file.seek(-100, os.SEEK_END)
        file.write(bytes(100))
    again = reopened(spool)
    assert not again.is_certain
    found = rest(again)
    assert int(second.stem) <= again.next_number < 30
    assert found == list(range(1, again.next_number))
    again.close()


def test_a_spool_of_another_boot_is_not_certain(tmp_path: Path) -> None:
    spool = begun(tmp_path, 1, 9)
    path = spool.directory / STATE
    assert spool.state is not None
    path.write_text(spool.state.model_copy(update={"boot_id": "before"}).model_dump_json())
    again = reopened(spool)
    assert again.is_active
    assert not again.is_certain
    assert rest(again) == list(range(1, 10))
    again.close()


# --- room


def test_its_size_and_the_reserve_are_kept(tmp_path: Path) -> None:
    free = os.statvfs(tmp_path)
    free_bytes = free.f_bavail * free.f_frsize
    spool = begun(tmp_path, 1, 3)
    used = spool.size_bytes
    spool.bounds = SpoolLimits(used + 100, 0)
    assert spool.has_room(100)
    assert not spool.has_room(101)
    spool.bounds = SpoolLimits(1 << 60, free_bytes + (1 << 40))
    assert not spool.has_room(1)
    spool.bounds = SpoolLimits(None, 0)
    assert spool.limit_bytes() <= limits.SPOOL_BYTES_DEFAULT
    assert spool.limit_bytes(free_bytes=1000) == int((1000 + used) * limits.SPOOL_FREE_SHARE)
    spool.close()


def test_frames_are_read_as_headers_where_their_content_does_not_matter(tmp_path: Path) -> None:
    spool = begun(tmp_path, 1, 14)
    skipped = [spool.skip() for _ in range(14)]
    assert [header.number for header, _ in skipped] == list(range(1, 15))
    assert [mark is not None for _, mark in skipped] == [n % 7 == 0 for n in range(1, 15)]
    assert bytes_of(marked(7)[0]) == whole(7)
    spool.close()


def test_a_place_before_the_spool_is_not_in_it(tmp_path: Path) -> None:
    spool = begun(tmp_path, 5, 9)
    with pytest.raises(DamageError, match="frame 4 "):
        spool.rewind(4)
    spool.close()
