"""The instants between two at which a group's content changes: where it can be cut in two.

Every distinct stamp of a record that changes something is one. Records of one stamp (a resync's)
cannot be told apart. What is stamped inside a gap shows from the gap's end on, and what is stamped
where history is thinned from the next instant on that is left.

Frames' headers are read once; stamps only when few enough records are left between the two, before
that a frame's last stamp stands for all of its records. So memory is bounded, and the first probes
of a long history read little. Where last stamps tell no more, all the records may show at few
instants: then it is these that are held.

A search takes as long as its command, and what is to be thinned may be written anew meanwhile.
Then the frames are looked for again.
"""

from __future__ import annotations

from array import array
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from blockrepl.errors import StateError
from blockrepl.formats.frame import U64, Columns
from blockrepl.formats.segment import NUMBER_MASK
from blockrepl.model.bisect import Candidates
from blockrepl.storage.changes import places, records
from blockrepl.storage.history import ReplicaHistory
from blockrepl.storage.reading import looking
from blockrepl.storage.thinning import asked_at

EXACT_RECORDS_MAX = 2_000_000  # whose stamps are held at once: 16 MB, twice while sorting
RECORDS_TOLD_MAX = 100


@dataclass(frozen=True, slots=True)
class Record:
    """A record that changed something, and where it is in the journal."""

    disk: bytes
    offset: int
    length: int
    kind: int
    at_ns: int
    segment: int
    frame: int


class Cuts:
    """Of some disks of a group, in (after, upto]."""

    def __init__(
        self, history: ReplicaHistory, disks: Collection[bytes], after_ns: int, upto_ns: int
    ) -> None:
        """Both instants are pinned already, so that nothing between them can go. DamageError."""
        self._history = history
        self._disks = sorted(disks)
        self._ends = after_ns, upto_ns
        looking(self._look)

    def _look(self) -> None:
        """Find the frames."""
        state = self._history.state()
        # Columns, of eight bytes for each frame: a day may have millions.
        rows = array("Q")
        for place in places(self._history, state, self._disks, *self._ends):
            disk = self._disks.index(place.disk)
            stamps = place.first_stamp, place.last_stamp
            rows.extend((place.segment_place, place.ordinal, disk, *stamps, place.record_count))
        table = np.frombuffer(rows, np.uint64).reshape(-1, 6).T if rows else np.zeros((6, 0))
        table = table.astype(np.uint64)
        self._segment_places, self._ordinals, self._disk_places = table[0], table[1], table[2]
        self._first, self._last, self._counts = table[3], table[4], table[5]
        self._kept = state.kept
        self._gaps = [
            (gap.from_ns, self._ends[1] + 1 if gap.to_ns is None else gap.to_ns)
            for gap in self._history.history(state).gaps
        ]

    def last(self, after_ns: int, upto_ns: int) -> int:
        """The newest cut in (after, upto]: content is the same from it to ``upto``. StateError."""
        return looking(lambda: self._newest(after_ns, upto_ns), self._look)

    def _newest(self, after_ns: int, upto_ns: int) -> int:
        best = after_ns
        for index in np.argsort(self._last)[::-1].tolist():
            if int(self._moved(self._last[index : index + 1])[0]) <= best:
                break  # and so are all before it
            stamps = self._moved(self._records(index, after_ns, upto_ns).stamps)
            best = max(best, int(stamps[stamps <= np.uint64(upto_ns)].max(initial=0)))
        if best == after_ns:
            raise StateError(
                "nothing was written between the good point and the bad one",
                hint="give points further apart; see: blockrepl diff",
                code="bisect-ends",
            )
        return best

    def candidates(self, low_ns: int, high_ns: int) -> Candidates:
        """The cuts strictly between two instants, or some of them where they are many."""
        return looking(lambda: self._candidates(low_ns, high_ns), self._look)

    def _candidates(self, low_ns: int, high_ns: int) -> Candidates:
        if self._count(low_ns, high_ns - 1) > EXACT_RECORDS_MAX:
            some = self._some(low_ns, high_ns)
            if len(some.instants):
                return some
        exact = self._exact(low_ns, high_ns - 1)
        return Candidates(exact, np.ones(len(exact), np.uint64))

    def _some(self, low_ns: int, high_ns: int) -> Candidates:
        which = (self._last > np.uint64(low_ns)) & (self._last < np.uint64(high_ns))
        instants, inverse = np.unique(self._moved(self._last[which]), return_inverse=True)
        weights = np.bincount(inverse, self._counts[which], len(instants)).astype(np.uint64)
        inside = (instants > np.uint64(low_ns)) & (instants < np.uint64(high_ns))
        return Candidates(instants[inside], weights[inside], is_all=False)

    def records(self, after_ns: int, upto_ns: int) -> tuple[list[Record], int]:
        """The records that show at ``upto`` and not at ``after``: the first ones, and how many."""
        return looking(lambda: self._changing(after_ns, upto_ns), self._look)

    def _changing(self, after_ns: int, upto_ns: int) -> tuple[list[Record], int]:
        found: list[Record] = []
        count = 0
        for index in self._overlapping(after_ns, upto_ns):
            columns = self._records(index, after_ns, upto_ns)
            disk = self._disks[int(self._disk_places[index])]
            number = int(self._segment_places[index]) & NUMBER_MASK
            where = number, int(self._ordinals[index])
            count += len(columns.stamps)
            rows = zip(
                columns.offsets[:RECORDS_TOLD_MAX].tolist(),
                columns.lengths[:RECORDS_TOLD_MAX].tolist(),
                columns.kinds[:RECORDS_TOLD_MAX].tolist(),
                columns.stamps[:RECORDS_TOLD_MAX].tolist(),
                strict=True,
            )
            for offset, length, kind, at_ns in rows:
                found.append(Record(disk, offset, length, kind, at_ns, *where))
        found.sort(key=lambda record: record.at_ns)
        return found[:RECORDS_TOLD_MAX], count

    def is_gap_end(self, at_ns: int) -> bool:
        """Whether what is stamped in a gap shows from an instant on."""
        return at_ns in self._moved(np.array([end for _, end in self._gaps], np.uint64))

    def _records(self, index: int, after_ns: int, upto_ns: int) -> Columns:
        place, ordinal = int(self._segment_places[index]), int(self._ordinals[index])
        return records(self._history, place, ordinal, after_ns, upto_ns)

    def _overlapping(self, after_ns: int, upto_ns: int) -> list[int]:
        """The frames that may have records in (after, upto]."""
        which = (self._last > np.uint64(after_ns)) & (self._first <= np.uint64(upto_ns))
        found: list[int] = np.flatnonzero(which).tolist()
        return found

    def _count(self, after_ns: int, upto_ns: int) -> int:
        """At most how many records are in (after, upto]."""
        which = (self._last > np.uint64(after_ns)) & (self._first <= np.uint64(upto_ns))
        return int(self._counts[which].sum())

    def _exact(self, after_ns: int, upto_ns: int) -> U64:
        """The distinct cuts in (after, upto], ascending."""
        parts = [np.zeros(0, np.uint64)]
        for index in self._overlapping(after_ns, upto_ns):
            parts.append(np.unique(self._moved(self._records(index, after_ns, upto_ns).stamps)))
        cuts: U64 = np.unique(np.concatenate(parts))
        return cuts[(cuts > np.uint64(after_ns)) & (cuts <= np.uint64(upto_ns))]

    def _moved(self, stamps: U64) -> U64:
        """The instants that can be reached from which on records of these stamps show."""
        while True:
            moved = asked_at(self._kept, stamps)
            for first, end in self._gaps:
                inside = (moved >= np.uint64(first)) & (moved < np.uint64(end))
                moved[inside] = end
            if (moved == stamps).all():
                return moved
            stamps = moved  # a gap may end where history is thinned
