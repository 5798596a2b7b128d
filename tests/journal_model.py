"""A replica filled with a random history, and a model of it that knows nothing but byte arrays."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from uuid import UUID

import numpy as np
import pytest

from blockrepl import limits
from blockrepl.formats import frame as frames
from blockrepl.formats.frame import Columns, FrameKind, RecordKind
from blockrepl.formats.marks import (
    CheckpointMark,
    ConsistentMark,
    GapMark,
    GrowMark,
    Mark,
    encode_mark,
)
from blockrepl.formats.messages import AttachDisk
from blockrepl.storage.home import Home
from blockrepl.storage.replica import create_replica, open_replica
from blockrepl.units import KIB, NANOSECONDS_PER_SECOND

START = 1_800_000_000_000_000_000
SOURCE = b"s" * 16
GROUP = "web"


@dataclass(frozen=True)
class Record:
    stamp: int
    disk: str
    offset: int
    length: int
    kind: RecordKind
    data: bytes = b""


@dataclass
class Model:
    """What the disks' bytes were after each record."""

    base: dict[str, bytes]
    records: list[Record] = field(default_factory=list)
    hidden: list[tuple[int, int]] = field(default_factory=list)  # gaps
    growths: list[tuple[int, str, int]] = field(default_factory=list)  # stamp, disk, bytes

    def states(self) -> Iterator[tuple[int, dict[str, bytearray]]]:
        """(stamp, content of every disk) after each record, ascending. The dict is reused."""
        now = {disk: bytearray(content) for disk, content in self.base.items()}
        for record in sorted(self.records, key=lambda record: record.stamp):
            self._grow(now, record.stamp)
            _apply(now[record.disk], record)
            if not any(first <= record.stamp < last for first, last in self.hidden):
                yield record.stamp, now

    def at(self, stamp: int) -> dict[str, bytearray]:
        now = {disk: bytearray(content) for disk, content in self.base.items()}
        for record in sorted(self.records, key=lambda record: record.stamp):
            if record.stamp <= stamp:
                self._grow(now, record.stamp)
                _apply(now[record.disk], record)
        self._grow(now, stamp)
        return now

    def _grow(self, now: dict[str, bytearray], stamp: int) -> None:
        for at, disk, size in self.growths:
            if at <= stamp:
                now[disk] += bytes(max(0, size - len(now[disk])))


def _apply(content: bytearray, record: Record) -> None:
    if record.kind == RecordKind.WRITE:
        content[record.offset : record.offset + record.length] = record.data
    elif record.kind != RecordKind.FLUSH:
        content[record.offset : record.offset + record.length] = bytes(record.length)


def later() -> int:
    """A receiver's clock that all stamps of a history are behind of."""
    return max(time.time_ns(), START + 86400 * NANOSECONDS_PER_SECOND)


class Journal:
    """Writes a history as an agent and a receiver would, through the store's own writer."""

    def __init__(self, home: Path, sizes: dict[str, int], seed: int = 1, *, sync: bool = True):
        self.home = home
        self.random = random.Random(seed)
        self.stamp = START
        self.directory = Home.create(home).replica_directory(GROUP)
        create_replica(self.directory, GROUP)
        self.ids = {name: UUID(int=index + 1) for index, name in enumerate(sizes)}
        self.sizes = dict(sizes)
        self.model = Model({name: bytes(size) for name, size in sizes.items()})
        self._number = 1
        self.open()
        if sync:
            for name in sizes:
                self.first_sync(name)

    def open(self) -> None:
        self.replica = open_replica(self.directory, clock=later)
        self.replica.attach(
            SOURCE,
            [
                AttachDisk(id=self.ids[name], name=name, size_bytes=size)
                for name, size in self.sizes.items()
            ],
        )

    def close(self) -> None:
        self.replica.close()

    def tick(self) -> int:
        self.stamp += self.random.randrange(1, 2000)
        return self.stamp

    def first_sync(self, name: str) -> None:
        """Some content in the base; the rest of it is a hole."""
        size = self.sizes[name]
        content = bytearray(size)
        at, length = size // 4, size // 3
        data = self.random.randbytes(length)
        content[at : at + length] = data
        self.model.base[name] = bytes(content)
        record = Record(self.stamp, name, at, length, RecordKind.WRITE, data)
        self._frame(FrameKind.BASE, name, [record], number=0)
        self.mark(ConsistentMark(disk=self.ids[name], at_ns=self.stamp))
        self.replica.commit()

    def random_record(self, *, length_max: int = 24 * KIB) -> Record:
        disk = self.random.choice(list(self.sizes))
        kind = self.random.choices(list(RecordKind), [12, 2, 2, 1])[0]
        if kind == RecordKind.FLUSH:
            return Record(self.tick(), disk, 0, 0, kind)
        length = self.random.choice([512, 4096, self.random.randrange(1, length_max)])
        length = min(length, self.sizes[disk])
        offset = self.random.randrange(self.sizes[disk] - length + 1)
        data = b""
        if kind == RecordKind.WRITE:
            data = self.random.randbytes(length)
            if self.random.random() < 0.5:
                data = (data[:16] * (length // 16 + 1))[:length]
        return Record(self.tick(), disk, offset, length, kind, data)

    def run(self, count: int, *, batch: int = 12, length_max: int = 24 * KIB) -> None:
        """``count`` random records, a commit per batch."""
        for done in range(0, count, batch):
            self.put(
                [self.random_record(length_max=length_max) for _ in range(min(batch, count - done))]
            )

    def put(self, records: list[Record], *, model: bool = True) -> None:
        """Commit records (of any disks, ascending stamps) as one frame per disk."""
        if model:
            self.model.records += records
        disks = {record.disk: None for record in records}
        for place, disk in enumerate(disks):
            mine = [record for record in records if record.disk == disk]
            last = place == len(disks) - 1
            before = records[0].stamp - 1
            self._frame(FrameKind.RECORDS, disk, mine, watermark=None if last else before)
        self.replica.commit()

    def write(self, disk: str, offset: int, data: bytes) -> Record:
        record = Record(self.tick(), disk, offset, len(data), RecordKind.WRITE, data)
        self.put([record])
        return record

    def checkpoint(self, name: str, *, kept: bool = False) -> int:
        self.mark(CheckpointMark(name=name, at_ns=self.stamp, kept=kept))
        self.replica.commit()
        return self.stamp

    def grow(self, disk: str, size: int, *, commit: bool = True) -> int:
        """From the next instant on the disk has that size."""
        self.mark(GrowMark(disk=self.ids[disk], at_ns=self.stamp + 1, size_bytes=size))
        self.model.growths.append((self.stamp + 1, disk, size))
        self.sizes[disk] = size
        if commit:
            self.replica.commit()
        return self.stamp + 1

    def gap_and_resync(self, disk: str) -> tuple[int, int]:
        """Records are lost; then the source's content is sent again."""
        begin = self.tick()
        self.mark(GapMark(disk=self.ids[disk], from_ns=begin))
        self.replica.commit()
        lost = Record(self.tick(), disk, 100, 5000, RecordKind.WRITE, self.random.randbytes(5000))
        self.model.records.append(lost)
        synced_at = self.tick()
        self.put([self.random_record()])
        truth = self.model.at(lost.stamp)[disk]
        piece = Record(synced_at, disk, 0, 8192, RecordKind.WRITE, bytes(truth[:8192]))
        self._frame(FrameKind.SYNC, disk, [piece])
        self.replica.commit()
        end = self.tick()
        self.mark(ConsistentMark(disk=self.ids[disk], at_ns=end))
        self.replica.commit()
        self.model.hidden.append((begin, end))
        return begin, end

    def late(self, record: Record) -> None:
        """Send a resync's record, stamped with an earlier instant. The next commit has it.

        Its gap is of no length, so no instant is hidden. No mark of a source could say that: they
        are bounded by the watermark.
        """
        self.model.records.append(record)
        disk = self.ids[record.disk].bytes
        self.replica.catalog.begin_gap(disk, record.stamp)
        self.replica._reload()
        self._frame(FrameKind.SYNC, record.disk, [record])
        self.replica.catalog.set_consistent(disk, record.stamp)
        self.replica._reload()

    def mark(self, mark: Mark) -> None:
        self._frame(FrameKind.MARK, None, [], payload=encode_mark(mark))

    def _frame(
        self,
        kind: FrameKind,
        disk: str | None,
        records: list[Record],
        *,
        payload: bytes = b"",
        number: int | None = None,
        watermark: int | None = None,
    ) -> None:
        encoded = frames.encode_frame(
            kind=kind,
            group=self.replica.group_id,
            source=SOURCE,
            disk=self.ids[disk].bytes if disk else frames.NO_ID,
            number=self._number if number is None else number,
            epoch=1,
            watermark=self.stamp if watermark is None else watermark,
            columns=Columns(
                np.array([record.stamp for record in records], np.uint64),
                np.array([record.offset for record in records], np.uint64),
                np.array([record.length for record in records], np.uint32),
                np.array([record.kind for record in records], np.uint8),
            )
            if records
            else None,
            payload=payload or b"".join(record.data for record in records),
        )
        if number is None:
            self._number += 1
        data = memoryview(b"".join(bytes(buffer) for buffer in encoded.buffers))
        self.replica.append(SOURCE, encoded.header, data)


def small_segments(monkeypatch: pytest.MonkeyPatch, size_bytes: int = 64 * KIB) -> None:
    """Seal early, so that a short history has many segments."""
    monkeypatch.setattr(limits, "SEGMENT_BYTES_TARGET", size_bytes)
