"""What a replica promises: nothing acknowledged is lost, nothing false is taken in."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from uuid import UUID

import pytest
import xxhash
from replica_workload import (
    DISK,
    DISK_BYTES,
    RING,
    SOURCE,
    START,
    Agent,
    Frame,
    attach,
    columns,
    joined,
    put,
    start,
)

from blockrepl import limits
from blockrepl.errors import DamageError, PeerError, StateError, StorageError
from blockrepl.formats import frame as frames
from blockrepl.formats.frame import Buffer, FrameKind, RecordKind
from blockrepl.formats.marks import ConsistentMark, GapMark, GrowMark, encode_mark
from blockrepl.formats.messages import AttachDisk
from blockrepl.formats.segment import file_name
from blockrepl.model import points
from blockrepl.model.retention import Kept
from blockrepl.model.retention_plan import Decision
from blockrepl.storage.catalog import Catalog, CheckpointRow, GapRow
from blockrepl.storage.durable import read_durable
from blockrepl.storage.files import Files
from blockrepl.storage.history import ReplicaHistory
from blockrepl.storage.replica import Admission, Replica, create_replica, open_replica
from blockrepl.units import MIB


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[tuple[Replica, Agent]]:
    replica, agent = start(tmp_path / "web")
    yield replica, agent
    replica.close()


class FaultyFiles(Files):
    """The system's calls until told to fail; counts the syncs."""

    def __init__(self) -> None:
        self.sync_error = 0
        self.write_error = 0
        self.write_room_bytes = 1 << 60
        self.syncs = 0

    def write(self, descriptor: int, buffers: Sequence[Buffer], offset: int) -> int:
        if self.write_error:
            raise OSError(self.write_error, os.strerror(self.write_error))
        if self.write_room_bytes < sum(len(buffer) for buffer in buffers):
            if not self.write_room_bytes:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            buffers = [bytes(b"".join(buffers))[: self.write_room_bytes]]
        written = super().write(descriptor, buffers, offset)
        self.write_room_bytes -= written
        return written

    def sync(self, descriptor: int) -> None:
        self.syncs += 1
        if self.sync_error:
            raise OSError(self.sync_error, os.strerror(self.sync_error))
        super().sync(descriptor)


def test_frames_are_journaled_as_they_came_with_one_sync(tmp_path: Path) -> None:
    files = FaultyFiles()
    replica, agent = start(tmp_path / "web", files)
    batch = [agent.writes() for _ in range(5)]
    before = files.syncs
    assert put(replica, *batch) == 5
    assert files.syncs == before + 1
    content = (tmp_path / "web" / "segments" / file_name(1)).read_bytes()
    assert content[64:] == b"".join(bytes(frame) for _, frame in batch)
    durable = read_durable(tmp_path / "web" / "durable")
    assert durable is not None
    assert (durable.segment_number, durable.segment_bytes) == (1, len(content))
    assert durable.watermark == agent.stamp
    replica.close()


def test_a_source_goes_on_where_it_was_after_a_restart(tmp_path: Path) -> None:
    replica, agent = start(tmp_path / "web")
    put(replica, agent.writes(3), agent.checkpoint("one"), agent.writes(2))
    replica.close()
    replica, again = start(tmp_path / "web")
    assert (again.number, again.sequence) == (4, 5)
    attached = attach(replica)
    assert attached.disks[0].ring_id == RING
    assert attached.watermark == agent.stamp
    assert put(replica, again.writes()) == 4
    replica.close()


def test_a_source_that_comes_back_is_told_what_is_durable(opened: tuple[Replica, Agent]) -> None:
    replica, agent = opened
    put(replica, agent.writes(3))
    put(replica, agent.writes(2))
    known = attach(replica).disks[0]
    assert (known.ring_id, known.next_sequence) == (RING, 5)
    replica.attach(SOURCE, [])  # taken out, and brought back
    known = attach(replica).disks[0]
    assert (known.ring_id, known.next_sequence) == (RING, 5)


@pytest.mark.parametrize(
    "change",
    [
        lambda replica: replica.shorten(Decision(Kept(), 0)),
        lambda replica: replica.replace_segments([], []),
    ],
)
def test_retention_does_not_forget_how_far_a_ring_has_come(
    opened: tuple[Replica, Agent], change: Callable[[Replica], object]
) -> None:
    # Guards Replica._with_newest_position: the source would take it for a loss, and make a gap.
    replica, agent = opened
    put(replica, agent.consistent(), agent.writes())
    put(replica, agent.writes())  # the catalog hears of it with the next mark or segment
    change(replica)
    assert attach(replica).disks[0].next_sequence == agent.sequence


@pytest.mark.parametrize("skew_ns", [-(10**12), 10**12])
def test_a_disk_is_gone_right_after_its_last_durable_instant_whatever_our_clock_says(
    tmp_path: Path, skew_ns: int
) -> None:
    create_replica(tmp_path / "web", "web")
    replica = open_replica(tmp_path / "web", clock=lambda: START + skew_ns)
    agent = Agent.after(attach(replica))
    put(replica, agent.writes(), agent.consistent(), agent.writes())
    replica.attach(SOURCE, [])
    (row,) = replica.catalog.disks(removed=True)
    assert row.removed_ns == agent.stamp + 1
    attach(replica)
    assert replica.catalog.gaps() == [GapRow(DISK.bytes, agent.stamp + 1, None)]
    replica.close()


def test_duplicates_are_dropped_and_holes_refused(opened: tuple[Replica, Agent]) -> None:
    replica, agent = opened
    first, second, third = agent.writes(), agent.writes(), agent.writes()
    put(replica, first)
    size = replica.status().journal_bytes
    assert replica.append(SOURCE, *first) is Admission.DUPLICATE
    with pytest.raises(PeerError, match="frame 3 came where 2 was due"):
        replica.append(SOURCE, *third)
    replica.commit()
    assert replica.status().journal_bytes == size
    assert put(replica, second, third) == 3


def _tampered(frame: Frame) -> Frame:
    header, data = frame
    changed = bytearray(data)
    changed[-1] ^= 1
    return header, memoryview(bytes(changed))


def _sent(agent: Agent, **fields: object) -> Frame:
    header, data = agent.writes()
    changed = replace(header, **fields)  # type: ignore[arg-type]
    return changed, memoryview(frames.encode_header(changed) + bytes(data[frames.HEADER_BYTES :]))


def _noise(frame: Frame) -> Frame:
    """A frame of one block, now no LZ4; the digests are right."""
    header, data = frame
    changed = bytearray(data[frames.HEADER_BYTES :])
    columns_bytes = header.record_count * frames.RECORD_BYTES
    block = b"\xff" * (len(changed) - header.blocks_offset)
    changed[header.blocks_offset :] = block
    struct.pack_into("<Q", changed, columns_bytes, xxhash.xxh3_64_intdigest(block))
    digest = xxhash.xxh3_64_intdigest(changed[: header.blocks_offset])
    header = replace(header, digest=digest)
    return header, memoryview(frames.encode_header(header) + changed)


FALSE_FRAMES: dict[str, Callable[[Agent], Frame]] = {
    "a flipped payload byte": lambda a: _tampered(a.writes()),
    "another group": lambda a: _sent(a, group=b"g" * 16),
    "another source": lambda a: _sent(a, source=b"g" * 16),
    "an unknown disk": lambda a: _sent(a, disk=b"g" * 16),
    "number zero": lambda a: _sent(a, number=0),
    "a huge watermark": lambda a: _sent(a, watermark=1 << 63),
    "a huge sequence": lambda a: _sent(a, first_sequence=(1 << 63) - 1),
    "bytes behind the frame": lambda a: (
        (f := a.writes())[0],
        memoryview(bytes(f[1]) + b"x"),
    ),
    "a record beyond the end": lambda a: a.records(
        [(START + 1, DISK_BYTES - 512, 1024, 0)], bytes(1024)
    ),
    "an offset that wraps around": lambda a: a.records(
        [(START + 1, (1 << 64) - 512, 1024, 0)], bytes(1024)
    ),
    "an unknown record kind": lambda a: a.records([(START + 1, 0, 512, 9)], b""),
    "a base frame beyond the end": lambda a: a.base(DISK_BYTES, bytes(512)),
    # Guards check_payload in admission.check_content: the commit failed, for all its sources.
    "a base frame that does not decompress": lambda a: _noise(a.base(0, bytes(65536))),
    # So does this: nothing of the group was folded any more from its segment on.
    "a record that does not decompress": lambda a: _noise(
        a.records([(START + 5000, 0, 65536, 0)], bytes(65536))
    ),
    "a gap of an unknown disk": lambda a: Agent(a.group, disk=UUID(int=99), number=a.number).gap(),
}


@pytest.mark.parametrize("fault", FALSE_FRAMES)
def test_a_false_frame_is_its_senders_fault_alone(
    opened: tuple[Replica, Agent], fault: str
) -> None:
    replica, agent = opened
    good = agent.writes()
    assert replica.append(SOURCE, *good) is Admission.STAGED
    with pytest.raises(PeerError):
        replica.append(SOURCE, *FALSE_FRAMES[fault](agent))
    assert replica.commit().numbers[SOURCE] == 1
    assert replica.error is None


def test_two_sources_share_a_group_and_its_watermark_is_the_lesser(
    opened: tuple[Replica, Agent],
) -> None:
    replica, first = opened
    put(replica, first.writes())
    other_id = b"o" * 16
    attached = attach(replica, source=other_id, disk=UUID(int=8), name="data")
    other = Agent.after(attached, other_id)
    assert replica.commit().watermark == first.stamp  # a newcomer takes nothing back
    put(replica, first.writes(50))
    assert replica.commit().watermark < first.stamp
    other.stamp = first.stamp - 500
    assert put(replica, other.writes(0)) == 1
    assert replica.commit().watermark == first.stamp - 500
    with pytest.raises(PeerError):
        replica.append(other_id, *Agent(other.group, other_id, DISK, number=2).writes())


def test_a_first_sync_fills_a_sparse_base_and_ends_with_the_floor(tmp_path: Path) -> None:
    replica, agent = start(tmp_path / "web")
    image = tmp_path / "web" / "base" / "root.img"
    assert (image.stat().st_size, image.stat().st_blocks) == (DISK_BYTES, 0)
    data = os.urandom(MIB)
    put(replica, agent.base(3 * MIB, data))
    put(replica, agent.base(5 * MIB, b"", RecordKind.ZERO))
    assert image.stat().st_blocks * 512 <= MIB + 64 * 1024
    agent.stamp += 1
    put(replica, agent.consistent())
    assert replica.append(SOURCE, *agent.base(3 * MIB, bytes(MIB))) is Admission.DUPLICATE
    replica.commit()
    content = image.read_bytes()
    assert content == bytes(3 * MIB) + data + bytes(DISK_BYTES - 4 * MIB)
    assert replica.status().disks[0].ready_ns == agent.stamp
    assert attach(replica).disks[0].state == "ready"
    put(replica, agent.gap())
    assert attach(replica).disks[0].state == "gap"
    assert attach(replica).disks[0].epoch == 2
    replica.close()


def test_a_base_image_is_durable_before_the_mark_that_ends_its_first_sync(tmp_path: Path) -> None:
    # Guards _write_base's "seeded": content that a comparison found in place came in no frame.
    files = FaultyFiles()
    replica, agent = start(tmp_path / "web", files)
    with (tmp_path / "web" / "base" / "root.img").open("r+b") as image:
        image.write(b"seed")
    before = files.syncs
    put(replica, agent.consistent())
    assert files.syncs == before + 2  # of the image, then of the segment
    put(replica, agent.gap(), agent.consistent())
    assert files.syncs == before + 3
    replica.close()


def test_what_a_full_disk_left_in_a_base_image_is_durable_with_the_next_frame(
    tmp_path: Path,
) -> None:
    # Guards _write_base's sync of every image: a comparison finds in place what a commit wrote
    # before it found no room, and the source lets go of it with the next numbered frame.
    files = FaultyFiles()
    replica, agent = start(tmp_path / "web", files)
    files.write_room_bytes = 4096
    replica.append(SOURCE, *agent.base(0, os.urandom(MIB)))
    with pytest.raises(StorageError) as failed:
        replica.commit()
    assert failed.value.code == "full"
    files.write_room_bytes = 1 << 60
    attach(replica)
    before = files.syncs
    put(replica, agent.writes())
    assert files.syncs == before + 2  # of the image, then of the segment
    put(replica, agent.writes())
    assert files.syncs == before + 3
    replica.close()


def test_a_base_image_is_called_blank_until_anything_is_in_it(tmp_path: Path) -> None:
    replica, agent = start(tmp_path / "web")
    assert attach(replica).disks[0].blank
    put(replica, agent.base(0, b"x" * 4096))
    assert not attach(replica).disks[0].blank
    put(replica, agent.base(0, b"", RecordKind.ZERO), agent.consistent())
    assert not attach(replica).disks[0].blank  # it has a history
    replica.close()


def test_proofs_are_written_when_a_replica_is_closed(tmp_path: Path) -> None:
    replica, agent = start(tmp_path / "web")
    put(replica, agent.consistent())
    replica.proofs.prove(DISK.bytes, DISK_BYTES, 0, DISK_BYTES, 5)
    replica.close()
    replica, _ = start(tmp_path / "web")
    assert replica.proofs.proven(DISK.bytes, DISK_BYTES).is_whole
    replica.close()


def test_a_repeated_first_sync_punches_what_became_zero(opened: tuple[Replica, Agent]) -> None:
    replica, agent = opened
    image = replica.directory / "base" / "root.img"
    put(replica, agent.base(0, os.urandom(MIB)))
    put(replica, agent.base(0, b"", RecordKind.ZERO))
    assert image.stat().st_blocks == 0


def test_content_of_a_resync_is_taken_for_a_gap_only(opened: tuple[Replica, Agent]) -> None:
    # Guards _check_news' look at SYNC frames: their stamps would rewrite what was there before.
    replica, agent = opened
    put(replica, agent.writes(), agent.consistent(), agent.writes())
    agent.stamp += 1000

    def resync(stamp: int) -> Frame:
        rows = columns([(stamp, 0, 4096, int(RecordKind.WRITE))])
        header, frame = agent._frame(FrameKind.SYNC, rows, b"s" * 4096)
        agent.number -= 1  # for the next one
        return header, frame

    for stamp in (START + 1, agent.stamp, agent.stamp + 1000):
        with pytest.raises(PeerError, match="no gap"):
            replica.append(SOURCE, *resync(stamp))
    gap = agent.gap()
    assert replica.append(SOURCE, *gap) is Admission.STAGED
    with pytest.raises(PeerError, match="no gap"):
        replica.append(SOURCE, *resync(agent.stamp - 1))
    assert replica.append(SOURCE, *resync(agent.stamp)) is Admission.STAGED
    agent.number += 1
    replica.commit()
    with pytest.raises(PeerError, match="no gap"):
        replica.append(SOURCE, *resync(agent.stamp - 1))
    put(replica, resync(agent.stamp))
    agent.number += 1
    put(replica, agent.consistent())
    with pytest.raises(PeerError, match="no gap"):
        replica.append(SOURCE, *resync(agent.stamp))


@pytest.mark.parametrize("replayed", [False, True])
def test_a_gap_takes_no_instant_that_can_be_reached(tmp_path: Path, replayed: bool) -> None:
    # Guards rule 8 of admission.py: the marks of a source that was taken over hid all there was.
    replica, agent = start(tmp_path / "web")
    put(replica, agent.consistent(), agent.writes())
    shutil.copytree(tmp_path / "web", tmp_path / "old")
    reached = agent.stamp
    put(replica, agent._mark(encode_mark(GapMark(disk=DISK, from_ns=0))))
    agent.stamp += 5
    put(replica, agent._mark(encode_mark(ConsistentMark(disk=DISK, at_ns=1 << 62))))
    end = agent.stamp
    agent.stamp += 5
    put(replica, agent._mark(encode_mark(GapMark(disk=DISK, from_ns=START))))
    put(replica, agent._mark(encode_mark(ConsistentMark(disk=DISK, at_ns=START))))
    if replayed:
        _crash(replica)
        shutil.copytree(tmp_path / "web" / "segments", tmp_path / "old" / "segments",
                        dirs_exist_ok=True)  # fmt: skip
        replica, _ = start(tmp_path / "old")
    gaps = [GapRow(DISK.bytes, reached + 1, end), GapRow(DISK.bytes, end + 1, end + 5)]
    assert replica.catalog.gaps() == gaps
    replica.close()


def test_a_source_that_joins_takes_no_instant_of_the_others(opened: tuple[Replica, Agent]) -> None:
    # Guards `bounded` and begin_gap: a floor and a gap in the past hid what others had long before.
    replica, agent = opened
    put(replica, agent.consistent(), agent.writes())
    reached = replica.status().watermark
    joined, disk = bytes([1] * 16), UUID(int=8)
    replica.attach(joined, [AttachDisk(id=disk, name="data", size_bytes=DISK_BYTES)])
    other = Agent(agent.group, joined, disk, stamp=5)
    put(replica, other.consistent(), other.gap())
    assert replica.catalog.gaps() == [GapRow(disk.bytes, reached + 2, None)]
    assert [row.ready_ns for row in replica.catalog.disks()] == [reached + 1, START]


def test_a_mark_moves_no_ring_of_another_source(opened: tuple[Replica, Agent]) -> None:
    # Guards "or header.ring_id" in admission.check_header: the agent would send records again.
    replica, agent = opened
    put(replica, agent.consistent(), agent.writes())
    joined, own = bytes([1] * 16), UUID(int=8)
    replica.attach(joined, [AttachDisk(id=own, name="data", size_bytes=DISK_BYTES)])
    forger = Agent(agent.group, joined, agent.disk, stamp=agent.stamp)
    mark = encode_mark(ConsistentMark(disk=own, at_ns=agent.stamp))
    forged = forger._frame(FrameKind.MARK, None, mark, ring_id=RING, sequence=0)
    with pytest.raises(PeerError, match="has not attached"):
        put(replica, forged)
    assert attach(replica).disks[0].next_sequence == agent.sequence


def test_a_disk_that_grows_waits_for_the_proofs_before_it_takes_the_catalog(
    opened: tuple[Replica, Agent],
) -> None:
    # Guards _write_catalog's proofs.lock: whoever held it and asked the catalog waited for ever.
    replica, agent = opened
    put(replica, agent.consistent())
    mark = GrowMark(disk=DISK, at_ns=agent.stamp + 1, size_bytes=DISK_BYTES + MIB)
    with replica.proofs.lock:
        growing = threading.Thread(target=put, args=(replica, agent._mark(encode_mark(mark))))
        growing.start()
        growing.join(0.2)
        asked = threading.Thread(target=replica.catalog.disks, daemon=True)
        asked.start()
        asked.join(5)
        assert growing.is_alive()
        assert not asked.is_alive()
    growing.join(5)
    assert replica.status().disks[0].size_bytes == DISK_BYTES + MIB


def test_marks_are_applied_once_although_they_are_replayed(tmp_path: Path) -> None:
    replica, agent = start(tmp_path / "web")
    put(replica, agent.consistent(), agent.checkpoint("a"), agent.checkpoint("b"))
    older = agent.stamp
    put(replica, agent.checkpoint("a", kept=True))
    agent.stamp += 5
    put(replica, agent.gap())
    assert replica.catalog.remove_checkpoint("b")
    _crash(replica)
    replica, _ = start(tmp_path / "web")
    assert replica.catalog.checkpoints() == [CheckpointRow("a", older, "crash", False)]
    assert replica.catalog.gaps() == [GapRow(DISK.bytes, older + 5, None)]
    assert replica.catalog.disks()[0].epoch == 2
    replica.close()


def _crash(replica: Replica) -> None:
    """Leave as a killed process would: nothing is written any more."""
    replica._journal.close()
    replica.catalog.close()


def test_marks_that_the_catalog_has_not_seen_are_replayed(tmp_path: Path) -> None:
    replica, agent = start(tmp_path / "web")
    shutil.copytree(tmp_path / "web", tmp_path / "old")
    put(replica, agent.consistent(), agent.writes(), agent.checkpoint("a"))
    _crash(replica)
    # The crash came between the journal's sync and the catalog's commit.
    shutil.copytree(tmp_path / "web" / "segments", tmp_path / "old" / "segments",
                    dirs_exist_ok=True)  # fmt: skip
    replica, again = start(tmp_path / "old")
    assert again.number == 4
    assert [row.name for row in replica.catalog.checkpoints()] == ["a"]
    assert replica.status().disks[0].ready_ns == START
    replica.close()


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_a_failed_sync_acknowledges_nothing_and_stops_for_good(tmp_path: Path, code: int) -> None:
    files = FaultyFiles()
    replica, agent = start(tmp_path / "web", files)
    put(replica, agent.writes())
    replica.append(SOURCE, *agent.writes())
    files.sync_error = code
    with pytest.raises(StorageError) as failed:
        replica.commit()
    assert failed.value.code == "fail-stop"
    files.sync_error = 0
    for attempt in (replica.commit, lambda: attach(replica)):
        with pytest.raises(StorageError):
            attempt()
    durable = read_durable(tmp_path / "web" / "durable")
    size = (tmp_path / "web" / "segments" / file_name(1)).stat().st_size
    assert durable is not None
    assert durable.segment_bytes < size
    replica.close()
    replica, again = start(tmp_path / "web")
    assert again.number in {2, 3}
    assert put(replica, again.writes()) == again.number - 1
    replica.close()


@pytest.mark.parametrize("room_bytes", [0, 1, 100, 5000])
def test_a_full_disk_acknowledges_nothing_and_goes_on_when_there_is_room(
    tmp_path: Path, room_bytes: int
) -> None:
    files = FaultyFiles()
    replica, agent = start(tmp_path / "web", files)
    put(replica, agent.writes())
    size = (tmp_path / "web" / "segments" / file_name(1)).stat().st_size
    first, second = agent.writes(), agent.writes()
    files.write_room_bytes = room_bytes
    replica.append(SOURCE, *first)
    replica.append(SOURCE, *second)
    with pytest.raises(StorageError) as failed:
        replica.commit()
    assert failed.value.code == "full"
    assert replica.status().error is failed.value
    assert (tmp_path / "web" / "segments" / file_name(1)).stat().st_size == size
    assert attach(replica).next_number == 2
    replica.commit()  # of nothing: what its sessions sent meanwhile is not looked at
    assert replica.status().error is failed.value
    files.write_room_bytes = 1 << 60
    assert put(replica, first, second) == 3
    assert replica.error is None
    replica.close()
    replica, again = start(tmp_path / "web")
    assert again.number == 4
    replica.close()


def test_retention_publishes_no_instant_past_a_gap_that_the_catalog_lacks(
    opened: tuple[Replica, Agent], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Guards the catalog's turn in _publish: a point within the gap was offered.
    replica, agent = opened
    put(replica, agent.consistent(), agent.writes())
    reached = agent.stamp

    def no_room(*_: object) -> None:
        raise StorageError("no space", code="full")

    with monkeypatch.context() as full:
        full.setattr(replica.catalog, "set_position", no_room)
        with pytest.raises(StorageError):
            put(replica, agent.gap(), agent.writes())
    replica.replace_segments([], [])  # the source is gone, and there is room again
    with ReplicaHistory(replica.directory) as history:
        state = history.state()
        assert state.latest_ns > reached
        assert [gap.from_ns for gap in state.gaps] == [reached + 1]
        assert points.nearest(history.history(state), state.latest_ns)[0] == reached


def test_a_failed_write_is_fail_stop(tmp_path: Path) -> None:
    files = FaultyFiles()
    replica, agent = start(tmp_path / "web", files)
    replica.append(SOURCE, *agent.writes())
    files.write_error = errno.EIO
    with pytest.raises(StorageError) as failed:
        replica.commit()
    assert failed.value.code == "fail-stop"
    replica.close()


def test_a_file_size_limit_of_the_system_counts_as_a_full_disk(tmp_path: Path) -> None:
    replica, agent = start(tmp_path / "web")
    put(replica, agent.writes())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    first = agent.writes(64)
    replica.append(SOURCE, *first)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        with pytest.raises(StorageError) as failed:
            replica.commit()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert failed.value.code == "full"
    assert put(replica, first) == 2
    replica.close()


def test_full_segments_are_sealed_beside_the_stream_and_recovered_when_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "SEGMENT_BYTES_TARGET", 100_000)
    replica, agent = start(tmp_path / "web")
    for _ in range(20):
        put(replica, agent.writes(8))
    rows = {row.number: row for row in replica.catalog.segments()}
    assert len(rows) >= 5
    replica.close()
    catalog = Catalog.open_readonly(tmp_path / "web" / "catalog.sqlite")
    rows = {row.number: row for row in catalog.segments()}
    catalog.close()
    assert [row.sealed for row in rows.values()] == [True] * (len(rows) - 1) + [False]
    assert sum(row.frames for row in rows.values()) == 20
    files = {p.name: p.stat().st_size for p in (tmp_path / "web" / "segments").iterdir()}
    assert files == {file_name(number): row.bytes for number, row in rows.items()}
    assert all(rows[n].last_stamp < rows[n + 1].first_stamp for n in range(1, len(rows)))
    replica, again = start(tmp_path / "web")
    assert again.number == 21
    assert replica.status().journal_bytes == sum(files.values())
    replica.close()


KILLED_WRITER = """
import sys
from pathlib import Path
from blockrepl import limits
limits.SEGMENT_BYTES_TARGET = 300_000
from replica_workload import put, start
replica, agent = start(Path(sys.argv[1]))
while True:
    batch = [agent.writes(agent.random.randrange(1, 9)), agent.checkpoint(f"c{agent.number}")]
    print(put(replica, *batch), agent.sequence, flush=True)
"""


@pytest.mark.parametrize("acknowledgements", [1, 17, 60])
def test_a_killed_writer_loses_nothing_acknowledged(tmp_path: Path, acknowledgements: int) -> None:
    writer = subprocess.Popen(
        [sys.executable, "-c", KILLED_WRITER, str(tmp_path / "web")],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parent,
    )
    with writer:
        assert writer.stdout is not None
        for _ in range(acknowledgements):
            line = writer.stdout.readline()
        writer.send_signal(signal.SIGKILL)
        number, sequence = map(int, (writer.stdout.read().splitlines() or [line])[-1].split())
    replica, again = start(tmp_path / "web")
    assert again.number > number
    assert again.sequence >= sequence
    assert len(replica.catalog.checkpoints()) == (again.number - 1) // 2
    put(replica, again.writes())
    replica.close()


def test_disks_that_do_not_fit_are_refused_and_change_nothing(
    opened: tuple[Replica, Agent],
) -> None:
    replica, agent = opened
    faults: list[Callable[[], object]] = [
        lambda: attach(replica, disk=UUID(int=8)),
        lambda: attach(replica, name="other"),
        lambda: attach(replica, size_bytes=DISK_BYTES - 512),
        lambda: attach(replica, source=b"x" * 16),
    ]
    for refused in faults:
        with pytest.raises(StateError) as error:
            refused()
        assert error.value.code.startswith("disk-")
    assert [row.name for row in replica.catalog.disks(removed=True)] == ["root"]
    # Guards the order in Replica.attach: a source that was refused stopped the others' commits.
    assert put(replica, agent.writes()) == 1


def test_a_retired_disk_keeps_its_history_and_comes_back_with_a_gap(
    opened: tuple[Replica, Agent],
) -> None:
    replica, agent = opened
    put(replica, agent.consistent())
    attach(replica, disk=UUID(int=8), name="data")
    assert [row.name for row in replica.catalog.disks()] == ["data"]
    with pytest.raises(PeerError):
        replica.append(SOURCE, *agent.writes())
    assert attach(replica).disks[0].state == "gap"


def test_a_replica_without_its_catalog_is_refused_clearly(tmp_path: Path) -> None:
    replica, agent = start(tmp_path / "web")
    put(replica, agent.writes())
    replica.close()
    (tmp_path / "web" / "catalog.sqlite").unlink()
    for attempt in (lambda: create_replica(tmp_path / "web", "web"),
                    lambda: open_replica(tmp_path / "web")):  # fmt: skip
        with pytest.raises(DamageError, match=r"catalog\.sqlite is missing") as error:
            attempt()
        assert error.value.hint


def test_an_idle_frame_without_records_moves_the_watermark(opened: tuple[Replica, Agent]) -> None:
    replica, agent = opened
    agent.stamp += 77
    frame = frames.encode_frame(
        kind=FrameKind.RECORDS, group=agent.group, source=SOURCE, number=1, watermark=agent.stamp,
        columns=columns([]),
    )  # fmt: skip
    put(replica, joined(frame))
    assert replica.status().watermark == agent.stamp
