"""The design's fault table, a test per row, with the real services: what dies, what is left behind,
what happens on restart. After each, the replica is the source's disk, and what was promised of its
history is there.

=================================  =================================================
row                                test
=================================  =================================================
hot mark, before the local write   test_a_write_that_never_reached_the_disk
local write, before the append     test_a_write_that_reached_the_disk_and_not_the_ring
the NBD server, ring intact        test_a_server_that_is_killed
the source host (power)            test_a_source_that_loses_its_power
the agent                          test_an_agent_that_is_killed
the network, beyond the spool      test_outage.py
the receiver, before fdatasync     test_frames_that_were_never_durable
the receiver, torn tail            the same, with half a frame
fold, half way                     test_thinning.py: a fold that broke off half way
disk full at the receiver          test_a_full_disk_at_the_receiver
disk full at the source's spool    test_a_full_disk_at_the_spool
=================================  =================================================
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from outage import BLOCK, GROUP, Stage
from ring_writer import RingWriter
from serving import as_root, place, stale_regions, wait_for

from blockrepl.storage.durable import FILE_NAME, read_durable
from blockrepl.units import MIB
from scripts.guest.pair import Pair

__all__ = ["place"]
pytestmark = pytest.mark.timeout(180)
MakeStage = Callable[..., Stage]


@pytest.fixture
def stage(place: Pair) -> Iterator[MakeStage]:
    made: list[Stage] = []

    def make(**options: object) -> Stage:
        made.append(Stage(place, **options))  # type: ignore[arg-type]
        return made[0]

    yield make
    for one in made:
        one.close()


@contextmanager
def small_file_system(directory: Path, size_bytes: int) -> Iterator[None]:
    directory.mkdir(parents=True, exist_ok=True)
    options = f"size={size_bytes}"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", directory], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", directory], check=True)


def settled(it: Stage) -> Stage:
    """With some history behind it, all of it durable, and a sample of it."""
    it.write_some(10)
    it.sample()
    it.wait_synced()
    return it


def test_a_write_that_never_reached_the_disk(stage: MakeStage) -> None:
    # Guards the ``stale`` mark in RingReader.recover_in_flight: nobody would look at the region.
    it = settled(stage())
    it.disk.kill()
    RingWriter(it.disk.ring).take_range(0, 0, BLOCK)  # its slot is taken, its region hot
    wait_for(lambda: bool(it.gaps()), "what was in flight is compared")
    it.wait_synced()
    assert it.source_group()["disks"][0]["to_sync_bytes"] == 0
    it.check()


def test_a_write_that_reached_the_disk_and_not_the_ring(stage: MakeStage) -> None:
    # Guards the same line: the replica would never hear of the write.
    it = settled(stage())
    it.disk.kill()
    RingWriter(it.disk.ring).take_range(0, 3 * MIB, 3 * MIB + BLOCK)
    data = os.urandom(BLOCK)
    with it.disk.image.open("r+b") as image:
        image.seek(3 * MIB)
        image.write(data)
    it.content[3 * MIB : 3 * MIB + BLOCK] = data
    wait_for(lambda: bool(it.gaps()), "what was in flight is compared")
    it.wait_synced()
    it.check()


def test_a_server_that_is_killed(stage: MakeStage) -> None:
    # Guards ``has_ring`` in SourceDisks.ensure_ring: a new ring would hold none of the records.
    it = settled(stage())
    it.place.kill("agent")
    for _ in range(4):
        it.write_some(5)
        it.sample()
    it.disk.kill()
    it.restart_disk()
    assert stale_regions(it.reader) == []
    it.write_some(5)
    it.sample()
    it.start_agent()
    it.wait_synced()
    assert it.gaps() == []
    it.check()


def test_a_source_that_loses_its_power(stage: MakeStage) -> None:
    # Guards ``stale=self.hot_regions(entry)`` in SourceDisks.ensure_ring: the replica would stay
    # ahead of the disk. And the gap of "another ring" in sender.resume.
    it = settled(stage())
    it.client.flush()
    on_disk = it.disk.content()
    it.sample()
    it.write_some(20)
    it.sample()
    it.wait_synced()  # the replica has what the disk is about to lose
    it.place.kill("agent")
    it.write_some(5)
    it.disk.kill()
    it.disk.ring.unlink()
    shutil.rmtree(it.disk.disks.home.source_directory / "spool", ignore_errors=True)
    it.disk.image.write_bytes(on_disk)  # nothing was flushed since
    it.content[:] = on_disk
    it.restart_disk()
    it.start_agent()
    it.wait_synced()
    [(from_ns, _)] = it.gaps()
    assert from_ns > it.samples[-1].at_ns
    it.write_some(5)
    it.sample()
    it.wait_synced()
    it.check()


def test_an_agent_that_is_killed(stage: MakeStage) -> None:
    # Guards the cursor in SourceDisk._resume: records would be missing, or come twice.
    it = settled(stage())
    for _ in range(3):
        it.write_some(5)
        it.place.kill("agent")
        it.write_some(20)  # the guest goes on
        it.sample()
        it.start_agent()
        it.write_some(5)
        it.sample()
    it.wait_synced()
    assert it.gaps() == []
    it.check()


@pytest.mark.parametrize("left_bytes", [0, 5000])
def test_frames_that_were_never_durable(stage: MakeStage, left_bytes: int) -> None:
    # Guards the numbers: ``next_number`` in Replica.attach and Outbox._catch_up. With bytes left,
    # the cut in segment recovery: half a frame would be taken for one.
    it = settled(stage())
    replica = it.place.receiver_home / "replicas" / GROUP
    for _ in range(2):
        it.write_some(30)
        it.sample()
        durable = read_durable(replica / FILE_NAME)
        assert durable is not None
        it.place.kill("receiver")
        [segment] = [
            path
            for path in (replica / "segments").glob("*.seg")
            if int(path.stem) == durable.segment_number
        ]
        with segment.open("r+b") as file:  # what came after the last fdatasync is gone
            size = file.seek(0, os.SEEK_END)
            assert size >= durable.segment_bytes
            file.truncate(durable.segment_bytes)
            file.seek(durable.segment_bytes)
            file.write(os.urandom(left_bytes))
        it.write_some(5)
        it.place.start_receiver()
    it.wait_synced()
    assert it.gaps() == []
    it.check()


@as_root
def test_a_full_disk_at_the_receiver(place: Pair, stage: MakeStage) -> None:
    # Guards ``raise`` in Replica.commit: what was not written would be acknowledged.
    with small_file_system(place.receiver_home, 30 * MIB):
        it = settled(stage())
        while it.source_group()["problem"] is None:
            it.wait_ring()
            it.write_some(20)
            it.sample()
        assert "room" in it.source_group()["problem"]
        for _ in range(4):
            it.wait_ring()
            it.write_some(40)
            it.sample()
        acknowledged = int(it.group()["latest_ns"])
        remount = ["mount", "-o", "remount,size=400M", str(place.receiver_home)]
        subprocess.run(remount, check=True)
        it.wait_synced()
        assert it.gaps() == []
        assert acknowledged < it.samples[-1].at_ns
        it.check()
        place.stop("receiver")


@as_root
def test_a_full_disk_at_the_spool(place: Pair, stage: MakeStage) -> None:
    # Guards ``has_room`` in Outbox._spool_item: what finds no room must wait in the ring, and there
    # the gap is seen.
    spool = place.source_home / "source" / "spool"
    it = settled(stage())
    with small_file_system(spool, 6 * MIB):
        place.kill("receiver")
        before = len(it.samples)
        while not it.reader.dropped():
            if it.reader.fill() < 0.9:
                it.sample()
            it.write_some(10)  # each is acknowledged: the guest does not notice
        it.write_some(100)
        place.start_receiver()
        it.wait_synced()
        [(from_ns, _)] = it.gaps()
        assert from_ns > it.samples[-1].at_ns
        assert len(it.samples) > before + 5
        it.write_some(5)
        it.sample()
        it.wait_synced()
        it.check()
        place.stop("agent")
