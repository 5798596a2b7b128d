"""What happened to a group, in intervals of equal length: sums over its frames.

===================  ==============================================================================
sum                  of
===================  ==============================================================================
written_bytes        the guests' writes; ``writes`` of them
stored_bytes         the same, as the journal stores them: compressed
zeroed, trimmed      ranges that were made zeros, or given back; ``zeros`` and ``trims`` of them
flushes              the guests' flushes
resynced_bytes       what was sent again after a gap: no guest's writes
changed_bytes        distinct blocks of 4 KiB that any of these touched (model/block_sample.py)
===================  ==============================================================================

Interval i is (edges[i], edges[i + 1]], as in a diff. A frame that lies in one interval is counted
by its statistics; of one that lies in several, the records are. What it stores is then divided in
proportion to what its records write, and nothing is lost by rounding.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from blockrepl.formats.frame import KIND_MASK, U64, Columns, FrameKind, RecordKind
from blockrepl.formats.statistics import FRAME, LEVEL_MAX, Statistics
from blockrepl.model import block_sample
from blockrepl.model.block_sample import Distinct

I64 = npt.NDArray[np.int64]
SUMS = (
    "written_bytes",
    "stored_bytes",
    "zeroed_bytes",
    "trimmed_bytes",
    "resynced_bytes",
    "writes",
    "zeros",
    "trims",
    "flushes",
)
SAMPLE_MAX = 4096  # blocks of a segment's sample: 48 KiB in a file
SLOTS = 64  # of a segment's frames: a block that is written over and over is kept once in each
_DISK_SHIFT = np.uint64(block_sample.ADDRESS_BITS)
_SIZES = {
    RecordKind.WRITE: ("writes", "written_bytes"),
    RecordKind.ZERO: ("zeros", "zeroed_bytes"),
    RecordKind.TRIM: ("trims", "trimmed_bytes"),
    RecordKind.FLUSH: ("flushes", None),
}


def edges(after_ns: int, upto_ns: int, count: int) -> U64:
    """The edges of at most ``count`` intervals of (after, upto], none of them empty."""
    length = upto_ns - after_ns
    count = max(1, min(count, length))
    return np.array([after_ns + length * i // count for i in range(count + 1)], np.uint64)


class Bins:
    """The sums of each interval, of the disks that are wanted."""

    def __init__(self, edges: U64, disks: list[bytes]) -> None:
        self.edges = edges
        self.sums: dict[str, I64] = {name: np.zeros(len(edges) - 1, np.int64) for name in SUMS}
        self._disks = {disk: place for place, disk in enumerate(disks)}
        self._distinct = [Distinct() for _ in range(len(edges) - 1)]

    def changed_bytes(self) -> I64:
        return np.array([each.bytes for each in self._distinct], np.int64)

    def changed_is_exact(self) -> npt.NDArray[np.bool_]:
        return np.array([each.level == 0 for each in self._distinct], bool)

    def add(self, statistics: Statistics) -> list[int]:
        """Count the frames that lie in one interval; the rows of those that lie in several."""
        rows = statistics.frames
        if not len(rows):
            return []
        places = np.array([self._disks.get(disk, -1) for disk in statistics.disks], np.int64)
        first, last = self._bins(rows["first_stamp"]), self._bins(rows["last_stamp"])
        wanted = (places[rows["disk"]] >= 0) & (last >= 0) & (first < len(self._distinct))
        whole = wanted & (first == last)
        is_sync = rows["kind"] == FrameKind.SYNC
        for name in SUMS:
            if name == "resynced_bytes":
                which = np.flatnonzero(whole & is_sync)
                values = rows["written_bytes"][which]
            else:
                which = np.flatnonzero(whole & ~is_sync)
                values = rows[name][which]
            np.add.at(self.sums[name], first[which], values.astype(np.int64))
        owners = statistics.sample_frames
        sampled = whole[owners]
        self._touch(
            first[owners[sampled]],
            places[rows["disk"][owners[sampled]]],
            statistics.sample_blocks[sampled],
            statistics.level,
        )
        # A sample coarser than its segment's frames may have no block of a frame.
        for at in np.unique(first[whole]).tolist():
            self._distinct[at].add(np.zeros(0, np.uint64), statistics.level)
        several: list[int] = np.flatnonzero(wanted & (first != last)).tolist()
        return several

    def add_records(self, kind: int, disk: bytes, columns: Columns, stored_bytes: int) -> None:
        """Count a frame's records one by one."""
        bins = self._bins(columns.stamps)
        which = (bins >= 0) & (bins < len(self._distinct))
        kinds = columns.kinds & np.uint8(KIND_MASK)
        lengths = columns.lengths.astype(np.int64)
        is_sync = kind == FrameKind.SYNC
        for record_kind, (count, size) in _SIZES.items():
            mine = which & (kinds == record_kind)
            if is_sync:
                count, size = "", "resynced_bytes" if record_kind == RecordKind.WRITE else None
            if count:
                np.add.at(self.sums[count], bins[mine], 1)
            if size is not None:
                np.add.at(self.sums[size], bins[mine], lengths[mine])
        if not is_sync:
            shares = _shares(columns.payload_lengths().astype(np.int64), stored_bytes)
            np.add.at(self.sums["stored_bytes"], bins[which], shares[which])
        changing = np.flatnonzero(which & (kinds != RecordKind.FLUSH))
        starts = columns.offsets[changing]
        level, owners, blocks = block_sample.touched(starts, starts + columns.lengths[changing])
        place = np.full(len(owners), self._disks[disk], np.int64)
        self._touch(bins[changing[owners]], place, blocks, level)

    def _touch(self, bins: I64, disks: I64, blocks: U64, level: int) -> None:
        keys = blocks | (disks.astype(np.uint64) << _DISK_SHIFT)
        order = np.argsort(bins, kind="stable")
        found, heads = np.unique(bins[order], return_index=True)
        for at, part in zip(found.tolist(), np.split(keys[order], heads[1:]), strict=False):
            self._distinct[at].add(part, level)

    def _bins(self, stamps: U64) -> I64:
        """-1 before the first interval, their number after the last."""
        return np.searchsorted(self.edges, stamps, side="left").astype(np.int64) - 1


def _shares(payload: I64, stored_bytes: int) -> I64:
    """What is stored, divided in proportion to the payload; in whole bytes, none lost."""
    total = int(payload.sum())
    if not total:
        return np.zeros(len(payload), np.int64)
    # At most 10 MiB of a frame's 8 MiB: the product stays far from 2^63.
    bounds = np.cumsum(payload) * stored_bytes // total
    return np.diff(bounds, prepend=0)


def summarise(
    ordinals: list[int],
    kinds: list[int],
    disks: list[bytes],
    stored: list[int],
    parts: list[Columns],
) -> Statistics:
    """The statistics of a segment, from the columns of its frames that have records."""
    ids = tuple(dict.fromkeys(disks))
    rows = np.zeros(len(parts), FRAME)
    if not parts:
        return Statistics((), rows, np.zeros(0, np.uint32), np.zeros(0, np.uint64), 0)
    rows["ordinal"], rows["kind"], rows["stored_bytes"] = ordinals, kinds, stored
    rows["disk"] = [ids.index(disk) for disk in disks]
    rows["first_stamp"] = [part.stamps[0] for part in parts]
    rows["last_stamp"] = [part.stamps[-1] for part in parts]
    owners = np.repeat(np.arange(len(parts)), [len(part.stamps) for part in parts])
    lengths = np.concatenate([part.lengths for part in parts])
    record_kinds = np.concatenate([part.kinds for part in parts]) & np.uint8(KIND_MASK)
    for kind, (count, size) in _SIZES.items():
        mine = record_kinds == kind
        rows[count] = np.bincount(owners[mine], minlength=len(parts))
        if size is not None:  # in doubles: exact below 8 PiB
            rows[size] = np.bincount(owners[mine], lengths[mine], len(parts)).astype(np.uint64)
    changing = np.flatnonzero(record_kinds != RecordKind.FLUSH)
    starts = np.concatenate([part.offsets for part in parts])[changing]
    level, places, blocks = block_sample.touched(starts, starts + lengths[changing])
    keys = blocks | (rows["disk"][owners[changing[places]]].astype(np.uint64) << _DISK_SHIFT)
    frames, keys, level = _sample(owners[changing[places]], keys, level, len(parts))
    blocks = keys & ((np.uint64(1) << _DISK_SHIFT) - np.uint64(1))
    return Statistics(ids, rows, frames.astype(np.uint32), blocks, level)


def _sample(frames: I64, keys: U64, level: int, frame_count: int) -> tuple[I64, U64, int]:
    """At most SAMPLE_MAX pairs of a frame and a block it touches, and their level."""
    frames, keys = _last_of_each(frames, keys, frames)
    if len(keys) > SAMPLE_MAX:
        frames, keys = _last_of_each(frames, keys, frames * SLOTS // frame_count)
        level, which = level + 1, block_sample.stand(keys, level, level + 1)
        frames, keys = frames[which], keys[which]
    while len(keys) > SAMPLE_MAX and level < LEVEL_MAX:
        which = block_sample.stand(keys, level, level + 1)
        frames, keys, level = frames[which], keys[which], level + 1
    return frames, keys, level


def _last_of_each(frames: I64, keys: U64, slots: I64) -> tuple[I64, U64]:
    """Of each block, the last frame of a slot that touches it."""
    order = np.lexsort((frames, keys, slots))
    frames, keys, slots = frames[order], keys[order], slots[order]
    is_last = np.ones(len(keys), bool)
    is_last[:-1] = (keys[1:] != keys[:-1]) | (slots[1:] != slots[:-1])
    return frames[is_last], keys[is_last]
