"""The content of a replica's disks: any range at any instant, from journal and base.

A range is first resolved, to a *window*: flat extents that say where its bytes are. Then any part
of the window is read.

=======  ================================================================
shows    is read from
=======  ================================================================
data     the frame's payload, each 64 KiB block proven (storage/payload.py)
zero     nothing: zero and trim records read as zeros
base     the base image; what lies beyond its end reads as zeros
=======  ================================================================

It does not matter whether a disk's first sync is done: the base is read as it is.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from dataclasses import dataclass
from pathlib import Path

from blockrepl.storage import _gather
from blockrepl.storage._gather import Gather
from blockrepl.storage.index import SHOWS_BASE, SHOWS_DATA, JournalIndex, Shown
from blockrepl.storage.payload import PayloadReader
from blockrepl.storage.reading import ReadFiles

assert (_gather.SHOWS_DATA, _gather.SHOWS_BASE) == (SHOWS_DATA, SHOWS_BASE)


@dataclass(frozen=True, slots=True)
class Extent:
    offset: int
    length: int
    is_data: bool  # else it reads as zeros


class Window:
    """A resolved range. Plain arrays: bisecting them costs a tenth of what numpy's search does."""

    __slots__ = ("bounds", "frames", "kinds", "positions", "segments")

    def __init__(self, shown: Shown, end: int) -> None:
        self.bounds = array("Q", shown.starts.tobytes())
        self.bounds.append(end)
        self.kinds = shown.kinds.tobytes()
        self.segments = array("I", shown.segments.tobytes())
        self.frames = array("I", shown.frames.tobytes())
        self.positions = array("I", shown.positions.tobytes())

    @property
    def end(self) -> int:
        return self.bounds[-1]

    def cost(self) -> int:
        """Bytes of memory."""
        return 512 + 21 * len(self.bounds)


class ContentReader:
    """Reads of one replica. May be used by several threads."""

    def __init__(self, index: JournalIndex, payload: PayloadReader, files: ReadFiles) -> None:
        self._index = index
        self._payload = payload
        self._files = files

    def resolve(self, disk: bytes, first: int, last: int, at_ns: int) -> Window:
        """Where the bytes of [first, last) of a disk are, at an instant. DamageError."""
        return Window(self._index.resolve(disk, first, last, at_ns), last)

    def read_into(
        self, image: Path, window: Window, at: int, target: memoryview, *, wait: bool = True
    ) -> None:
        """Fill ``target`` with what begins at ``at``; it ends in the window.

        DamageError, StorageError. Without ``wait``: BlockingIOError when it would take a device's
        time.
        """
        gather = Gather(
            window.bounds,
            window.kinds,
            window.segments,
            window.frames,
            window.positions,
            at,
            at + len(target),
        )
        self._payload.fill(gather, target, image, wait=wait)

    def add_extents(
        self, pieces: list[Extent], image: Path, window: Window, at: int, end: int
    ) -> None:
        """Append what of [at, end), a part of the window, is data and what reads as zeros.

        A piece of the kind of the last one there is joined to it.
        """
        place = bisect_right(window.bounds, at) - 1
        while at < end:
            stop = min(end, window.bounds[place + 1])
            kind = window.kinds[place]
            if kind == SHOWS_BASE:
                self._add_base(pieces, image, at, stop)
            else:
                add_extent(pieces, at, stop, kind == SHOWS_DATA)
            at, place = stop, place + 1

    def _add_base(self, pieces: list[Extent], image: Path, at: int, end: int) -> None:
        for first, last in self._files.data_ranges(image, at, end):
            add_extent(pieces, at, first, False)
            add_extent(pieces, first, last, True)
            at = last
        add_extent(pieces, at, end, False)


def add_extent(pieces: list[Extent], first: int, last: int, is_data: bool) -> None:
    """Append [first, last) to ascending pieces; it goes on where the last one ends."""
    if last <= first:
        return
    if pieces and pieces[-1].is_data == is_data:
        before = pieces.pop()
        pieces.append(Extent(before.offset, before.length + last - first, is_data))
    else:
        pieces.append(Extent(first, last - first, is_data))
