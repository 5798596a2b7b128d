"""Real mounts, read by other programs, against the model; damage, errors and unmounting."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import pytest
import trio
from journal_model import GROUP, Journal, Record, small_segments
from pyfuse3 import FileHandleT, FileNameT, FlagT, InodeT, RequestContext
from test_view import SIZES, find, flip, segments_of

from blockrepl.formats.frame import RecordKind
from blockrepl.storage.history import ReplicaHistory
from blockrepl.units import KIB, MIB, format_instant
from blockrepl.views import serving
from blockrepl.views.fuse import SMALL_BYTES, ViewFileSystem
from blockrepl.views.view import View

pytestmark = pytest.mark.skipif(
    not os.access("/dev/fuse", os.W_OK), reason="this user may not use /dev/fuse"
)


@pytest.fixture
def journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Journal]:
    small_segments(monkeypatch)
    made = Journal(tmp_path / "home", SIZES)
    made.run(60)
    yield made
    made.close()


def blockrepl(journal: Journal, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "blockrepl.cli.main", "--home", journal.home, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


class Mounted:
    def __init__(self, journal: Journal, directory: Path, *options: str) -> None:
        self.journal = journal
        self.directory = directory
        directory.mkdir()
        done = blockrepl(journal, "mount", GROUP, directory, *options, "--json")
        assert done.returncode == 0, done.stderr
        self.answer = json.loads(done.stdout)

    def __enter__(self) -> Mounted:
        return self

    def __exit__(self, *_error: object) -> None:
        done = blockrepl(self.journal, "umount", self.directory)
        assert (done.returncode, done.stderr) == (0, "")
        assert not list(self.directory.iterdir())

    def __truediv__(self, name: str) -> Path:
        return self.directory / name


def digests(directory: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir()
    }


def expected(journal: Journal, at_ns: int) -> dict[str, str]:
    return {
        f"{name}.img": hashlib.sha256(content).hexdigest()
        for name, content in journal.model.at(at_ns).items()
    }


def serving_process(directory: Path) -> int:
    line = next(line for line in Path("/proc/mounts").read_text().splitlines()
                if line.split()[1] == str(directory))  # fmt: skip
    return int(line.split()[0].split(":")[2])


def kill_serving_process(directory: Path) -> None:
    """And wait for its end: until then it holds its locks."""
    descriptor = os.pidfd_open(serving_process(directory))
    try:
        signal.pidfd_send_signal(descriptor, signal.SIGKILL)
        assert select.select([descriptor], [], [], 20)[0]
    finally:
        os.close(descriptor)


def test_a_mount_at_a_point_holds_every_disk_as_it_was(journal: Journal, tmp_path: Path) -> None:
    at = journal.model.records[30].stamp
    with Mounted(journal, tmp_path / "m", "--at", format_instant(at)) as mounted:
        assert mounted.answer["at_ns"] == at
        assert mounted.answer["distance_seconds"] == 0
        assert digests(mounted.directory) == expected(journal, at)
        for name, size in SIZES.items():
            told = (mounted / f"{name}.img").stat()
            assert (told.st_size, told.st_mtime_ns) == (size, at)
            assert 0 < told.st_blocks * 512 <= size + 511


def test_a_mount_keeps_no_more_of_what_it_reads_than_it_is_told(
    journal: Journal, tmp_path: Path
) -> None:
    given = ["--read-cache", "8M"]
    (tmp_path / "m").mkdir()
    point = ["--at", format_instant(journal.stamp)]
    command = [sys.executable, "-m", "blockrepl.cli.main", "--home", str(journal.home)]
    subprocess.run([*command, *given, "mount", GROUP, str(tmp_path / "m"), *point], check=True)
    try:
        environment = Path(f"/proc/{serving_process(tmp_path / 'm')}/environ").read_bytes()
        assert b"BLOCKREPL_READ_CACHE=%d" % (8 * MIB) in environment.split(b"\0")
        assert digests(tmp_path / "m") == expected(journal, journal.stamp)
    finally:
        subprocess.run([*command, "umount", str(tmp_path / "m")], check=True)


def test_latest_moves_on_and_the_instant_it_pointed_to_stays(
    journal: Journal, tmp_path: Path
) -> None:
    with Mounted(journal, tmp_path / "m") as mounted:
        first, first_at = (mounted / "latest").readlink(), journal.stamp
        assert first == Path("at") / format_instant(first_at)
        with (mounted / "latest" / "root.img").open("rb") as held:
            journal.run(80)
            second = (mounted / "latest").readlink()
            assert second == Path("at") / format_instant(journal.stamp) != first
            assert held.read() == journal.model.at(first_at)["root"]
        assert digests(mounted.directory / first) == expected(journal, first_at)
        assert digests(mounted / "latest") == expected(journal, journal.stamp)
        assert {path.name for path in (mounted / "at").iterdir()} == {first.name, second.name}


def test_any_point_can_be_typed_as_a_directory(journal: Journal, tmp_path: Path) -> None:
    tagged = journal.checkpoint("before-upgrade")
    journal.run(40)
    stamps = sorted(record.stamp for record in journal.model.records)
    with Mounted(journal, tmp_path / "m") as mounted:
        assert sorted(os.listdir(mounted.directory)) == ["at", "checkpoints", "latest"]
        assert os.listdir(mounted / "checkpoints") == ["before-upgrade"]
        assert digests(mounted / "checkpoints" / "before-upgrade") == expected(journal, tagged)
        for text in ("before-upgrade", "tag:before-upgrade"):
            assert (mounted / "at" / text).readlink() == Path(format_instant(tagged))
        assert (mounted / "at" / "latest~3").readlink() == Path(format_instant(stamps[-4]))
        assert digests(mounted / "at" / "latest~3") == expected(journal, stamps[-4])
        journal.checkpoint("second")
        assert sorted(os.listdir(mounted / "checkpoints")) == ["before-upgrade", "second"]
        for text in ("-1000d", "nope", "2099-01-01T00:00:00Z", "!!"):
            with pytest.raises(FileNotFoundError):
                (mounted / "at" / text).stat()


def test_a_mount_refuses_every_change(journal: Journal, tmp_path: Path) -> None:
    with Mounted(journal, tmp_path / "m", "--at", "latest") as mounted:
        image = mounted / "root.img"
        for change in (
            lambda: image.open("r+b"),
            (mounted / "new").touch,
            image.unlink,
            lambda: image.rename(mounted / "other"),
            lambda: os.truncate(image, 0),
        ):
            with pytest.raises(OSError, match="Read-only") as caught:
                change()
            assert caught.value.errno == errno.EROFS


def test_damage_is_an_input_output_error_told_once(journal: Journal, tmp_path: Path) -> None:
    bad = journal.write("root", 4096, journal.random.randbytes(8192))
    path = segments_of(journal)[-1]
    place = find(path, bad.data[:4096])
    flip(path, place + 10)
    with Mounted(journal, tmp_path / "m", "--at", "latest") as mounted:
        with (mounted / "root.img").open("rb", buffering=0) as file:
            for _ in range(2):
                with pytest.raises(OSError, match="Input/output") as caught:
                    os.pread(file.fileno(), 4096, 4096)
                assert caught.value.errno == errno.EIO
            wanted = journal.model.at(journal.stamp)["root"]
            assert os.pread(file.fileno(), 4096, 64 * KIB) == wanted[64 * KIB : 68 * KIB]
        assert (mounted / "data.img").read_bytes() == journal.model.at(journal.stamp)["data"]
    log = (journal.home / "log" / f"mount-{GROUP}.log").read_text()
    told = [line for line in log.splitlines() if "is damaged at offset" in line]
    assert len(told) == 1
    assert path.name in told[0]
    assert f"offset {place}" in told[0]
    # As the services' lines: when, how grave, who.
    assert re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d{4} [A-Z]+ blockrepl\.[a-z.]+: ", told[0])


def test_several_mounts_serve_many_readers_at_once(journal: Journal, tmp_path: Path) -> None:
    points = [journal.model.records[place].stamp for place in (10, 59)]
    found: list[bool] = []

    def read(mounted: Mounted, at: int) -> None:
        for _ in range(5):
            found.append(digests(mounted.directory) == expected(journal, at))

    with (
        Mounted(journal, tmp_path / "a", f"--at={format_instant(points[0])}") as first,
        Mounted(journal, tmp_path / "b", f"--at={format_instant(points[1])}") as second,
    ):
        threads = [
            threading.Thread(target=read, args=pair)
            for pair in [(first, points[0]), (second, points[1])] * 3
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == [True] * 30


def test_reads_of_every_size_and_place_are_right(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "home", {"big": 9 * MIB + 512})
    journal.run(200, length_max=600 * KIB)
    wanted = journal.model.at(journal.stamp)["big"]
    with Mounted(journal, tmp_path / "m", "--at=latest") as mounted:
        image = mounted / "big.img"
        assert image.read_bytes() == wanted
        descriptor = os.open(image, os.O_RDONLY)
        for _ in range(200):
            offset = journal.random.randrange(len(wanted))
            length = journal.random.randrange(1, 3 * MIB)
            assert os.pread(descriptor, length, offset) == wanted[offset : offset + length]
        os.close(descriptor)
        device = image.stat().st_dev
        read_ahead = Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb")
        assert os.geteuid() != 0 or int(read_ahead.read_text()) >= 1024
    journal.close()


@pytest.mark.parametrize("flag", ["root", "tree"])
def test_umount_ends_the_serving_process(journal: Journal, tmp_path: Path, flag: str) -> None:
    options = ["--at=latest"] if flag == "root" else []
    with Mounted(journal, tmp_path / "m", *options) as mounted:
        process = serving_process(mounted.directory)
        assert Path(f"/proc/{process}").exists()
    assert not Path(f"/proc/{process}").exists() or "State:\tZ" in _status(process)


def _status(process: int) -> str:
    try:
        return Path(f"/proc/{process}/status").read_text()
    except FileNotFoundError:
        return "State:\tZ"


def test_umount_ends_the_process_although_another_namespace_has_a_copy(
    journal: Journal, tmp_path: Path
) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root may make a mount namespace")
    with Mounted(journal, tmp_path / "m", "--at=latest") as mounted:
        process = serving_process(mounted.directory)
        copy = subprocess.Popen(
            ["unshare", "--mount", "--propagation", "private", "sh", "-c", "echo; exec cat"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert copy.stdout is not None
        copy.stdout.readline()
    assert "State:\tZ" in _status(process)
    copy.communicate()


def test_a_busy_mount_stays_and_says_so(journal: Journal, tmp_path: Path) -> None:
    with Mounted(journal, tmp_path / "m", "--at=latest") as mounted:
        with (mounted / "root.img").open("rb"):
            done = blockrepl(journal, "umount", mounted.directory)
            assert done.returncode == 1
            assert "in use" in done.stderr
        assert (mounted / "root.img").exists()


def test_a_mount_whose_process_was_killed_can_be_unmounted(
    journal: Journal, tmp_path: Path
) -> None:
    with Mounted(journal, tmp_path / "m", "--at=latest") as mounted:
        os.kill(serving_process(mounted.directory), signal.SIGKILL)
        deadline = time.monotonic() + 10
        while os.path.exists(mounted / "root.img") and time.monotonic() < deadline:
            time.sleep(0.01)
        again = blockrepl(journal, "mount", GROUP, mounted.directory)
        assert again.returncode == 1
        assert "umount" in again.stderr


def test_a_foreground_mount_ends_with_a_signal(journal: Journal, tmp_path: Path) -> None:
    directory = tmp_path / "m"
    directory.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-m", "blockrepl.cli.main", "--home", journal.home, "mount", GROUP,
         directory, "--at", "latest~2", "--foreground"],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert "latest~2" in process.stdout.readline()
    hint = [process.stdout.readline() for _ in range(4)]
    assert "/dev/loopN itself when the image has no partition table" in hint[3]
    assert set(digests(directory)) == {"root.img", "data.img"}
    process.terminate()
    assert process.wait(20) == 0
    process.stdout.close()
    assert not list(directory.iterdir())


def test_a_mount_that_is_told_to_end_while_it_starts_waits_for_no_thread_of_its_own(
    journal: Journal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards `abandon_on_cancel` in `_serve`: that thread asks the mount, which answers no more."""
    (tmp_path / "m").mkdir()
    has_ended, seen = threading.Event(), threading.Event()

    def asks_the_mount(_path: Path) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        if has_ended.wait(10):
            seen.set()

    monkeypatch.setattr(serving, "_read_ahead", asks_the_mount)
    with ReplicaHistory.open(journal.home, GROUP) as history:
        files = ViewFileSystem(history, journal.stamp, history.state())
        with serving.mounted(files, tmp_path / "m", GROUP, is_writable=False):
            trio.run(serving._serve, tmp_path / "m", lambda: None)
            has_ended.set()
        files.close()
    assert seen.wait(10)


@pytest.mark.parametrize(
    ("arguments", "status", "told"),
    [
        (["mount", GROUP, "missing"], 1, "mkdir"),
        (["mount", GROUP, "full"], 1, "not empty"),
        (["mount", GROUP, "file"], 1, "not a directory"),
        (["mount", "nope", "empty"], 1, "no replica of a group nope"),
        (["mount", GROUP, "empty", "--at", "-1000d"], 1, "before the floor"),
        (["mount", GROUP, "empty", "--at", "2099-01-01T00:00:00Z"], 1, "future"),
        (["mount", GROUP, "empty", "--at", "??"], 2, "neither a time nor a name"),
        (["mount", GROUP, "empty", "--writable"], 2, "--at POINT"),
        (["umount", "empty"], 1, "no mount of blockrepl"),
    ],
)
def test_what_cannot_be_mounted_is_one_line_and_leaves_nothing(
    journal: Journal, tmp_path: Path, arguments: list[str], status: int, told: str
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    places = {"missing", "full", "file", "empty"}
    resolved = [str(tmp_path / a) if a in places else a for a in arguments]
    done = blockrepl(journal, *resolved)
    assert done.returncode == status, done.stderr
    assert told in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not list((tmp_path / "empty").iterdir())


def test_the_file_system_inside_can_be_mounted(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root may mount a file system")
    journal = Journal(tmp_path / "home", {"root": 16 * MIB})
    image = tmp_path / "made.img"
    (tmp_path / "content").mkdir()
    (tmp_path / "content" / "hello").write_text("from the past")
    command = ["mke2fs", "-q", "-t", "ext4", "-d", str(tmp_path / "content"), str(image), "16M"]
    subprocess.run(command, check=True)
    data = image.read_bytes()
    for offset in range(0, len(data), MIB):
        journal.write("root", offset, data[offset : offset + MIB])
    at = journal.stamp
    journal.put([Record(journal.tick(), "root", 0, 16 * MIB, RecordKind.ZERO)])
    (tmp_path / "inside").mkdir()
    with Mounted(journal, tmp_path / "m", f"--at={format_instant(at)}") as mounted:
        losetup = ["losetup", "--find", "--show", "--read-only", "--direct-io=on"]
        loop = subprocess.run(
            [*losetup, mounted / "root.img"], check=True, capture_output=True, text=True
        ).stdout.strip()
        try:
            subprocess.run(["mount", "-o", "ro,noload", loop, tmp_path / "inside"], check=True)
            assert (tmp_path / "inside" / "hello").read_text() == "from the past"
            subprocess.run(["umount", tmp_path / "inside"], check=True)
        finally:
            subprocess.run(["losetup", "--detach", loop], check=True)
    journal.close()


@dataclass
class Spied:
    """A file system that pyfuse3 does not know of, and where its view reads."""

    files: ViewFileSystem
    handle: FileHandleT
    waits: list[tuple[bool, bool]]  # whether it might wait, whether in a thread of its own


@pytest.fixture
def spied(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[int, bool], Spied]]:
    whole = View.read
    found: list[tuple[bool, bool]] = []

    def read(self: View, name: str, offset: int, length: int, *, wait: bool = True) -> bytearray:
        found.append((wait, threading.current_thread() is not threading.main_thread()))
        return whole(self, name, offset, length, wait=wait)

    monkeypatch.setattr(View, "read", read)
    with ReplicaHistory.open(journal.home, GROUP) as replica, contextlib.ExitStack() as stack:

        def ask(size: int, has_more: bool) -> Spied:
            found.clear()
            files = ViewFileSystem(replica, journal.stamp, replica.state())
            stack.callback(files.close)
            files.has_more = lambda: has_more

            async def go() -> FileHandleT:
                name, context = FileNameT(b"root.img"), cast(RequestContext, None)
                entry = await files.lookup(InodeT(1), name, context)
                info = await files.open(entry.st_ino, FlagT(os.O_RDONLY), context)
                data = await files.read(info.fh, 0, size)
                assert data == journal.model.at(journal.stamp)["root"][:size]
                assert not files.has_threads()
                return info.fh

            return Spied(files, trio.run(go), found)

        yield ask


def test_a_small_read_waits_in_place_only_when_no_request_has_to_wait_for_it(
    spied: Callable[[int, bool], Spied],
) -> None:
    assert spied(4096, False).waits == [(True, False)]
    # Nothing is resolved yet, so that it would have to wait.
    assert spied(4096, True).waits == [(False, False), (True, True)]


def test_a_large_read_waits_in_a_thread(spied: Callable[[int, bool], Spied]) -> None:
    assert spied(SMALL_BYTES + 4096, False).waits == [(False, False), (True, True)]
