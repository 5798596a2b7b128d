"""The hot map: which regions of a disk may differ from its replica. A file beside the disk's entry.

======  ====  ==========================================
offset  size  field
======  ====  ==========================================
0       8     magic ``BRHOT001``
8       4     version, 1
12      4     zero
16      16    disk id
32      8     disk size in bytes
40      8     region bytes
4096          a bit per region, lowest bit first; 1 = hot
======  ====  ==========================================

Capture sets a bit and makes it durable before it writes to a cold region (hot_map.h). Nothing else
writes the file while a server holds the image's lock.
"""

from __future__ import annotations

import struct

import numpy as np
import numpy.typing as npt

MAGIC = b"BRHOT001"
HEADER = struct.Struct("<8sII16sQQ")
HEADER_BYTES = 4096


def region_count(size_bytes: int, region_bytes: int) -> int:
    return -(-size_bytes // region_bytes)


def encode(disk: bytes, size_bytes: int, region_bytes: int, *, hot: bool) -> bytes:
    """A whole file, all regions hot or all cold."""
    regions = np.full(region_count(size_bytes, region_bytes), hot, np.uint8)
    return encode_regions(disk, size_bytes, region_bytes, regions)


def encode_regions(
    disk: bytes, size_bytes: int, region_bytes: int, hot: npt.NDArray[np.uint8]
) -> bytes:
    """A whole file; ``hot`` has a byte per region, or fewer: the rest is cold."""
    header = HEADER.pack(MAGIC, 1, 0, disk, size_bytes, region_bytes).ljust(HEADER_BYTES, b"\0")
    regions = np.zeros(region_count(size_bytes, region_bytes), np.uint8)
    regions[: len(hot)] = hot
    return header + np.packbits(regions, bitorder="little").tobytes()


def decode(
    data: bytes, disk: bytes, size_bytes: int, region_bytes: int
) -> npt.NDArray[np.uint8] | None:
    """A byte per region, 1 = hot; None when the file is not this disk's map.

    The map of a larger disk is one, too: growing it broke off (storage/growing.py).
    """
    if len(data) < HEADER.size:
        return None
    *identity, mapped_bytes, grain = HEADER.unpack_from(data)
    if (identity, grain) != ([MAGIC, 1, 0, disk], region_bytes) or mapped_bytes < size_bytes:
        return None
    if len(data) != HEADER_BYTES + -(-region_count(mapped_bytes, region_bytes) // 8):
        return None
    bits = np.frombuffer(data, np.uint8, offset=HEADER_BYTES)
    return np.unpackbits(bits, bitorder="little", count=region_count(size_bytes, region_bytes))
