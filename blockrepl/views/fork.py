"""A fork as the doors see it: a view with an overlay on top, which can be written to.

A block of the overlay hides the view's; a block that was made zeros hides it too. What is read and
written passes through here, so two readers of one fork see the same.
"""

from __future__ import annotations

from functools import partial

from blockrepl.errors import StorageError
from blockrepl.formats.fork_map import BELOW, DATA
from blockrepl.formats.frame import Buffer
from blockrepl.storage._gather import unfilled
from blockrepl.storage.content import Extent, add_extent
from blockrepl.storage.overlay import Overlay
from blockrepl.views.view import View, ViewDisk, coarse


class WritableView:
    """A view's disks with a fork's overlays. May be used by several threads."""

    def __init__(self, view: View, overlays: dict[str, Overlay]) -> None:
        self.at_ns = view.at_ns
        self.disks = {name: disk for name, disk in view.disks.items() if name in overlays}
        self._view = view
        self._overlays = overlays

    def disk(self, name: str) -> ViewDisk:
        """StateError when there is none."""
        return self._view.disk(name)

    def allocated_bytes(self, name: str) -> int:
        """About what the disk's content takes."""
        disk = self.disk(name)
        own = self._overlays[name].data_bytes
        return min(disk.size_bytes, self._view.allocated_bytes(name) + own)

    def read(self, name: str, offset: int, length: int, *, wait: bool = True) -> bytearray:
        """As `View.read`."""
        buffer = unfilled(self.disk(name).held(offset, length))
        if buffer:
            self.read_into(name, offset, memoryview(buffer), wait=wait)
        return buffer

    def read_into(self, name: str, offset: int, target: memoryview, *, wait: bool = True) -> None:
        """As `View.read_into`."""
        self.disk(name).check(offset, len(target))
        overlay = self._overlays[name]
        for start, stop, state in overlay.pieces(offset, offset + len(target)):
            part = target[start - offset : stop - offset]
            if state == DATA:
                overlay.read_into(part, start, wait=wait)
            elif state == BELOW:
                self._view.read_into(name, start, part, wait=wait)
            else:
                part[:] = bytes(len(part))

    def extents(self, name: str, offset: int, length: int, *, grain: int = 1) -> list[Extent]:
        """As `View.extents`."""
        disk = self.disk(name)
        found: list[Extent] = []
        end = min(offset + length, disk.size_bytes)
        for start, stop, state in self._overlays[name].pieces(offset, end):
            if state != BELOW:
                add_extent(found, start, stop, state == DATA)
                continue
            for extent in self._view.extents(name, start, stop - start):
                after = extent.offset + extent.length
                add_extent(found, extent.offset, after, extent.is_data)
        return coarse(found, grain, disk.size_bytes)

    def write(self, name: str, offset: int, data: Buffer, *, wait: bool = True) -> None:
        """UsageError beyond the disk's end; StorageError, code "full" when there is no room.

        Without ``wait``: BlockingIOError when it would take a device's time.
        """
        self.disk(name).check(offset, len(data))
        below = partial(self._view.read, name, wait=wait)
        self._overlays[name].write(offset, data, below, wait=wait)

    def zero(self, name: str, offset: int, length: int) -> None:
        """As a write of zeros, without taking room for them."""
        self.disk(name).check(offset, length)
        self._overlays[name].zero(offset, length, partial(self._view.read, name))

    def flush(self, name: str) -> None:
        """Make durable what was written to a disk. StorageError."""
        self._overlays[name].flush()

    def flush_all(self) -> None:
        """Make durable what was written, to every disk that it can be done for. StorageError."""
        failures = []
        for name in self._overlays:
            try:
                self.flush(name)
            except StorageError as error:
                failures.append(error)
        if failures:
            raise failures[0]

    def close(self) -> None:
        """Flush, and close the overlays. StorageError when they could not be flushed."""
        try:
            self.flush_all()
        finally:
            for overlay in self._overlays.values():
                overlay.close()
            self._overlays = {}
