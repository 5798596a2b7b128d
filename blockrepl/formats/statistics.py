"""The statistics of a sealed segment: what its frames wrote, without their records.

All numbers little-endian.

==========  =====================================================================================
part        content
==========  =====================================================================================
header      40 bytes: magic ``BRSTAT01``, u64 stamp of the segment's making, u64 bytes of its
            file, u32 disks d, u32 frames n, u32 sampled blocks s, u32 level of the sample
disks       d disk ids of 16 bytes
frames      n rows of ``FRAME``, in the order of the segment: of the frames that have records
sample      u32[s] the row of the frame, u64[s] a block of 4 KiB that it touches; at level L one
            of 2^L neighbouring blocks stands for all (model/block_sample.py)
end         u64 xxh3-64 of all before
==========  =====================================================================================

The reader's algorithm: the sizes in the header give the file's, the digest proves it, the stamp and
the bytes say that it is of this segment as it is. Whatever does not fit is made again.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import xxhash

from blockrepl.errors import PeerError
from blockrepl.formats.frame import U32, U64

HEADER = struct.Struct("<8sQQIIII")
MAGIC = b"BRSTAT01"
LEVEL_MAX = 36  # one block stands for the largest disk
_DIGEST = struct.Struct("<Q")
FRAME = np.dtype(
    [
        ("ordinal", "<u4"),  # of the frame in its segment
        ("disk", "<u2"),  # its place among the disks
        ("kind", "<u2"),  # FrameKind
        ("first_stamp", "<u8"),
        ("last_stamp", "<u8"),
        ("written_bytes", "<u8"),  # by its writes: its payload
        ("stored_bytes", "<u8"),  # of it, compressed
        ("zeroed_bytes", "<u8"),
        ("trimmed_bytes", "<u8"),
        ("writes", "<u4"),
        ("zeros", "<u4"),
        ("trims", "<u4"),
        ("flushes", "<u4"),
    ]
)


@dataclass(frozen=True, slots=True)
class Statistics:
    disks: tuple[bytes, ...]
    frames: npt.NDArray[np.void]  # of FRAME
    sample_frames: U32
    sample_blocks: U64
    level: int


def encode(statistics: Statistics, created_ns: int, size_bytes: int) -> bytes:
    """``created_ns`` and ``size_bytes``: the segment's."""
    header = HEADER.pack(
        MAGIC,
        created_ns,
        size_bytes,
        len(statistics.disks),
        len(statistics.frames),
        len(statistics.sample_blocks),
        statistics.level,
    )
    parts = (
        header,
        *statistics.disks,
        statistics.frames.tobytes(),
        statistics.sample_frames.astype("<u4").tobytes(),
        statistics.sample_blocks.astype("<u8").tobytes(),
    )
    data = b"".join(parts)
    return data + _DIGEST.pack(xxhash.xxh3_64_intdigest(data))


def decode(data: bytes, created_ns: int, size_bytes: int) -> Statistics:
    """The statistics of the segment of that making and size. PeerError."""
    if len(data) < HEADER.size + _DIGEST.size or data[:8] != MAGIC:
        raise PeerError("not a segment's statistics: wrong magic")
    if _DIGEST.unpack(data[-8:])[0] != xxhash.xxh3_64_intdigest(memoryview(data)[:-8]):
        raise PeerError("statistics do not match their digest")
    _magic, created, size, disks, frames, sampled, level = HEADER.unpack_from(data)
    if (created, size) != (created_ns, size_bytes):
        raise PeerError("statistics are of another segment")
    ids = HEADER.size
    rows = ids + 16 * disks
    owners = rows + FRAME.itemsize * frames
    blocks = owners + 4 * sampled
    if len(data) != blocks + 8 * sampled + _DIGEST.size or level > LEVEL_MAX:
        raise PeerError("statistics sizes contradict each other")
    found = Statistics(
        tuple(data[at : at + 16] for at in range(ids, rows, 16)),
        np.frombuffer(data, FRAME, frames, rows),
        np.frombuffer(data, np.uint32, sampled, owners),
        np.frombuffer(data, np.uint64, sampled, blocks),
        level,
    )
    if (found.frames["disk"] >= disks).any() or (found.sample_frames >= frames).any():
        raise PeerError("statistics name a disk or a frame that they do not have")
    return found
