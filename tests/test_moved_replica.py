"""A replica that was moved to another file system: everything goes on there, through a link."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from journal_model import GROUP, Journal
from serving import Disk, as_root, blockrepl, place, tool

from blockrepl.storage.check import check_replica
from blockrepl.storage.history import ReplicaHistory
from blockrepl.storage.home import Home
from blockrepl.units import KIB, MIB
from blockrepl.views.view import View
from scripts.guest.pair import Pair

__all__ = ["place"]

SIZE = 8 * MIB


@pytest.fixture
def elsewhere(tmp_path: Path) -> Iterator[Path]:
    """A directory on another file system."""
    path = Path("/dev/shm") / f"moved-{os.getpid()}"
    path.mkdir()
    assert path.stat().st_dev != tmp_path.stat().st_dev
    yield path
    shutil.rmtree(path)


def copy(source: Path, target: Path) -> None:
    subprocess.run(["cp", "-a", "--sparse=always", source, target], check=True)


def written(place: Pair) -> tuple[Disk, str]:
    """A disk that replicates, the instant after its first write, and the receiver stopped."""
    disk = Disk(place, size_bytes=SIZE)
    place.receiver("receiver", "init", quiet=True)
    place.start_receiver()
    place.join()
    place.start_agent()
    disk.start()
    place.wait_replicating("g")
    tool("qemu-io", "-f", "raw", "-c", "write -P 7 0 1M", disk.uri)
    place.wait_durable("g")
    before = place.receiver_json("point", "g", "latest")["at"]
    place.stop("receiver")
    return disk, before


@as_root
def test_a_moved_replica_goes_on_where_it_is(place: Pair, elsewhere: Path) -> None:
    # Guards seed_path: the rename of a seed would lead to another file system.
    disk, before = written(place)

    replica = Home(place.receiver_home).replica_directory("g")
    copy(replica, elsewhere / "g")
    replica.rename(replica.with_name("g.old"))
    replica.symlink_to(elsewhere / "gone")  # its file system is not mounted
    shutil.rmtree(replica.with_name("g.old"))
    place.start_receiver()
    assert place.group("g")["state"] == "error"
    assert not (elsewhere / "gone").exists()
    place.stop("receiver")
    replica.unlink()
    replica.symlink_to(elsewhere / "g")

    assert (elsewhere / "g" / "base" / "d1.img").stat().st_blocks * 512 < SIZE
    place.receiver("receiver", "check", quiet=True)
    place.start_receiver()
    place.wait_replicating("g")
    tool("qemu-io", "-f", "raw", "-c", "write -P 9 0 1M", disk.uri)
    place.wait_durable("g")
    out = place.directory / "out.img"
    place.receiver("export", "g", "d1", out, "--at", before, quiet=True)
    assert out.read_bytes()[:MIB] == b"\7" * MIB
    with place.mounted("g") as mounted:
        image = mounted / "latest" / "d1.img"
        assert image.read_bytes() == disk.content()
    seed = place.directory / "seed.img"
    seed.write_bytes(b"s" * MIB)
    done = blockrepl(place.receiver_home, "receiver", "seed", "g", "d2", seed)
    assert done.returncode == 0, done.stderr
    assert (elsewhere / "g" / "base" / "d2.img").read_bytes() == seed.read_bytes()


def test_a_replica_that_is_put_away_is_mounted_there_and_its_source_fills_a_new_one(
    place: Pair,
) -> None:
    """What the README has for a segment that is lost for good."""
    disk, before = written(place)
    tool("qemu-io", "-f", "raw", "-c", "write -P 9 1M 1M", disk.uri)
    other = place.directory / "other"
    assert blockrepl(other, "receiver", "init").returncode == 0
    (other / "replicas").mkdir(exist_ok=True)
    Home(place.receiver_home).replica_directory("g").rename(other / "replicas" / "g")
    place.start_receiver()
    place.wait_replicating("g")
    tool("qemu-io", "-f", "raw", "-c", "write -P 8 2M 1M", disk.uri)
    place.wait_durable("g")
    with place.mounted("g") as mounted:
        assert (mounted / "latest" / "d1.img").read_bytes() == disk.content()
    out = place.directory / "out.img"
    done = blockrepl(other, "export", "g", "d1", out, "--at", before)
    assert done.returncode == 0, done.stderr
    assert out.read_bytes() == b"\7" * MIB + bytes(SIZE - MIB)
    (place.directory / "m").mkdir()
    done = blockrepl(other, "mount", "g", place.directory / "m", "--at", before)
    assert done.returncode == 0, done.stderr
    try:
        assert (place.directory / "m" / "d1.img").read_bytes() == out.read_bytes()
    finally:
        assert blockrepl(other, "umount", place.directory / "m").returncode == 0


def test_a_home_can_be_moved_whole(tmp_path: Path, elsewhere: Path) -> None:
    journal = Journal(tmp_path / "home", {"root": 320 * KIB})
    journal.run(60)
    journal.close()
    copy(journal.home, elsewhere / "home")
    shutil.rmtree(journal.home)
    assert check_replica(Home.open(elsewhere / "home").replica_directory(GROUP)) == []
    with ReplicaHistory.open(elsewhere / "home", GROUP) as history:
        view = View(history, journal.stamp, history.state())
        expected = journal.model.at(journal.stamp)["root"]
        assert view.read("root", 0, len(expected)) == expected
