"""Writes a ring the way capture does (ring.h), step by step, for tests of the reading side."""

from __future__ import annotations

import mmap
import os
import time
from pathlib import Path

import numpy as np

from blockrepl.formats import ring as layout
from blockrepl.formats.frame import FUA, RecordKind
from blockrepl.storage._ring import Words
from blockrepl.storage.ring import read_geometry


class RingWriter:
    """The only writer of a ring. An append can be stopped half way, as by a killed server."""

    def __init__(self, path: Path) -> None:
        geometry = read_geometry(path)
        assert geometry is not None
        self.geometry = geometry
        descriptor = os.open(path, os.O_RDWR)
        self._mapping = mmap.mmap(descriptor, geometry.file_bytes)
        os.close(descriptor)
        self._words = Words(self._mapping)
        self._slots = np.frombuffer(
            self._mapping, layout.SLOT, geometry.slot_count, geometry.slots_at
        )
        self._payload_head = 0

    @property
    def head(self) -> int:
        return self._words.load(layout.HEAD_AT)

    def next_stamp(self) -> int:
        now = time.monotonic_ns() + self.geometry.clock_offset
        return max(now, self._words.load(layout.LAST_STAMP_AT) + 1)

    def write(self, offset: int, data: bytes, *, fua: bool = False) -> int:
        """Append a write; its stamp."""
        stamp = self.begin_append(RecordKind.WRITE | (FUA if fua else 0), offset, len(data), data)
        self.publish()
        return stamp

    def append(self, kind: RecordKind, offset: int = 0, length: int = 0) -> int:
        """Append a record without payload; its stamp."""
        stamp = self.begin_append(kind, offset, length, b"")
        self.publish()
        return stamp

    def begin_append(self, kind: int, offset: int, length: int, data: bytes) -> int:
        """Everything up to the moment before the record becomes visible."""
        head, size = self.head, self.geometry.payload_bytes
        assert head - self._words.load(layout.TAIL_AT) < self.geometry.slot_count
        at = self._payload_head % size
        part = min(size - at, len(data))
        start = self.geometry.payload_at
        self._mapping[start + at : start + at + part] = data[:part]
        self._mapping[start : start + len(data) - part] = data[part:]
        self._step_busy()
        stamp = self.next_stamp()
        self._slots[head % self.geometry.slot_count] = (
            stamp,
            offset,
            self._payload_head,
            length,
            kind,
        )
        self._words.store(layout.LAST_STAMP_AT, stamp)
        self._payload_head += len(data)
        self._words.store(layout.WRITTEN_AT, self._payload_head)
        return stamp

    def publish(self) -> None:
        self._words.store(layout.HEAD_AT, self.head + 1)
        self._step_busy()

    def drop(self, offset: int, length: int) -> int:
        """A record that found no room: its regions become stale, and a gap begins. Its stamp."""
        stamp = self.begin_drop(offset, length)
        self._step_busy()
        return stamp

    def begin_drop(self, offset: int, length: int) -> int:
        self._step_busy()
        stamp = self.next_stamp()
        self._words.store(layout.LAST_STAMP_AT, stamp)
        region_bytes = self.geometry.region_bytes
        for region in range(offset // region_bytes, (offset + length - 1) // region_bytes + 1):
            self._words.store_byte(self.geometry.stale_at + region, 1)
        self._add(layout.DROPPED_AT, 1)
        self._words.swap(layout.GAP_FROM_AT, 0, stamp)
        return stamp

    def take_range(self, slot: int, start: int, end: int) -> None:
        """A write to the local disk begins."""
        at = self.geometry.inflight_at + slot * layout.INFLIGHT.itemsize
        self._words.store(at, start)
        self._words.store(at + 8, end)
        self._add(at + 16, 1)

    def release_range(self, slot: int) -> None:
        self._add(self.geometry.inflight_at + slot * layout.INFLIGHT.itemsize + 16, 1)

    def begin_flush(self, slot: int) -> None:
        self._add(layout.FLUSHING_AT + 8 * slot, 1)

    def end_flush(self, slot: int) -> None:
        self._add(layout.FLUSHING_AT + 8 * slot, 1)

    def _step_busy(self) -> None:
        self._add(layout.BUSY_AT, 1)

    def _add(self, at: int, count: int) -> None:
        self._words.store(at, self._words.load(at) + count)
