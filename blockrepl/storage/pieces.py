"""Content of the local image as records, for a first sync or a resync: holes and zeros stay zeros.

A piece is some regions that lie one after the other. What the file system says is a hole, and what
turns out to be zeros in whole blocks of 64 KiB, becomes zero records; the rest becomes writes.
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass

import numpy as np

from blockrepl import limits
from blockrepl.formats.frame import Columns, RecordKind

DATA_REGIONS_MAX = 4  # 4 MiB: new writes wait for one piece at the most
DATA_BYTES_MAX = DATA_REGIONS_MAX * limits.REGION_BYTES
assert DATA_BYTES_MAX + limits.REGION_BYTES <= limits.FRAME_PAYLOAD_BYTES_MAX
HOLE_REGIONS_MAX = 2048  # 2 GiB: a record's length is 32 bits


@dataclass(frozen=True, slots=True)
class Piece:
    regions: range  # those that were read: not all when a hole was filled meanwhile
    columns: Columns
    payload: bytes


def choose_regions(image: int, stale: np.ndarray, size_bytes: int) -> range:
    """The next regions to send: the first stale one and those behind it, more where it is a hole.

    ``stale``: a byte per region, at least one not zero.
    """
    first = int(np.argmax(stale != 0))
    ahead = stale[first : first + HOLE_REGIONS_MAX]
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
    end = min(regions.stop * limits.REGION_BYTES, size_bytes)
    extents: list[tuple[int, int, RecordKind]] = []
    parts: list[bytes] = []
    at = regions.start * limits.REGION_BYTES
    payload_bytes = 0
    while at < end:
        if payload_bytes >= DATA_BYTES_MAX:
            end = min(end, _region_up(at))
            if at == end:
                break
        data_at = _next_data(image, at, end)
        if data_at > at:
            _extend(extents, at, data_at, RecordKind.ZERO)
            at = data_at
            continue
        until = min(end, at + limits.BLOCK_BYTES - at % limits.BLOCK_BYTES)
        data = _read(image, at, until - at)
        if not np.frombuffer(data, np.uint8).any():
            _extend(extents, at, until, RecordKind.ZERO)
        else:
            _extend(extents, at, until, RecordKind.WRITE)
            parts.append(data)
            payload_bytes += len(data)
        at = until
    columns = Columns(
        np.full(len(extents), stamp, np.uint64),
        np.array([extent[0] for extent in extents], np.uint64),
        np.array([extent[1] - extent[0] for extent in extents], np.uint32),
        np.array([extent[2] for extent in extents], np.uint8),
    )
    read = range(regions.start, -(-end // limits.REGION_BYTES))
    return Piece(read, columns, b"".join(parts))


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


def _read(image: int, offset: int, length: int) -> bytes:
    data = os.pread(image, length, offset)
    while len(data) < length:
        more = os.pread(image, length - len(data), offset + len(data))
        if not more:
            return data.ljust(length, b"\0")
        data += more
    return data
