"""A disk grows, with the real services: no gap, nothing sent again, every instant its own size."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from oracle.nbd_client import Client
from outage import BLOCK, GROUP, Stage
from serving import Disk, as_root, blockrepl, place, tool, wait_for

from blockrepl import limits
from blockrepl.formats import hot_map
from blockrepl.storage.clock import open_clock
from blockrepl.storage.ring import unfinished_path
from blockrepl.units import KIB, MIB
from scripts.benchmark.qmp import Monitor
from scripts.guest.pair import Pair

__all__ = ["place"]
SIZE = 8 * MIB + 68 * KIB  # its last region is short, and so is that one's last block
GROWN = 11 * MIB + 4 * KIB
KILLED = -signal.SIGKILL
# Runs a command in a process that kills itself where a function is called for the n-th time.
KILL_AT = """
import os, signal, sys
from importlib import import_module
module, name, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
owner = import_module(module)
*outer, name = name.split(".")
for each in outer:
    owner = getattr(owner, each)
real = getattr(owner, name)
def killing(*arguments, **named):
    global count
    count -= 1
    if count == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*arguments, **named)
setattr(owner, name, killing)
from blockrepl.cli.main import run
sys.exit(run(sys.argv[4:]))
"""


@pytest.fixture
def stage(place: Pair) -> Iterator[Stage]:
    made = Stage(place, size_bytes=SIZE)
    yield made
    made.close()


def resize(it: Stage | Pair, *size: str) -> dict[str, object]:
    pair = it.place if isinstance(it, Stage) else it
    done: dict[str, object] = json.loads(pair.source("disk", "resize", "d1", *size, "--json"))
    return done


def grow(it: Stage, size: int = GROWN) -> None:
    """As its user does: end the server, resize, serve again."""
    it.client.close()
    it.disk.stop()
    it.sample_offline()
    done = resize(it, str(size))
    assert (done["before_bytes"], done["size_bytes"]) == (it.size_bytes, size)
    served_again(it, size)


def served_again(it: Stage, size: int) -> None:
    it.content += bytes(size - len(it.content))
    it.size_bytes = it.disk.size_bytes = size
    it.disk.entry = it.disk.disks.load("d1")
    it.disk.start()
    it.client = Client(it.disk.socket)
    it.reader = it.disk.reader()
    assert it.client.size_bytes == size
    it.sample()


def fill(it: Stage) -> None:
    """All over the disk, and its last bytes."""
    it.write_some(12)
    it.write(it.size_bytes - 512, it.random.randbytes(512))
    it.sample()


def finish(it: Stage) -> None:
    """Everything came, nothing is missing, nothing was sent that is not new."""
    it.wait_synced()
    assert it.gaps() == []
    assert it.source_group()["disks"][0]["size_bytes"] == it.size_bytes
    assert it.group()["disks"][0]["size_bytes"] == it.size_bytes
    it.check()
    shown = {len(sample.content) for sample in it.samples}
    assert len(shown) > 1


def test_a_disk_grows_while_it_is_replicated(stage: Stage) -> None:
    # Guards all of it together: GroupPump._put_growths (records would be refused), Agent.grow.
    fill(stage)
    stage.wait_synced()
    sent = stage.source_group()["sent_bytes"]
    grow(stage)
    fill(stage)
    grow(stage, GROWN + 5 * MIB)
    fill(stage)
    finish(stage)
    assert stage.source_group()["sent_bytes"] < sent + 3 * MIB  # what was written, no region
    done = blockrepl(stage.place.source_home, "verify", GROUP, "--now", "--json")
    (proven,) = json.loads(done.stdout)
    assert (proven["covered_bytes"], proven["mismatches"]) == (stage.size_bytes, 0)
    [disk] = stage.group()["disks"]
    assert disk["size_bytes"] == stage.size_bytes
    stage.place.stop("receiver")
    checked = blockrepl(stage.place.receiver_home, "receiver", "check", "--json")
    assert checked.returncode == 0, checked.stdout
    stage.place.start_receiver()


@pytest.mark.timeout(240)
@pytest.mark.parametrize("away", ["agent", "receiver", "both"])
def test_a_disk_grows_while_one_side_is_away(stage: Stage, away: str) -> None:
    # Guards make_grown: what waits in the ring would be lost (a gap). Guards Known.apply, too: a
    # spool's marks would be sent twice, or never.
    for name in ("agent", "receiver") if away == "both" else (away,):
        stage.place.kill(name)
    fill(stage)
    grow(stage)
    fill(stage)
    if away == "receiver":
        stage.place.kill("agent")
    if away != "agent":
        stage.place.start_receiver()
    if "agent" not in stage.place.services:
        stage.start_agent()
    fill(stage)
    finish(stage)


@pytest.mark.timeout(240)
@pytest.mark.parametrize("name", ["agent", "receiver"])
def test_a_side_that_is_killed_right_after_is_told_again(stage: Stage, name: str) -> None:
    fill(stage)
    grow(stage)
    stage.place.kill(name)
    fill(stage)
    stage.start(name)
    fill(stage)
    finish(stage)


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    ("module", "name", "count", "then"),
    [  # killed before the step of storage/growing.py, and who comes next
        ("blockrepl.storage.growing", "write_atomically", 1, "resize"),  # 2, the hot map
        ("blockrepl.storage.growing", "make_grown", 1, "agent"),  # 3, the ring's copy
        ("blockrepl.storage.source", "SourceDisks.write", 1, "resize"),  # 4, the entry
        ("os", "rename", 3, "agent"),  # 5, the copy takes the ring's place: behind map and entry
        ("os", "rename", 3, "server"),
    ],
)
def test_a_resize_that_is_killed_at_any_step_is_finished(
    stage: Stage, module: str, name: str, count: int, then: str
) -> None:
    # Guards the order of the steps: a gap, a resync or a lost record. Guards is_outgrown.
    it = stage
    it.place.kill("agent")
    fill(it)  # records that wait in the ring
    it.client.close()
    it.disk.stop()
    it.sample_offline()
    home = ("--home", str(it.place.source_home))
    command = [sys.executable, "-c", KILL_AT, module, name, str(count), *home]
    killed = subprocess.run(
        [*command, "disk", "resize", "d1", str(GROWN)], capture_output=True, check=False
    )
    assert killed.returncode == KILLED, killed.stderr
    is_noted = it.disk.disks.load("d1").size_bytes == GROWN
    assert is_noted == (name == "rename")
    if then == "agent":
        it.start_agent()
    if not is_noted:
        refused = blockrepl(it.place.source_home, "disk", "serve", "d1")
        assert refused.returncode == 1
        assert "blockrepl disk resize d1" in refused.stderr
    if then != "server" or not is_noted:
        assert resize(it, str(GROWN))["size_bytes"] == GROWN
    served_again(it, GROWN)
    if "agent" not in it.place.services:
        it.start_agent()
    fill(it)
    finish(it)
    assert not unfinished_path(it.disk.ring).exists()


def test_what_cannot_be_is_refused_in_one_line(place: Pair) -> None:
    disk = Disk(place, size_bytes=SIZE)
    home = place.source_home

    def refused(*size: str, status: int = 1) -> str:
        done = blockrepl(home, "disk", "resize", "d1", *size)
        assert done.returncode == status, done.stderr
        assert "Traceback" not in done.stderr
        return done.stderr

    assert "cannot shrink" in refused(str(SIZE - 512), status=2)
    assert "multiple of 512" in refused(str(SIZE + 1), status=2)
    assert "a disk may have" in refused("100T", status=2)
    assert blockrepl(home, "disk", "resize", "nodisk", "1G").returncode == 1
    disk.start()
    assert "end `blockrepl disk serve d1`" in refused(str(GROWN))
    disk.stop()
    with disk.image.open("r+b") as file:
        file.seek(SIZE + MIB)
        file.write(b"somebody".ljust(512, b"."))
    assert "data behind" in refused()
    assert "more than" in refused(str(SIZE + 512))
    os.truncate(disk.image, SIZE - 512)
    assert "restore its size" in refused(str(GROWN))
    assert disk.disks.load("d1").size_bytes == SIZE
    assert disk.image.stat().st_size == SIZE - 512


def test_an_image_that_was_enlarged_already_is_taken_as_it_is(place: Pair) -> None:
    disk = Disk(place, size_bytes=SIZE)
    data = hot_map.encode(disk.entry.id.bytes, SIZE, limits.REGION_BYTES, hot=False)
    disk.hot_map.write_bytes(data)
    with disk.image.open("r+b") as file:
        file.truncate(GROWN)
    assert "disk resize d1" in blockrepl(place.source_home, "disk", "serve", "d1").stderr
    assert resize(place)["size_bytes"] == GROWN
    assert resize(place)["at"] is None  # and again: nothing is to be done
    entry = disk.disks.load("d1")
    assert [one.size_bytes for one in entry.growths] == [GROWN]
    assert not disk.disks.hot_regions(entry).any()  # what was cold is, and what is new too
    disk.start()
    with Client(disk.socket) as client:
        client.write(GROWN - 4096, b"e" * 4096)
    assert list(disk.disks.hot_regions(entry).nonzero()[0]) == [11]
    disk.stop()


@as_root
def test_a_block_device_grows_and_what_is_new_of_it_is_zeros(place: Pair) -> None:
    # Guards _write_zeros: what another volume has left there would be on one side only.
    backing = place.directory / "volume"
    backing.write_bytes(b"left by somebody" * (GROWN // 16))
    device = tool("losetup", "--find", "--show", f"--sizelimit={SIZE}", backing).strip()
    try:
        disk = Disk(place, image=Path(device))
        place.receiver("receiver", "init", quiet=True)
        place.start_receiver()
        place.join()
        place.start_agent()
        disk.start()
        place.wait_replicating("g")
        disk.stop()
        too_soon = blockrepl(place.source_home, "disk", "resize", "d1", str(GROWN))
        assert "resize the device first" in too_soon.stderr
        tool("losetup", "--detach", device)
        wait_for(lambda: not tool("losetup", "--associated", backing), "the device is free")
        tool("losetup", device, backing)
        assert resize(place)["size_bytes"] == GROWN
        disk.start()
        with Client(disk.socket) as client:
            assert client.read(SIZE, GROWN - SIZE) == bytes(GROWN - SIZE)
            client.write(GROWN - 512, b"l" * 512)
        disk.stop()
        place.wait_durable("g", open_clock(disk.disks.home.source_directory).now())
        with place.mounted("g") as root:
            latest = (root / "latest" / "d1.img").read_bytes()
        assert latest == Path(device).read_bytes()
        assert latest[SIZE:] == bytes(GROWN - SIZE - 512) + b"l" * 512
    finally:
        tool("losetup", "--detach", device)


def test_another_disk_of_the_group_goes_on_untouched(stage: Stage) -> None:
    other = Disk(stage.place, "d2", size_bytes=MIB)
    other.start()
    with Client(other.socket) as client:
        client.write(0, b"o" * BLOCK)
        stage.place.wait_replicating(GROUP)
        stage.wait_synced()
        grow(stage)
        for turn in range(5):
            client.write(turn * BLOCK, b"p" * BLOCK)
        fill(stage)
    stage.wait_synced()
    assert stage.gaps() == []
    with stage.place.mounted(GROUP) as root:
        assert (root / "latest" / "d2.img").read_bytes() == other.image.read_bytes()
    stage.check()
    other.stop()


@contextmanager
def qemu(place: Pair) -> Iterator[Monitor]:
    """A machine with the disk, its processor stopped."""
    control = place.directory / "qmp"
    machine = ["qemu-system-x86_64", "-machine", "pc,accel=tcg", "-nodefaults", "-S"]
    options = [
        *place.qemu_options("d1"),
        "-display",
        "none",
        "-qmp",
        f"unix:{control},server=on,wait=off",
    ]
    with subprocess.Popen([*machine, *options], stdout=subprocess.DEVNULL) as process:
        try:
            wait_for(control.exists, "QEMU's monitor")
            with Monitor(control) as monitor:
                yield monitor
        finally:
            process.kill()


def test_a_qemu_that_runs_takes_the_new_size_with_block_resize(place: Pair) -> None:
    # Holds what `disk resize --help` says of QEMU against a real one.
    disk = Disk(place, size_bytes=SIZE)
    disk.start()
    with qemu(place) as monitor:

        def inside(command: str) -> None:
            (block,) = monitor.execute("query-block")
            line = f'qemu-io -d {block["qdev"]} "{command}"'
            assert monitor.execute("human-monitor-command", **{"command-line": line}) == ""

        def size() -> int:
            (block,) = monitor.execute("query-block")
            return int(block["inserted"]["image"]["virtual-size"])

        inside("write -P 1 0 4096")
        disk.stop()
        assert resize(place, str(GROWN))["size_bytes"] == GROWN
        disk.start()
        inside("write -P 2 4096 4096")  # it has waited for the server
        assert size() == SIZE
        monitor.execute("block_resize", **{"node-name": "blockrepl-d1", "size": GROWN})
        assert size() == GROWN
        inside(f"write -P 3 {GROWN - 4096} 4096")
        inside("flush")
    data = disk.image.read_bytes()
    assert (data[0], data[4096], data[-1], len(data)) == (1, 2, 3, GROWN)
    disk.stop()
