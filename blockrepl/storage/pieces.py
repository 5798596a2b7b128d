"""Content of the local image as records, for a first sync or a resync: holes and zeros stay zeros.

A piece is some regions that lie one after the other. What the file system says is a hole, and what
turns out to be zeros in whole blocks of 64 KiB, becomes zero records; the rest becomes writes.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from blockrepl import limits
from blockrepl.formats.frame import Columns, RecordKind
from blockrepl.storage.digests import digest_blocks, zero_digests

DATA_REGIONS_MAX = 4  # 4 MiB: new writes wait for one piece at the most
DATA_BYTES_MAX = DATA_REGIONS_MAX * limits.REGION_BYTES
assert DATA_BYTES_MAX + limits.REGION_BYTES <= limits.FRAME_PAYLOAD_BYTES_MAX
HOLE_REGIONS_MAX = 2048  # 2 GiB: a record's length is 32 bits


@dataclass(frozen=True, slots=True)
class Piece:
    regions: range  # those that were read: not all when a hole was filled meanwhile
    columns: Columns
    payload: bytes


def choose_regions(
    image: int, stale: np.ndarray, size_bytes: int, hole_regions_max: int = HOLE_REGIONS_MAX
) -> range:
    """The next regions to send: the first stale one and those behind it, more where it is a hole.

    ``stale``: a byte per region, at least one not zero.
    """
    first = int(np.argmax(stale != 0))
    ahead = stale[first : first + hole_regions_max]
    clean = np.nonzero(ahead == 0)[0]
    count = int(clean[0]) if len(clean) else len(ahead)
    start = first * limits.REGION_BYTES
    end = min((first + count) * limits.REGION_BYTES, size_bytes)
    data_at = _next_data(image, start, end)
    if data_at > start:
        holes = (data_at - start) // limits.REGION_BYTES if data_at < end else count
        count = holes or 1
    return range(first, first + (min(count, DATA_REGIONS_MAX) if data_at == start else count))


def read_piece(image: int, regions: range, size_bytes: int, stamp: int) -> Piece:
    """Read the regions. Every record gets the one stamp: all of it is newer than that instant.

    The guest may have filled what was chosen as a hole: then only the first regions are read, as
    many as fit a frame.
    """
    content = _Content(image)
    end = min(regions.stop * limits.REGION_BYTES, size_bytes)
    at = regions.start * limits.REGION_BYTES
    while at < end:
        if content.payload_bytes >= DATA_BYTES_MAX:
            end = min(end, _region_up(at))
            if at == end:
                break
        at = content.take(at, end)
    return Piece(
        range(regions.start, -(-end // limits.REGION_BYTES)),
        content.columns(stamp),
        b"".join(content.parts),
    )


def read_ranges(image: int, ranges: Sequence[tuple[int, int]], stamp: int) -> tuple[Columns, bytes]:
    """Read ranges (start, end) that together fit a frame, as `read_piece` does."""
    content = _Content(image)
    for start, end in ranges:
        while start < end:
            start = content.take(start, end)
    return content.columns(stamp), b"".join(content.parts)


def digest_range(image: int, start: int, end: int) -> bytes:
    """The digests of a range's blocks; ``start`` on a block's boundary. OSError."""
    digests = []
    while start < end:
        data_at = _next_data(image, start, end)
        hole_end = end if data_at == end else data_at - data_at % limits.COMPARE_BLOCK_BYTES
        if hole_end > start:
            digests.append(zero_digests(hole_end - start))
            start = hole_end
            continue
        until = min(end, start + limits.REGION_BYTES)
        digests.append(digest_blocks(_read(image, start, until - start)))
        start = until
    return b"".join(digests)


def count_data(image: int, start: int, end: int) -> int:
    """How many bytes of a range are not in holes. OSError."""
    total = 0
    while (data_at := _next_data(image, start, end)) < end:
        start = _next_hole(image, data_at, end)
        total += start - data_at
    return total


class _Content:
    """Records of what was read so far."""

    def __init__(self, image: int) -> None:
        self._image = image
        self._extents: list[tuple[int, int, RecordKind]] = []
        self.parts: list[bytes] = []
        self.payload_bytes = 0

    def take(self, at: int, end: int) -> int:
        """Read the next hole or block of [at, end); where it ends."""
        data_at = _next_data(self._image, at, end)
        if data_at > at:
            _extend(self._extents, at, data_at, RecordKind.ZERO)
            return data_at
        until = min(end, at + limits.BLOCK_BYTES - at % limits.BLOCK_BYTES)
        data = _read(self._image, at, until - at)
        if not np.frombuffer(data, np.uint8).any():
            _extend(self._extents, at, until, RecordKind.ZERO)
        else:
            _extend(self._extents, at, until, RecordKind.WRITE)
            self.parts.append(data)
            self.payload_bytes += len(data)
        return until

    def columns(self, stamp: int) -> Columns:
        extents = self._extents
        return Columns(
            np.full(len(extents), stamp, np.uint64),
            np.array([extent[0] for extent in extents], np.uint64),
            np.array([extent[1] - extent[0] for extent in extents], np.uint32),
            np.array([extent[2] for extent in extents], np.uint8),
        )


def _region_up(offset: int) -> int:
    return -(-offset // limits.REGION_BYTES) * limits.REGION_BYTES


def _extend(
    extents: list[tuple[int, int, RecordKind]], start: int, end: int, kind: RecordKind
) -> None:
    if extents and extents[-1][1] == start and extents[-1][2] == kind:
        extents[-1] = (extents[-1][0], end, kind)
    else:
        extents.append((start, end, kind))


def _next_data(image: int, start: int, end: int) -> int:
    """First byte at or after ``start`` that may be data; ``end`` when there is none before it."""
    try:
        return min(os.lseek(image, start, os.SEEK_DATA), end)
    except OSError as error:
        if error.errno == errno.ENXIO:  # nothing but a hole up to the end of the file
            return end
        if error.errno == errno.EINVAL:  # a block device knows no holes
            return start
        raise


def _next_hole(image: int, start: int, end: int) -> int:
    """The end of the data that begins at ``start``; ``end`` when it reaches there."""
    try:
        return min(os.lseek(image, start, os.SEEK_HOLE), end)
    except OSError as error:
        if error.errno == errno.EINVAL:
            return end
        raise


def _read(image: int, offset: int, length: int) -> bytes:
    data = os.pread(image, length, offset)
    while len(data) < length:
        more = os.pread(image, length - len(data), offset + len(data))
        if not more:
            return data.ljust(length, b"\0")
        data += more
    return data
