"""A real guest boots over NBD from a fork of a crash point: its file systems replay their journals,
and what was durable in them is there.
"""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from journal_model import Journal, Record
from serving import as_root, tool, wait_for

from blockrepl.formats.frame import RecordKind
from blockrepl.formats.marks import ConsistentMark
from blockrepl.storage.history import ReplicaHistory
from blockrepl.units import format_instant
from blockrepl.views.view import View
from scripts.guest.build import build_root_image
from scripts.guest.machine import Guest
from scripts.guest.pair import COMMAND, Pair, pair

MIB = 1 << 20
GROUP = "shop"
# root is ext4; mkfs.xfs makes nothing smaller than this
DISKS = {"root": 128 * MIB, "xfs": 320 * MIB, "btrfs": 128 * MIB}
PLACES = {"root": "/data", "xfs": "/mnt/xfs", "btrfs": "/mnt/btrfs"}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300), as_root]

MOUNT = """
set -e
modprobe xfs
modprobe btrfs
mkdir -p /data /mnt/xfs /mnt/btrfs
mount /dev/vdb /mnt/xfs
mount /dev/vdc /mnt/btrfs
"""

# One after the other: none is ever more than one ahead of the next.
WRITE = """
for place in /data /mnt/xfs /mnt/btrfs; do
    sqlite3 $place/db 'create table t (x)' || exit 1
done
(
    n=0
    while true; do
        n=$((n + 1))
        for place in /data /mnt/xfs /mnt/btrfs; do
            sqlite3 $place/db "insert into t values ($n)" || echo $n $place >> /run/failed
        done
        echo $n > /run/next && mv /run/next /run/count
    done
) > /dev/null 2>&1 &
"""


def crashed_root(directory: Path) -> Path:
    """A guest's root image as a power cut leaves it: copied while it is mounted."""
    image, inside, crashed = directory / "made.img", directory / "inside", directory / "crashed.img"
    build_root_image(image, DISKS["root"])
    inside.mkdir()
    tool("mount", "-o", "loop", image, inside)
    try:
        (inside / "home" / "note").write_text("from the past")
        tool("sync", "--file-system", inside)
        tool("cp", "--sparse=always", image, crashed)
    finally:
        tool("umount", inside)
    return crashed


def test_a_guest_boots_from_a_fork_of_a_crash_point(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "home", {"root": DISKS["root"]}, sync=False)
    journal.mark(ConsistentMark(disk=journal.ids["root"], at_ns=journal.stamp))
    journal.replica.commit()
    data = crashed_root(tmp_path).read_bytes()
    for offset in range(0, len(data), MIB):
        if any(piece := data[offset : offset + MIB]):
            record = Record(journal.tick(), "root", offset, MIB, RecordKind.WRITE, piece)
            journal.put([record], model=False)
    at = f"--at={format_instant(journal.stamp)}"
    zero = Record(journal.tick(), "root", 0, len(data), RecordKind.ZERO)
    journal.put([zero], model=False)
    with served(journal.home, "web", tmp_path / "s", at, "--writable") as answer, Guest() as guest:
        [disk] = answer["disks"]
        guest.start(shlex.split(disk["qemu"]))
        assert "EXT4-fs (vda): recovery complete" in guest.check("dmesg")
        assert guest.check("cat /home/note") == "from the past"
        guest.check("echo written > /home/new; sync")
        guest.shutdown()
        tool("nbdcopy", disk["uri"], tmp_path / "after.img")
        tool("e2fsck", "-fn", tmp_path / "after.img")
        assert tool("debugfs", "-R", "cat /home/new", tmp_path / "after.img").endswith("written\n")
    with ReplicaHistory.open(journal.home, "web") as history:
        instant = answer["at_ns"]
        view = View(history, instant, history.state())
        for offset in range(0, len(data), MIB):
            assert view.read("root", offset, MIB) == data[offset : offset + MIB]
    journal.close()


@pytest.fixture
def protected(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    with pair(tmp_path_factory.getbasetemp()) as made:
        made.receiver("receiver", "init")
        made.start_receiver()
        made.join()
        made.start_agent()
        for name, size_bytes in DISKS.items():
            image = made.directory / f"{name}.img"
            if name == "root":
                build_root_image(image, size_bytes)
            else:
                with image.open("wb") as file:
                    file.truncate(size_bytes)
                tool(f"mkfs.{name}", "-q", image)
            made.source("disk", "add", name, image, "--group", GROUP)
            made.start_disk(name)
        made.wait_replicating(GROUP)
        yield made


@contextmanager
def served(home: Path, group: str, socket: Path, *options: str) -> Iterator[dict[str, Any]]:
    process = subprocess.Popen(
        [
            str(COMMAND),
            "--home",
            str(home),
            "serve",
            group,
            "--json",
            "--socket",
            str(socket),
            *options,
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        assert line, process.communicate()[1]
        yield json.loads(line)
    finally:
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=30)[1]
    assert (process.returncode, said) == (0, "")


def rows(guest: Guest) -> list[int]:
    return [
        int(guest.check(f"sqlite3 {place}/db 'select count(*) from t'"))
        for place in PLACES.values()
    ]


@pytest.mark.soak
def test_three_file_systems_of_a_crash_point_boot_and_agree(protected: Pair) -> None:
    with Guest() as guest:
        options = [word for name in DISKS for word in protected.qemu_options(name)]
        guest.start(options)
        guest.check(MOUNT)
        guest.check(WRITE)

        def count() -> int:
            return int(guest.check("cat /run/count 2> /dev/null || echo 0"))

        wait_for(lambda: count() >= 3, "the guest's first transactions", 60)
        before = count()
        instant = protected.receiver_json("point", GROUP, "latest")["at"]
        wait_for(lambda: count() > before + 1, "the guest's later transactions", 60)
        assert guest.run("cat /run/failed").status != 0
        # Transactions go on while the fork boots beside them.
        socket = protected.directory / "s"
        options = [f"--at={instant}", "--writable"]
        with (
            served(protected.receiver_home, GROUP, socket, *options) as answer,
            Guest() as other,
        ):
            qemu = {disk["name"]: shlex.split(disk["qemu"]) for disk in answer["disks"]}
            other.start([word for name in DISKS for word in qemu[name]])
            assert "EXT4-fs (vda): recovery complete" in other.check("dmesg")
            other.check(MOUNT)
            for place in PLACES.values():
                assert other.check(f"sqlite3 {place}/db 'pragma integrity_check'") == "ok\n"
            found = rows(other)
            assert found == sorted(found, reverse=True)
            assert found[0] - found[-1] <= 1
            assert 1 <= found[0] <= before + 2
            for place in PLACES.values():
                other.check(f"sqlite3 {place}/db 'insert into t values (-1)'")
            assert "Starting recovery" in other.check("dmesg")  # XFS, where mount found it unclean
            other.shutdown()
        assert guest.run("cat /run/failed").status != 0
        after = count()
        wait_for(lambda: count() > after, "the first guest going on", 60)
    assert protected.receiver_json("fork", "list", GROUP) == []
    assert not socket.exists()
