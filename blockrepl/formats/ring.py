"""The ring's layout in shared memory, for the agent. ``capture/ring.h`` is the same for capture.

A file: header (4096 bytes), in-flight table, stale map, syncing map, slots, payload; each part
begins on a page. What the parts mean and who writes what is told in ring.h.

======  ====  ===========================================================================
offset  size  header field
======  ====  ===========================================================================
0       8     magic ``BRRING01``
8       4     version, 2
12      4     1 once the file is fully set up
16      8     ring id
24      16    disk id
40      8     disk size in bytes
48      8     region bytes
56      8     region count
64      8     slot count
72      8     payload bytes
80      8     clock offset in ns, signed: stamp = CLOCK_MONOTONIC + offset
128     8     head: sequence of the next record
136     8     busy: odd from just before a stamp is taken until its record is published
144     8     last stamp
152     8     gap from: first stamp not kept, 0 for none
160     8     records dropped
168     8     payload bytes ever appended
176     8     hot regions
184     8     writer's process id
192     8     records before this sequence are on the local disk
200     8     1 once the local disk has failed to flush
208     8     flush unknown: servers that were killed inside a flush of the local disk
256     8     tail: records before this sequence may be overwritten
264     8     durable: records before this sequence are durable at the receiver
272     8     next number: the group's frames before it are durable at the receiver; 0: not known
280     8     flush known: of those, how many flushes are known to have taken no error with them
512     256   flushing: generations, each odd while a flush is under way
======  ====  ===========================================================================
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np

from blockrepl import limits

MAGIC = b"BRRING01"
VERSION = 2  # 1 had no durable
HEADER = struct.Struct("<8sIIQ16sQQQQQq")
HEADER_BYTES = 4096
PAGE_BYTES = 4096
INFLIGHT_SLOTS = 128
FLUSH_SLOTS = 160

COMPLETE_AT = 12
HEAD_AT = 128
BUSY_AT = 136
LAST_STAMP_AT = 144
GAP_FROM_AT = 152
DROPPED_AT = 160
WRITTEN_AT = 168
HOT_REGIONS_AT = 176
WRITER_AT = 184
FLUSHED_AT = 192
FLUSH_FAILED_AT = 200
FLUSH_UNKNOWN_AT = 208
TAIL_AT = 256
DURABLE_AT = 264
NEXT_NUMBER_AT = 272
FLUSH_KNOWN_AT = 280
FLUSHING_AT = 512

INFLIGHT = np.dtype([("start", "<u8"), ("end", "<u8"), ("generation", "<u8"), ("reserved", "<u8")])
SLOT = np.dtype(
    {
        "names": ["stamp", "offset", "position", "length", "kind"],
        "formats": ["<u8", "<u8", "<u8", "<u4", "u1"],
        "offsets": [0, 8, 16, 24, 28],
        "itemsize": 32,
    }
)
SLOT_SHARE = 16  # a sixteenth of the ring is slots: full of 512-byte records they run out together


@dataclass(frozen=True, slots=True)
class RingGeometry:
    """Sizes of a ring, and from them where each part begins."""

    ring_id: int
    disk: bytes
    size_bytes: int
    region_bytes: int
    region_count: int
    slot_count: int
    payload_bytes: int
    clock_offset: int

    @property
    def inflight_at(self) -> int:
        return HEADER_BYTES

    @property
    def stale_at(self) -> int:
        return self.inflight_at + INFLIGHT_SLOTS * INFLIGHT.itemsize

    @property
    def syncing_at(self) -> int:
        return self.stale_at + page_up(self.region_count)

    @property
    def slots_at(self) -> int:
        return self.syncing_at + page_up(self.region_count)

    @property
    def payload_at(self) -> int:
        return self.slots_at + page_up(self.slot_count * SLOT.itemsize)

    @property
    def file_bytes(self) -> int:
        return self.payload_at + self.payload_bytes


def page_up(size: int) -> int:
    return -(-size // PAGE_BYTES) * PAGE_BYTES


def geometry(
    *,
    ring_id: int,
    disk: bytes,
    size_bytes: int,
    region_bytes: int,
    ring_bytes: int,
    clock_offset: int,
) -> RingGeometry:
    """Share ``ring_bytes`` out between slots and payload."""
    slot_bytes = ring_bytes // SLOT_SHARE
    return RingGeometry(
        ring_id=ring_id,
        disk=disk,
        size_bytes=size_bytes,
        region_bytes=region_bytes,
        region_count=-(-size_bytes // region_bytes),
        slot_count=slot_bytes // SLOT.itemsize,
        payload_bytes=(ring_bytes - slot_bytes) // PAGE_BYTES * PAGE_BYTES,
        clock_offset=clock_offset,
    )


def encode_geometry(ring: RingGeometry) -> bytes:
    """The header's first bytes, not yet marked complete."""
    return HEADER.pack(
        MAGIC,
        VERSION,
        0,
        ring.ring_id,
        ring.disk,
        ring.size_bytes,
        ring.region_bytes,
        ring.region_count,
        ring.slot_count,
        ring.payload_bytes,
        ring.clock_offset,
    )


def decode_geometry(data: bytes) -> RingGeometry | None:
    """None when this is not a complete ring of this version, or one that cannot be."""
    if len(data) < HEADER.size:
        return None
    magic, version, complete, *rest = HEADER.unpack_from(data)
    if magic != MAGIC or version != VERSION or not complete:
        return None
    found = RingGeometry(*rest)
    return found if _is_sound(found) else None


def _is_sound(ring: RingGeometry) -> bool:
    """Whether its sizes suit each other, and can be mapped."""
    return (
        0 < ring.size_bytes <= limits.DISK_BYTES_MAX
        and ring.region_bytes > 0
        and ring.region_count == -(-ring.size_bytes // ring.region_bytes)
        and ring.slot_count > 0
        and ring.payload_bytes > 0
        and ring.slot_count * SLOT.itemsize + ring.payload_bytes <= limits.RING_BYTES_MAX
    )
