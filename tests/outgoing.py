"""Frames as a source numbers them, small ones, for what keeps them: spool and outbox."""

from __future__ import annotations

from uuid import UUID

import numpy as np

from blockrepl.formats import frame as frames
from blockrepl.formats.frame import Columns, EncodedFrame, FrameKind, RecordKind
from blockrepl.formats.marks import CheckpointMark, Mark, encode_mark
from blockrepl.formats.messages import AttachDisk, Attached, AttachedDisk
from blockrepl.units import MIB

GROUP, SOURCE, DISK = UUID(int=1), bytes(range(16)), UUID(int=2)
RING = 5
DISKS = [AttachDisk(id=DISK, name="root", size_bytes=8 * MIB)]
REGIONS = 8


def attached(next_number: int = 1, next_sequence: int = 0, group: UUID = GROUP) -> Attached:
    disk = AttachedDisk(id=DISK, epoch=1, state="ready", ring_id=RING, next_sequence=next_sequence)
    return Attached(
        group="web", group_id=group, next_number=next_number, watermark=1000, disks=[disk]
    )


def columns(offset: int, size_bytes: int, stamp: int, count: int = 1) -> Columns:
    return Columns(
        np.full(count, stamp, np.uint64),
        np.full(count, offset, np.uint64),
        np.full(count, size_bytes, np.uint32),
        np.full(count, RecordKind.WRITE, np.uint8),
    )


def records(number: int, sequence: int, size_bytes: int = 512) -> EncodedFrame:
    """One record, whose content no other frame has."""
    payload = np.random.default_rng(number).bytes(size_bytes)
    return frames.encode_frame(
        kind=FrameKind.RECORDS,
        group=GROUP.bytes,
        source=SOURCE,
        disk=DISK.bytes,
        number=number,
        watermark=1000 + number,
        ring_id=RING,
        first_sequence=sequence,
        columns=columns(0, size_bytes, 1000 + number),
        payload=payload,
    )


def content(
    number: int, sequence: int, region: int, size_bytes: int = 512
) -> tuple[EncodedFrame, Columns]:
    """A region's content: a sync frame, or without a number a base frame."""
    found = columns(region * MIB, size_bytes, 1000)
    payload = np.random.default_rng(1000 + number).bytes(size_bytes)
    frame = frames.encode_frame(
        kind=FrameKind.SYNC if number else FrameKind.BASE,
        group=GROUP.bytes,
        source=SOURCE,
        disk=DISK.bytes,
        number=number,
        watermark=1000 + number,
        ring_id=RING,
        first_sequence=sequence,
        columns=found,
        payload=payload,
    )
    return frame, found


def marked(
    number: int, mark: Mark | None = None, *, ring_id: int = 0, first_sequence: int = 0
) -> tuple[EncodedFrame, Mark]:
    mark = mark or CheckpointMark(name=f"c{number}", at_ns=1000 + number)
    frame = frames.encode_frame(
        kind=FrameKind.MARK,
        group=GROUP.bytes,
        source=SOURCE,
        number=number,
        watermark=1000 + number,
        ring_id=ring_id,
        first_sequence=first_sequence,
        payload=encode_mark(mark),
    )
    return frame, mark


def bytes_of(frame: EncodedFrame) -> bytes:
    return b"".join(bytes(buffer) for buffer in frame.buffers)
