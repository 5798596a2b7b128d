"""Ranges of a disk: the union of many, and its grains."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from blockrepl.formats.frame import U64

GATHERED_MAX = 1 << 20  # ranges that wait to be united: 16 MiB


def union(starts: U64, ends: U64) -> tuple[U64, U64]:
    """Ascending, disjoint ranges that do not touch, of any. Empty ones vanish."""
    which = ends > starts
    starts, ends = starts[which], ends[which]
    if not len(starts):
        return starts, ends
    order = np.argsort(starts)
    starts, ends = starts[order], ends[order]
    reached = np.maximum.accumulate(ends)
    heads = np.flatnonzero(np.concatenate(([True], starts[1:] > reached[:-1])))
    tails = np.append(heads[1:], len(starts)) - 1
    return starts[heads], reached[tails]


def clusters(starts: U64, ends: U64, cluster_bytes: int) -> tuple[U64, U64]:
    """The clusters that ranges touch, as [first, last) of cluster numbers: a union."""
    size = np.uint64(cluster_bytes)
    return union(starts // size, (ends + size - np.uint64(1)) // size)


@dataclass
class Union:
    """A union that grows; memory is bounded by what it is, not by what went into it."""

    _starts: list[U64] = field(default_factory=list)
    _ends: list[U64] = field(default_factory=list)
    _gathered: int = 0

    def add(self, starts: U64, ends: U64) -> None:
        self._starts.append(starts)
        self._ends.append(ends)
        self._gathered += len(starts)
        if self._gathered > GATHERED_MAX:
            self.result()

    def result(self) -> tuple[U64, U64]:
        """As `union`."""
        nothing = np.zeros(0, np.uint64)
        starts, ends = union(
            np.concatenate([nothing, *self._starts]), np.concatenate([nothing, *self._ends])
        )
        self._starts, self._ends, self._gathered = [starts], [ends], 0
        return starts, ends
