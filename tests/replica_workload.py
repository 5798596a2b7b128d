"""Frames as an agent would send them, for tests of the receiver's side."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from pathlib import Path
from uuid import UUID

import numpy as np
import xxhash

from blockrepl.formats import frame as frames
from blockrepl.formats import segment as segments
from blockrepl.formats.frame import Columns, EncodedFrame, FrameHeader, FrameKind, RecordKind
from blockrepl.formats.marks import CheckpointMark, ConsistentMark, GapMark, encode_mark
from blockrepl.formats.messages import AttachDisk, Attached
from blockrepl.storage.files import Files
from blockrepl.storage.replica import Admission, Replica, create_replica, open_replica
from blockrepl.units import MIB

SOURCE = bytes(range(16))
DISK = UUID(int=7)
DISK_BYTES = 64 * MIB
RING = 0xF123456789ABCDEF  # above what SQLite's signed integers hold
START = 1_800_000_000_000_000_000

Frame = tuple[FrameHeader, memoryview]


def joined(frame: EncodedFrame) -> Frame:
    return frame.header, memoryview(b"".join(bytes(buffer) for buffer in frame.buffers))


def columns(records: list[tuple[int, int, int, int]]) -> Columns:
    """From (stamp, offset, length, kind) rows."""
    stamps, offsets, lengths, kinds = zip(*records, strict=True) if records else ((), (), (), ())
    return Columns(
        np.array(stamps, np.uint64),
        np.array(offsets, np.uint64),
        np.array(lengths, np.uint32),
        np.array(kinds, np.uint8),
    )


@dataclass
class Agent:
    """Builds a source's frames for one disk of a group, as its Attached says."""

    group: bytes
    source: bytes = SOURCE
    disk: UUID = DISK
    number: int = 1
    sequence: int = 0
    stamp: int = START
    ring: int = RING
    random: random.Random = field(default_factory=lambda: random.Random(1))

    @classmethod
    def after(cls, attached: Attached, source: bytes = SOURCE) -> Agent:
        disk = attached.disks[0]
        return cls(
            attached.group_id.bytes,
            source,
            disk.id,
            attached.next_number,
            disk.next_sequence,
            max(attached.watermark, START),
        )

    def writes(self, count: int = 4, length: int = 4096) -> Frame:
        """A frame of ``count`` random writes."""
        rows = []
        for _ in range(count):
            self.stamp += 1000
            at = self.random.randrange(DISK_BYTES // length) * length
            rows.append((self.stamp, at, length, int(RecordKind.WRITE)))
        return self.records(rows, self.random.randbytes(count * length))

    def records(self, rows: list[tuple[int, int, int, int]], payload: bytes) -> Frame:
        frame = self._frame(
            FrameKind.RECORDS, columns(rows), payload, ring_id=self.ring, sequence=self.sequence
        )
        self.sequence += len(rows)
        return frame

    def base(self, offset: int, payload: bytes, kind: RecordKind = RecordKind.WRITE) -> Frame:
        length = len(payload) or MIB
        return self._frame(
            FrameKind.BASE, columns([(self.stamp, offset, length, kind)]), payload, number=0
        )

    def checkpoint(self, name: str, *, kept: bool = False) -> Frame:
        return self._mark(encode_mark(CheckpointMark(name=name, at_ns=self.stamp, kept=kept)))

    def consistent(self) -> Frame:
        mark = ConsistentMark(disk=self.disk, at_ns=self.stamp)
        place = {"ring_id": self.ring, "sequence": self.sequence}
        return self._frame(FrameKind.MARK, None, encode_mark(mark), **place)

    def gap(self) -> Frame:
        return self._mark(encode_mark(GapMark(disk=self.disk, from_ns=self.stamp)))

    def _mark(self, payload: bytes) -> Frame:
        return self._frame(FrameKind.MARK, None, payload)

    def _frame(
        self,
        kind: FrameKind,
        rows: Columns | None,
        payload: bytes,
        *,
        number: int | None = None,
        ring_id: int = 0,
        sequence: int = 0,
    ) -> Frame:
        frame = frames.encode_frame(
            kind=kind,
            group=self.group,
            source=self.source,
            disk=self.disk.bytes,
            number=self.number if number is None else number,
            epoch=1,
            watermark=self.stamp,
            ring_id=ring_id,
            first_sequence=sequence,
            columns=rows,
            payload=payload,
        )
        if number is None:
            self.number += 1
        return joined(frame)


def with_seal(agent: Agent, at: int, frames_end: int) -> Frame:
    """A frame for offset ``at`` of a segment; its write ends as a sealed segment does."""
    bare = replace(agent, random=random.Random(2)).writes(1)[1]
    contents = segments.Contents(
        frames_end=frames_end, frame_table_offset=0, frame_count=0, frame_table_digest=0, runs=[]
    )
    text = contents.model_dump_json().encode()
    contents_at = at + len(bare) - segments.TRAILER_BYTES - len(text)
    trailer = segments.Trailer(contents_at, len(text), xxhash.xxh3_64_intdigest(text), 0)
    seal = text + segments.encode_trailer(trailer)
    agent.stamp += 1000
    padding = agent.random.randbytes(4096 - len(seal))
    frame = agent.records([(agent.stamp, 0, 4096, int(RecordKind.WRITE))], padding + seal)
    assert len(frame[1]) == len(bare)
    return frame


def attach(replica: Replica, *, source: bytes = SOURCE, disk: UUID = DISK, name: str = "root",
           size_bytes: int = DISK_BYTES) -> Attached:  # fmt: skip
    return replica.attach(source, [AttachDisk(id=disk, name=name, size_bytes=size_bytes)])


def start(directory: Path, files: Files | None = None) -> tuple[Replica, Agent]:
    """A replica in a directory, made if missing, and an agent that goes on with it."""
    create_replica(directory, "web")
    replica = open_replica(directory, files=files)
    return replica, Agent.after(attach(replica))


def put(replica: Replica, *batch: Frame) -> int:
    """Append and commit; the number that may be acknowledged."""
    for header, frame in batch:
        assert replica.append(header.source, header, frame) is Admission.STAGED
    return replica.commit().numbers[batch[0][0].source]
