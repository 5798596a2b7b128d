"""The instants between two at which a group's content changes: where it can be cut in two.

Every distinct stamp of a record that changes something is one. Records of one stamp (a resync's)
cannot be told apart. What is stamped inside a gap shows from the gap's end on.

Frames' headers are read once; stamps only when few enough records are left between the two, before
that a frame's last stamp stands for all of its records. So memory is bounded, and the first probes
of a long history read little.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from blockrepl.errors import StateError
from blockrepl.formats.frame import U64
from blockrepl.model.bisect import Candidates
from blockrepl.storage.changes import Place, places, records
from blockrepl.storage.history import ReplicaHistory, State

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
        self,
        history: ReplicaHistory,
        state: State,
        disks: Collection[bytes],
        after_ns: int,
        upto_ns: int,
    ) -> None:
        self._history = history
        self._places: list[Place] = list(places(history, state, disks, after_ns, upto_ns))
        headers = [place.header for place in self._places]
        self._first = np.array([header.first_stamp for header in headers], np.uint64)
        self._last = np.array([header.last_stamp for header in headers], np.uint64)
        self._counts = np.array([header.record_count for header in headers], np.uint64)
        self._gaps = [
            (gap.from_ns, upto_ns + 1 if gap.to_ns is None else gap.to_ns)
            for gap in history.history(state).gaps
        ]

    def last(self, after_ns: int, upto_ns: int) -> int:
        """The newest cut in (after, upto]: content is the same from it to ``upto``. StateError."""
        best = after_ns
        for index in np.argsort(self._last)[::-1].tolist():
            if int(self._moved(self._last[index : index + 1])[0]) <= best:
                break  # and so are all before it
            place = self._places[index]
            stamps = self._moved(records(self._history, place, after_ns, upto_ns).stamps)
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
        if self._count(low_ns, high_ns - 1) <= EXACT_RECORDS_MAX:
            exact = self._exact(low_ns, high_ns - 1)
            return Candidates(exact, np.ones(len(exact), np.uint64))
        which = (self._last > np.uint64(low_ns)) & (self._last < np.uint64(high_ns))
        instants, inverse = np.unique(self._moved(self._last[which]), return_inverse=True)
        weights = np.bincount(inverse, self._counts[which], len(instants)).astype(np.uint64)
        inside = (instants > np.uint64(low_ns)) & (instants < np.uint64(high_ns))
        return Candidates(instants[inside], weights[inside], is_all=False)

    def records(self, after_ns: int, upto_ns: int) -> tuple[list[Record], int]:
        """The records that show at ``upto`` and not at ``after``: the first ones, and how many."""
        found: list[Record] = []
        count = 0
        for place in self._overlapping(after_ns, upto_ns):
            columns = records(self._history, place, after_ns, upto_ns)
            count += len(columns.stamps)
            rows = zip(
                columns.offsets[:RECORDS_TOLD_MAX].tolist(),
                columns.lengths[:RECORDS_TOLD_MAX].tolist(),
                columns.kinds[:RECORDS_TOLD_MAX].tolist(),
                columns.stamps[:RECORDS_TOLD_MAX].tolist(),
                strict=True,
            )
            for offset, length, kind, at_ns in rows:
                where = place.segment, place.ordinal
                found.append(Record(place.header.disk, offset, length, kind, at_ns, *where))
        found.sort(key=lambda record: record.at_ns)
        return found[:RECORDS_TOLD_MAX], count

    def is_gap_end(self, at_ns: int) -> bool:
        return any(at_ns == end for _, end in self._gaps)

    def _overlapping(self, after_ns: int, upto_ns: int) -> list[Place]:
        which = (self._last > np.uint64(after_ns)) & (self._first <= np.uint64(upto_ns))
        return [self._places[index] for index in np.flatnonzero(which).tolist()]

    def _count(self, after_ns: int, upto_ns: int) -> int:
        """At most how many records are in (after, upto]."""
        which = (self._last > np.uint64(after_ns)) & (self._first <= np.uint64(upto_ns))
        return int(self._counts[which].sum())

    def _exact(self, after_ns: int, upto_ns: int) -> U64:
        """The distinct cuts in (after, upto], ascending."""
        parts = [np.zeros(0, np.uint64)]
        for place in self._overlapping(after_ns, upto_ns):
            parts.append(records(self._history, place, after_ns, upto_ns).stamps)
        cuts: U64 = np.unique(self._moved(np.concatenate(parts)))
        return cuts[(cuts > np.uint64(after_ns)) & (cuts <= np.uint64(upto_ns))]

    def _moved(self, stamps: U64) -> U64:
        """Stamps inside a gap show from its end on."""
        stamps = stamps.copy()
        for first, end in self._gaps:
            inside = (stamps >= np.uint64(first)) & (stamps < np.uint64(end))
            stamps[inside] = end
        return stamps
