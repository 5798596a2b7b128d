"""The source's disks: what may be added, what a failure leaves, and the life of a ring."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from uuid import UUID

import numpy as np
import pytest
from ring_writer import RingWriter

from blockrepl import limits
from blockrepl.errors import StateError, StorageError, UsageError
from blockrepl.formats import hot_map
from blockrepl.formats import ring as layout
from blockrepl.formats.frame import RecordKind
from blockrepl.services import disk_server
from blockrepl.services.disk_server import exec_server
from blockrepl.storage import source
from blockrepl.storage.clock import SourceClock, open_clock
from blockrepl.storage.growing import grow_disk, grow_image
from blockrepl.storage.home import Home, is_locked
from blockrepl.storage.image import lock_image
from blockrepl.storage.retiring import Retirement
from blockrepl.storage.ring import RingReader, lock_ring, read_geometry, ring_path
from blockrepl.storage.source import DiskEntry, SourceDisks, is_written_elsewhere
from blockrepl.units import MIB

SIZE = 4 * MIB + 512
REGIONS = 5


@pytest.fixture
def home(tmp_path: Path) -> Home:
    home = Home.create(tmp_path / "home")
    home.source_directory.mkdir()
    return home


@pytest.fixture
def disks(home: Home) -> Iterator[SourceDisks]:
    found = SourceDisks(home)
    yield found
    for entry in found.all():
        ring_path(entry.id.bytes).unlink(missing_ok=True)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "root.img"
    path.write_bytes(bytes(SIZE))
    return path


@pytest.fixture
def clock(home: Home) -> SourceClock:
    return open_clock(home.source_directory)


def add(
    disks: SourceDisks,
    image: Path,
    name: str = "root",
    group: str = "web",
    create_bytes: int | None = None,
) -> DiskEntry:
    return disks.add(
        name, image, group, create_bytes=create_bytes, ring_bytes=limits.RING_BYTES_MIN
    )


def left(disks: SourceDisks) -> list[str]:
    """What is in the disks' directory beside the lock."""
    found = disks.directory.glob("*") if disks.directory.exists() else ()
    hidden = disks.directory.glob(".*.tmp") if disks.directory.exists() else ()
    return sorted(path.name for path in (*found, *hidden) if path.name != ".lock")


# --- adding


def test_an_added_disk_is_found_again_and_all_hot(disks: SourceDisks, image: Path) -> None:
    entry = add(disks, image)
    assert disks.load("root") == entry
    assert disks.all() == [entry]
    assert (entry.size_bytes, entry.group, entry.replica) == (SIZE, "web", None)
    assert disks.hot_regions(entry).tolist() == [1] * REGIONS
    assert not ring_path(entry.id.bytes).exists()
    assert SourceDisks(disks.home).all() == [entry]


def test_a_created_image_is_sparse_and_private(disks: SourceDisks, tmp_path: Path) -> None:
    entry = add(disks, tmp_path / "new.img", create_bytes=64 * MIB)
    found = entry.image.stat()
    assert (found.st_size, found.st_blocks, found.st_mode & 0o777) == (64 * MIB, 0, 0o600)


def test_an_image_keeps_its_content(disks: SourceDisks, image: Path) -> None:
    image.write_bytes(b"x" * 1024)
    add(disks, image)
    assert image.read_bytes() == b"x" * 1024


def test_a_relative_path_is_kept_absolute(
    disks: SourceDisks, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(image.parent)
    assert add(disks, Path(image.name)).image == image


def test_a_taken_name_is_refused(disks: SourceDisks, image: Path, tmp_path: Path) -> None:
    add(disks, image)
    before = left(disks)
    with pytest.raises(StateError, match="exists already") as caught:
        add(disks, tmp_path / "other.img", create_bytes=MIB)
    assert caught.value.code == "taken"
    assert not (tmp_path / "other.img").exists()
    assert left(disks) == before


@pytest.mark.parametrize("kind", ["same", "hard link", "symlink"])
def test_one_image_is_one_disk(disks: SourceDisks, image: Path, tmp_path: Path, kind: str) -> None:
    other = tmp_path / "other.img"
    if kind == "same":
        other = image
    elif kind == "hard link":
        other.hardlink_to(image)
    else:
        other.symlink_to(image)
    add(disks, image)
    before = left(disks)
    with pytest.raises(StateError, match="already protected as disk 'root'") as caught:
        add(disks, other, "second")
    assert caught.value.code == "taken"
    assert left(disks) == before


def test_an_image_whose_other_disk_has_gone_missing_can_be_added(
    disks: SourceDisks, image: Path, tmp_path: Path
) -> None:
    gone = add(disks, tmp_path / "gone.img", "gone", create_bytes=MIB)
    gone.image.unlink()
    assert add(disks, image).name == "root"


BAD_NAMES = ["", ".", "..", "../x", "a/b", "A", ".hidden", "-x", "a" * 64, "a b", "a\n", "ä"]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_name_that_is_no_name_is_refused(disks: SourceDisks, image: Path, name: str) -> None:
    with pytest.raises(UsageError):
        add(disks, image, name)
    with pytest.raises(UsageError):
        add(disks, image, group=name)
    with pytest.raises(StateError, match="there is no disk"):
        disks.load(name)
    assert left(disks) == []


@pytest.mark.parametrize("size", [0, 1, 511, 513, MIB + 1])
def test_an_image_of_a_bad_size_is_refused(disks: SourceDisks, image: Path, size: int) -> None:
    image.write_bytes(bytes(size))
    with pytest.raises(UsageError, match="multiple of 512") as caught:
        add(disks, image)
    assert caught.value.code == "image-size"
    assert left(disks) == []


@pytest.mark.parametrize("size", [-512, 0, 1, 513, limits.DISK_BYTES_MAX + 512, 1 << 70])
def test_a_bad_size_creates_nothing(disks: SourceDisks, tmp_path: Path, size: int) -> None:
    with pytest.raises((UsageError, StateError)):
        add(disks, tmp_path / "new.img", create_bytes=size)
    assert not (tmp_path / "new.img").exists()
    assert left(disks) == []


def test_size_does_not_replace_an_image(disks: SourceDisks, image: Path) -> None:
    image.write_bytes(b"x" * 512)
    with pytest.raises(StateError, match="exists already"):
        add(disks, image, create_bytes=MIB)
    assert image.read_bytes() == b"x" * 512
    assert left(disks) == []


@pytest.mark.parametrize("what", ["missing", "directory", "fifo", "no parent", "dangling"])
def test_what_is_no_image_is_refused(disks: SourceDisks, tmp_path: Path, what: str) -> None:
    path = tmp_path / "thing"
    match what:
        case "directory":
            path.mkdir()
        case "fifo":
            os.mkfifo(path)
        case "no parent":
            path = tmp_path / "none" / "thing"
        case "dangling":
            path.symlink_to(tmp_path / "nowhere")
    with pytest.raises(StateError) as caught:
        add(disks, path)
    assert caught.value.code == "no-image"
    assert caught.value.hint
    assert left(disks) == []


def test_a_qcow2_file_is_refused(disks: SourceDisks, tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", str(path), "1M"], check=True, timeout=30
    )
    with pytest.raises(StateError, match="qcow2") as caught:
        add(disks, path)
    assert caught.value.code == "image-format"
    assert left(disks) == []


def test_an_image_in_use_is_refused(disks: SourceDisks, image: Path) -> None:
    held = lock_image(image)
    try:
        with pytest.raises(StateError, match="in use") as caught:
            add(disks, image)
    finally:
        os.close(held)
    assert caught.value.code == "image-in-use"
    assert left(disks) == []
    assert add(disks, image)


def test_a_created_image_is_removed_again_when_the_rest_fails(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 60) / ("e" * 60)
    home = Home.create(deep)
    disks = SourceDisks(home)
    with pytest.raises(StateError) as caught:
        add(disks, tmp_path / "new.img", create_bytes=MIB)
    assert caught.value.code == "path-length"
    assert not (tmp_path / "new.img").exists()
    assert left(disks) == []


def test_an_entry_that_cannot_be_written_leaves_no_hot_map(
    disks: SourceDisks, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_entry: DiskEntry) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(disks, "write", full)
    with pytest.raises(OSError, match="No space"):
        add(disks, image)
    assert left(disks) == []


def test_a_damaged_entry_is_named(disks: SourceDisks, image: Path) -> None:
    add(disks, image)
    path = disks.directory / "root.json"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(StateError, match=re.escape(str(path))):
        disks.load("root")
    path.unlink()


# --- removing


def test_remove_keeps_the_image_and_nothing_else(
    disks: SourceDisks, image: Path, clock: SourceClock
) -> None:
    entry = add(disks, image)
    with disks.lock(entry):
        disks.ensure_ring(entry, clock)
    disks.remove(entry)
    assert left(disks) == []
    assert list(disks.directory.glob(".root*")) == []
    assert not ring_path(entry.id.bytes).exists()
    assert image.stat().st_size == SIZE
    assert add(disks, image).id != entry.id


def test_the_name_of_a_replicated_disk_stays_taken_in_its_group(
    disks: SourceDisks, image: Path
) -> None:
    # The receiver would refuse the whole group for the one disk.
    entry = disks.bind_replica(add(disks, image), UUID(int=7))
    disks.remove(entry)
    with pytest.raises(StateError, match="history is kept") as caught:
        add(SourceDisks(disks.home), image.with_name("new.img"), create_bytes=SIZE)
    assert caught.value.code == "taken"
    assert "another name" in caught.value.hint
    assert not image.with_name("new.img").exists()
    assert add(disks, image, group="mail").group == "mail"  # history there knows no such disk


def test_a_name_that_its_receiver_has_forgotten_can_be_freed(
    disks: SourceDisks, image: Path
) -> None:
    disks.remove(disks.bind_replica(add(disks, image), UUID(int=7)))
    with pytest.raises(StateError) as caught:
        add(disks, image)
    found = re.search(r"remove (\S+),", caught.value.hint)
    assert found
    Path(found[1]).unlink()
    assert add(disks, image).name == "root"


def test_a_disk_that_is_served_is_not_removed(disks: SourceDisks, image: Path) -> None:
    entry = add(disks, image)
    held = lock_image(image)
    try:
        with pytest.raises(StateError, match="in use"):
            disks.remove(entry)
    finally:
        os.close(held)
    assert disks.all() == [entry]


def test_a_disk_whose_image_is_gone_can_be_removed(disks: SourceDisks, image: Path) -> None:
    entry = add(disks, image)
    image.unlink()
    disks.remove(entry)
    assert disks.all() == []


def test_a_disk_removed_by_another_meanwhile_is_no_disk(disks: SourceDisks, image: Path) -> None:
    entry = add(disks, image)
    disks.remove(entry)
    with pytest.raises(StateError) as caught:
        disks.remove(entry)
    assert caught.value.code == "unknown-disk"


def test_the_lock_of_a_removed_disk_goes_while_it_is_held(
    disks: SourceDisks, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Guards its place in SourceDisks.remove: behind it, the file is another's lock already.
    entry, real, held = add(disks, image), Path.unlink, []

    def unlink(path: Path, missing_ok: bool = False) -> None:
        if path.name == ".root.lock":
            held.append(is_locked(path))
        real(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", unlink)
    disks.remove(entry)
    assert held == [True]


# --- serving


def test_a_disk_removed_just_before_it_is_served_is_not_served(
    disks: SourceDisks, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Guards the second load in exec_server: its map and ring were made anew, for no disk.
    entry = add(disks, image)
    served = serves_after(monkeypatch, lambda: disks.remove(entry))
    with pytest.raises(StateError) as caught:
        exec_server(disks, "root")
    assert caught.value.code == "unknown-disk"
    assert served == []
    assert left(disks) == [".root.lock"]
    assert not ring_path(entry.id.bytes).exists()
    os.close(lock_image(image))  # nothing holds it


def test_a_disk_that_grows_just_before_it_is_served_is_served(
    disks: SourceDisks, image: Path, clock: SourceClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Guards the same: the image was said to have been enlarged behind the disk's back.
    entry = add(disks, image)

    def grow() -> None:
        grow_image(disks, entry, SIZE + MIB, lambda reached: None)
        grow_disk(disks, "root", SIZE + MIB, clock)

    served = serves_after(monkeypatch, grow)
    exec_server(disks, "root")
    [command] = served
    assert f"size={SIZE + MIB}" in command


def serves_after(
    monkeypatch: pytest.MonkeyPatch, happens: Callable[[], None]
) -> list[Sequence[str]]:
    """What happens between a starting server's look at its disk and its lock on it.

    The command that this process would become goes to the list.
    """
    served: list[Sequence[str]] = []

    def opened(directory: Path) -> SourceClock:
        happens()
        return open_clock(directory)

    def execve(_program: str, command: Sequence[str], _environment: object) -> None:
        served.append(command)
        for word in command:
            if "_fd=" in word:
                os.close(int(word.partition("=")[2]))

    monkeypatch.setattr(disk_server, "open_clock", opened)
    monkeypatch.setattr(disk_server, "_listen", lambda path: None)
    monkeypatch.setattr(os, "execve", execve)
    return served


# --- the ring's life


def set_hot(disks: SourceDisks, entry: DiskEntry, *regions: int) -> None:
    data = bytearray(
        hot_map.encode(entry.id.bytes, entry.size_bytes, limits.REGION_BYTES, hot=False)
    )
    bits = np.zeros(REGIONS, np.uint8)
    bits[list(regions)] = 1
    data[hot_map.HEADER_BYTES :] = np.packbits(bits, bitorder="little").tobytes()
    disks.hot_map_path(entry).write_bytes(data)


def open_ring(disks: SourceDisks, entry: DiskEntry, clock: SourceClock) -> RingReader:
    with disks.lock(entry):
        return RingReader(disks.ensure_ring(entry, clock), entry.id.bytes)


def test_in_a_new_ring_the_hot_regions_are_stale(
    disks: SourceDisks, image: Path, clock: SourceClock
) -> None:
    entry = add(disks, image)
    set_hot(disks, entry, 1, 4)
    ring = open_ring(disks, entry, clock)
    assert ring.stale.tolist() == [0, 1, 0, 0, 1]
    assert ring.syncing.tolist() == [0] * REGIONS
    assert (ring.head(), ring.tail(), ring.gap_from(), ring.dropped()) == (0, 0, 0, 0)
    assert ring.geometry.clock_offset == clock.offset_ns


def test_a_ring_that_is_there_is_kept(disks: SourceDisks, image: Path, clock: SourceClock) -> None:
    entry = add(disks, image)
    first = open_ring(disks, entry, clock)
    RingWriter(first.path).write(0, b"x" * 512)
    set_hot(disks, entry)
    again = open_ring(disks, entry, clock)
    assert again.geometry.ring_id == first.geometry.ring_id
    assert again.head() == 1
    assert again.stale.all()


@pytest.mark.parametrize("fault", ["another clock", "half made", "garbage", "empty"])
def test_a_ring_of_no_use_is_made_anew_with_all_that_is_hot(
    disks: SourceDisks, image: Path, clock: SourceClock, fault: str
) -> None:
    entry = add(disks, image)
    old = open_ring(disks, entry, clock)
    set_hot(disks, entry, 2)
    data = bytearray(old.path.read_bytes()[:4096])
    match fault:
        case "another clock":
            data[80] ^= 1
        case "half made":
            data[12] = 0
        case "garbage":
            data[:] = b"\xff" * 4096
        case "empty":
            data[:] = b""
    old.path.unlink()
    old.path.write_bytes(data)
    ring = open_ring(disks, entry, clock)
    assert ring.geometry.ring_id != old.geometry.ring_id
    assert ring.stale.tolist() == [0, 0, 1, 0, 0]
    assert not old.is_current()


@pytest.mark.parametrize("fault", ["missing", "short", "another disk's", "flipped magic"])
def test_a_hot_map_that_cannot_be_trusted_makes_everything_hot(
    disks: SourceDisks, image: Path, fault: str
) -> None:
    entry = add(disks, image)
    set_hot(disks, entry)
    assert not disks.hot_regions(entry).any()
    path = disks.hot_map_path(entry)
    data = bytearray(path.read_bytes())
    match fault:
        case "short":
            del data[-1:]
        case "another disk's":
            data[16] ^= 1
        case "flipped magic":
            data[0] ^= 1
    path.write_bytes(data)
    if fault == "missing":
        path.unlink()
    assert disks.hot_regions(entry).all()
    assert path.stat().st_size == hot_map.HEADER_BYTES + 1  # a server can open it again


def test_the_replica_that_the_hot_map_speaks_of_is_kept(disks: SourceDisks, image: Path) -> None:
    bound = disks.bind_replica(add(disks, image), UUID(int=5))
    assert disks.load("root") == bound
    assert bound.replica == UUID(int=5)


# --- retiring


@pytest.fixture
def entry(disks: SourceDisks, image: Path) -> DiskEntry:
    found = add(disks, image)
    set_hot(disks, found)
    return found


@pytest.fixture
def ring(disks: SourceDisks, entry: DiskEntry, clock: SourceClock) -> RingReader:
    """Nothing stale; one record, durable at the receiver; region 1 hot."""
    found = open_ring(disks, entry, clock)
    RingWriter(found.path).write(MIB, b"x" * 512)
    found.release(1)
    found.set_durable(1)
    set_hot(disks, entry, 1)
    return found


def retire(disks: SourceDisks, entry: DiskEntry, ring: RingReader, clock: SourceClock) -> bool:
    """As the agent does; whether the ring is gone."""
    disks.recover_ring(entry, ring, clock)
    with closing(Retirement(disks, entry, ring)) as retirement:
        return retirement.prepare() and retirement.finish()


def assert_kept(disks: SourceDisks, entry: DiskEntry, ring: RingReader) -> None:
    assert ring.is_current()
    assert disks.hot_regions(entry).tolist() == [0, 1, 0, 0, 0]


def test_a_ring_is_given_back_when_all_is_durable(
    disks: SourceDisks, entry: DiskEntry, ring: RingReader, clock: SourceClock
) -> None:
    assert retire(disks, entry, ring, clock)
    assert read_geometry(ring_path(entry.id.bytes)) is None
    assert not disks.hot_regions(entry).any()
    os.close(lock_image(entry.image))  # nothing holds it


def test_a_ring_with_records_that_are_not_durable_is_kept(
    disks: SourceDisks, entry: DiskEntry, ring: RingReader, clock: SourceClock
) -> None:
    RingWriter(ring.path).append(RecordKind.FLUSH)
    assert not retire(disks, entry, ring, clock)
    assert_kept(disks, entry, ring)


def test_a_ring_whose_disk_has_failed_to_flush_is_kept(
    disks: SourceDisks, entry: DiskEntry, ring: RingReader, clock: SourceClock
) -> None:
    """Guards flush_failed in Retirement._owes."""
    with ring.path.open("r+b") as file:
        file.seek(layout.FLUSH_FAILED_AT)
        file.write(b"\1")
    assert not retire(disks, entry, ring, clock)
    assert_kept(disks, entry, ring)


def test_a_ring_whose_server_was_killed_inside_a_flush_is_kept_until_that_is_known(
    disks: SourceDisks, entry: DiskEntry, ring: RingReader, clock: SourceClock
) -> None:
    """Guards _recover_flushes in storage/ring.py, and the flushes in Retirement._owes."""
    RingWriter(ring.path).begin_flush(3)
    with closing(Retirement(disks, entry, ring)) as retirement:
        assert not retirement.prepare()  # nobody has found it yet
    assert not retire(disks, entry, ring, clock)
    assert ring.flushes_under_way() == frozenset()
    assert (ring.unknown_flushes(), ring.known_flushes()) == (1, 0)
    assert not retire(disks, entry, ring, clock)
    assert_kept(disks, entry, ring)
    assert ring.unknown_flushes() == 1  # counted once
    ring.set_known_flushes(1)
    assert retire(disks, entry, ring, clock)


def test_a_flush_that_fails_at_the_end_is_not_forgotten(
    disks: SourceDisks,
    entry: DiskEntry,
    ring: RingReader,
    clock: SourceClock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Guards flush_has_failed in Retirement.prepare: the next fsync of the same pages succeeds.
    with monkeypatch.context() as patch:

        def fail(_descriptor: int) -> None:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        patch.setattr("blockrepl.storage.retiring.os.fsync", fail)
        with pytest.raises(OSError, match="Input/output"):
            retire(disks, entry, ring, clock)
    assert not retire(disks, entry, ring, clock)
    assert_kept(disks, entry, ring)
    assert ring.flush_failed()


def test_a_flush_that_fails_as_the_disk_grows_is_not_forgotten(
    disks: SourceDisks,
    entry: DiskEntry,
    ring: RingReader,
    clock: SourceClock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Guards flush_has_failed in growing._sync: the same, told to the one that resizes.
    with monkeypatch.context() as patch:

        def fail(_descriptor: int) -> None:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        patch.setattr("blockrepl.storage.growing.os.fsync", fail)
        with pytest.raises(StorageError, match="Input/output"):
            grow_image(disks, entry, SIZE + MIB, lambda reached: None)
    assert ring.flush_failed()
    assert not retire(disks, entry, ring, clock)
    assert_kept(disks, entry, ring)


def test_a_flush_that_fails_as_a_disk_without_a_ring_grows_is_an_error(
    disks: SourceDisks, entry: DiskEntry, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("blockrepl.storage.growing.os.fsync", fail)
    with pytest.raises(StorageError, match="Input/output"):
        grow_image(disks, entry, SIZE + MIB, lambda reached: None)


def test_a_disk_grows_although_its_ring_is_being_given_back(
    disks: SourceDisks, entry: DiskEntry
) -> None:
    # Guards the disk's lock in grow_image: "in use by another server", for a moment.
    held, may_go = threading.Event(), threading.Event()

    def give_back() -> None:  # as Retirement.prepare holds them
        with disks.lock(entry):
            image = lock_image(entry.image)
            held.set()
            assert may_go.wait(20)
            os.close(image)

    agent = threading.Thread(target=give_back)
    agent.start()
    assert held.wait(20)
    release = threading.Timer(0.2, may_go.set)
    release.start()
    assert grow_image(disks, entry, SIZE + MIB, lambda reached: None) == SIZE + MIB
    agent.join()
    release.join()


def test_what_comes_while_the_image_is_synced_keeps_the_ring_and_the_map(
    disks: SourceDisks, entry: DiskEntry, ring: RingReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Guards the second look in Retirement.prepare.
    def sync(descriptor: int) -> None:
        os.fdatasync(descriptor)
        ring.stale[3] = 1

    monkeypatch.setattr("blockrepl.storage.retiring.os.fsync", sync)
    with closing(Retirement(disks, entry, ring)) as retirement:
        assert not retirement.prepare()
    assert_kept(disks, entry, ring)


def test_what_comes_behind_the_sync_keeps_the_ring(
    disks: SourceDisks, entry: DiskEntry, ring: RingReader
) -> None:
    # Guards the look in Retirement.finish, and the locks that no server comes past.
    with closing(Retirement(disks, entry, ring)) as retirement:
        assert retirement.prepare()
        with pytest.raises(StateError, match="in use"):
            lock_image(entry.image)
        ring.stale[3] = 1
        assert not retirement.finish()
    assert ring.is_current()
    assert not disks.hot_regions(entry).any()  # true of what was before
    os.close(lock_image(entry.image))


def test_a_ring_waits_for_no_disk_while_nobody_reads_it(
    disks: SourceDisks, entry: DiskEntry, ring: RingReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Guards the map in Retirement.prepare: two fsyncs held up the rings of the group's other disks.
    with closing(Retirement(disks, entry, ring)) as retirement:
        assert retirement.prepare()
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", None)
            assert retirement.finish()
    assert not ring.path.exists()


def test_a_ring_with_a_stale_region_is_kept(
    disks: SourceDisks, entry: DiskEntry, ring: RingReader, clock: SourceClock
) -> None:
    ring.stale[3] = 1
    assert not retire(disks, entry, ring, clock)
    assert_kept(disks, entry, ring)


def test_a_ring_with_content_on_its_way_is_kept(
    disks: SourceDisks, entry: DiskEntry, ring: RingReader, clock: SourceClock
) -> None:
    ring.begin_sync(3)
    assert not retire(disks, entry, ring, clock)
    assert_kept(disks, entry, ring)
    ring.end_sync(3)
    assert retire(disks, entry, ring, clock)


def test_a_ring_with_an_unreported_gap_is_kept(
    disks: SourceDisks, entry: DiskEntry, ring: RingReader, clock: SourceClock
) -> None:
    stamp = RingWriter(ring.path).drop(0, 512)
    ring.begin_sync(0)
    ring.end_sync(0)
    assert not retire(disks, entry, ring, clock)
    assert_kept(disks, entry, ring)
    ring.clear_gap(stamp)
    assert retire(disks, entry, ring, clock)


def test_a_ring_whose_image_is_held_by_a_server_is_kept(
    disks: SourceDisks, entry: DiskEntry, ring: RingReader, clock: SourceClock
) -> None:
    RingWriter(ring.path).take_range(0, 0, 512)
    held = lock_image(entry.image)
    try:
        assert not retire(disks, entry, ring, clock)
    finally:
        os.close(held)
    assert_kept(disks, entry, ring)
    assert ring.writes_in_flight()  # a live server's own business
    assert not ring.needs_sync()


@pytest.fixture
def written(ring: RingReader) -> Iterator[None]:
    """A server that lives, whatever the image's path leads to now."""
    held = lock_ring(ring.path)
    yield
    os.close(held)


@pytest.mark.usefixtures("written")
def test_a_ring_with_a_writer_is_kept_though_its_image_is_free(
    disks: SourceDisks, entry: DiskEntry, ring: RingReader, clock: SourceClock
) -> None:
    # Guards check_unwritten in Retirement.prepare.
    assert disks.is_serving(entry)
    assert not retire(disks, entry, ring, clock)
    assert_kept(disks, entry, ring)


@pytest.mark.usefixtures("written")
def test_what_a_live_server_has_in_flight_is_its_own_though_its_image_is_free(
    disks: SourceDisks, entry: DiskEntry, ring: RingReader, clock: SourceClock
) -> None:
    # Guards check_unwritten in SourceDisks.recover_ring.
    RingWriter(ring.path).take_range(0, 0, 512)
    disks.recover_ring(entry, ring, clock)
    assert ring.writes_in_flight()
    assert not ring.needs_sync()


@pytest.mark.usefixtures("written")
def test_a_disk_whose_ring_has_a_writer_is_not_touched_though_its_image_is_free(
    disks: SourceDisks, entry: DiskEntry, ring: RingReader, clock: SourceClock
) -> None:
    # Guards check_unwritten in remove, _unserved (both of growing) and exec_server.
    os.truncate(entry.image, SIZE + MIB)
    for call in (
        lambda: disks.remove(entry),
        lambda: grow_image(disks, entry, None, lambda reached: None),
        lambda: grow_disk(disks, "root", SIZE + MIB, clock),
        lambda: exec_server(disks, "root"),
    ):
        os.close(lock_image(entry.image))  # nothing holds it
        with pytest.raises(StateError, match="in use by a server") as caught:
            call()
        assert caught.value.code == "image-in-use"
    assert disks.load("root") == entry
    assert_kept(disks, entry, ring)


def test_a_server_that_ends_as_it_is_looked_for_does_not_write_elsewhere(
    entry: DiskEntry, ring: RingReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Guards the second look at the ring in is_written_elsewhere: the image was free, and the group
    # was given up.
    served = lock_ring(ring.path)

    def ends(image: int) -> bool:
        os.close(served)
        return False

    monkeypatch.setattr(source, "is_locked_by_another", ends)
    with entry.image.open("rb") as image:
        assert not is_written_elsewhere(entry, image.fileno())


@pytest.mark.usefixtures("written")
def test_no_ring_is_made_in_place_of_one_with_a_writer(
    disks: SourceDisks, entry: DiskEntry, ring: RingReader, clock: SourceClock
) -> None:
    # Guards has_writer in SourceDisks.check_served_ring.
    disks.check_served_ring(entry, clock)
    other = {"offset_ns": clock.offset_ns + 1}
    clock._content = clock._content.model_copy(update=other)
    with disks.lock(entry), pytest.raises(StateError) as caught:
        disks.check_served_ring(entry, clock)
    assert caught.value.code == "ring-lost"


def test_a_ring_whose_image_is_gone_is_kept(
    disks: SourceDisks, entry: DiskEntry, ring: RingReader, clock: SourceClock
) -> None:
    entry.image.unlink()
    assert not retire(disks, entry, ring, clock)
    assert_kept(disks, entry, ring)


def test_what_a_killed_server_had_in_flight_becomes_stale_and_a_gap(
    disks: SourceDisks, entry: DiskEntry, ring: RingReader, clock: SourceClock
) -> None:
    writer = RingWriter(ring.path)
    writer.take_range(5, 2 * MIB - 512, 2 * MIB + 512)
    writer.take_range(9, SIZE - 512, SIZE)
    before = clock.now()
    assert not retire(disks, entry, ring, clock)
    assert_kept(disks, entry, ring)
    assert ring.stale.tolist() == [0, 1, 1, 0, 1]
    assert before <= ring.gap_from() <= clock.now()
    assert ring.dropped() == 2
    assert not ring.writes_in_flight()


def test_a_server_killed_inside_an_append_does_not_hold_the_group_for_ever(
    disks: SourceDisks, entry: DiskEntry, ring: RingReader, clock: SourceClock
) -> None:
    writer = RingWriter(ring.path)
    writer.take_range(0, 0, 512)
    writer.begin_append(RecordKind.WRITE, 0, 512, b"y" * 512)
    assert not ring.quiesce(patience_seconds=0)
    assert not retire(disks, entry, ring, clock)
    assert ring.quiesce(patience_seconds=0)
    assert ring.stale.tolist() == [1, 0, 0, 0, 0]
    assert ring.head() == 1


@pytest.mark.parametrize("table", [(SIZE, SIZE + 512), (512, 512), (1 << 63, 1), (0, 1 << 63)])
def test_an_in_flight_range_outside_the_disk_breaks_nothing(
    disks: SourceDisks,
    entry: DiskEntry,
    ring: RingReader,
    clock: SourceClock,
    table: tuple[int, int],
) -> None:
    RingWriter(ring.path).take_range(0, *table)
    retire(disks, entry, ring, clock)
    assert not ring.writes_in_flight()


def test_an_entry_that_does_not_parse_stops_no_other_disk(
    disks: SourceDisks, entry: DiskEntry, caplog: pytest.LogCaptureFixture
) -> None:
    (disks.directory / "torn.json").write_text('{"name": "to')
    assert disks.all() == [disks.load(entry.name)]
    assert disks.all() == [disks.load(entry.name)]
    assert caplog.text.count("disk torn: ") == 1
    assert disks.unreadable == {"torn"}
    with pytest.raises(StateError, match="does not parse"):
        disks.load("torn")


def test_a_directory_that_cannot_be_read_is_not_one_without_disks(
    disks: SourceDisks, entry: DiskEntry, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Guards os.listdir in SourceDisks.names: glob passes over such errors, and the agent took all
    # disks for removed.
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    with monkeypatch.context() as patched:
        for call in ("scandir", "listdir"):
            patched.setattr(os, call, refuse)
        with pytest.raises(PermissionError):
            disks.all()
    assert disks.all() == [entry]


def test_a_reader_of_an_old_ring_gives_no_later_one_back(
    disks: SourceDisks, entry: DiskEntry, ring: RingReader, clock: SourceClock
) -> None:
    ring.path.unlink()  # as a clean-up of /dev/shm does
    later = open_ring(disks, entry, clock)
    assert later.stale.tolist() == [0, 1, 0, 0, 0]
    assert not retire(disks, entry, ring, clock)
    assert_kept(disks, entry, later)
