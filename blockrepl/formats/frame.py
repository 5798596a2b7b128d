"""The frame: a batch of records of one disk; the same bytes on the wire and in the journal.

A frame is a header, then a body of columns, block table and blocks. All numbers little-endian.

=======  ====  ==============================================================================
offset   size  header field
=======  ====  ==============================================================================
0        4     magic ``BRF1``
4        2     version, 1
6        1     kind: 1 records, 2 base, 3 sync, 4 mark
7        1     reserved, 0
8        16    group id
24       16    source id (the agent that built it)
40       16    disk id; zeros when the frame is of no disk
56       8     number: 1, 2, 3 ... per group and source; 0 for kind base
64       4     epoch of the disk
68       4     record count n
72       8     first stamp (0 when n = 0)
80       8     last stamp (0 when n = 0)
88       8     watermark: every record of this source's disks in the group with a stamp up to it is
               in this frame or in one of a smaller number
96       8     ring id, the incarnation of the ring the records were taken from; 0 for none
104      8     sequence of the first record in that ring; kind sync, and the mark that ends a sync:
               of the next record to be sent
112      8     payload bytes, before compression
120      4     body bytes, as stored
124      4     block count b
128      8     xxh3-64 of columns and block table
136      8     xxh3-64 of bytes 0 to 135
=======  ====  ==============================================================================

Body: columns ``stamps u64[n] offsets u64[n] lengths u32[n] kinds u8[n]``, block table
``digests u64[b] stored u32[b]``, then the b blocks. Block i holds payload bytes
[i * 64 KiB, (i + 1) * 64 KiB), LZ4-compressed, or raw where the top bit of ``stored[i]`` is set;
``digests[i]`` is the xxh3-64 of the block as stored. So any 64 KiB of payload can be read and
proven without the rest. The payload is the data of the write records, in order, without padding.

A record's kind is 0 write, 1 zero, 2 trim, 3 flush; bit 7 says that the guest asked for FUA. Only
a write has payload. Kind base: content of a first sync, for the base image. Kind sync: content of
a resync, stamped with the instant it is newer than. Kind mark: n = 0, payload is JSON (marks.py).

The reader's algorithm: 144 bytes; check magic, version, header digest, limits; read the body;
check its digest, then each block before use. Foreign bytes raise ``PeerError`` and nothing else.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum

import lz4.block
import numpy as np
import numpy.typing as npt
import xxhash

from blockrepl import limits
from blockrepl.errors import PeerError
from blockrepl.formats._blocks import encode_blocks, first_damaged

Buffer = bytes | bytearray | memoryview
U8 = npt.NDArray[np.uint8]
U32 = npt.NDArray[np.uint32]
U64 = npt.NDArray[np.uint64]

MAGIC = b"BRF1"
VERSION = 1
HEADER = struct.Struct("<4sHBB16s16s16sQIIQQQQQQIIQ")
HEADER_BYTES = HEADER.size + 8
RECORD_BYTES = 21  # columns, per record
BLOCK_ENTRY_BYTES = 12
RAW_BIT = 0x8000_0000
NO_ID = bytes(16)
_DIGEST = struct.Struct("<Q")


class FrameKind(IntEnum):
    RECORDS = 1
    BASE = 2
    SYNC = 3
    MARK = 4


class RecordKind(IntEnum):
    WRITE = 0
    ZERO = 1
    TRIM = 2
    FLUSH = 3


FUA = 0x80
KIND_MASK = 0x7F


@dataclass(frozen=True, slots=True)
class FrameHeader:
    kind: FrameKind
    group: bytes
    source: bytes
    disk: bytes
    number: int
    epoch: int
    record_count: int
    first_stamp: int
    last_stamp: int
    watermark: int
    ring_id: int
    first_sequence: int
    payload_bytes: int
    body_bytes: int
    block_count: int
    digest: int

    @property
    def frame_bytes(self) -> int:
        return HEADER_BYTES + self.body_bytes

    @property
    def blocks_offset(self) -> int:
        """Bytes of the body before the first block."""
        return self.record_count * RECORD_BYTES + self.block_count * BLOCK_ENTRY_BYTES


@dataclass(frozen=True, slots=True)
class Columns:
    """Records as columns, all of one length n. Arrays may be views of foreign memory."""

    stamps: U64
    offsets: U64
    lengths: U32
    kinds: U8

    def payload_lengths(self) -> U64:
        """Payload bytes of each record: its length for a write, else 0."""
        return np.where((self.kinds & KIND_MASK) == RecordKind.WRITE, self.lengths, 0).astype(
            np.uint64
        )


@dataclass(frozen=True, slots=True)
class Blocks:
    """The block table: where each stored block lies in the body."""

    offsets: U64  # b + 1 entries, relative to the body's start
    raw: npt.NDArray[np.bool_]
    digests: U64
    payload_bytes: int


@dataclass(frozen=True, slots=True)
class EncodedFrame:
    """A frame as the buffers to be written, header first. Buffers may be views of the ring."""

    header: FrameHeader
    buffers: Sequence[Buffer]


def encode_header(header: FrameHeader) -> bytes:
    packed = HEADER.pack(
        MAGIC,
        VERSION,
        header.kind,
        0,
        header.group,
        header.source,
        header.disk,
        header.number,
        header.epoch,
        header.record_count,
        header.first_stamp,
        header.last_stamp,
        header.watermark,
        header.ring_id,
        header.first_sequence,
        header.payload_bytes,
        header.body_bytes,
        header.block_count,
        header.digest,
    )
    return packed + _DIGEST.pack(xxhash.xxh3_64_intdigest(packed))


def decode_header(data: Buffer) -> FrameHeader:
    """Parse and check a header (at least HEADER_BYTES). Raises PeerError."""
    view = memoryview(data)
    if len(view) < HEADER_BYTES:
        raise PeerError("frame header is cut short")
    (digest,) = _DIGEST.unpack_from(view, HEADER.size)
    if view[:4] != MAGIC:
        raise PeerError("not a frame: wrong magic")
    if xxhash.xxh3_64_intdigest(view[: HEADER.size]) != digest:
        raise PeerError("frame header does not match its digest")
    _magic, version, kind, _reserved, *rest = HEADER.unpack_from(view)
    if version != VERSION:
        raise PeerError(f"frame version {version} is not known")
    if kind not in FrameKind._value2member_map_:
        raise PeerError(f"frame kind {kind} is not known")
    header = FrameHeader(FrameKind(kind), *rest)
    _check_limits(header)
    return header


def _check_limits(header: FrameHeader) -> None:
    blocks = -(-header.payload_bytes // limits.BLOCK_BYTES)
    if header.record_count > limits.FRAME_RECORDS_MAX:
        raise PeerError(f"frame of {header.record_count} records is over the limit")
    if header.payload_bytes > limits.FRAME_PAYLOAD_BYTES_MAX:
        raise PeerError(f"frame of {header.payload_bytes} payload bytes is over the limit")
    if header.body_bytes > limits.FRAME_BODY_BYTES_MAX:
        raise PeerError(f"frame body of {header.body_bytes} bytes is over the limit")
    if header.block_count != blocks or header.body_bytes < header.blocks_offset:
        raise PeerError("frame sizes contradict each other")
    if header.kind == FrameKind.MARK and (
        header.record_count or not 0 < header.payload_bytes <= limits.MARK_BYTES_MAX
    ):
        raise PeerError("mark frame is malformed")
    if not header.record_count and (
        header.last_stamp or (header.payload_bytes and header.kind != FrameKind.MARK)
    ):
        raise PeerError("frame without records has stamps or payload")
    if header.first_stamp > header.last_stamp:
        raise PeerError("frame stamps run backwards")


def parse_columns(header: FrameHeader, body: Buffer) -> Columns:
    """View the columns of a body whose digest has been checked; shapes (n,)."""
    n = header.record_count
    return Columns(
        np.frombuffer(body, np.uint64, n, 0),
        np.frombuffer(body, np.uint64, n, 8 * n),
        np.frombuffer(body, np.uint32, n, 16 * n),
        np.frombuffer(body, np.uint8, n, 20 * n),
    )


def parse_blocks(header: FrameHeader, body: Buffer) -> Blocks:
    """Read the block table of a body (or its first ``blocks_offset`` bytes). Raises PeerError."""
    b = header.block_count
    at = header.record_count * RECORD_BYTES
    digests = np.frombuffer(body, np.uint64, b, at)
    stored = np.frombuffer(body, np.uint32, b, at + 8 * b)
    offsets = np.zeros(b + 1, np.uint64)
    np.cumsum(stored & np.uint32(RAW_BIT - 1), out=offsets[1:], dtype=np.uint64)
    offsets += np.uint64(header.blocks_offset)
    if int(offsets[-1]) != header.body_bytes:
        raise PeerError("frame block table does not add up to its body")
    return Blocks(offsets, (stored & np.uint32(RAW_BIT)) != 0, digests, header.payload_bytes)


def check_table(header: FrameHeader, body: Buffer) -> None:
    """Check columns and block table against the header's digest. Raises PeerError."""
    if xxhash.xxh3_64_intdigest(memoryview(body)[: header.blocks_offset]) != header.digest:
        raise PeerError("frame columns do not match their digest")


def check_body(header: FrameHeader, body: Buffer) -> None:
    """Prove a whole body: columns, sums and every stored block. Raises PeerError."""
    if len(body) != header.body_bytes:
        raise PeerError("frame body is cut short")
    check_table(header, body)
    blocks = parse_blocks(header, body)
    if first_damaged(body, blocks.offsets, blocks.digests) >= 0:
        raise PeerError("frame block does not match its digest")
    columns = parse_columns(header, body)
    if int(columns.payload_lengths().sum()) != header.payload_bytes and header.record_count:
        raise PeerError("frame records do not add up to its payload")
    if header.record_count:
        stamps = columns.stamps
        if int(stamps[0]) != header.first_stamp or int(stamps[-1]) != header.last_stamp:
            raise PeerError("frame stamps do not match its header")
        if bool((stamps[1:] < stamps[:-1]).any()):
            raise PeerError("frame stamps run backwards")


def decode_block(blocks: Blocks, index: int, stored: Buffer) -> Buffer:
    """The payload bytes of block ``index`` from its stored bytes. Raises PeerError if damaged."""
    if xxhash.xxh3_64_intdigest(stored) != int(blocks.digests[index]):
        raise PeerError("frame block does not match its digest")
    size = min(limits.BLOCK_BYTES, blocks.payload_bytes - index * limits.BLOCK_BYTES)
    if blocks.raw[index]:
        if len(stored) != size:
            raise PeerError("frame block has the wrong size")
        return stored
    try:
        data = lz4.block.decompress(stored, uncompressed_size=size)
    except (lz4.block.LZ4BlockError, ValueError) as error:
        raise PeerError("frame block does not decompress") from error
    if len(data) != size:
        raise PeerError("frame block has the wrong size")
    return bytes(data)


def decode_payload(header: FrameHeader, body: Buffer) -> bytes:
    """The whole payload of a body that has been checked. Raises PeerError."""
    return b"".join(_decoded(header, body))


def check_payload(header: FrameHeader, body: Buffer) -> None:
    """Prove that `decode_payload` will do, in the memory of a block. Raises PeerError."""
    for _ in _decoded(header, body):
        pass


def _decoded(header: FrameHeader, body: Buffer) -> Iterator[Buffer]:
    blocks = parse_blocks(header, body)
    view = memoryview(body)
    bounds = blocks.offsets.tolist()
    for i in range(header.block_count):
        yield decode_block(blocks, i, view[bounds[i] : bounds[i + 1]])


def encode_frame(
    *,
    kind: FrameKind,
    group: bytes,
    source: bytes,
    disk: bytes = NO_ID,
    number: int,
    epoch: int = 0,
    watermark: int,
    ring_id: int = 0,
    first_sequence: int = 0,
    columns: Columns | None = None,
    payload: Buffer = b"",
) -> EncodedFrame:
    """Build a frame. Incompressible blocks are passed on as views of ``payload``, not copied."""
    blocks, digests, lengths = encode_blocks(payload, limits.BLOCK_BYTES, RAW_BIT)
    table = b"".join(
        (
            *(() if columns is None else _column_bytes(columns)),
            digests.tobytes(),
            lengths.tobytes(),
        )
    )
    count = 0 if columns is None else len(columns.stamps)
    header = FrameHeader(
        kind=kind,
        group=group,
        source=source,
        disk=disk,
        number=number,
        epoch=epoch,
        record_count=count,
        first_stamp=int(columns.stamps[0]) if columns is not None and count else 0,
        last_stamp=int(columns.stamps[-1]) if columns is not None and count else 0,
        watermark=watermark,
        ring_id=ring_id,
        first_sequence=first_sequence,
        payload_bytes=memoryview(payload).nbytes,
        body_bytes=len(table) + sum(len(block) for block in blocks),
        block_count=len(lengths),
        digest=xxhash.xxh3_64_intdigest(table),
    )
    return EncodedFrame(header, [encode_header(header) + table, *blocks])


def _column_bytes(columns: Columns) -> tuple[bytes, ...]:
    return (
        columns.stamps.tobytes(),
        columns.offsets.tobytes(),
        columns.lengths.tobytes(),
        columns.kinds.tobytes(),
    )
