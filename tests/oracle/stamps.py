"""Sectors that say who wrote them.

A stamped sector is 64 words (little endian): word 0 is the stamp, word 1 the sector's number on the
disk, the others follow from these two, so that a sector put in the wrong place, or made of two,
is told from a whole one.

=========  =====================================================
bits       of a stamp
=========  =====================================================
63         1: stamped
40 .. 62   writer
0 .. 39    the writer's sequence number
=========  =====================================================

Requests of even sequence fill their sectors with one word (compressible), odd ones with noise.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

SECTOR_BYTES = 512
WORDS = SECTOR_BYTES // 8
ZEROS = -1  # the sector holds zeros
DAMAGED = -2  # neither zeros nor a whole stamped sector in its place

_STAMPED = np.uint64(1 << 63)
_SEQUENCE_BITS = 40
_STEP = np.arange(WORDS, dtype=np.uint64)[None, :] * np.uint64(0x9E3779B97F4A7C15)
_FACTOR = np.uint64(0xBF58476D1CE4E5B9)

Words = npt.NDArray[np.uint64]
Ids = npt.NDArray[np.int64]


def identity(writer: int, sequence: int) -> int:
    """What `decode` gives for the sectors of this request."""
    return writer << _SEQUENCE_BITS | sequence


def encode(writer: int, sequence: int, first_sector: int, sectors: int) -> bytes:
    """Content of a write."""
    stamps = np.full(sectors, identity(writer, sequence), np.uint64) | _STAMPED
    return _content(stamps, np.arange(first_sector, first_sector + sectors, dtype=np.uint64))


def decode(data: bytes) -> Ids:
    """Per sector: `identity` of the request that put it there, ZEROS or DAMAGED."""
    words = np.frombuffer(data, "<u8").reshape(-1, WORDS)
    found = (words[:, 0] & ~_STAMPED).astype(np.int64)
    stamped = words[:, 0] & _STAMPED != 0
    place = np.arange(len(words), dtype=np.uint64)
    expected = np.frombuffer(_content(words[:, 0], place), "<u8").reshape(-1, WORDS)
    found[~(stamped & (words == expected).all(axis=1))] = DAMAGED
    found[~words.any(axis=1)] = ZEROS
    return found


def _content(stamps: Words, places: Words) -> bytes:
    noise = (stamps & np.uint64(1))[:, None]
    words = (stamps * _FACTOR + places)[:, None] + _STEP * noise
    words ^= (words >> np.uint64(29)) * noise
    words *= _FACTOR * noise + (np.uint64(1) - noise)
    words ^= (words >> np.uint64(32)) * noise
    words[:, 0] = stamps
    words[:, 1] = places
    return words.astype("<u8", copy=False).tobytes()
