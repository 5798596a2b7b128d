"""The durable record: up to where a group's journal is durable, told to other processes.

One file, ``replicas/<group>/durable``, of 56 bytes, all u64, little-endian:

======  ==========================================================================
offset  field
======  ==========================================================================
0       number of the open segment
8       bytes of that segment's file that are durable
16      the group's watermark: the least of its live sources' durable watermarks
24      bytes of all segments together
32      receiver's clock when this was written, ns
40      xxh3-64 of the boot id of the receiver's machine, as it was written
48      xxh3-64 of bytes 0 to 47
======  ==========================================================================

Written with one pwrite after every commit and never synced: it is a hint that saves readers from
asking the receiver. It is never ahead of the truth; after a power cut it may be behind it or not
match its digest, so a reader believes it only on the machine, and in the boot, that wrote it. The
authority is the segments.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass, field
from pathlib import Path

import xxhash

FILE_NAME = "durable"
FIELDS = struct.Struct("<QQQQQQ")
DIGEST = struct.Struct("<Q")
RECORD_BYTES = FIELDS.size + DIGEST.size
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
READ_TRIES = 8  # a read may fall into the middle of a write


def this_boot() -> int:
    return xxhash.xxh3_64_intdigest(_BOOT_ID.read_bytes())


@dataclass(frozen=True, slots=True)
class Durable:
    segment_number: int
    segment_bytes: int
    watermark: int
    journal_bytes: int
    updated_ns: int
    boot: int = field(default_factory=this_boot)


def encode_durable(durable: Durable) -> bytes:
    packed = FIELDS.pack(
        durable.segment_number,
        durable.segment_bytes,
        durable.watermark,
        durable.journal_bytes,
        durable.updated_ns,
        durable.boot,
    )
    return packed + DIGEST.pack(xxhash.xxh3_64_intdigest(packed))


def decode_durable(data: bytes) -> Durable | None:
    """None when the bytes are not a whole record."""
    if len(data) != RECORD_BYTES:
        return None
    if DIGEST.unpack_from(data, FIELDS.size)[0] != xxhash.xxh3_64_intdigest(data[: FIELDS.size]):
        return None
    return Durable(*FIELDS.unpack_from(data))


def read_durable(path: Path) -> Durable | None:
    """The record in a file; None when it is missing or does not match its digest."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        for _ in range(READ_TRIES):
            durable = decode_durable(os.pread(descriptor, RECORD_BYTES + 1, 0))
            if durable is not None:
                return durable
    finally:
        os.close(descriptor)
    return None


class DurableFile:
    """The receiver's side."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(self._descriptor, RECORD_BYTES)
        except OSError:
            self.close()
            raise

    def write(self, durable: Durable) -> None:
        os.pwrite(self._descriptor, encode_durable(durable), 0)

    def close(self) -> None:
        os.close(self._descriptor)
