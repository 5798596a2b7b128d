"""The index run: where the payload of each record of one disk lies, sorted for lookup by offset.

========  ====  ====================================================================
column    type  meaning
========  ====  ====================================================================
starts    u64   first byte on the disk
stamps    u64   when the record completed
lengths   u32   bytes on the disk
segments  u32   place of the segment that has the record (segment.py): its number, and how often
                it was written anew
frames    u32   ordinal of the frame in its segment (frame table of segment.py)
positions u32   first byte of its data in that frame's payload (0 without data)
kinds     u8    0 write, 1 zero, 2 trim (flushes are not indexed)
========  ====  ====================================================================

Entries of up to LONG_BYTES come first, sorted by start; then the longer ones (trims and zeros of
large areas), sorted by start too. Both are cut into chunks of up to CHUNK_ENTRIES. A run is chunks
back to back, then, somewhere behind them, its directory of one entry per chunk, in order:

======  ====  ======================================================================
offset  size  directory entry
======  ====  ======================================================================
0       8     offset: file offset of the chunk
8       4     bytes: size of the chunk
12      4     count: entries in it
16      8     first_start: the least start
24      8     last_end: the first byte past all that its entries cover
32      8     first_stamp: the oldest stamp
40      8     last_stamp: the newest stamp
48      8     digest: xxh3-64 of the chunk
======  ====  ======================================================================

A chunk is seven column headers in the order above, the columns, and TAIL_BYTES zeros:

======  ====  ======================================================================
offset  size  column header
======  ====  ======================================================================
0       8     base
8       1     shift
9       1     width
======  ====  ======================================================================

A column is ceil(count * width / 8) bytes. Its value i is base + (bits << shift), where bits are the
``width`` bits from bit i * width on, low bits first. A column that is one value takes no bytes.

About 8 bytes a record of 4 KiB random writes in a segment, 10 in a merged run of millions. Derived
data: it can be rebuilt from the frames.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from blockrepl.errors import PeerError
from blockrepl.formats._pack import pack, unpack_into
from blockrepl.formats.frame import KIND_MASK, U8, U32, U64, Buffer, Columns, RecordKind
from blockrepl.formats.segment import NUMBER_MASK
from blockrepl.units import MIB

LONG_BYTES = 1 * MIB  # of a longer entry a lookup could not tell where it begins
CHUNK_ENTRIES = 1024  # read and proven as one: about 10 KB
COLUMN_HEADER = struct.Struct("<QBB")
TAIL_BYTES = 9  # so that a reader may take whole words
COLUMNS: dict[str, type[np.unsignedinteger[Any]]] = {
    "starts": np.uint64,
    "stamps": np.uint64,
    "lengths": np.uint32,
    "segments": np.uint32,
    "frames": np.uint32,
    "positions": np.uint32,
    "kinds": np.uint8,
}
DIRECTORY = np.dtype(
    [
        ("offset", "<u8"),
        ("bytes", "<u4"),
        ("count", "<u4"),
        ("first_start", "<u8"),
        ("last_end", "<u8"),
        ("first_stamp", "<u8"),
        ("last_stamp", "<u8"),
        ("digest", "<u8"),
    ]
)
Index = npt.NDArray[np.bool_] | npt.NDArray[np.intp] | slice


@dataclass(frozen=True, slots=True)
class Run:
    starts: U64
    stamps: U64
    lengths: U32
    segments: U32
    frames: U32
    positions: U32
    kinds: U8

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def ends(self) -> U64:
        return self.starts + self.lengths

    @property
    def is_long(self) -> npt.NDArray[np.bool_]:
        return self.lengths > LONG_BYTES

    @property
    def ages(self) -> tuple[U64, U32, U32, U32]:
        """Orders entries of any place: by (stamp, segment, frame, position)."""
        numbers = self.segments & np.uint32(NUMBER_MASK)
        return self.stamps, numbers, self.frames, self.positions

    def take(self, which: Index) -> Run:
        """The entries that an index array, mask or slice selects."""
        return Run(*(getattr(self, name)[which] for name in COLUMNS))

    def oldest_first(self) -> Run:
        """Ordered by (stamp, segment, frame, position): the newest of an instant comes last."""
        order = np.argsort(self.stamps)
        stamps = self.stamps[order]
        if bool((stamps[1:] == stamps[:-1]).any()):
            # Only a resync's records share a stamp; four keys take four times as long.
            order = np.lexsort(self.ages[::-1])
        return self.take(order)

    def by_start(self) -> Run:
        return self.take(np.argsort(self.starts, kind="stable"))


def from_frames(columns: Sequence[Columns], ordinals: Sequence[int], segment: int) -> Run:
    """Entries, in record order, of the records of frames with these ordinals in a segment.

    All frames at once: numpy's calls for each would cost more than a small frame's work.
    """
    if not columns:
        return concatenate([])
    counts = [len(each.stamps) for each in columns]
    all_columns = Columns(
        np.concatenate([each.stamps for each in columns]),
        np.concatenate([each.offsets for each in columns]),
        np.concatenate([each.lengths for each in columns]),
        np.concatenate([each.kinds for each in columns]),
    )
    lengths = all_columns.payload_lengths()
    begins = np.cumsum(lengths) - lengths
    firsts = np.cumsum(counts) - counts
    # A frame without records has no first one; nothing is repeated for it either.
    of_frame = np.append(begins, np.uint64(0))[firsts]
    positions = begins - np.repeat(of_frame, counts)
    kinds = all_columns.kinds & np.uint8(KIND_MASK)
    return Run(
        all_columns.offsets,
        all_columns.stamps,
        all_columns.lengths,
        np.full(len(lengths), segment, np.uint32),
        np.repeat(np.array(ordinals, np.uint32), counts),
        positions.astype(np.uint32),
        kinds,
    ).take(kinds != RecordKind.FLUSH)


def concatenate(runs: list[Run]) -> Run:
    return Run(
        *(
            np.concatenate([getattr(run, name) for run in runs] or [np.zeros(0, dtype)])
            for name, dtype in COLUMNS.items()
        )
    )


def encode_chunk(run: Run) -> bytes:
    """A chunk of all of a run's entries, in their order."""
    headers: list[bytes] = []
    columns: list[bytes] = []
    for name in COLUMNS:
        values = np.ascontiguousarray(getattr(run, name), np.uint64)
        base, shift, width, data = pack(values)
        headers.append(COLUMN_HEADER.pack(base, shift, width))
        columns.append(data)
    return b"".join((*headers, *columns, bytes(TAIL_BYTES)))


def empty(count: int) -> Run:
    """Room for entries."""
    return Run(*(np.empty(count, dtype) for dtype in COLUMNS.values()))


def decode_chunk(data: Buffer, count: int, target: Run, place: int) -> None:
    """Write a chunk's entries to ``target`` from ``place`` on. PeerError."""
    at = COLUMN_HEADER.size * len(COLUMNS)
    if len(data) < at + TAIL_BYTES:
        raise PeerError("chunk of an index run is cut short")
    for number, name in enumerate(COLUMNS):
        base, shift, width = COLUMN_HEADER.unpack_from(data, number * COLUMN_HEADER.size)
        try:
            unpack_into(data, at, count, base, shift, width, getattr(target, name), place)
        except ValueError as error:
            raise PeerError("chunk of an index run is malformed") from error
        at += -(-count * width // 8)
    if at + TAIL_BYTES != len(data):
        raise PeerError("chunk of an index run has the wrong size")


class RunEncoder:
    """Turns sorted entries, handed in piece by piece, into chunks and their directory.

    First all that are not long, then the long ones; each by start.
    """

    def __init__(self, offset: int) -> None:
        """``offset``: where in the file the first chunk will be."""
        self.end = offset
        self.long_chunks = 0
        self._entries: list[tuple[int, ...]] = []
        self._waiting = concatenate([])
        self._is_long = False

    def add(self, run: Run, *, is_long: bool) -> bytes:
        """The chunks that are full."""
        parts = []
        if is_long != self._is_long:
            parts.append(self.flush())
            self._is_long = is_long
        waiting = concatenate([self._waiting, run]) if len(self._waiting) else run
        whole = len(waiting) // CHUNK_ENTRIES * CHUNK_ENTRIES
        for at in range(0, whole, CHUNK_ENTRIES):
            parts.append(self._chunk(waiting.take(slice(at, at + CHUNK_ENTRIES))))
        self._waiting = waiting.take(slice(whole, None))
        return b"".join(parts)

    def flush(self) -> bytes:
        """The last chunk."""
        waiting, self._waiting = self._waiting, concatenate([])
        return self._chunk(waiting) if len(waiting) else b""

    def _chunk(self, run: Run) -> bytes:
        data = encode_chunk(run)
        self._entries.append(
            (
                self.end,
                len(data),
                len(run),
                int(run.starts[0]),
                int(run.ends.max()),
                int(run.stamps.min()),
                int(run.stamps.max()),
                xxhash.xxh3_64_intdigest(data),
            )
        )
        self.end += len(data)
        self.long_chunks += self._is_long
        return data

    def directory(self) -> npt.NDArray[np.void]:
        return np.array(self._entries, DIRECTORY)


def encode_run(run: Run, offset: int) -> tuple[bytes, RunEncoder]:
    """All chunks of entries in any order."""
    run = run.take(np.lexsort((run.positions, run.frames, run.segments, run.stamps, run.starts)))
    encoder = RunEncoder(offset)
    parts = [
        encoder.add(run.take(~run.is_long), is_long=False),
        encoder.add(run.take(run.is_long), is_long=True),
        encoder.flush(),
    ]
    return b"".join(parts), encoder


def decode_directory(data: Buffer) -> npt.NDArray[np.void]:
    """The directory of a run, from its bytes. PeerError."""
    if len(data) % DIRECTORY.itemsize:
        raise PeerError("directory of an index run has the wrong size")
    return np.frombuffer(data, DIRECTORY)
