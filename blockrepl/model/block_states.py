"""What state each block of a disk is in, for a fork's overlay: a byte per block, where any differs.

Blocks are kept in areas of AREA_BLOCKS. An area that no change has touched takes no memory, one
whose blocks are all alike takes none of its own; another takes 4 KiB for 16 MiB of disk.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from blockrepl.formats.fork_map import BELOW, DATA, ZEROS, Change

AREA_BLOCKS = 4096
_UNIFORM = {state: bytes([state]) * AREA_BLOCKS for state in (BELOW, DATA, ZEROS)}
_RUNS = re.compile(rb"\x00+|\x01+|\x02+")

Run = tuple[int, int, int]  # first block, the block behind the last, state


class BlockStates:
    """``data_blocks``: how many are DATA. ``runs`` may be called while another thread changes."""

    def __init__(self) -> None:
        self._areas: dict[int, bytes | bytearray] = {}
        self.data_blocks = 0

    def runs(self, first: int, last: int) -> list[Run]:
        """Blocks [first, last) as runs of one state each, ascending, without holes."""
        found: list[Run] = []
        for area, start, stop in _parts(first, last):
            # A copy: another thread may be changing them, and a run's state must be the one it had.
            states = bytes(self._areas.get(area, _UNIFORM[BELOW])[start:stop])
            base = area * AREA_BLOCKS + start
            for match in _RUNS.finditer(states):
                state = states[match.start()]
                if found and found[-1][2] == state:
                    found[-1] = (found[-1][0], base + match.end(), state)
                else:
                    found.append((base + match.start(), base + match.end(), state))
        return found

    def state(self, block: int) -> int:
        area, place = divmod(block, AREA_BLOCKS)
        return self._areas.get(area, _UNIFORM[BELOW])[place]

    def count(self, first: int, last: int, state: int) -> int:
        """How many of the blocks [first, last) are in a state."""
        return sum(
            self._areas.get(area, _UNIFORM[BELOW]).count(state, start, stop)
            for area, start, stop in _parts(first, last)
        )

    def set(self, first: int, last: int, state: int) -> list[Change]:
        """Put blocks [first, last) into a state; the changes this makes."""
        changes = [
            Change(start, stop - start, state)
            for start, stop, before in self.runs(first, last)
            if before != state
        ]
        self.data_blocks -= self.count(first, last, DATA)
        for area, start, stop in _parts(first, last):
            if stop - start == AREA_BLOCKS:
                self._areas[area] = _UNIFORM[state]
                continue
            states = self._areas.get(area, _UNIFORM[BELOW])
            if not isinstance(states, bytearray):
                states = bytearray(states)
            states[start:stop] = _UNIFORM[state][: stop - start]
            alike = states == _UNIFORM[state]
            self._areas[area] = _UNIFORM[state] if alike else states
        if state == DATA:
            self.data_blocks += last - first
        return changes

    def changes(self) -> Iterator[Change]:
        """All that differs from BELOW, ascending."""
        for area in sorted(self._areas):
            for start, stop, state in self.runs(area * AREA_BLOCKS, (area + 1) * AREA_BLOCKS):
                if state != BELOW:
                    yield Change(start, stop - start, state)


def _parts(first: int, last: int) -> Iterator[tuple[int, int, int]]:
    """[first, last) by area: its number, and the part's bounds inside it."""
    while first < last:
        area, start = divmod(first, AREA_BLOCKS)
        stop = min(AREA_BLOCKS, start + last - first)
        yield area, start, stop
        first += stop - start
