"""Extents: which of many overlapping records a range shows, newest wins.

Theory: the ends of n records cut a window into at most 2n + 1 cells that no record covers in
part. Sort the ends (coordinate compression), paint the cells newest record first, each cell once
(``_paint``), then join neighbours with one winner. O(n log n), no loop over records in Python.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from blockrepl.formats.frame import U64
from blockrepl.model._paint import paint

I64 = npt.NDArray[np.int64]
BASE = -1  # winner where no record covers


@dataclass(frozen=True, slots=True)
class Extents:
    """Flat, ascending, without holes: extent i is [starts[i], ends[i]) and shows winners[i]."""

    starts: U64
    ends: U64
    winners: I64

    def __len__(self) -> int:
        return len(self.starts)


def resolve(starts: U64, ends: U64, first: int, last: int) -> Extents:
    """What the window [first, last) shows of entries [starts, ends), given oldest first.

    Winners are indexes into the entries, or BASE. Entries may reach out of the window.
    """
    if last <= first:
        return Extents(np.zeros(0, np.uint64), np.zeros(0, np.uint64), np.zeros(0, np.int64))
    clipped_starts = np.clip(starts, np.uint64(first), np.uint64(last))
    clipped_ends = np.clip(ends, np.uint64(first), np.uint64(last))
    edges, ranks = _compressed(
        np.concatenate((clipped_starts, clipped_ends, np.array([first, last], np.uint64)))
    )
    cells = len(edges) - 1
    count = len(starts)
    winners = paint(ranks[:count], ranks[count : 2 * count], cells)
    heads = np.flatnonzero(np.concatenate(([True], winners[1:] != winners[:-1])))
    tails = np.append(heads[1:], cells)
    return Extents(edges[heads], edges[tails], winners[heads])


def _compressed(values: U64) -> tuple[U64, I64]:
    """The distinct values, ascending, and the place of each value among them."""
    # One sort and a scatter: a third of the time of numpy's unique and two binary searches.
    order = np.argsort(values)
    ascending = values[order]
    is_new = np.concatenate(([True], ascending[1:] != ascending[:-1]))
    ranks = np.empty(len(values), np.int64)
    ranks[order] = np.cumsum(is_new) - 1
    return ascending[is_new], ranks
