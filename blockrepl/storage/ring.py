"""The agent's end of the ring: records out as columns, releases back. Layout: formats/ring.py.

`create_ring` makes the file in shared memory; `RingReader` reads it. Nothing here copies payload:
what `take` returns are views of the mapping, good until `release` has passed them.

A watermark is taken in three steps (design, section 3): read the clock; `quiesce`, which waits
until an append that had already taken its stamp is published; then everything up to `head` is
complete for every stamp below the clock reading, unless `gap_from` says otherwise.
"""

from __future__ import annotations

import mmap
import os
import secrets
import time
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from blockrepl.errors import StateError, StorageError
from blockrepl.formats import ring as layout
from blockrepl.formats.frame import KIND_MASK, Buffer, Columns, RecordKind
from blockrepl.storage._ring import Words
from blockrepl.storage.byte_locks import is_held_by_another, lock_byte

SHARED_MEMORY = Path("/dev/shm")
_WRITER_BYTE = 0  # of the ring's file: locked by its server


def ring_path(disk: bytes) -> Path:
    return SHARED_MEMORY / f"blockrepl-{disk.hex()}.ring"


def create_ring(
    path: Path,
    *,
    disk: bytes,
    size_bytes: int,
    region_bytes: int,
    ring_bytes: int,
    clock_offset: int,
    stale: npt.NDArray[np.uint8],
) -> None:
    """Make a ring whose stale regions are those that are hot. The caller holds the disk's lock."""
    ring = layout.geometry(
        ring_id=secrets.randbits(62) + 1,
        disk=disk,
        size_bytes=size_bytes,
        region_bytes=region_bytes,
        ring_bytes=ring_bytes,
        clock_offset=clock_offset,
    )
    with new_ring(path, ring) as descriptor:
        os.pwrite(descriptor, stale.tobytes(), ring.stale_at)
    os.rename(unfinished_path(path), path)


def unfinished_path(path: Path) -> Path:
    """Where a ring is made before it takes its place."""
    return path.with_suffix(".new")


@contextmanager
def new_ring(path: Path, ring: layout.RingGeometry) -> Iterator[int]:
    """The file of a new ring, all zeros but its sizes; complete when the block has ended."""
    temporary = unfinished_path(path)
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        try:
            os.posix_fallocate(descriptor, 0, ring.file_bytes)
        except OSError as error:
            raise StorageError(
                f"no room for a ring of {ring.file_bytes >> 20} MiB in {path.parent}: "
                f"{error.strerror}",
                hint="enlarge it (mount -o remount,size=...) or add the disk with a smaller --ring",
                code="ring-full",
            ) from error
        os.pwrite(descriptor, layout.encode_geometry(ring), 0)
        yield descriptor
        os.pwrite(descriptor, b"\1", layout.COMPLETE_AT)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    finally:
        os.close(descriptor)


def read_geometry(path: Path) -> layout.RingGeometry | None:
    """The ring's sizes, or None when there is no complete ring."""
    try:
        with path.open("rb") as file:
            return layout.decode_geometry(file.read(layout.HEADER.size))
    except FileNotFoundError:
        return None


def lock_ring(path: Path) -> int:
    """Open a ring for the server that writes to it; the descriptor says so while it is open.

    The image's lock does not say it: the image's path may lead to another file meanwhile. The
    caller holds the disk's lock, and has seen that there is no other writer.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        lock_byte(descriptor, _WRITER_BYTE)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def has_writer(path: Path) -> bool:
    """Whether somebody holds the ring as `lock_ring` does. Takes no lock itself."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return is_held_by_another(descriptor, _WRITER_BYTE)
    finally:
        os.close(descriptor)


def read_next_number(path: Path) -> int:
    """What an agent noted in the ring with `RingReader.set_next_number`; 0 without one."""
    if read_geometry(path) is None:
        return 0
    try:
        with path.open("rb") as file:
            file.seek(layout.NEXT_NUMBER_AT)
            return int.from_bytes(file.read(8), "little")
    except FileNotFoundError:
        return 0


@dataclass(frozen=True, slots=True)
class Batch:
    """Records [first, after) of a ring. Columns and payload are views of the ring."""

    first: int
    after: int
    columns: Columns
    payload: Buffer


@dataclass(frozen=True, slots=True)
class Position:
    """An instant in a ring, to hold what is read of the image against. See `is_quiet`."""

    sequence: int  # all records before it are in the image
    dropped: int


class RingReader:
    """A mapped ring. One reader at a time; the agent's own lock sees to that."""

    def __init__(self, path: Path, disk: bytes) -> None:
        geometry = read_geometry(path)
        if geometry is None or geometry.disk != disk:
            raise StateError(f"{path} is not the ring of this disk", code="ring")
        self.path = path
        self.geometry = geometry
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            status = os.fstat(descriptor)
            self.inode = status.st_ino
            if status.st_size != geometry.file_bytes:
                raise StateError(f"{path} has not the size that its header says", code="ring")
            mapping = mmap.mmap(descriptor, geometry.file_bytes)
        finally:
            os.close(descriptor)
        self._words = Words(mapping)
        whole = np.frombuffer(mapping, np.uint8)
        regions = geometry.region_count
        self.stale = whole[geometry.stale_at : geometry.stale_at + regions]
        self.syncing = whole[geometry.syncing_at : geometry.syncing_at + regions]
        self._inflight = np.frombuffer(
            mapping, layout.INFLIGHT, layout.INFLIGHT_SLOTS, geometry.inflight_at
        )
        self._flushing = np.frombuffer(mapping, "<u8", layout.FLUSH_SLOTS, layout.FLUSHING_AT)
        self._slots = np.frombuffer(mapping, layout.SLOT, geometry.slot_count, geometry.slots_at)
        self._payload = memoryview(mapping)[geometry.payload_at : geometry.file_bytes]

    # --- what capture has written

    def head(self) -> int:
        return self._words.load(layout.HEAD_AT)

    def tail(self) -> int:
        return self._words.load(layout.TAIL_AT)

    def durable(self) -> int:
        """Records before this sequence are durable at the receiver."""
        return self._words.load(layout.DURABLE_AT)

    def gap_from(self) -> int:
        """First stamp that was not kept; 0 when there is no gap to report."""
        return self._words.load(layout.GAP_FROM_AT)

    def last_stamp(self) -> int:
        return self._words.load(layout.LAST_STAMP_AT)

    def flush_failed(self) -> bool:
        """Whether the local disk has failed to flush since the ring was made."""
        return self._words.load(layout.FLUSH_FAILED_AT) != 0

    def flush_has_failed(self) -> None:
        """Nothing cools any more, by no server either."""
        self._words.store(layout.FLUSH_FAILED_AT, 1)

    def flushes_under_way(self) -> frozenset[tuple[int, int]]:
        """(slot, generation) of each, as `writes_in_flight`."""
        return _odd(self._flushing)

    def unknown_flushes(self) -> int:
        """How many servers have been killed inside a flush, and been found."""
        return self._words.load(layout.FLUSH_UNKNOWN_AT)

    def known_flushes(self) -> int:
        """How many of them, the first ones, are known to have taken no error with them."""
        return self._words.load(layout.FLUSH_KNOWN_AT)

    def set_known_flushes(self, count: int) -> None:
        self._words.store(layout.FLUSH_KNOWN_AT, max(count, self.known_flushes()))

    def trusts_flushes(self) -> bool:
        """Whether none has failed, and none is left that may have."""
        return not self.flush_failed() and self.unknown_flushes() == self.known_flushes()

    def dropped(self) -> int:
        return self._words.load(layout.DROPPED_AT)

    def written_bytes(self) -> int:
        return self._words.load(layout.WRITTEN_AT)

    def hot_regions(self) -> int:
        return self._words.load(layout.HOT_REGIONS_AT)

    def used_bytes(self, head: int) -> int:
        """Payload bytes that wait in the ring up to ``head``."""
        return self.payload_bytes(self.tail(), head)

    def payload_bytes(self, first: int, head: int) -> int:
        """Payload bytes of records [first, head), which the ring holds."""
        if first == head:
            return 0
        last = self._slots[(head - 1) % self.geometry.slot_count]
        start = self._slots[first % self.geometry.slot_count]
        return _end(last) - int(start["position"])

    def fill(self, head: int | None = None) -> float:
        """How full it is, up to ``head``, 0 to 1, by payload or by slots."""
        head = self.head() if head is None else head
        slots = (head - self.tail()) / self.geometry.slot_count
        return max(slots, self.used_bytes(head) / self.geometry.payload_bytes)

    def quiesce(self, patience_seconds: float = 0.002) -> bool:
        """Wait until an append under way is published. False when it takes too long."""
        busy = self._words.load(layout.BUSY_AT)
        if busy % 2 == 0:
            return True
        deadline = time.monotonic() + patience_seconds
        while self._words.load(layout.BUSY_AT) == busy:
            if time.monotonic() > deadline:
                return False
            os.sched_yield()
        return True

    def position(self) -> Position:
        """Now. What is dropped between the two looks counts as later, which is the safe side."""
        dropped = self.dropped()
        return Position(self.head(), dropped)

    def is_quiet(self, start: int, end: int, since: Position) -> bool:
        """Whether bytes [start, end) of the image, read since then and before this call, are
        exactly what the records before ``since`` (and content sent before it) made of them.

        A write takes its slot in flight before it touches the image, and gives it back once its
        record is published or its gap marked. So one that began before the read was over is
        either in flight now, or it has left a record at or after ``since``, a drop counted, or
        nothing but what was in the image at ``since`` already. For that, the slots must be looked
        at before the head and the drops, and all of it after the read.

        Answers False when it cannot know: the ring has gone round meanwhile. A region that is
        being synced does not matter here; whether its content was sent is the caller's to know.
        """
        words = self._words
        words.fence()  # the image was read before
        generations = self._inflight["generation"].copy()
        words.fence()  # a range that is replaced after this look belongs to a later write
        under_way = (
            (generations % 2 == 1)
            & (self._inflight["start"] < end)
            & (self._inflight["end"] > start)
        )
        if under_way.any():
            return False
        words.fence()
        region_bytes = self.geometry.region_bytes
        regions = slice(start // region_bytes, (end - 1) // region_bytes + 1)
        if self.dropped() != since.dropped or self.stale[regions].any():
            return False
        if self._has_record(start, end, since.sequence, self.head()):
            return False
        words.fence()
        # a slot is written anew before the head shows it
        return self.head() - since.sequence < self.geometry.slot_count

    def _has_record(self, start: int, end: int, first: int, after: int) -> bool:
        """Whether one of the records [first, after) touches bytes [start, end)."""
        count = self.geometry.slot_count
        first = max(first, after - count)
        while first < after:
            at = first % count
            slots = self._slots[at : min(at + after - first, count)]
            offsets, lengths = slots["offset"], slots["length"]
            if ((lengths > 0) & (offsets < end) & (offsets + lengths > start)).any():
                return True
            first += len(slots)
        return False

    def writes_in_flight(self) -> frozenset[tuple[int, int]]:
        """(slot, generation) of each write under way, to see later whether it has ended."""
        return _odd(self._inflight["generation"])

    # --- records

    def first_after(self, stamp: int, first: int, head: int) -> int:
        """The first record of [first, head) whose stamp is later; ``head`` when there is none."""
        count = self.geometry.slot_count
        stamps = self._slots["stamp"]
        return first + bisect_right(range(first, head), stamp, key=lambda n: int(stamps[n % count]))

    def stamp(self, sequence: int) -> int:
        return int(self._slots["stamp"][sequence % self.geometry.slot_count])

    def take(self, first: int, head: int, payload_limit: int, record_limit: int) -> Batch:
        """Records from ``first`` on, at least one, up to the limits; ``first`` < ``head``."""
        count = self.geometry.slot_count
        at = first % count
        slots = self._slots[at : min(at + min(head - first, record_limit), count)]
        start = int(slots["position"][0])
        # A search, not a sum: a ring that is behind shows all its records here for every frame.
        taken = int(np.searchsorted(slots["position"], np.uint64(start + payload_limit), "right"))
        end = _end(slots[taken - 1])
        if (
            end - start > payload_limit and taken > 1
        ):  # all before it end where it begins, or sooner
            taken -= 1
            end = _end(slots[taken - 1])
        slots = slots[:taken]
        columns = Columns(slots["stamp"], slots["offset"], slots["length"], slots["kind"])
        return Batch(first, first + taken, columns, self._payload_view(start, end - start))

    def _payload_view(self, position: int, size: int) -> Buffer:
        at = position % self.geometry.payload_bytes
        part = self.geometry.payload_bytes - at
        if size <= part:
            return self._payload[at : at + size]
        return b"".join((self._payload[at:], self._payload[: size - part]))

    def release(self, sequence: int) -> None:
        """Records before ``sequence`` are not needed here any more; their room may be reused."""
        if sequence > self.tail():
            self._words.store(layout.TAIL_AT, sequence)

    def set_durable(self, sequence: int) -> None:
        """Records before ``sequence`` are durable at the receiver: their regions may cool.

        Never goes back, and never passes the head: what is not there yet cannot be durable.
        """
        sequence = min(sequence, self.head())
        if sequence > self.durable():
            self._words.store(layout.DURABLE_AT, sequence)

    def set_next_number(self, number: int) -> None:
        """The group's frames before it are durable at the receiver. Outlives the agent."""
        self._words.store(layout.NEXT_NUMBER_AT, number)

    # --- regions to send again

    def begin_sync(self, region: int) -> None:
        """The region's content is about to be read; what changes from here on marks it anew."""
        self._words.store_byte(self.geometry.syncing_at + region, 1)
        self._words.store_byte(self.geometry.stale_at + region, 0)

    def end_sync(self, region: int) -> None:
        """The region's content is durable at the receiver."""
        self._words.store_byte(self.geometry.syncing_at + region, 0)

    def cancel_sync(self, region: int) -> None:
        """The region's content was not sent after all."""
        self._words.store_byte(self.geometry.stale_at + region, 1)
        self._words.store_byte(self.geometry.syncing_at + region, 0)

    def mark_all_stale(self) -> None:
        self.stale[:] = 1

    def mark_records_stale(self, first: int, after: int) -> None:
        """All regions that records [first, after) touch."""
        slots = self._slots[np.arange(first, after) % self.geometry.slot_count]
        slots = slots[slots["length"] > 0]
        region_bytes = np.uint64(self.geometry.region_bytes)
        last_bytes = slots["offset"] + slots["length"] - np.uint64(1)
        steps = np.zeros(self.geometry.region_count + 1, np.int64)
        np.add.at(steps, slots["offset"] // region_bytes, 1)
        np.add.at(steps, last_bytes // region_bytes + np.uint64(1), -1)
        self.stale[np.cumsum(steps[:-1]) > 0] = 1

    def restart_syncs(self) -> None:
        """After a lost session: what was sent and not acknowledged must be sent again."""
        for region in np.nonzero(self.syncing)[0].tolist():
            self.cancel_sync(region)

    def clear_gap(self, reported: int) -> None:
        """The gap that began at ``reported`` is durably known to the receiver."""
        self._words.swap(layout.GAP_FROM_AT, reported, 0)

    def needs_sync(self) -> bool:
        return bool(self.stale.any())

    def is_syncing(self) -> bool:
        return bool(self.syncing.any())

    def is_current(self) -> bool:
        """Whether the file at the path is still this ring."""
        try:
            return self.path.stat().st_ino == self.inode
        except FileNotFoundError:
            return False

    # --- after a killed server; the caller holds the image's lock

    def recover_in_flight(self, stamp: int) -> None:
        """Mark what a killed server had in flight as stale, as its next start would."""
        words, geometry = self._words, self.geometry
        self._recover_flushes()
        busy = words.load(layout.BUSY_AT)
        words.store(layout.BUSY_AT, busy + busy % 2)  # an append that will never be published
        for slot in np.nonzero(self._inflight["generation"] % 2)[0]:
            start, end = int(self._inflight["start"][slot]), int(self._inflight["end"][slot])
            if start < end <= geometry.size_bytes:
                first, last = start // geometry.region_bytes, (end - 1) // geometry.region_bytes
                self.stale[first : last + 1] = 1
                words.swap(layout.GAP_FROM_AT, 0, max(stamp, self.last_stamp() + 1))
            words.store(layout.DROPPED_AT, self.dropped() + 1)
            at = geometry.inflight_at + int(slot) * layout.INFLIGHT.itemsize + 16
            words.store(at, words.load(at) + 1)

    def _recover_flushes(self) -> None:
        """Counted first: a slot that is even says that its flush has ended."""
        under_way = self.flushes_under_way()
        if under_way:
            self._words.store(layout.FLUSH_UNKNOWN_AT, self.unknown_flushes() + 1)
        for slot, generation in under_way:
            self._words.store(layout.FLUSHING_AT + 8 * slot, generation + 1)


def _odd(generations: npt.NDArray[np.uint64]) -> frozenset[tuple[int, int]]:
    found = generations.copy()  # one look
    return frozenset((int(slot), int(found[slot])) for slot in np.nonzero(found % 2)[0])


def _end(slot: np.void) -> int:
    """The position behind a record's payload."""
    is_write = int(slot["kind"]) & KIND_MASK == RecordKind.WRITE
    return int(slot["position"]) + (int(slot["length"]) if is_write else 0)
