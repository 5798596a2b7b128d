"""The lossy file system is what it claims to be: no test that stands on it means more than this."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from lossy.disk import LossyDisk, lossy_disk
from lossy.nodes import SECTOR_BYTES, Loss


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LossyDisk]:
    with lossy_disk(tmp_path_factory.mktemp("lossy") / "mount") as disk:
        yield disk


@pytest.fixture
def disk(shared: LossyDisk) -> LossyDisk:
    """With nothing durable on it."""
    for path in shared.path.iterdir():
        path.unlink() if not path.is_dir() else subprocess.run(["rm", "-r", path], check=True)
    sync(shared.path)
    shared.restore(Loss.KEEP)
    return shared


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def write(path: Path, data: bytes, offset: int = 0, *, synced: bool = False) -> None:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    os.pwrite(descriptor, data, offset)
    if synced:
        os.fsync(descriptor)
    os.close(descriptor)


def durable_file(disk: LossyDisk, data: bytes) -> Path:
    path = disk.path / "file"
    write(path, data, synced=True)
    sync(disk.path)
    return path


def lose(disk: LossyDisk, loss: Loss, seed: int = 0) -> None:
    disk.lose_power()
    disk.restore(loss, seed)


def test_what_was_synced_survives_and_what_was_not_does_not(disk: LossyDisk) -> None:
    path = durable_file(disk, b"a" * 10000)
    write(path, b"b" * 3000, 4000)
    os.truncate(path, 9000)
    assert path.read_bytes() == b"a" * 4000 + b"b" * 3000 + b"a" * 2000
    lose(disk, Loss.DROP)
    assert path.read_bytes() == b"a" * 10000
    write(path, b"b" * 3000, 4000, synced=True)
    lose(disk, Loss.DROP)
    assert path.read_bytes() == b"a" * 4000 + b"b" * 3000 + b"a" * 3000


def test_a_disk_may_keep_what_was_not_synced(disk: LossyDisk) -> None:
    path = disk.path / "file"
    write(path, b"a" * 5000)
    lose(disk, Loss.KEEP)
    assert path.read_bytes() == b"a" * 5000
    lose(disk, Loss.DROP)  # it is on the disk now
    assert path.read_bytes() == b"a" * 5000


def test_a_torn_write_is_torn_at_sectors_and_nowhere_else(disk: LossyDisk) -> None:
    before, after = b"a" * 16 * SECTOR_BYTES, b"b" * 16 * SECTOR_BYTES
    outcomes = set()
    for seed in range(30):
        path = durable_file(disk, before)
        write(path, after[100:-100], 100)
        lose(disk, Loss.TEAR, seed)
        found = path.read_bytes()
        wanted = before[:100] + after[100:-100] + before[-100:]
        sectors = [
            found[at : at + SECTOR_BYTES] == wanted[at : at + SECTOR_BYTES]
            for at in range(0, len(wanted), SECTOR_BYTES)
        ]
        for number, is_new in enumerate(sectors):
            if not is_new:
                at = number * SECTOR_BYTES
                assert found[at : at + SECTOR_BYTES] == before[at : at + SECTOR_BYTES]
        outcomes.add(tuple(sectors))
    assert (True,) * 16 in outcomes
    assert (False,) * 16 in outcomes
    assert len(outcomes) > 5


def test_a_torn_end_of_a_file_is_missing_or_zeros(disk: LossyDisk) -> None:
    sizes, zeros = set(), 0
    for seed in range(40):
        path = durable_file(disk, b"a" * 512)
        write(path, b"b" * 5120, 512)
        lose(disk, Loss.TEAR, seed)
        found = path.read_bytes()
        assert found[:512] == b"a" * 512
        assert set(found[512:]) <= {0, ord("b")}
        sizes.add(len(found))
        zeros += found[512:] == bytes(5120)
        path.unlink()
        sync(disk.path)
    assert {512, 5632} <= sizes
    assert zeros


def test_names_are_durable_by_their_directory_alone(disk: LossyDisk) -> None:
    directory = disk.path / "d"
    directory.mkdir()
    write(directory / "one", b"1", synced=True)
    sync(directory)
    lose(disk, Loss.DROP)
    assert list(disk.path.iterdir()) == []  # its own name was not synced
    directory.mkdir()
    sync(disk.path)
    write(directory / "one", b"1", synced=True)
    sync(directory)
    write(directory / "two", b"2", synced=True)
    (directory / "one").rename(directory / "three")
    lose(disk, Loss.DROP)
    assert [path.name for path in directory.iterdir()] == ["one"]
    (directory / "one").unlink()
    lose(disk, Loss.DROP)
    assert (directory / "one").read_bytes() == b"1"


def test_a_torn_rename_has_happened_or_not(disk: LossyDisk) -> None:
    outcomes = set()
    for seed in range(20):
        for name, data in (("new", b"new"), ("old", b"old")):
            write(disk.path / name, data, synced=True)
        sync(disk.path)
        (disk.path / "new").rename(disk.path / "old")
        lose(disk, Loss.TEAR, seed)
        outcomes.add((disk.path / "old").read_bytes())
        assert (disk.path / "new").exists() == ((disk.path / "old").read_bytes() == b"old")
    assert outcomes == {b"old", b"new"}


@pytest.mark.parametrize("when", ["before", "after"])
def test_power_is_lost_at_the_sync_that_was_named(disk: LossyDisk, when: str) -> None:
    path = durable_file(disk, b"0")
    disk.lose_power_at(3, "before" if when == "before" else "after", of="file")
    for number in (1, 2):
        write(path, b"%d" % number, synced=True)
        write(disk.path / "other", b"", synced=True)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        write(path, b"3", synced=True)
    assert not disk.state()["on"]
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        path.read_bytes()
    disk.restore(Loss.DROP)
    assert path.read_bytes() == (b"2" if when == "before" else b"3")


def test_a_file_that_was_open_is_dead_when_power_is_back(disk: LossyDisk) -> None:
    path = durable_file(disk, b"0")
    descriptor = os.open(path, os.O_RDWR)
    lose(disk, Loss.DROP)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        os.pwrite(descriptor, b"1", 0)
    os.close(descriptor)
    assert path.read_bytes() == b"0"


def test_the_call_that_was_named_fails_once(disk: LossyDisk) -> None:
    path = durable_file(disk, b"0")
    disk.fail(2, errno.ENOSPC)
    write(path, b"1")
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        write(path, b"2")
    assert disk.state()["failed"] == "write file"
    write(path, b"3")
    disk.fail(1, "short")
    descriptor = os.open(path, os.O_RDWR)
    assert os.pwrite(descriptor, b"x" * 100, 0) == 50
    assert os.pwrite(descriptor, b"x" * 100, 0) == 100
    os.close(descriptor)


def test_a_failed_sync_loses_what_the_page_cache_goes_on_showing(disk: LossyDisk) -> None:
    path = durable_file(disk, b"a" * 4096)
    descriptor = os.open(path, os.O_RDWR)
    os.pwrite(descriptor, b"b" * 8192, 0)
    disk.fail(1, errno.EIO)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        os.fdatasync(descriptor)
    os.fdatasync(descriptor)  # reports nothing, and brings nothing back
    assert os.pread(descriptor, 8192, 0) == b"b" * 8192
    assert path.read_bytes() == b"b" * 8192
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    assert os.pread(descriptor, 8192, 0) == b"a" * 4096 + bytes(4096)
    os.close(descriptor)


def test_a_full_disk_takes_nothing_more_until_there_is_room(disk: LossyDisk) -> None:
    path = durable_file(disk, b"0")
    disk.set_full(True)
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        write(path, b"1")
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        (disk.path / "d").mkdir()
    assert os.statvfs(disk.path).f_bavail == 0
    disk.set_full(False)
    write(path, b"1")
    assert os.statvfs(disk.path).f_bavail > 0


def test_mapped_memory_and_sockets_work(disk: LossyDisk) -> None:
    path = durable_file(disk, bytes(8192))
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 8192) as mapping:
        mapping[5000] = 7
        assert path.read_bytes()[5000] == 7
        mapping.flush()
    lose(disk, Loss.DROP)
    assert path.read_bytes()[5000] == 7
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
        server.bind(str(disk.path / "socket"))
        server.listen()
        client.connect(str(disk.path / "socket"))


COUNT_UP = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None, timeout=30)
for _ in range(int(sys.argv[2])):
    connection.execute("BEGIN IMMEDIATE")
    connection.execute("UPDATE t SET n = n + 1")
    connection.execute("COMMIT")
"""


def test_sqlite_works_in_wal_mode_between_processes(disk: LossyDisk) -> None:
    path = disk.path / "db"
    connection = database(path)
    commands = [[sys.executable, "-c", COUNT_UP, str(path), "40"] for _ in range(2)]
    for process in [subprocess.Popen(command) for command in commands]:
        assert process.wait(60) == 0
    assert connection.execute("SELECT n FROM t").fetchone() == (80,)
    connection.close()


def database(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, isolation_level=None)
    for line in ("journal_mode = WAL", "synchronous = FULL"):
        connection.execute(f"PRAGMA {line}")
    connection.execute("CREATE TABLE t (n)")
    connection.execute("INSERT INTO t VALUES (0)")
    return connection


@pytest.mark.parametrize("loss", list(Loss))
def test_sqlite_keeps_what_it_has_committed_when_power_is_lost_at_any_sync(
    disk: LossyDisk, loss: Loss
) -> None:
    path = disk.path / "db"
    database(path).close()
    for cut in range(1, 9):
        connection = sqlite3.connect(path, isolation_level=None)
        connection.execute("PRAGMA synchronous = FULL")
        (done,) = connection.execute("SELECT n FROM t").fetchone()
        disk.lose_power_at(cut, "before")
        with contextlib.suppress(sqlite3.Error):
            while True:
                connection.execute("UPDATE t SET n = n + 1")
                done += 1
        connection.close()
        disk.restore(loss, cut)
        connection = sqlite3.connect(path, isolation_level=None)
        (found,) = connection.execute("SELECT n FROM t").fetchone()
        assert found in {done, done + 1}
        connection.close()
