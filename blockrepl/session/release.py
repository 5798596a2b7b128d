"""What one message stands for: what may be let go at the source once it is durable.

Derived from the frame itself, so that a frame read back from the spool says the same as when it was
built. A region is never split over two frames, so a frame says all of the regions it touches.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np

from blockrepl import limits
from blockrepl.formats.frame import Columns, FrameHeader, FrameKind
from blockrepl.formats.marks import CheckpointMark, ConsistentMark, GapMark, GrowMark, Mark


@dataclass(frozen=True, slots=True)
class Release:
    disk: bytes = b""
    ring_id: int = 0  # the ring that next_sequence and regions speak of
    next_sequence: int = 0  # records of that ring before it are in this frame or an earlier one
    regions: tuple[int, ...] = ()  # whose content it holds
    gap_from: int = 0
    consistent: bool = False
    checkpoint: str = ""
    sync_epoch: int = 0  # regions count only within the stretch of syncing they were read in


@dataclass(slots=True)
class HeldReleases:
    """What is at the receiver without a number of its own, each until a frame behind it is durable.

    That is content in the base image. A receiver whose store is an older copy is known by its next
    number alone: what no number stands behind could be missing there, and nobody would know.
    """

    _held: deque[tuple[int, Release]] = field(default_factory=deque)

    def hold(self, number: int, release: Release) -> None:
        """Until frame ``number``, or one after it, is durable."""
        self._held.append((number, release))

    def take(self, next_number: int) -> list[Release]:
        """Those that may be let go when all frames before ``next_number`` are durable."""
        found = []
        while self._held and self._held[0][0] < next_number:
            found.append(self._held.popleft()[1])
        return found

    def clear(self) -> None:
        self._held.clear()


def release_of(header: FrameHeader, columns: Columns | None, mark: Mark | None) -> Release:
    """What a frame stands for. ``columns`` matter for content only."""
    if isinstance(mark, CheckpointMark):
        return Release(checkpoint=mark.name)
    if isinstance(mark, GapMark):
        return Release(mark.disk.bytes, gap_from=mark.from_ns)
    if isinstance(mark, ConsistentMark):
        place = header.ring_id, header.first_sequence
        return Release(mark.disk.bytes, *place, consistent=True)
    if isinstance(mark, GrowMark):
        return Release(mark.disk.bytes)  # nothing waits for it: the next answer to ATTACH tells
    if header.kind == FrameKind.RECORDS:
        taken = header.first_sequence + header.record_count if header.record_count else 0
        return Release(header.disk, header.ring_id, next_sequence=taken)
    assert columns is not None
    # A sync frame stands behind all records before its first_sequence: sent, or in its content.
    taken = header.first_sequence if header.kind == FrameKind.SYNC else 0
    return Release(header.disk, header.ring_id, next_sequence=taken, regions=_regions(columns))


def _regions(columns: Columns) -> tuple[int, ...]:
    region = np.uint64(limits.REGION_BYTES)
    first = columns.offsets // region
    last = (columns.offsets + columns.lengths - np.uint64(1)) // region
    spans = zip(first.tolist(), last.tolist(), strict=True)
    return tuple(sorted({one for low, high in spans for one in range(low, high + 1)}))
