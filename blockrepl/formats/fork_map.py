"""The block map of a fork: which blocks of a disk its overlay holds, and which it made zeros.

A file that is only appended to; integers are unsigned, little-endian:

======  ====  ==========================================================
offset  size  field of the header (HEADER_BYTES)
======  ====  ==========================================================
0       8     magic ``BRFORK1`` and a zero
8       8     the disk's size in bytes
16      4     bytes of a block
20      4     zero
24      8     xxh3-64 of bytes 0 to 23
======  ====  ==========================================================

Then records, each of them the blocks that changed their state between two flushes:

======  ====  ==========================================================
offset  size  field of a record
======  ====  ==========================================================
0       4     number of changes
4       4     zero
8       8     xxh3-64, seeded with the record's offset, of all but these 8 bytes
16      ...   changes
======  ====  ==========================================================

======  ====  ==========================================================
offset  size  field of a change (CHANGE_BYTES)
======  ====  ==========================================================
0       8     first block
8       4     number of blocks
12      4     what they are from then on: 1 data of the overlay, 2 zeros
======  ====  ==========================================================

The reader applies record after record, from no block at all; a later change wins. The file ends
where a record is cut short or does not match its digest: that is what a crash leaves.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import xxhash

from blockrepl.errors import PeerError
from blockrepl.formats.frame import Buffer

MAGIC = b"BRFORK1\0"
HEADER = struct.Struct("<8sQIIQ")
RECORD = struct.Struct("<IIQ")
CHANGE = struct.Struct("<QII")
HEADER_BYTES, RECORD_BYTES, CHANGE_BYTES = HEADER.size, RECORD.size, CHANGE.size
BELOW, DATA, ZEROS = 0, 1, 2  # a block's state; BELOW: what the view shows


@dataclass(frozen=True, slots=True)
class Change:
    """Blocks [first, first + count) are ``state`` from then on."""

    first: int
    count: int
    state: int


def encode_header(size_bytes: int, block_bytes: int) -> bytes:
    fields = HEADER.pack(MAGIC, size_bytes, block_bytes, 0, 0)[:-8]
    return fields + xxhash.xxh3_64_intdigest(fields).to_bytes(8, "little")


def decode_header(data: Buffer) -> tuple[int, int]:
    """The disk's size and a block's. PeerError."""
    if len(data) < HEADER_BYTES:
        raise PeerError("block map is cut short")
    magic, size_bytes, block_bytes, _, digest = HEADER.unpack_from(data)
    if magic != MAGIC or digest != xxhash.xxh3_64_intdigest(memoryview(data)[: HEADER_BYTES - 8]):
        raise PeerError("block map has no true header")
    if block_bytes == 0:
        raise PeerError("block map has blocks of no size")
    return size_bytes, block_bytes


def encode_record(offset: int, changes: Sequence[Change]) -> bytes:
    """A record to be written at ``offset`` of the file."""
    body = b"".join(CHANGE.pack(each.first, each.count, each.state) for each in changes)
    return RECORD.pack(len(changes), 0, _digest(offset, len(changes), body)) + body


def decode_records(data: Buffer, blocks: int) -> Iterator[tuple[list[Change], int]]:
    """The records of a whole file of a disk of ``blocks``, and the offset behind each."""
    view = memoryview(data)
    offset = HEADER_BYTES
    while offset + RECORD_BYTES <= len(view):
        count, reserved, digest = RECORD.unpack_from(view, offset)
        end = offset + RECORD_BYTES + count * CHANGE_BYTES
        if end > len(view) or reserved:
            return
        body = view[offset + RECORD_BYTES : end]
        if digest != _digest(offset, count, body):
            return
        changes = [Change(*fields) for fields in CHANGE.iter_unpack(body)]
        if any(c.first + c.count > blocks or c.state not in (DATA, ZEROS) for c in changes):
            return
        yield changes, end
        offset = end


def _digest(offset: int, count: int, body: Buffer) -> int:
    digest = xxhash.xxh3_64(count.to_bytes(8, "little"), seed=offset)
    digest.update(body)
    return digest.intdigest()
