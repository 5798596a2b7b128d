"""The segment: one append-only journal file of frames; a sealed one carries its index.

==========  =====================================================================================
part        content
==========  =====================================================================================
header      64 bytes: magic ``BRSEG001``, u32 version 1, u32 zero, group id (16), u64 segment
            number, u64 stamp of its making, 8 bytes zero, u64 xxh3-64 of bytes 0 to 55
frames      back to back, as they came over the wire (frame.py)
runs        sealed only: per disk, the chunks of its index run, then their directory (run.py)
frame table sealed only: u64[frames] file offset of each frame, in order
contents    sealed only: JSON, ``Contents``
trailer     sealed only: 48 bytes: magic ``BRSEAL01``, u64 offset of contents, u64 size of
            contents, u64 xxh3-64 of contents, u64 xxh3-64 of the file up to the trailer,
            u64 xxh3-64 of bytes 0 to 39 of the trailer
==========  =====================================================================================

Reader of a sealed segment: last 48 bytes, contents, then any run without reading a frame. Reader
of an open one: frames from byte 64 on, until the first that is cut short or does not match its
digests: there the file ends. A file is sealed when its trailer checks; sealing is one append and
one fdatasync, so a half-written seal is cut off and done again.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from uuid import UUID

import xxhash
from pydantic import BaseModel, ConfigDict, ValidationError

from blockrepl.errors import PeerError

HEADER = struct.Struct("<8sII16sQQ8x")
HEADER_BYTES = HEADER.size + 8
TRAILER = struct.Struct("<8sQQQQ")
TRAILER_BYTES = TRAILER.size + 8
MAGIC = b"BRSEG001"
SEAL_MAGIC = b"BRSEAL01"
VERSION = 1
_DIGEST = struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class SegmentHeader:
    group: bytes
    number: int
    created: int


class RunEntry(BaseModel):
    """One disk's run within a file."""

    model_config = ConfigDict(frozen=True)
    disk: UUID
    directory_offset: int
    chunks: int
    long_chunks: int  # of them, the last ones: of entries longer than LONG_BYTES
    count: int
    first_stamp: int
    last_stamp: int
    digest: int  # xxh3-64 of the directory


class Contents(BaseModel):
    model_config = ConfigDict(frozen=True)
    frames_end: int  # file offset just past the last frame
    frame_table_offset: int
    frame_count: int
    frame_table_digest: int
    runs: list[RunEntry]


@dataclass(frozen=True, slots=True)
class Trailer:
    contents_offset: int
    contents_bytes: int
    contents_digest: int
    file_digest: int


GENERATION_SHIFT = 24  # numbers beyond are of a journal of petabytes
GENERATION_MAX = 255
NUMBER_MASK = (1 << GENERATION_SHIFT) - 1


def place(number: int, generation: int) -> int:
    """A segment file as one number; those of the same generation keep their order."""
    return generation << GENERATION_SHIFT | number


def file_name(number: int, generation: int = 0) -> str:
    """``generation``: how often retention has written the segment anew."""
    return f"{number:012d}-{generation}.seg" if generation else f"{number:012d}.seg"


def encode_header(header: SegmentHeader) -> bytes:
    packed = HEADER.pack(MAGIC, VERSION, 0, header.group, header.number, header.created)
    return packed + _DIGEST.pack(xxhash.xxh3_64_intdigest(packed))


def decode_header(data: bytes) -> SegmentHeader:
    if len(data) < HEADER_BYTES or data[:8] != MAGIC:
        raise PeerError("not a segment: wrong magic")
    if _DIGEST.unpack_from(data, HEADER.size)[0] != xxhash.xxh3_64_intdigest(data[: HEADER.size]):
        raise PeerError("segment header does not match its digest")
    _magic, version, _zero, group, number, created = HEADER.unpack_from(data)
    if version != VERSION:
        raise PeerError(f"segment version {version} is not known")
    return SegmentHeader(group, number, created)


def encode_trailer(trailer: Trailer) -> bytes:
    packed = TRAILER.pack(
        SEAL_MAGIC,
        trailer.contents_offset,
        trailer.contents_bytes,
        trailer.contents_digest,
        trailer.file_digest,
    )
    return packed + _DIGEST.pack(xxhash.xxh3_64_intdigest(packed))


def decode_trailer(data: bytes) -> Trailer | None:
    """The trailer in the last TRAILER_BYTES of a file, or None when the file is not sealed."""
    if len(data) != TRAILER_BYTES or data[:8] != SEAL_MAGIC:
        return None
    if _DIGEST.unpack_from(data, TRAILER.size)[0] != xxhash.xxh3_64_intdigest(data[: TRAILER.size]):
        return None
    _magic, offset, size, contents_digest, file_digest = TRAILER.unpack_from(data)
    return Trailer(offset, size, contents_digest, file_digest)


def decode_contents(trailer: Trailer, data: bytes) -> Contents:
    if xxhash.xxh3_64_intdigest(data) != trailer.contents_digest:
        raise PeerError("segment contents do not match their digest")
    try:
        return Contents.model_validate_json(data)
    except ValidationError as error:
        raise PeerError("segment contents do not parse") from error
