"""The index run: where the payload of each record of one disk lies, sorted for lookup by offset.

Columns, back to back, each of n entries, sorted by (start, stamp, frame, position):

========  ====  ====================================================================
column    type  meaning
========  ====  ====================================================================
starts    u64   first byte on the disk
stamps    u64   when the record completed
lengths   u32   bytes on the disk
frames    u32   ordinal of the frame in its segment (frame table of segment.py)
positions u32   first byte of its data in that frame's payload (0 without data)
kinds     u8    0 write, 1 zero, 2 trim (flushes are not indexed)
========  ====  ====================================================================

29 bytes a record. Derived data: it can be rebuilt from the frames.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from blockrepl.errors import PeerError
from blockrepl.formats.frame import KIND_MASK, U8, U32, U64, Buffer, Columns, RecordKind

ENTRY_BYTES = 29
Index = npt.NDArray[np.bool_] | npt.NDArray[np.intp] | slice


@dataclass(frozen=True, slots=True)
class Run:
    starts: U64
    stamps: U64
    lengths: U32
    frames: U32
    positions: U32
    kinds: U8

    def __len__(self) -> int:
        return len(self.starts)

    def take(self, which: Index) -> Run:
        """The entries that an index array, mask or slice selects."""
        return Run(
            self.starts[which],
            self.stamps[which],
            self.lengths[which],
            self.frames[which],
            self.positions[which],
            self.kinds[which],
        )

    def sorted(self) -> Run:
        return self.take(np.lexsort((self.positions, self.frames, self.stamps, self.starts)))


def from_columns(columns: Columns, frame: int) -> Run:
    """Entries, in record order, of the records of the frame with ordinal ``frame``."""
    lengths = columns.payload_lengths()
    positions = np.zeros(len(lengths), np.uint32)
    positions[1:] = np.cumsum(lengths[:-1])
    kinds = columns.kinds & np.uint8(KIND_MASK)
    which = kinds != RecordKind.FLUSH
    return Run(
        columns.offsets,
        columns.stamps,
        columns.lengths,
        np.full(len(lengths), frame, np.uint32),
        positions,
        kinds,
    ).take(which)


def concatenate(runs: list[Run]) -> Run:
    return Run(
        np.concatenate([run.starts for run in runs] or [np.zeros(0, np.uint64)]),
        np.concatenate([run.stamps for run in runs] or [np.zeros(0, np.uint64)]),
        np.concatenate([run.lengths for run in runs] or [np.zeros(0, np.uint32)]),
        np.concatenate([run.frames for run in runs] or [np.zeros(0, np.uint32)]),
        np.concatenate([run.positions for run in runs] or [np.zeros(0, np.uint32)]),
        np.concatenate([run.kinds for run in runs] or [np.zeros(0, np.uint8)]),
    )


def encode_run(run: Run) -> bytes:
    return b"".join(
        column.tobytes()
        for column in (
            run.starts,
            run.stamps,
            run.lengths,
            run.frames,
            run.positions,
            run.kinds,
        )
    )


def decode_run(data: Buffer, count: int) -> Run:
    """View a run of ``count`` entries; ``data`` may be a memory map. Raises PeerError."""
    if len(data) != count * ENTRY_BYTES:
        raise PeerError("index run has the wrong size")
    return Run(
        np.frombuffer(data, np.uint64, count, 0),
        np.frombuffer(data, np.uint64, count, 8 * count),
        np.frombuffer(data, np.uint32, count, 16 * count),
        np.frombuffer(data, np.uint32, count, 20 * count),
        np.frombuffer(data, np.uint32, count, 24 * count),
        np.frombuffer(data, np.uint8, count, 28 * count),
    )
