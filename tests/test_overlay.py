"""A fork's overlay against a model of bytes, over crashes of the process and of the machine."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
from format_tables import byte_table, struct_fields

from blockrepl.errors import DamageError, StorageError
from blockrepl.formats import fork_map
from blockrepl.formats.fork_map import DATA, ZEROS, Change
from blockrepl.formats.frame import Buffer
from blockrepl.model.block_states import AREA_BLOCKS, BlockStates
from blockrepl.storage import overlay as overlays
from blockrepl.storage.files import Files
from blockrepl.storage.overlay import BLOCK, Overlay, Room, create_overlay

SECTOR = 512
SIZE = 40 * BLOCK + 3 * SECTOR


class PowerCut(Files):
    """Files whose writes are only in the page cache until they are synced."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.unsynced: list[tuple[int, int, bytes]] = []

    def write(self, descriptor: int, buffers: Sequence[Buffer], offset: int) -> int:
        data = b"".join(bytes(buffer) for buffer in buffers)
        self.unsynced.append((descriptor, offset, data))
        return len(data)

    def sync(self, descriptor: int) -> None:
        for written, offset, data in self.unsynced:
            if written == descriptor:
                os.pwrite(descriptor, data, offset)
        self.unsynced = [each for each in self.unsynced if each[0] != descriptor]

    def cut(self) -> None:
        """Some of the unsynced writes have reached the disk, some of them in part."""
        for descriptor, offset, data in self.unsynced:
            kept = self.random.choice([0, 0, len(data), self.random.randrange(len(data) + 1)])
            whole = len(data) % SECTOR == 0  # data; a map's records may be torn anywhere
            os.pwrite(descriptor, data[: kept // SECTOR * SECTOR if whole else kept], offset)


class Killed(Exception):
    """The process ends here; what it has written stays in the page cache."""


class PageCache(Files):
    """Files that show what was written, and lose in a power cut what was not synced."""

    def __init__(self, directory: Path) -> None:
        self.durable = {path.name: path.read_bytes() for path in directory.iterdir()}
        self.directory = directory
        self.syncs_left = 1 << 30

    def sync(self, descriptor: int) -> None:
        if self.syncs_left == 0:
            raise Killed
        self.syncs_left -= 1
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        self.durable[path.name] = path.read_bytes()

    def cut(self) -> None:
        for name, data in self.durable.items():
            (self.directory / name).write_bytes(data)


class Quick(Files):
    """For tests without a crash."""

    def sync(self, descriptor: int) -> None:
        pass


class Failing(Files):
    """Files whose syncs fail from a moment on."""

    fails = False

    def sync(self, descriptor: int) -> None:
        if self.fails:
            raise OSError(errno.EIO, "Input/output error")


class Rig:
    def __init__(self, directory: Path, seed: int = 1, files: Files | None = None) -> None:
        self.random = random.Random(seed)
        self.directory = directory
        self.below = self.random.randbytes(SIZE)
        self.now = bytearray(self.below)
        create_overlay(directory, "root", SIZE)
        self.open(files)

    def open(self, files: Files | None = None, limit_bytes: int | None = None) -> Overlay:
        self.room = Room("f", self.directory, limit_bytes, 0)
        self.overlay = Overlay(self.directory, "root", SIZE, self.room, files or Quick())
        return self.overlay

    def show(self, offset: int, length: int) -> bytes:
        return self.below[offset : offset + length]

    def content(self) -> bytes:
        buffer = bytearray(SIZE)
        for start, end, state in self.overlay.pieces(0, SIZE):
            part = memoryview(buffer)[start:end]
            if state == DATA:
                self.overlay.read_into(part, start)
            elif state != ZEROS:
                part[:] = self.below[start:end]
        return bytes(buffer)

    def step(self, grain: int = 1) -> None:
        count = SIZE // grain
        first = self.random.randrange(count)
        length = min(self.random.randrange(1, 5 * BLOCK // grain), count - first) * grain
        offset = first * grain
        if self.random.random() < 0.6:
            data = self.random.randbytes(length)
            self.overlay.write(offset, data, self.show)
        else:
            data = bytes(length)
            self.overlay.zero(offset, length, self.show)
        self.now[offset : offset + length] = data


def test_the_map_format_is_the_one_in_its_table() -> None:
    structs = (fork_map.HEADER, fork_map.RECORD, fork_map.CHANGE)
    fields = [field for each in structs for field in struct_fields(each)]
    assert byte_table(fork_map.__doc__) == fields
    data = fork_map.encode_header(SIZE, BLOCK)
    assert fork_map.decode_header(data) == (SIZE, BLOCK)
    changes = [Change(3, 2, DATA), Change(0, 1, ZEROS)]
    data += fork_map.encode_record(len(data), changes)
    end = len(data)
    data += fork_map.encode_record(end, [Change(7, 1, DATA)])
    assert list(fork_map.decode_records(data, 41)) == [
        (changes, end),
        ([Change(7, 1, DATA)], len(data)),
    ]
    for cut in range(fork_map.HEADER_BYTES, len(data)):
        assert len(list(fork_map.decode_records(data[:cut], 41))) == (cut >= end)
    # A record that is not where it was written (an old file's tail) is no record.
    moved = data[: fork_map.HEADER_BYTES] + data[end:]
    assert not list(fork_map.decode_records(moved, 41))
    assert len(list(fork_map.decode_records(data, 7))) == 1  # beyond the disk's end


@pytest.mark.parametrize("place", range(0, 80, 3))
def test_a_flipped_byte_in_a_map_ends_it_there(place: int) -> None:
    data = fork_map.encode_header(SIZE, BLOCK)
    data += fork_map.encode_record(len(data), [Change(3, 2, DATA)])
    data += fork_map.encode_record(len(data), [Change(9, 2, DATA)])
    whole = bytearray(data)
    whole[min(place, len(whole) - 1)] ^= 0x20
    if place < fork_map.HEADER_BYTES:
        with pytest.raises(Exception, match="block map"):
            fork_map.decode_header(whole)
    else:
        assert len(list(fork_map.decode_records(whole, 41))) == (place >= 64)


@pytest.mark.parametrize("seed", range(3))
def test_states_are_what_a_list_of_them_says(seed: int) -> None:
    chance = random.Random(seed)
    count = 3 * AREA_BLOCKS + 100
    states, model = BlockStates(), bytearray(count)
    for _ in range(150):
        first = chance.randrange(count)
        last = min(count, first + chance.choice([1, 7, 500, 5000, AREA_BLOCKS]))
        state = chance.choice([DATA, ZEROS])
        changed = {
            block
            for change in states.set(first, last, state)
            for block in range(change.first, change.first + change.count)
        }
        assert changed == {block for block in range(first, last) if model[block] != state}
        model[first:last] = bytes([state]) * (last - first)
        assert states.data_blocks == model.count(DATA)
        assert states.count(first // 2, last, ZEROS) == model[first // 2 : last].count(ZEROS)
        at = 0
        for start, stop, found in states.runs(0, count):
            assert (start, set(model[start:stop])) == (at, {found})
            at = stop
        assert at == count
    again = BlockStates()
    for change in states.changes():
        again.set(change.first, change.first + change.count, change.state)
    assert again.runs(0, count) == states.runs(0, count)


@pytest.mark.parametrize("seed", range(4))
def test_an_overlay_shows_what_was_written_and_below_the_rest(tmp_path: Path, seed: int) -> None:
    rig = Rig(tmp_path, seed)
    for count in range(150):
        rig.step()
        if count % 20 == 0:
            assert rig.content() == rig.now
            rig.overlay.flush()
        if count % 50 == 49:
            rig.overlay.flush()
            rig.overlay.close()
            rig.open()
            assert rig.content() == rig.now
    used = rig.overlay.data_bytes
    assert (
        rig.room.used_bytes
        == used
        == sum(
            -(-(end - start) // BLOCK) * BLOCK
            for start, end, state in rig.overlay.pieces(0, SIZE)
            if state == DATA
        )
    )
    rig.overlay.close()


@pytest.mark.parametrize("seed", range(25))
def test_a_power_cut_leaves_what_was_flushed_or_newer(tmp_path: Path, seed: int) -> None:
    """Guards `sync(self._data)` and `sync(self._map)` in Overlay.flush, their order, and that a
    block is written whole (`_rest`): without one of them a sector is older than the last flush, or
    shows what nobody has written.
    """
    files = PowerCut(seed)
    rig = Rig(tmp_path, seed, files)
    possible = [bytes(rig.now)]  # from the last flush on
    for _ in range(40):
        rig.step(SECTOR)
        possible.append(bytes(rig.now))
        if rig.random.random() < 0.2:
            rig.overlay.flush()
            possible = possible[-1:]
    files.cut()
    rig.overlay.close()
    rig.open()
    found = rig.content()
    for at in range(0, SIZE, SECTOR):
        sector = found[at : at + SECTOR]
        assert any(sector == each[at : at + SECTOR] for each in possible), f"sector at {at}"
    # It goes on from there, and what is flushed then is there for good.
    rig.now = bytearray(found)
    for _ in range(10):
        rig.step(SECTOR)
    rig.overlay.flush()
    rig.overlay.close()
    assert Rig.content(_reopened(rig)) == rig.now
    rig.overlay.close()


def _reopened(rig: Rig) -> Rig:
    rig.open()
    return rig


@pytest.mark.parametrize("syncs", [0, 1])
def test_a_flush_after_a_killed_server_covers_what_that_one_wrote(
    tmp_path: Path, syncs: int
) -> None:
    """Guards that `Overlay` settles what it finds in its files: clients read it, and flush it."""
    rig = Rig(tmp_path)
    rig.overlay.close()
    files = PageCache(tmp_path)
    rig.open(files)
    rig.overlay.write(0, b"a" * BLOCK, rig.show)
    rig.overlay.flush()
    rig.overlay.write(0, b"b" * BLOCK, rig.show)
    rig.overlay.write(4 * BLOCK, b"c" * BLOCK, rig.show)
    files.syncs_left = syncs  # of the data, then of the map
    with pytest.raises(Killed):
        rig.overlay.flush()
    rig.overlay.close()
    files.syncs_left = 1 << 30
    rig.open(files)
    seen = rig.content()
    assert seen.startswith(b"b" * BLOCK)
    rig.overlay.flush()
    rig.overlay.close()
    files.cut()
    rig.open()
    assert rig.content() == seen
    rig.overlay.close()


def test_files_that_cannot_be_settled_are_not_opened(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    rig.overlay.close()
    files = Failing()
    files.fails = True
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(StorageError, match=r"make durable .*root.img"):
        rig.open(files)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_map_that_is_mostly_stale_is_written_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overlays, "COMPACT_BYTES", 1000)
    rig = Rig(tmp_path)
    for _ in range(200):
        rig.overlay.write(0, b"x" * BLOCK, rig.show)
        rig.overlay.flush()
        rig.overlay.zero(0, BLOCK, rig.show)
        rig.overlay.flush()
    before = (tmp_path / "root.map").stat().st_size
    rig.overlay.write(BLOCK, b"y" * BLOCK, rig.show)
    rig.overlay.flush()
    content = rig.content()
    rig.overlay.close()
    rig.open()
    assert (tmp_path / "root.map").stat().st_size < 200 < before
    assert rig.content() == content
    rig.overlay.close()


def test_over_its_limit_nothing_is_written_and_zeros_make_room(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    rig.overlay.close()
    overlay = rig.open(limit_bytes=3 * BLOCK)
    overlay.write(0, b"a" * 3 * BLOCK, rig.show)
    with pytest.raises(StorageError, match="limit") as refused:
        overlay.write(3 * BLOCK - 1, b"bb", rig.show)
    assert refused.value.code == "full"
    overlay.write(BLOCK + 5, b"b" * BLOCK, rig.show)  # what it has may be written again
    overlay.zero(0, 2 * BLOCK, rig.show)
    assert rig.room.used_bytes == BLOCK
    overlay.write(8 * BLOCK, b"c" * 2 * BLOCK, rig.show)
    assert (
        rig.content()[2 * BLOCK : 4 * BLOCK]
        == b"b" * 5 + b"a" * (BLOCK - 5) + rig.below[3 * BLOCK : 4 * BLOCK]
    )
    overlay.close()


def test_what_the_journal_needs_is_left_free(tmp_path: Path) -> None:
    create_overlay(tmp_path, "root", SIZE)
    everything = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
    overlay = Overlay(tmp_path, "root", SIZE, Room("f", tmp_path, None, everything), None)
    with pytest.raises(StorageError, match="journal can spare") as refused:
        overlay.write(0, b"a", lambda _offset, length: bytes(length))
    assert refused.value.code == "full"
    overlay.close()


def test_after_a_failed_sync_the_overlay_fails_until_it_is_opened_again(tmp_path: Path) -> None:
    rig = Rig(tmp_path, 1, files := Failing())
    files.fails = True
    rig.overlay.write(0, b"a" * BLOCK, rig.show)
    for _ in range(2):
        with pytest.raises(StorageError, match=r"make durable .*root.img"):
            rig.overlay.flush()
    with pytest.raises(StorageError, match="make durable"):
        rig.overlay.write(0, b"b", rig.show)
    rig.overlay.close()
    rig.open()
    assert rig.content() == rig.below
    rig.overlay.close()


def test_a_map_of_another_disk_or_a_damaged_one_is_refused(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    rig.overlay.close()
    path = tmp_path / "root.map"
    path.write_bytes(fork_map.encode_header(SIZE + SECTOR, BLOCK))
    with pytest.raises(DamageError, match="another disk"):
        rig.open()
    path.write_bytes(b"x" * 40)
    with pytest.raises(DamageError, match=r"root\.map is damaged"):
        rig.open()
