"""A view: the content of a group's disks at one instant; read-only, and it never changes.

Why it never changes: frames that come later carry later stamps. (A resync's carry the instant it
began at, which lies in the gap it ends; no view can be of an instant in a gap.) So whatever the
receiver appends or seals meanwhile, the same entries are selected by "stamp up to the instant".
Retention leaves the instants of open views as they are, for these are pinned (storage/pins.py); it
may write their segments anew.

Opening one reads no payload and no index. A disk is resolved window by window (storage/content.py),
on first touch, and the windows resolved are cached under a limit. A window is as large as keeps its
entries few: where the guest wrote often it is small.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from errno import EAGAIN
from pathlib import Path

from blockrepl.errors import StateError, UsageError
from blockrepl.storage._gather import unfilled
from blockrepl.storage.content import ContentReader, Extent, Window, add_extent
from blockrepl.storage.history import ReplicaHistory, State
from blockrepl.storage.read_memory import read_memory
from blockrepl.storage.reading import Cache, GoneError, looking
from blockrepl.units import KIB, MIB

WINDOW_BYTES_MAX = 64 * MIB
WINDOW_BYTES_MIN = 256 * KIB
WINDOW_ENTRIES_TARGET = 2 * 1024  # resolved in half a millisecond: a random first touch waits
_WINDOW_SHRINK = 2


@dataclass(frozen=True, slots=True)
class ViewDisk:
    id: bytes
    name: str
    size_bytes: int
    image: Path

    def held(self, offset: int, length: int) -> int:
        """How many bytes of a range are on the disk. UsageError."""
        if offset < 0 or length < 0:
            raise UsageError("a disk is read from 0 on")
        return max(0, min(length, self.size_bytes - offset))

    def check(self, offset: int, length: int) -> None:
        """UsageError for a range that is not all on the disk."""
        if offset < 0 or length < 0 or offset + length > self.size_bytes:
            raise UsageError(f"a range beyond the end of {self.name}")


Windows = Cache[tuple[int, bytes, int, int], Window]


def window_cache() -> Windows:
    """A cache that all views of one process share."""
    return Cache(read_memory().windows, Window.cost)


class View:
    """Disks of a replica at an instant that can be reached. May be used by several threads."""

    def __init__(
        self, replica: ReplicaHistory, at_ns: int, state: State, windows: Windows | None = None
    ) -> None:
        replica.refresh(state)
        self.at_ns = at_ns
        self.disks = {
            row.name: ViewDisk(row.id, row.name, row.size_bytes, replica.image_path(row))
            for row in state.disks_at(at_ns)
        }
        self._replica = replica
        self._content = ContentReader(replica.index, replica.payload, replica.files)
        self._windows = window_cache() if windows is None else windows
        self._sizes: dict[tuple[bytes, int], int] = {}
        self._lock = threading.Lock()

    def disk(self, name: str) -> ViewDisk:
        try:
            return self.disks[name]
        except KeyError:
            names = ", ".join(self.disks) or "none"
            raise StateError(
                f"group {self._replica.group} has no disk {name} at that point",
                hint=f"disks there: {names}",
                code="no-disk",
            ) from None

    def allocated_bytes(self, name: str) -> int:
        """About what the disk's content takes: its base and, at most, its journal."""
        disk = self.disk(name)
        journal = self._replica.index.bytes_until(self.at_ns)
        return min(disk.size_bytes, self._replica.files.allocated_bytes(disk.image) + journal)

    def read(self, name: str, offset: int, length: int, *, wait: bool = True) -> bytearray:
        """Bytes of a disk, fewer only at its end. As `read_into`."""
        buffer = unfilled(self.disk(name).held(offset, length))
        if buffer:
            self.read_into(name, offset, memoryview(buffer), wait=wait)
        return buffer

    def read_into(self, name: str, offset: int, target: memoryview, *, wait: bool = True) -> None:
        """Fill ``target`` with what begins at ``offset`` of a disk, and ends on it.

        DamageError, StorageError. Without ``wait``: BlockingIOError when it would take a device's
        time.
        """
        if wait:
            looking(lambda: self._read_into(name, offset, target, wait), self._look_again)
            return
        try:
            self._read_into(name, offset, target, wait)
        except GoneError as error:
            raise BlockingIOError(EAGAIN, "retention has replaced a segment") from error

    def _look_again(self) -> None:
        """Retention has written segments anew: what was resolved names some that are no more."""
        self._replica.refresh(self._replica.state())
        self._windows.clear()

    def _read_into(self, name: str, offset: int, target: memoryview, wait: bool) -> None:
        disk = self.disk(name)
        disk.check(offset, len(target))
        at, end = offset, offset + len(target)
        while at < end:
            window = self._window(disk, at, wait)
            stop = min(end, window.end)
            part = target[at - offset : stop - offset]
            self._content.read_into(disk.image, window, at, part, wait=wait)
            at = stop

    def extents(self, name: str, offset: int, length: int, *, grain: int = 1) -> list[Extent]:
        """What of a range is data and what reads as zeros; ascending, without holes.

        With a ``grain``, zeros begin and end on a multiple of it (or at the disk's end): some
        readers round what they are told.
        """
        disk = self.disk(name)
        found = looking(lambda: self._extents(disk, offset, length), self._look_again)
        return coarse(found, grain, disk.size_bytes)

    def _extents(self, disk: ViewDisk, offset: int, length: int) -> list[Extent]:
        end = min(offset + length, disk.size_bytes)
        pieces: list[Extent] = []
        at = offset
        while at < end:
            window = self._window(disk, at, True)
            stop = min(end, window.end)
            self._content.add_extents(pieces, disk.image, window, at, stop)
            at = stop
        return pieces

    def _window(self, disk: ViewDisk, at: int, wait: bool) -> Window:
        size = self._sizes.get((disk.id, at // WINDOW_BYTES_MAX))
        if size is not None:
            key = (self.at_ns, disk.id, size, at // size)
            window = self._windows.get(key)
            if window is not None:
                return window
        if not wait:
            raise BlockingIOError(EAGAIN, "not resolved yet")
        return self._resolve(disk, at)

    def _resolve(self, disk: ViewDisk, at: int) -> Window:
        index = self._replica.index
        with self._lock:
            area = at // WINDOW_BYTES_MAX
            size = self._sizes.get((disk.id, area))
            if size is None:
                size = WINDOW_BYTES_MAX
                entries = index.estimate(disk.id, area * size, (area + 1) * size, self.at_ns)
                while entries > WINDOW_ENTRIES_TARGET and size > WINDOW_BYTES_MIN:
                    entries //= _WINDOW_SHRINK
                    size //= _WINDOW_SHRINK
                self._sizes[disk.id, area] = size
            key = (self.at_ns, disk.id, size, at // size)
            window = self._windows.get(key)
            if window is None:
                first = at // size * size
                last = min(first + size, disk.size_bytes)
                # Another reader may look again meanwhile: then this one is of what was before.
                clearings = self._windows.clearings
                window = self._content.resolve(disk.id, first, last, self.at_ns)
                self._windows.put(key, window, clearings)
            return window


def coarse(pieces: list[Extent], grain: int, size_bytes: int) -> list[Extent]:
    """Pieces with zeros that begin and end on a multiple of the grain."""
    if grain == 1:
        return pieces
    coarse: list[Extent] = []
    for piece in pieces:
        end = piece.offset + piece.length
        if piece.is_data:
            add_extent(coarse, piece.offset, end, True)
            continue
        first = min(end, -(-piece.offset // grain) * grain)
        last = end if end == size_bytes else max(first, end // grain * grain)
        add_extent(coarse, piece.offset, first, True)
        add_extent(coarse, first, last, False)
        add_extent(coarse, last, end, True)
    return coarse
