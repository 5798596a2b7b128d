"""Which merged runs there should be, and which merge comes next.

Theory: segment numbers are cut into aligned blocks of FANOUT, FANOUT ** 2 ... (level 1, 2 ...). A
block whose segments are all sealed gets one merged run, made of those of the blocks within it, or
of the segments at level 1. So a journal of n segments is covered by at most FANOUT - 1 runs per
level, each record is rewritten once per level, and which runs there should be follows from the
segment numbers alone: what is missing is found and made again.

A block of one segment needs no run: the segment has its own. A block of none has vanished. Runs are
named by the first and last segment that they cover, so a block whose segments all lie within one
smaller block has that block's run.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

FANOUT = 8
LEVELS = 4  # 4096 segments: up to a terabyte; beyond it, one more run to look into per terabyte

Range = tuple[int, int]  # first and last segment number, both included


@dataclass(frozen=True, slots=True)
class Merge:
    result: Range
    inputs: tuple[Range, ...]  # of one number: that segment's own run; else a merged run


@dataclass(frozen=True, slots=True)
class Plan:
    merges: tuple[Merge, ...]  # whose inputs are all there; others may follow when these are done
    keep: frozenset[Range]  # merged runs in use or still needed for a merge; others may go


@dataclass(slots=True)
class _Planner:
    sealed: Sequence[int]
    end: int
    present: Collection[Range]
    merges: list[Merge] = field(default_factory=list)
    keep: set[Range] = field(default_factory=set)

    def numbers(self, level: int, block: int) -> Sequence[int]:
        size = FANOUT**level
        low = bisect_left(self.sealed, block * size + 1)
        return self.sealed[low : bisect_left(self.sealed, (block + 1) * size + 1)]

    def visit(self, level: int, block: int) -> bool:
        """Whether the block can be an input: it has its run, or needs none."""
        numbers = self.numbers(level, block)
        if len(numbers) < 2:
            return True
        whole = (numbers[0], numbers[-1])
        is_complete = (block + 1) * FANOUT**level < self.end
        if is_complete and whole in self.present:
            self.keep.add(whole)
            return True
        if level == 1:
            if is_complete:
                self.merges.append(Merge(whole, tuple((n, n) for n in numbers)))
            return False
        inputs, are_there = [], True
        for child in range(block * FANOUT, (block + 1) * FANOUT):
            are_there &= self.visit(level - 1, child)
            if of_child := self.numbers(level - 1, child):
                inputs.append((of_child[0], of_child[-1]))
        if is_complete and are_there:
            self.merges.append(Merge(whole, tuple(inputs)))
        return False


def plan(sealed: Sequence[int], end: int, present: Collection[Range]) -> Plan:
    """``sealed``: ascending; no segment before ``end`` is unsealed; ``present``: true runs."""
    planner = _Planner(sealed, end, present)
    if sealed:
        size = FANOUT**LEVELS
        for block in range((sealed[0] - 1) // size, (sealed[-1] - 1) // size + 1):
            planner.visit(LEVELS, block)
    return Plan(tuple(planner.merges), frozenset(planner.keep))
