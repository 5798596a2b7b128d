"""What one message stands for: what may be let go at the source once it is durable.

Derived from the frame itself, so that a frame read back from the spool says the same as when it was
built. A region is never split over two frames, so a frame says all of the regions it touches.
"""

from __future__ import annotations

from dataclasses import dataclass

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


def release_of(header: FrameHeader, columns: Columns | None, mark: Mark | None) -> Release:
    """What a frame stands for. ``columns`` matter for content only."""
    if isinstance(mark, CheckpointMark):
        return Release(checkpoint=mark.name)
    if isinstance(mark, GapMark):
        return Release(mark.disk.bytes, gap_from=mark.from_ns)
    if isinstance(mark, ConsistentMark):
        return Release(mark.disk.bytes, consistent=True)
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
