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
    header = HEADER.pack(MAGIC, 1, 0, disk, size_bytes, region_bytes).ljust(HEADER_BYTES, b"\0")
    bits = np.full(region_count(size_bytes, region_bytes), hot, np.uint8)
    return header + np.packbits(bits, bitorder="little").tobytes()


def decode(
    data: bytes, disk: bytes, size_bytes: int, region_bytes: int
) -> npt.NDArray[np.uint8] | None:
    """A byte per region, 1 = hot; None when the file is not this disk's map."""
    count = region_count(size_bytes, region_bytes)
    if len(data) != HEADER_BYTES + -(-count // 8):
        return None
    if HEADER.unpack_from(data) != (MAGIC, 1, 0, disk, size_bytes, region_bytes):
        return None
    bits = np.frombuffer(data, np.uint8, offset=HEADER_BYTES)
    return np.unpackbits(bits, bitorder="little", count=count)
