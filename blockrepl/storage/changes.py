"""The records between two instants, from the frames' headers and columns: no payload is read.

Which segments can have some the catalog says, which frames their headers say. So the time this
takes grows with what happened between the instants, not with the history around them; of a segment
that lies in the interval in part, all headers are read.

A record belongs to the interval (after, upto]: what it wrote shows at ``upto`` and did not show at
``after``. Flushes change nothing and are left out.

Retention may replace segments between two steps of a look. Then GoneError tells that all of it is
to be done again, from a new state: new segments have the old ones' records in other places.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import numpy as np

from blockrepl.formats.frame import KIND_MASK, Columns, RecordKind
from blockrepl.model.ranges import Union
from blockrepl.storage.history import ReplicaHistory, State
from blockrepl.storage.reading import looking


@dataclass(frozen=True, slots=True)
class Place:
    """A frame that may have records of the interval: its segment, and its ordinal there.

    ``segment_place``: as formats/segment.py says; the segment's number is in it.
    """

    segment_place: int
    ordinal: int
    disk: bytes
    first_stamp: int
    last_stamp: int
    record_count: int


def places(
    history: ReplicaHistory, state: State, disks: Collection[bytes], after_ns: int, upto_ns: int
) -> Iterator[Place]:
    """The frames that may have records of the disks in (after, upto]. DamageError, GoneError."""
    history.refresh(state)
    for disk in disks:
        history.index.refuse_damage(disk, upto_ns)
    wanted = set(disks)
    for segment in history.index.segments():
        row = state.segments.get(segment.number)
        if (
            row is not None
            and row.sealed
            and (row.last_stamp <= after_ns or row.first_stamp > upto_ns)
        ):
            continue
        for ordinal in range(segment.frame_count()):
            header = segment.header(ordinal)
            if (
                header.record_count
                and header.disk in wanted
                and header.last_stamp > after_ns
                and header.first_stamp <= upto_ns
            ):
                yield Place(
                    segment.place,
                    ordinal,
                    header.disk,
                    header.first_stamp,
                    header.last_stamp,
                    header.record_count,
                )


def records(
    history: ReplicaHistory, segment_place: int, ordinal: int, after_ns: int, upto_ns: int
) -> Columns:
    """A frame's records of the interval that change something. DamageError, GoneError."""
    columns = history.index.segment(segment_place).columns(ordinal)
    which = (columns.stamps > np.uint64(after_ns)) & (columns.stamps <= np.uint64(upto_ns))
    which &= (columns.kinds & np.uint8(KIND_MASK)) != RecordKind.FLUSH
    return Columns(
        columns.stamps[which],
        columns.offsets[which],
        columns.lengths[which],
        columns.kinds[which],
    )


def changed_ranges(
    history: ReplicaHistory, disks: Collection[bytes], after_ns: int, upto_ns: int
) -> dict[bytes, tuple[Union, int]]:
    """Per disk what was written, zeroed or trimmed in (after, upto], and by how many records.

    DamageError.
    """
    return looking(lambda: _changed_ranges(history, disks, after_ns, upto_ns))


def _changed_ranges(
    history: ReplicaHistory, disks: Collection[bytes], after_ns: int, upto_ns: int
) -> dict[bytes, tuple[Union, int]]:
    found = {disk: (Union(), 0) for disk in disks}
    for place in places(history, history.state(), disks, after_ns, upto_ns):
        columns = records(history, place.segment_place, place.ordinal, after_ns, upto_ns)
        ranges, count = found[place.disk]
        ranges.add(columns.offsets, columns.offsets + columns.lengths)
        found[place.disk] = (ranges, count + len(columns.stamps))
    return found
