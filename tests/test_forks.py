"""Forks on real mounts, written by other programs: isolated, kept by name, bounded."""

from __future__ import annotations

import errno
import io
import json
import os
import random
import shutil
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from journal_model import GROUP, Journal, Record, small_segments
from serving import as_root, tool, wait_for
from test_export import command
from test_fuse import Mounted, digests, expected, kill_serving_process, serving_process
from test_view import SIZES

from blockrepl.cli.main import run
from blockrepl.errors import StorageError
from blockrepl.formats.frame import RecordKind
from blockrepl.limits import FORK_BLOCK_BYTES
from blockrepl.storage import files, forks, pins
from blockrepl.storage.files import Files
from blockrepl.storage.history import ReplicaHistory
from blockrepl.units import KIB, MIB, format_instant
from blockrepl.views.fork import WritableView
from blockrepl.views.priority import NICENESS
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


def at(journal: Journal, place: int) -> tuple[int, str]:
    """A record's instant, and an option that asks for it."""
    stamp = journal.model.records[place].stamp
    return stamp, f"--at={format_instant(stamp)}"


def call(journal: Journal, *arguments: object) -> tuple[int, str, str]:
    """Run a command in this process, which is quicker: status, stdout, stderr."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        status = run(["--home", str(journal.home), *map(str, arguments)])
    return status, out.getvalue(), err.getvalue()


def succeed(journal: Journal, *arguments: object) -> str:
    status, said, told = call(journal, *arguments)
    assert status == 0, told
    return said


def fail(journal: Journal, *arguments: object, status: int = 1) -> str:
    found, said, told = call(journal, *arguments)
    assert found == status, said + told
    assert len(told.strip().splitlines()) == 1
    return told


def write(path: Path, offset: int, data: bytes, *, sync: bool = True) -> None:
    descriptor = os.open(path, os.O_RDWR)
    try:
        assert os.pwrite(descriptor, data, offset) == len(data)
        if sync:
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sources(journal: Journal) -> dict[Path, bytes]:
    """What forks only read: base and journal."""
    return {
        path: path.read_bytes()
        for name in ("base", "segments")
        for path in (journal.directory / name).iterdir()
    }


def pinned(journal: Journal) -> list[tuple[int, str]]:
    with pins.lock(journal.directory):
        found = forks.all_pins(journal.directory, time.time_ns())
    return [(pin.first_ns, pin.what) for pin in found]


def test_a_writable_mount_is_written_to_and_thrown_away(journal: Journal, tmp_path: Path) -> None:
    """Guards `OpenFork.close` (thrown away), and that only the overlay is written to."""
    before = sources(journal)
    stamp, option = at(journal, 30)
    data = random.Random(1).randbytes(9000)
    with Mounted(journal, tmp_path / "m", option, "--writable") as mounted:
        assert (mounted.answer["writable"], mounted.answer["fork"]) == (True, None)
        assert digests(mounted.directory) == expected(journal, stamp)
        write(mounted / "root.img", 5000, data)
        wanted = journal.model.at(stamp)
        wanted["root"][5000:14000] = data
        assert (mounted / "root.img").read_bytes() == wanted["root"]
        assert (mounted / "data.img").read_bytes() == wanted["data"]
        assert (stamp, "fork") in pinned(journal)
        [row] = json.loads(succeed(journal, "fork", "list", GROUP, "--json"))
        assert (row["name"], row["at_ns"]) == ("", stamp)
        assert row["process"] == serving_process(mounted.directory)
    assert pinned(journal) == []
    assert list((journal.directory / "forks").iterdir()) == []
    assert sources(journal) == before


def assert_gives_way(process: int) -> None:
    """Guards both lines of `give_way`: the second where Linux shares out by session."""
    assert os.getpriority(os.PRIO_PROCESS, process) == min(19, os.nice(0) + NICENESS)
    group = Path(f"/proc/{process}/autogroup")
    if group.exists():
        assert group.read_text().split()[1:] == ["nice", str(NICENESS)]


def test_a_forks_server_gives_way_and_a_views_does_not(journal: Journal, tmp_path: Path) -> None:
    with Mounted(journal, tmp_path / "m", "--at=latest", "--writable") as mounted:
        assert_gives_way(serving_process(mounted.directory))
    with Mounted(journal, tmp_path / "view", "--at=latest") as mounted:
        assert os.getpriority(os.PRIO_PROCESS, serving_process(mounted.directory)) == os.nice(0)


def test_a_disk_keeps_its_size_owner_and_mode(journal: Journal, tmp_path: Path) -> None:
    with Mounted(journal, tmp_path / "m", "--at=latest", "--writable") as mounted:
        image = mounted / "root.img"
        for change in (
            lambda: os.truncate(image, 512),
            lambda: image.write_bytes(b"x"),  # opens with O_TRUNC
            lambda: image.chmod(0o644),
        ):
            with pytest.raises(OSError, match="not permitted") as caught:
                change()
            assert caught.value.errno == errno.EPERM
        with pytest.raises(OSError, match="No space left"):
            write(image, SIZES["root"], b"x")
        write(image, SIZES["root"] - 2, b"xx")
        os.utime(image)
        assert image.stat().st_size == SIZES["root"]
        with pytest.raises(OSError, match=r"."):
            (mounted / "new").touch()


def test_a_named_fork_is_kept_until_it_is_removed(journal: Journal, tmp_path: Path) -> None:
    stamp, option = at(journal, 20)
    made = json.loads(succeed(journal, "fork", "create", GROUP, "trial", option, "--json"))
    assert (made["at_ns"], made["disks"]) == (stamp, ["data", "root"])
    assert pinned(journal) == [(stamp, "fork trial")]
    wanted = journal.model.at(stamp)
    for turn in range(2):
        with Mounted(journal, tmp_path / f"m{turn}", "--fork=trial") as mounted:
            assert mounted.answer["at_ns"] == stamp
            assert (mounted / "root.img").read_bytes() == wanted["root"]
            data = bytes([turn + 1]) * 6000
            write(mounted / "root.img", 100 + turn * 3000, data, sync=False)
            wanted["root"][100 + turn * 3000 : 100 + turn * 3000 + len(data)] = data
            # One process has it.
            (tmp_path / "other").mkdir(exist_ok=True)
            told = fail(journal, "mount", GROUP, tmp_path / "other", "--fork=trial")
            assert f"in use by process {serving_process(mounted.directory)}" in told
            assert "in use by process" in fail(journal, "fork", "remove", GROUP, "trial")
        journal.run(20)
    told = fail(journal, "mount", GROUP, tmp_path / "other", "--fork=trial", "--at=latest")
    assert f"is of {format_instant(stamp)}" in told
    with Mounted(journal, tmp_path / "m2", "--fork=trial", option) as mounted:
        assert (mounted / "root.img").read_bytes() == wanted["root"]
    assert "exists already" in fail(journal, "fork", "create", GROUP, "trial", "--at=latest")
    succeed(journal, "fork", "remove", GROUP, "trial")
    assert pinned(journal) == []
    assert "no fork 'trial'" in fail(journal, "mount", GROUP, tmp_path / "other", "--fork=trial")


def test_what_was_flushed_survives_the_death_of_the_view_process(
    journal: Journal, tmp_path: Path
) -> None:
    """Guards the map's record in `Overlay.flush`: without it the blocks are not found again."""
    stamp, option = at(journal, 40)
    data = random.Random(2).randbytes(20_000)
    with Mounted(journal, tmp_path / "m", option, "--fork=kept") as mounted:
        write(mounted / "data.img", 7000, data)
        kill_serving_process(mounted.directory)
    wanted = journal.model.at(stamp)["data"]
    wanted[7000:27_000] = data
    with Mounted(journal, tmp_path / "again", "--fork=kept") as mounted:
        assert (mounted / "data.img").read_bytes() == wanted
    # One without a name is gone with the next that is made.
    with Mounted(journal, tmp_path / "lost", option, "--writable") as mounted:
        write(mounted / "data.img", 0, data)
        kill_serving_process(mounted.directory)
    assert len(list((journal.directory / "forks").iterdir())) == 2
    assert [
        row["name"] for row in json.loads(succeed(journal, "fork", "list", GROUP, "--json"))
    ] == ["kept"]
    assert [path.name for path in (journal.directory / "forks").iterdir()] == ["kept"]
    assert pinned(journal) == [(stamp, "fork kept")]


def test_a_fork_over_its_limit_is_the_writer_s_error_and_nobody_else_s(
    journal: Journal, tmp_path: Path
) -> None:
    with (
        Mounted(journal, tmp_path / "a", "--at=latest", "--writable", "--size-limit=16K") as small,
        Mounted(journal, tmp_path / "b", "--at=latest", "--writable") as other,
    ):
        write(small / "root.img", 0, b"a" * 16 * KIB)
        with pytest.raises(OSError, match="No space left") as caught:
            write(small / "root.img", 16 * KIB, b"a")
        assert caught.value.errno == errno.ENOSPC
        with pytest.raises(OSError, match="No space left"):
            write(small / "data.img", 0, b"a")
        write(small / "root.img", 100, b"b" * 1000)  # it has that block
        journal.run(10)
        write(other / "root.img", 0, b"c" * 64 * KIB)
        assert (small / "root.img").read_bytes()[:1200] == b"a" * 100 + b"b" * 1000 + b"a" * 100


@pytest.mark.parametrize("mounts", [4, pytest.param(20, marks=pytest.mark.soak)])
def test_twenty_forks_written_at_once_are_isolated_while_frames_arrive(
    journal: Journal, tmp_path: Path, mounts: int
) -> None:
    """Guards that `Overlay` writes into its own two files only: base and journal just grow.

    So many through mounts, the others through what a mount calls.
    """
    stamps = [journal.model.records[place].stamp for place in range(0, 60, 3)]
    before = sources(journal)
    assert len(stamps) == 20
    with ExitStack() as closing, ThreadPoolExecutor(len(stamps)) as pool:
        doors: list[Door] = list(
            pool.map(
                lambda place: MountDoor(journal, tmp_path / f"m{place}", stamps[place]),
                range(mounts),
            )
        )
        history = closing.enter_context(ReplicaHistory.open(journal.home, GROUP))
        doors += [DirectDoor(history, stamp) for stamp in stamps[mounts:]]
        for door in doors:
            closing.callback(door.close)
        filled = [pool.submit(fill, journal, door, place) for place, door in enumerate(doors)]
        rounds = 0
        while not rounds or not all(each.done() for each in filled):
            journal.run(12)
            rounds += 1
        for door, each in zip(doors, filled, strict=True):
            for name, content in each.result().items():
                assert door.read(name) == content
    for path, content in sources(journal).items():
        was = before.get(path, b"")
        if path.parent.name == "base":
            assert content == was
        else:
            assert content.startswith(was), path.name
    with ReplicaHistory.open(journal.home, GROUP) as history:
        view = View(history, journal.stamp, history.state())
        for name, wanted in journal.model.at(journal.stamp).items():
            assert view.read(name, 0, SIZES[name]) == wanted


def fill(journal: Journal, door: Door, seed: int) -> dict[str, bytes]:
    """Write at random; what the fork must hold then."""
    chance = random.Random(seed)
    wanted = journal.model.at(door.at_ns)
    for _ in range(20):
        name = chance.choice(list(SIZES))
        offset = chance.randrange(SIZES[name] - 9000)
        data = chance.randbytes(chance.randrange(1, 9000))
        door.write(name, offset, data, sync=chance.random() < 0.2)
        wanted[name][offset : offset + len(data)] = data
    return {name: bytes(content) for name, content in wanted.items()}


class MountDoor:
    """A fork through a mount."""

    def __init__(self, journal: Journal, directory: Path, at_ns: int) -> None:
        self.at_ns = at_ns
        option = f"--at={format_instant(at_ns)}"
        self.mounted = Mounted(journal, directory, option, "--writable")

    def write(self, name: str, offset: int, data: bytes, *, sync: bool) -> None:
        write(self.mounted / f"{name}.img", offset, data, sync=sync)

    def read(self, name: str) -> bytes:
        return (self.mounted / f"{name}.img").read_bytes()

    def close(self) -> None:
        self.mounted.__exit__()


class Syncs(Files):
    """Counts what is synced."""

    def __init__(self) -> None:
        self.count = 0

    def sync(self, descriptor: int) -> None:
        self.count += 1
        super().sync(descriptor)


@pytest.mark.parametrize("name", ["kept", None])
def test_only_a_fork_that_is_kept_takes_the_time_of_the_journals_disk(
    journal: Journal, name: str | None
) -> None:
    """Guards `Overlay.flush`: of what is thrown away nothing is synced, not even at its end."""
    files = Syncs()
    with ReplicaHistory.open(journal.home, GROUP) as history:
        opened = forks.create(history, name, journal.stamp)
        overlays = forks.open_overlays(opened.directory, opened.fork, files)
        view = WritableView(View(history, journal.stamp, history.state()), overlays)
        for turn in range(3):
            view.write("root", turn * FORK_BLOCK_BYTES, b"tried")
            view.flush("root")
            assert view.read("root", turn * FORK_BLOCK_BYTES, 5) == b"tried"
        view.close()
        opened.close()
    opening, flushes = 2 * len(SIZES), 6  # of the data and of the map, each
    assert files.count == (opening + flushes if name else 0)


class FailingOnce(Files):
    """The first sync fails from a moment on."""

    fails = False

    def sync(self, descriptor: int) -> None:
        if self.fails:
            self.fails = False
            raise OSError(errno.EIO, "Input/output error")


def test_a_disk_that_cannot_be_flushed_keeps_no_other_from_it(journal: Journal) -> None:
    """Guards `WritableView.flush_all` at the end of a mount."""
    files = FailingOnce()
    with (
        ReplicaHistory.open(journal.home, GROUP) as history,
        closing(forks.create(history, "kept", journal.stamp)) as opened,
    ):
        overlays = forks.open_overlays(opened.directory, opened.fork, files)
        view = WritableView(View(history, journal.stamp, history.state()), overlays)
        for name in SIZES:
            view.write(name, 0, b"at the end")
        files.fails = True
        with pytest.raises(StorageError, match="make durable"):
            view.close()
        again = forks.open_overlays(opened.directory, opened.fork)
        assert sorted(overlay.data_bytes > 0 for overlay in again.values()) == [False, True]
        WritableView(View(history, journal.stamp, history.state()), again).close()


class DirectDoor:
    """A fork through what the doors call."""

    def __init__(self, history: ReplicaHistory, at_ns: int) -> None:
        self.at_ns = at_ns
        self.opened = forks.create(history, None, at_ns)
        overlays = forks.open_overlays(self.opened.directory, self.opened.fork)
        self.view = WritableView(View(history, at_ns, history.state()), overlays)

    def write(self, name: str, offset: int, data: bytes, *, sync: bool) -> None:
        self.view.write(name, offset, data)
        if sync:
            self.view.flush(name)

    def read(self, name: str) -> bytes:
        return bytes(self.view.read(name, 0, SIZES[name]))

    def close(self) -> None:
        self.view.close()
        self.opened.close()


Door = MountDoor | DirectDoor


@as_root
def test_a_crashed_ext4_is_replayed_and_mounted_in_a_fork_beside_its_view(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "home", {"root": 16 * MIB})
    image = _crashed_ext4(tmp_path)
    data = image.read_bytes()
    for offset in range(0, len(data), MIB):
        journal.write("root", offset, data[offset : offset + MIB])
    option = f"--at={format_instant(journal.stamp)}"
    journal.put([Record(journal.tick(), "root", 0, 16 * MIB, RecordKind.ZERO)])
    (tmp_path / "inside").mkdir()
    with (
        Mounted(journal, tmp_path / "view", option) as view,
        Mounted(journal, tmp_path / "fork", option, "--writable") as fork,
    ):
        assert "needs_recovery" in tool("dumpe2fs", "-h", view / "root.img")
        losetup = ("losetup", "--find", "--show", "--direct-io=on")
        loop = tool(*losetup, fork / "root.img").strip()
        try:
            tool("mount", loop, tmp_path / "inside")  # replays the journal
            try:
                assert (tmp_path / "inside" / "hello").read_text() == "from the past"
                (tmp_path / "inside" / "new").write_text("of the fork")
            finally:
                tool("umount", tmp_path / "inside")
        finally:
            tool("losetup", "--detach", loop)
        wait_for(lambda: not Path(f"/sys/block/{Path(loop).name}/loop").exists(), "the loop's end")
        assert "needs_recovery" not in tool("dumpe2fs", "-h", fork / "root.img")
        tool("e2fsck", "-fn", fork / "root.img")
        assert "of the fork" in tool("debugfs", "-R", "cat /new", fork / "root.img")
        assert (view / "root.img").read_bytes() == data
    journal.close()


def _crashed_ext4(directory: Path) -> Path:
    """An image as a power cut leaves it: copied while it is mounted, its journal not replayed."""
    image, inside, crashed = directory / "made.img", directory / "made", directory / "crashed.img"
    inside.mkdir()
    tool("mke2fs", "-q", "-t", "ext4", image, "16M")
    tool("mount", "-o", "loop", image, inside)
    try:
        (inside / "hello").write_text("from the past")
        os.sync()
        descriptor = os.open(inside, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
        crashed.write_bytes(image.read_bytes())
    finally:
        tool("umount", inside)
    return crashed


def test_extents_of_a_fork_cover_it_and_zeros_are_zeros(journal: Journal) -> None:
    with ReplicaHistory.open(journal.home, GROUP) as history:
        door = DirectDoor(history, journal.stamp)
        door.view.write("root", 10_000, b"x" * 5000)
        door.view.zero("root", 20_000, 30_000)
        content = door.read("root")
        where = 0
        for extent in door.view.extents("root", 0, SIZES["root"], grain=4096):
            assert extent.offset == where
            where += extent.length
            assert extent.is_data or not any(content[extent.offset : where])
        assert where == SIZES["root"]
        assert any(not each.is_data for each in door.view.extents("root", 0, SIZES["root"]))
        door.close()


def test_pins_are_of_living_processes_only(journal: Journal, tmp_path: Path) -> None:
    """Guards the lock in `pins.hold`: a dead process's pin holds nothing back."""
    stamp, option = at(journal, 10)
    with Mounted(journal, tmp_path / "m", option) as mounted:
        assert pinned(journal) == [(stamp, f"mount {mounted.directory}")]
        kill_serving_process(mounted.directory)
        wait_for(lambda: pinned(journal) == [], "the dead mount's pin void")
    assert not list((journal.directory / "pins").iterdir())
    with Mounted(journal, tmp_path / "tree") as mounted:
        assert pinned(journal) == []
        (mounted / "at" / format_instant(stamp)).stat()
        assert pinned(journal) == [(stamp, f"mount {mounted.directory}")]
    assert pinned(journal) == []


def test_a_pin_names_its_place_however_long_or_strange(journal: Journal) -> None:
    # Guards _told in pins.hold: a pin that is cut off does not parse, and half a letter cannot be
    # printed.
    stamp, _ = at(journal, 10)
    long = "mount /" + "\udcff" * 4000
    with ReplicaHistory(journal.directory) as history, pins.holding(history, stamp, stamp, long):
        [pin] = pins.held(journal.directory)
    assert pin.what.startswith("mount /\N{REPLACEMENT CHARACTER}")
    assert len(pin.what) == pins.WHAT_LETTERS_MAX


def test_who_looks_without_the_lock_finds_a_whole_pin_or_none(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Guards the rename in pins._make: `status` met a pin that was not written yet, and failed.
    directory = journal.directory / "pins"
    directory.mkdir(exist_ok=True)
    (directory / ".of-a-crash").touch()
    seen = []

    def watched(*arguments: Any) -> int:
        seen.append(pins.held(journal.directory))
        return files.write_all(*arguments)

    monkeypatch.setattr(pins, "write_all", watched)
    stamp, _ = at(journal, 10)
    with (
        ReplicaHistory(journal.directory) as history,
        pins.holding(history, stamp, stamp, "a test"),
    ):
        assert seen == [[]]
        assert [pin.what for pin in pins.held(journal.directory)] == ["a test"]
        assert len(list(directory.iterdir())) == 1
    assert list(directory.iterdir()) == []


@pytest.mark.parametrize("number", [errno.EACCES, errno.ENOSPC])
def test_a_pin_that_cannot_be_made_is_an_error_of_one_line(
    journal: Journal, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    # Guards "except OSError" in pins.hold: the mount or the session ended with a traceback.
    def refused(*_arguments: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(pins, "write_all", refused)
    stamp, _ = at(journal, 10)
    with ReplicaHistory(journal.directory) as history:
        with pytest.raises(StorageError, match=os.strerror(number)) as caught:
            pins.hold(history, stamp, stamp, "a test")
        assert "\n" not in str(caught.value)
    assert list((journal.directory / "pins").iterdir()) == []


def test_an_expired_fork_is_refused_pins_nothing_and_is_swept(journal: Journal) -> None:
    stamp, option = at(journal, 10)
    succeed(journal, "fork", "create", GROUP, "old", option, "--expires=2h")
    later = time.time_ns() + 3 * 3600 * 10**9
    with pins.lock(journal.directory):
        assert forks.all_pins(journal.directory, later) == []
        assert [pin.first_ns for pin in forks.all_pins(journal.directory, time.time_ns())] == [
            stamp
        ]
    path = journal.directory / "forks" / "old" / "fork.json"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps(fields | {"expires_ns": 1}))
    (journal.home / "m").mkdir()
    assert "has expired" in fail(journal, "mount", GROUP, journal.home / "m", "--fork=old")
    assert json.loads(succeed(journal, "fork", "list", GROUP, "--json")) == []
    assert not path.parent.exists()


@pytest.mark.parametrize(
    ("arguments", "status", "told"),
    [
        (["fork", "create", GROUP, "a/b", "--at=latest"], 2, "no fork's name"),
        (["fork", "create", GROUP, ".new-x", "--at=latest"], 2, "no fork's name"),
        (["fork", "create", GROUP, "x", "--at=-1000d"], 1, "before the floor"),
        (["fork", "create", GROUP, "x", "--at=latest", "--size-limit=lots"], 2, "is not a size"),
        (
            ["fork", "create", GROUP, "x", "--at=latest", "--size-limit=0"],
            2,
            "written to. give more",
        ),
        (["fork", "create", GROUP, "x", "--at=latest", "--expires=soon"], 2, "no duration"),
        (["fork", "create", "nope", "x", "--at=latest"], 1, "no replica of a group nope"),
        (["fork", "remove", GROUP, "x"], 1, "forks there: none"),
        (["mount", GROUP, "DIR", "--writable"], 2, "--at POINT"),
        (["mount", GROUP, "DIR", "--fork=x"], 1, "has no fork 'x'"),
        (["mount", GROUP, "DIR", "--at=latest", "--size-limit=1G"], 2, "add --writable"),
    ],
)
def test_what_cannot_be_forked_is_one_line_and_leaves_nothing(
    journal: Journal, tmp_path: Path, arguments: list[str], status: int, told: str
) -> None:
    (tmp_path / "m").mkdir()
    words = [str(tmp_path / "m") if word == "DIR" else word for word in arguments]
    assert told in fail(journal, *words, status=status)
    made = journal.directory / "forks"
    assert not made.exists() or not list(made.iterdir())


def test_a_fork_of_an_instant_that_is_gone_says_so(journal: Journal, tmp_path: Path) -> None:
    stamp, option = at(journal, 10)
    succeed(journal, "fork", "create", GROUP, "old", option)
    # As if history had been cut behind its back.
    for name, identity in journal.ids.items():
        journal.replica.catalog.change(
            "UPDATE disks SET ready_ns = ? WHERE id = ?", stamp + 5000, identity.bytes.hex()
        )
        assert name in SIZES
    (tmp_path / "m").mkdir()
    assert "before the floor" in fail(journal, "mount", GROUP, tmp_path / "m", "--fork=old")
    succeed(journal, "fork", "remove", GROUP, "old")
    assert subprocess.run(["mountpoint", "-q", tmp_path / "m"], check=False).returncode


def test_a_damaged_fork_is_told_of_and_can_be_removed(
    journal: Journal, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("good", "bad"):
        succeed(journal, "fork", "create", GROUP, name, "--at=latest")
    (journal.directory / "forks" / "bad" / "fork.json").write_text("{")
    listed = json.loads(succeed(journal, "fork", "list", GROUP, "--json"))
    assert [row["name"] for row in listed] == ["good"]
    assert "bad/fork.json is damaged" in caplog.text
    assert "is damaged" in fail(journal, "serve", GROUP, "--fork=bad")
    succeed(journal, "fork", "remove", GROUP, "bad")
    assert not (journal.directory / "forks" / "bad").exists()


@pytest.mark.parametrize("what", ["remove", "expired", "crashed", "unnamed", "closed"])
def test_nobody_waits_while_the_files_of_a_fork_are_removed(
    journal: Journal, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    # Guards rule 2 of forks.py: a group's commits stood still until a large fork was removed.
    directory = journal.directory / "forks"
    for name in ("big", "other"):
        succeed(journal, "fork", "create", GROUP, name, "--at=latest")
    seen: list[str] = []
    removed = shutil.rmtree

    def watched(path: Path, **options: Any) -> None:
        seen.append(path.name)
        held = pins.lock_if_free(journal.directory)
        assert held is not None
        with held:
            assert [one.fork.name for one in forks.statuses(journal.directory)] == ["other"]
            assert len(forks.all_pins(journal.directory, time.time_ns())) == 1
        if len(seen) == 1:
            forks.sweep(journal.directory)  # another remover, at the same time
            assert not path.exists()
        removed(path, **options)

    if what == "expired":
        path = directory / "big" / "fork.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"expires_ns": 1}))
    elif what in ("unnamed", "crashed", "closed"):
        removed(directory / "big")
    if what == "crashed":
        shutil.copytree(directory / "other", directory / ".new-x")
    with ReplicaHistory.open(journal.home, GROUP) as history:
        opened = None
        if what in ("unnamed", "closed"):
            opened = forks.create(history, None, journal.stamp)
        monkeypatch.setattr(shutil, "rmtree", watched)
        if what == "closed":
            assert opened is not None
            opened.close()
        elif what == "remove":
            succeed(journal, "fork", "remove", GROUP, "big")
        else:
            if opened is not None:
                opened.lock.close()  # as if its process had been killed
            forks.create(history, "new", journal.stamp).close()
            removed(directory / "new")
    assert len(seen) == 2
    assert [path.name for path in directory.iterdir()] == ["other"]


def test_a_fork_that_a_crash_has_left_half_removed_is_none(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Guards _GONE where forks are listed, counted and swept.
    directory = journal.directory / "forks"
    monkeypatch.setattr(forks, "FORKS_MAX", 1)
    succeed(journal, "fork", "create", GROUP, "big", "--at=latest")
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", lambda *_, **__: None)
        succeed(journal, "fork", "remove", GROUP, "big")
        [left] = directory.iterdir()
        assert left.name.startswith(".gone-")
        assert pinned(journal) == []
        assert json.loads(succeed(journal, "fork", "list", GROUP, "--json")) == []
        assert "forks there: none" in fail(journal, "fork", "remove", GROUP, "big")
        succeed(journal, "fork", "create", GROUP, "big", "--at=latest")
        assert "has 1 forks" in fail(journal, "fork", "create", GROUP, "more", "--at=latest")
    assert forks.sweep_if_free(journal.directory) == []
    assert [path.name for path in directory.iterdir()] == ["big"]


def test_the_receiver_removes_forks_that_have_expired(journal: Journal) -> None:
    """Guards `ReceiverGroups.sweep_forks`, and that it waits for nobody."""
    for name in ("old", "young"):
        _, option = at(journal, 10)
        succeed(journal, "fork", "create", GROUP, name, option, "--expires=2h")
    journal.close()
    path = journal.directory / "forks" / "old" / "fork.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"expires_ns": 1}))
    with pins.lock(journal.directory):
        assert forks.sweep_if_free(journal.directory) == []
    succeed(journal, "receiver", "init")
    receiver = subprocess.Popen(
        command(journal, "receiver", "run", "--listen", "127.0.0.1:0"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for(lambda: not path.parent.exists(), "the expired fork's end")
    finally:
        receiver.terminate()
        receiver.wait(30)
    assert (journal.directory / "forks" / "young").exists()
    journal.open()
