"""A source with real images and rings, a guest, and a receiver that writes down what it is sent."""

from __future__ import annotations

import os
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal
from uuid import UUID

import numpy as np
import trio
from ring_writer import RingWriter

from blockrepl import limits
from blockrepl.formats import frame as frames
from blockrepl.formats import hot_map
from blockrepl.formats.comparison import DIGEST_BYTES, Compare, Verdict, decode_compare
from blockrepl.formats.frame import FrameHeader, FrameKind, RecordKind
from blockrepl.formats.marks import CheckpointMark, ConsistentMark, GapMark, Mark, decode_mark
from blockrepl.formats.messages import AttachDisk, Attached, AttachedDisk, MessageType
from blockrepl.services.group_pump import GroupPump
from blockrepl.services.outbox_ends import Take
from blockrepl.services.source_disk import SourceDisk
from blockrepl.session.known import Known
from blockrepl.storage.clock import open_clock
from blockrepl.storage.digests import digest_blocks
from blockrepl.storage.home import Home, write_atomically
from blockrepl.storage.ring import read_geometry, ring_path
from blockrepl.storage.source import DiskEntry, SourceDisks
from blockrepl.storage.spool import Spool, SpoolLimits

SOURCE, REPLICA = bytes(range(16)), UUID(int=99)
PATIENCE_SECONDS = 20.0
DiskState = Literal["empty", "ready", "gap"]
Record = tuple[int, int, int, int]  # stamp, offset, length, kind


@dataclass(frozen=True)
class Received:
    header: FrameHeader
    records: list[Record]
    payload: bytes
    mark: Mark | None


@dataclass
class Receiver:
    """Proves each frame as it comes. Acknowledges at once, or when told."""

    pump: GroupPump | None = None
    at_once: bool = True
    frames: list[Received] = field(default_factory=list)
    earlier: int = 0  # frames of sessions before this one
    compared: list[Compare] = field(default_factory=list)
    arrived: Callable[[Received], None] | None = None
    answer: Callable[[Compare], None] | None = None  # takes comparisons instead
    before: dict[bytes, bytes] = field(default_factory=dict)  # what it held before the first frame

    async def send(self, message: MessageType, size_bytes: int, take: Take) -> None:
        data = b"".join(bytes(buffer) for buffer in take())
        if message is MessageType.COMPARE:
            self.compare(decode_compare(data))
            return
        header = frames.decode_header(data)
        body = data[frames.HEADER_BYTES :]
        frames.check_body(header, body)
        found = frames.parse_columns(header, body)
        rows = zip(found.stamps, found.offsets, found.lengths, found.kinds, strict=True)
        payload = frames.decode_payload(header, body)
        received = Received(
            header,
            [(int(a), int(b), int(c), int(d)) for a, b, c, d in rows],
            payload,
            decode_mark(payload) if header.kind == FrameKind.MARK else None,
        )
        self.frames.append(received)
        if self.arrived is not None:
            self.arrived(received)
        if self.at_once:
            self.acknowledge()
        await trio.lowlevel.checkpoint()

    def acknowledge(self, count: int | None = None) -> None:
        """The first ``count`` messages are durable; without it, all that came."""
        assert self.pump is not None
        count = len(self.frames) if count is None else count
        number = max((frame.header.number for frame in self.frames[:count]), default=0)
        self.pump.outbox.acknowledged(count - self.earlier, number)

    def compare(self, compare: Compare) -> None:
        """Answer as it is asked: what was received up to the stamp against the digests."""
        assert self.pump is not None
        if self.answer is not None:
            self.answer(compare)
            return
        self.compared.append(compare)
        end = compare.offset + compare.length
        before = self.before.get(compare.disk, b"")
        content = replay(self.frames, compare.disk, end, compare.stamp, before=before)
        content = content[compare.offset :]
        mine, size = digest_blocks(content), DIGEST_BYTES
        differing = tuple(
            block
            for block in range(compare.block_count)
            if mine[block * size : (block + 1) * size]
            != compare.digests[block * size : (block + 1) * size]
        )
        verdict = Verdict(compare.group, compare.token, compare.block_count, differing)
        self.pump.verdict(verdict)

    def of(self, kind: FrameKind) -> list[Received]:
        return [frame for frame in self.frames if frame.header.kind == kind]

    def marks(self) -> list[Mark]:
        return [frame.mark for frame in self.frames if frame.mark is not None]

    def records(self, disk: bytes) -> list[Record]:
        return [
            record
            for frame in self.of(FrameKind.RECORDS)
            if frame.header.disk == disk
            for record in frame.records
        ]

    def watermark(self) -> int:
        return max((frame.header.watermark for frame in self.frames), default=0)


class Guest:
    """Writes to an image and into its ring as capture does."""

    def __init__(self, entry: DiskEntry) -> None:
        self.image = os.open(entry.image, os.O_RDWR)
        self.writer = RingWriter(ring_path(entry.id.bytes))

    def write(self, offset: int, data: bytes, *, kept: bool = True, slot: int = 0) -> int:
        """A write whose record finds room, or not; its stamp."""
        self.writer.take_range(slot, offset, offset + len(data))
        os.pwrite(self.image, data, offset)
        stamp = self.writer.write(offset, data) if kept else self.writer.drop(offset, len(data))
        self.writer.release_range(slot)
        return stamp

    def close(self) -> None:
        os.close(self.image)


class Source:
    """A home with disks in one group."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        home = Home.create(directory / "home")
        home.source_directory.mkdir()
        self.disks = SourceDisks(home)
        self.clock = open_clock(home.source_directory)
        self.guests: list[Guest] = []
        self.watermark = self.clock.now()  # durable at the receiver

    def end_lease(self, left_ns: int = 0) -> None:
        """The clock's lease runs out, or will in ``left_ns``."""
        mark = {"high_water_ns": self.clock.now() + left_ns}
        self.clock._content = self.clock._content.model_copy(update=mark)

    def add(
        self,
        name: str,
        size_bytes: int,
        *,
        hot: bool = False,
        content: bytes = b"",
        bound: bool = True,
        ring_bytes: int = limits.RING_BYTES_MIN,
    ) -> DiskEntry:
        """A disk with a ring; its regions all hot or all cold."""
        entry = self.disks.add(
            name,
            self.directory / f"{name}.img",
            "web",
            create_bytes=size_bytes,
            ring_bytes=ring_bytes,
        )
        with entry.image.open("r+b") as file:
            file.write(content)
        data = hot_map.encode(entry.id.bytes, size_bytes, limits.REGION_BYTES, hot=hot)
        self.disks.hot_map_path(entry).write_bytes(data)
        if bound:
            entry = self.disks.bind_replica(entry, REPLICA)
        self.make_ring(entry)
        return entry

    def make_ring(self, entry: DiskEntry) -> int:
        with self.disks.lock(entry):
            self.disks.ensure_ring(entry, self.clock)
        geometry = read_geometry(ring_path(entry.id.bytes))
        assert geometry is not None
        return geometry.ring_id

    def guest(self, entry: DiskEntry) -> Guest:
        guest = Guest(entry)
        self.guests.append(guest)
        return guest

    def close(self) -> None:
        for guest in self.guests:
            guest.close()
        for entry in self.disks.all():
            ring_path(entry.id.bytes).unlink(missing_ok=True)


def known(
    entry: DiskEntry, state: DiskState = "ready", ring_id: int | None = None, next_sequence: int = 0
) -> AttachedDisk:
    """What the receiver knows of the disk: by default, its ring. Without any, its base is blank."""
    geometry = read_geometry(ring_path(entry.id.bytes))
    if ring_id is None:
        assert geometry is not None
        ring_id = geometry.ring_id
    return AttachedDisk(
        id=entry.id,
        epoch=1,
        state=state,
        ring_id=ring_id,
        next_sequence=next_sequence,
        blank=state == "empty" and ring_id == 0,
    )


def attach(
    source: Source, *answers: AttachedDisk, next_number: int = 1, watermark: int = 0
) -> Attached:
    return Attached(
        group="web",
        group_id=REPLICA,
        next_number=next_number,
        watermark=watermark or source.watermark,
        disks=list(answers),
    )


def make_pump(source: Source, answer: Attached, *, bounds: SpoolLimits | None = None) -> GroupPump:
    """The pump of a group that a receiver has just answered for."""
    entries = {entry.id: entry for entry in source.disks.all()}
    disks = [SourceDisk(source.disks, entries[disk.id], source.clock) for disk in answer.disks]
    for disk, told in zip(disks, answer.disks, strict=True):
        disk.attach(told, REPLICA, answer.watermark)
    named = [
        AttachDisk(id=disk.entry.id, name=disk.entry.name, size_bytes=disk.entry.size_bytes)
        for disk in disks
    ]
    spool = Spool.open(source.directory / "spool", bounds or SpoolLimits(1 << 30, 0))
    known = Known.of(answer)
    return GroupPump(disks, known, known.copy(), named, spool, SOURCE, source.clock)


async def shape(size_bytes: int) -> None:
    """No limit."""


@asynccontextmanager
async def linked(
    pump: GroupPump,
    receiver: Receiver,
    answer: Attached,
    window_messages: int = limits.WINDOW_FRAMES,
    window_bytes: int = limits.WINDOW_BYTES,
) -> AsyncIterator[None]:
    """A link until the block ends."""
    receiver.pump, receiver.earlier = pump, len(receiver.frames)
    await pump.outbox.connect(answer, window_messages, window_bytes)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pump.outbox.serve, receiver.send, shape)
            yield
            nursery.cancel_scope.cancel()
    finally:
        pump.outbox.disconnect()


@asynccontextmanager
async def pumping(
    source: Source,
    receiver: Receiver,
    *answers: AttachedDisk,
    window_messages: int = limits.WINDOW_FRAMES,
    window_bytes: int = limits.WINDOW_BYTES,
) -> AsyncIterator[GroupPump]:
    """A session that pumps until the block ends."""
    answer = attach(source, *answers)
    pump = make_pump(source, answer)
    try:
        async with (
            linked(pump, receiver, answer, window_messages, window_bytes),
            trio.open_nursery() as nursery,
        ):
            nursery.start_soon(pump.run)
            yield pump
            nursery.cancel_scope.cancel()
    finally:
        for disk in pump.disks:
            disk.close()
        pump.outbox.spool.close()


class StalledWrite:
    """In the place of `write_atomically`: a disk that stalls until told, in a worker thread."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.goes_on = threading.Event()

    def __call__(self, path: Path, data: bytes, mode: int = 0o600) -> None:
        assert threading.current_thread() is not threading.main_thread()
        self.begun.set()
        self.goes_on.wait(PATIENCE_SECONDS)
        write_atomically(path, data, mode)


async def until(happened: Callable[[], object]) -> None:
    with trio.fail_after(PATIENCE_SECONDS):
        while not happened():
            await trio.sleep(0.002)


async def a_round(pump: GroupPump) -> None:
    """Return when a round has begun and ended after the call."""
    for _ in range(2):
        async with pump.between_rounds:
            pass
        await trio.sleep(0.015)
    async with pump.between_rounds:
        pass


def check_stream(received: list[Received], watermark: int = 0) -> None:
    """What is true of every stream, whatever happened."""
    number, sequences = 0, dict[tuple[bytes, int], int]()
    for frame in received:
        header = frame.header
        if header.kind == FrameKind.BASE:
            assert header.number == 0
        else:
            number += 1
            assert header.number == number
        if header.kind == FrameKind.RECORDS and header.record_count:
            assert min(record[0] for record in frame.records) > watermark, "record under watermark"
            place = (header.disk, header.ring_id)
            assert header.first_sequence == sequences.get(place, header.first_sequence)
            sequences[place] = header.first_sequence + header.record_count
        if isinstance(frame.mark, GapMark):
            assert frame.mark.from_ns > max(watermark, header.watermark), "gap under watermark"
        if isinstance(frame.mark, ConsistentMark | CheckpointMark):
            assert frame.mark.at_ns == header.watermark
        if header.kind == FrameKind.BASE:
            assert header.watermark <= watermark
        else:
            assert header.watermark >= watermark, "watermark goes back"
            watermark = header.watermark


def replay(
    received: list[Received],
    disk: bytes,
    size_bytes: int,
    until_ns: int = 1 << 63,
    *,
    before: bytes = b"",
) -> bytes:
    """The disk's content at an instant: base below, then by stamp, later frames over earlier.

    ``before``: what the replica held of it already.
    """
    content = bytearray(before[:size_bytes].ljust(size_bytes, b"\0"))
    parts: list[tuple[int, int, int, int, bytes]] = []
    for order, frame in enumerate(received):
        if frame.header.disk != disk or frame.header.kind == FrameKind.MARK:
            continue
        at = 0
        for stamp, offset, length, kind in frame.records:
            data = bytes(length)
            if kind & frames.KIND_MASK == RecordKind.WRITE:
                data, at = frame.payload[at : at + length], at + length
            if kind & frames.KIND_MASK != RecordKind.FLUSH and stamp <= until_ns:
                level = 0 if frame.header.kind == FrameKind.BASE else stamp
                parts.append((level, order, offset, length, data))
    for _, _, offset, length, data in sorted(parts, key=lambda part: part[:2]):
        content[offset : offset + length] = data
    return bytes(content[:size_bytes])


def random_bytes(size: int, seed: int = 1) -> bytes:
    return np.random.default_rng(seed).bytes(size)
