"""COMPARE and VERDICT: where does the replica of a range differ from the source?

One mechanism for resync (only what differs is sent) and scrub (proof that nothing does). The source
sends digests of what it read; the receiver answers which blocks of its own content differ.

COMPARE stands in the stream: every record of the disk with a stamp up to ``stamp`` was sent before
it. The range is digested in blocks of 64 KiB; only the disk's last block may be shorter.
All numbers little-endian.

=======  =====  ==========================================================================
offset   size   field of COMPARE
=======  =====  ==========================================================================
0        16     group id
16       16     disk id
32       8      token, the source's own; comes back in the verdict
40       1      purpose: 1 resync, 2 scrub
41       8      stamp: the instant whose content is compared
49       8      offset of the range in the disk, a multiple of 64 KiB
57       8      length of the range: n blocks, the last of which may be short
65       16 n   the first half of the SHA-256 of each block
=======  =====  ==========================================================================

=======  =====  ==========================================================================
offset   size   field of VERDICT
=======  =====  ==========================================================================
0        16     group id
16       8      token of the COMPARE that it answers
24       4      block count n
28       n/8    bit i % 8 of byte i // 8 (rounded up): block i differs, or cannot be read at
                the receiver; the bits after the last block are 0
=======  =====  ==========================================================================

The reader's algorithm: the fixed part, its fields against the limits, then exactly as many bytes as
the length or the count ask for. Foreign bytes raise ``PeerError`` and nothing else.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from blockrepl import limits
from blockrepl.errors import PeerError
from blockrepl.formats.frame import Buffer
from blockrepl.limits import COMPARE_BLOCK_BYTES, COMPARE_BYTES_MAX

DIGEST_BYTES = 16
BLOCKS_MAX = COMPARE_BYTES_MAX // COMPARE_BLOCK_BYTES
STAMP_MAX = (1 << 63) - 1  # what SQLite holds
_COMPARE = struct.Struct("<16s16sQBQQQ")
_VERDICT = struct.Struct("<16sQI")
COMPARE_MESSAGE_BYTES_MAX = _COMPARE.size + BLOCKS_MAX * DIGEST_BYTES
VERDICT_MESSAGE_BYTES_MAX = _VERDICT.size + BLOCKS_MAX // 8


class Purpose(IntEnum):
    RESYNC = 1
    SCRUB = 2


@dataclass(frozen=True, slots=True)
class Compare:
    """``digests`` are those of the range's blocks, one after the other."""

    group: bytes
    disk: bytes
    token: int
    purpose: Purpose
    stamp: int
    offset: int
    length: int
    digests: bytes

    @property
    def block_count(self) -> int:
        return block_count(self.length)


@dataclass(frozen=True, slots=True)
class Verdict:
    """``differing`` are the numbers of the blocks that differ, ascending."""

    group: bytes
    token: int
    block_count: int
    differing: tuple[int, ...]


def block_count(length: int) -> int:
    """Blocks of a range that begins on a block's boundary."""
    return -(-length // COMPARE_BLOCK_BYTES)


def encode_compare(compare: Compare) -> bytes:
    return (
        _COMPARE.pack(
            compare.group,
            compare.disk,
            compare.token,
            compare.purpose,
            compare.stamp,
            compare.offset,
            compare.length,
        )
        + compare.digests
    )


def decode_compare(payload: Buffer) -> Compare:
    """Raises PeerError."""
    if len(payload) < _COMPARE.size:
        raise PeerError("comparison is cut short")
    group, disk, token, purpose, stamp, offset, length = _COMPARE.unpack_from(payload)
    if purpose not in Purpose._value2member_map_:
        raise PeerError(f"comparison of purpose {purpose} is not known")
    if stamp > STAMP_MAX:
        raise PeerError("comparison at an instant that cannot be")
    if not 0 < length <= COMPARE_BYTES_MAX:
        raise PeerError(f"comparison of {length} bytes is over the limit, or of none")
    if offset % COMPARE_BLOCK_BYTES or offset + length > limits.DISK_BYTES_MAX:
        raise PeerError("comparison is of a range that cannot be")
    digests = bytes(memoryview(payload)[_COMPARE.size :])
    if len(digests) != block_count(length) * DIGEST_BYTES:
        raise PeerError("comparison has another number of digests than of blocks")
    return Compare(group, disk, token, Purpose(purpose), stamp, offset, length, digests)


def encode_verdict(verdict: Verdict) -> bytes:
    bits = np.zeros(verdict.block_count, np.uint8)
    bits[list(verdict.differing)] = 1
    packed = np.packbits(bits, bitorder="little").tobytes()
    return _VERDICT.pack(verdict.group, verdict.token, verdict.block_count) + packed


def decode_verdict(payload: Buffer) -> Verdict:
    """Raises PeerError."""
    if len(payload) < _VERDICT.size:
        raise PeerError("verdict is cut short")
    group, token, count = _VERDICT.unpack_from(payload)
    if not 0 < count <= BLOCKS_MAX:
        raise PeerError(f"verdict over {count} blocks is over the limit, or over none")
    packed = np.frombuffer(payload, np.uint8, offset=_VERDICT.size)
    if len(packed) != -(-count // 8):
        raise PeerError("verdict has the wrong size")
    bits = np.unpackbits(packed, bitorder="little")
    if bits[count:].any():
        raise PeerError("verdict over more blocks than it says")
    return Verdict(group, token, count, tuple(np.flatnonzero(bits).tolist()))
