"""Extents: which of many overlapping records a range shows, newest wins.

Theory: sort the records by where they begin, and sweep over the range with those that have begun
at hand (``_sweep``). O(n log n), no loop over records in Python.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from blockrepl.formats.frame import U32, U64
from blockrepl.model._sweep import sweep

I64 = npt.NDArray[np.int64]
Ages = tuple[U64, U32, U32, U32]  # stamps, numbers of segments, frames, positions
BASE = -1  # winner where no record covers


@dataclass(frozen=True, slots=True)
class Extents:
    """Flat, ascending, without holes: extent i is [starts[i], ends[i]) and shows winners[i]."""

    starts: U64
    ends: U64
    winners: I64

    def __len__(self) -> int:
        return len(self.starts)


def resolve(starts: U64, ends: U64, first: int, last: int, ages: Ages | None = None) -> Extents:
    """What the window [first, last) shows of entries [starts, ends), given oldest first.

    Given in another order, ``ages`` are the columns that order them: each decides where all before
    it are equal. Winners are indexes into the entries, or BASE. Entries may reach out of the
    window.
    """
    return Extents(*sweep(starts, ends, ages, first, last))
