"""The merged run: one file with the index of many consecutive sealed segments, per disk.

==========  =====================================================================================
part        content
==========  =====================================================================================
header      40 bytes: magic ``BRRUN001``, u32 version 1, u32 zero, group id (16), u64 xxh3-64 of
            bytes 0 to 31
runs        per disk: the chunks of its run, then their directory (run.py)
contents    JSON, ``MergedContents``
trailer     40 bytes: magic ``BRRUNEND``, u64 offset of contents, u64 size of contents, u64
            xxh3-64 of contents, u64 xxh3-64 of bytes 0 to 31 of the trailer
==========  =====================================================================================

Named ``FIRST-LAST-IDENTITY.run``: numbers of the first and last segment, and 16 hex digits of the
xxh3-64 over (number, created, bytes, frames), four u64 each, of every segment from FIRST to LAST as
the catalog has them. So a file's name says whether it is the index of the segments that are there:
one that is not, because a segment was rewritten or dropped since, is never looked into. Whoever
rewrites a segment must give it another time of making, or another size.

Reader: last 40 bytes, contents, a disk's directory, then the chunks that a lookup needs, each
proven by its digest. Derived data: a file that is missing, stale or damaged is passed over, for the
segments carry their own runs; it may be deleted at any time, and is made again.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable
from dataclasses import dataclass

import xxhash
from pydantic import BaseModel, ConfigDict, ValidationError

from blockrepl.errors import PeerError
from blockrepl.formats.segment import RunEntry

HEADER = struct.Struct("<8sII16s")
HEADER_BYTES = HEADER.size + 8
TRAILER = struct.Struct("<8sQQQ")
TRAILER_BYTES = TRAILER.size + 8
MAGIC = b"BRRUN001"
END_MAGIC = b"BRRUNEND"
VERSION = 1
_DIGEST = struct.Struct("<Q")
_SEGMENT = struct.Struct("<QQQQ")
_NAME = re.compile(r"(\d{12})-(\d{12})-([0-9a-f]{16})\.run")


@dataclass(frozen=True, slots=True)
class SegmentIdentity:
    """What tells a sealed segment from another one of its number."""

    number: int
    created_ns: int
    bytes: int
    frames: int


@dataclass(frozen=True, slots=True, order=True)
class MergedName:
    first: int  # segment numbers, both included
    last: int
    identity: int

    @classmethod
    def of(cls, segments: Iterable[SegmentIdentity]) -> MergedName:
        """The name of the merged run of segments, given by number. ValueError for none."""
        numbers = []
        digest = xxhash.xxh3_64()
        for each in segments:
            numbers.append(each.number)
            digest.update(_SEGMENT.pack(each.number, each.created_ns, each.bytes, each.frames))
        if not numbers:
            raise ValueError("a merged run is of at least one segment")
        return cls(numbers[0], numbers[-1], digest.intdigest())

    @classmethod
    def parse(cls, name: str) -> MergedName | None:
        match = _NAME.fullmatch(name)
        return cls(int(match[1]), int(match[2]), int(match[3], 16)) if match else None

    def __str__(self) -> str:
        return f"{self.first:012d}-{self.last:012d}-{self.identity:016x}.run"


class MergedContents(BaseModel):
    model_config = ConfigDict(frozen=True)
    name: str  # the file's
    first_stamp: int
    last_stamp: int
    runs: list[RunEntry]


def encode_header(group: bytes) -> bytes:
    packed = HEADER.pack(MAGIC, VERSION, 0, group)
    return packed + _DIGEST.pack(xxhash.xxh3_64_intdigest(packed))


def decode_header(data: bytes) -> bytes:
    """The group a merged run belongs to. PeerError."""
    if len(data) < HEADER_BYTES or data[:8] != MAGIC:
        raise PeerError("not a merged run: wrong magic")
    if _DIGEST.unpack_from(data, HEADER.size)[0] != xxhash.xxh3_64_intdigest(data[: HEADER.size]):
        raise PeerError("merged run's header does not match its digest")
    _magic, version, _zero, group = HEADER.unpack_from(data)
    if version != VERSION:
        raise PeerError(f"merged run version {version} is not known")
    return bytes(group)


def encode_end(contents: MergedContents, offset: int) -> bytes:
    """Contents and trailer, to be written at ``offset``."""
    encoded = contents.model_dump_json().encode()
    packed = TRAILER.pack(END_MAGIC, offset, len(encoded), xxhash.xxh3_64_intdigest(encoded))
    return encoded + packed + _DIGEST.pack(xxhash.xxh3_64_intdigest(packed))


def decode_trailer(data: bytes) -> tuple[int, int, int]:
    """Offset, size and digest of the contents. PeerError."""
    if len(data) != TRAILER_BYTES or data[:8] != END_MAGIC:
        raise PeerError("merged run is cut short")
    if _DIGEST.unpack_from(data, TRAILER.size)[0] != xxhash.xxh3_64_intdigest(data[: TRAILER.size]):
        raise PeerError("merged run's trailer does not match its digest")
    _magic, offset, size, digest = TRAILER.unpack_from(data)
    return offset, size, digest


def decode_contents(data: bytes, digest: int) -> MergedContents:
    if xxhash.xxh3_64_intdigest(data) != digest:
        raise PeerError("merged run's contents do not match their digest")
    try:
        return MergedContents.model_validate_json(data)
    except ValidationError as error:
        raise PeerError("merged run's contents do not parse") from error
