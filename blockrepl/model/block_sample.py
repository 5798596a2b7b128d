"""How many distinct blocks many ranges touch: counted while they are few, then estimated.

At level L one of each 2^L neighbouring blocks stands for all of them: the one that L coins choose,
a coin a bit, each thrown by a hash of the bits above. So

- the blocks that stand for others at level L + 1 are among those of level L: samples of any levels
  are united at the coarsest, and one that grows too large is made coarser;
- long ranges cost no more than their neighbourhoods, and a range that covers whole neighbourhoods
  is counted without error.

Level 0 is every block. With n blocks left, scattered, the error is about 1 in the square root of n.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from blockrepl.formats.frame import U64
from blockrepl.formats.statistics import LEVEL_MAX

BLOCK_BYTES = 4096
KEPT_MAX = 16 * 1024  # of a Distinct: 128 KiB, an error under 1 %
ADDRESS_BITS = 40  # of a block's number; what is above says which disk's it is, and takes no part
GROUPS_MAX = 4 * 1024 * 1024  # looked at together: some 100 MiB while it lasts


@dataclass
class Distinct:
    """A set of blocks that grows; when it is too large, it becomes coarser."""

    level: int = 0
    _parts: list[U64] = field(default_factory=list)
    _gathered: int = 0

    def add(self, blocks: U64, level: int) -> None:
        if level < self.level:
            blocks = blocks[stand(blocks, level, self.level)]
        elif level > self.level:
            self._raise_to(level)
        self._parts.append(blocks)
        self._gathered += len(blocks)
        if self._gathered > 4 * KEPT_MAX:
            self._unite()

    def _unite(self) -> U64:
        blocks = _distinct(np.concatenate([np.zeros(0, np.uint64), *self._parts]))
        while len(blocks) > KEPT_MAX and self.level < LEVEL_MAX:
            blocks = blocks[stand(blocks, self.level, self.level + 1)]
            self.level += 1
        self._parts, self._gathered = [blocks], len(blocks)
        return blocks

    def _raise_to(self, level: int) -> None:
        self._parts = [part[stand(part, self.level, level)] for part in self._parts]
        self._gathered = sum(map(len, self._parts))
        self.level = level

    @property
    def bytes(self) -> int:
        blocks = self._unite()
        return (len(blocks) << self.level) * BLOCK_BYTES


def touched(starts: U64, ends: U64) -> tuple[int, npt.NDArray[np.intp], U64]:
    """The blocks that ranges of bytes touch, as (level, the range's place, block)."""
    places = np.flatnonzero(ends > starts)
    size = np.uint64(BLOCK_BYTES)
    first, last = starts[places] // size, (ends[places] - np.uint64(1)) // size
    level = 0
    while int((_up(last, level) - _up(first, level)).sum()) + len(places) > GROUPS_MAX:
        if level == LEVEL_MAX:
            break  # so many ranges: one neighbourhood each
        level += 1
    groups = _up(first, level)
    counts = (_up(last, level) - groups + np.uint64(1)).astype(np.intp)
    owners = np.repeat(np.arange(len(places)), counts)
    within = np.arange(len(owners)) - np.repeat(np.cumsum(counts) - counts, counts)
    blocks = _chosen(groups[owners] + within.astype(np.uint64), level)
    which = (blocks >= first[owners]) & (blocks <= last[owners])
    return level, places[owners[which]], blocks[which]


def stand(blocks: U64, level: int, wanted: int) -> npt.NDArray[np.bool_]:
    """Which of the blocks of a level stand for their neighbours at a coarser one."""
    blocks = blocks & np.uint64((1 << ADDRESS_BITS) - 1)
    which = np.ones(len(blocks), bool)
    for bit in range(level + 1, wanted + 1):
        which &= (_up(blocks, bit - 1) & np.uint64(1)) == _coins(_up(blocks, bit), bit)
    return which


def _distinct(blocks: U64) -> U64:
    """As numpy's ``unique``, whose hash table takes ten times as long as to sort (numpy 2.4)."""
    blocks = np.sort(blocks)
    is_new = np.ones(len(blocks), bool)
    is_new[1:] = blocks[1:] != blocks[:-1]
    return blocks[is_new]


def _chosen(groups: U64, level: int) -> U64:
    """The block that stands for each neighbourhood of a level."""
    for bit in range(level, 0, -1):
        groups = (groups << np.uint64(1)) | _coins(groups, bit)
    return groups


def _coins(above: U64, bit: int) -> U64:
    """0 or 1 for each: the top bit of the mix of splitmix64."""
    mixed = above + np.uint64(bit * 0x9E3779B97F4A7C15 & (1 << 64) - 1)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed >> np.uint64(63)


def _up(blocks: U64, bits: int) -> U64:
    return blocks >> np.uint64(bits)
