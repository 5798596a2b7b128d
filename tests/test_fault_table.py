"""The design's fault table, a test per row, with the real services: what dies, what is left behind,
what happens on restart. After each, the replica is the source's disk, and what was promised of its
history is there. Each test is red without the line that it names.

=================================  =================================================
row                                test
=================================  =================================================
hot mark, before the local write   test_a_write_that_never_reached_the_disk
local write, before the append     test_a_write_that_reached_the_disk_and_not_the_ring
the NBD server, ring intact        test_a_server_that_is_killed
the source host (power)            test_a_source_that_loses_its_power
the agent                          test_an_agent_that_is_killed
the network, beyond the spool      test_outage.py
the receiver, before fdatasync     test_frames_that_were_never_acknowledged
the receiver, torn tail            test_half_a_frame_at_the_end_of_the_journal
fold, half way                     test_thinning.py: a fold that broke off half way;
                                   test_retention_service.py: a fold that a crash cut off
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
from dataclasses import replace
from pathlib import Path

import pytest
from lossy.disk import LossyDisk, When, lossy_disk
from lossy.nodes import Loss
from outage import BLOCK, GROUP, Stage
from ring_writer import RingWriter
from serving import as_root, place, stale_regions, wait_for

from blockrepl.formats import frame as frames
from blockrepl.formats import segment as segments
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
    # Guards ``stale[...] = 1`` in RingReader.recover_in_flight (storage/ring.py): nobody would look
    # at the region.
    it = settled(stage())
    sent_before = it.source_group()["sent_bytes"]
    it.place.kill("receiver")  # else the comparison may be over before it is seen
    RingWriter(it.disk.ring).take_range(0, MIB, MIB + BLOCK)  # its slot is taken, its region hot
    it.disk.kill()
    wait_for(lambda: stale_regions(it.reader) == [1], "what was in flight is to be compared")
    it.place.start_receiver()
    it.wait_synced()
    assert len(it.gaps()) == 1
    assert it.source_group()["disks"][0]["to_sync_bytes"] == 0
    assert it.source_group()["sent_bytes"] - sent_before < BLOCK  # nothing differs
    it.check()


def test_a_write_that_reached_the_disk_and_not_the_ring(stage: MakeStage) -> None:
    # Guards the same line: the replica would never hear of the write.
    it = settled(stage())
    RingWriter(it.disk.ring).take_range(0, 3 * MIB, 3 * MIB + BLOCK)
    data = os.urandom(BLOCK)
    with it.disk.image.open("r+b") as image:
        image.seek(3 * MIB)
        image.write(data)
    it.content[3 * MIB : 3 * MIB + BLOCK] = data
    it.disk.kill()
    wait_for(lambda: bool(it.gaps()), "what was in flight is compared")
    it.wait_synced()
    it.check()


def test_a_server_that_is_killed(stage: MakeStage) -> None:
    # Guards ``has_ring`` in SourceDisks.ensure_ring (storage/source.py): a new ring would hold
    # none of the records.
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
    # Guards ``stale=self.hot_regions(entry)`` in SourceDisks.ensure_ring (storage/source.py): the
    # replica would stay ahead of the disk. And ``_gap_before_ring = watermark + 1`` in
    # SourceDisk._resume (services/source_disk.py).
    it = settled(stage())
    it.client.flush()
    on_disk = it.disk.content()
    it.sample()
    it.write_some(20)
    it.sample()
    it.wait_synced()  # the replica has what the disk is about to lose
    # Until then the agent compares everything, and the hot map is not what is tested.
    wait_for(lambda: not it.disk.disks.load("d1").stale_ring, "the sync's end is noted")
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
    # Guards ``self.cursor = cursor`` in SourceDisk._resume (services/source_disk.py): records would
    # be missing, or come twice.
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


@as_root
@pytest.mark.parametrize("when", ["before", "after"])
def test_frames_that_were_never_acknowledged(place: Pair, stage: MakeStage, when: When) -> None:
    # Before the fdatasync, guards ``chain`` in OutboxMemory.restart (services/outbox_memory.py):
    # what was sent once would not be sent again. After it, the loop of Outbox._catch_up
    # (services/outbox.py): nothing would know that the receiver has the frames.
    with lossy_disk(place.receiver_home) as lossy:
        it = settled(stage())
        lose_receiver(it, lossy, when)
        it.write_some(5)
        place.start_receiver()
        it.wait_synced()
        assert it.gaps() == []
        it.check()
        place.stop("receiver")


@as_root
def test_half_a_frame_at_the_end_of_the_journal(place: Pair, stage: MakeStage) -> None:
    # Guards ``check_body`` in _scan (storage/segment_recovery.py): half a frame would be taken for
    # one.
    with lossy_disk(place.receiver_home) as lossy:
        it = settled(stage())
        lose_receiver(it, lossy, "before")
        with newest_segment(it).open("r+b") as file:
            file.seek(0, os.SEEK_END)
            file.write(half_of_the_next_frame(newest_segment(it).read_bytes()))
        place.start_receiver()
        it.wait_synced()
        assert it.gaps() == []
        it.check()
        place.stop("receiver")


def lose_receiver(it: Stage, lossy: LossyDisk, when: When) -> None:
    """Its machine goes down while it makes frames durable, of which it acknowledges none."""
    it.write_some(30)
    it.sample()
    it.wait_synced()
    lossy.lose_power_at(1, when, of=".seg")
    it.write_some(5)
    it.sample()
    log = it.place.directory / "receiver.log"
    wait_for(lambda: "nothing was acknowledged: cannot write" in log.read_text(), "the power loss")
    it.place.kill("receiver")
    lossy.restore(Loss.DROP)


def newest_segment(it: Stage) -> Path:
    return max((it.place.receiver_home / "replicas" / GROUP / "segments").glob("*.seg"))


def half_of_the_next_frame(segment: bytes) -> bytes:
    """A frame that is due behind a segment's last, but for the end of its body."""
    at, model, header = segments.HEADER_BYTES, b"", None
    while at < len(segment):
        header = frames.decode_header(segment[at : at + frames.HEADER_BYTES])
        if header.record_count:
            model = segment[at : at + header.frame_bytes]
        at += header.frame_bytes
    assert header is not None
    due = replace(frames.decode_header(model[: frames.HEADER_BYTES]), number=header.number + 1)
    return frames.encode_header(due) + model[frames.HEADER_BYTES : len(model) // 2]


@as_root
def test_a_full_disk_at_the_receiver(place: Pair, stage: MakeStage) -> None:
    # Guards ``raise`` in Replica.commit (storage/replica.py): what was not written would be
    # acknowledged.
    with small_file_system(place.receiver_home, 30 * MIB):
        it = settled(stage())
        while (problem := it.source_group()["problem"]) is None:
            it.wait_ring()
            it.write_some(20)
            it.sample()
        assert "room" in problem
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
    # Guards ``has_room`` in Outbox._spool_items (services/outbox.py): the spool would take the room
    # that is left to others. And ``return 0`` there: what finds no room must wait in the ring,
    # where the gap is seen.
    spool = place.source_home / "source" / "spool"
    it = settled(stage(spool_reserve="1M"))
    with small_file_system(spool, 6 * MIB):
        place.kill("receiver")
        before = len(it.samples)
        while not it.reader.dropped():
            if it.reader.fill() < 0.9:
                it.sample()
            it.write_some(10)  # each is acknowledged: the guest does not notice
        it.write_some(100)
        left = os.statvfs(spool)
        assert left.f_bavail * left.f_frsize >= MIB
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
