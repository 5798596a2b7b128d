"""What the guest did to its disks, as the checkers know it: written by the guest's side alone.

A disk's history is a list of changes in order. Each has the stamp at which it counts:

===========  ====================================================================================
change       stamp
===========  ====================================================================================
record       that of its record; one that found no room in the ring has a stamp too
uncertain    the instant its server was killed half way: it may count then, or when the product
             has noticed (its gap has ended, or the first sync with a server that was started
             since), and until then in any part
reset        the instant of a power loss: the disk's content is what the power loss left
===========  ====================================================================================

Causes are why history may have a gap; a gap without one is a violation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

Kind = Literal["record", "uncertain", "reset"]


@dataclass(frozen=True, slots=True)
class Change:
    kind: Kind
    stamp: int
    offset: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Cause:
    kind: Literal["dropped", "killed", "power", "ring lost", "spool", "rolled back"]
    stamp: int
    earliest: int  # no gap that it causes begins before, but for the next
    ring_began: int = 0  # the receiver may know no record of the ring: the gap begins before them


@dataclass(slots=True)
class DiskModel:
    name: str
    initial: bytes
    changes: list[Change] = field(default_factory=list)
    flushes: list[int] = field(default_factory=list)
    causes: list[Cause] = field(default_factory=list)
    server_starts: list[int] = field(default_factory=list)
    ring_firsts: dict[int, int] = field(default_factory=dict)  # ring id -> its first record

    @property
    def last_stamp(self) -> int:
        return max((change.stamp for change in self.changes), default=0)

    def record(self, stamp: int, offset: int, data: bytes) -> None:
        self.changes.append(Change("record", stamp, offset, data))

    def uncertain(self, instant: int, offset: int, data: bytes) -> None:
        self.changes.append(Change("uncertain", instant, offset, data))

    def reset(self, instant: int, content: bytes) -> None:
        self.changes.append(Change("reset", instant, 0, content))

    def cause(
        self,
        kind: Literal["dropped", "killed", "power", "ring lost", "spool", "rolled back"],
        stamp: int,
        earliest: int,
        ring_began: int = 0,
    ) -> None:
        self.causes.append(Cause(kind, stamp, earliest, ring_began))

    def state_at(
        self, stamp: int, leave_out: Callable[[Change], bool] = lambda _change: False
    ) -> bytes:
        content = bytearray(self.initial)
        for change in self.changes:
            if change.stamp <= stamp and not leave_out(change):
                content[change.offset : change.offset + len(change.data)] = change.data
        return bytes(content)

    def explains(self, shown: bytes, stamp: int, settled: Callable[[int], bool]) -> str:
        """Why this cannot be the disk at that instant; empty when it can.

        ``settled(instant)``: whether a killed server's writes of then have been noticed by the
        instant asked for.
        """
        expected = self.state_at(stamp)
        if shown == expected:
            return ""

        def is_open(change: Change) -> bool:
            return change.kind == "uncertain" and not settled(change.stamp)

        def is_left_out(cut: int, change: Change) -> bool:
            return is_open(change) and change.stamp > cut

        # Of several the older ones may be there alone: a gap that was open already noticed them.
        cuts = [0, *(change.stamp for change in self.changes if is_open(change))]
        allowed = [self.state_at(stamp, partial(is_left_out, cut)) for cut in cuts]
        for at in range(0, len(shown), 512):
            sector = shown[at : at + 512]
            if all(sector != state[at : at + 512] for state in (expected, *allowed)):
                return self._describe(at, sector, stamp)
        return ""

    def _describe(self, at: int, sector: bytes, stamp: int) -> str:
        """Which content is where, in words."""

        def covers(change: Change) -> bool:
            return change.offset <= at < change.offset + len(change.data)

        due = [c for c in self.changes if covers(c) and c.stamp <= stamp]
        wanted = f"the {due[-1].kind} of {due[-1].stamp}" if due else "the initial content"
        found = "something else"
        if sector == self.initial[at : at + 512]:
            found = "the initial content"
        for change in self.changes:
            if covers(change) and change.data[at - change.offset :][:512] == sector:
                found = f"the {change.kind} of {change.stamp}"
        return f"disk {self.name} at {stamp}: byte {at} shows {found}, not {wanted}"


@dataclass(frozen=True, slots=True)
class Remembered:
    """What held when a copy of the receiver's store was made."""

    number: int
    watermark: int
    checkpoints: dict[str, int]
    offered: dict[int, dict[str, bytes]]


@dataclass(slots=True)
class Model:
    disks: dict[str, DiskModel] = field(default_factory=dict)
    # What the source has been told is durable.
    generation: int = 0  # counts roll-backs
    acknowledged_number: int = 0
    acknowledged_watermark: int = 0
    sent_watermarks: dict[int, int] = field(default_factory=dict)  # by frame number
    checkpoints: dict[str, int] = field(default_factory=dict)  # durable, as the source was told
    # Points that were offered once, with a digest per disk of what they showed.
    offered: dict[int, dict[str, bytes]] = field(default_factory=dict)

    def sent(self, number: int, watermark: int) -> None:
        self.sent_watermarks[number] = watermark

    def acknowledged(self, number: int) -> None:
        if number > self.acknowledged_number:
            self.acknowledged_number = number
            watermark = self.sent_watermarks.get(number, 0)
            self.acknowledged_watermark = max(self.acknowledged_watermark, watermark)

    def remember(self) -> Remembered:
        return Remembered(
            self.acknowledged_number,
            self.acknowledged_watermark,
            dict(self.checkpoints),
            dict(self.offered),
        )

    def roll_back(self, to: Remembered) -> None:
        """The receiver's store is an older one now."""
        self.generation += 1
        for disk in self.disks.values():
            last = max(self.acknowledged_watermark, disk.last_stamp)
            disk.cause("rolled back", last, to.watermark + 1)
        self.acknowledged_number, self.acknowledged_watermark = to.number, to.watermark
        self.checkpoints, self.offered = dict(to.checkpoints), dict(to.offered)
